"""Checkpoints of other libraries as checkpoints of Detectron2's models.

:mod:`~era.convert.source` reads a file, :mod:`~era.convert.libraries` knows the networks that torchvision and timm build and
what their layers are called here, :mod:`~era.convert.mmdetection` the names of a detector's other parts,
:mod:`~era.convert.matching` finds every tensor its place, :mod:`~era.convert.forward` compares both networks on a picture, and
:mod:`~era.convert.cli` is the command around them.
"""
