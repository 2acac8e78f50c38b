"""Writes a vector field, and the divergence form its plan chose, as the short list of operations a native engine runs.

What the operations mean is said in csrc/field.h; everything that is a formula is decided here, so that native code knows
sparse rows and epilogues but no identities. The exact forms read the scaled slopes d_l (kept beside the values, in the
second slot of a row); Hutchinson carries one tangent there instead.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field as dataclass_field
from enum import IntEnum
from typing import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..activations import rule_and_params
from ..divergence import (
    Column,
    ColumnsForm,
    DiagonalForm,
    DivergencePlan,
    GatedMatrix,
    HutchinsonForm,
    NoHiddenForm,
    PairsForm,
    PathsForm,
)
from ..field import Layer, LinearShift, Pattern, SigmoidGate, TimeFunction, VectorField

ABSENT = (-1, 0)
STACKED_ROWS = 512  # live neurons of one layer that columns running together may have


class Store(IntEnum):
    """What an affine operation does with its slope (csrc/cpu/kernels.h)."""

    VALUE = 0
    VALUE_SLOPE = 1
    SEED = 2
    SEED_REDUCE = 3
    TANGENT = 4
    TANGENT_REDUCE = 5


@dataclass
class Externals:
    """Functions of time that run in Python: the engine asks for all of them at a step's stage times, once a step."""

    functions: list[Callable[[Tensor], Tensor]] = dataclass_field(default_factory=list)

    def add(self, function: Callable[[Tensor], Tensor]) -> int:
        self.functions.append(function)
        return len(self.functions) - 1

    def answer(self, times: list[float], dtype: torch.dtype) -> list[list[np.ndarray]]:
        with torch.no_grad():
            return [
                [numpy_array(function(torch.tensor(t, dtype=dtype))) for function in self.functions]
                for t in times
            ]


def numpy_array(tensor: Tensor) -> np.ndarray:
    """What a builder in C++ takes. One in Python may have a function `array` of its own, to keep tensors where they are."""
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        # `Tensor.numpy` fixes the size of the memory it lends for good; a parameter's is not ours to fix (FSDP frees it)
        return tensor.detach().clone().numpy()
    return tensor.detach().to("cpu").contiguous().numpy()


Values = Callable[[VectorField], Tensor]  # the values of a matrix, from the field it belongs to


class Writer:
    """The parts of a program, as a native builder takes them; what is computed from the field's tensors is remembered, so
    that a program can be given new numbers (`renew`)."""

    def __init__(self, builder, field: VectorField) -> None:
        self.builder = builder
        self.array = getattr(builder, "array", numpy_array)
        self.field = field
        self.externals = Externals()
        self.modulations: list[int] = []  # by layer, like the next
        self.weights: list[int] = []
        self.sources: list[tuple[int, Values]] = []

    def index(self, tensor: Tensor | None):
        return None if tensor is None else self.array(tensor.to(torch.int32))

    # ---- parts

    def matrix(self, pattern: Pattern, values: Values) -> int:
        numbers = self.array(values(self.field))
        number = self.builder.matrix(*pattern.shape, self.index(pattern.row_ptr), self.index(pattern.col), numbers)
        self.sources.append((number, values))
        return number

    def gated(self, matrix: GatedMatrix, gate: int | None) -> int:
        """A matrix of path sums; static without an output gate."""
        field, pattern = self.field, matrix.pattern
        if gate is None:
            return self.matrix(pattern, functools.partial(matrix.values, gate=None))
        parts = (*pattern.shape, self.index(pattern.row_ptr), self.index(pattern.col))
        if matrix.entry is None:  # too many paths to list: its values are recomputed in torch
            last = field.layers[-1]
            return self.builder.external_matrix(*parts, self.externals.add(lambda t: matrix.values(field, last.gate.at(t))))
        constants = self.array(matrix.path_constants(field))
        number = self.builder.gated_matrix(*parts, self.index(matrix.entry), self.index(matrix.gate), constants, gate)
        self.sources.append((number, matrix.path_constants))
        return number

    def modulation(self, layer: Layer) -> int:
        parts = self._modulation(layer)
        if isinstance(layer.gate, TimeFunction):
            parts["external_gate"] = self.externals.add(layer.gate.at)
        if isinstance(layer.shift, TimeFunction):
            parts["external_shift"] = self.externals.add(layer.shift.at)
        return self.builder.modulation(**parts)

    def add_layers(self) -> None:
        layers = self.field.layers
        self.weights = [
            self.matrix(layer.pattern, functools.partial(layer_values, number)) for number, layer in enumerate(layers)
        ]
        self.modulations = [self.modulation(layer) for layer in layers]

    def renew(self, program, field: VectorField) -> None:
        """Give a compiled program the numbers of another field of the same patterns."""
        for number, values in self.sources:
            program.set_values(number, self.array(values(field)))
        for number, layer in zip(self.modulations, field.layers):
            program.set_modulation(number, **self._modulation(layer))

    def _modulation(self, layer: Layer) -> dict:
        parts = {"bias": self.array(layer.bias)}
        if isinstance(layer.gate, SigmoidGate):
            parts |= {"gate_slope": self.array(layer.gate.slope), "gate_offset": self.array(layer.gate.offset)}
        if isinstance(layer.shift, LinearShift):
            parts |= {"shift_slope": self.array(layer.shift.slope), "shift_offset": self.array(layer.shift.offset)}
        return parts

    def affine(self, number: int, source, target, store=Store.VALUE, seed=ABSENT, weight=ABSENT) -> None:
        rule, params = rule_and_params(self.field.layers[number].activation)
        a, b = (*params, 1.0, 1.0)[:2]
        self.builder.affine(
            self.weights[number], source, target, self.modulations[number], rule.number, float(a), float(b), int(store),
            seed, weight,
        )


