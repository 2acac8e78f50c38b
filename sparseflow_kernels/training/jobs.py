"""Runs of the presets: one process or several, each resumable from its folder, with a table of figures at the end.

A sweep is a number of jobs. For every seed the dense net is trained once; each method, and the unpruned control, then
goes on from a copy of it.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import data
from ..data.dataset import Dataset
from ..files import DamagedFileError, atomic_write, read_arrays, read_json, write_json
from ..flows import NeuralODE
from ..pruning import dense_size
from .cycles import Cycle, sparse_flow
from .distributed import on_rank_0, rank
from .evaluation import evaluate_or_nan
from .identity import another_run, plain
from .lock import locked_folder
from .presets import PRESETS, Preset
from .processes import run_in_processes
from .rows import check_rows
from .settings import TrainingSettings

Report = Callable[["Job", dict[str, Any]], None]

DENSE, CONTROL = "dense", "none"


@dataclass(frozen=True)
class Job:
    """One run of the loop on a preset; what `run.json` in its folder says.

    folder: of the sweep; the job's own is `folder / seed_<seed> / method`.  method: of `sparse_flow`, or "dense" for
    the dense net alone.  net: None for the preset's first.  data: another data set's name, or an .npz file with arrays
    train, val, test [n, dim].  rows, eval_rows: use no more training rows, and validation and test rows, than that.
    tolerance: for rtol and atol.  settings: training settings that differ from the preset's, in retraining too.
    """

    preset: str
    folder: str
    seed: int = 0
    method: str = DENSE
    keeps: tuple[float, ...] = ()
    net: str | None = None
    data: str | None = None
    rows: int | None = None
    eval_rows: int | None = None
    tolerance: float | None = None
    engine: str | None = "auto"
    dead: str | None = "simplify"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {'control' if self.method == CONTROL else self.method}"

    @property
    def own_folder(self) -> Path:
        return Path(self.folder) / f"seed_{self.seed}" / ("control" if self.method == CONTROL else self.method)

    def definition(self) -> Preset:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {self.preset!r}")
        return PRESETS[self.preset]

    def training(self) -> TrainingSettings:
        return self.definition().training.changed(**self.settings)

    def flow(self) -> NeuralODE:
        """The net as it starts, drawn with the job's seed."""
        tolerance = {} if self.tolerance is None else {"rtol": self.tolerance, "atol": self.tolerance}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.definition().flow(self.net, **tolerance)

    def dataset(self) -> Dataset:
        """The rows, the same for every seed. Raises FileNotFoundError, or ValueError for a name or a file that is no
        data set, and for rows that are not of the net's dimension."""
        name = self.data or self.definition().data
        rows, dim = load_rows(name), self.flow().dim
        if rows.dim != dim:
            raise ValueError(
                f"{name} has rows of {rows.dim} numbers, and the net of experiment {self.preset!r} takes {dim}: it is "
                "the wrong data set, or the wrong experiment"
            )
        return limited(rows, self.rows, self.eval_rows)

    def claim_folder(self) -> None:
        """Make the job's folder and write its run.json. Raises CheckpointError where another run's is that has come to
        a checkpoint; what failed before its first one is overwritten."""
        path = self.own_folder / "run.json"
        mine = plain(dataclasses.asdict(self))
        if path.exists() and any(path.parent.glob("cycle_*.safetensors")):
            theirs = plain(dataclasses.asdict(Job.read(path)))
            differing = [name for name in mine if mine[name] != theirs[name] and name not in ("keeps", "folder")]
            if differing:
                raise another_run(f"{path.parent} holds another run", differing, theirs, mine)
        write_json(path, mine)

    @staticmethod
    def read(path: Path) -> "Job":
        """The job whose run.json is at `path`. Raises FileNotFoundError, or DamagedFileError for another file."""
        remedy = "delete it, and run the training's command again: it is written anew, and no checkpoint is lost"
        facts = read_json(path, remedy)
        try:
            return Job(**{**facts, "keeps": tuple(facts["keeps"])})
        except (TypeError, KeyError) as error:
            raise DamagedFileError(f"{path} is not the description of a run ({error}); {remedy}") from error


