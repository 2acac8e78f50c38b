"""`sparseflow paper`: the Sparse Flows experiments (arXiv 2106.12718), from training to tables, pictures and a
report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Callable, Optional, Sequence

import torch
import typer

from .. import data
from ..analysis import paper as experiments
from ..analysis import paper_report as report
from ..analysis.markdown import replace_block
from ..analysis.paper_cost import expected_hours
from ..analysis.paper_experiments import STUDIES, TOYS, Experiment, toy_experiments, total_steps
from ..analysis.paper_html import write_html
from ..analysis.paper_plots import draw as draw_plots
from ..files import write_json
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
Net = Annotated[
    Optional[str],
    typer.Option(
        help="comma-separated: ffjord_l4_h64 (trained with Hutchinson's trace), cnf_l2_h128 (exact), of classifiers "
        "l2_h64, ...",
        show_default=_THEIRS,
    ),
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
    bool,
    typer.Option(
        "--hessian", help="also the curvature of the loss at every cycle (not of images)", show_default=OFF
    ),
]
Redraw = Annotated[
    bool,
    typer.Option("--redraw", help="train nothing: tables and plots from the folder's results", show_default=OFF),
]
Markdown = Annotated[
    Optional[Path],
    typer.Option(help="put verdicts and tables between this file's paper-...:begin and :end", show_default="none"),
]
Download = Annotated[
    bool,
    typer.Option(
        "--download", help="fetch POWER (19.7 MB) or MNIST (20.3 MB) first if it is not there", show_default=OFF
    ),
]


@app.command("list")
@command
def list_() -> None:
    """Every experiment of the paper by name: what it is, how many runs, and how many training steps they take."""
    lines = []
    for name, study in STUDIES.items():
        runs = study.runs()
        on = f"; on stand-in {study.stand_in} with --stand-in" if study.stand_in else ""
        steps = sum(total_steps(runs, {runs[0].dataset: _ROWS[runs[0].dataset]}).values())
        lines.append((name, study.about + on, str(len(runs)), f"{steps / 1e6:.2f}"))
    show_table("experiments", ("name", "what", "runs", "million steps"), lines)
    say("sparseflow paper run NAME --dry-run measures how many hours that is here")


@app.command("run")
@command
def run_(
    name: Annotated[str, typer.Argument(help="of `sparseflow paper list`")],
    quick: Quick = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would run and how long it takes here", show_default=OFF)
    ] = False,
    stand_in: Annotated[
        bool,
        typer.Option("--stand-in", help="on data that stand in where the paper's are not at hand", show_default=OFF),
    ] = False,
    net: Net = None,
    method: Method = None,
    keeps: Keeps = None,
    seeds: Seeds = None,
    jobs: Jobs = 1,
    folder: Folder = None,
    hessian: Hessian = False,
    markdown: Markdown = None,
    download: Download = False,
) -> None:
    """Run an experiment, or what of it is missing in its folder, after saying how many hours that takes here."""
    if name not in STUDIES:
        raise fail(f"{name!r} is no experiment; `sparseflow paper list` has their names")
    study = STUDIES[name]
    found = study.runs(
        quick, stand_in=stand_in, nets=_nets(net, study.preset), methods=_one_of("--method", method, METHODS),
        keeps=_keeps(keeps), seeds=seeds,
    )  # fmt: skip
    if download and found[0].dataset in ("power", "mnist"):
        data.load(found[0].dataset, download=True)
    where = _folder(folder, name + ("-stand-in" if stand_in else ""), quick)
    _all(name, found, where, jobs, hessian, False, markdown, tell_hours=True, dry=dry_run)


@app.command("report")
@command
def report_(
    folder: Annotated[Path, typer.Argument(help="of a run")],
    markdown: Markdown = None,
    summary: Annotated[
        Optional[Path], typer.Option(help="write few figures of every run as JSON to this file", show_default="none")
    ] = None,
) -> None:
    """Verdicts, tables, pictures and one self-contained HTML page of what a folder has; nothing is trained."""
    documents = experiments.read_results(folder)
    if not documents:
        raise fail(f"{folder} has no results; run an experiment into it first")
    _tell(folder.name, documents, folder, markdown)
    if summary is not None:
        write_json(summary, report.summary(documents), indent=None)
        say(f"wrote {summary}")


@app.command()
@command
def toy(
    quick: Quick = False,
    names: Annotated[
        Optional[str], typer.Option("--data", help="comma-separated: " + ", ".join(TOYS), show_default="all")
    ] = None,
    net: Net = None,
    method: Method = None,
    keeps: Keeps = None,
    seeds: Seeds = None,
    jobs: Jobs = 2,
    folder: Folder = None,
    hessian: Hessian = False,
    redraw: Redraw = False,
    markdown: Markdown = None,
) -> None:
    """The 2-D densities together. Without options: all that the paper ran, which takes days; run it again to go on from
    where it was stopped. --quick: the three densities at five or six prune ratios, one seed, fewer epochs."""
    found = toy_experiments(
        quick, names=_list("--data", names, TOYS), nets=_nets(net, "gaussians"),
        methods=_one_of("--method", method, METHODS), keeps=_keeps(keeps), seeds=seeds,
    )  # fmt: skip
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
    download: Download = False,
) -> None:
    """POWER (re-derived): 6-d, five concatsquash fields of 3x60. --quick: some hundred steps, three prune ratios."""
    found = STUDIES["power"].runs(quick, methods=_one_of("--method", method, METHODS), keeps=_keeps(keeps), seeds=seeds)
    if not redraw:
        data.load("power", download=download)
    _all("power", found, _folder(folder, "power", quick), jobs, hessian, redraw, markdown)


_ROWS = {
    "gaussians": 14742, "gaussians_spiral": 14742, "spirals2": 29492, "moons": 922, "concentric": 922, "spirals": 1844,
    "power": 1_659_917, "gas": 852_174, "hepmass": 315_123, "miniboone": 29_556, "bsds300": 1_000_000, "mnist": 54_000,
    "cifar10": 45_000, "digits_images": 1439,
}  # fmt: skip
"""Training rows of the paper's data sets, which need not be at hand to count steps."""


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


