"""The CPU engine of graphs: programs that `lower` writes, run by csrc/cpu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Collection

import torch
from torch import Tensor

from ..divergence import DivergencePlan
from ..field import GraphField
from ..field.graph import STATE, order
from ..threads import get_num_threads
from .base import Gradient, SolveRequest, SolveResult
from .cpu import _BUILDERS, STAGE_BYTES, _native, unready
from .graph_native import GraphNativeEngine, ProgramSums, summands
from .lower import COTANGENT, TRACE_COTANGENT, GraphWriter, state_bindings, time_bindings
from .native import address, native_options, native_tableau, solve_result, times_gradient


@dataclass(eq=False)
class _Program:
    """A compiled program, its writer, and the program that answers for what depends on time."""

    native: object
    writer: GraphWriter
    time: "_Program | None" = None


class GraphCpuEngine(GraphNativeEngine):
    """Sparse products and pointwise expressions in C++ over batch-minor tiles; a whole solve is one call."""

    name = "cpu"

    @staticmethod
    def unsupported(field: GraphField) -> str | None:
        if (reason := unready(field)) is not None:
            return reason
        native = _native()
        nodes = order([field.output])
        if (rows := sum(node.rows + 1 for node in nodes if node.per_sample)) > native.MOST_ROWS:
            return (
                f"its nodes take {rows} rows, more than the {native.MOST_ROWS} that 32-bit offsets reach: use "
                "engine='reference'"
            )
        for node in nodes:
            if node.matrix is not None and node.matrix.pattern.nnz > native.MOST_ENTRIES:
                return (
                    f"{node.origin or 'a matrix'} has {node.matrix.pattern.nnz} entries, more than the "
                    f"{native.MOST_ENTRIES} that 32-bit offsets reach: prune it, or use engine='reference'"
                )
        return None

    def __init__(self, field: GraphField, plan: DivergencePlan | None = None) -> None:
        super().__init__(field, plan)
        self._programs: dict[tuple[bool, bool], _Program] = {}  # by (adjoint, a time per sample)
        self._program(False)

    # ---- programs

    def _program(self, adjoint: bool, time_per_sample: bool = False) -> _Program:
        key = adjoint, time_per_sample
        if key not in self._programs:
            with torch.no_grad():
                self._programs[key] = self._write(adjoint, time_per_sample)
        return self._programs[key]

    def _write(self, adjoint: bool, time_per_sample: bool) -> _Program:
        field, g = self._field, self._field.graph
        trace = None if self.plan is None else self.plan.form.trace
        builder = getattr(_native(), _BUILDERS[field.dtype])()
        writer = GraphWriter(builder, field, state_bindings(field, time_per_sample))
        if adjoint:
            names = {COTANGENT: g.input(COTANGENT, field.dim, STATE), TRACE_COTANGENT: g.input(TRACE_COTANGENT, 1, STATE)}
            writer.write_adjoint(field.output, trace, names)
            program = _Program(builder.compile_adjoint(), writer)
        else:
            writer.write(field.output, [] if trace is None else summands(trace))
            program = _Program(builder.compile(), writer)
        if writer.timed:
            self._answer_times(program)
        self._renew(program)
        return program

    def _answer_times(self, program: _Program) -> None:
        timed = program.writer.timed
        if program.writer.time_in_python:
            program.native.set_refresh(lambda times: [[_array(row)] for row in self._answer_in_torch(timed, times)])
            return
        builder = getattr(_native(), _BUILDERS[self.dtype])()
        writer = GraphWriter(builder, self._field, time_bindings(self._field))
        writer.write(self._field.graph.concatenate(timed))
        program.time = _Program(builder.compile(), writer)
        program.native.set_time(program.time.native)

    def _renew(self, program: _Program) -> None:
        """The present numbers of the field's parts."""
        matrices, vectors = self._numbers(program.writer)
        for number, values in matrices:
            program.native.set_values(number, _array(values))
        for number, values in vectors:
            program.native.set_vector(number, _array(values))
        if program.time is not None:
            self._renew(program.time)

    @torch.no_grad()
    def update(self, field: GraphField) -> bool:
        if not self._takes_over(field):
            return False
        self._field = field
        self.stamp += 1
        for program in self._programs.values():
            self._renew(program)
        return True

    # ---- evaluations and solves

    def evaluate(self, t: Tensor | float, y: Tensor, context: Tensor | None = None) -> Tensor:
        return self._run(t, y, None, context)[0]

    def evaluate_with_divergence(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.plan is None:
            raise ValueError("this engine was packed without a divergence: pack it with a plan")
        return self._run(t, x, noise, context)

    def _run(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x, time, own_times = self._ready_point(t, x)
        program = self._program(False, own_times)
        batch = len(x)
        rows = self._context_rows(program.writer, self._ready_context(context, batch), self._ready_noise(noise, x[:, : self.dim]), batch)
        f = x.new_empty(batch, self.dim)
        divergence = None if self.plan is None else x.new_empty(batch)
        program.native.evaluate(
            float(time), x.data_ptr(), 0, batch, get_num_threads(), f.data_ptr(), address(divergence), context=address(rows)
        )
        return f, divergence

    def solve(self, request: SolveRequest) -> SolveResult:
        x = self._ready(request.x, "y0")
        if request.step_control not in ("shared", "per_tile"):
            raise ValueError(f"step_control={request.step_control!r}: the cpu engine knows 'shared' and 'per_tile'")
        batch, outputs = x.shape[0], len(request.times)
        l = self._ready_density(request)  # noqa: E741
        ls = None if l is None else x.new_full((outputs, batch), torch.nan)
        program = self._program(False)
        noise = self._ready_noise(request.noise, x)
        rows = self._context_rows(program.writer, self._ready_context(request.context, batch), noise, batch)
        xs = x.new_full((outputs, batch, self.dim), torch.nan)  # outputs a failed solve does not reach stay NaN
        raw = program.native.solve(
            x=x.data_ptr(), l=address(l), noise=0, batch=batch,
            times=request.times.tolist(), sign=request.sign, tableau=native_tableau(request.tableau), rtol=list(request.rtol), atol=list(request.atol),
            options=native_options(request.options), grid=[] if request.grid is None else request.grid.tolist(),
            perturb=request.perturb, per_tile=request.step_control == "per_tile", record=request.record,
            record_stages=x.nbytes * len(request.tableau.b) <= STAGE_BYTES, threads=get_num_threads(),
            xs=xs.data_ptr(), ls=address(ls), context=address(rows), parts=list(request.parts or ()),
        )
        return solve_result(raw, request, xs, ls, batch, self.dim)

    # ---- gradients

    def evaluate_backward(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, grad_f: Tensor, grad_trace: Tensor | None,
        wanted: Collection[str], context: Tensor | None = None,
    ) -> Gradient:  # fmt: skip
        point, time, own_times = self._ready_point(t, x)
        program = self._program(True, own_times)
        batch = len(x)
        grad_f = self._ready_like(grad_f, x.detach(), "grad_f")
        grad_trace = self._ready_channel(grad_trace, x.shape[:1], "grad_trace")
        context, noise = self._ready_context(context, batch), self._ready_noise(noise, x.detach())
        rows = self._context_rows(program.writer, context, noise, batch)
        grad_rows = None if rows is None else torch.empty_like(rows)
        grad_x = torch.empty_like(point)
        raw = program.native.evaluate(
            t=float(time), x=point.data_ptr(), noise=0, batch=batch, threads=get_num_threads(), grad_f=grad_f.data_ptr(),
            grad_trace=address(grad_trace), grad_x=grad_x.data_ptr(), context=address(rows), grad_context=address(grad_rows),
        )
        found, of_time = self._gradient(program.writer, _sums(program.writer, raw), context, noise, grad_rows, wanted)
        found.x = grad_x[:, : self.dim] if own_times else grad_x
        if "t" in wanted:
            found.t = grad_x[:, self.dim].reshape(t.shape) if own_times else torch.tensor(of_time, dtype=self.dtype)
        return found

    def solve_backward(
        self, request: SolveRequest, result: SolveResult, grad_xs: Tensor, grad_ls: Tensor | None, wanted: Collection[str]
    ) -> Gradient:
        program = self._program(True)
        x, noise = self._ready(request.x, "y0"), self._ready_noise(request.noise, request.x)
        grad_xs, grad_ls = self._ready_cotangents(request, grad_xs, grad_ls)
        batch = x.shape[0]
        context = self._ready_context(request.context, batch)
        rows = self._context_rows(program.writer, context, noise, batch)
        grad_rows = None if rows is None else torch.empty_like(rows)
        grad_x = torch.empty_like(x)
        grad_l = None if self.plan is None else x.new_empty(batch)
        raw = program.native.solve(
            noise=0, batch=batch, times=request.times.tolist(), sign=request.sign,
            tableau=native_tableau(request.tableau), perturb=request.perturb, steps=result.steps.numpy(),
            states=result.states.numpy(), derivatives=result.derivatives.numpy(), threads=get_num_threads(),
            grad_xs=grad_xs.data_ptr(), grad_ls=address(grad_ls), grad_x=grad_x.data_ptr(), grad_l=address(grad_l),
            context=address(rows), grad_context=address(grad_rows),
        )
        found, of_time = self._gradient(program.writer, _sums(program.writer, raw), context, noise, grad_rows, wanted)
        found.x, found.l = grad_x, grad_l
        if "times" in wanted:
            found.times = times_gradient(request, result, grad_xs, grad_ls, of_time)
        return found


def _sums(writer: GraphWriter, raw: dict) -> ProgramSums:
    vectors = {n: torch.from_numpy(raw["vectors"][n]) for n, _ in writer.vectors if len(raw["vectors"][n])}
    times = cotangents = torch.empty(0)
    if writer.timed:
        times, cotangents = (torch.from_numpy(raw[name]) for name in ("time_points", "time_cotangents"))
    return ProgramSums(lambda number: torch.from_numpy(raw["matrices"][number]), vectors, times, cotangents)


def _array(values: Tensor):
    return values.detach().contiguous().numpy()
