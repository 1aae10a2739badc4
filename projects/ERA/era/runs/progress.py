"""How far the runs are: one tqdm bar over the optimiser steps of all of them."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

LINE_EVERY = 15.0  # seconds between two lines where the output is no terminal
COUNT = "{n_fmt}/{total_fmt} {unit}s [{elapsed}{postfix}]"


class Progress:
    """Renews one line on a terminal; elsewhere, such as in a log file, writes a line now and then.

    Args:
        total: optimiser steps of all runs, or how many there are of another unit.
        done: how many of these were done before.
        unit: what is counted.
    """

    def __init__(
        self, total: int, done: int = 0, stream: TextIO | None = None, *, unit: str = "step"
    ):
        self.stream = stream or sys.stdout
        self.is_terminal = self.stream.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            file=self.stream if self.is_terminal else _Lines(self.stream),
            unit=unit,
            miniters=1,
            mininterval=1.0 if self.is_terminal else LINE_EVERY,
            dynamic_ncols=self.is_terminal,
            bar_format=f"{{percentage:3.0f}}%|{{bar}}| {COUNT}" if self.is_terminal else COUNT,
        )

    def show(self, total: int, done: int, left: float | None, where: str) -> None:
        """Show the state: steps of all runs, those that are done, the seconds that are left as far as they are
        known, and which run stands where."""
        self._bar.total = total
        about = "?" if left is None else tqdm.format_interval(left)
        self._bar.set_postfix_str(
            ", ".join(filter(None, [f"about {about} left", where])), refresh=False
        )
        self._bar.update(done - self._bar.n)
        if self.is_terminal:
            self._bar.refresh()  # the clock goes on where no step was made

    def say(self, text: str) -> None:
        """Lines that stay."""
        tqdm.write(text, file=self.stream)
        self.stream.flush()

    def close(self) -> None:
        """Leave the bar where it is; what follows goes below."""
        self._bar.close()


class _Lines:
    """A stream for tqdm in which every state is a line of its own, without control characters."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None)

    def write(self, text: str) -> None:
        if line := text.strip():  # carriage returns and the blanks that erase a longer line
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()
