"""Collects a program (csrc/field.h) as the writers of programs say it, operation by operation."""

from __future__ import annotations

from dataclasses import dataclass, field as dataclass_field
from typing import Any, Sequence

import torch
from torch import Tensor

from ...field import Pattern

ABSENT = (-1, 0)
SHORT_ROW = 32  # entries of a row that is summed up with others

Ref = tuple[int, ...]  # (buffer, slot), or (buffer, slot, first row); buffer -1: absent


@dataclass
class MatrixPart:
    """A matrix: its pattern; for a gated one its paths; for an external one the number of its function."""

    pattern: Pattern
    values: Tensor | None = None  # [nnz]; of a gated one [paths], the constants
    entry: Tensor | None = None
    gate: Tensor | None = None
    modulation: int = -1
    external: int = -1
    sum: int = -1

    @property
    def dynamic(self) -> bool:
        return self.entry is not None or self.external >= 0


@dataclass
class ModulationPart:
    n: int
    first: int  # row, among those of all modulations
    gated: bool
    shifted: bool
    external_gate: int = -1
    external_shift: int = -1
    shift_sum: int = -1
    gate_sum: int = -1
    of_vectors: bool = False  # scale and shift are row vectors, one and zero where there is none; then n is 0
    scale_vector: int = -1
    shift_vector: int = -1

    @property
    def dynamic(self) -> bool:
        return self.gated or self.shifted or self.external

    @property
    def external(self) -> bool:
        return self.external_gate >= 0 or self.external_shift >= 0


@dataclass
class RowVector:
    """A number per row, the same for all samples: those from `first` on among all constant ones, or rows of the time
    answer from `first` on."""

    n: int
    first: int
    timed: bool = False
    sum: int = -1


@dataclass
class Expression:
    """An elementwise function of rows (csrc/expression.h): (operation, to, a, b, c, number) line by line."""

    inputs: int
    vectors: int
    outputs: int
    registers: int
    code: tuple[tuple[int, int, int, int, int, float], ...]


@dataclass
class Op:
    kind: str
    matrix: int
    source: Ref = ABSENT
    target: Ref = ABSENT
    transposed: bool = False
    options: dict[str, Any] = dataclass_field(default_factory=dict)


