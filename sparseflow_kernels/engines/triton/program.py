"""A program (csrc/field.h) on a device: collected by `Builder`, held by `TritonProgram`, run in a `Workspace`.

Buffers are batch-minor, [rows, slots, padded batch]; lanes beyond the batch are computed and never looked at. A workspace
is all memory of one batch size with the launches over it bound once, so that a step is a fixed sequence of launches on
static memory, which a CUDA graph can hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field as dataclass_field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...field import Pattern
from . import forms, kernels, tuning
from .forms import Form
from .launching import Launch, ceil_div, interpreted, launch
from .operator import Operator, WeightGradient

ABSENT = (-1, 0)
LANES = 16  # a batch is padded to a multiple, so that rows are aligned and loads are wide
SPLIT_BYTES = 64 << 20  # of the partial sums of all gradients
SPLITS = 32  # places the samples of a gradient are summed up in, at most
SHORT_ROW = 32  # entries of a row that is summed up with others
FLAT = 256  # elements of a program over flat arrays

Ref = tuple[int, int]  # (buffer, slot); buffer -1: absent


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

    @property
    def dynamic(self) -> bool:
        return self.gated or self.shifted or self.external

    @property
    def external(self) -> bool:
        return self.external_gate >= 0 or self.external_shift >= 0


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
        self.lists: dict[str, list[Op]] = {"prologue": [], "body": [], "keep": [], "reverse": []}
        self.sums: list[int] = []
        self.dim, self.divergence, self.externals = 0, False, 0
        self.input = self.output = self.noise = self.ones = -1
        self.cotangent = self.trace_cotangent = self.state_cotangent = -1

    @staticmethod
    def array(tensor: Tensor) -> Tensor:
        return tensor.detach()

    def matrix(self, rows: int, cols: int, row_ptr: Tensor, col: Tensor, values: Tensor) -> int:
        return self._add(MatrixPart(_pattern(rows, cols, row_ptr, col), values.to(self.device)))

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
        store: int = 0, seed: Ref = ABSENT, weight: Ref = ABSENT,
    ) -> None:  # fmt: skip
        self.lists["body"].append(Op("affine", matrix, source, target, options=dict(
            modulation=modulation, activation=activation, a=a, b=b, store=store, seed=seed, weight=weight,
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

    def _rows(self, index: Tensor | None) -> Tensor | None:
        return None if index is None else index.to(self.device, torch.int32)

    def compile(self) -> "TritonProgram":
        return TritonProgram(self)


def _chopped(pattern: Pattern) -> Pattern:
    """One row cut into short ones, for a sum over all of them: one long chain would leave a GPU waiting."""
    starts = torch.arange(0, pattern.nnz, SHORT_ROW)
    return Pattern((len(starts), pattern.shape[1]), torch.cat((starts, torch.tensor([pattern.nnz]))), pattern.col)


def _pattern(rows: int, cols: int, row_ptr: Tensor, col: Tensor) -> Pattern:
    return Pattern((rows, cols), row_ptr.cpu().long(), col.cpu().long())


class _Paths:
    """The paths of a gated matrix in the order one operator reads its entries, and their constants."""

    def __init__(self, part: MatrixPart, operator: Operator, device: torch.device) -> None:
        entry, gate = part.entry.cpu(), part.gate.cpu()
        if operator.permutation is not None:
            place = torch.empty(part.pattern.nnz, dtype=torch.int64)
            place[part.pattern.transpose[1]] = torch.arange(part.pattern.nnz)
            order = torch.argsort(place[entry], stable=True)
            entry, gate, self.order = place[entry][order], gate[order], order.to(device)
        else:
            self.order = None
        count = torch.bincount(entry, minlength=part.pattern.nnz)
        path_ptr = torch.zeros(part.pattern.nnz + 1, dtype=torch.int64)
        torch.cumsum(count, 0, out=path_ptr[1:])
        self.path_ptr, self.gate = path_ptr.to(device, torch.int32), gate.to(device, torch.int32)
        self.constant = torch.empty_like(part.values)

    def set_values(self, constants: Tensor) -> None:
        if self.order is None:
            self.constant.copy_(constants)
        elif self.constant.numel():
            torch.index_select(constants, 0, self.order, out=self.constant)


class _PathIndex:
    """The paths of a gated matrix in their own order, and sorted by their gates."""

    def __init__(self, part: MatrixPart, gates: int, device: torch.device) -> None:
        gate = part.gate.cpu()
        gate_ptr = torch.zeros(gates + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(gate, minlength=gates), 0, out=gate_ptr[1:])
        index = (part.entry, gate, gate_ptr, torch.argsort(gate, stable=True))
        self.entry, self.gate, self.gate_ptr, self.by_gate = (one.to(device, torch.int32) for one in index)


class TritonProgram:
    """The parts of a program on its device, with the values they have now."""

    def __init__(self, builder: Builder) -> None:
        self.dtype, self.device = builder.dtype, builder.device
        self.matrices, self.modulations, self.buffers = builder.matrices, builder.modulations, builder.buffers
        self.lists, self.sums = builder.lists, builder.sums
        self.dim, self.divergence, self.externals = builder.dim, builder.divergence, builder.externals
        self.input, self.output, self.noise, self.ones = builder.input, builder.output, builder.noise, builder.ones
        self.cotangent, self.trace_cotangent = builder.cotangent, builder.trace_cotangent
        self.state_cotangent = builder.state_cotangent
        self.operators: dict[tuple[int, bool], Operator] = {}
        self.paths: dict[tuple[int, bool], _Paths] = {}
        self.forms: dict[int, Form] = {}
        self.coefficients: dict[int, Tensor] = {}  # values of matrices used row by row
        for ops in self.lists.values():
            for op in ops:
                if op.kind != "gradient":
                    self._operator(op.matrix, op.transposed, builder.form)
                if op.options.get("coefficient", -1) >= 0:
                    self._coefficient(op.options["coefficient"], builder.form)
        self.rows = sum(part.n for part in self.modulations)
        self.flat = {name: torch.zeros(self.rows, dtype=self.dtype, device=self.device)
                     for name in ("bias", "gate_slope", "gate_offset", "shift_slope", "shift_offset")}
        gated = [torch.full((part.n,), int(part.gated), dtype=torch.int8) for part in self.modulations]
        self.gated = torch.cat(gated).to(self.device) if gated else None
        shifted = [torch.full((part.n,), int(part.shifted), dtype=torch.int8) for part in self.modulations]
        self.shifted = torch.cat(shifted).to(self.device) if shifted else None
        self.constants = {  # of the paths, where they want a gradient
            number: torch.empty_like(part.values)
            for number, part in enumerate(self.matrices) if part.entry is not None and part.sum >= 0
        }  # fmt: skip
        self._path_indices: dict[int, _PathIndex] = {}
        self._weight_gradients: dict[int, WeightGradient] = {}
        self.dynamic = any(p.dynamic for p in (*self.matrices, *self.modulations))
        for number, part in enumerate(self.matrices):
            if part.external < 0:
                self.set_values(number, part.values)
        for number, numbers in enumerate(builder.numbers):
            self.set_modulation(number, **numbers)

    @property
    def adjoint(self) -> bool:
        return self.cotangent >= 0

    def _operator(self, matrix: int, transposed: bool, form: str | None) -> None:
        part = self.matrices[matrix]
        if matrix not in self.forms:
            self.forms[matrix] = forms.choose_form(part.pattern, self.dtype, form, not part.dynamic)
        if (matrix, transposed) not in self.operators:
            operator = Operator(
                part.pattern, self.forms[matrix], self.device, self.dtype, transposed, not part.dynamic
            )
            self.operators[matrix, transposed] = operator
            if part.entry is not None:
                self.paths[matrix, transposed] = _Paths(part, operator, self.device)

    def _coefficient(self, matrix: int, form: str | None) -> None:
        part = self.matrices[matrix]
        if part.dynamic:
            self._operator(matrix, False, form)  # its values, one per row of another matrix, are made stage by stage
        else:
            self.coefficients[matrix] = torch.empty_like(part.values)

    def set_values(self, matrix: int, values: Tensor) -> None:
        """New values of a matrix, or path constants of a gated one; on the device, which they do not leave."""
        values = values.detach().to(self.device)  # constants come from the CPU
        self.matrices[matrix].values = None  # they were the caller's
        if matrix in self.constants:
            self.constants[matrix].copy_(values)
        if matrix in self.coefficients:
            self.coefficients[matrix].copy_(values)
        for transposed in (False, True):
            if (matrix, transposed) in self.paths:
                self.paths[matrix, transposed].set_values(values)
            elif (matrix, transposed) in self.operators:
                self.operators[matrix, transposed].set_values(values)

    def set_modulation(self, modulation: int, **numbers: Tensor | None) -> None:
        part = self.modulations[modulation]
        for name, values in numbers.items():
            if values is not None and name in self.flat:
                self.flat[name][part.first : part.first + part.n].copy_(values.detach())

    def weight_gradient(self, matrix: int) -> WeightGradient:
        if matrix not in self._weight_gradients:
            dense = matrix in self.forms and self.forms[matrix].name == "dense"
            self._weight_gradients[matrix] = WeightGradient(
                self.matrices[matrix].pattern, dense, self.device, self.dtype
            )
        return self._weight_gradients[matrix]

    def path_index(self, matrix: int) -> "_PathIndex":
        if matrix not in self._path_indices:
            part = self.matrices[matrix]
            self._path_indices[matrix] = _PathIndex(part, self.modulations[part.modulation].n, self.device)
        return self._path_indices[matrix]

    def sum_places(self, sum_first: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Where the sums of every modulation's rows lie, that of the shift and that of the gate; -1 where there is none."""
        found = torch.full((2, self.rows), -1, dtype=torch.int32)
        for part in self.modulations:
            for which, number in enumerate((part.shift_sum, part.gate_sum)):
                if number >= 0:
                    found[which, part.first : part.first + part.n] = sum_first[number] + torch.arange(part.n)
        shift_at, gate_at = found.to(self.device)
        return shift_at, gate_at

    def describe(self) -> list[str]:
        """One line per matrix that a layer has: its form, its density, why."""
        lines = []
        for number, form in self.forms.items():
            pattern = self.matrices[number].pattern
            if number < len(self.modulations):
                out, into = pattern.shape
                lines.append(f"layer {number} [{out}, {into}]: {form.name}, density {form.density:.3g}, {form.why}")
        return lines