def layer_values(number: int, field: VectorField) -> Tensor:
    return field.layers[number].values


@dataclass(eq=False)
class StackedStep:
    """One hidden layer of several columns at once (`divergence.Column`), the live neurons of all of them stacked: a matrix
    from the stack before it. neuron: int64, which neuron every row is; None where a row is a neuron of the whole layer."""

    pattern: Pattern
    values: Values
    neuron: Tensor | None


def stack_columns(field: VectorField, columns: list[Column]) -> tuple[list[StackedStep], tuple[Tensor, ...] | None]:
    """The steps from the slopes d_1 through W_2 .. W_L, and with an output gate the columns' ends.

    A column's start W_1[:, m] is a constant, so it joins the weights of the second layer, which then reads the slopes d_1
    themselves. Its end W_{L+1}[m, :] joins the last product; but with an output gate g the end depends on time, and what
    is returned is, per row of the last stack, the entry of W_{L+1} and m.
    """
    layers = field.layers
    depth, gated = len(layers) - 1, layers[-1].gate is not None
    live_steps = [column.steps for column in columns]
    steps, place, ends = [], None, None  # place: [columns, neurons] -> row of the stack
    for number in range(1, depth):
        rows, cols, neurons, picks = [], [], [], []
        count, folded = 0, number == depth - 1 and not gated
        following = torch.full((len(columns), layers[number].out_features), -1)
        for c, column in enumerate(columns):
            pattern, index = live_steps[c][number - 1]
            cols.append(pattern.col if number == 1 else place[c, pattern.col])
            pick = [(number, index)]  # the weights whose product an entry is
            if number == 1:
                start = torch.zeros(layers[0].out_features, dtype=torch.int64)
                start[column.start_row] = column.start_index
                pick.append((0, start[pattern.col]))
            if folded:
                rows.append(pattern.row)
                end = torch.zeros(layers[-1].in_features, dtype=torch.int64)
                end[column.end_col] = column.end_index
                pick.append((depth, end[pattern.row]))
            else:
                live = column.live[number].nonzero().squeeze(1)
                following[c, live] = count + torch.arange(live.numel())
                count += live.numel()
                neurons.append(live)
                rows.append(following[c, pattern.row])
            picks.append(pick)
        width = layers[0].out_features if number == 1 else int(place.max()) + 1
        height = layers[number].out_features if folded else count
        pattern, order = Pattern.from_coo((height, width), torch.cat(rows), torch.cat(cols))
        factors = tuple(
            (of_column[0][0], torch.cat([index for _, index in of_column])[order].to(torch.int32))
            for of_column in zip(*picks)
        )
        steps.append(StackedStep(pattern, functools.partial(_products, factors), torch.cat(neurons) if neurons else None))
        place = following
    if gated:
        row, index, m = [], [], []
        for c, column in enumerate(columns):
            row.append(place[c, column.end_col])
            index.append(column.end_index)
            m.append(torch.full_like(column.end_index, column.m))
        order = torch.argsort(torch.cat(row))
        ends = torch.cat(index)[order], torch.cat(m)[order]
    return steps, ends


