"""Writes the adjoint of a vector field, and of its divergence, as a native program (csrc/field.h): the layers once
more, keeping slopes and curvatures; then the chain backwards. From the cotangents v of f and lam of the trace it makes
those of the state, of every matrix's values and of every modulation. For the exact forms the trace's cotangents of the slopes d_l
are made first and join the chain at each layer; Hutchinson's tangent has a chain of its own beside it.

Matrices that are products of weights (the forms' path sums) get a gradient of their own, and autograd carries it on to
the weights, once for a whole solve.
"""

from __future__ import annotations

import functools

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
    columns_form,
)
from ..field import Pattern, SigmoidGate, TimeFunction, VectorField
from .program import ABSENT, Store, Values, Writer, column_end, column_groups, column_start, layer_values, stack_columns

# Activations whose slopes follow from their value (csrc/cpu/kernels.h, SlopeFrom).
SLOPE_FROM = {"identity": 1, "tanh": 2, "sigmoid": 3}


def no_adjoint(field: VectorField, plan: DivergencePlan | None) -> str | None:
    """Why there is no native adjoint program for this field; None if there is one."""
    for layer in field.layers:
        if isinstance(layer.gate, TimeFunction) or isinstance(layer.shift, TimeFunction):
            return f"layer {layer.name!r} has a function of time that is neither a sigmoid gate nor linear"
    return None


