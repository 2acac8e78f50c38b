"""The `sparseflow` command."""

from __future__ import annotations

import typer

from . import bench, data, demo, info, paper, train
from .console import command

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False,
    help="Pruned neural ODEs and continuous normalizing flows, solved by kernels that see only the weights that remain.",
)
for name, function in {
    "info": info.info, "bench": bench.bench, "demo": demo.demo, "train": train.train, "prune": train.prune,
    "sweep": train.sweep,
}.items():  # fmt: skip
    app.command(name)(command(function))
app.add_typer(paper.app, name="paper")
app.add_typer(data.app, name="data")

if __name__ == "__main__":
    app()
