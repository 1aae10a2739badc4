"""The Faster R-CNN of toy_faster_rcnn.py under the teacher and the methods of configs/toy/era.yaml."""

from .toy_faster_rcnn import model  # noqa: F401

frame = {"config_file": "configs/toy/era.yaml", "opts": ["OUTPUT_DIR", "output/lazy/era"]}
