"""How commands speak: tables and progress bars on a terminal, plain aligned lines anywhere else; and what they say when
they cannot go on, or are stopped."""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, ParamSpec, Sequence

import typer
from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text
from safetensors import SafetensorError

from ..data.wheels import DownloadError
from ..training import NonFiniteLossError
from ..training.distributed import rank

P = ParamSpec("P")

# What a user can mend: files, arguments, data, settings of a training. All else is a fault of ours, with its traceback.
_ERRORS = (OSError, ValueError, ImportError, DownloadError, NonFiniteLossError, SafetensorError)


def console() -> Console:
    """A console on the present standard output (which tests and pipes replace)."""
    return Console(file=sys.stdout, highlight=False)


def say(text: str) -> None:
    console().print(text, markup=False, soft_wrap=True)


def fail(text: str) -> typer.Exit:
    """Print an error; `raise fail(...)` ends the command with status 1."""
    typer.echo(f"error: {text}", err=True)
    return typer.Exit(1)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """A command that says what is wrong in a sentence, and, stopped by Ctrl-C, how to go on."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with stoppable():
            try:
                function(*args, **kwargs)
            except BrokenPipeError:  # who read the output has gone
                raise
            except _ERRORS as error:
                raise fail(str(error)) from error

    return run


@contextmanager
def stoppable(kept: str = "", then: str = "To go on, run the same command again") -> Iterator[None]:
    """Ctrl-C within ends the command with status 130 and words: what is kept, and the command that goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if rank() == 0:  # to standard error: Ctrl-C has ended what standard output may be piped into
            typer.echo(f"\nstopped{'; ' if kept else ''}{kept}. {then}:\n  {_this_command()}", err=True)
        raise typer.Exit(130) from None


def _this_command() -> str:
    """As it can be typed again."""
    arguments = sys.argv[1:]
    if "LOCAL_WORLD_SIZE" in os.environ:
        start = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "sparseflow_kernels"]
    elif Path(sys.argv[0]).name == "sparseflow" or len(sys.orig_argv) <= len(arguments):
        start = ["sparseflow"]
    else:
        start = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]  # python -m ...
    return shlex.join([*start, *arguments])


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of figures are right-aligned. On a terminal, or where COLUMNS is set, a table fits the width: with rules
    where there is room, else without them and with cells folded; piped, a row is a line, however long."""
    numeric = [all(_is_figure(row[i]) for row in rows) for i in range(len(columns))]
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows)]
    out = console()
    if not out.is_terminal and not os.environ.get("COLUMNS"):
        print(title)
        for row in (columns, *rows):
            cells = (cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric))
            print("  ".join(cells).rstrip())
        return
    gaps = len(widths) - 1
    ruled = sum(widths) + 3 * gaps + 4 <= out.width
    gap = 2 if sum(widths) + 2 * gaps <= out.width else 1
    if gap == 1:
        widths = _narrowed([columns, *rows], widths, out.width - gaps)
    table = Table(box=HEAVY_HEAD if ruled else None, pad_edge=ruled, padding=(0, 1) if ruled else (0, gap, 0, 0))
    for name, width, right in zip(columns, widths, numeric):
        table.add_column(_folded(name, width), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_folded(cell, width)) for cell, width in zip(row, widths)))
    out.print(title, markup=False, overflow="fold")
    out.print(table)


_PIECE = re.compile(r".+?(?:\s+(?![+])|/|(?<=[a-z])-(?=[a-z])|$)")  # after which a cell may go on in a line of its own


def _narrowed(lines: Sequence[Sequence[str]], widths: list[int], room: int) -> list[int]:
    """Widths of the columns that come to `room` together, if cells can be folded so far between words."""
    least = [
        max(len(piece.rstrip()) for cell in column for piece in _PIECE.findall(cell) or [""]) for column in zip(*lines)
    ]
    widths = list(widths)
    while sum(widths) > room and (slack := max(w - least[i] for i, w in enumerate(widths))):
        widths[next(i for i, w in enumerate(widths) if w - least[i] == slack)] -= 1
    return widths


def _folded(cell: str, width: int) -> str:
    lines = [""]
    for piece in _PIECE.findall(cell):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _is_figure(cell: str) -> bool:
    return cell in ("", "n/a") or cell[0].isdigit() or cell[0] in "<-+"


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Yields `update(done, text)`. On a terminal a bar with the latest text, elsewhere a line about every tenth
    part."""
    out = console()
    if out.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", table_column=Column(overflow="fold")),  # folded, where it is long
        )
        # Drawn when told, not by a thread of its own: that thread's time would be counted in a benchmark's.
        with Progress(*columns, console=out, auto_refresh=False) as bar:
            task = bar.add_task(title, total=total, text="")
            bar.refresh()
            yield lambda done, text: bar.update(task, completed=done, text=text, refresh=True)
        return
    next_line = 0

    def update(done: int, text: str) -> None:
        nonlocal next_line
        if done >= next_line or done == total:
            next_line = done + max(1, total // 10)
            print(f"{title}: {done}/{total} {text}".rstrip(), flush=True)

    yield update
