"""Entries in the memory of one process."""

from __future__ import annotations

from collections import OrderedDict

from era.modeling.teacher_cache.entry import Entry


class MemoryStore:
    """Entries in this process's memory; the least recently used leaves first.

    Args:
        budget: bytes that all entries together may take.
    """

    where = "memory"

    def __init__(self, budget: int):
        self.budget = budget
        self.held = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def get(self, key: str) -> Entry | None:
        """The entry of a key, now the most recently used; None if there is none."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry, at the cost of those that were not used for longest; one over the budget is not kept."""
        if entry.bytes > self.budget or key in self._entries:
            return
        while self.held + entry.bytes > self.budget:
            _, oldest = self._entries.popitem(last=False)
            self.held -= oldest.bytes
        self._entries[key] = entry
        self.held += entry.bytes
