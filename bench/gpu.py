"""The GPU suite: measures the card and both GPU engines within a time budget, and writes bench/results/<device>.json, a
table and a plot. What is measured, and how to read it: bench/README.md.

Exit codes: 0, 1 if a part failed (the others are there), 2 without a GPU.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Optional

import gpu_device
import gpu_measure
import gpu_report
import gpu_suite
import typer
from gpu_setting import Setting
from gpu_suite import Budget, Results

from sparseflow_kernels.cli.console import console, progress, say

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def main(
    quick: Annotated[bool, typer.Option("--quick", help="toy and POWER, keep 1 and 0.1, batch 1000, no peers")] = False,
    out: Annotated[Optional[Path], typer.Option(help="folder for the results; default bench/results")] = None,
    only: Annotated[str, typer.Option(help="names of items or their beginnings, e.g. barrier,solve/power")] = "",
    minutes: Annotated[float, typer.Option(min=0.05, help="time for all of it")] = 8.0,
    resume: Annotated[bool, typer.Option("--resume", help="go on in the result file, if it is of these sources")] = False,
    sanitize: Annotated[bool, typer.Option("--sanitize", help="keep time for compute-sanitizer")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="try the suite on the CPU, in small")] = False,
    until: Annotated[Optional[float], typer.Option(hidden=True, help="for the measuring process: when to end")] = None,
) -> None:
    """Measure the GPU engines. --only and --resume add to the result file that is there; without them it is a new one."""
    if not dry_run and (reason := gpu_device.no_gpu()) is not None:
        raise _fail(reason, 2)
    if dry_run:
        out = Path(tempfile.mkdtemp(prefix="sparseflow-gpu-dry-run-")) if out is None else out
        if out.resolve() == RESULTS:
            raise _fail("--out: a dry run does not write into bench/results; name another folder, or none", 1)
        setting = Setting.of_dry_run(HERE.parent)
    else:
        out = RESULTS if out is None else out
        setting = Setting.of_gpu(quick, sanitize, HERE.parent)
    name = gpu_device.device_name(setting.device)
    path = out / f"{gpu_suite.slug(name)}{'-quick' if quick and not dry_run else ''}.json"
    about = {"name": name, "dry_run": dry_run, "quick": quick}
    sources = gpu_device.source_trees(HERE.parent)
    try:
        items = gpu_suite.chosen(gpu_measure.items(setting), [part for part in only.split(",") if part])
        go_on = bool(resume or only or until)
        if resume and path.exists() and Results.load(path).document.get("sources") != sources:
            say(f"{path} was measured from other sources; a new one is begun")
            go_on = False
        results = Results.open(path, go_on, about)
        results.document.setdefault("sources", sources)
        results.save()
        if only and not resume and until is None:  # asked for by name: measured anew, in the file that is there
            results.forget(item.name for item in items)
    except (OSError, ValueError) as error:
        raise _fail(str(error), 1) from error
    if until is not None:
        budget = Budget(until - time.time())
        setting.know(results.document.get("rates", {}))
        with _telling(len(items)) as tell:
            obstacle = gpu_suite.run_items(items, results, budget, tell, lambda: gpu_device.lost(setting.device))
        if obstacle is not None:
            say(f"this process has lost the device: {obstacle}")
            raise typer.Exit(gpu_suite.LOST)
        raise typer.Exit(1 if results.failures() else 0)

    def command(until: float) -> list[str]:
        flags = [flag for flag, on in (("--quick", quick), ("--sanitize", sanitize), ("--dry-run", dry_run)) if on]
        return [sys.executable, __file__, "--until", str(until), "--out", str(out), "--only", only, *flags]

    budget = Budget(60 * minutes - min(8.0, 6 * minutes))  # the rest is for tables and the plot
    left = [item for item in items if not results.settled(item.name)]
    code = gpu_suite.supervise(command, path, budget, say) if left else 0
    results = Results.load(path)
    failures, skipped = results.failures(), results.skipped()
    table = path.with_suffix(".md")
    table.write_text(gpu_report.markdown(results.document, failures, skipped))
    say(f"wrote {path}")
    say(f"wrote {table}")
    try:
        say(f"wrote {gpu_report.plot(results.document, path.with_suffix('.png'))}")
    except (ImportError, ValueError) as error:
        say(f"no plot: {error}")
    for what, found, wanted, met in gpu_report.goals(results.document):
        word = {None: "not measured", True: "met", False: "NOT MET"}[met]
        say(f"{word:>12}  {what} {wanted:g}" + ("" if found is None else f": {found:.3g}"))
    for line in (*(f"failed: {line}" for line in failures), *(f"skipped: {line}" for line in skipped)):
        say(line)
    raise typer.Exit(1 if failures else code)


def _fail(text: str, code: int) -> typer.Exit:
    typer.echo(f"error: {text}", err=True)
    return typer.Exit(code)


class _telling:
    """On a terminal a bar under the lines; elsewhere the lines, as they come."""

    def __init__(self, total: int) -> None:
        self.total, self.bar = total, None

    def __enter__(self):
        if console().is_terminal:
            self.bar = progress("measuring", self.total)
            update = self.bar.__enter__()
            return lambda done, line: update(done, line)
        return lambda done, line: print(f"[{done}/{self.total}] {line}", flush=True)

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.__exit__(*error)


if __name__ == "__main__":
    typer.run(main)
