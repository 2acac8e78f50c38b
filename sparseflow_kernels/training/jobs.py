"""Runs of the presets: one process or several, each resumable from its folder, with a table of figures at the end.

A sweep is a number of jobs. For every seed the dense net is trained once; each method, and the unpruned control, then
goes on from a copy of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import multiprocessing.connection
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import numpy as np
import torch

from .. import data
from ..files import atomic_write
from ..data.dataset import Dataset
from ..flows import ContinuousFlow
from ..pruning import dense_size
from ..threads import set_num_threads
from .checkpoint import CheckpointError
from .cycles import Cycle, sparse_flow
from .distributed import rank
from .evaluation import evaluate_or_nan
from .loop import plain
from .presets import PRESETS, Preset
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

    def flow(self) -> ContinuousFlow:
        """The net as it starts, drawn with the job's seed."""
        tolerance = {} if self.tolerance is None else {"rtol": self.tolerance, "atol": self.tolerance}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.definition().flow(self.net, **tolerance)

    def dataset(self) -> Dataset:
        """The rows, the same for every seed. Raises FileNotFoundError, or ValueError for a name or a file that is no
        data set."""
        return limited(load_rows(self.data or self.definition().data), self.rows, self.eval_rows)

    def claim_folder(self) -> None:
        """Make the job's folder and write its run.json. Raises CheckpointError where another run's is."""
        path = self.own_folder / "run.json"
        mine = plain(dataclasses.asdict(self))
        if path.exists():
            theirs = plain(dataclasses.asdict(Job.read(path)))
            differing = sorted(name for name in mine if mine[name] != theirs[name] and name not in ("keeps", "folder"))
            if differing:
                raise CheckpointError(
                    f"{path.parent} holds another run (differing: {', '.join(differing)}); choose another folder, or "
                    "delete it to start anew"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, mine)

    @staticmethod
    def read(path: Path) -> "Job":
        """The job whose run.json is at `path`. Raises FileNotFoundError, or ValueError for another file."""
        try:
            facts = json.loads(path.read_text())
            return Job(**{**facts, "keeps": tuple(facts["keeps"])})
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not the description of a run: {error}") from error


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a job's results.json; none where there is no such file, or no readable one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def load_rows(name: str) -> Dataset:
    """A data set by name, or from an .npz file with arrays train, val and test, [n, dim]."""
    path = Path(name)
    if path.suffix != ".npz":
        if name not in data.LOADERS and name in PRESETS:
            raise ValueError(
                f"this package has no loader for {name!r}; give its rows as an .npz file with arrays train, val, test"
            )
        return data.load(name)
    with np.load(path, allow_pickle=False) as arrays:
        missing = {"train", "val", "test"} - set(arrays.files)
        if missing:
            raise ValueError(f"{path} has no array {', '.join(sorted(missing))}; it has {', '.join(arrays.files)}")
        parts = [torch.from_numpy(np.asarray(arrays[part], dtype=np.float32)) for part in ("train", "val", "test")]
    if any(part.ndim != 2 or part.shape[1] != parts[0].shape[1] for part in parts):
        raise ValueError(f"{path}: train, val and test must be [n, dim], got {[list(part.shape) for part in parts]}")
    return Dataset(path.stem, *parts)


def limited(rows: Dataset, train: int | None, held_out: int | None) -> Dataset:
    """The first so many rows of each part (loaders have them in random order)."""
    val, test = rows.val[:held_out], rows.test[:held_out]
    return dataclasses.replace(
        rows, train=rows.train[:train], val=val, test=test, train_labels=None, val_labels=None, test_labels=None
    )


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
    {"finished": row}. Raises what `sparse_flow` raises; what was finished is then in the folder.
    """
    own = job.own_folder
    rows = job.dataset()
    preset = job.definition()
    known: dict[int, dict[str, Any]] = {}
    if rank() == 0:
        job.claim_folder()
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
            _write_json(own / "results.json", table)
        if report is not None:
            report(job, {"finished": table[-1], "resumed": cycle.resumed})
    return table


def _row(job: Job, cycle: Cycle, rows: Dataset) -> dict[str, Any]:
    flow = cycle.flow if job.engine is None else cycle.flow.compile(job.engine)
    tested = evaluate_or_nan(flow, rows.test) if len(rows.test) else None
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


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


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
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    waiting, running, failed = list(jobs), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                receive, send = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(waiting[0], send), daemon=True)
                process.start()
                send.close()
                running[receive] = (process, waiting.pop(0))
            for pipe in multiprocessing.connection.wait(list(running), timeout=1.0):
                process, job = running[pipe]
                try:
                    facts = pipe.recv()
                except EOFError:
                    process.join()
                    del running[pipe]
                    if process.exitcode and job.name not in failed:
                        failed[job.name] = f"the process ended with status {process.exitcode}"
                    continue
                if "error" in facts:
                    failed[job.name] = facts["error"]
                elif report is not None:
                    report(job, facts)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()
    return failed


def _work(job: Job, pipe: multiprocessing.connection.Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    torch.set_num_threads(1)
    set_num_threads(1)
    last = 0.0

    def report(_: Job, facts: dict[str, Any]) -> None:
        nonlocal last
        now = time.monotonic()
        if "finished" in facts or now - last > 0.2:
            last = now
            pipe.send(facts)

    try:
        run_job(job, report)
    except Exception as error:  # noqa: BLE001 - told to the parent, whatever it is
        pipe.send({"error": f"{type(error).__name__}: {error}"})
        raise SystemExit(1) from None
