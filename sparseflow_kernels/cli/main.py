"""The `sparseflow` command."""

from __future__ import annotations

from typing import Annotated, Callable

import typer

from .. import __version__
from . import bench, data, demo, info, paper, train
from .console import command
from .options import OFF

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False, rich_markup_mode="markdown")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sparseflow_kernels {__version__}")
        raise typer.Exit()


@app.callback()
def face(
    version: Annotated[
        bool,
        typer.Option("--version", help="say the version and stop", show_default=OFF, callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Pruned neural ODEs and continuous normalizing flows, solved by kernels that see only the weights that remain."""


_commands: dict[str, Callable[..., None]] = {
    "info": info.info, "bench": bench.bench, "demo": demo.demo, "train": train.train, "prune": train.prune,
    "sweep": train.sweep,
}  # fmt: skip
for name, function in _commands.items():
    app.command(name)(command(function))
app.add_typer(paper.app, name="paper")
app.add_typer(data.app, name="data")
