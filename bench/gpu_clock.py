"""How runs are timed: by the device's events or the host's clock, warmed up, contenders in turn."""

from __future__ import annotations

import statistics
import time
from typing import Any, Callable

import torch

BASELINE = "torchdiffeq"
WARM_RUNS = 3  # kernels are compiled in the first, a CUDA graph is captured in the second, the third is like all others


class CudaClock:
    """Seconds between two CUDA events around a call, on the current stream; the device is idle before."""

    def __call__(self, run: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


class HostClock:
    """Seconds of a call by the host's clock."""

    def __call__(self, run: Callable[[], Any]) -> float:
        before = time.perf_counter()
        run()
        return time.perf_counter() - before


Clock = Callable[[Callable[[], Any]], float]
Rounds = dict[str, list[list[float]]]  # contender -> round -> seconds of its runs in that round


def warm(run: Callable[[], Any], clock: Clock, seconds: float) -> tuple[Any, float]:
    """(what the first run gave, seconds of the last): WARM_RUNS runs, or two when those take more than `seconds`."""
    box: list[Any] = []
    spent = 0.0
    for done in range(1, WARM_RUNS + 1):
        last = clock(lambda: box.append(run()))
        spent += last
        if done >= 2 and spent > seconds:
            break
    return box[0], last


def in_turn(
    runs: dict[str, Callable[[], Any]], firsts: dict[str, float], clock: Clock, seconds: float, least: int = 3, most: int = 30
) -> Rounds:
    """Times of warmed-up runs, A A B A A B: each contender's turn is as many runs as fit into the slowest one's, 10 at most.
    `least` to `most` rounds, until `seconds` are spent. firsts: about how long a run takes."""
    slowest = max(firsts.values())
    repeats = {name: max(1, min(10, int(slowest / max(firsts[name], 1e-7)))) for name in runs}
    rounds: Rounds = {name: [] for name in runs}
    spent = 0.0
    for done in range(most):
        if done >= least and spent > seconds:
            break
        for name, run in runs.items():
            rounds[name].append([clock(run) for _ in range(repeats[name])])
            spent += sum(rounds[name][-1])
    return rounds


def figures(rounds: Rounds, name: str, nfe: int) -> dict[str, Any]:
    """Of one contender: samples, median, best, per_evaluation, and ratio: the baseline's time over its own, the median of
    the rounds' ratios (None without a baseline)."""
    own = rounds[name]
    times = [t for turn in own for t in turn]
    base = rounds.get(BASELINE)
    middle = statistics.median(times)
    return {
        "nfe": nfe, "samples": len(times), "median": middle, "best": min(times), "per_evaluation": middle / nfe,
        "ratio": None if base is None else statistics.median(
            statistics.median(b) / statistics.median(a) for a, b in zip(own, base)
        ),
    }  # fmt: skip


def median(run: Callable[[], Any], clock: Clock, seconds: float, most: int = 30) -> float:
    _, last = warm(run, clock, seconds)
    return statistics.median(t for turn in in_turn({"it": run}, {"it": last}, clock, seconds, most=most)["it"] for t in turn)
