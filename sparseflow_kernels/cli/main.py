"""The `sparseflow` command."""

from __future__ import annotations

import typer

from . import bench, data, demo, info, paper, train

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False,
    help="Pruned neural ODEs and continuous normalizing flows, solved by kernels that see only the weights that remain.",
)
app.command("info")(info.info)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("prune")(train.prune)
app.command("sweep")(train.sweep)
app.add_typer(paper.app, name="paper")
app.add_typer(data.app, name="data")

if __name__ == "__main__":
    app()
