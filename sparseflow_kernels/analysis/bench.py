"""Whole solves against whole solves, and training steps against training steps, in one process, in turn; times are
quoted as ratios to the dense baseline.

Times are processor seconds of the whole process, every contender held to one thread: on an idle core that is wall time,
on a shared one it leaves out the neighbours' turns. The clock may still wander, so the contenders take turns (A B C A B C
...) and the ratio is the median over the rounds of one round's two times; `best` is the quickest of all rounds.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

from ..build_info import build_info
from ..compiled_field import CompiledField
from ..field import GraphField
from ..files import read_json, write_json
from . import graph_training, peers, training_peers
from .floor import Work, activation_rate, fma_rate, training_step_floor
from .graph_floor import GraphWork, instruction_rates
from .graph_problems import GRAPHS, TRAIN_GRAPHS, GraphSpec
from .peers import Contender, Outcome
from .problems import DEFAULT_FIELDS, FIELDS, TRAIN_FIELDS, FieldSpec, Problem
from .training_peers import StepOutcome

Spec = FieldSpec | GraphSpec
TURN = 0.01  # seconds


@dataclass
class Row:
    """One contender on one problem. Seconds; ratios are baseline time over this contender's (above 1: quicker).

    nfe: evaluations of the field in the (forward) solve.  nfe_backward: in a solve of the backward pass (adjoints).
    ratio_per_evaluation: ratio of times per evaluation of the (forward) solve. Rounding can tip one step between
    accepted and rejected, so that two solvers with the same rules differ by some evaluations; this ratio leaves that out.
    nnz: weights of the simplified field.  floor: seconds of arithmetic in the whole solve or step (None: unknown);
    share: floor / best.  error: to the float64 reference, see `Task.error`.  skipped: why there are no figures.
    """

    field: str
    keep: float
    contender: str
    nnz: int = 0
    nfe: int = 0
    nfe_backward: int | None = None
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


def interleaved(runs: dict[Any, Callable[[], Any]], seconds: float, most: int) -> dict[Any, list[float]]:
    """Processor seconds of each run, taken in turns: at least two rounds, at most `most`, until `seconds` are spent.

    The first, untimed turn of every run is the caller's (it also warms up). A run that is quicker than TURN is repeated
    within its turns, whose time is shared out: else it would be timed in the caches that the one before has left behind.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    repeats = {name: max(1, round(TURN / max(_seconds(run, 1), 1e-6))) for name, run in runs.items()}
    for done in range(most):
        if done >= 2 and time.perf_counter() - start > seconds:
            break
        for name, run in runs.items():
            times[name].append(_seconds(run, repeats[name]))
    return times


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    """Processor seconds of one run, over so many."""
    before = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - before) / repeats


def largest_error(outcome: Outcome, reference: Outcome) -> float:
    rows = reference.x.shape[0]
    state = (outcome.x[:rows].double() - reference.x).abs().max()
    if reference.l is None:
        return float(state)
    density = (outcome.l[:rows].double() - reference.l).abs().max()
    return float(max(state, density))


def _solve_reference(problem: Problem) -> Outcome:
    """Of the first 64 samples, 16 where the exact reference trace costs more than eight gradients each."""
    costly = problem.spec.divergence == "exact" and problem.spec.dim > 8
    return peers.float64_reference(problem, 16 if costly else 64)


def _solve_floor(problem: Problem, field: CompiledField, outcome: Outcome) -> float | None:
    kind = problem.spec.divergence
    plan = None if kind is None else field.divergence_plan(kind)
    work = GraphWork if isinstance(field.vector_field, GraphField) else Work
    each = work.of(field.vector_field, plan).floor(problem.x.shape[0])
    return None if each is None else each * outcome.nfe


def _step_floor(problem: Problem, field: CompiledField, outcome: StepOutcome) -> float | None:
    plan = field.divergence_plan(problem.spec.divergence)
    if outcome.steps is None:
        return None
    return training_step_floor(field.vector_field, plan, problem.x.shape[0], outcome.nfe, outcome.steps)


@dataclass(frozen=True)
class Task:
    """What is timed.

    name: as a document says it.  unit: in words.  peers: beside the baseline and this library.  reference: the float64
    solution of a problem.  error: of an outcome against it; error_name: in words.  floor: seconds of this library's
    arithmetic.  block: name of its table's place in a document.  losses: the task for fields with a loss of that name.
    """

    name: str
    unit: str
    fields: tuple[str, ...]
    baseline: Contender
    ours: Contender
    peers: dict[str, Contender]
    reference: Callable[[Problem], Any]
    error: Callable[[Any, Any], float]
    error_name: str
    floor: Callable[[Problem, CompiledField, Any], float | None]
    block: str
    losses: dict[str, "Task"] = dataclasses.field(default_factory=dict)

    @property
    def known_peers(self) -> dict[str, Contender]:
        """Of all fields; not every one is there for every field."""
        return dict(item for task in (*self.losses.values(), self) for item in task.peers.items())

    def of(self, spec: Spec) -> "Task":
        return self.losses.get(spec.loss, self) if isinstance(spec, GraphSpec) else self


