"""What came of the matrix of methods by families, as the Markdown of docs/families.md."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from builders import REPO
from tabulate import tabulate

from era.config import load_config

if TYPE_CHECKING:
    from matrix import Kind, Matrix

BEGIN = "<!-- written by tests/matrix.py: do not edit -->"
END = "<!-- end of what tests/matrix.py writes -->"


def method_of(row: str) -> str:
    """The method's name out of a row's: what stands before a comma."""
    return row.split(",")[0]


def column_name(student: Kind, teacher: Kind) -> str:
    """A heading."""
    return student.name if student == teacher else f"{student.name} from {teacher.name}"


def families_in_words(matrix: Matrix) -> str:
    """A table of what each kind is called in a config, and which of its heads can judge features."""
    rows = [
        [
            student.name,
            f"`{load_config(str(student.config)).MODEL.META_ARCHITECTURE}`",
            f"`{student.family.num_classes_key()}`",
            ", ".join(student.family.parts) or "none",
            ", ".join(student.family.soft_parts) or "none",
            f"`{student.config.relative_to(REPO)}`",
        ]
        for student, teacher in matrix.columns
        if student == teacher
    ]
    headings = ["family", "`MODEL.META_ARCHITECTURE`", "classes", "judge by the ground truth"]
    headings += ["judge by their own outputs", "toy config"]
    return tabulate(rows, headings, tablefmt="github", disable_numparse=True)


def in_words(matrix: Matrix, rows: list[str]) -> str:
    """The families; two tables of ``yes`` and numbers of reasons, with teachers of the same family and of another one; and
    the reasons."""
    cells = {(row, column): reason_of(matrix, row, column) for row, column in matrix.cells}
    reasons = list(dict.fromkeys(sentence for sentence in cells.values() if sentence))
    number = {sentence: str(i + 1) for i, sentence in enumerate(reasons)} | {"": "yes"}

    def table(columns: list[tuple[Kind, Kind]]) -> str:
        found = [[heading(row), *(number[cells[row, c]] for c in columns)] for row in rows]
        headings = ["method", *(column_name(*c) for c in columns)]
        return tabulate(found, headings, tablefmt="github", disable_numparse=True)

    same = [c for c in matrix.columns if c[0] == c[1]]
    other = [c for c in matrix.columns if c[0] != c[1]]
    parts = [families_in_words(matrix), "Student and teacher of one family:", table(same)]
    parts += ["A teacher of another family:", table(other)] if other else []
    parts += ["Why not; METHOD stands for the method's name:"] if reasons else []
    parts += ["\n".join(f"{i + 1}. {sentence}" for i, sentence in enumerate(reasons))]
    return "\n\n".join(part for part in parts if part)


def heading(row: str) -> str:
    """Of a row: the method's name as code."""
    name = method_of(row)
    return f"`{name}`{row.removeprefix(name)}"


def reason_of(matrix: Matrix, row: str, column: tuple[Kind, Kind]) -> str:
    """What a cell holds; of a sentence that several rows say alike, with METHOD for their methods' names."""
    said = matrix.cells[row, column]
    common = without_name(said, row)
    sayers = {
        method_of(other)
        for (other, _), cell in matrix.cells.items()
        if without_name(cell, other) == common
    }
    return common if len(sayers) > 1 else said


def without_name(sentence: str, row: str) -> str:
    """A sentence with METHOD for the name of a row's method, also in keys."""
    return re.sub(rf"\b{method_of(row)}\b", "METHOD", sentence, flags=re.IGNORECASE)


def replaced(page: str, text: str) -> str:
    """The page with this text between the markers.

    Raises:
        ValueError: not one pair of markers, in their order.
    """
    before, found, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not found or not end or BEGIN in after or END in after:
        raise ValueError(f"the page needs one line {BEGIN!r} and one line {END!r} after it")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"
