"""The rows of a chain while it is being read: pending affine layers over closed ones, and how they combine.

Arithmetic makes new rows; each is one row of a pending layer gate(t) * (W h + bias) + shift(t) over the last closed
layer h. An activation, or a second matrix, closes a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..field import IDENTITY, Activation
from .algebra import add, apply, as_time, mul, take
from .operations import aten
from .refusal import refuse
from .values import Constant, TimeValue


@dataclass(eq=False)
class Hidden:
    """The output h of a closed layer (or the state itself: pre None). rows: the row numbers of its pre-activations.
    When two closed layers turn out to be one, `merged` leads to it: (layer, int64 [width] new neuron numbers)."""

    width: int
    activation: Activation = IDENTITY
    pre: "Affine | None" = None
    rows: Tensor | None = None
    merged: "tuple[Hidden, Tensor] | None" = None

    def resolve(self) -> "tuple[Hidden, Tensor]":
        """The layer that this one is now part of, and where its neurons are there."""
        hidden, columns = self, torch.arange(self.width)
        while hidden.merged is not None:
            hidden, numbers = hidden.merged
            columns = numbers[columns]
        return hidden, columns


@dataclass(eq=False)
class Affine:
    """n pending rows gate(t) * (W h + bias) + shift(t) over h = parent (None: W = 0, functions of t alone). W is either
    `weight` [n, parent.width], or has at most one entry per row: scale[i] (None: 1) in column select[i] (-1: none)."""

    parent: Hidden | None
    bias: Constant
    select: Tensor | None = None
    scale: Constant | None = None
    weight: Constant | None = None
    gate: TimeValue | None = None
    shift: TimeValue | None = None
    name: str = ""

    @property
    def rows(self) -> int:
        return self.bias.value.shape[0]

    @property
    def selects(self) -> bool:
        """Nothing but elements of the parent."""
        return (
            self.select is not None and self.scale is None and self.gate is None and self.shift is None
            and bool((self.select >= 0).all()) and self.bias.is_zero
        )

    def value(self) -> Constant | TimeValue:
        """[n]: what rows without a parent are."""
        return self.bias if self.shift is None else self.shift if self.bias.is_zero else add(self.bias, self.shift)

    def take(self, index: Tensor) -> "Affine":
        return replace(
            self, bias=take(self.bias, index), select=None if self.select is None else self.select[index],
            scale=take(self.scale, index), weight=take(self.weight, index), gate=take(self.gate, index),
            shift=take(self.shift, index),
        )

    def scaled(self, factor: Constant | TimeValue) -> "Affine":
        """factor [n] times the rows."""
        if isinstance(factor, TimeValue):
            # What rows without input are belongs to the shift, outside the gate.
            if self.parent is None:
                zero = Constant(torch.zeros_like(self.bias.value))
                return replace(self, bias=zero, shift=mul(self.value(), factor))
            shift = None if self.shift is None else mul(self.shift, factor)
            return replace(self, gate=mul(self.gate, factor), shift=shift)
        changes: dict[str, Any] = {"bias": mul(self.bias, factor)}
        changes["shift"] = None if self.shift is None else mul(self.shift, factor)
        if self.weight is not None:
            changes["weight"] = mul(self.weight, apply(aten.unsqueeze.default, factor, 1))
        else:
            changes["scale"] = mul(self.scale, factor)
        return replace(self, **changes)

    def shifted(self, summand: Constant | TimeValue) -> "Affine":
        """The rows plus summand [n]."""
        if isinstance(summand, Constant):
            if self.gate is None:
                return replace(self, bias=add(self.bias, summand))
            if summand.is_zero:
                return self
            summand = as_time(summand)
        return replace(self, shift=add(self.shift, summand))


class RowTable:
    """All rows by number, in blocks."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._blocks: list[Affine] = []
        self._starts: list[int] = []
        self._count = 0
        self._closed: dict[tuple[Activation, bytes], Tensor] = {}
        self._multiples: dict[int, tuple[Tensor, Constant]] = {}  # first row of a block -> (rows, factor) it came from

    def zeros(self, *shape: int) -> Constant:
        return Constant(torch.zeros(shape, dtype=self.dtype, device=self.device))

    def ones(self, *shape: int) -> Constant:
        return Constant(torch.ones(shape, dtype=self.dtype, device=self.device))

    def add(self, affine: Affine) -> Tensor:
        """Registers the rows; returns their numbers, int64 [n]."""
        self._blocks.append(affine)
        self._starts.append(self._count)
        rows = torch.arange(self._count, self._count + affine.rows)
        self._count += affine.rows
        return rows

    def outputs(self, hidden: Hidden) -> Tensor:
        """New rows: the neurons of a closed layer."""
        return self.add(Affine(hidden, self.zeros(hidden.width), select=torch.arange(hidden.width)))

    def free(self, value: Constant | TimeValue) -> Affine:
        """Rows [n] without any input."""
        none = torch.full((value.shape[0],), -1)
        if isinstance(value, Constant):
            return Affine(None, value, select=none)
        return Affine(None, self.zeros(value.shape[0]), select=none, shift=value)

    def _block_of(self, rows: Tensor) -> Tensor:
        return torch.searchsorted(torch.tensor(self._starts), rows.contiguous(), right=True) - 1

    def gather(self, rows: Tensor) -> Affine:
        """The pending rows of the given numbers, over one common parent."""
        blocks = self._block_of(rows)
        pieces, order = [], []
        for block in blocks.unique().tolist():
            where = (blocks == block).nonzero()[:, 0]
            index = rows[where] - self._starts[block]
            affine = self._blocks[block]
            whole = torch.equal(index, torch.arange(affine.rows))
            pieces.append(affine if whole else affine.take(index))
            order.append(where)
        if len(pieces) == 1:
            return pieces[0]
        return self.join(pieces).take(torch.argsort(torch.cat(order)))

    # ------------------------------------------------------------------------------------------------- common parents

    def join(self, pieces: list[Affine]) -> Affine:
        parent = None
        for piece in pieces:
            if piece.parent is not None:
                other = piece.parent.resolve()[0]
                parent = other if parent is None else self._merge(parent.resolve()[0], other)
        if parent is not None:
            pieces = [self.onto(p, parent) for p in pieces]
        cat = lambda parts: apply(aten.cat.default, parts)
        result = Affine(parent, cat([p.bias for p in pieces]), name=next((p.name for p in pieces if p.name), ""))
        if all(p.select is not None for p in pieces):
            result.select = torch.cat([p.select for p in pieces])
            if any(p.scale is not None for p in pieces):
                result.scale = cat([p.scale or self.ones(p.rows) for p in pieces])
        else:
            result.weight = cat([self.dense(p) for p in pieces])
        if any(p.gate is not None for p in pieces):
            result.gate = cat([p.gate or self.ones(p.rows) for p in pieces])
        if any(p.shift is not None for p in pieces):
            result.shift = cat([p.shift or self.zeros(p.rows) for p in pieces])
        return result

    def _merge(self, a: Hidden, b: Hidden) -> Hidden:
        """One layer for the outputs of two."""
        if a is b:
            return a
        if a.pre is None or b.pre is None:
            refuse("combining the state with an output of a later layer (a residual or skip connection)")
        if a.activation != b.activation:
            refuse(
                f"combining outputs of different layers or activations ({a.activation.name}, {b.activation.name}; a "
                "residual or skip connection?)"
            )
        rows, number = torch.cat([a.rows, b.rows]).unique(return_inverse=True)
        merged = Hidden(rows.numel(), a.activation, self.gather(rows), rows)
        a.merged, b.merged = (merged, number[: a.width]), (merged, number[a.width:])
        return merged

    def onto(self, a: Affine, parent: Hidden) -> Affine:
        """The same rows over `parent`, into which a.parent was merged."""
        if a.parent is parent or a.parent is None:
            return replace(a, parent=parent)
        columns = a.parent.resolve()[1]
        if a.select is not None:
            return replace(a, parent=parent, select=torch.where(a.select >= 0, columns[a.select.clamp(min=0)], -1))
        return replace(a, parent=parent, weight=self.scatter_columns(a.weight, columns, parent.width))

    def scatter_columns(self, weight: Constant, columns: Tensor, width: int) -> Constant:
        """[n, k] -> [n, width], column j to columns[j] (-1: dropped); columns that meet are added."""
        keep = (columns >= 0).nonzero()[:, 0]
        target = columns[keep]
        if target.unique().numel() == target.numel():
            origin = torch.full((width,), weight.shape[1])
            origin[target] = keep
            padded = apply(aten.cat.default, [weight, self.zeros(weight.shape[0], 1)], 1)
            return apply(aten.index_select.default, padded, 1, Constant(origin.to(self.device)))
        table = torch.zeros(weight.shape[1], width, dtype=self.dtype, device=self.device)
        table[keep, target] = 1.0
        return apply(aten.mm.default, weight, Constant(table))

    def dense(self, a: Affine) -> Constant:
        """W [n, parent.width]."""
        if a.weight is not None:
            return a.weight
        scale = self.ones(a.rows) if a.scale is None else a.scale
        width = 0 if a.parent is None else a.parent.width
        table = torch.zeros(a.rows, width, dtype=self.dtype, device=self.device)
        keep = (a.select >= 0).nonzero()[:, 0]
        table[keep, a.select[keep]] = 1.0
        return mul(Constant(table), apply(aten.unsqueeze.default, scale, 1))

    # ------------------------------------------------------------------------------------------------------- new rows

    def sum_of(self, a: Affine, b: Affine) -> Affine:
        for x, y in ((a, b), (b, a)):
            if x.parent is None:
                return y.shifted(x.value())
        both, n = self.join([a, b]), a.rows
        if both.gate is not None and a.gate is not b.gate:
            # Two gates cannot be one: the gated rows become a layer of their own, and what is added are its neurons.
            closed = self.activate(self.add(both), IDENTITY)
            return self.sum_of(self.gather(closed[:n]), self.gather(closed[n:]))
        top, bottom = torch.arange(n), torch.arange(n, 2 * n)
        halves = lambda v: add(take(v, top), take(v, bottom))
        return Affine(
            both.parent, halves(both.bias), weight=halves(self.dense(both)), gate=a.gate, shift=halves(both.shift),
            name=both.name,
        )

    def multiple(self, rows: Tensor, factor: Constant | TimeValue) -> Tensor:
        """factor [n] times the rows."""
        product = self.add(self.gather(rows).scaled(factor))
        if isinstance(factor, Constant):
            self._multiples[int(product[0])] = (rows, factor)
        return product

    def activate(self, rows: Tensor, activation: Activation) -> Tensor:
        """Closes a layer over the pending rows; returns the rows of its output."""
        key = (activation, rows.numpy().tobytes())
        if key not in self._closed:
            self._closed[key] = self.outputs(Hidden(rows.numel(), activation, self.gather(rows), rows.clone()))
        return self._closed[key]

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """Row by row: squares, cubes, x * sigmoid(v x), or rows of which one is a function of t after all."""
        if torch.equal(x, y):
            return self.activate(x, Activation("square"))
        for a, b in ((x, y), (y, x)):
            factor = self.gather(b)
            if factor.parent is None:
                return self.multiple(a, factor.value())
            if not factor.selects or factor.parent.rows is None:
                continue
            inner, name = factor.parent.rows[factor.select], factor.parent.activation.name
            if torch.equal(inner, a) and name in ("sigmoid", "square"):
                return self.activate(a, Activation("silu" if name == "sigmoid" else "cube"))
            origin, v = self._multiples.get(int(inner[0]), (None, None))
            whole = torch.equal(inner, inner[0] + torch.arange(inner.numel()))
            if name == "sigmoid" and whole and origin is not None and torch.equal(origin, a) and bool(v.value.all()):
                # x * sigmoid(v x) = silu(v x) / v
                return self.multiple(self.activate(inner, Activation("silu")), apply(aten.reciprocal.default, v))
        refuse("the product of two states (other than x*x, x*x*x and x*sigmoid(x))")

    def contract(self, rows: Tensor, matrix: Constant, name: str) -> Tensor:
        """matrix [o, n] times pending rows [n]: o new rows."""
        a = self.gather(rows)
        if a.weight is not None or a.gate is not None:
            # A second matrix: multiplied out it would lose its sparsity (and rounding), so the first becomes a layer.
            # Rows that are functions of t by construction (a time column) need no neuron.
            index = torch.tensor([i for i, k in enumerate(self._block_of(rows).tolist()) if self._blocks[k].parent])
            rows = rows.clone()
            rows[index] = self.activate(rows[index], IDENTITY)
            a = self.gather(rows)
        times = lambda v: None if v is None else apply(aten.mv.default, matrix, v)
        new = Affine(a.parent, times(a.bias), shift=times(a.shift), name=name)
        if a.parent is None:
            new.select = torch.full((new.rows,), -1)
        else:
            weight = matrix if a.scale is None else mul(matrix, apply(aten.unsqueeze.default, a.scale, 0))
            new.weight = self.scatter_columns(weight, a.select, a.parent.width)
        return self.add(new)

    def group_sums(self, rows: Tensor, factor: float) -> Tensor:
        """factor times the sums of the rows [groups, terms] of each group."""
        a = self.gather(rows.reshape(-1))
        if a.gate is not None:
            a = self.gather(self.activate(rows.reshape(-1), IDENTITY))  # as in sum_of
        width = 0 if a.parent is None else a.parent.width
        if rows.numel() * width > 1 << 27:
            refuse(f"a sum over so many products ({rows.numel()} x {width})", "Use torch.nn.functional.linear")
        def total(v):
            if v is None:
                return None
            grouped = apply(aten.reshape.default, v, [*rows.shape, *v.shape[1:]])
            return apply(aten.mul.Tensor, apply(aten.sum.dim_IntList, grouped, [1]), factor)

        new = Affine(a.parent, total(a.bias), shift=total(a.shift), name=a.name)
        if a.parent is None:
            new.select = torch.full((new.rows,), -1)
        else:
            new.weight = total(self.dense(a))
        return self.add(new)
