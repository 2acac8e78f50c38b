"""`sparseflow bench`: whole solves, or training steps, against torchdiffeq's dense ones, field by field, keep ratio by
keep ratio; or single kernels against this core's multiply-add rate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..analysis import bench as benchmark
from ..analysis.bench import SOLVE, TASKS, TRAIN, Spec, Task, known_fields
from ..analysis.floor import KERNEL_DENSITIES, KERNEL_WIDTHS, KERNELS, fma_rate, kernel_share
from ..analysis.markdown import bench_tables, evaluations, kernel_table, replace_block
from ..analysis.peers import one_thread
from ..analysis.plots import plot_bench
from ..analysis.problems import DEFAULT_KEEPS
from .console import fail, progress, say, show_table, stoppable
from .options import OFF, number


_ANEW = "To measure anew, run the same command again"


def _columns(task: Task) -> tuple[str, ...]:
    time = f"ms/{task.unit.split()[-1]}"
    figures = ("best ms", "us/NFE", "ratio", "ratio/NFE", "floor share")
    return ("keep", "contender", "nnz", "NFE", time, *figures, task.error_name)


def _figure(value: float | None, form: str, scale: float = 1.0) -> str:
    return "n/a" if value is None else format(value * scale, form)


def _cells(row: benchmark.Row) -> tuple[str, ...]:
    if row.skipped:
        return (f"{row.keep:g}", row.contender, "", "", "", "", "", "", "", "", f"skipped: {row.skipped}")
    return (
        f"{row.keep:g}", row.contender, str(row.nnz), evaluations(row), _figure(row.median, ".2f", 1e3),
        _figure(row.best, ".2f", 1e3), _figure(row.per_evaluation, ".1f", 1e6), _figure(row.ratio, ".1f"),
        _figure(row.ratio_per_evaluation, ".1f"), _figure(row.share, ".0%"), _figure(row.error, ".1e"),
    )


def _show(spec: Spec, rows: list[benchmark.Row], task: Task) -> None:
    show_table(spec.title, _columns(task), [_cells(row) for row in rows if row.field == spec.name])
    say("")


def _numbers(text: str | None, default: tuple[float, ...]) -> tuple[float, ...]:
    if text is None:
        return default
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise fail(f"--keeps: {text!r} is not a list of numbers such as 1,0.1,0.02") from None
    if not all(0 < value <= 1 for value in values):
        raise fail(f"--keeps: every keep ratio must lie in (0, 1], got {text!r}")
    return values


def _names(option: str, text: str | None, default: tuple[str, ...], known: dict) -> tuple[str, ...]:
    names = default if text is None else tuple(known) if text == "all" else tuple(text.split(","))
    for name in names:
        if name not in known:
            raise fail(f"{option}: {name!r} is not one of {', '.join(known)}, all")
    return names


def bench(
    train: Annotated[
        bool, typer.Option("--train", help="time training steps, not solves", show_default=OFF)
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="time the sparse kernels alone", show_default=OFF)
    ] = False,
    fields: Annotated[
        Optional[str],
        typer.Option(
            help="comma-separated field names, or 'all'",
            show_default=f"{', '.join(SOLVE.fields)}; with --train {', '.join(TRAIN.fields)}",
        ),
    ] = None,
    keeps: Annotated[
        Optional[str],
        typer.Option(help="comma-separated keep ratios", show_default=",".join(f"{keep:g}" for keep in DEFAULT_KEEPS)),
    ] = None,
    peers: Annotated[
        Optional[str],
        typer.Option(help="comma-separated peers to time as well, or 'all'", show_default="torchdiffeq alone"),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(help="time to spend on the rounds of one field at one keep ratio", callback=number(most=86_400)),
    ] = 20.0,
    quick: Annotated[
        bool, typer.Option("--quick", help="toy field, two keep ratios, a few rounds", show_default=OFF)
    ] = False,
    json_path: Annotated[
        Optional[Path], typer.Option("--json", help="write every figure to this file", show_default="none")
    ] = None,
    plot_path: Annotated[
        Optional[Path],
        typer.Option("--plot", help="draw time against keep ratio into this file", show_default="none"),
    ] = None,
    load_path: Annotated[
        Optional[Path],
        typer.Option("--load", help="measure nothing: read this --json file", show_default="none"),
    ] = None,
    markdown_path: Annotated[
        Optional[Path],
        typer.Option(
            "--markdown", help="put the table between this file's bench:begin and bench:end (see docs)",
            show_default="none",
        ),
    ] = None,
) -> None:
    """Time whole solves (dopri5, rtol = atol = 1e-5, float32, one core; flows with their divergence) and print ratios.

    With --train, time training steps: a loss and its gradient in all parameters, of flows a log-likelihood against
    torchdiffeq's odeint_adjoint on dense weights, of cfm, latent and images their own losses against autograd.
    The optimizer's own time is left out; taking over the weights it changed is not.

    ratio: torchdiffeq's time over the contender's, median over interleaved rounds. floor share: the arithmetic at this
    core's measured rates over the best time. NFE: evaluations of the field, forwards + in an adjoint's backward solve.
    max error, gradient error: against float64 at tolerance 1e-10, largest or relative in the Euclidean norm.

    With --kernels, only print the rates of sparse products (spmm) and gradients of sparse matrices (sddmm) over this
    core's multiply-add rate.

    --markdown fills the lines between NAME:begin and NAME:end; NAME is bench, train-bench or kernels, and graph-bench
    or graph-train-bench for fields that are no flows.
    """
    if kernels:
        with stoppable("nothing is kept", _ANEW):
            return _kernels(quick, markdown_path)
    task = TRAIN if train else SOLVE
    if load_path is not None:
        try:
            rows, chosen, document = benchmark.load_json(load_path)
        except (OSError, ValueError) as error:
            raise fail(f"--load: {error}") from error
        task = TASKS[document["task"]]
        for spec in chosen:
            _show(spec, rows, task)
    else:
        kept = "nothing is kept" if json_path is None else f"the fields that were finished are in {json_path}"
        with stoppable(kept, _ANEW):
            rows, chosen = _measure(task, fields, keeps, peers, seconds, quick, json_path)
        document = benchmark.document(rows, chosen, task)
    baselines = {spec.name: task.of(spec).baseline.name for spec in chosen}
    base = {(row.field, row.keep): row for row in rows if row.contender == baselines[row.field]}
    for row in rows:
        theirs = base[row.field, row.keep].error
        # like steps, but never bitwise like step sizes; below the tolerance all is well
        if row.contender == task.ours.name and row.error > max(1.5 * theirs, 1e-5):
            baseline = baselines[row.field]
            say(f"note: {row.field} at keep {row.keep:g}: error {row.error:.1e}, {baseline}'s is {theirs:.1e}")
    if plot_path is not None:
        say(f"wrote {plot_bench(rows, plot_path, task.unit)}")
    if json_path is not None and load_path is None:
        say(f"wrote {json_path}")
    if markdown_path is not None:
        for block, table in bench_tables(rows, chosen, document).items():
            _write_table(markdown_path, block, table)


def _write_table(path: Path, block: str, table: str) -> None:
    try:
        replace_block(path, block, table)
    except (OSError, ValueError) as error:
        raise fail(f"--markdown: {error}") from error
    say(f"wrote the table into {path}")


def _kernels(quick: bool, markdown_path: Path | None) -> None:
    if fma_rate() is None:
        raise fail("--kernels: the CPU extension is not built; `sparseflow info` says why")
    widths, densities = (KERNEL_WIDTHS[:1], KERNEL_DENSITIES[1:2]) if quick else (KERNEL_WIDTHS, KERNEL_DENSITIES)
    shares: dict[tuple[str, int, float], float] = {}
    with progress("timing kernels", len(KERNELS) * len(widths)) as update:
        for kernel in KERNELS:
            for width in widths:
                shares |= {(kernel, width, density): kernel_share(kernel, width, density) for density in densities}
                update(len(shares) // len(densities), f"{kernel} {width}")
    for kernel, meaning in KERNELS.items():
        lines = [(str(width), *(f"{shares[kernel, width, density]:.2f}" for density in densities)) for width in widths]
        columns = ("rows = columns", *(f"density {density:g}" for density in densities))
        show_table(f"{kernel}: {meaning}; share of {fma_rate() / 1e9:.0f} G multiply-adds/s", columns, lines)
        say("")
    if markdown_path is not None:
        machine = f"One core ({benchmark.processor()}), float32, {fma_rate() / 1e9:.0f} G multiply-adds/s"
        _write_table(markdown_path, "kernels", kernel_table(shares, machine))


def _measure(
    task: Task, fields: str | None, keeps: str | None, peers: str | None, seconds: float, quick: bool,
    json_path: Path | None,
) -> tuple[list[benchmark.Row], list[Spec]]:  # fmt: skip
    default = task.fields[:1] if quick else task.fields
    known = known_fields()
    chosen = [known[name] for name in _names("--fields", fields, default, known)]
    ratios = _numbers(keeps, (1.0, 0.1) if quick else DEFAULT_KEEPS)
    rivals = _names("--peers", peers, (), task.known_peers)
    most = 3 if quick else 30

    rows: list[benchmark.Row] = []
    with one_thread():
        for spec in chosen:
            here: list[benchmark.Row] = []
            with progress(f"timing {spec.name}", len(ratios)) as update:
                for done, keep in enumerate(ratios, 1):
                    here += benchmark.bench([spec], [keep], rivals, min(seconds, 2.0) if quick else seconds, most, task)
                    update(done, f"keep {keep:g}")
            rows += here
            _show(spec, here, task)
            if json_path is not None:  # after every field: a long run that is stopped keeps what it has measured
                benchmark.save_json(json_path, rows, chosen, task)
    return rows, chosen
