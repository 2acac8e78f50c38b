"""`sparseflow train`, `prune`, `sweep`: the experiments' loop from the command line; data-parallel under torchrun."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ContextManager, Iterator, Optional, Sequence

import torch.distributed as dist
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from ..data.dataset import Dataset
from ..files import sha256, write_json
from ..flows import NeuralODE
from ..pruning import KEEP_RATIOS, copy_module, dense_size, size
from ..training import PRESETS, CheckpointError, live_size, load_checkpoint, prune_cycle_, save_checkpoint
from ..training.distributed import rank
from ..training.evaluation import evaluate_or_nan
from ..training.identity import another_run, fingerprint, plain
from ..training.jobs import CONTROL, Job, read_results, run_jobs, sweep_jobs
from ..training.lock import locked_folder
from ..training.loop import fit
from .console import console, say, show_table, stoppable
from .options import METHODS, keeps_of, number, whole

_THEIRS = "the experiment's"  # default of what an experiment decides

_PRESET = Annotated[str, typer.Argument(help=f"experiment: {', '.join(PRESETS)}")]
_NET = Annotated[
    Optional[str],
    typer.Option(help="net of the experiment, such as l4_h64 or cnf_l2_h128", show_default="the experiment's first"),
]
_EPOCHS = Annotated[
    Optional[int], typer.Option(help="epochs per training", show_default=_THEIRS, callback=whole(most=1_000_000))
]
_BATCH = Annotated[Optional[int], typer.Option(help="batch size", show_default=_THEIRS, callback=whole())]
_LR = Annotated[Optional[float], typer.Option(help="learning rate", show_default=_THEIRS, callback=number(most=1000))]
_CLIP = Annotated[
    Optional[float], typer.Option(help="largest norm of the gradient", show_default=_THEIRS, callback=number())
]
_TOLERANCE = Annotated[
    Optional[float],
    typer.Option(help="rtol and atol of the solver", show_default=_THEIRS, callback=number(least=1e-14, most=1)),
]
_ROWS = Annotated[
    Optional[int], typer.Option(help="use no more training rows than this", show_default="all", callback=whole())
]
_EVAL_ROWS = Annotated[
    Optional[int],
    typer.Option(help="use no more validation, and test, rows than this", show_default="all", callback=whole()),
]
_DATA = Annotated[
    Optional[str],
    typer.Option(help="another data set's name, or an .npz file with train, val, test", show_default=_THEIRS),
]
_ENGINE = Annotated[str, typer.Option(help="who trains: auto, cpu, reference; 'none' trains the module through torch")]
_DEAD = Annotated[str, typer.Option(help="dead parameters: simplify, propagate (the paper's way), or keep")]
_SEED = whole(0, 2**32 - 1)
_FOLDER = Annotated[
    Optional[Path], typer.Option(help="where checkpoints go", show_default="runs/PRESET/NET")
]


def train(
    preset: _PRESET,
    net: _NET = None,
    epochs: _EPOCHS = None,
    batch: _BATCH = None,
    lr: _LR = None,
    clip: _CLIP = None,
    tolerance: _TOLERANCE = None,
    data: _DATA = None,
    rows: _ROWS = None,
    eval_rows: _EVAL_ROWS = None,
    engine: _ENGINE = "auto",
    seed: Annotated[
        int, typer.Option(help="of the initial weights, the order of rows and the noise", callback=_SEED)
    ] = 0,
    folder: _FOLDER = None,
) -> None:
    """Train an experiment's dense net. Interrupted, the same command goes on from the last finished epoch.

    Under torchrun (torchrun --nproc-per-node 2 -m sparseflow_kernels train ...) each process takes its share
    of every batch.
    """
    with _processes():
        job = _job(preset, net, epochs, batch, lr, clip, tolerance, data, rows, eval_rows, engine, folder, seed)
        with _stoppable(job.folder), _display([job]) as report:
            run_jobs([job], 1, report)
        _show_cycles(job.preset, [job])
        _say(f"checkpoint: {job.own_folder / 'cycle_00.safetensors'}")


def sweep(
    preset: _PRESET,
    net: _NET = None,
    keeps: Annotated[
        Optional[str],
        typer.Option(
            help=f"keep ratios such as 0.5,0.2, or a schedule: {', '.join(KEEP_RATIOS)}", show_default=_THEIRS
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="weights (WT), neurons (FT), or both")] = "weights",
    control: Annotated[bool, typer.Option(help="train an unpruned copy for as many further epochs")] = True,
    repetitions: Annotated[
        Optional[int],
        typer.Option(help="independently trained nets", show_default=_THEIRS, callback=whole(most=10_000)),
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="processes at a time, one thread each", callback=whole(most=1024))
    ] = 1,
    dead: _DEAD = "simplify",
    epochs: _EPOCHS = None,
    batch: _BATCH = None,
    lr: _LR = None,
    clip: _CLIP = None,
    tolerance: _TOLERANCE = None,
    data: _DATA = None,
    rows: _ROWS = None,
    eval_rows: _EVAL_ROWS = None,
    engine: _ENGINE = "auto",
    seed: Annotated[
        int, typer.Option(help="of the first repetition; the next ones count on", callback=_SEED)
    ] = 0,
    folder: _FOLDER = None,
) -> None:
    """Train, then prune and retrain to ever smaller keep ratios, for every seed and method; ends with a table, and
    results.json in the folder. Interrupted, the same command goes on from the last finished epochs."""
    with _processes():
        first = _job(preset, net, epochs, batch, lr, clip, tolerance, data, rows, eval_rows, engine, folder, seed)
        first = dataclasses.replace(first, dead=_dead(dead))
        methods = METHODS.get(method, tuple(dict.fromkeys(method.split(","))))
        if not set(methods) <= {"weights", "neurons"}:
            raise ValueError(f"--method must be weights, neurons or both, got {method!r}")
        ratios = first.definition().keep_ratios if keeps is None else keeps_of("--keeps", keeps)
        count = first.definition().repetitions if repetitions is None else repetitions
        dense, after = sweep_jobs(first, methods, ratios, range(seed, seed + count), control)
        sets = first.dataset()  # says now, and not once in every process, what is wrong with the data
        failed: dict[str, str] = {}
        with locked_folder(first.folder), _stoppable(first.folder):
            with _display([*dense, *after]) as report:
                failed |= run_jobs(dense, jobs, report)
                lost = {job.seed for job in dense if job.name in failed}
                failed |= run_jobs([job for job in after if job.seed not in lost], jobs, report)
            _show_cycles(first.preset, after)
            path = Path(first.folder) / "results.json"
            if rank() == 0:
                write_json(path, {
                    "preset": first.preset, "net": first.net, "keeps": list(ratios), "floor": sets.floor,
                    "jobs": [dataclasses.asdict(job) for job in after], "failed": failed,
                    "rows": [row for job in after for row in read_results(job.own_folder / "results.json")],
                })  # fmt: skip
        _say(f"wrote {path}")
        for name, text in failed.items():
            typer.echo(f"error: {name}: {text}", err=True)
        if failed:
            raise typer.Exit(1)


def prune(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint of train or sweep, or a folder that holds one")],
    keep: Annotated[str, typer.Option(help="keep ratio of all parameters; several, 0.5,0.1, start from the same net")],
    method: Annotated[str, typer.Option(help="weights (WT) or neurons (FT)")] = "weights",
    dead: _DEAD = "simplify",
    retrain: Annotated[
        int,
        typer.Option(
            help="epochs of retraining, as the checkpoint was trained; 0 for none", callback=whole(0, 1_000_000)
        ),
    ] = 0,
    engine: _ENGINE = "auto",
    out: Annotated[
        Optional[Path], typer.Option(help="folder for the pruned checkpoints", show_default="beside it")
    ] = None,
) -> None:
    """Prune a trained checkpoint, retrain it if asked to, and say what that did to the test NLL."""
    source = _find_checkpoint(checkpoint)
    job = Job.read(source.parent / "run.json")
    ratios = keeps_of("--keep", keep)
    if method not in ("weights", "neurons"):
        raise ValueError(f"--method must be weights or neurons, got {method!r}")
    dead_or_none, engine_or_none = _dead(dead), _engine(engine)
    rows, start = job.dataset(), job.flow()
    facts = load_checkpoint(source, start)
    _check_data(source, facts, job, rows)
    folder = source.parent if out is None else out
    kept = f"every finished epoch of retraining is in {folder}" if retrain else f"what was finished is in {folder}"
    with locked_folder(folder), stoppable(kept):
        elsewhere = folder.resolve() != source.parent.resolve()
        if elsewhere and (folder / "run.json").exists() and Job.read(folder / "run.json") != job:
            raise CheckpointError(f"{folder} holds another run; choose another folder for --out, or delete it")
        lines = [_figures("as it was", start, rows, engine_or_none)]
        for ratio in ratios:
            flow = copy_module(start)
            options = job.definition().prune_options(method)
            prune_cycle_(flow, ratio, method, dead_or_none, rows, **options)
            lines.append(_figures(f"keep {ratio:g}", flow, rows, engine_or_none))
            target = folder / f"pruned_{method}_{ratio:g}.safetensors"
            if retrain:
                settings = job.training().changed(epochs=retrain, milestones=(), lr_end=None)
                running = target.with_name(f"{target.stem}.running.safetensors")
                of = {"from": str(source.resolve()), "sha256": sha256(source), "dead": dead}
                fit(flow, rows, settings, engine_or_none, (job.seed, 1), running, run=of)
                lines.append(_figures(f"keep {ratio:g}, retrained", flow, rows, engine_or_none))
            facts = {"from": str(source), "keep": ratio, "method": method, "retrain": retrain}
            save_checkpoint(target, flow, facts)
            if retrain:
                running.unlink(missing_ok=True)
        if elsewhere:  # so that these, too, can be pruned
            write_json(folder / "run.json", plain(dataclasses.asdict(job)))
    show_table(
        f"{source}: {method} pruned; {_score(job)}",
        ("net", "size", "of", "live", "test NLL", "NFE"), lines,
    )  # fmt: skip
    say(f"wrote {len(ratios)} checkpoint{'s' if len(ratios) > 1 else ''} to {folder}")


# ------------------------------------------------------------------------------------------------------------ the parts


def _dead(text: str) -> str | None:
    if text not in ("simplify", "propagate", "keep"):
        raise ValueError(f"--dead must be simplify, propagate or keep, got {text!r}")
    return None if text == "keep" else text


def _engine(text: str) -> str | None:
    return None if text == "none" else text


def _job(preset, net, epochs, batch, lr, clip, tolerance, data, rows, eval_rows, engine, folder, seed) -> Job:
    given = {"epochs": epochs, "batch": batch, "lr": lr, "clip": clip}
    job = Job(
        preset, "", seed=seed, net=net, data=data, rows=rows, eval_rows=eval_rows, tolerance=tolerance,
        engine=_engine(engine),
        settings={name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    net = next(iter(job.definition().nets)) if net is None else net
    job = dataclasses.replace(job, net=net, folder=str(folder or Path("runs") / preset / net))
    job.training(), job.flow().compile(job.engine or "reference")  # says now what would go wrong in the middle
    return job


def _find_checkpoint(path: Path) -> Path:
    """The checkpoint file a user means by a file or folder: a folder's latest cycle, or its first seed's dense net."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        found = sorted(path.glob("cycle_??.safetensors")) or sorted(path.glob("seed_*/dense/cycle_00.safetensors"))[:1]
        if not found:
            raise FileNotFoundError(f"{path} holds no checkpoint of a finished cycle")
        path = found[-1]
    if not (path.parent / "run.json").exists():
        raise FileNotFoundError(f"{path.parent} has no run.json, which says what net the checkpoint is of")
    return path


