"""The vector field as plain data: a chain of sparse affine layers with a time modulation and an activation.

    z_l = s_l(t) * (W_l h_{l-1} + b_l) + c_l(t)          h_l = act_l(z_l)          h_0 = y, f(t, y) = h_last

The last layer's activation is always the identity: capture appends an identity layer where a module ends in an
activation, and prepends one where a module applies an activation to the state itself (`y**3` before the first layer).

This file imports nothing else of the library.
"""

from __future__ import annotations

from dataclasses import dataclass, field as dataclass_field
from functools import cached_property
from typing import Callable, Iterator

import torch
from torch import Tensor


from ..records import changed

MOST_AXES = 4  # states with more axes are treated as those with so many


class UnsupportedFieldError(ValueError):
    """A module, or a field, cannot be expressed or run; the message names the place, the operation and the remedy."""


# --------------------------------------------------------------------------------------------------- sparse weights


@dataclass(frozen=True, eq=False)
class Pattern:
    """Where the weights of one layer are: an immutable CSR pattern on the CPU, without duplicates, columns ascending.

    shape: (out, in).  row_ptr: int64 [out + 1].  col: int64 [nnz].
    """

    shape: tuple[int, int]
    row_ptr: Tensor
    col: Tensor

    def __post_init__(self) -> None:
        out, in_ = self.shape
        row_ptr, col = self.row_ptr, self.col
        if row_ptr.dtype != torch.int64 or col.dtype != torch.int64:
            raise TypeError(f"Pattern: row_ptr and col must be int64, not {row_ptr.dtype} and {col.dtype}")
        if row_ptr.shape != (out + 1,) or int(row_ptr[0]) != 0 or int(row_ptr[-1]) != col.numel():
            raise ValueError(f"Pattern: row_ptr must have {out + 1} entries from 0 to {col.numel()}")
        if bool((row_ptr[1:] < row_ptr[:-1]).any()):
            raise ValueError("Pattern: row_ptr must not decrease")
        if col.numel() and (int(col.min()) < 0 or int(col.max()) >= in_):
            raise ValueError(f"Pattern: columns must lie in [0, {in_}), found {int(col.min())} to {int(col.max())}")
        if col.numel() > 1:
            same_row = self.row[1:] == self.row[:-1]
            if bool((same_row & (col[1:] <= col[:-1])).any()):
                raise ValueError("Pattern: columns must ascend strictly within each row")

    def __repr__(self) -> str:
        return f"<Pattern {self.shape[0]} x {self.shape[1]}, {self.nnz} entries>"

    @staticmethod
    def from_mask(mask: Tensor) -> "Pattern":
        """Pattern of the True entries of a bool [out, in]."""
        mask = mask.detach().cpu()
        row_ptr = torch.zeros(mask.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(mask.sum(1), 0, out=row_ptr[1:])
        return Pattern((mask.shape[0], mask.shape[1]), row_ptr, mask.nonzero()[:, 1].contiguous())

    @staticmethod
    def from_coo(shape: tuple[int, int], row: Tensor, col: Tensor) -> tuple["Pattern", Tensor]:
        """Pattern of unsorted, unique (row, col) pairs, and the permutation that sorts the pairs into CSR order."""
        order = torch.argsort(row * max(shape[1], 1) + col)
        row_ptr = torch.zeros(shape[0] + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(row, minlength=shape[0]), 0, out=row_ptr[1:])
        return Pattern(tuple(shape), row_ptr, col[order]), order

    def of_entries(self, own: Tensor, col: Tensor, width: int) -> "Pattern":
        """The pattern [out, width] of some of the entries (int64, ascending), in these columns."""
        row_ptr = torch.zeros_like(self.row_ptr)
        torch.cumsum(torch.bincount(self.row[own], minlength=self.shape[0]), 0, out=row_ptr[1:])
        return Pattern((self.shape[0], width), row_ptr, col)

    @property
    def nnz(self) -> int:
        return self.col.numel()

    @property
    def density(self) -> float:
        return self.nnz / max(1, self.shape[0] * self.shape[1])

    @cached_property
    def row(self) -> Tensor:
        """int64 [nnz]: the row of every entry."""
        return torch.repeat_interleave(torch.arange(self.shape[0]), self.row_ptr[1:] - self.row_ptr[:-1])

    @cached_property
    def transpose(self) -> tuple["Pattern", Tensor]:
        """The pattern of W^T and the permutation with `values_t = values[permutation]`."""
        return Pattern.from_coo((self.shape[1], self.shape[0]), self.col, self.row)

    @cached_property
    def _places(self) -> dict[torch.device, Tensor]:
        """By device, where the entries are in the flattened matrix: a copy at every use would make a host wait."""
        return {}

    def dense(self, values: Tensor) -> Tensor:
        """values [nnz] -> [out, in], zeros elsewhere; differentiable in values."""
        flat = self.row * self.shape[1] + self.col
        if values.device != flat.device:
            flat = self._places.get(values.device, flat).to(values.device)
            if not torch.compiler.is_compiling():  # what is copied there has no values
                self._places[values.device] = flat
        zero = torch.zeros(self.shape[0] * self.shape[1], dtype=values.dtype, device=values.device)
        return zero.index_put((flat,), values).view(self.shape)


# ------------------------------------------------------------------------------------------------------- activation


@dataclass(frozen=True)
class Activation:
    """An elementwise activation by name, with its parameters: softplus (beta, threshold), elu (alpha,), else ()."""

    name: str = "identity"
    params: tuple[float, ...] = ()


IDENTITY = Activation()


# -------------------------------------------------------------------------------------------------- time modulation
# Each kind answers `at(t) -> [out]` for a 0-d t, and lists its tensors, so that engines and optimizers see them.


@dataclass(eq=False)
class SigmoidGate:
    """s(t) = sigmoid(slope * t + offset), slope and offset [out]."""

    slope: Tensor
    offset: Tensor

    def at(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.slope * t + self.offset)


@dataclass(eq=False)
class LinearShift:
    """c(t) = slope * t + offset, slope and offset [out]."""

    slope: Tensor
    offset: Tensor

    def at(self, t: Tensor) -> Tensor:
        return self.slope * t + self.offset


@dataclass(eq=False)
class TimeFunction:
    """Any other function of t alone, `function(t) -> [out]` for a 0-d t, in the field's dtype and device.

    `rows` keeps a subset of the function's outputs (int64 [out]) after simplification, None keeps all.
    """

    function: Callable[[Tensor], Tensor]
    rows: Tensor | None = None

    def at(self, t: Tensor) -> Tensor:
        value, rows = self.function(t), self.rows
        if rows is not None and rows.device != value.device:
            rows = rows.to(value.device)
            if not torch.compiler.is_compiling():  # what is copied there has no values
                self.rows = rows  # a copy at every evaluation would make the host wait for a GPU
        return value if rows is None else value[rows]


Gate = SigmoidGate | TimeFunction | None
Shift = LinearShift | TimeFunction | None


# ------------------------------------------------------------------------------------------------------ layer, field


@dataclass(eq=False)
class Layer:
    """One layer of the chain (module docstring). `name` is the module path it was read from, for reports and errors."""

    pattern: Pattern
    values: Tensor  # [nnz], in the pattern's order
    bias: Tensor  # [out]
    gate: Gate = None  # None: s = 1
    shift: Shift = None  # None: c = 0
    activation: Activation = IDENTITY
    name: str = ""

    def __post_init__(self) -> None:
        out = self.pattern.shape[0]
        if self.values.shape != (self.pattern.nnz,):
            raise ValueError(f"layer {self.name!r}: values must be [{self.pattern.nnz}], not {list(self.values.shape)}")
        if self.bias.shape != (out,):
            raise ValueError(f"layer {self.name!r}: bias must be [{out}], not {list(self.bias.shape)}")

    @property
    def in_features(self) -> int:
        return self.pattern.shape[1]

    @property
    def out_features(self) -> int:
        return self.pattern.shape[0]

    @property
    def weight(self) -> Tensor:
        """Dense [out, in], differentiable in values."""
        return self.pattern.dense(self.values)

    def modulation(self, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(s, c) at a 0-d t, each [out] or None."""
        return (None if self.gate is None else self.gate.at(t)), (None if self.shift is None else self.shift.at(t))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything numeric in the layer: values, bias, gate.slope, gate.offset, shift.slope, ..."""
        yield "values", self.values
        yield "bias", self.bias
        for kind in ("gate", "shift"):
            part = getattr(self, kind)
            if isinstance(part, (SigmoidGate, LinearShift)):
                yield f"{kind}.slope", part.slope
                yield f"{kind}.offset", part.offset


@dataclass(eq=False)
class VectorField:
    """f(t, y) as a chain of layers; y is [..., dim].

    notes: what capture and simplify did, line by line.  refused_axes: numbers of axes of y for which the module that was
    read does something else than this field, with the reason.  Raises ValueError where the layers make no vector field.
    """

    layers: list[Layer]
    notes: list[str] = dataclass_field(default_factory=list)
    refused_axes: dict[int, str] = dataclass_field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("VectorField: at least one layer is needed")
        for before, after in zip(self.layers, self.layers[1:]):
            if before.out_features != after.in_features:
                raise ValueError(
                    f"VectorField: layer {before.name!r} has {before.out_features} outputs, "
                    f"{after.name!r} reads {after.in_features}"
                )
        if self.layers[-1].activation != IDENTITY:
            raise ValueError("VectorField: the last layer's activation must be the identity (append an identity layer)")
        if self.layers[-1].out_features != self.layers[0].in_features:
            raise ValueError(
                f"VectorField: the state has {self.layers[0].in_features} components, "
                f"its derivative {self.layers[-1].out_features}; a vector field needs as many"
            )

    @property
    def dim(self) -> int:
        return self.layers[0].in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].values.dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0].values.device

    @property
    def hidden(self) -> list[int]:
        return [layer.out_features for layer in self.layers[:-1]]

    @property
    def nnz(self) -> int:
        """Weights (multiply-adds per sample and evaluation)."""
        return sum(layer.pattern.nnz for layer in self.layers)

    def refused(self, axes: int) -> str | None:
        """Why this field does not run states with so many axes; None: it does."""
        return self.refused_axes.get(min(axes, MOST_AXES)) if self.refused_axes else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for index, layer in enumerate(self.layers):
            for name, tensor in layer.tensors():
                yield f"{index}.{name}", tensor

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "VectorField":
        """The same field with `function` applied to every tensor (dtype or device moves, detaching, wrapping)."""

        def part(value):
            if isinstance(value, (SigmoidGate, LinearShift)):
                return type(value)(function(value.slope), function(value.offset))
            return value

        layers = [
            changed(layer, values=function(layer.values), bias=function(layer.bias),
                    gate=part(layer.gate), shift=part(layer.shift))
            for layer in self.layers
        ]
        return changed(self, layers=layers, notes=list(self.notes), refused_axes=dict(self.refused_axes))
