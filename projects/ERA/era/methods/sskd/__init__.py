"""SSKD: similarities between two views of the objects, by a projection head that is trained first."""

from era.methods.sskd.method import SSKD

__all__ = ["SSKD"]