def _nets(text: str | None, preset: str) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(text.split(","))
    try:
        for name in names:
            PRESETS[preset].flow(name)
    except ValueError as error:
        raise fail(f"--net: {error}") from error
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
    what: str, chosen: list[Experiment], folder: Path, jobs: int, hessian: bool, redraw: bool, markdown: Path | None,
    tell_hours: bool = False, dry: bool = False,
) -> None:  # fmt: skip
    """tell_hours: measure first what it will take.  dry: and do no more than that."""
    failed: dict[str, str] = {}
    if redraw:
        documents = experiments.read_results(folder)
        if not documents:
            raise fail(f"--redraw: {folder} has no results; run without it first")
    else:
        if tell_hours:
            rows = {one.dataset: len(one.rows().train) for one in {run.dataset: run for run in chosen}.values()}
            steps, hours = sum(total_steps(chosen, rows).values()), expected_hours(chosen, rows)
            runs = f"{len(chosen)} run{'s' if len(chosen) > 1 else ''}"
            say(f"{what}: {runs}, {steps:,} training steps, about {_hours(hours)} on one core here")
            if dry:
                return
        with locked_folder(folder), stoppable(f"every finished epoch is in {folder}"):
            documents, failed = _run(what, chosen, folder, jobs, hessian)
    _tell(what, documents, folder, markdown)
    if failed:
        raise fail("\n".join(f"{name}: {text}" for name, text in failed.items()))


def _hours(hours: float) -> str:
    if hours < 2:
        return f"{hours * 60:.0f} minutes"
    return f"{hours:.0f} hours" if hours < 100 else f"{hours / 24:.0f} days"