def _check_data(source: Path, facts: dict[str, Any], job: Job, rows: Dataset) -> None:
    """Raises CheckpointError where the checkpoint was trained on other rows than the data set's name now gives."""
    found, now = facts.get("run", {}).get("data"), fingerprint(rows, job.definition().classifies)
    if found is not None and found != now:
        raise another_run(f"{source} is not of these data", ["data"], {"data": found}, {"data": now})


def _figures(name: str, flow: NeuralODE, rows: Dataset, engine: str | None) -> tuple[str, ...]:
    labels = rows.test_labels if flow.supervised else None
    result = evaluate_or_nan(flow if engine is None else flow.compile(engine), rows.test, labels)
    live = live_size(flow)
    return (
        name, str(size(flow)), str(dense_size(flow)), "n/a" if live is None else str(live), f"{result.nll:.4f}",
        "n/a" if result.nfe is None else f"{result.nfe:.0f}",
    )  # fmt: skip


def _say(text: str) -> None:
    if rank() == 0:
        say(text)


_COLUMNS = ("method", "keep", "size", "live", "test NLL", "control", "NFE", "ms/step", "control ms")


def _show_cycles(preset: str, jobs: Sequence[Job]) -> None:
    """A line per method and keep ratio, mean and standard deviation over seeds; the control's beside it."""
    if rank() != 0:
        return
    rows = {job.name: read_results(job.own_folder / "results.json") for job in jobs}
    seeds = sorted({job.seed for job in jobs})
    lines = []
    for method in dict.fromkeys(job.method for job in jobs if job.method != CONTROL):
        own = [row for job in jobs if job.method == method for row in rows[job.name]]
        other = [row for job in jobs if job.method == CONTROL for row in rows[job.name]]
        for cycle in sorted({row["cycle"] for row in own}):
            here = [row for row in own if row["cycle"] == cycle]
            beside = [row for row in other if row["cycle"] == cycle]
            lines.append((
                method, f"{here[0]['keep']:.3g}", _mean(here, "size", ".0f"), _mean(here, "live_size", ".0f"),
                _mean(here, "test_nll", ".4f", True), _mean(beside, "test_nll", ".4f", True), _mean(here, "nfe", ".0f"),
                _mean(here, "step_seconds", ".1f", scale=1e3), _mean(beside, "step_seconds", ".1f", scale=1e3),
            ))  # fmt: skip
    floor = jobs[0].dataset().floor
    title = f"{preset}, {jobs[0].net}: {_score(jobs[0])}; {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    show_table(title + (f"; no model can go below {floor:.3f}" if floor is not None else ""), _COLUMNS, lines)


