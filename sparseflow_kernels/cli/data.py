"""`sparseflow data`: the data sets by name, and fetching the one that is not at hand."""

from __future__ import annotations

import typer

from .. import data
from ..data import maf, power, toy
from .console import command, console, fail, say, show_table, stoppable

app = typer.Typer(no_args_is_help=True, help="List data sets, fetch POWER, say where cached data lies.")


def _origin(name: str) -> tuple[str, str]:
    """(dimensions, where the data comes from)."""
    if name in toy.TOYS:
        return "2", "generated"
    if name == "power":
        return "6", "cached" if power.derived_path().exists() else "not fetched: sparseflow data fetch power (19.7 MB)"
    if name.startswith("mixture"):
        return name.removeprefix("mixture"), "generated"
    if name in maf.SPLITS:
        folder = maf.default_folder()
        there = all((folder / file).is_file() for file in maf.FILES[name])
        return str(maf.SPLITS[name][0]), f"in {folder}" if there else f"not there: {maf.SOURCE}, SPARSEFLOW_MAF"
    return {"digits": "64", "photos": "63"}[name], "comes with scikit-learn"


@app.command("list")
@command
def list_() -> None:
    """Names, dimensions and origins."""
    show_table("data sets", ("name", "dim", "origin"), [(name, *_origin(name)) for name in data.LOADERS])


@app.command()
@command
def fetch(name: str = typer.Argument(help="data set to download; only 'power' needs it")) -> None:
    """Download a data set into the cache; one that is there and whole stays, a damaged one is written anew."""
    if name != "power":
        known = name in data.LOADERS
        if name in maf.SPLITS:
            raise fail(f"{name!r} is in {maf.SOURCE}, 817 MB: unpack it and name its folder by SPARSEFLOW_MAF")
        raise fail(f"{name!r} needs no download" if known else f"{name!r} is not one of {', '.join(data.LOADERS)}")
    with stoppable("the cache is as it was before"), console().status("fetching POWER and deriving its splits"):
        loaded = data.load("power", download=True)
    rows = f"{len(loaded.train)} train, {len(loaded.val)} val, {len(loaded.test)} test rows"
    say(f"power: {rows} in {power.derived_path()}")


@app.command()
@command
def path() -> None:
    """The cache folder (SPARSEFLOW_CACHE chooses another)."""
    print(data.cache_dir())
