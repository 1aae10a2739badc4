"""Deployment: a trained student as a folder that :mod:`era_runtime` runs.

:mod:`~era.deploy.source` reads a run, :mod:`~era.deploy.model` puts together the model that is deployed,
:mod:`~era.deploy.formats` writes it, :mod:`~era.deploy.parity` compares it with eager, and
:mod:`~era.deploy.export` is the command around them.
"""
