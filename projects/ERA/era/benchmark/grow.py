"""How the step grows with N, with image size and with batch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

from era.benchmark import report
from era.benchmark.measure import measure, reports
from era.benchmark.rows import FAST, FLOOR, PLAIN, Bench, Row

BRANCHES = (1, 2, 4, 8)


def grow(
    bench: Bench,
    shape: tuple[int, int, int],
    sizes: Sequence[tuple[int, int]],
    *,
    warmup: int,
    repeats: int,
) -> dict[str, list[dict]]:
    """Measure and print tables of the floor and ERA fast, each table's rows taking turns.

    Args:
        shape: height and width in pixels, and images, where they do not vary.
        sizes: heights and widths of the table over image sizes.
        warmup, repeats: rounds, as in :func:`era.benchmark.measure.measure`.

    Returns:
        Row reports of the tables ``branches``, ``sizes`` and ``images``.
    """

    def run(title: str, rows: list[Row]) -> list[dict]:
        gc.collect()
        times = measure(rows, bench.device, warmup=warmup, repeats=repeats, title=title)
        found = reports(times, bench.device)
        print(f"\n{title}\n\n{report.markdown(found, base=FLOOR)}", flush=True)
        return found

    height, width, images = shape
    inputs = bench.batch(*shape)
    rows = [bench.plain_rows(inputs)[FLOOR]()]
    for count in BRANCHES:
        method = bench.method("NUM_BRANCHES", count, "SCALES", [0.5**i for i in range(count)])
        rows.append(bench.era_row(f"{FAST}, N = {count}", inputs, method))
    batches = (1, 2, 4) if bench.device.type == "cuda" else (1, 2)
    return {
        "branches": run(f"N, {images} image(s) of {height}x{width}", rows),
        "sizes": _over(bench, "size", [(*size, images) for size in sizes], run),
        "images": _over(bench, "batch", [(height, width, count) for count in batches], run),
    }


def _over(
    bench: Bench,
    what: str,
    shapes: Sequence[tuple[int, int, int]],
    run: Callable[[str, list[Row]], list[dict]],
) -> list[dict]:
    found = []
    for height, width, images in shapes:
        inputs = bench.batch(height, width, images)
        plain = bench.plain_rows(inputs)
        rows = [plain[PLAIN](), plain[FLOOR](), bench.era_row(FAST, inputs, bench.method())]
        measured = run(f"{what}: {images} image(s) of {height}x{width}", rows)
        found += [{**row, "height": height, "width": width, "images": images} for row in measured]
    return found
