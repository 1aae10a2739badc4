"""YAML in which a key that stands twice is a mistake."""

from __future__ import annotations

import yaml

from era.errors import UserError


class UniqueKeysLoader(yaml.SafeLoader):
    """YAML's safe loader, which refuses what it would read as the last of several entries of one name.

    Entries that ``<<`` merges into a mapping may be named there again: they are defaults.
    """

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """A mapping as it stands in the file, before anything is merged into it.

        Raises:
            UserError: a key stands in it twice.
        """
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(
                    f"{self.name}: {key.value} stands in line {lines[key.value]} and again in line {line} of the same "
                    "mapping, where only the last would count: give one another name, or delete it."
                )
            lines[key.value] = line
        return node
