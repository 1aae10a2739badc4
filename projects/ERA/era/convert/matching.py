"""Every tensor of a checkpoint finds its place in a model, or is named as left over."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from detectron2.config import CfgNode
from torch import Tensor, nn

from era.convert import mmdetection
from era.convert.libraries import Library
from era.convert.source import COUNTER
from era.errors import UserError

BOTTOM_UP = "backbone.bottom_up."
FPN, HEADS = "FPN", "heads"
BY_NAME, BY_ORDER = "by name", "by order"


@dataclass
class Matches:
    """What became of a checkpoint's tensors; batch norms' counters are in none of the lists.

    Attributes:
        weights: tensors under the names of the model.
        backbone: the backbone's tensors under the names of its library.
        places: name in the file and name in the model, of each that has a place.
        left: names in the file of those that have none.
        new: names in the model that the file does not fill.
        how: whether the backbone's names were known, or its layers matched in order.
    """

    weights: dict[str, Tensor]
    backbone: dict[str, Tensor]
    places: list[tuple[str, str]]
    left: list[str]
    new: list[str] = field(default_factory=list)
    how: str = BY_NAME

    @property
    def renamed(self) -> list[tuple[str, str]]:
        """Of ``places`` those whose name is another one, but for what stands before all names of a backbone."""
        return [
            (old, new)
            for old, new in self.places
            if old != new.removeprefix(BOTTOM_UP).removeprefix("body.")
        ]

    @property
    def left_share(self) -> float:
        """Of all tensors of the file, how many have no place, 0 to 1."""
        return len(self.left) / max(len(self.left) + len(self.places), 1)


def match(
    weights: Mapping[str, Tensor], library: Library, model: nn.Module, cfg: CfgNode, *, what: str
) -> Matches:
    """Find the places of all tensors.

    Args:
        weights: of a :class:`~era.convert.source.SourceFile`.
        library: whose network the backbone's tensors are of.
        model: the detector of ``cfg``.
        what: how a message names the file.

    Raises:
        UserError: the backbone is not filled, a part of the detector is filled by half, or a shape differs.
    """
    weights = {k: v for k, v in weights.items() if not k.endswith(COUNTER)}
    target = {k: v for k, v in model.state_dict().items() if not k.endswith(COUNTER)}
    if any(name.startswith(BOTTOM_UP) for name in weights):
        raise UserError(
            f"{what} has Detectron2's names already: nothing is to be converted, name it in MODEL.WEIGHTS."
        )
    prefix = mmdetection.BACKBONE if mmdetection.is_mmdetection(list(weights)) else ""
    backbone = {k: v for k, v in weights.items() if k.startswith(prefix)} if prefix else weights
    names, how = _library_names(backbone, prefix, library, target, what)
    found = Matches({}, {}, [], [], how=how)
    levels = sorted(
        {int(level) for level in re.findall(r"backbone\.fpn_lateral(\d)", " ".join(target))}
    )
    for name, value in weights.items():
        if name in names:
            place = BOTTOM_UP + library.target_name(names[name])
        elif prefix and mmdetection.is_part(name):
            place = mmdetection.detector_name(name, levels)
            value = mmdetection.in_detectron2s_order(place, value, cfg)
        else:
            place = ""
        if place not in target or place in found.weights:
            found.left.append(name)
            continue
        if value.shape != target[place].shape:
            raise UserError(
                f"{what} is of another model than its config: its {name} is of shape {tuple(value.shape)} where {place} "
                f"is {tuple(target[place].shape)}; give the config that it belongs to, or another file."
            )
        found.weights[place] = value
        found.places.append((name, place))
        if name in names:
            found.backbone[names[name]] = value
    found.new = [name for name in target if name not in found.weights]
    _check_whole(found, target, library, what)
    return found


def _library_names(
    backbone: Mapping[str, Tensor],
    prefix: str,
    library: Library,
    target: Mapping[str, Tensor],
    what: str,
) -> tuple[dict[str, str], str]:
    """The library's name of each of the backbone's tensors, and how it was found."""
    own = library.network.state_dict()
    needed = {k for k in own if BOTTOM_UP + library.target_name(k) in target}
    by_name = {name: name[len(prefix) :] for name in backbone}
    if needed <= set(by_name.values()):
        return by_name, BY_NAME
    # The same layers under other names: then kinds and shapes follow each other alike, up to the end of the backbone.
    own = {k: v for k, v in own.items() if not k.endswith(COUNTER)}
    last = max(i for i, name in enumerate(own) if name in needed)
    rows = [list(own.items())[: last + 1], list(backbone.items())[: last + 1]]
    own_form, form = ([(k.rsplit(".", 1)[-1], tuple(v.shape)) for k, v in row] for row in rows)
    if own_form == form:
        return {theirs: ours for (ours, _), (theirs, _) in zip(*rows, strict=True)}, BY_ORDER
    missing = [name for name in own if name in needed and name not in by_name.values()]
    raise UserError(
        f"{what} is not of {library.name}, which the config asks for: it lacks {missing[0]}"
        f"{f' (and {len(missing) - 1} more tensors)' if len(missing) > 1 else ''}, and its layers are not the same ones in "
        "the same order either; give the config of its own network, or another file."
    )


def _check_whole(found: Matches, target: Mapping[str, Tensor], library: Library, what: str) -> None:
    """Backbone, FPN and heads are each filled as a whole; FPN and heads may be left as they are."""
    for part in ("backbone", FPN, HEADS):
        names = [name for name in target if _part_of(name) == part]
        new = [name for name in names if name not in found.weights]
        if new and (part == "backbone" or len(new) < len(names)):
            raise UserError(
                f"{what} fills the {part} of the config's model by half: {new[0]}"
                f"{f' and {len(new) - 1} more' if len(new) > 1 else ''} of {len(names)} tensors are not in it "
                f"({library.name}); give the config that it belongs to, or another file."
            )


def _part_of(name: str) -> str:
    if name.startswith(BOTTOM_UP):
        return "backbone"
    return FPN if name.startswith("backbone.") else HEADS
