"""The Triton engine of graphs: programs that `lower` writes, run by the kernels of chains and by one generated kernel per
pointwise expression."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Collection, Sequence

import torch
from torch import Tensor

from ...divergence import DivergencePlan
from ...field import Convolution, GraphField
from ...field.graph import STATE, order
from ...field.primitives import PRIMITIVES
from ..base import Gradient, SolveRequest, SolveResult
from ..graph_native import GraphNativeEngine, GraphProgram, ProgramSums, summands
from ..lower import COTANGENT, TRACE_COTANGENT, GraphWriter, state_bindings, time_bindings
from ..native import solve_of_nothing, times_gradient
from .engine import MOST_COUNTED, unready
from .held import HeldMemory, check_request, tell


class GraphTritonEngine(HeldMemory, GraphNativeEngine):
    """As `TritonEngine`, for fields that are graphs; its gradients too are its own.

    notes: what did not go as planned (a capture that failed), line by line.
    """

    name = "triton"
    contiguous = False  # kernels take strides

    @staticmethod
    def unsupported(field: GraphField) -> str | None:
        if (reason := unready(field)) is not None:
            return reason
        nodes = order([field.output])
        if (rows := sum(node.rows + 1 for node in nodes if node.per_sample)) > MOST_COUNTED:
            return (
                f"its nodes take {rows} rows, more than the {MOST_COUNTED} that 32-bit offsets reach: use "
                "engine='reference'"
            )
        from .pointwise import INSTRUCTIONS  # late: without triton the class can still say why it cannot run

        for node in nodes:
            if node.elementwise and PRIMITIVES[node.kind].number not in INSTRUCTIONS:
                return (
                    f"{node.origin or 'an operation'} is {node.kind!r}, which the triton engine has no instruction for: "
                    "use engine='reference'"
                )
            if isinstance(node.matrix, Convolution):
                return (
                    f"{node.origin or 'a product'} is a convolution, which the triton engine has no kernels for: use "
                    "engine='reference'"
                )
            if node.matrix is not None and node.matrix.pattern.nnz > MOST_COUNTED:
                return (
                    f"{node.origin or 'a matrix'} has {node.matrix.pattern.nnz} entries, more than the {MOST_COUNTED} that "
                    "32-bit offsets reach: prune it, or use engine='reference'"
                )
        return None

    def __init__(self, field: GraphField, plan: DivergencePlan | None = None, form: str | None = None) -> None:
        """form: "auto", "sparse" or "dense", how matrices are multiplied; None reads SPARSEFLOW_TRITON_FORM."""
        super().__init__(field, plan)
        self.form, self.notes = form, []
        self._hold_memory()
        self._programs: dict[tuple[bool, bool], GraphProgram] = {}  # by (adjoint, a time per sample)
        self._program(False)

    def describe(self) -> list[str]:
        """A line per matrix: how it is multiplied, its density, why; and the notes."""
        program, lines = self._program(False), []
        for number, matrix in program.writer.matrices:
            form = program.native.forms.get(number)
            if form is not None and not matrix.constant:
                out, into = matrix.shape
                name = self._field.parts[matrix.part].name if matrix.part is not None else f"matrix {number}"
                lines.append(f"{name} [{out}, {into}]: {form.name}, density {form.density:.3g}, {form.why}")
        return [*lines, *self.notes]

    # ---- programs

    def _program(self, adjoint: bool, time_per_sample: bool = False) -> GraphProgram:
        key = adjoint, time_per_sample
        with self._guard():
            if key not in self._programs:
                self._programs[key] = self._write(adjoint, time_per_sample)
            program = self._programs[key]
            if program.stamp != self.stamp:
                self.renew(program)
        return program

    def _builder(self):
        from .builder import Builder  # late: without triton the class can still say why it cannot run

        return Builder(self.dtype, self.device, self.form)

    @staticmethod
    def _compiled(builder, writer: GraphWriter) -> GraphProgram:
        from .program import TritonProgram

        return GraphProgram(TritonProgram(builder), writer)

    def _write(self, adjoint: bool, time_per_sample: bool) -> GraphProgram:
        field, g = self._field, self._field.graph
        trace = None if self.plan is None else self.plan.form.trace
        builder = self._builder()
        writer = GraphWriter(builder, field, state_bindings(field, *((field.time,) if time_per_sample else ())))
        if adjoint:
            names = {COTANGENT: g.input(COTANGENT, field.dim, STATE), TRACE_COTANGENT: g.input(TRACE_COTANGENT, 1, STATE)}
            writer.write_adjoint(field.output, trace, names)
        else:
            writer.write(field.output, [] if trace is None else summands(trace))
        program = self._compiled(builder, writer)
        if writer.timed and not writer.time_in_python:
            builder = self._builder()
            of_time = GraphWriter(builder, field, time_bindings(field))
            of_time.write(g.concatenate(writer.timed))
            program.time = self._compiled(builder, of_time)
            program.native.time = program.time.native
        return program

    def update(self, field: GraphField) -> bool:
        if not self._takes_over(field):
            return False
        with self._lock, self._guard():
            self._take(field)
            self.stamp += 1
        return True

    def _answers(self, program: GraphProgram) -> Callable[[Sequence[float]], list[list[Tensor]]] | None:
        """Who answers for what depends on time where some of it runs in Python; None where none does."""
        writer = program.writer
        if not writer.timed or not writer.time_in_python:
            return None
        return lambda times: [[row] for row in self._answer_in_torch(writer.timed, times)]

    def _modulate(self, program: GraphProgram, work: Any, t: Tensor | float) -> None:
        tell(work.times, t)
        answers = self._answers(program)
        work.modulate(None if answers is None else answers([float(t)]))

    def _put(self, work: Any, buffer: int, rows: Tensor | None) -> None:
        """[batch, rows] into a buffer of the program; None: nothing is wanted there."""
        if buffer >= 0 and rows is not None:
            work.state(buffer)[:, : work.batch] = rows.T

    # ---- evaluations and solves

    def _run(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        from .workspace import Workspace

        x, time, own_times = self._state_and_time(t, x)
        batch = len(x)
        context, noise = self._ready_context(context, batch), self._ready_noise(noise, x[:, : self.dim])
        if batch == 0:
            return x.new_empty(0, self.dim), x.new_empty(0)
        with self._lock, self._guard():
            program = self._program(False, own_times)
            native = program.native
            work = self._hold(("evaluate", own_times, batch), lambda: Workspace(native, batch, 1))
            self._modulate(program, work, time)
            self._put(work, native.input, x)
            self._put(work, native.context, self._context(program, context, noise, batch))
            work.run("body")
            trace = work.partials[: work.n_partials, :batch].sum(0) if self.plan is not None else x.new_empty(0)
            return work.state(native.output)[:, :batch].T.contiguous(), trace

    def solve(self, request: SolveRequest) -> SolveResult:
        from .solve import Solver

        check_request(request)
        self._refuse_captured_solves()
        x = self._ready(request.x, "y0")
        batch = len(x)
        l = self._ready_density(request)  # noqa: E741
        noise, context = self._ready_noise(request.noise, x), self._ready_context(request.context, batch)
        if batch == 0:
            return solve_of_nothing(request, x)
        with self._lock, self._guard():
            program = self._program(False)
            native = program.native
            solver = self._hold(
                (request.tableau, batch, request.sign, request.parts),
                lambda: Solver(
                    native, request.tableau, batch, request.sign, self._answers(program), self.notes.append, request.parts
                ),
            )
            self._put(solver.work, native.context, self._context(program, context, noise, batch))
            return solver.solve(replace(request, x=x, l=l, noise=None))

    # ---- gradients

    def evaluate_backward(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, grad_f: Tensor, grad_trace: Tensor | None,
        wanted: Collection[str], context: Tensor | None = None,
    ) -> Gradient:  # fmt: skip
        point, time, own_times = self._state_and_time(t, x)
        batch = len(x)
        grad_f, noise = self._ready_like(grad_f, x.detach(), "grad_f"), self._ready_noise(noise, x.detach())
        grad_trace = self._ready_channel(grad_trace, x.shape[:1], "grad_trace")
        context = self._ready_context(context, batch)
        if batch == 0:
            return self._of_no_rows(x, context, noise, wanted, t=t)
        with self._lock, self._guard():
            program = self._program(True, own_times)
            native = program.native
            reverse = self._hold(("backward", own_times, batch), lambda: _Reverse(native, batch, self.notes.append))
            work = reverse.work
            reverse.sums.forget(), work.gradient.forget()
            self._modulate(program, work, time)
            self._put(work, native.input, point)
            self._put(work, native.cotangent, grad_f)
            if native.trace_cotangent >= 0:
                work.state(native.trace_cotangent)[0, :batch] = 0.0 if grad_trace is None else grad_trace
            self._put(work, native.context, self._context(program, context, noise, batch))
            raw = reverse.run()
            grad_x = work.state(native.state_cotangent)[:, :batch].T.contiguous()
        found, of_time = self._gradient(program, _sums(raw), context, noise, raw.context, wanted)
        found.x = grad_x[:, : self.dim] if own_times else grad_x
        if "t" in wanted:
            if own_times:
                found.t = grad_x[:, self.dim].reshape(t.shape)
            else:
                device = t.device if isinstance(t, Tensor) else "cpu"
                found.t = torch.tensor(of_time, dtype=self.dtype, device=device)
        return found

    def solve_backward(
        self, request: SolveRequest, result: SolveResult, grad_xs: Tensor, grad_ls: Tensor | None, wanted: Collection[str]
    ) -> Gradient:
        from .reversal import Reversal

        x, noise = self._ready(request.x, "y0"), self._ready_noise(request.noise, request.x)
        outputs, batch = len(request.times), len(x)
        grad_xs, grad_ls = self._ready_cotangents(request, grad_xs, grad_ls)
        context = self._ready_context(request.context, batch)
        if batch == 0:
            return self._of_no_rows(x, context, noise, wanted, outputs)
        with self._lock, self._guard():
            program = self._program(True)
            native = program.native
            reversal = self._hold(
                ("reversal", request.tableau, batch, request.sign),
                lambda: Reversal(
                    native, request.tableau, batch, request.sign, self.notes.append, self._answers(program), graph=True
                ),
            )
            self._put(reversal.work, native.context, self._context(program, context, noise, batch))
            raw, grad_x, grad_l = reversal.solve(replace(request, x=x, noise=None), result, grad_xs, grad_ls)
        found, of_time = self._gradient(program, _sums(raw), context, noise, raw.context, wanted)
        found.x, found.l = grad_x, grad_l
        if "times" in wanted:
            found.times = times_gradient(request, result, grad_xs, grad_ls, of_time)
        return found

    def _of_no_rows(
        self, x: Tensor, context: Tensor | None, noise: Tensor | None, wanted: Collection[str], outputs: int = 0,
        t: Any = 0.0,
    ) -> Gradient:  # fmt: skip
        zero = lambda value, name: torch.zeros_like(value) if value is not None and name in wanted else None
        return Gradient(
            tuple(torch.zeros_like(tensor) for _, tensor in self._field.tensors()) if "tensors" in wanted else (),
            torch.empty_like(x), None if self.plan is None else x.new_empty(0),
            torch.zeros_like(torch.as_tensor(t, dtype=self.dtype)) if "t" in wanted else None,
            torch.zeros(outputs, dtype=torch.float64) if "times" in wanted else None,
            context=zero(context, "context"), noise=zero(noise, "noise"),
        )  # fmt: skip


class _Reverse:
    """Memory and launches of the gradient of one evaluation."""

    def __init__(self, native: Any, batch: int, note: Callable[[str], None]) -> None:
        from .collected import GraphSums
        from .solve import Replayed, graphs_wanted
        from .workspace import Workspace

        self.work = Workspace(native, batch, 1)
        self.sums = GraphSums(self.work)
        launches = [*self.work.lists["reverse"][0], *self.work.gradient.of_stage[0]]
        name = f"the gradient of an evaluation over a batch of {batch}"
        self.replayed = Replayed(launches, graphs_wanted(native), note, name)

    def run(self):
        from .collected import program_gradient

        self.replayed.run()
        self.sums.take(0)
        found = program_gradient(self.work)
        self.sums.fill(found)
        return found


def _sums(raw: Any) -> ProgramSums:
    return ProgramSums(raw.matrices.__getitem__, raw.vectors, raw.times, raw.time_cotangents)
