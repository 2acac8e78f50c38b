"""A program (csrc/field.h) on a device: what `Builder` collected, with the values its matrices have now."""

from __future__ import annotations

import torch
from torch import Tensor

from . import forms
from .builder import Builder, MatrixPart, aligned
from .forms import Form
from .operator import Operator, WeightGradient


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
        self.context, self.context_cotangent = builder.context, builder.context_cotangent
        self.vectors, self.expressions, self.time_rows = builder.vectors, builder.expressions, builder.time_rows
        self.time: TritonProgram | None = None  # gives the time answer; else, where there is one, Python does
        constant = sum(aligned(part.n) for part in self.vectors if not part.timed)
        self.row_numbers = torch.zeros(constant, dtype=self.dtype, device=self.device)  # of all constant row vectors
        self.operators: dict[tuple[int, bool], Operator] = {}
        self.paths: dict[tuple[int, bool], _Paths] = {}
        self.forms: dict[int, Form] = {}
        self.coefficients: dict[int, Tensor] = {}  # values of matrices used row by row
        for ops in self.lists.values():
            for op in ops:
                if op.kind not in ("gradient", "pointwise"):
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
        self.dynamic = self.time_rows > 0 or any(p.dynamic for p in (*self.matrices, *self.modulations))
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

    def set_vector(self, vector: int, values: Tensor) -> None:
        part = self.vectors[vector]
        self.row_numbers[part.first : part.first + part.n].copy_(values.detach())

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
