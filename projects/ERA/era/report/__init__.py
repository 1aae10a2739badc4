"""The HTML report behind ``tools/report.py``: one self-contained file from one or several runs.

``cli`` parses; ``write`` puts it together; ``runs`` reads a run's folder, ``scores`` its AP by class
and size, ``examples`` the pictures, ``deployed`` the deployment folders; ``charts``, ``tables``,
``gallery`` and ``page`` turn them into HTML, with ``style.css`` and ``script.js`` put into it.
"""

from era.report.write import write_report

__all__ = ["write_report"]