class Workspace:
    """Memory of a program for one batch size and so many stages of a step, and its lists of operations bound to it.

    times: [stages] in the program's dtype, on the device, as the field sees them; written before `modulate`.
    """

    def __init__(self, program: TritonProgram, batch: int, stages: int, times: Tensor | None = None) -> None:
        self.program, self.batch, self.stages = program, batch, stages
        self.padded = ceil_div(batch, LANES) * LANES
        new = partial(torch.empty, dtype=program.dtype, device=program.device)
        self.times = new(stages).zero_() if times is None else times
        self.buffers = [new(rows, slots, self.padded).zero_() for rows, slots in program.buffers]
        if program.ones >= 0:
            self.buffers[program.ones].fill_(1.0)
        self.timed = stages if program.dynamic else 1  # stages that differ
        self.scale, self.shift = new(self.timed, program.rows), new(self.timed, program.rows)
        self.values = {
            key: new(self.timed, max(1, program.matrices[key[0]].pattern.nnz))
            for key, operator in program.operators.items() if operator.values is None
        }  # fmt: skip
        if program.adjoint:
            self._bind_sums()
        body = program.lists["body"]
        self.n_partials = sum(self._row_tiles(op) for op in body if self._reduces(op))
        self.partials = new(max(1, self.n_partials), self.padded)
        self._next_partial = 0
        self.lists: dict[str, list[list[Launch]]] = {}
        for name, ops in program.lists.items():
            self.lists[name] = []
            for stage in range(self.timed):
                self._next_partial = 0
                self.lists[name].append([self._bind(op, stage) for op in ops if self._does_something(op)])
        self.modulations, self.gated_values = self._bind_modulations()
        if tuning.wanted(program.device):
            self._tune()

    def run(self, name: str, stage: int = 0) -> None:
        for bound in self.lists[name][stage if self.timed > 1 else 0]:
            bound()

    def modulate(self, answers: list[list[Tensor]] | None = None) -> None:
        """Make scales, shifts and time-dependent values of all stages, at `times`. answers: for every stage, what the
        functions of time that run in Python say."""
        for bound in self.modulations:
            bound()
        if answers is not None:
            self._take(answers)
        for bound in self.gated_values:
            bound()

    def state(self, buffer: int, slot: int = 0) -> Tensor:
        """[rows, padded] of a buffer's slot."""
        return self.buffers[buffer][:, slot]

    # ---- binding

    def _tune(self) -> None:
        """Sums over rows keep the tile that their partial sums were made for, and gradients that of their splits."""
        for name, ops in self.program.lists.items():
            ops = [op for op in ops if self._does_something(op)]
            for op, bound in zip(ops, self.lists[name][0]):
                if op.kind != "gradient" and not self._reduces(op):
                    operator = self.program.operators[op.matrix, op.transposed]
                    operator.tune(getattr(kernels, op.kind), op.options.get("store"), self.padded, bound)

    def _reduces(self, op: Op) -> bool:
        return op.kind == "reduction" or (op.kind == "affine" and op.options["store"] in (3, 5))

    def _row_tiles(self, op: Op) -> int:
        operator = self.program.operators[op.matrix, op.transposed]
        return ceil_div(operator.rows, operator.candidates(self.padded)[0].rows)

    def _does_something(self, op: Op) -> bool:
        return op.kind != "gradient" or self.program.matrices[op.matrix].pattern.nnz > 0

    def _operand(self, ref: Ref) -> tuple[Tensor | None, int, int]:
        """(address, stride of its rows, distance of its slots)."""
        if ref[0] < 0:
            return None, 0, 0
        buffer = self.buffers[ref[0]]
        return buffer[:, ref[1]], buffer.stride(0), buffer.stride(1)

    def _values(self, matrix: int, transposed: bool, stage: int) -> Tensor | None:
        """Of a matrix that depends on time; None for others, whose operator has them."""
        held = self.values.get((matrix, transposed))
        return None if held is None else held[stage]

    def _bind(self, op: Op, stage: int) -> Launch:
        if op.kind == "gradient":
            return self._bind_gradient(op)
        program, o = self.program, op.options
        operator = program.operators[op.matrix, op.transposed]
        source, row_stride, slot = self._operand(op.source)
        target, target_stride, target_slot = self._operand(op.target)
        constants: dict[str, Any] = {}
        if "modulation" in o:
            part = program.modulations[o["modulation"]]
            rows = slice(part.first, part.first + part.n)
            scale, shift = self.scale[stage, rows], self.shift[stage, rows]
        if self._reduces(op):
            first, tiles = self._next_partial, self._row_tiles(op)
            self._next_partial += tiles
            partials = (self.partials[first : first + tiles], self.padded)
        if op.kind == "affine":
            store = o["store"]
            constants = dict(ACTIVATION=o["activation"], A=o["a"], B=o["b"], STORE=store, tangent=store >= 4)
            rest = (target, target_stride, target_slot, scale, shift, *self._operand(o["seed"])[:2],
                    *self._operand(o["weight"])[:2], *(partials if self._reduces(op) else (None, 0)))
        elif op.kind in ("product", "reduction"):
            factors = ((a, row, stride) for (a, stride, _), row in (
                (self._operand(o["factor"]), o["factor_row"]), (self._operand(o["factor2"]), o["factor2_row"])
            ))
            one, two = factors
            if op.kind == "product":
                constants = dict(SECOND=o["second"])
                rest = (target, target_stride, 1, target_slot, None, *one, *self._operand(o["addend"])[:2], *two)
            else:
                coefficient = None
                if o["coefficient"] >= 0:
                    coefficient = self._values(o["coefficient"], False, stage)
                    if coefficient is None:
                        coefficient = program.coefficients[o["coefficient"]]
                rest = (*one, *two, coefficient, *partials)
        elif op.kind == "keep":
            constants = dict(
                ACTIVATION=o["activation"], A=o["a"], B=o["b"], SLOPES=o["slope_from"] == 0, CURVATURE=o["curvature"],
                RAW=o["raw"], tangent=o["carries"],
            )  # fmt: skip
            rest = (target, target_stride, target_slot, scale, shift, *self._operand(o["kept"]))
        else:  # pull
            constants = dict(
                SLOPE_FROM=o["slope_from"], CURVATURE=o["curvature"], RAW=o["raw"], tangent=o["carries"]
            )
            rest = (target, target_stride, target_slot, scale, *self._operand(o["addend"]), *self._operand(o["kept"]),
                    *self._operand(o["value"]), *self._operand(o["slope_cotangent"])[:2])
        return partial(
            operator.launch, getattr(kernels, op.kind), self.padded, (source, row_stride, 1, slot), rest,
            self._values(op.matrix, op.transposed, stage), **constants,
        )  # fmt: skip

    def _bind_modulations(self) -> tuple[list[Launch], list[Launch]]:
        program = self.program
        modulations, gated = [], []
        if program.rows:
            floor = 0.0
            if program.adjoint:  # the cotangent of a shift is found as that of the gated sum over the gate
                floor = 1e-30 if program.dtype == torch.float32 else 1e-290
            tiles = ceil_div(program.rows, FLAT)
            flat = program.flat
            modulations.append(partial(
                launch, kernels.modulate, tiles * self.timed, self.times, flat["bias"], program.gated,
                flat["gate_slope"], flat["gate_offset"], flat["shift_slope"], flat["shift_offset"],
                self.scale, self.shift, program.rows, tiles, FLOOR=floor, N=FLAT,
            ))  # fmt: skip
        for key, paths in program.paths.items():
            part = program.matrices[key[0]]
            modulation = program.modulations[part.modulation]
            tiles = ceil_div(part.pattern.nnz, 64)
            gated.append(partial(
                launch, kernels.gated_values, tiles * self.timed, paths.path_ptr, paths.constant, paths.gate,
                self.scale[:, modulation.first :], program.rows, self.values[key], part.pattern.nnz, tiles, N=64,
            ))  # fmt: skip
        return modulations, gated

    def _take(self, answers: list[list[Tensor]]) -> None:
        program = self.program
        for stage, answer in enumerate(answers):
            for part in program.modulations:
                if part.external:
                    rows = slice(part.first, part.first + part.n)
                    scale = self.scale[stage, rows]
                    shift = self.shift[stage, rows]
                    if part.external_gate >= 0:
                        shift.add_((answer[part.external_gate] - scale) * program.flat["bias"][rows])
                        scale.copy_(answer[part.external_gate])
                    if part.external_shift >= 0:
                        torch.add(scale * program.flat["bias"][rows], answer[part.external_shift], out=shift)
            for (matrix, transposed), values in self.values.items():
                if program.matrices[matrix].external >= 0 and program.matrices[matrix].pattern.nnz:
                    given = answer[program.matrices[matrix].external]
                    values[stage].copy_(program.operators[matrix, transposed].arranged(given))

    # ---- gradients

    def _bind_sums(self) -> None:
        """Sums lie in one vector, [lasting, then those of a stage]; their samples are split the same way for all. All sums
        of modulations are taken away stage by stage: they are short."""
        program = self.program
        of_stage = {part.sum for part in program.matrices if part.dynamic and part.sum >= 0}
        of_stage |= {n for part in program.modulations for n in (part.shift_sum, part.gate_sum) if n >= 0}
        order = [n for n in range(len(program.sums)) if n not in of_stage] + sorted(of_stage)
        self.sum_first, total = {}, 0
        for number in order:
            self.sum_first[number] = total
            total += program.sums[number]
        if total >= 2**31 - FLAT:
            raise ValueError(f"this field's gradient has {total} sums, more than 32-bit offsets reach: prune it")
        self.n_sums = total
        self.n_lasting = total - sum(program.sums[n] for n in of_stage)
        item = torch.empty((), dtype=program.dtype).element_size()
        most = max(1, min(SPLITS, SPLIT_BYTES // max(1, total * item)))
        self.chunk = forms.chunk(self.batch, most, interpreted())
        self.n_splits = ceil_div(self.batch, self.chunk)
        self.splits = torch.zeros(self.n_splits, max(1, total), dtype=program.dtype, device=program.device)
        self.sums = torch.zeros(max(1, total), dtype=torch.float64, device=program.device)

        new = partial(torch.zeros, dtype=torch.float64, device=program.device)
        self.of_modulations = new(6, max(1, program.rows))  # bias, gate slope and offset, shift slope and offset, time
        self.of_gate = new(max(1, program.rows))
        self.of_paths = {n: new(constants.numel()) for n, constants in program.constants.items()}
        self.gradients = [self._bind_gradients_of_stage(stage) for stage in range(self.timed)]

    def _bind_gradients_of_stage(self, stage: int) -> list[Launch]:
        """From the sums of an evaluation to the gradients of what depends on time."""
        program, flat = self.program, self.program.flat
        bound = [partial(
            launch, kernels.add_splits, ceil_div(self.n_sums, FLAT), self.sums, self.splits, self.n_splits, self.n_sums,
            self.n_lasting, N=FLAT,
        )]  # fmt: skip
        added: set[int] = set()
        for number, constants in program.constants.items():
            part, at = program.matrices[number], program.path_index(number)
            modulation = program.modulations[part.modulation]
            rows = slice(modulation.first, modulation.first + modulation.n)
            sums = self.sums[self.sum_first[part.sum] :]
            bound.append(partial(
                launch, kernels.path_gradient, ceil_div(constants.numel(), FLAT), at.entry, at.gate,
                self.scale[stage, rows], sums, self.of_paths[number], constants.numel(), N=FLAT,
            ))  # fmt: skip
            bound.append(partial(
                launch, kernels.gate_gradient, modulation.n, at.gate_ptr, at.by_gate, at.entry, constants, sums,
                self.of_gate[rows], ADD=part.modulation in added, N=FLAT,
            ))  # fmt: skip
            added.add(part.modulation)
        if program.rows:
            shift_at, gate_at = program.sum_places(self.sum_first)
            bound.append(partial(
                launch, kernels.modulation_gradient, ceil_div(program.rows, FLAT), self.sums, shift_at, gate_at,
                self.of_gate, self.times[stage:], self.scale[stage], flat["bias"], program.gated, program.shifted,
                flat["gate_slope"], flat["shift_slope"], self.of_modulations, program.rows, N=FLAT,
            ))  # fmt: skip
        return bound

    def forget_gradients(self) -> None:
        for total in (self.sums, self.of_modulations, *self.of_paths.values()):
            total.zero_()

    def _bind_gradient(self, op: Op) -> Launch:
        program, o = self.program, op.options
        gradients = (other for other in program.lists["reverse"] if other.kind == "gradient")
        add = next(other for other in gradients if other.options["sum"] == o["sum"]) is not op  # said again: it adds up
        (left, left_row, left_slot), (right, right_row, right_slot) = self._operand(o["left"]), self._operand(op.source)
        return partial(
            program.weight_gradient(op.matrix).launch, (left, left_row, 1, left_slot), (right, right_row, 1, right_slot),
            self.batch, self.padded, self.chunk, self.splits[:, self.sum_first[o["sum"]] :], self.splits.stride(0),
            o["carries"], add,
        )  # fmt: skip
