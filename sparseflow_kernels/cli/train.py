"""`sparseflow train`, `prune`, `sweep`: the experiments' loop from the command line; data-parallel under torchrun."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Iterator, Optional, Sequence

import torch
import torch.distributed as dist
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError

from ..files import ChecksumError, atomic_write, sha256
from ..flows import ContinuousFlow
from ..pruning import KEEP_RATIOS, copy_module, dense_size, size
from ..training import (
    PRESETS, CheckpointError, NonFiniteLossError, evaluate, live_size, load_checkpoint, prune_cycle_, save_checkpoint,
)  # fmt: skip
from ..training.distributed import rank
from ..training.jobs import CONTROL, Job, read_results, run_jobs, sweep_jobs
from ..training.loop import fit
from .console import console, fail, say, show_table

_PRESET = Annotated[str, typer.Argument(help=f"experiment: {', '.join(PRESETS)}")]
_NET = Annotated[Optional[str], typer.Option(help="net of the experiment, such as l4_h64 or cnf_l2_h128")]
_EPOCHS = Annotated[Optional[int], typer.Option(help="epochs per training, in place of the experiment's")]
_BATCH = Annotated[Optional[int], typer.Option(help="batch size, in place of the experiment's")]
_LR = Annotated[Optional[float], typer.Option(help="learning rate, in place of the experiment's")]
_CLIP = Annotated[Optional[float], typer.Option(help="largest norm of the gradient")]
_TOLERANCE = Annotated[Optional[float], typer.Option(help="rtol and atol of the solver, in place of the experiment's")]
_ROWS = Annotated[Optional[int], typer.Option(help="use no more training rows than this")]
_EVAL_ROWS = Annotated[Optional[int], typer.Option(help="use no more validation, and test, rows than this")]
_DATA = Annotated[Optional[str], typer.Option(help="another data set's name, or an .npz file with train, val, test")]
_ENGINE = Annotated[str, typer.Option(help="who trains: auto, cpu, reference; 'none' trains the module through torch")]
_DEAD = Annotated[str, typer.Option(help="dead parameters: simplify, propagate (the paper's way), or keep")]
_FOLDER = Annotated[Optional[Path], typer.Option(help="where checkpoints go; [default: runs/PRESET/NET]")]


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
    seed: Annotated[int, typer.Option(help="of the initial weights, the order of rows and the noise")] = 0,
    folder: _FOLDER = None,
) -> None:
    """Train an experiment's dense net. Interrupted, the same command goes on from the last finished epoch.

    Under torchrun (torchrun --nproc-per-node 2 -m sparseflow_kernels.cli.main train ...) each process takes its share
    of every batch.
    """
    with _reporting_errors(), _processes():
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
        typer.Option(help=f"keep ratios such as 0.5,0.2, or a schedule: {', '.join(KEEP_RATIOS)}; [default: its own]"),
    ] = None,
    method: Annotated[str, typer.Option(help="weights (WT), neurons (FT), or both: weights,neurons")] = "weights",
    control: Annotated[bool, typer.Option(help="train an unpruned copy for as many further epochs")] = True,
    repetitions: Annotated[Optional[int], typer.Option(help="independently trained nets; [default: its own]")] = None,
    jobs: Annotated[int, typer.Option(help="processes at a time, one thread each")] = 1,
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
    seed: Annotated[int, typer.Option(help="of the first repetition; the next ones count on")] = 0,
    folder: _FOLDER = None,
) -> None:
    """Train, then prune and retrain to ever smaller keep ratios, for every seed and method; ends with a table, and
    results.json in the folder. Interrupted, the same command goes on from the last finished epochs."""
    with _reporting_errors(), _processes():
        first = _job(preset, net, epochs, batch, lr, clip, tolerance, data, rows, eval_rows, engine, folder, seed)
        if dead not in ("simplify", "propagate", "keep"):
            raise ValueError(f"--dead must be simplify, propagate or keep, got {dead!r}")
        first = dataclasses.replace(first, dead=None if dead == "keep" else dead)
        methods = method.split(",")
        if not set(methods) <= {"weights", "neurons"}:
            raise ValueError(f"--method must be weights, neurons or weights,neurons, got {method!r}")
        ratios = first.definition().keep_ratios if keeps is None else parse_keeps(keeps)
        count = first.definition().repetitions if repetitions is None else repetitions
        if count < 1:
            raise ValueError(f"--repetitions must be at least 1, got {count}")
        dense, after = sweep_jobs(first, methods, ratios, range(seed, seed + count), control)
        failed: dict[str, str] = {}
        with _stoppable(first.folder), _display([*dense, *after]) as report:
            failed |= run_jobs(dense, jobs, report)
            lost = {job.seed for job in dense if job.name in failed}
            failed |= run_jobs([job for job in after if job.seed not in lost], jobs, report)
        _show_cycles(first.preset, after)
        path = Path(first.folder) / "results.json"
        if rank() == 0:
            document = {
                "preset": first.preset, "net": first.net, "keeps": list(ratios), "floor": first.dataset().floor,
                "jobs": [dataclasses.asdict(job) for job in after], "failed": failed,
                "rows": [row for job in after for row in read_results(job.own_folder / "results.json")],
            }  # fmt: skip
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(document, indent=1) + "\n")
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
    retrain: Annotated[int, typer.Option(help="epochs of retraining, as the checkpoint was trained; 0 for none")] = 0,
    engine: _ENGINE = "auto",
    out: Annotated[Optional[Path], typer.Option(help="folder for the pruned checkpoints; [default: beside it]")] = None,
) -> None:
    """Prune a trained checkpoint, retrain it if asked to, and say what that did to the test NLL."""
    with _reporting_errors():
        source = _find_checkpoint(checkpoint)
        job = Job.read(source.parent / "run.json")
        ratios = parse_keeps(keep)
        if method not in ("weights", "neurons"):
            raise ValueError(f"--method must be weights or neurons, got {method!r}")
        if dead not in ("simplify", "propagate", "keep"):
            raise ValueError(f"--dead must be simplify, propagate or keep, got {dead!r}")
        if retrain < 0:
            raise ValueError(f"--retrain must be at least 0, got {retrain}")
        rows, start = job.dataset(), job.flow()
        load_checkpoint(source, start)
        engine_or_none = None if engine == "none" else engine
        folder = source.parent if out is None else out
        lines = [_figures("as it was", start, rows.test, engine_or_none)]
        with _stoppable(str(folder)):
            for ratio in ratios:
                flow = copy_module(start)
                options = job.definition().prune_options(method)
                prune_cycle_(flow, ratio, method, None if dead == "keep" else dead, rows, **options)
                lines.append(_figures(f"keep {ratio:g}", flow, rows.test, engine_or_none))
                target = folder / f"pruned_{method}_{ratio:g}.safetensors"
                if retrain:
                    settings = job.training().changed(epochs=retrain, milestones=(), lr_end=None)
                    running = target.with_name(f"{target.stem}.running.safetensors")
                    of = {"from": str(source.resolve()), "sha256": sha256(source), "dead": dead}
                    fit(flow, rows, settings, engine_or_none, (job.seed, 1), running, run=of)
                    lines.append(_figures(f"keep {ratio:g}, retrained", flow, rows.test, engine_or_none))
                facts = {"from": str(source), "keep": ratio, "method": method, "retrain": retrain}
                save_checkpoint(target, flow, facts)
                if retrain:
                    running.unlink(missing_ok=True)
        show_table(
            f"{source}: {method} pruned; NLL in nats, exact trace",
            ("net", "size", "of", "live", "test NLL", "NFE"), lines,
        )  # fmt: skip
        if folder != source.parent:  # so that these, too, can be pruned
            with atomic_write(folder / "run.json") as temporary:
                temporary.write_text((source.parent / "run.json").read_text())
        say(f"wrote {len(ratios)} checkpoint{'s' if len(ratios) > 1 else ''} to {folder}")


# ------------------------------------------------------------------------------------------------------------ the parts


def parse_keeps(text: str) -> tuple[float, ...]:
    """Keep ratios of a schedule's name or of numbers with commas. Raises ValueError."""
    if text in KEEP_RATIOS:
        return KEEP_RATIOS[text]
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"keep ratios must be numbers such as 0.5,0.2 or one of {', '.join(KEEP_RATIOS)}; got {text!r}"
        ) from None
    if any(not 0 < keep < 1 for keep in ratios):
        raise ValueError(f"every keep ratio must lie in (0, 1), got {text!r}")
    return tuple(sorted(set(ratios), reverse=True))


