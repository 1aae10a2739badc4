"""How the step grows with image size and with batch."""

from __future__ import annotations

import gc
from collections.abc import Sequence

from era.benchmark import report
from era.benchmark.measure import measure, reports
from era.benchmark.rows import FLOOR, PLAIN, Bench, run_name


def grow(
    bench: Bench,
    shape: tuple[int, int, int],
    sizes: Sequence[tuple[int, int]],
    *,
    warmup: int,
    repeats: int,
) -> dict[str, list[dict]]:
    """Measure and print tables of the plain step, the floor and the run's methods, each table's rows taking
    turns.

    Args:
        shape: height and width in pixels, and images, where they do not vary.
        sizes: heights and widths of the table over image sizes.
        warmup, repeats: rounds, as in :func:`era.benchmark.measure.measure`.

    Returns:
        Row reports of the tables ``sizes`` and ``images``.
    """

    def over(what: str, shapes: Sequence[tuple[int, int, int]]) -> list[dict]:
        found = []
        for height, width, images in shapes:
            inputs = bench.batch(height, width, images)
            plain = bench.plain_rows(inputs)
            methods = bench.distiller_row(run_name(bench.cfg), inputs, bench.methods())
            title = f"{what}: {images} image(s) of {height}x{width}"
            gc.collect()
            times = measure(
                [plain[PLAIN](), plain[FLOOR](), methods],
                bench.device,
                warmup=warmup,
                repeats=repeats,
                title=title,
            )
            measured = reports(times, bench.device)
            print(f"\n{title}\n\n{report.markdown(measured, base=FLOOR)}", flush=True)
            where = {"height": height, "width": width, "images": images}
            found += [{**row, **where} for row in measured]
        return found

    height, width, images = shape
    batches = (1, 2, 4) if bench.device.type == "cuda" else (1, 2)
    return {
        "sizes": over("size", [(*size, images) for size in sizes]),
        "images": over("batch", [(height, width, count) for count in batches]),
    }