def _products(factors: tuple[tuple[int, Tensor], ...], field: VectorField) -> Tensor:
    """Products of weights, one of every layer named: (layer number, int [nnz] indices into its values) pairs."""
    terms = [values[index.to(values.device)] for values, index in ((field.layers[n].values, index) for n, index in factors)]
    return functools.reduce(torch.mul, terms)


def column_start(field: VectorField, column: Column) -> tuple[Pattern, Values]:
    """W_1[:, m] as a diagonal matrix [n_1, n_1], which makes the first tangent out of the slopes d_1."""
    n = field.layers[0].out_features
    return _diagonal(n, column.start_row), functools.partial(_products, ((0, column.start_index.to(torch.int32)),))


def column_end(field: VectorField, column: Column, diagonal: bool = False) -> GatedMatrix:
    """W_{L+1}[m, :], times the output gate g_m, as a row [1, n_L] or as a diagonal matrix [n_L, n_L]."""
    n, count = field.layers[-1].in_features, column.end_col.numel()
    pattern = _diagonal(n, column.end_col) if diagonal else Pattern((1, n), torch.tensor([0, count]), column.end_col)
    gate = torch.full((count,), column.m, dtype=torch.int64)
    return GatedMatrix(pattern, torch.arange(count), gate, ((len(field.layers) - 1, column.end_index),))


def _diagonal(n: int, places: Tensor) -> Pattern:
    """[n, n] with entries at some places (ascending) of its diagonal."""
    row_ptr = torch.zeros(n + 1, dtype=torch.int64)
    row_ptr[places + 1] = 1
    return Pattern((n, n), torch.cumsum(row_ptr, 0), places)


