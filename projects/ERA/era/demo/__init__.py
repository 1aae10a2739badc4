"""The demo behind ``make demo``: a teacher and students, plain and distilled, compared on toy data.

``studies/demo.yaml`` says what is trained and :mod:`era.runs` does it; ``cli`` puts the demo together, and
``table``, ``figures``, ``pictures`` and ``report`` present the results.
"""
