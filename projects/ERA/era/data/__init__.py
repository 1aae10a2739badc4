"""Data: generated shapes (``toy``), trees on real photos (``trees``), COCO-format data named in the config (``datasets``)."""