class _Forward(Writer):
    def write(self, plan: DivergencePlan | None) -> None:
        field, builder = self.field, self.builder
        layers = field.layers
        hidden = len(layers) - 1
        self.add_layers()
        form = None if plan is None else plan.form
        hutchinson = isinstance(form, HutchinsonForm)
        slots = 1 if form is None or isinstance(form, NoHiddenForm) else 2

        x = builder.buffer(field.dim)
        h = [builder.buffer(layer.out_features, slots) for layer in layers[:-1]]
        carries = hutchinson and form.output_gate and hidden > 0
        f = builder.buffer(field.dim, 2 if carries else 1)
        noise = builder.buffer(field.dim) if hutchinson else -1
        ones = builder.buffer(1) if isinstance(form, NoHiddenForm) else -1
        chain = [x, *h, f]

        if hutchinson:
            self._hutchinson(form, chain, noise)
        else:
            for number in range(hidden):
                self.affine(number, (chain[number], 0), (chain[number + 1], 0), Store.VALUE_SLOPE if slots == 2 else Store.VALUE)
            self.affine(hidden, (chain[hidden], 0), (f, 0))
            if form is not None:
                self._exact(form, h, ones)
        builder.roles(field.dim, form is not None, x, f, noise, ones, len(self.externals.functions))

    def _hutchinson(self, form: HutchinsonForm, chain: list[int], noise: int) -> None:
        """u = W_1 e and, without an output gate, r = W_out' e stay the same for a whole solve: they are made once per
        tile and step, which bounds memory by the tile. Then one tangent runs beside the values."""
        builder, layers = self.builder, self.field.layers
        hidden, f = len(layers) - 1, chain[-1]
        first, last = layers[0], layers[-1]
        u = builder.buffer(first.out_features)
        builder.product(self.weights[0], (noise, 0), (u, 0), prologue=True)
        if hidden == 0:
            # e' G W e: the "hidden layer" is the output itself, its slope the gate
            self.affine(0, (chain[0], 0), (f, 0), Store.SEED_REDUCE, seed=(u, 0), weight=(noise, 0))
            return
        weight = ABSENT
        if not form.output_gate:
            r = builder.buffer(last.in_features)
            builder.product(self.weights[-1], (noise, 0), (r, 0), prologue=True, transposed=True)
            weight = (r, 0)
        for number in range(hidden):
            reduce = weight != ABSENT and number == hidden - 1
            if number == 0:
                store = Store.SEED_REDUCE if reduce else Store.SEED
                self.affine(0, (chain[0], 0), (chain[1], 0), store, seed=(u, 0), weight=weight if reduce else ABSENT)
            else:
                store = Store.TANGENT_REDUCE if reduce else Store.TANGENT
                self.affine(number, (chain[number], 0), (chain[number + 1], 0), store, weight=weight if reduce else ABSENT)
        if form.output_gate:
            self.affine(hidden, (chain[hidden], 0), (f, 0), Store.TANGENT_REDUCE, weight=(noise, 0))
        else:
            self.affine(hidden, (chain[hidden], 0), (f, 0))

    def _exact(self, form, h: list[int], ones: int) -> None:
        builder, layers = self.builder, self.field.layers
        gate = self.modulations[-1] if layers[-1].gate is not None else None
        if isinstance(form, NoHiddenForm):
            builder.reduction(self.gated(form.trace, gate), (ones, 0))
        elif isinstance(form, DiagonalForm):
            builder.reduction(self.gated(form.row, gate), (h[0], 1), target=(builder.buffer(1), 0))
        elif isinstance(form, PairsForm):
            sums = builder.buffer(layers[1].out_features)
            builder.reduction(self.gated(form.matrix, gate), (h[0], 1), factor=(h[1], 1), target=(sums, 0))
        elif isinstance(form, PathsForm):
            builder.reduction(
                self.matrix(form.products, form.path_products), (h[1], 1), factor=(h[2], 1), factor2=(h[0], 1),
                factor_row=self.index(form.i), factor2_row=self.index(form.k),
                coefficient_matrix=self.gated(form.coefficient, gate),
            )
        elif isinstance(form, ColumnsForm) and form.whole:
            self._whole_columns(form.columns, h, gate)
        elif isinstance(form, ColumnsForm):
            for group in column_groups(form.columns):
                self._columns(group, h, gate)
        else:
            raise TypeError(f"no native program for {type(form).__name__}")

    def _columns(self, columns: list[Column], h: list[int], gate: int | None) -> None:
        """Columns together; what the last product gives is summed up without being stored."""
        builder, field = self.builder, self.field
        steps, ends = stack_columns(field, columns)
        source = (h[0], 1)
        for number, step in enumerate(steps, start=1):
            matrix = self.matrix(step.pattern, step.values)
            slopes, neuron = (h[number], 1), self.index(step.neuron)
            if number < len(steps):
                target = builder.buffer(step.pattern.shape[0])
                builder.product(matrix, source, (target, 0), factor=slopes, factor_row=neuron)
                source = (target, 0)
            elif ends is None:
                builder.reduction(matrix, source, factor=slopes)
            else:
                index, m = ends
                full = Pattern.from_mask(torch.ones(1, index.numel(), dtype=torch.bool))
                end = GatedMatrix(full, torch.arange(index.numel()), m, ((len(field.layers) - 1, index),))
                builder.reduction(
                    matrix, source, factor=slopes, factor_row=neuron, coefficient_matrix=self.gated(end, gate)
                )


    def _whole_columns(self, columns: tuple[Column, ...], h: list[int], gate: int | None) -> None:
        """Columns one after the other through the layers' own matrices. The operations that do not name the column repeat
        each other word for word, so that an engine holds them once."""
        tangents = [self.builder.buffer(n) for n in self.field.hidden]
        for column in columns:
            start = self.matrix(*column_start(self.field, column))
            self.builder.product(start, (h[0], 1), (tangents[0], 0))
            for number in range(1, len(h)):
                source, target = (tangents[number - 1], 0), (tangents[number], 0)
                self.builder.product(self.weights[number], source, target, factor=(h[number], 1))
            self.builder.reduction(self.gated(column_end(self.field, column), gate), (tangents[-1], 0))


def column_groups(columns: tuple[Column, ...]) -> Iterator[list[Column]]:
    """Columns that run together: as many as keep the stacked buffers of live neurons within the size of a cache."""
    group: list[Column] = []
    rows = 0
    for column in columns:
        size = max(int(live.sum()) for live in column.live)
        if group and rows + size > STACKED_ROWS:
            yield group
            group, rows = [], 0
        group.append(column)
        rows += size
    if group:
        yield group


def write_program(builder, field: VectorField, plan: DivergencePlan | None) -> Writer:
    """Fill a native builder (`_cpu.BuilderF32` or `F64`). The writer's `externals` are the functions of time that the
    engine must ask for; its `renew` gives the compiled program new numbers."""
    writer = _Forward(builder, field)
    with torch.no_grad():
        writer.write(plan)
    return writer
