"""How commands speak: tables and progress bars on a terminal, plain aligned lines anywhere else."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import Callable, Iterator, Sequence

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def console() -> Console:
    """A console on the present standard output (which tests and pipes replace)."""
    return Console(file=sys.stdout, highlight=False)


def say(text: str) -> None:
    console().print(text, markup=False, soft_wrap=True)


def fail(text: str) -> typer.Exit:
    """Print an error; `raise fail(...)` ends the command with status 1."""
    typer.echo(f"error: {text}", err=True)
    return typer.Exit(1)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of figures are right-aligned. A terminal too narrow for a drawn table gets plain lines too."""
    numeric = [all(_is_figure(row[i]) for row in rows) for i in range(len(columns))]
    out = console()
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows)]
    if out.is_terminal and sum(widths) + 3 * len(widths) + 1 <= out.width:
        table = Table(title=title, title_justify="left")
        for name, right in zip(columns, numeric):
            table.add_column(name, justify="right" if right else "left")
        for row in rows:
            table.add_row(*row)
        out.print(table)
        return
    print(title)
    for row in (columns, *rows):
        cells = (cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric))
        print("  ".join(cells).rstrip())


def _is_figure(cell: str) -> bool:
    return cell in ("", "n/a") or cell[0].isdigit() or cell[0] in "<-+"


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Yields `update(done, text)`. On a terminal a bar with the latest text, elsewhere a line about every tenth part."""
    out = console()
    if out.is_terminal:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[text]}")
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
