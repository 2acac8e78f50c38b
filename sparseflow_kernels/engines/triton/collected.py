"""What the evaluations of an adjoint program leave behind, when they are done."""

from __future__ import annotations

from dataclasses import dataclass, field as dataclass_field

import torch
from torch import Tensor

from .workspace import Workspace


@dataclass
class ProgramGradient:
    """Of everything a program is made of, in double, on the device; over all samples, stages and steps.

    matrices: by matrix, of its values, or where gated of its path constants; None without a sum.
    modulations: by modulation, tensors by name.  t: 0-d, all evaluations moved together.
    vectors: by number, of constant row vectors that have a sum.  times, time_cotangents: of programs with a time answer,
    [evaluations] and [evaluations, rows].  context: [batch, rows], of programs with a context.
    """

    matrices: list[Tensor | None]
    modulations: list[dict[str, Tensor]]
    t: Tensor
    vectors: dict[int, Tensor] = dataclass_field(default_factory=dict)
    times: Tensor | None = None
    time_cotangents: Tensor | None = None
    context: Tensor | None = None


class GraphSums:
    """What the evaluations of a graph's adjoint program leave behind, beside the lasting sums: the cotangents of the
    context, added up, and those of the time answers, one by one."""

    def __init__(self, work: Workspace) -> None:
        program = work.program
        self.work, self.of_context = work, None
        if program.context_cotangent >= 0:
            self.of_context = torch.zeros_like(work.state(program.context_cotangent))
        into, out_of = [], []
        for part in program.vectors:
            if part.timed and part.sum >= 0:
                into.append(torch.arange(part.first, part.first + part.n))
                out_of.append(work.gradient.first[part.sum] + torch.arange(part.n))
        self.into, self.out_of = (torch.cat(index).to(program.device) if index else None for index in (into, out_of))
        self.times: list[Tensor] = []
        self.time_cotangents: list[Tensor] = []

    def forget(self) -> None:
        if self.of_context is not None:
            self.of_context.zero_()
        self.times, self.time_cotangents = [], []

    def take(self, stage: int) -> None:
        """Behind the operations of an evaluation."""
        work, program = self.work, self.work.program
        if self.of_context is not None:
            self.of_context += work.state(program.context_cotangent)
        if self.into is not None:
            row = torch.zeros(program.time_rows, dtype=torch.float64, device=program.device)
            row[self.into] = work.gradient.sums[self.out_of]
            self.time_cotangents.append(row)
            self.times.append(work.times[stage].clone())

    def fill(self, found: ProgramGradient) -> None:
        program, gradient = self.work.program, self.work.gradient
        for number, part in enumerate(program.vectors):
            if not part.timed and part.sum >= 0:
                found.vectors[number] = gradient.sum(part.sum).clone()
        found.times = torch.zeros(0, dtype=program.dtype, device=program.device)
        found.time_cotangents = torch.zeros(0, program.time_rows, dtype=torch.float64, device=program.device)
        if self.times:
            found.times, found.time_cotangents = torch.stack(self.times), torch.stack(self.time_cotangents)
        if self.of_context is not None:
            found.context = self.of_context[:, : self.work.batch].T.contiguous()
        self.times, self.time_cotangents = [], []


def program_gradient(work: Workspace) -> ProgramGradient:
    """What the evaluations since `GradientSums.forget` add up to."""
    program, found = work.program, work.gradient
    matrices: list[Tensor | None] = []
    for number, part in enumerate(program.matrices):
        if part.sum < 0:
            matrices.append(None)
        elif part.dynamic:
            matrices.append(found.of_paths[number].clone())
        else:
            matrices.append(found.sum(part.sum)[: part.pattern.nnz].clone())
    names = ("bias", "gate.slope", "gate.offset", "shift.slope", "shift.offset")
    of = found.of_modulations.clone()
    modulations = [
        {name: of[n, part.first : part.first + part.n] for n, name in enumerate(names)} for part in program.modulations
    ]
    return ProgramGradient(matrices, modulations, of[5].sum())
