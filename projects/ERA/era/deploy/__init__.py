"""Deployment: a trained student as a folder that :mod:`era_runtime` runs.

:mod:`~era.deploy.source` reads a run, :mod:`~era.deploy.formats` writes its model (:mod:`~era.deploy.batched` over
batches, :mod:`~era.deploy.tensorrt` for TensorRT), :mod:`~era.deploy.describe` its manifest, :mod:`~era.deploy.model` puts
eager behind the runtime's interface, :mod:`~era.deploy.parity` compares the two, :mod:`~era.deploy.export` is the
command around them, and :mod:`~era.deploy.evaluate` judges what was exported. None of it knows a method or a
family of detectors by name.
"""
