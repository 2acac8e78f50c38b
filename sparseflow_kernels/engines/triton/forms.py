"""Which kernel a matrix gets, and the shape of its tiles: small tables, each with its source.

Form: unstructured rows ("sparse") or matrix instructions over the compacted weights ("dense").
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ...field import Pattern

FORM_VARIABLE = "SPARSEFLOW_TRITON_FORM"
FORMS = ("auto", "sparse", "dense")

# Densities of the compacted matrix above which matrix instructions should win: a roofline of an H100. A sparse loop
# gathers a number for every multiply-add from the second-level cache, whose 5.5 TB/s feed 1.4 T/s in float32, 0.7 T/s in
# float64, and a little more where the first level helps; fused 3xTF32 makes 32 T/s, float64 at 60 % of its peak 10 T/s.
# Not yet measured on a GPU.
CROSSOVER = {torch.float32: 0.05, torch.float64: 0.08}
SMALLEST_DENSE = 16  # rows and columns a tile of matrix instructions has at least

# Plain TF32 rounds operands to 10 bits, which an adaptive solver sees as local error below a tolerance of about 1e-4.
PRECISION = {torch.float32: "tf32x3", torch.float64: "ieee"}


@dataclass(frozen=True)
class Form:
    """name: "sparse" or "dense". density: of the matrix without its empty rows and columns. why: in a few words."""

    name: str
    density: float
    why: str


def choose_form(pattern: Pattern, dtype: torch.dtype, wanted: str | None = None, fixed: bool = True) -> Form:
    """The form of one matrix. wanted: "auto", "sparse" or "dense"; None reads SPARSEFLOW_TRITON_FORM. fixed: its values
    do not depend on time (others are always sparse: they would be scattered anew at every stage)."""
    source = "asked for by argument"
    if wanted is None:
        wanted, source = os.environ.get(FORM_VARIABLE, "auto"), f"asked for by {FORM_VARIABLE}"
    if wanted not in FORMS:
        raise ValueError(f"{FORM_VARIABLE}: {wanted!r} is not a form; known are {', '.join(FORMS)}")
    rows = int((pattern.row_ptr[1:] > pattern.row_ptr[:-1]).sum())
    columns = int(torch.unique(pattern.col).numel())
    density = pattern.nnz / max(1, rows * columns)
    if not fixed:
        return Form("sparse", density, "its values depend on time")
    if pattern.nnz == 0:
        return Form("sparse", density, "it is empty")
    if wanted != "auto":
        return Form(wanted, density, source)
    crossover = CROSSOVER[dtype]
    if min(rows, columns) < SMALLEST_DENSE:
        return Form("sparse", density, f"fewer than {SMALLEST_DENSE} rows or columns are too few for matrix instructions")
    if density < crossover:
        return Form("sparse", density, f"below the crossover at {crossover:g}")
    return Form("dense", density, f"at or above the crossover at {crossover:g}")


@dataclass(frozen=True)
class Tile:
    """The shape of a kernel's work: rows (or entries) by samples of a program, entries (or columns) of a step, warps."""

    rows: int
    batch: int
    unroll: int
    warps: int


# Candidates by form, best guess first; timing chooses among those that fit, on a GPU.
SPARSE_TILES = (Tile(4, 128, 4, 4), Tile(1, 128, 4, 1), Tile(8, 64, 2, 4), Tile(2, 256, 4, 4), Tile(16, 32, 2, 4))
# Of a wide source few samples at a time: all its rows, of these, then stay in the first-level cache for 16 rows of a tile.
WIDE_SPARSE_TILES = (SPARSE_TILES[-1], *SPARSE_TILES[:-1])
WIDE_SOURCE = 128 << 10  # bytes of 128 samples of it
DENSE_TILES = (Tile(64, 64, 16, 8), Tile(32, 64, 32, 4), Tile(32, 32, 32, 4), Tile(16, 64, 32, 2))
DOUBLE_DENSE_TILES = (Tile(32, 32, 32, 4), Tile(16, 64, 16, 4), Tile(16, 32, 32, 2))  # larger ones run out of registers
GRADIENT_TILES = (Tile(8, 128, 1, 4),)
GRADIENT_EDGE = 32  # rows, columns and samples of a tile of a dense gradient
STEP_TILES = (Tile(2, 256, 1, 4),)
POINTWISE_TILES = (Tile(2, 256, 1, 4),)
INTERPRETED = {  # the interpreter's time goes by the program
    "sparse": Tile(16, 32, 1, 1), "wide sparse": Tile(16, 32, 1, 1),
    "dense": Tile(16, 32, 16, 1), "double dense": Tile(16, 32, 16, 1),
    "gradient": Tile(64, 32, 1, 1), "step": Tile(4, 32, 1, 1),
    "pointwise": Tile(16, 32, 1, 1),
}  # fmt: skip


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def tiles(form: str, rows: int, batch: int, interpreted: bool) -> tuple[Tile, ...]:
    """The tiles that fit `rows` rows over `batch` samples, best guess first. form: a matrix's ("wide sparse": of a
    source of WIDE_SOURCE or more, "double dense": of float64), or "gradient" (rows are its entries), or "step" (rows
    are the state's), or "pointwise"."""
    if interpreted:
        return (INTERPRETED[form],)
    least = 16 if form.endswith("dense") else 1
    table = {
        "sparse": SPARSE_TILES, "wide sparse": WIDE_SPARSE_TILES, "dense": DENSE_TILES,
        "double dense": DOUBLE_DENSE_TILES, "gradient": GRADIENT_TILES, "step": STEP_TILES, "pointwise": POINTWISE_TILES,
    }[form]  # fmt: skip
    found = []
    for tile in table:
        fitted = Tile(
            max(least, min(tile.rows, power_of_two(rows))), max(16, min(tile.batch, power_of_two(batch))),
            tile.unroll, tile.warps,
        )  # fmt: skip
        if fitted not in found:
            found.append(fitted)
    return tuple(found)


def chunk(batch: int, splits: int, interpreted: bool) -> int:
    """Samples of a split of a gradient, so that there are `splits` of them at most: a multiple of a tile's."""
    tile = tiles("gradient", 1 << 30, batch, interpreted)[0]
    return -(-(-(-batch // tile.batch)) // splits) * tile.batch