_FIGURES = ("cycle", "keep", "size", "live_size", "test_nll", "nfe", "step_seconds")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a job's results.json; none where there is no such file, or a damaged one: they are then measured
    again, on the checkpoints."""
    try:
        rows = read_json(path, "")
    except (FileNotFoundError, DamagedFileError):
        return []
    whole = isinstance(rows, list) and all(isinstance(row, dict) and row.keys() >= set(_FIGURES) for row in rows)
    return rows if whole else []


_SPLITS = ("train", "val", "test")


def load_rows(name: str) -> Dataset:
    """A data set by name, or from an .npz file with arrays train, val and test, [n, dim].

    Raises ValueError, which names the file and the array, for a file that is none, for arrays of another shape, not of
    numbers, without rows, or with NaN or infinite values.
    """
    path = Path(name)
    if path.suffix != ".npz":
        if name not in data.LOADERS and path.suffix:
            raise ValueError(f"data must be an .npz file or one of {', '.join(data.LOADERS)}; got {name!r}")
        return data.load(name)
    arrays = read_arrays(path, _SPLITS, "it must hold arrays train, val and test, of numbers, [n, dim]")
    if any(array.ndim != 2 or array.shape[1] != arrays["train"].shape[-1] for array in arrays.values()):
        shapes = [list(array.shape) for array in arrays.values()]
        raise ValueError(f"{path}: train, val and test must be [n, dim], got {shapes}")
    train, val, test = (_numbers(path, part, arrays[part]) for part in _SPLITS)
    return Dataset(path.stem, train, val, test)


def _numbers(path: Path, part: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{path}: array {part} must hold real numbers, not {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{path}: array {part} is empty, of shape {list(array.shape)}")
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused as such
        rows = torch.from_numpy(array.astype(np.float32))
    check_rows(rows, f"{path}: array {part}")
    return rows


def limited(rows: Dataset, train: int | None, held_out: int | None) -> Dataset:
    """The first so many rows of each part (loaders have them in random order)."""
    most = {"train": train, "val": held_out, "test": held_out}
    parts = {part: getattr(rows, part)[:count] for part, count in most.items()}
    labels = {f"{part}_labels": getattr(rows, f"{part}_labels") for part in most}
    cut = {name: None if kept is None else kept[: most[name.removesuffix("_labels")]] for name, kept in labels.items()}
    return dataclasses.replace(rows, **parts, **cut)


def sweep_jobs(
    first: Job, methods: Sequence[str], keeps: Sequence[float], seeds: Iterable[int], control: bool
) -> tuple[list[Job], list[Job]]:
    """(dense jobs, the jobs that go on from them), all else as `first` has it."""
    dense = [dataclasses.replace(first, seed=seed, method=DENSE, keeps=()) for seed in seeds]
    after = [*methods, *([CONTROL] if control else [])]
    return dense, [dataclasses.replace(job, method=m, keeps=tuple(keeps)) for job in dense for m in after]


def run_job(job: Job, report: Report | None = None) -> list[dict[str, Any]]:
    """Run or resume a job in its folder: one row of figures per cycle, also in its `results.json`.

    report: called with the job and each step's facts (`sparse_flow`'s progress), and after every cycle with
    {"finished": row}. Raises what `sparse_flow` raises, and CheckpointError or DamagedFileError for what else is in the
    folder; what was finished is then in it.
    """
    rows = job.dataset()
    with locked_folder(job.own_folder):
        return _run_locked(job, rows, report)


def _run_locked(job: Job, rows: Dataset, report: Report | None) -> list[dict[str, Any]]:
    own, preset = job.own_folder, job.definition()
    known: dict[int, dict[str, Any]] = {}
    on_rank_0(job.claim_folder)
    if rank() == 0:
        dense = dataclasses.replace(job, method=DENSE).own_folder / "cycle_00.safetensors"
        if job.method != DENSE and dense.exists() and not (own / "cycle_00.safetensors").exists():
            with atomic_write(own / "cycle_00.safetensors") as temporary:
                shutil.copyfile(dense, temporary)
        known = {row["cycle"]: row for row in read_results(own / "results.json")}
    retrain = {name: value for name, value in preset.retrain.items() if name not in job.settings}
    if "epochs" in job.settings or "steps" in job.settings:
        retrain.pop("epochs", None)
    table = []
    for cycle in sparse_flow(
        job.flow(),
        rows,
        job.keeps,
        method="weights" if job.method == DENSE else job.method,
        dead=job.dead,
        prune_options=preset.prune_options(job.method),
        retrain=retrain,
        engine=job.engine,
        folder=own,
        seed=job.seed,
        progress=None if report is None else lambda facts: report(job, facts),
        **dataclasses.asdict(job.training()),
    ):
        row = known.get(cycle.index) if cycle.resumed else None
        table.append(row or _row(job, cycle, rows))
        if rank() == 0:
            write_json(own / "results.json", table)
        if report is not None:
            report(job, {"finished": table[-1], "resumed": cycle.resumed})
    return table


def _row(job: Job, cycle: Cycle, rows: Dataset) -> dict[str, Any]:
    flow = cycle.flow if job.engine is None else cycle.flow.compile(job.engine)
    told = rows.test_labels if flow.supervised else None
    tested = evaluate_or_nan(flow, rows.test, told) if len(rows.test) else None
    total = dense_size(cycle.flow)
    return {
        "seed": job.seed,
        "method": job.method,
        "cycle": cycle.index,
        "keep": cycle.keep,
        "size": cycle.size,
        "dense_size": total,
        "prune_ratio": 1 - cycle.size / total,
        "live_size": cycle.live_size,
        "val_nll": _finite(cycle.nll),
        "test_nll": None if tested is None else _finite(tested.nll),
        "nfe": cycle.nfe,
        "epochs": len(cycle.history),
        "skipped_steps": sum(entry["skipped"] for entry in cycle.history),
        "step_seconds": cycle.step_seconds,
        "train_nfe": cycle.history[-1]["nfe"],
        "seconds": cycle.seconds,
    }


def _finite(value: float) -> float | None:
    """JSON has no word for NaN."""
    return value if math.isfinite(value) else None


# --------------------------------------------------------------------------------------------------------- processes


def run_jobs(jobs: Sequence[Job], processes: int = 1, report: Report | None = None) -> dict[str, str]:
    """Run jobs, so many at a time, each in a process of its own with one thread; {job's name: error text} of those that
    failed (the others go on). With processes=1 they run here, one after the other, and an error is raised.

    A KeyboardInterrupt ends the processes and is raised; every finished epoch is kept.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes!r}")
    if processes == 1:
        for job in jobs:
            run_job(job, report)
        return {}
    tell = None if report is None else lambda index, facts: report(jobs[index], facts)
    _, failed = run_in_processes(_work, jobs, processes, tell)
    return {jobs[index].name: text for index, text in failed.items()}


def _work(job: Job, tell: Callable[[dict[str, Any]], None]) -> None:
    last = 0.0

    def report(_: Job, facts: dict[str, Any]) -> None:
        nonlocal last
        now = time.monotonic()
        if "finished" in facts or now - last > 0.2:
            last = now
            tell(facts)

    run_job(job, report)