SOLVE = Task(
    "solve", "solve", (*DEFAULT_FIELDS, *GRAPHS), peers.BASELINE, peers.OURS, peers.PEERS, _solve_reference, largest_error,
    "max error", _solve_floor, "bench",
)  # fmt: skip
TRAIN = Task(
    "train", "training step", (*TRAIN_FIELDS, *TRAIN_GRAPHS), training_peers.BASELINE,
    training_peers.OURS, training_peers.PEERS, training_peers.reference_gradient,
    lambda outcome, reference: training_peers.relative_error(outcome.gradient(), reference),
    "gradient error", _step_floor, "train-bench",
)  # fmt: skip
_THROUGH_A_SOLVE = dataclasses.replace(
    TRAIN, baseline=graph_training.BASELINE, ours=graph_training.OURS, peers=graph_training.PEERS,
    reference=graph_training.reference_gradient, floor=graph_training.floor,
)  # fmt: skip
_MATCHING = dataclasses.replace(
    _THROUGH_A_SOLVE, baseline=graph_training.MATCHING_BASELINE, peers=graph_training.MATCHING_PEERS
)
TRAIN.losses.update(matching=_MATCHING, distance=_THROUGH_A_SOLVE, likelihood=_THROUGH_A_SOLVE)
TASKS = {task.name: task for task in (SOLVE, TRAIN)}


def bench_problem(
    problem: Problem, contenders: Iterable[Contender], seconds: float = 20.0, most: int = 30, task: Task = SOLVE
) -> list[Row]:
    """Rows of the contenders, the task's baseline among them, on one problem; `seconds` bounds the timed rounds."""
    task = task.of(problem.spec)
    field = peers.compiled(problem)
    reference = task.reference(problem)

    rows: dict[str, Row] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for contender in contenders:
        row = rows[contender.name] = Row(problem.spec.name, problem.keep, contender.name, nnz=field.nnz)
        row.skipped = contender.missing()
        if row.skipped:
            continue
        try:
            run = contender.prepare(problem)
            outcome = run()
        except Exception as error:
            if contender in (task.baseline, task.ours):
                raise
            row.skipped = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            continue
        row.nfe, row.nfe_backward = outcome.nfe, getattr(outcome, "nfe_backward", None)
        row.error, row.floor = task.error(outcome, reference), task.floor(problem, field, outcome)
        runs[contender.name] = run

    times = interleaved(runs, seconds, most)
    base = times[task.baseline.name]
    for name, taken in times.items():
        row = rows[name]
        row.rounds, row.median, row.best = len(taken), statistics.median(taken), min(taken)
        row.ratio = statistics.median(b / a for a, b in zip(taken, base))
        row.ratio_best = min(base) / row.best
        row.per_evaluation = row.median / row.nfe
        row.ratio_per_evaluation = row.ratio * row.nfe / rows[task.baseline.name].nfe
        row.share = None if row.floor is None else row.floor / row.best
    return list(rows.values())


def bench(
    specs: Iterable[Spec],
    keeps: Iterable[float],
    rivals: Iterable[str] = (),
    seconds: float = 20.0,
    most: int = 30,
    task: Task = SOLVE,
) -> Iterator[Row]:
    """Yield rows field by field, keep ratio by keep ratio. rivals: names among `task.known_peers`; those that a field's own
    task does not have are left out there. Run it within `peers.one_thread()`."""
    rivals = list(rivals)
    for spec in specs:
        own = task.of(spec)
        contenders = [own.baseline, own.ours, *(own.peers[name] for name in rivals if name in own.peers)]
        for keep in keeps:
            yield from bench_problem(spec.problem(keep), contenders, seconds, most, task)


def known_fields() -> dict[str, Spec]:
    return {**FIELDS, **GRAPHS}


def document(rows: list[Row], specs: Iterable[Spec], task: Task = SOLVE) -> dict:
    """Rows, fields, the installation and the measured rates, as JSON has them."""
    specs = list(specs)
    names = sorted({spec.activation for spec in specs if isinstance(spec, FieldSpec)})
    rates = {"fma": fma_rate(), "activations": {name: activation_rate(name) for name in names}}
    if any(isinstance(spec, GraphSpec) for spec in specs):
        rates["instructions"] = instruction_rates()
    return {
        "task": task.name,
        "machine": {"processor": processor(), "system": platform.platform()},
        "build": build_info(),
        "rates": rates,
        "fields": [dataclasses.asdict(spec) for spec in specs],
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def save_json(path: str | Path, rows: list[Row], specs: Iterable[Spec], task: Task = SOLVE) -> None:
    """Write `document` to `path`."""
    write_json(Path(path), document(rows, specs, task))


def _spec(found: dict) -> Spec:
    """A field of a document: those that are no chains say which module they are."""
    if "module" not in found:
        return FieldSpec(**{**found, "hidden": tuple(found["hidden"])})
    sizes = tuple((name, size) for name, size in found["sizes"])
    return GraphSpec(**{**found, "shape": tuple(found["shape"]), "sizes": sizes})


def load_json(path: str | Path) -> tuple[list[Row], list[Spec], dict]:
    """(rows, fields, the whole document) of a file by `save_json`. Raises OSError, or ValueError for other files."""
    try:
        found = read_json(Path(path), "measure again with --json")
        fields = [_spec(spec) for spec in found["fields"]]
        found.setdefault("task", SOLVE.name)  # results older than training steps
        if found["task"] not in TASKS:
            raise KeyError(found["task"])
        return [Row(**row) for row in found["rows"]], fields, found
    except (AttributeError, KeyError, TypeError) as error:
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
