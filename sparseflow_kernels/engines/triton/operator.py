"""One matrix on a device, as the kernels read it."""

from __future__ import annotations

from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from ...field import Pattern
from . import forms, kernels, tuning
from .forms import PRECISION, Form, Tile
from .launching import ceil_div, interpreted, launch


class Operator:
    """W, or W' (`transposed`), in one form: rows sorted by length, entries in the order this side reads them.

    pattern: of W.  values: [stored] what the kernels read, filled by `set_values`; None if not `fixed`, then `launch` is
    given them.
    """

    def __init__(
        self, pattern: Pattern, form: Form, device: torch.device, dtype: torch.dtype, transposed: bool = False,
        fixed: bool = True,
    ) -> None:  # fmt: skip
        own, self.permutation = pattern, None
        if transposed:
            own, permutation = pattern.transpose
            self.permutation = permutation.to(device)
        self.rows, self.cols = own.shape
        self.nnz, self.form, self.dtype = own.nnz, form, dtype
        lengths = own.row_ptr[1:] - own.row_ptr[:-1]
        order = torch.argsort(lengths, descending=True, stable=True)
        self.order = order.to(device, torch.int32)
        self.dense = form.name == "dense" and own.nnz > 0
        self.count = self.depth = 0
        self.slots: Tensor | None = None  # where every entry of the compacted weights lies
        if self.dense:
            used, place = torch.unique(own.col, return_inverse=True)
            self.count = used.numel()
            self.depth = forms.power_of_two(self.count) if self.count < 64 else ceil_div(self.count, 64) * 64
            self.depth = max(self.depth, 16)
            height = ceil_div(self.rows, 64) * 64  # of the tallest tile
            position = torch.empty_like(order).scatter_(0, order, torch.arange(self.rows))
            self.slots = (position[own.row] * self.depth + place).to(device)
            self.col = used.to(device, torch.int32)
            self.stored = height * self.depth
        else:
            self.col = own.col.to(device, torch.int32)
            self.stored = max(1, self.nnz)
        self.values = torch.zeros(self.stored, dtype=dtype, device=device) if fixed else None
        self.row_ptr = own.row_ptr.to(device, torch.int32)
        self.tuned: dict[tuple[Any, int | None, int], Tile] = {}  # by kernel, STORE, samples

    def arranged(self, values: Tensor) -> Tensor:
        """values [nnz], W's, in the order of this side's entries."""
        return values if self.permutation is None else values.index_select(0, self.permutation)

    def packed(self, values: Tensor) -> Tensor:
        """values [nnz], W's, as the kernels read them."""
        arranged = self.arranged(values).contiguous()
        return arranged.new_zeros(self.stored).index_copy_(0, self.slots, arranged) if self.dense else arranged

    def set_values(self, values: Tensor) -> None:
        """values [nnz], W's, on the device: nothing leaves it."""
        if self.dense:
            self.values.index_copy_(0, self.slots, self.arranged(values))
        elif self.nnz and self.permutation is None:
            self.values.copy_(values)
        elif self.nnz:
            torch.index_select(values, 0, self.permutation, out=self.values)

    def candidates(self, batch: int) -> tuple[Tile, ...]:
        """Tiles of programs over this many samples, best guess first."""
        if self.dense:
            form = "dense" if self.dtype == torch.float32 else "double dense"
        else:
            form = "wide sparse" if self.cols * 128 * self.dtype.itemsize >= forms.WIDE_SOURCE else "sparse"
        return forms.tiles(form, self.rows, batch, interpreted())

    def tune(self, kernel: Any, store: int | None, batch: int, run: Callable[[], None]) -> None:
        """Let the clock choose the tile that `run`, a launch of this kernel (with this STORE), uses from now on."""
        use = (kernel, store, batch)

        def with_tile(tile: Tile) -> None:
            self.tuned[use] = tile
            run()

        key = (*use, self.rows, self.cols, self.nnz, self.dense, self.dtype)
        self.tuned[use] = tuning.best_tile(key, self.candidates(batch), with_tile)

    def launch(
        self, kernel: Any, batch: int, matrix_source: Sequence[Any], rest: Sequence[Any], values: Tensor | None = None,
        tangent: bool = False, **constants: Any,
    ) -> None:  # fmt: skip
        """kernel(<this matrix>, *matrix_source, *rest), a tile of rows by a tile of samples per program.

        matrix_source: source, its row stride, its sample stride, its tangent's distance."""
        tile = self.tuned.get((kernel, constants.get("STORE"), batch)) or self.candidates(batch)[0]
        row_tiles = ceil_div(self.rows, tile.rows)
        launch(
            kernel, row_tiles * ceil_div(batch, tile.batch),
            self.order, self.rows, row_tiles, self.row_ptr, self.col, self.values if values is None else values,
            self.count, self.depth, *matrix_source, batch, *rest,
            TANGENT=tangent, DENSE=self.dense, ROWS=tile.rows, BATCH=tile.batch, UNROLL=tile.unroll,
            PRECISION=PRECISION[self.dtype], warps=tile.warps, **constants,
        )  # fmt: skip


