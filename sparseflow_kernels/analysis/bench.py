"""Whole solves against whole solves, in one process, in turn; times are quoted as ratios to the dense baseline.

Times are processor seconds of the whole process, every contender held to one thread: on an idle core that is wall time,
on a shared one it leaves out the neighbours' turns. The clock may still wander, so the contenders take turns (A B C A B C
...) and the ratio is the median over the rounds of one round's two times; `best` is the quickest of all rounds.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator

from ..build_info import build_info
from ..compiled_field import compile as compile_field
from .floor import Work, activation_rate, fma_rate
from .peers import BASELINE, OURS, Contender, Outcome, Run, float64_reference
from .problems import FieldSpec, Problem, make_problem


@dataclass
class Row:
    """One contender on one problem. Seconds; ratios are baseline time over this contender's (above 1: quicker).

    ratio_per_evaluation: ratio of times per evaluation of the field. Rounding can tip one step between accepted and
    rejected, so that two solvers with the same rules differ by some evaluations; this ratio leaves that out.
    nnz: weights of the simplified field.  floor: seconds of arithmetic in the whole solve (None: unknown);
    share: floor / best.  error: the largest absolute difference to the float64 reference over the compared samples,
    states and log-densities.  skipped: why there are no figures.
    """

    field: str
    keep: float
    contender: str
    nnz: int = 0
    nfe: int = 0
    rounds: int = 0
    median: float | None = None
    best: float | None = None
    ratio: float | None = None
    ratio_best: float | None = None
    ratio_per_evaluation: float | None = None
    per_evaluation: float | None = None
    floor: float | None = None
    share: float | None = None
    error: float | None = None
    skipped: str | None = None


def interleaved(runs: dict[str, Run], seconds: float, most: int) -> dict[str, list[float]]:
    """Processor seconds of each run, taken in turns: at least two rounds, at most `most`, until `seconds` are spent.

    The first, untimed turn of every run is the caller's (it also warms up).
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for done in range(most):
        if done >= 2 and time.perf_counter() - start > seconds:
            break
        for name, run in runs.items():
            before = time.process_time()
            run()
            times[name].append(time.process_time() - before)
    return times


def largest_error(outcome: Outcome, reference: Outcome) -> float:
    rows = reference.x.shape[0]
    state = (outcome.x[:rows].double() - reference.x).abs().max()
    density = (outcome.l[:rows].double() - reference.l).abs().max()
    return float(max(state, density))


def bench_problem(
    problem: Problem, contenders: Iterable[Contender], seconds: float = 20.0, most: int = 30
) -> list[Row]:
    """Rows for the baseline, this library and the given peers on one problem; `seconds` bounds the timed rounds.

    Errors are taken over the first 64 samples, 16 where the exact reference trace costs more than eight gradients each.
    """
    field = compile_field(problem.module)
    work = Work.of(field.vector_field, field.divergence_plan(problem.spec.divergence))
    per_evaluation_floor = work.floor(problem.x.shape[0])
    costly = problem.spec.divergence == "exact" and problem.spec.dim > 8
    reference = float64_reference(problem, 16 if costly else 64)

    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    for contender in contenders:
        row = rows[contender.name] = Row(problem.spec.name, problem.keep, contender.name, nnz=field.nnz)
        row.skipped = contender.missing()
        if row.skipped:
            continue
        try:
            run = contender.prepare(problem)
            outcome = run()
        except Exception as error:
            if contender in (BASELINE, OURS):
                raise
            row.skipped = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            continue
        row.nfe, row.error = outcome.nfe, largest_error(outcome, reference)
        runs[contender.name] = run

    times = interleaved(runs, seconds, most)
    base = times[BASELINE.name]
    for name, taken in times.items():
        row = rows[name]
        row.rounds, row.median, row.best = len(taken), statistics.median(taken), min(taken)
        row.ratio = statistics.median(b / a for a, b in zip(taken, base))
        row.ratio_best = min(base) / row.best
        row.per_evaluation = row.median / row.nfe
        row.ratio_per_evaluation = row.ratio * row.nfe / rows[BASELINE.name].nfe
        if per_evaluation_floor is not None:
            row.floor = per_evaluation_floor * row.nfe
            row.share = row.floor / row.best
    return list(rows.values())


def bench(
    specs: Iterable[FieldSpec],
    keeps: Iterable[float],
    peers: Iterable[Contender] = (),
    seconds: float = 20.0,
    most: int = 30,
) -> Iterator[Row]:
    """Yield rows field by field, keep ratio by keep ratio. Run it within `peers.one_thread()`."""
    contenders = [BASELINE, OURS, *peers]
    for spec in specs:
        for keep in keeps:
            yield from bench_problem(make_problem(spec, keep), contenders, seconds, most)


def document(rows: list[Row], specs: Iterable[FieldSpec]) -> dict:
    """Rows, fields, the installation and the measured rates, as JSON has them."""
    specs = list(specs)
    names = sorted({spec.activation for spec in specs})
    return {
        "machine": {"processor": processor(), "system": platform.platform()},
        "build": build_info(),
        "rates": {"fma": fma_rate(), "activations": {name: activation_rate(name) for name in names}},
        "fields": [dataclasses.asdict(spec) for spec in specs],
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def save_json(path: str | Path, rows: list[Row], specs: Iterable[FieldSpec]) -> None:
    """Write `document` to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(rows, specs), indent=2) + "\n")


def load_json(path: str | Path) -> tuple[list[Row], list[FieldSpec], dict]:
    """(rows, fields, the whole document) of a file by `save_json`. Raises OSError, or ValueError for other files."""
    try:
        found = json.loads(Path(path).read_text())
        fields = [FieldSpec(**{**spec, "hidden": tuple(spec["hidden"])}) for spec in found["fields"]]
        return [Row(**row) for row in found["rows"]], fields, found
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a result of `sparseflow bench --json`: {error!r}") from error


def processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
