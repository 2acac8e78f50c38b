"""The gradient of everything that a program is made of: sums over the samples, split by split, and what follows from them
for the modulations that depend on time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import forms, kernels
from .builder import Op
from .launching import FLAT, Launch, ceil_div, interpreted, launch
from .program import TritonProgram

SPLIT_BYTES = 64 << 20  # of the partial sums of all gradients
SPLITS = 32  # places the samples of a gradient are summed up in, at most

Operand = tuple[Any, int, int]  # (address, stride of its rows, distance of its slots)


class GradientSums:
    """Sums lie in one vector, [lasting, then those of a stage]; their samples are split the same way for all. All sums of
    modulations and of rows of the time answer are taken away stage by stage: they are short.

    scale: [stages, rows] of the modulations.  times: [stages].  of_stage: by stage, the launches behind its operations.
    """

    def __init__(self, program: TritonProgram, batch: int, padded: int, scale: Tensor, times: Tensor) -> None:
        self.program, self.batch, self.padded, self.scale, self.times = program, batch, padded, scale, times
        of_stage = {part.sum for part in program.matrices if part.dynamic and part.sum >= 0}
        of_stage |= {n for part in program.modulations for n in (part.shift_sum, part.gate_sum) if n >= 0}
        of_stage |= {part.sum for part in program.vectors if part.timed and part.sum >= 0}
        order = [n for n in range(len(program.sums)) if n not in of_stage] + sorted(of_stage)
        self.first, total = {}, 0
        for number in order:
            self.first[number] = total
            total += program.sums[number]
        if total >= 2**31 - FLAT:
            raise ValueError(f"this field's gradient has {total} sums, more than 32-bit offsets reach: prune it")
        self.n_sums = total
        self.n_lasting = total - sum(program.sums[n] for n in of_stage)
        item = torch.empty((), dtype=program.dtype).element_size()
        most = max(1, min(SPLITS, SPLIT_BYTES // max(1, total * item)))
        self.chunk = forms.chunk(batch, most, interpreted())
        self.n_splits = ceil_div(batch, self.chunk)
        self.splits = torch.zeros(self.n_splits, max(1, total), dtype=program.dtype, device=program.device)
        self.sums = torch.zeros(max(1, total), dtype=torch.float64, device=program.device)

        new = partial(torch.zeros, dtype=torch.float64, device=program.device)
        self.of_modulations = new(6, max(1, program.rows))  # bias, gate slope and offset, shift slope and offset, time
        self.of_gate = new(max(1, program.rows))
        self.of_paths = {n: new(constants.numel()) for n, constants in program.constants.items()}
        self.of_stage = [self._behind(stage) for stage in range(len(scale))]

    def sum(self, number: int) -> Tensor:
        first = self.first[number]
        return self.sums[first : first + self.program.sums[number]]

    def forget(self) -> None:
        for total in (self.sums, self.of_modulations, *self.of_paths.values()):
            total.zero_()

    def bind(self, op: Op, left: Operand, right: Operand) -> Launch:
        """The inner products of a "gradient" operation."""
        program, o = self.program, op.options
        gradients = (other for other in program.lists["reverse"] if other.kind == "gradient")
        add = next(other for other in gradients if other.options["sum"] == o["sum"]) is not op  # said again: it adds up
        (x, x_row, x_slot), (y, y_row, y_slot) = left, right
        return partial(
            program.weight_gradient(op.matrix).launch, (x, x_row, 1, x_slot), (y, y_row, 1, y_slot),
            self.batch, self.padded, self.chunk, self.splits[:, self.first[o["sum"]] :], self.splits.stride(0),
            o["carries"], add,
        )  # fmt: skip

    def _behind(self, stage: int) -> list[Launch]:
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
            sums = self.sums[self.first[part.sum] :]
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
            shift_at, gate_at = program.sum_places(self.first)
            bound.append(partial(
                launch, kernels.modulation_gradient, ceil_div(program.rows, FLAT), self.sums, shift_at, gate_at,
                self.of_gate, self.times[stage:], self.scale[stage], flat["bias"], program.gated, program.shifted,
                flat["gate_slope"], flat["shift_slope"], self.of_modulations, program.rows, N=FLAT,
            ))  # fmt: skip
        return bound
