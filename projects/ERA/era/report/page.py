"""The HTML document from the templates: everything is escaped, and nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from era.report.looks import COLOURS

NONE = "–"  # where a value is not known
CLEAR = 0.05  # points; a smaller difference is shown as none


def render(context: Mapping[str, object]) -> str:
    """The page, with style and script inside; ``context`` is what ``templates/page.html`` names."""
    environment = Environment(
        loader=PackageLoader("era.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "pixels": pixels}
    script = _resource("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        context,
        colours=COLOURS,
        style=_resource("style.css"),
        script=script,
        script_hash=f"sha256-{digest}",
    )


def number(value: float | None, form: str = ".1f") -> str:
    """A number as text, or a dash."""
    known = value is not None and math.isfinite(value)
    return format(value, form).replace("-", "−") if known else NONE


def signed(value: float | None, form: str = ".1f") -> tuple[str, str]:
    """A difference with its sign, and what it is: "better", "worse", "same", or "" if unknown."""
    if value is None or not math.isfinite(value):
        return NONE, ""
    if abs(value) < CLEAR:
        return f"±{0:{form}}", "same"
    return number(value, f"+{form}"), "better" if value > 0 else "worse"


def pixels(value: float | None) -> str:
    """A difference of boxes in pixels: how much of a difference by rounding is no news."""
    return "below 0.001" if value is not None and 0 < value < 0.001 else number(value, ".2g")


def _resource(name: str) -> Markup:
    """A file of the package, as it is."""
    return Markup(files("era.report").joinpath("templates", name).read_text(encoding="utf-8"))
