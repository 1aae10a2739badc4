"""Runs deployment folders that ``tools/export.py`` made, whatever format they hold.

    predictor = era_runtime.load("deployed")
    detections = predictor(image)  # (H, W, 3) uint8, blue, green, red

Importing this package needs numpy, Pillow and nothing else; OpenCV is needed for videos and annotated
pictures, and a folder's own runtime when it is loaded. Folders of the formats ``onnx`` and ``openvino``
need neither torch nor detectron2.
"""

from era_runtime.errors import DeploymentError
from era_runtime.predictor import Detections, Predictor, load
from era_runtime.preprocess import read_image

__all__ = ["DeploymentError", "Detections", "Predictor", "load", "read_image"]
