"""The HTML report behind ``tools/report.py``: one self-contained file from one or several runs.

``cli`` parses; ``write`` puts it together; ``scored`` says what a run is compared with, ``curves`` which
charts there are, ``examples`` which pictures, ``deployed`` what was exported; ``charts`` and ``overlay``
draw. ``page`` renders all of it with ``templates/``, where everything that is HTML lies.
"""

from era.report.write import write_report

__all__ = ["write_report"]
