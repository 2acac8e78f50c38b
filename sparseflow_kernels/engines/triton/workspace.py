"""All memory of a program for one batch size, with the launches over it bound once, so that a step is a fixed sequence of
launches on static memory, which a CUDA graph can hold.

Buffers are batch-minor, [rows, slots, padded batch], a slot behind the other; lanes beyond the batch are computed and
never looked at.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import forms, kernels, pointwise, tuning
from .builder import ModulationPart, Op, Ref
from .gradient_sums import GradientSums
from .launching import FLAT, LANES, Launch, ceil_div, interpreted, launch
from .program import TritonProgram


class Workspace:
    """Memory of a program for one batch size and so many stages of a step, and its lists of operations bound to it.

    times: [stages] in the program's dtype, on the device, as the field sees them; written before `modulate`.
    """

    def __init__(self, program: TritonProgram, batch: int, stages: int, times: Tensor | None = None) -> None:
        self.program, self.batch, self.stages = program, batch, stages
        self.padded = ceil_div(batch, LANES) * LANES
        new = partial(torch.empty, dtype=program.dtype, device=program.device)
        self.times = new(stages).zero_() if times is None else times
        # one piece of memory, in which operands of pointwise operations are told by their first row
        sizes = [rows * slots for rows, slots in program.buffers]
        self.first_rows = [0, *itertools.accumulate(sizes)]
        self.memory = new(self.first_rows[-1], self.padded).zero_()
        self.buffers = [
            self.memory[first : first + rows * slots].view(slots, rows, self.padded).transpose(0, 1)
            for first, (rows, slots) in zip(self.first_rows, program.buffers)
        ]
        if program.ones >= 0:
            self.buffers[program.ones].fill_(1.0)
        self.timed = stages if program.dynamic else 1  # stages that differ
        self.scale, self.shift = new(self.timed, program.rows), new(self.timed, program.rows)
        self.values = {
            key: new(self.timed, max(1, program.matrices[key[0]].pattern.nnz))
            for key, operator in program.operators.items() if operator.values is None
        }  # fmt: skip
        self.answer = new(self.timed, max(1, program.time_rows)).zero_()  # the time answers of the stages
        self.time = None if program.time is None else Workspace(program.time, stages, 1)
        self.gradient = (
            GradientSums(program, batch, self.padded, self.scale, self.times) if program.adjoint else None
        )
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
        if self.time is not None:
            self.time.state(self.program.time.input)[0, : self.stages].copy_(self.times)
            self.time.run("body")
            self.answer.copy_(self.time.state(self.program.time.output)[:, : self.stages].T)
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
                if op.kind not in ("gradient", "pointwise") and not self._reduces(op):
                    operator = self.program.operators[op.matrix, op.transposed]
                    operator.tune(getattr(kernels, op.kind), op.options.get("store"), self.padded, bound)

    def _reduces(self, op: Op) -> bool:
        if op.kind == "pointwise":
            return any(buffer < 0 for buffer, *_ in op.options["outputs"])
        return op.kind == "reduction" or (op.kind == "affine" and op.options["store"] in (3, 5))

    def _row_tiles(self, op: Op) -> int:
        if op.kind == "pointwise":
            return ceil_div(op.options["rows"], self._pointwise_tile(op).rows)
        operator = self.program.operators[op.matrix, op.transposed]
        return ceil_div(operator.rows, operator.candidates(self.padded)[0].rows)

    def _does_something(self, op: Op) -> bool:
        return op.kind != "gradient" or self.program.matrices[op.matrix].pattern.nnz > 0

    def _operand(self, ref: Ref) -> tuple[Tensor | None, int, int]:
        """(address, stride of its rows, distance of its slots)."""
        if ref[0] < 0:
            return None, 0, 0
        buffer = self.buffers[ref[0]]
        return buffer[ref[2] if len(ref) > 2 else 0 :, ref[1]], buffer.stride(0), buffer.stride(1)

    def _values(self, matrix: int, transposed: bool, stage: int) -> Tensor | None:
        """Of a matrix that depends on time; None for others, whose operator has them."""
        held = self.values.get((matrix, transposed))
        return None if held is None else held[stage]

    def _bind(self, op: Op, stage: int) -> Launch:
        if op.kind == "gradient":
            return self.gradient.bind(op, self._operand(op.options["left"]), self._operand(op.source))
        if op.kind == "pointwise":
            return self._bind_pointwise(op, stage)
        program, o = self.program, op.options
        operator = program.operators[op.matrix, op.transposed]
        source, row_stride, slot = self._operand(op.source)
        target, target_stride, target_slot = self._operand(op.target)
        constants: dict[str, Any] = {}
        if "modulation" in o:
            scale, shift = self._modulation(program.modulations[o["modulation"]], stage)
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

    def _modulation(self, part: ModulationPart, stage: int) -> tuple[Tensor | None, Tensor | None]:
        """(scale, shift) by row."""
        if part.of_vectors:
            return tuple(None if n < 0 else self._vector(n, stage) for n in (part.scale_vector, part.shift_vector))
        rows = slice(part.first, part.first + part.n)
        return self.scale[stage, rows], self.shift[stage, rows]

    def _vector(self, number: int, stage: int, first: int = 0) -> Tensor:
        part = self.program.vectors[number]
        numbers = self.answer[stage] if part.timed else self.program.row_numbers
        return numbers[part.first + first : part.first + part.n]

    def _pointwise_tile(self, op: Op) -> forms.Tile:
        return forms.tiles("pointwise", op.options["rows"], self.padded, interpreted())[0]

    def _bind_pointwise(self, op: Op, stage: int) -> Launch:
        o = op.options
        tile, row_tiles = self._pointwise_tile(op), self._row_tiles(op)
        kernel = pointwise.kernel_of(
            self.program.expressions[o["expression"]], tuple(broadcast for *_, broadcast in o["inputs"]),
            tuple(broadcast for *_, broadcast in o["vectors"]), tuple(buffer < 0 for buffer, *_ in o["outputs"]),
        )  # fmt: skip
        partials = None
        if self._reduces(op):
            partials = self.partials[self._next_partial : self._next_partial + row_tiles]
            self._next_partial += row_tiles
        rows = [self._first_row(*place) for place in (*(one[:3] for one in o["inputs"]), *o["outputs"]) if place[0] >= 0]
        vectors = [self._vector(number, stage, first) for number, first, _ in o["vectors"]]
        return partial(
            launch, kernel, row_tiles * ceil_div(self.padded, tile.batch), self.memory, self.padded, o["rows"], row_tiles,
            partials, *rows, *vectors, ROWS=tile.rows, BATCH=tile.batch, warps=tile.warps,
        )  # fmt: skip

    def _first_row(self, buffer: int, slot: int, row: int) -> int:
        """Of an operand, in the memory of all buffers; its rows follow each other."""
        return self.first_rows[buffer] + slot * self.program.buffers[buffer][0] + row

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
            if program.time_rows:
                self.answer[stage].copy_(answer[0])
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
