"""Data: the generated toy dataset (``toy``) and COCO-format data named in the config (``coco``)."""
