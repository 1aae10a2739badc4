"""The identity of a teacher in a training checkpoint."""

from __future__ import annotations

from era.errors import UserError


class TeacherRecord:
    """The teacher's entry in a training checkpoint: its source and hash, never its weights."""

    def __init__(self, teacher):
        self._teacher = teacher

    def state_dict(self) -> dict[str, str]:
        """Config file, weights and SHA-256 of the teacher."""
        return {**self._teacher.source, "sha256": self._teacher.sha256}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Refuse to go on with another teacher.

        Raises:
            UserError: the hashes differ.
        """
        if state["sha256"] != self._teacher.sha256:
            raise UserError(
                f"the checkpoint was trained with the teacher {state['weights']!r} (SHA-256 "
                f"{state['sha256'][:12]}...), MODEL.TEACHER.WEIGHTS {self._teacher.source['weights']!r} "
                f"is another ({self._teacher.sha256[:12]}...): name the same teacher to resume, or start "
                "a new run in another OUTPUT_DIR."
            )
