"""Measuring rows: interleaved repeats, peak memory, a profile."""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from era.benchmark.rows import Row
from era.devices import synchronise

MIB = 2**20
SYNCHRONISING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
)
PROFILE_ROWS = 40


@dataclass
class Times:
    """Measurements of one row, one a round.

    Attributes:
        wall_ms: wall time of a step, milliseconds, the device synchronised before and after.
        cpu_ms: processor time of the process in that step, milliseconds, over all threads.
        peak_mib: peak memory, MiB; None if it was not measured.
    """

    name: str
    base: str
    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    peak_mib: float | None = None

    def report(self, base: Times | None, *, cpu: bool) -> dict:
        """Medians, extremes and ratios to ``base``, for the table and for JSON.

        Args:
            base: the row of the denominators, None if it was not measured.
            cpu: whether processor time says something (it does not on a GPU).
        """
        found = {
            "name": self.name,
            "base": self.base,
            "ms": _summary(self.wall_ms),
            "ratio": _median_ratio(self.wall_ms, base and base.wall_ms),
            "ratio_of_medians": base
            and statistics.median(self.wall_ms) / statistics.median(base.wall_ms),
            "cpu_ms": _summary(self.cpu_ms) if cpu else None,
            "cpu_ratio": _median_ratio(self.cpu_ms, base and base.cpu_ms) if cpu else None,
            "peak_mib": self.peak_mib,
            "peak_ratio": None,
        }
        if self.peak_mib is not None and base is not None and base.peak_mib:
            found["peak_ratio"] = self.peak_mib / base.peak_mib
        return found


def measure(
    rows: Sequence[Row], device: torch.device, *, warmup: int, repeats: int, title: str
) -> list[Times]:
    """Run rows in turn, every round in the opposite order of the one before.

    On a GPU the first round also takes peak memory, of everything that is allocated: weights, the
    student's momentum and the row's own step.

    Args:
        warmup, repeats: rounds that do not count, and that do.
        title: what is measured, for the progress on stderr.
    """
    times = {row.name: Times(row.name, row.base) for row in rows}
    on_gpu = device.type == "cuda"
    if on_gpu:
        _gpu_memory(rows, times, device)
    last: dict[str, float] = {}
    for number in range(warmup + repeats):
        order = rows if number % 2 == 0 else rows[::-1]
        for position, row in enumerate(order):
            left = None
            if len(last) == len(rows):
                rest = sum(last[r.name] for r in order[position:])
                left = rest + sum(last.values()) * (warmup + repeats - number - 1)
            kind = f"round {number + 1 - warmup}/{repeats}" if number >= warmup else "warm-up"
            progress(f"{title}: {kind}, {row.name}", left)
            start = time.perf_counter()
            wall, cpu = timed(row, device)
            last[row.name] = time.perf_counter() - start
            if number >= warmup:
                times[row.name].wall_ms.append(1000 * wall)
                times[row.name].cpu_ms.append(1000 * cpu)
    progress("", None)
    return list(times.values())


def reports(times: Sequence[Times], device: torch.device) -> list[dict]:
    """Every row's numbers, its ratios to its base included."""
    by_name = {row.name: row for row in times}
    return [row.report(by_name.get(row.base), cpu=device.type == "cpu") for row in times]


def timed(row: Row, device: torch.device) -> tuple[float, float]:
    """Wall and processor time of one step, seconds."""
    row.prepare()
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    row.step()
    synchronise(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _gpu_memory(rows: Sequence[Row], times: dict[str, Times], device: torch.device) -> None:
    for is_counted in (False, True):  # the first step also allocates momentum
        for row in rows:
            gc.collect()
            torch.cuda.empty_cache()
            row.prepare()
            torch.cuda.reset_peak_memory_stats(device)
            row.step()
            synchronise(device)
            if is_counted:
                times[row.name].peak_mib = torch.cuda.max_memory_allocated(device) / MIB


def resident_growth(build: Callable[[], Row], *, steps: int = 2) -> float:
    """Peak resident memory of this process beyond what it holds now, MiB, after building a row and
    doing its steps. For a fresh process, of which it is the only work."""
    before = resident_mib("VmRSS")
    row = build()
    for _ in range(steps):
        row.prepare()
        row.step()
    return resident_mib("VmHWM") - before


def resident_mib(entry: str) -> float:
    """Resident memory of this process in MiB: ``VmRSS`` now, ``VmHWM`` at most so far."""
    # Linux lets a child inherit ru_maxrss from the process that started it; /proc starts anew.
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines[entry].split()[0]) / 1024
    except (OSError, KeyError):
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def profile_rows(rows: Sequence[Row], device: torch.device) -> str:
    """A torch profile of one step of each row (the last two compared): operators by self time, what
    makes the host wait for the device, and by operator and shape what the last row adds."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    parts, by_shape = [], []
    for row in rows:
        timed(row, device)
        timed(row, device)
        row.prepare()
        with profile(activities=activities, record_shapes=True) as profiler:
            row.step()
            synchronise(device)
        averages = profiler.key_averages()
        key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        counts = {e.key: e.count for e in averages if e.key in SYNCHRONISING}
        parts += [
            f"== {row.name}: one step, operators by self time",
            averages.table(sort_by=key, row_limit=PROFILE_ROWS, max_name_column_width=60),
            "host waits for the device (calls): "
            + (", ".join(f"{name} {counts[name]}" for name in SYNCHRONISING if name in counts) or "none"),
            "",
        ]  # fmt: skip
        shaped = profiler.key_averages(group_by_input_shape=True)
        by_shape.append({(e.key, str(e.input_shapes)): (getattr(e, key), e.count) for e in shaped})
    base, own = by_shape[-2:]
    extra = {
        k: (t - base.get(k, (0, 0))[0], n - base.get(k, (0, 0))[1]) for k, (t, n) in own.items()
    }
    extra.update({k: (-t, -n) for k, (t, n) in base.items() if k not in own})
    parts.append(f"== {rows[-1].name} minus {rows[-2].name}: self time by operator and shapes")
    parts.append(f"{'ms':>10} {'calls':>6}  operator, shapes")
    largest = sorted(extra.items(), key=lambda item: -abs(item[1][0]))[:PROFILE_ROWS]
    parts += [f"{t / 1000:10.2f} {n:6d}  {op} {shapes[:150]}" for (op, shapes), (t, n) in largest]
    return "\n".join(parts) + "\n"


def progress(text: str, left: float | None) -> None:
    """A line on stderr, which renews itself on a terminal; ``left`` in seconds, None if not known."""
    is_terminal = sys.stderr.isatty()
    line = text + (f", {tqdm.format_interval(left)} left" if left is not None else "")
    if is_terminal:
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    elif text:
        print(line, file=sys.stderr, flush=True)


def _summary(values: Sequence[float]) -> dict:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": list(values),
    }


def _median_ratio(values: Sequence[float], base: Sequence[float] | None) -> float | None:
    if not base:
        return None
    return statistics.median(a / b for a, b in zip(values, base, strict=True))
