"""`sparseflow data`: the data sets by name, and fetching those that can be fetched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Callable

import typer

from .. import data
from ..data import images, maf, power, toy
from .console import command, console, fail, say, show_table, stoppable

app = typer.Typer(no_args_is_help=True, help="List data sets, fetch POWER and MNIST, say where cached data lies.")


FETCHED: dict[str, Callable[[], Path]] = {"power": power.derived_path, "mnist": lambda: images.MNIST.path}
"""Where they lie."""


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
    if name == "mnist":
        there = images.is_there(name)
        return "784", "cached" if there else "not fetched: sparseflow data fetch mnist (20.3 MB)"
    if name in images.SHAPES:
        folder = images.default_folder(name)
        there = images.is_there(name)
        return (
            str(math.prod(images.SHAPES[name])),
            f"in {folder}" if there else f"not there: put its files into {folder}, or name theirs by "
            f"SPARSEFLOW_{name.upper()}",
        )
    dims = {"digits": "64", "digits_images": "64", "photos": "63", "photo_crops": "3072"}
    return dims[name], "comes with scikit-learn"


@app.command("list")
@command
def list_() -> None:
    """Names, dimensions and origins."""
    show_table("data sets", ("name", "dim", "origin"), [(name, *_origin(name)) for name in data.LOADERS])


@app.command()
@command
def fetch(name: str = typer.Argument(help=f"data set to download: {' or '.join(FETCHED)}")) -> None:
    """Download a data set into the cache; one that is there and whole stays, a damaged one is written anew."""
    if name not in FETCHED:
        known = name in data.LOADERS
        if name in maf.SPLITS:
            raise fail(f"{name!r} is in {maf.SOURCE}, 817 MB: unpack it and name its folder by SPARSEFLOW_MAF")
        if name in images.SHAPES:
            raise fail(f"{name!r} is not fetched: {images.WHERE[name]}")
        raise fail(f"{name!r} needs no download" if known else f"{name!r} is not one of {', '.join(data.LOADERS)}")
    with stoppable("the cache is as it was before"), console().status(f"fetching {name.upper()}"):
        loaded = data.load(name, download=True)
    rows = f"{len(loaded.train)} train, {len(loaded.val)} val, {len(loaded.test)} test rows"
    say(f"{name}: {rows} in {FETCHED[name]()}")


@app.command()
@command
def path() -> None:
    """The cache folder (SPARSEFLOW_CACHE chooses another)."""
    print(data.cache_dir())
