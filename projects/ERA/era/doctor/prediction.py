"""Memory and hours of the whole run, from the steps that were taken, and what that assumes."""

from __future__ import annotations

import statistics

from era.data.unlabeled import pictures
from era.doctor.case import OK, WARNING, Case, Finding
from era.environment import machine

FULL = 0.9  # of a GPU's memory: above it a crowded picture, or fragmentation, may end the run
HOUR = 3600


def check(case: Case) -> Finding:
    """What the run will take; nothing is measured here."""
    steps = case.step_results[1]
    several = case.step_results.get(2) if case.processes > 1 else None
    source = several if several is not None and several["on_gpu"] == steps["on_gpu"] else steps
    second = statistics.median(source["seconds"])
    cfg = case.cfg
    training = cfg.SOLVER.MAX_ITER * second / HOUR
    count, test_pictures = evaluations(cfg), _test_pictures(case)
    each = steps["test_seconds"]
    testing = count * test_pictures * each / case.processes / HOUR if each else 0.0
    details = {
        "hours_of_training": training,
        "hours_of_evaluation": testing if each else None,
        "seconds_a_step": second,
        "mib_a_process": max(source["peak_mib"]),
        "evaluations": count,
    }
    assumed = [
        f"{cfg.SOLVER.MAX_ITER:,} steps (SOLVER.MAX_ITER on {case.processes} process(es)) of {second:.2f} s, the median "
        f"of {len(source['seconds'])} in {source['processes']} process(es) after one that warms up",
        f"{count} evaluation(s) of {test_pictures:,} picture(s) at {each:.2f} s on one process: of the student as it "
        "starts, a trained one has another number of detections"
        if each
        else "no evaluation, for there is no test set or no student to test",
        "nothing else runs on this machine, and the data keep coming as fast; checkpoints and the start are not counted",
    ]
    if case.processes > source["processes"]:
        assumed.append(
            f"{case.processes} processes take a step as fast as {source['processes']}: the exchange of gradients among "
            "more is not in it"
        )
    memory = f"{max(source['peak_mib']) / 1024:.2f} GiB"
    hours = f"{training + testing:.2f} hours, {testing:.2f} of them evaluation"
    if not steps["on_gpu"]:
        assumed.append(
            "these are figures of a CPU: the memory is what a process holds with all its libraries, and neither it nor "
            "the hours say anything about a GPU"
        )
        sentence = f"about {hours}, and {memory} of memory a process, on this machine's CPU ({machine()['cpu']})"
        return Finding(OK, sentence, {**details, "assumptions": assumed}, _listed(assumed))
    whole, other = source["gpu_mib"], source["outside_mib"]
    used = max(source["peak_mib"]) + other
    details |= {"gpu_mib": whole, "mib_outside_torch": other}
    assumed.append(
        f"the memory is torch's at most over the steps, of which the first had pictures of the largest "
        f"INPUT.MIN_SIZE_TRAIN, and {other:,.0f} MiB beside it (CUDA, other programs); pictures with more objects, or of "
        "a longer form, take more"
    )
    sentence = (
        f"about {hours}, and {used / 1024:.2f} of {whole / 1024:.2f} GiB a GPU ({machine()['gpu']})"
    )
    details["assumptions"] = assumed
    if used > FULL * whole:
        return Finding(
            WARNING,
            f"{sentence}, which is nearly all: lower SOLVER.IMS_PER_BATCH, or raise SOLVER.ACCUMULATION_STEPS",
            details,
            _listed(assumed),
        )
    return Finding(OK, sentence, details, _listed(assumed))


def evaluations(cfg) -> int:
    """How often a run evaluates: every ``TEST.EVAL_PERIOD`` steps and at the end; never without a test set."""
    if not cfg.DATASETS.TEST:
        return 0
    period = cfg.TEST.EVAL_PERIOD
    return 1 + ((cfg.SOLVER.MAX_ITER - 1) // period if period > 0 else 0)


def _test_pictures(case: Case) -> int:
    return sum(len(pictures("DATASETS.TEST", name)) for name in case.cfg.DATASETS.TEST)


def _listed(assumptions: list[str]) -> str:
    return "assumed:\n" + "\n".join(f"- {text}" for text in assumptions)
