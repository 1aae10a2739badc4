"""Distillation methods. A file or folder here is a method; importing this package registers all of them."""

import importlib
import pkgutil

from era.methods.base import Chart, Method, Needs

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["Chart", "Method", "Needs"]
