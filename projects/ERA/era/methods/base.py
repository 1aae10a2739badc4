"""What a distillation method is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from era.errors import UserError
from era.modeling.step import DistillationStep
from era.modeling.teacher import Teacher

METHOD_REGISTRY = Registry("DISTILLATION_METHOD")
METHOD_REGISTRY.__doc__ = """
Distillation methods by name. An entry is called with ``(cfg, student, teacher)`` and returns a
:class:`Method`; ``MODEL.DISTILLER.METHODS`` lists the names.
"""


class Method(nn.Module):
    """Base of the distillation methods.

    A method owns the modules that only training needs (adapters, MBRNet); they are saved in training
    checkpoints and are in no student. It must not draw from the global random state, and a loss whose
    weight is 0 is left out and its modules are frozen, so that plain training is reproduced exactly and
    DDP waits for nothing.
    """

    def losses(self, step: DistillationStep) -> dict[str, Tensor]:
        """Weighted losses by name (``loss_<method>_<term>``); their sum is added to the student's.

        Statistics belong in the event storage, never in this dict: the trainer sums all of it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its losses are")

    def detector(self, student: GeneralizedRCNN) -> Callable | None:
        """Another detector than the plain student for inference, or None.

        The callable takes ``(batched_inputs, do_postprocess)`` and returns what
        ``GeneralizedRCNN.inference`` returns.
        """
        return None


def build_methods(cfg: CfgNode, student: GeneralizedRCNN, teacher: Teacher) -> nn.ModuleDict:
    """The methods that ``MODEL.DISTILLER.METHODS`` lists, by their lower-case names.

    Raises:
        UserError: an unknown or repeated name, or a method's own check failed.
    """
    known = sorted(name for name, _ in METHOD_REGISTRY)
    methods = nn.ModuleDict()
    for name in cfg.MODEL.DISTILLER.METHODS:
        if name not in known:
            raise UserError(
                f"MODEL.DISTILLER.METHODS names {name!r}: expected names out of {', '.join(known)}."
            )
        if name.lower() in methods:
            raise UserError(f"MODEL.DISTILLER.METHODS names {name!r} twice: name it once.")
        methods[name.lower()] = METHOD_REGISTRY.get(name)(cfg, student, teacher)
    return methods