class AdjointWriter(Writer):
    """An adjoint program, and where its gradients belong: matrix `weights[l]` and modulation `modulations[l]` are layer
    l's; `derived_from` lists matrices computed from the weights: (matrix, function of the field whose value its gradient
    is of)."""

    def __init__(self, builder, field: VectorField) -> None:
        super().__init__(builder, field)
        self.derived_from: list[tuple[int, Values]] = []

    def write(self, plan: DivergencePlan | None) -> None:
        field, builder = self.field, self.builder
        layers, self.form = field.layers, None if plan is None else plan.form
        hidden = len(layers) - 1
        self.add_layers()
        self.columns_of_ones: dict[int, int] = {}
        tangent = isinstance(self.form, HutchinsonForm)
        curvature = self.form is not None and not isinstance(self.form, NoHiddenForm)
        gated = [isinstance(layer.gate, SigmoidGate) for layer in layers]
        values = 2 if tangent else 1  # slots of a value, with its tangent

        x = builder.buffer(field.dim, values)
        chain = [x, *(builder.buffer(layer.out_features, values) for layer in layers)]
        f = chain[-1]
        # the forms read the slopes d_l themselves; else tanh's and sigmoid's need not be kept
        exact = curvature and not tangent
        slope_from = [0 if exact else SLOPE_FROM.get(layer.activation.name, 0) for layer in layers]
        kept = []
        for number, layer in enumerate(layers):
            slots = (0 if slope_from[number] else 1 + curvature) + gated[number]
            wanted = slots > 0 and (number < hidden or gated[number])
            kept.append(builder.buffer(layer.out_features, slots) if wanted else -1)
        self.ones = builder.buffer(1)
        self.lam = builder.buffer(1) if self.form is not None else -1
        v, state = builder.buffer(field.dim, values), builder.buffer(field.dim)
        widest = max(layer.out_features for layer in layers)
        turns = [builder.buffer(widest, values + any(gated)) for _ in range(2)]  # cotangents, layer by layer

        for number in range(hidden + 1):
            self.affine(number, (chain[number], 0), (chain[number + 1], 0), Store.VALUE)
        for number in range(hidden + 1):
            if number < hidden or gated[number]:
                rule, params = rule_and_params(layers[number].activation)
                a, b = (*params, 1.0, 1.0)[:2]
                builder.keep(
                    self.weights[number], (chain[number], 0), (chain[number + 1], 0), kept[number],
                    self.modulations[number], rule.number, float(a), float(b), tangent, curvature, gated[number],
                    slope_from[number],
                )  # fmt: skip

        slopes = [(k, 0) for k in kept[:hidden]]
        if tangent:
            self.product(self.identity(field.dim), (x, 1), (v, 1), factor=(self.lam, 0), factor_row=field.dim)
            of_slopes = [ABSENT] * hidden
        else:
            of_slopes = self._slopes(slopes)

        here = (v, 0)  # the cotangent of layer number + 1's r = W h
        for number in reversed(range(hidden + 1)):
            layer = layers[number]
            if number == hidden and gated[number]:
                target = turns[number % 2]
                builder.pull(
                    self.empty(field.dim), (x, 0), (target, 0), kept[number], (f, 0), self.modulations[number],
                    addend=(v, 0), carries=tangent, curvature=curvature, raw=True, slope_from=slope_from[number],
                )  # fmt: skip
                here = (target, 0)
            total = builder.sum(layer.pattern.nnz, False)
            builder.sum_of_matrix(self.weights[number], total)
            builder.gradient(self.weights[number], here, (chain[number], 0), total, carries=tangent)
            self._modulation_sums(number, here, values, gated[number])
            if number == 0:
                self.product(self.weights[0], here, (state, 0), transposed=True)
                break
            before = number - 1
            target = turns[before % 2]
            builder.pull(
                self.weights[number], here, (target, 0), kept[before], (chain[number], 0), self.modulations[before],
                slope_cotangent=of_slopes[before], carries=tangent, curvature=curvature, raw=gated[before],
                slope_from=slope_from[before],
            )  # fmt: skip
            here = (target, 0)

        builder.roles(field.dim, self.form is not None, x, f, x if tangent else -1, self.ones, 0)
        builder.adjoint_roles(v, self.lam, state)

    # ---- small parts

    def product(self, matrix: int, source, target, *, factor=ABSENT, factor_row=None, **more) -> None:
        """A product of the reverse list; factor_row: as the builder's, or a number of rows that all take row 0."""
        if isinstance(factor_row, int):
            factor_row = torch.zeros(factor_row, dtype=torch.int64)
        rows = {name: self.index(index)
                for name, index in (("factor_row", factor_row), ("factor2_row", more.pop("factor2_row", None)))}
        self.builder.product(matrix, source, target, factor=factor, **rows, **more, list="reverse")

    def constant(self, pattern: Pattern, value: float) -> int:
        number = self.matrix(pattern, lambda field: torch.full((pattern.nnz,), value, dtype=field.dtype))
        self.sources.pop()  # nothing of it will change
        return number

    def identity(self, n: int) -> int:
        return self.constant(Pattern((n, n), torch.arange(n + 1), torch.arange(n)), 1.0)

    def selection(self, neuron: Tensor, n: int) -> int:
        """[rows, n]: row r picks neuron[r]."""
        return self.constant(Pattern((neuron.numel(), n), torch.arange(neuron.numel() + 1), neuron), 1.0)

    def empty(self, n: int) -> int:
        return self.constant(Pattern((n, n), torch.zeros(n + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)), 0.0)

    def _modulation_sums(self, number: int, here, values: int, gated: bool) -> None:
        layer, builder = self.field.layers[number], self.builder
        n = layer.out_features
        if n not in self.columns_of_ones:
            column = Pattern((n, 1), torch.arange(n + 1), torch.zeros(n, dtype=torch.int64))
            self.columns_of_ones[n] = self.constant(column, 1.0)
        ones = self.columns_of_ones[n]
        dynamic = layer.gate is not None or layer.shift is not None
        shift, gate = builder.sum(n, dynamic), -1
        builder.gradient(ones, here, (self.ones, 0), shift)
        if gated:
            gate = builder.sum(n, True)
            builder.gradient(ones, (here[0], values), (self.ones, 0), gate)
        builder.sums_of_modulation(self.modulations[number], shift, gate)

    def derived(self, matrix: int, size: int, each_stage: bool, left, right, values) -> None:
        """The gradient of a matrix made of weights: left (by its rows) times right (by its columns)."""
        total = self.builder.sum(size, each_stage)
        self.builder.sum_of_matrix(matrix, total)
        self.builder.gradient(matrix, left, right, total)
        self.derived_from.append((matrix, values))

    def path_sums(self, matrix: GatedMatrix, left, right) -> int:
        """A matrix of path sums, with its gradient: that of the path constants where an output gate weighs them."""
        last = self.field.layers[-1]
        gate = self.modulations[-1] if last.gate is not None else None
        number = self.gated(matrix, gate)
        values = functools.partial(matrix.values, gate=None) if gate is None else matrix.path_constants
        self.derived(number, matrix.pattern.nnz, gate is not None, left, right, values)
        return number

    # ---- the exact forms: cotangents of the slopes

    def _slopes(self, slopes: list) -> list:
        """The cotangents of the hidden layers' slopes d_l, one operand each (or none)."""
        form, builder, layers, lam = self.form, self.builder, self.field.layers, (self.lam, 0)
        found = [ABSENT] * len(slopes)
        if form is None:
            return found
        if isinstance(form, NoHiddenForm):
            self.path_sums(form.trace, lam, (self.ones, 0))
        elif isinstance(form, DiagonalForm):
            found[0] = (builder.buffer(layers[0].out_features), 0)
            row = self.path_sums(form.row, lam, slopes[0])
            self.product(row, lam, found[0], transposed=True)
        elif isinstance(form, PairsForm) and not (form.matrix.direct is not None and layers[-1].gate is not None):
            n1, n2 = layers[0].out_features, layers[1].out_features
            weighted = (builder.buffer(n2), 0)  # lam d_2
            found = [(builder.buffer(n1), 0), (builder.buffer(n2), 0)]
            self.product(self.identity(n2), slopes[1], weighted, factor=lam, factor_row=n2)
            matrix = self.path_sums(form.matrix, weighted, slopes[0])
            self.product(matrix, slopes[0], found[1], factor=lam, factor_row=n2)
            self.product(matrix, weighted, found[0], transposed=True)
        elif isinstance(form, (ColumnsForm, PathsForm, PairsForm)):  # pairs whose gated paths are too many to list
            columns = form if isinstance(form, ColumnsForm) else columns_form(self.field)
            found = [(builder.buffer(layer.out_features), 0) for layer in layers[:-1]]
            if columns.whole:
                self._whole_columns(columns.columns, slopes, found)
            else:
                for number, group in enumerate(column_groups(columns.columns)):
                    self._columns(group, slopes, found, number == 0)
            if not columns.columns:
                found = [ABSENT] * len(slopes)
        else:
            raise TypeError(f"no adjoint program for {type(form).__name__}")
        return found

    def _columns(self, columns: list[Column], slopes: list, found: list, first: bool) -> None:
        """p_1 = d_1; q_k = A_k p_(k-1), p_k = d_k q_k; trace = sum of (S d_last) q_last with S the ends; and backwards."""
        builder, field, lam = self.builder, self.field, (self.lam, 0)
        steps, ends = stack_columns(field, columns)

        def add_to(layer: int, matrix: int, source) -> None:
            self.product(matrix, source, found[layer], transposed=True, addend=ABSENT if first else found[layer])

        matrices, stacks = [], [slopes[0]]  # stacks: p_k in slot 0, q_k in slot 1
        for k, step in enumerate(steps, start=1):
            matrices.append(self.matrix(step.pattern, step.values))
            if k < len(steps):
                stack = builder.buffer(step.pattern.shape[0], 2)
                self.product(matrices[-1], stacks[-1], (stack, 0), factor=slopes[k], factor_row=step.neuron, second=True)
                stacks.append((stack, 0))

        last, depth = steps[-1], len(steps)
        height = last.pattern.shape[0]
        weighted, turned = (builder.buffer(height), 0), (builder.buffer(height), 0)  # lam q_last, and its cotangent
        self.product(matrices[-1], stacks[-1], weighted, factor=lam, factor_row=height)
        if ends is None:
            select = self.identity(height)
        else:
            index, m = ends
            one_each = Pattern((height, field.layers[-1].in_features), torch.arange(height + 1), last.neuron)
            end = GatedMatrix(one_each, torch.arange(height), m, ((len(field.layers) - 1, index),))
            select = self.path_sums(end, weighted, slopes[depth])
        self.product(select, slopes[depth], turned, factor=lam, factor_row=height)
        add_to(depth, select, weighted)
        for k in range(depth, 0, -1):
            step = steps[k - 1]
            self.derived(matrices[k - 1], step.pattern.nnz, False, turned, stacks[k - 1], step.values)
            if k == 1:
                add_to(0, matrices[0], turned)
                break
            before = steps[k - 2]
            pulled = builder.buffer(before.pattern.shape[0], 2)  # the cotangent of q_(k-1), and what d_(k-1) gets
            self.product(
                matrices[k - 1], turned, (pulled, 0), transposed=True, factor=slopes[k - 1], factor_row=before.neuron,
                second=True, factor2=(stacks[k - 1][0], 1),
            )  # fmt: skip
            add_to(k - 1, self.selection(before.neuron, field.layers[k - 1].out_features), (pulled, 1))
            turned = (pulled, 0)


    def _whole_columns(self, columns: tuple[Column, ...], slopes: list, found: list) -> None:
        """As `_columns`, one after the other through the layers' own matrices: the same few buffers serve every column, and
        what does not name the column is said in the same words each time, so that an engine holds it once."""
        builder, layers, lam = self.builder, self.field.layers, (self.lam, 0)
        hidden, widths = len(slopes), self.field.hidden
        matrices, sums = [-1], [-1]  # copies of W_2 .. W_L with sums of their own: theirs are not those of the values' chain
        for number in range(1, hidden):
            pattern, values = layers[number].pattern, functools.partial(layer_values, number)
            matrices.append(self.matrix(pattern, values))
            sums.append(builder.sum(pattern.nnz, False))
            builder.sum_of_matrix(matrices[number], sums[number])
            self.derived_from.append((matrices[number], values))
        slots = [2 if 0 < number < hidden - 1 else 1 for number in range(hidden)]
        stacks = [(builder.buffer(*size), 0) for size in zip(widths, slots)]  # p_l and q_l; of the last layer lam q_L alone
        turned = [(builder.buffer(*size), 0) for size in zip(widths, slots)]  # the cotangent of q_l, and what d_l gets
        ones = [self.identity(n) for n in widths[1:-1]]
        for place, column in enumerate(columns):

            def add_to(layer: int, matrix: int, source) -> None:
                addend = ABSENT if place == 0 else found[layer]
                self.product(matrix, source, found[layer], transposed=True, addend=addend)

            pattern, values = column_start(self.field, column)
            start = self.matrix(pattern, values)
            self.product(start, slopes[0], stacks[0])
            for number in range(1, hidden - 1):
                self.product(matrices[number], stacks[number - 1], stacks[number], factor=slopes[number], second=True)
            self.product(matrices[-1], stacks[-2], stacks[-1], factor=lam, factor_row=widths[-1])
            end = self.path_sums(column_end(self.field, column, diagonal=True), stacks[-1], slopes[-1])
            self.product(end, slopes[-1], turned[-1], factor=lam, factor_row=widths[-1])
            add_to(hidden - 1, end, stacks[-1])
            for number in range(hidden - 1, 0, -1):
                builder.gradient(matrices[number], turned[number], stacks[number - 1], sums[number])
                if number == 1:
                    self.product(matrices[1], turned[1], turned[0], transposed=True)
                    break
                self.product(
                    matrices[number], turned[number], turned[number - 1], transposed=True, factor=slopes[number - 1],
                    second=True, factor2=(stacks[number - 1][0], 1),
                )  # fmt: skip
                add_to(number - 1, ones[number - 2], (turned[number - 1][0], 1))
            add_to(0, start, turned[0])
            self.derived(start, pattern.nnz, False, turned[0], slopes[0], values)


def write_adjoint(builder, field: VectorField, plan: DivergencePlan | None) -> AdjointWriter:
    """Fill a native builder with the adjoint program of a field for which `no_adjoint` gives no reason."""
    writer = AdjointWriter(builder, field)
    with torch.no_grad():
        writer.write(plan)
    return writer