def _score(job: Job) -> str:
    """What the NLL of a table is."""
    if job.definition().image is None:
        return "NLL in nats, exact trace"
    return f"NLL in nats an image, estimated trace; {job.flow().dim * math.log(2.0):.1f} nats are a bit per dimension"


def _mean(rows: Sequence[dict[str, Any]], key: str, form: str, spread: bool = False, scale: float = 1.0) -> str:
    values = [row[key] * scale for row in rows if row[key] is not None]
    if not values:
        return "n/a" if rows else ""
    text = format(statistics.fmean(values), form)
    return text + (f" +-{statistics.stdev(values):{form}}" if spread and len(values) > 1 else "")


def _stoppable(folder: str) -> ContextManager[None]:
    return stoppable(f"every finished epoch is in {folder}")


@contextmanager
def _processes() -> Iterator[None]:
    """Take part in a group of processes that torchrun has started."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _display(jobs: Sequence[Job]) -> Iterator[Any]:
    """Yields `report` for `run_jobs`: on a terminal a bar per job, elsewhere a line per cycle and now and then one for
    an epoch."""
    if rank() != 0:
        yield None
        return
    out = console()
    if not out.is_terminal:
        yield _Lines()
        return
    text = TextColumn("{task.fields[text]}", table_column=Column(overflow="fold"))
    name = TextColumn("{task.description}", table_column=Column(no_wrap=True))
    columns = (name, BarColumn(8), text, TimeElapsedColumn())
    with Progress(*columns, console=out, auto_refresh=False) as bars:
        tasks: dict[str, Any] = {}
        last = 0.0

        def report(job: Job, facts: dict[str, Any]) -> None:
            nonlocal last
            if job.name not in tasks:
                tasks[job.name] = bars.add_task(job.name, total=1 + len(job.keeps), text="")
            if "finished" in facts:
                done, text = facts["finished"]["cycle"] + 1, _finished_text(facts)
            else:
                done, text = facts["cycle"] + facts["step"] / facts["steps"], _step_text(facts)
            now = time.monotonic()
            # Drawn when told, a few times a second: a thread of its own would take time from the training.
            draw = "finished" in facts or now - last > 0.2
            last = now if draw else last
            bars.update(tasks[job.name], completed=done, text=text, refresh=draw)

        yield report


class _Lines:
    """Plain log lines, at most one every ten seconds for each job, and one for every cycle that is done."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def __call__(self, job: Job, facts: dict[str, Any]) -> None:
        now = time.monotonic()
        if "finished" in facts:
            print(f"{job.name}: {_finished_text(facts)}", flush=True)
        elif now - self.last.setdefault(job.name, now) >= 10.0:
            print(f"{job.name}: {_step_text(facts)}", flush=True)
        else:
            return
        self.last[job.name] = now


def _cycle(keep: float) -> str:
    return "dense" if keep == 1 else f"keep {keep:.3g}"


def _step_text(facts: dict[str, Any]) -> str:
    nfe = "" if facts["nfe"] is None else f", NFE {facts['nfe']:.0f}"
    return (
        f"{_cycle(facts['keep'])}, epoch {facts['epoch']}/{facts['epochs']}, NLL {facts['nll']:.3f}{nfe}, "
        f"{facts['step_seconds'] * 1e3:.3g} ms/step"
    )


def _finished_text(facts: dict[str, Any]) -> str:
    row = facts["finished"]
    nll = "n/a" if row["test_nll"] is None else f"{row['test_nll']:.4f}"
    how = ", from its checkpoint" if facts["resumed"] else ""
    return f"{_cycle(row['keep'])} done: {row['size']} parameters, test NLL {nll}{how}"
