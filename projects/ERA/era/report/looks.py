"""Colours and dashes of the runs and curves. The page's style sheet is given the colours from here."""

from __future__ import annotations

# Okabe and Ito's colours, which colour-blind people tell apart, for runs and terms; from light to dark
# for curves that have an order.
COLOURS = {
    "c0": "#d55e00", "c1": "#0072b2", "c2": "#009e73",
    "c3": "#b8578f", "c4": "#3a9fdb", "c5": "#b58900", "ct": "#5c6068",
    "r0": "#8ab83a", "r1": "#3fae6b", "r2": "#22908c",
    "r3": "#2f6f8e", "r4": "#3d4d8a", "r5": "#481567",
}  # fmt: skip
RUN_LOOKS = ("c0", "c1", "c2", "c3", "c4", "c5")
TERM_LOOKS = ("c1", "c4", "c0", "c2", "c3", "c5")
ORDERED_LOOKS = ("r0", "r1", "r2", "r3", "r4", "r5")
TEACHER_LOOK = "ct"

# SVG dash arrays.
DASHES = ("", "7 4", "2 3", "9 3 2 3")
INHERITED_DASH = "7 4"  # where the student started from weights of the teacher
TEACHER_DASH = "2 3"