class Builder:
    """Collects the parts of a program, as csrc/bindings/builder.h does; tensors of values stay on their device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, form: str | None = None) -> None:
        self.dtype, self.device, self.form = dtype, device, form
        self.matrices: list[MatrixPart] = []
        self.modulations: list[ModulationPart] = []
        self.numbers: list[dict[str, Tensor | None]] = []  # of the modulations
        self.buffers: list[tuple[int, int]] = []
        self.vectors: list[RowVector] = []
        self.expressions: list[Expression] = []
        self.lists: dict[str, list[Op]] = {"prologue": [], "body": [], "keep": [], "reverse": []}
        self.sums: list[int] = []
        self.dim, self.divergence, self.externals = 0, False, 0
        self.input = self.output = self.noise = self.ones = -1
        self.cotangent = self.trace_cotangent = self.state_cotangent = -1
        self.context = self.context_cotangent = -1
        self.time_rows = 0

    @staticmethod
    def array(tensor: Tensor) -> Tensor:
        return tensor.detach()

    def matrix(self, rows: int, cols: int, row_ptr: Tensor, col: Tensor, values: Tensor) -> int:
        values = torch.as_tensor(values).to(self.device, self.dtype)
        return self._add(MatrixPart(_pattern(rows, cols, row_ptr, col), values))

    def gated_matrix(
        self, rows: int, cols: int, row_ptr: Tensor, col: Tensor, entry: Tensor, gate: Tensor, constant: Tensor,
        modulation: int,
    ) -> int:  # fmt: skip
        return self._add(MatrixPart(_pattern(rows, cols, row_ptr, col), constant, entry.long(), gate.long(), modulation))

    def external_matrix(self, rows: int, cols: int, row_ptr: Tensor, col: Tensor, external: int) -> int:
        return self._add(MatrixPart(_pattern(rows, cols, row_ptr, col), external=external))

    def _add(self, part: MatrixPart) -> int:
        self.matrices.append(part)
        return len(self.matrices) - 1

    def modulation(
        self, bias: Tensor, gate_slope: Tensor | None = None, gate_offset: Tensor | None = None,
        shift_slope: Tensor | None = None, shift_offset: Tensor | None = None, external_gate: int = -1,
        external_shift: int = -1,
    ) -> int:  # fmt: skip
        first = sum(part.n for part in self.modulations)
        self.modulations.append(ModulationPart(
            bias.numel(), first, gate_slope is not None, shift_slope is not None, external_gate, external_shift
        ))
        self.numbers.append(dict(
            bias=bias, gate_slope=gate_slope, gate_offset=gate_offset, shift_slope=shift_slope, shift_offset=shift_offset
        ))
        return len(self.modulations) - 1

    def buffer(self, rows: int, slots: int = 1) -> int:
        self.buffers.append((rows, slots))
        return len(self.buffers) - 1

    def roles(
        self, dim: int, divergence: bool, input: int, output: int, noise: int = -1, ones: int = -1, externals: int = 0
    ) -> None:
        self.dim, self.divergence, self.externals = dim, divergence, externals
        self.input, self.output, self.noise, self.ones = input, output, noise, ones

    def adjoint_roles(self, cotangent: int, trace_cotangent: int, state_cotangent: int) -> None:
        self.cotangent, self.trace_cotangent, self.state_cotangent = cotangent, trace_cotangent, state_cotangent

    def sum(self, size: int, each_stage: bool) -> int:
        self.sums.append(size)
        return len(self.sums) - 1

    def sum_of_matrix(self, matrix: int, sum: int) -> None:
        self.matrices[matrix].sum = sum

    def sums_of_modulation(self, modulation: int, shift: int, gate: int) -> None:
        self.modulations[modulation].shift_sum, self.modulations[modulation].gate_sum = shift, gate

    # ---- operations

    def affine(
        self, matrix: int, source: Ref, target: Ref, modulation: int, activation: int, a: float = 1.0, b: float = 20.0,
        store: int = 0, seed: Ref = ABSENT, weight: Ref = ABSENT, list: str = "body",
    ) -> None:  # fmt: skip
        self.lists[list].append(Op("affine", matrix, source, target, options=dict(
            modulation=modulation, activation=activation, a=a, b=b, store=int(store), seed=seed, weight=weight,
        )))  # fmt: skip

    def product(
        self, matrix: int, source: Ref, target: Ref, factor: Ref = ABSENT, factor_row: Tensor | None = None,
        prologue: bool = False, transposed: bool = False, addend: Ref = ABSENT, second: bool = False,
        factor2: Ref = ABSENT, factor2_row: Tensor | None = None, list: str = "body",
    ) -> None:  # fmt: skip
        self.lists["prologue" if prologue else list].append(Op("product", matrix, source, target, transposed, dict(
            factor=factor, factor_row=self._rows(factor_row), addend=addend, second=second, factor2=factor2,
            factor2_row=self._rows(factor2_row),
        )))  # fmt: skip

    def reduction(
        self, matrix: int, source: Ref, factor: Ref = ABSENT, factor2: Ref = ABSENT, factor_row: Tensor | None = None,
        factor2_row: Tensor | None = None, coefficient_matrix: int = -1, target: Ref = ABSENT,
    ) -> None:  # fmt: skip
        part = self.matrices[matrix]
        if part.pattern.shape[0] == 1 and factor == factor2 == ABSENT and coefficient_matrix < 0:
            part.pattern = _chopped(part.pattern)
        self.lists["body"].append(Op("reduction", matrix, source, options=dict(
            factor=factor, factor_row=self._rows(factor_row), factor2=factor2, factor2_row=self._rows(factor2_row),
            coefficient=coefficient_matrix,
        )))  # fmt: skip

    def keep(
        self, matrix: int, source: Ref, target: Ref, kept: int, modulation: int, activation: int, a: float, b: float,
        carries: bool, curvature: bool, raw: bool, slope_from: int = 0,
    ) -> None:  # fmt: skip
        self.lists["keep"].append(Op("keep", matrix, source, target, options=dict(
            kept=(kept, 0), modulation=modulation, activation=activation, a=a, b=b, carries=carries, curvature=curvature,
            raw=raw, slope_from=slope_from,
        )))  # fmt: skip

    def pull(
        self, matrix: int, source: Ref, target: Ref, kept: int, value: Ref, modulation: int, addend: Ref = ABSENT,
        slope_cotangent: Ref = ABSENT, transposed: bool = True, carries: bool = False, curvature: bool = False,
        raw: bool = False, slope_from: int = 0,
    ) -> None:  # fmt: skip
        self.lists["reverse"].append(Op("pull", matrix, source, target, transposed, dict(
            kept=(kept, 0), value=value, modulation=modulation, addend=addend, slope_cotangent=slope_cotangent,
            carries=carries, curvature=curvature, raw=raw, slope_from=slope_from,
        )))  # fmt: skip

    def gradient(self, matrix: int, left: Ref, right: Ref, sum: int, carries: bool = False) -> None:
        self.lists["reverse"].append(Op("gradient", matrix, right, options=dict(left=left, sum=sum, carries=carries)))

    # ---- of graphs

    def vector(self, n: int, values: Any = None, time_row: int = -1) -> int:
        constant = sum(aligned(part.n) for part in self.vectors if not part.timed)
        self.vectors.append(RowVector(n, constant, False) if time_row < 0 else RowVector(n, time_row, True))
        return len(self.vectors) - 1

    def sum_of_vector(self, vector: int, sum: int) -> None:
        self.vectors[vector].sum = sum

    def vector_modulation(self, n: int, scale: int = -1, shift: int = -1) -> int:
        self.modulations.append(ModulationPart(0, 0, False, False, of_vectors=True, scale_vector=scale, shift_vector=shift))
        self.numbers.append({})
        return len(self.modulations) - 1

    def expression(self, inputs: int, vectors: int, outputs: int, registers: int, op, to, a, b, c, number) -> int:
        columns = [[int(x) for x in column] for column in (op, to, a, b, c)]
        code = tuple(zip(*columns, map(float, number)))
        self.expressions.append(Expression(inputs, vectors, outputs, registers, code))
        return len(self.expressions) - 1

    def pointwise(
        self, expression: int, rows: int, inputs: Sequence[tuple], vectors: Sequence[tuple], outputs: Sequence[Ref],
        list: str = "body",
    ) -> None:  # fmt: skip
        """inputs: (buffer, slot, row, does one row serve all).  vectors: (vector, first, does one number serve all).
        outputs: where to; of buffer -1: added to the trace."""
        self.lists[list].append(Op("pointwise", -1, options=dict(
            expression=expression, rows=rows, inputs=tuple(inputs), vectors=tuple(vectors), outputs=tuple(outputs),
        )))  # fmt: skip

    def graph_roles(
        self, dim: int, out: int, divergence: bool, input: int, output: int, ones: int = -1, context: int = -1,
        time_rows: int = 0, time_external: int = -1, externals: int = 0,
    ) -> None:  # fmt: skip
        self.roles(dim, divergence, input, output, ones=ones, externals=externals)
        self.context, self.time_rows = context, time_rows

    def graph_adjoint_roles(
        self, cotangent: int, trace_cotangent: int = -1, state_cotangent: int = -1, context_cotangent: int = -1
    ) -> None:  # fmt: skip
        self.adjoint_roles(cotangent, trace_cotangent, state_cotangent)
        self.context_cotangent = context_cotangent

    def _rows(self, index: Tensor | None) -> Tensor | None:
        return None if index is None else index.to(self.device, torch.int32)


def aligned(count: int) -> int:
    """Numbers that many numbers are given room for, so that the next ones are as well aligned as the first."""
    return -(-count // 16) * 16


def _chopped(pattern: Pattern) -> Pattern:
    """One row cut into short ones, for a sum over all of them: one long chain would leave a GPU waiting."""
    starts = torch.arange(0, pattern.nnz, SHORT_ROW)
    return Pattern((len(starts), pattern.shape[1]), torch.cat((starts, torch.tensor([pattern.nnz]))), pattern.col)


def _pattern(rows: int, cols: int, row_ptr: Tensor, col: Tensor) -> Pattern:
    row_ptr, col = (torch.as_tensor(index).cpu().long() for index in (row_ptr, col))
    return Pattern((rows, cols), row_ptr, col)