def _tell(what: str, documents: list[dict[str, Any]], folder: Path, markdown: Path | None) -> None:
    """Tables, verdicts, pictures, and the page that has them all."""
    for table in report.tables(documents):
        show_table(table.title, table.columns, table.rows)
        say("")
    for line in (*report.verdicts(documents), "", *report.closing(documents)):
        say(line)
    pictures: list[Path] = []
    try:
        pictures = draw_plots(documents, folder)
    except ImportError as error:
        say(f"no plots: {error}")
    for path in (*pictures, write_html(documents, pictures, folder / "report.html", f"Sparse Flows: {what}")):
        say(f"wrote {path}")
    say(f"results are in {folder / 'results'}")
    if markdown is not None and documents:
        try:
            replace_block(markdown, f"paper-{what}", report.markdown(documents))
        except (OSError, ValueError) as error:
            raise fail(f"--markdown: {error}") from error
        say(f"wrote the tables into {markdown}")


def _run(
    what: str, chosen: list[Experiment], folder: Path, jobs: int, hessian: bool
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All experiments, `jobs` processes at a time, under one progress display of training steps: the documents of those
    that ended, and name -> error of the others. Runs that share a dense net and its control go to one process."""
    for one in chosen:
        experiments.earlier(one, folder)  # refuses before anything is trained
    rows = {one.dataset: len(one.rows().train) for one in {run.dataset: run for run in chosen}.values()}
    totals = total_steps(chosen, rows)
    whole = {one.name: one.steps_through(rows[one.dataset]) for one in chosen}
    done = dict.fromkeys(totals, 0)
    per_cycle: dict[tuple, int] = {}

    with progress(f"paper {what}", sum(totals.values())) as update:

        def tell(facts: dict[str, Any]) -> None:
            name = facts["run"]
            text = f"{name}: "
            if "finished" in facts:
                done[name] = totals[name]
                text += "finished"
            elif "analysis" in facts:
                text += f"analysis at {facts['analysis']}"
                if totals[name] == whole[name]:  # also what was trained before the run was stopped
                    done[name] = max(done[name], facts["done"])
                if not console().is_terminal:  # a line for every cycle, however long the whole run is
                    say(text)
                    return
            else:
                key = (name, facts["cycle"], facts["control"])
                done[name] = min(totals[name], done[name] + max(0, facts["step"] - per_cycle.get(key, 0)))
                per_cycle[key] = facts["step"]
                flow = "control" if facts["control"] else "dense" if facts["keep"] == 1 else f"keep {facts['keep']:.3g}"
                nfe = "" if facts["nfe"] is None else f", NFE {facts['nfe']}"
                text += (
                    f"{flow}, epoch {facts['epoch']}/{facts['epochs']}, nll {facts['nll']:.3f}{nfe}, "
                    f"{facts['step_seconds'] * 1e3:.0f} ms/step"
                )
            update(min(sum(done.values()), sum(totals.values())), text)

        groups: dict[str, list[Experiment]] = {}
        for one in chosen:
            groups.setdefault(one.unpruned_name, []).append(one)
        if jobs > 1 and len(groups) > 1:  # an error in one group does not end the others
            tasks = [(group, folder, hessian) for group in groups.values()]
            ended, failed = run_in_processes(_worker, tasks, jobs, lambda _, facts: tell(facts))
            names = list(groups)
            return [one for i in sorted(ended) for one in ended[i]], {names[i]: text for i, text in failed.items()}
        return [_one_thread_run(one, folder, hessian, tell) for one in chosen], {}


_SILENCE = 2.0  # seconds


def _one_thread_run(
    experiment: Experiment, folder: Path, hessian: bool, tell: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """One experiment on one thread, telling of about every twentieth step, of more where these take long, and of every
    change."""
    torch.set_num_threads(1)
    set_num_threads(1)
    told = time.monotonic()

    def on_progress(facts: dict[str, Any]) -> None:
        nonlocal told
        due = time.monotonic() - told > _SILENCE
        if due or "step" not in facts or facts["step"] % 20 == 0 or facts["step"] == facts["steps"]:
            told = time.monotonic()
            tell({"run": experiment.name, **facts})

    found = experiments.run(experiment, folder, hessian=hessian, progress=on_progress)
    tell({"run": experiment.name, "finished": True})
    return found


def _worker(
    task: tuple[list[Experiment], Path, bool], tell: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    group, folder, hessian = task
    return [_one_thread_run(one, folder, hessian, tell) for one in group]