def _job(preset, net, epochs, batch, lr, clip, tolerance, data, rows, eval_rows, engine, folder, seed) -> Job:
    given = {"epochs": epochs, "batch": batch, "lr": lr, "clip": clip}
    job = Job(
        preset, "", seed=seed, net=net, data=data, rows=rows, eval_rows=eval_rows, tolerance=tolerance,
        engine=None if engine == "none" else engine,
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


def _figures(name: str, flow: ContinuousFlow, test: torch.Tensor, engine: str | None) -> tuple[str, ...]:
    result = evaluate(flow if engine is None else flow.compile(engine), test)
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
    title = f"{preset}, {jobs[0].net}: NLL in nats, exact trace; {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    show_table(title + (f"; no model can go below {floor:.3f}" if floor is not None else ""), _COLUMNS, lines)


def _mean(rows: Sequence[dict[str, Any]], key: str, form: str, spread: bool = False, scale: float = 1.0) -> str:
    values = [row[key] * scale for row in rows if row[key] is not None]
    if not values:
        return "n/a" if rows else ""
    text = format(statistics.fmean(values), form)
    return text + (f" +-{statistics.stdev(values):{form}}" if spread and len(values) > 1 else "")


@contextmanager
def _reporting_errors() -> Iterator[None]:
    try:
        yield
    except (CheckpointError, NonFiniteLossError, ChecksumError, OSError, SafetensorError, ValueError) as error:
        raise fail(str(error)) from error


@contextmanager
def _stoppable(folder: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["sparseflow", *sys.argv[1:]])
        _say(f"\nstopped; every finished epoch is in {folder}. To go on, run the same command again:\n  {again}")
        raise typer.Exit(130) from None


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
    columns = (TextColumn("{task.description}"), BarColumn(12), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
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
                done, text = facts["cycle"] + facts["step"] / facts["steps"], _step_text(job, facts)
            now = time.monotonic()
            # Drawn when told, a few times a second: a thread of its own would take time from the training.
            draw = "finished" in facts or now - last > 0.2
            last = now if draw else last
            bars.update(tasks[job.name], completed=done, text=text, refresh=draw)

        yield report


class _Lines:
    """Plain log lines."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self.last: dict[str, float] = {}

    def __call__(self, job: Job, facts: dict[str, Any]) -> None:
        now = time.monotonic()
        if "finished" in facts:
            print(f"{job.name}: {_finished_text(facts)}", flush=True)
        elif now - self.last.setdefault(job.name, now) >= self.seconds:
            print(f"{job.name}: {_step_text(job, facts)}", flush=True)
        else:
            return
        self.last[job.name] = now


def _step_text(job: Job, facts: dict[str, Any]) -> str:
    nfe = "" if facts["nfe"] is None else f", NFE {facts['nfe']:.0f}"
    return (
        f"cycle {facts['cycle']}/{len(job.keeps)} (keep {facts['keep']:.3g}), "
        f"epoch {facts['epoch']}/{facts['epochs']}, NLL {facts['nll']:.3f}{nfe}, {facts['step_seconds'] * 1e3:.1f} ms/step"
    )


def _finished_text(facts: dict[str, Any]) -> str:
    row = facts["finished"]
    nll = "n/a" if row["test_nll"] is None else f"{row['test_nll']:.4f}"
    how = ", from its checkpoint" if facts["resumed"] else f", {row['seconds']:.1f} s"
    return f"cycle {row['cycle']} done: keep {row['keep']:.3g}, {row['size']} parameters, test NLL {nll}{how}"
