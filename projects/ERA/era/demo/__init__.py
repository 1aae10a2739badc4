"""The demo behind ``make demo``: teacher, plain students and ERA students, compared on toy data.

``cli`` puts it together; ``runs`` says what is trained, ``schedule`` runs it, ``progress`` shows it,
``measure`` times the results, and ``table``, ``figures`` and ``pictures`` present them.
"""
