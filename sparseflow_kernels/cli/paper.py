"""`sparseflow paper`: the Sparse Flows experiments (arXiv 2106.12718), from training to tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Callable, Optional, Sequence

import torch
import typer

from .. import data
from ..analysis import paper as experiments
from ..analysis import paper_report as report
from ..analysis.markdown import replace_block
from ..analysis.paper import Experiment
from ..analysis.paper_plots import draw as draw_plots
from ..pruning import KEEP_RATIOS
from ..threads import set_num_threads
from ..training import PRESETS
from ..training.lock import locked_folder
from ..training.processes import run_in_processes
from .console import command, console, fail, progress, say, show_table, stoppable
from .options import METHODS, OFF, keeps_of, whole

app = typer.Typer(
    no_args_is_help=True, help="The Sparse Flows experiments: train, prune, retrain, beside an unpruned control."
)

_THEIRS = "the paper's"

Quick = Annotated[
    bool, typer.Option("--quick", help="fewer prune ratios and epochs: minutes instead of days", show_default=OFF)
]
Method = Annotated[
    Optional[str], typer.Option(help="weights, neurons or both", show_default="both; with --quick weights")
]
Keeps = Annotated[
    Optional[str],
    typer.Option(
        help="comma-separated keep ratios, or a schedule: " + ", ".join(KEEP_RATIOS), show_default=_THEIRS
    ),
]
Seeds = Annotated[
    Optional[int],
    typer.Option(
        help="independent trainings of each net", show_default=f"{_THEIRS}; with --quick 1", callback=whole(most=10_000)
    ),
]
Jobs = Annotated[int, typer.Option(help="processes, one thread each", callback=whole(most=1024))]
Folder = Annotated[
    Optional[Path],
    typer.Option(
        help="where checkpoints, results and plots go, and are found again", show_default="paper_output/NAME[-quick]"
    ),
]
Hessian = Annotated[
    bool, typer.Option("--hessian", help="also the curvature of the loss at every cycle", show_default=OFF)
]
Redraw = Annotated[
    bool,
    typer.Option("--redraw", help="train nothing: tables and plots from the folder's results", show_default=OFF),
]
Markdown = Annotated[
    Optional[Path],
    typer.Option(help="put verdicts and tables between this file's paper-...:begin and :end", show_default="none"),
]


@app.command()
@command
def toy(
    quick: Quick = False,
    names: Annotated[
        Optional[str],
        typer.Option("--data", help="comma-separated: " + ", ".join(experiments.TOYS), show_default="all"),
    ] = None,
    net: Annotated[
        Optional[str],
        typer.Option(
            help="comma-separated: ffjord_l4_h64 (trained with Hutchinson's trace), cnf_l2_h128 (exact), ...",
            show_default=_THEIRS,
        ),
    ] = None,
    method: Method = None,
    keeps: Keeps = None,
    seeds: Seeds = None,
    jobs: Jobs = 2,
    folder: Folder = None,
    hessian: Hessian = False,
    redraw: Redraw = False,
    markdown: Markdown = None,
) -> None:
    """The 2-D densities. Without options: all that the paper ran, which takes days; run it again to go on from where it
    was stopped. --quick: the three densities at five or six prune ratios, one seed, fewer epochs."""
    chosen = _list("--data", names, experiments.TOYS)
    nets = None if net is None else tuple(net.split(","))
    try:
        for name in nets or ():
            PRESETS["gaussians"].flow(name)
    except ValueError as error:
        raise fail(f"--net: {error}") from error
    found = experiments.toy_experiments(
        quick, names=chosen, nets=nets, methods=_one_of("--method", method, METHODS), keeps=_keeps(keeps), seeds=seeds
    )
    _all("toy", found, _folder(folder, "toy", quick), jobs, hessian, redraw, markdown)


@app.command()
@command
def power(
    quick: Quick = False,
    method: Method = None,
    keeps: Keeps = None,
    seeds: Seeds = None,
    jobs: Jobs = 1,
    folder: Folder = None,
    hessian: Hessian = False,
    redraw: Redraw = False,
    markdown: Markdown = None,
    download: Annotated[
        bool,
        typer.Option("--download", help="fetch the data first (19.7 MB) if it is not there", show_default=OFF),
    ] = False,
) -> None:
    """POWER (re-derived): 6-d, five concatsquash fields of 3x60. --quick: some hundred steps, three prune ratios."""
    found = experiments.power_experiments(
        quick, methods=_one_of("--method", method, METHODS), keeps=_keeps(keeps), seeds=seeds
    )
    if not redraw:
        data.load("power", download=download)
    _all("power", found, _folder(folder, "power", quick), jobs, hessian, redraw, markdown)


# ------------------------------------------------------------------------------------------------------------- options


def _folder(folder: Path | None, what: str, quick: bool) -> Path:
    return folder if folder is not None else Path("paper_output") / (f"{what}-quick" if quick else what)


def _list(option: str, text: str | None, known: Sequence[str]) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise fail(f"{option}: {name!r} is not one of {', '.join(known)}")
    return names


def _one_of(option: str, text: str | None, known: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    if text is None:
        return None
    if text not in known:
        raise fail(f"{option}: {text!r} is not one of {', '.join(known)}")
    return known[text]


def _keeps(text: str | None) -> tuple[float, ...] | None:
    return None if text is None else keeps_of("--keeps", text)


# ------------------------------------------------------------------------------------------------------------- running


def _all(
    what: str, chosen: list[Experiment], folder: Path, jobs: int, hessian: bool, redraw: bool, markdown: Path | None
) -> None:
    failed: dict[str, str] = {}
    if redraw:
        documents = experiments.read_results(folder)
        if not documents:
            raise fail(f"--redraw: {folder} has no results; run without it first")
    else:
        with locked_folder(folder), stoppable(f"every finished epoch is in {folder}"):
            documents, failed = _run(what, chosen, folder, jobs, hessian)
    for columns, tables in (
        (report.COLUMNS, report.table(documents)),
        (report.HESSIAN_COLUMNS, report.hessian_table(documents)),
    ):
        for title, rows in tables.items():
            show_table(title, columns, rows)
            say("")
    for line in (*report.verdicts(documents), "", *report.closing(documents)):
        say(line)
    try:
        for path in draw_plots(documents, folder):
            say(f"wrote {path}")
    except ImportError as error:
        say(f"no plots: {error}")
    say(f"results are in {folder / 'results'}")
    if markdown is not None and documents:
        try:
            replace_block(markdown, f"paper-{what}", report.markdown(documents))
        except (OSError, ValueError) as error:
            raise fail(f"--markdown: {error}") from error
        say(f"wrote the tables into {markdown}")
    if failed:
        raise fail("\n".join(f"{name}: {text}" for name, text in failed.items()))


def _run(
    what: str, chosen: list[Experiment], folder: Path, jobs: int, hessian: bool
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All experiments, `jobs` at a time, under one progress display of training steps: the documents of those that
    ended, and name -> error of the others."""
    for one in chosen:
        experiments.earlier(one, folder)  # refuses before anything is trained
    rows = {name: len(data.load(name).train) for name in {one.dataset for one in chosen}}
    totals = {one.name: one.steps_through(rows[one.dataset]) for one in chosen}
    done = dict.fromkeys(totals, 0)
    per_cycle: dict[tuple, int] = {}

    with progress(f"paper {what}", sum(totals.values())) as update:

        def tell(name: str, facts: dict[str, Any]) -> None:
            text = f"{name}: "
            if "finished" in facts:
                done[name] = totals[name]
                text += "finished"
            elif "analysis" in facts:
                done[name] = max(done[name], facts["done"])
                text += f"analysis at {facts['analysis']}"
                if not console().is_terminal:  # a line for every cycle, however long the whole run is
                    say(text)
                    return
            else:
                key = (name, facts["cycle"], facts["control"])
                done[name] += max(0, facts["step"] - per_cycle.get(key, 0))
                per_cycle[key] = facts["step"]
                flow = "control" if facts["control"] else "dense" if facts["keep"] == 1 else f"keep {facts['keep']:.3g}"
                nfe = "" if facts["nfe"] is None else f", NFE {facts['nfe']}"
                text += (
                    f"{flow}, epoch {facts['epoch']}/{facts['epochs']}, nll {facts['nll']:.3f}{nfe}, "
                    f"{facts['step_seconds'] * 1e3:.0f} ms/step"
                )
            update(min(sum(done.values()), sum(totals.values())), text)

        if jobs > 1 and len(chosen) > 1:  # an error in one run does not end the others
            tasks = [(one, folder, hessian) for one in chosen]
            done, failed = run_in_processes(_worker, tasks, jobs, lambda i, facts: tell(chosen[i].name, facts))
            return [done[i] for i in sorted(done)], {chosen[i].name: text for i, text in failed.items()}
        return [
            _one_thread_run(one, folder, hessian, lambda facts, name=one.name: tell(name, facts)) for one in chosen
        ], {}


def _one_thread_run(
    experiment: Experiment, folder: Path, hessian: bool, tell: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """One experiment on one thread, telling of about every twentieth step and every change."""
    torch.set_num_threads(1)
    set_num_threads(1)

    def on_progress(facts: dict[str, Any]) -> None:
        if "step" not in facts or facts["step"] % 20 == 0 or facts["step"] == facts["steps"]:
            tell(facts)

    found = experiments.run(experiment, folder, hessian=hessian, progress=on_progress)
    tell({"finished": True})
    return found


def _worker(task: tuple[Experiment, Path, bool], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    return _one_thread_run(*task, tell)