class WeightGradient:
    """The gradient of the values of a matrix: sums over the batch of left[row] right[column] at the entries of its pattern,
    by inner products or, where the matrix is dense, by matrix instructions."""

    def __init__(self, pattern: Pattern, dense: bool, device: torch.device, dtype: torch.dtype) -> None:
        self.nnz, self.dense, self.dtype = pattern.nnz, dense and pattern.nnz > 0, dtype
        if not self.dense:
            self.row, self.col = (index.to(device, torch.int32) for index in (pattern.row, pattern.col))
            return
        rows, i = torch.unique(pattern.row, return_inverse=True)
        columns, j = torch.unique(pattern.col, return_inverse=True)
        edge = forms.GRADIENT_EDGE
        entries = torch.full([ceil_div(n.numel(), edge) * edge for n in (rows, columns)], -1, dtype=torch.int32)
        entries[i, j] = torch.arange(pattern.nnz, dtype=torch.int32)
        self.rows, self.columns, self.entries = (part.to(device, torch.int32) for part in (rows, columns, entries))

    def launch(
        self, left: Sequence[Any], right: Sequence[Any], batch: int, padded: int, chunk: int, out: Tensor, out_split: int,
        tangent: bool = False, add: bool = False,
    ) -> None:  # fmt: skip
        """out[split][entry] (`add`: added to it), of every `chunk` samples. left, right: tensor, stride of its rows, of its
        samples, distance of its tangent. Samples from `batch` to `padded` may be read but do not count."""
        tile = forms.tiles("gradient", self.nnz, batch, interpreted())[0]
        splits = ceil_div(batch, chunk)
        operands = (*left[:3], *right[:3], batch, padded, chunk, left[3], right[3], out, out_split)
        if self.dense:
            edge = forms.GRADIENT_EDGE
            row_tiles, column_tiles = (size // edge for size in self.entries.shape)
            launch(
                kernels.dense_gradient, row_tiles * column_tiles * splits, self.rows, self.rows.numel(), row_tiles,
                self.columns, self.columns.numel(), column_tiles, self.entries, self.entries.shape[1], *operands,
                TANGENT=tangent, ADD=add, ROWS=edge, COLUMNS=edge, BATCH=min(edge, tile.batch),
                PRECISION=PRECISION[self.dtype], warps=4,
            )  # fmt: skip
        else:
            tiles = ceil_div(self.nnz, tile.rows)
            launch(
                kernels.gradient, tiles * splits, self.row, self.col, self.nnz, tiles, *operands,
                TANGENT=tangent, ADD=add, ENTRIES=tile.rows, BATCH=tile.batch, warps=tile.warps,
            )  # fmt: skip
