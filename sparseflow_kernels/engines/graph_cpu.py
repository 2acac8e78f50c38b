"""The CPU engine of graphs: programs that `lower` writes, run by csrc/cpu."""

from __future__ import annotations

from typing import Any, Callable, Collection, Sequence

import torch
from torch import Tensor

from ..divergence import DivergencePlan
from ..field import GraphField, Node, UnsupportedFieldError
from ..field.graph import CONTEXT, STATE, order
from ..threads import get_num_threads
from .ahead import Ahead, in_torch, sums_of
from .base import Gradient, SolveRequest, SolveResult
from .cpu import _BUILDERS, STAGE_BYTES, _native, unready
from .graph_native import GraphNativeEngine, GraphProgram, ProgramSums, summands
from .lower import COTANGENT, TRACE_COTANGENT, GraphWriter, state_bindings, time_bindings
from .native import Renewal, address, native_options, native_tableau, solve_result, times_gradient


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
        self._programs: dict[tuple[bool, tuple[Node, ...], tuple[Node, ...]], GraphProgram] = {}  # as `_program` is asked
        self._aheads: dict[tuple[Node, ...], Ahead] = {}
        self._written(False)  # refuses here what it cannot run; the numbers are computed when it runs

    # ---- programs

    def _program(
        self, adjoint: bool, more: tuple[Node, ...] = (), without: tuple[Node, ...] = ()
    ) -> GraphProgram:  # fmt: skip
        """more: inputs that are rows of the state too (`state_bindings`).  without: those whose cotangents nobody wants."""
        program = self._written(adjoint, more, without)
        if program.stamp != self.stamp:
            self.renew(program)
        return program

    def _written(
        self, adjoint: bool, more: tuple[Node, ...] = (), without: tuple[Node, ...] = ()
    ) -> GraphProgram:  # fmt: skip
        key = adjoint, more, without
        if key not in self._programs:
            with torch.no_grad():
                self._programs[key] = self._write(*key)
        return self._programs[key]

    def _write(self, adjoint: bool, more: tuple[Node, ...], without: tuple[Node, ...]) -> GraphProgram:
        field, g = self._field, self._field.graph
        trace = None if self.plan is None else self.plan.form.trace
        output = field.single if field.single is not None and more and trace is None else field.output
        builder = getattr(_native(), _BUILDERS[field.dtype])()
        writer = GraphWriter(builder, field, state_bindings(field, *more), totals=True, tangents=True)
        if adjoint:
            names = {COTANGENT: g.input(COTANGENT, field.dim, STATE), TRACE_COTANGENT: g.input(TRACE_COTANGENT, 1, STATE)}
            writer.write_adjoint(output, trace, names, without)
            program = GraphProgram(self._compiled(builder.compile_adjoint), writer)
        else:
            writer.write(output, [] if trace is None else summands(trace))
            program = GraphProgram(self._compiled(builder.compile), writer)
        program.ahead = self._ahead([node for _, node in program.computed if not in_torch(node)])
        if writer.timed:
            self._answer_times(program)
        return program

    def _compiled(self, compile: Callable[[], Any]) -> Any:
        try:
            return compile()
        except ValueError as error:
            if self.plan is None:
                raise
            raise UnsupportedFieldError(
                f"the cpu engine cannot run the {self.plan.kind} divergence of this field ({self.plan.reason}): {error}; "
                'take kind="hutchinson", or engine="reference"'
            ) from error

    def _ahead(self, nodes: Sequence[Node]) -> Ahead | None:
        key = tuple(nodes)
        if key and key not in self._aheads:
            self._aheads[key] = Ahead(getattr(_native(), _BUILDERS[self.dtype]), self._field, nodes)
        return self._aheads.get(key)

    def _answer_times(self, program: GraphProgram) -> None:
        timed = program.writer.timed
        if program.writer.time_in_python:
            program.native.set_refresh(
                lambda times: [[row.numpy()] for row in self._answer_in_torch(timed, times).contiguous()]
            )
            return
        builder = getattr(_native(), _BUILDERS[self.dtype])()
        writer = GraphWriter(builder, self._field, time_bindings(self._field), totals=True, tangents=True)
        writer.write(self._field.graph.concatenate(timed))
        program.time = GraphProgram(builder.compile(), writer)
        program.time.ahead = self._ahead([node for _, node in program.time.computed if not in_torch(node)])
        program.native.set_time(program.time.native)
        program.of_time = self._ahead(timed)

    @torch.no_grad()
    def update(self, field: GraphField) -> bool:
        if not self._takes_over(field):
            return False
        self._take(field)
        self.stamp += 1
        return True

    def _tell(self, program: GraphProgram, numbers: Any) -> None:
        renewal = Renewal(self.dtype)
        super()._tell(program, renewal)
        renewal.send(numbers)

    def _numbers(self, program: GraphProgram, nodes: Sequence[Node]) -> Sequence[Tensor]:
        if program.ahead is None or not nodes:
            return super()._numbers(program, nodes)
        found = dict(zip(program.ahead.rows, program.ahead.values(self)))
        rest = [node for node in nodes if node not in found]
        found.update(zip(rest, super()._numbers(program, rest)))
        return [found[node] for node in nodes]

    # ---- evaluations and solves

    def _run(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x, time, more = self._ready_point(t, x, noise, context)
        program = self._program(False, more)
        batch = len(x)
        f = x.new_empty(batch, self.dim)
        divergence = None if self.plan is None else x.new_empty(batch)
        program.native.evaluate(time, x.data_ptr(), 0, batch, get_num_threads(), f.data_ptr(), address(divergence))
        return f, divergence

    def _ready_point(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, float, tuple[Node, ...]]:
        """(the rows of a program's state, its time, the inputs that its state holds besides)."""
        field, x, time = self._field, self._ready(x, "y"), 0.0
        rows, more = [x], []
        if isinstance(t, Tensor) and t.numel() > 1:
            rows.append(t.detach().reshape(-1, 1).to(x))
            more.append(field.time)
        else:
            time = float(t)
        if (context := self._ready_context(context, len(x))) is not None:
            rows.append(context)
            more.append(field.context)
        if (noise := self._ready_noise(noise, x)) is not None:
            rows.append(noise)
            more.append(field.graph.input("noise", self.dim, CONTEXT))
        return torch.cat(rows, 1) if more else x, time, tuple(more)

    def solve(self, request: SolveRequest) -> SolveResult:
        x = self._ready(request.x, "y0")
        if request.step_control not in ("shared", "per_tile"):
            raise ValueError(f"step_control={request.step_control!r}: the cpu engine knows 'shared' and 'per_tile'")
        batch, outputs = x.shape[0], len(request.times)
        l = self._ready_density(request)  # noqa: E741
        ls = None if l is None else x.new_full((outputs, batch), torch.nan)
        program = self._program(False)
        noise = self._ready_noise(request.noise, x)
        rows = self._context(program, self._ready_context(request.context, batch), noise, batch)
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
        point, time, more = self._ready_point(t, x, noise, context)
        names = {"state": "x", "time": "t"}
        without = (node for node in (self._field.state, *more) if names.get(node.name, node.name) not in wanted)
        program = self._program(True, more, tuple(without))
        grad_f = self._ready_like(grad_f, x.detach(), "grad_f")
        grad_trace = self._ready_channel(grad_trace, x.shape[:1], "grad_trace")
        grad = torch.empty_like(point)
        raw = program.native.evaluate(
            t=time, x=point.data_ptr(), noise=0, batch=len(x), threads=get_num_threads(), grad_f=grad_f.data_ptr(),
            grad_trace=address(grad_trace), grad_x=grad.data_ptr(),
        )
        found, of_time = self._gradient(program, sums_of(program.writer, raw), None, None, None, wanted)
        found.x, *others = grad.split([self.dim, *(node.rows for node in more)], 1)
        named = dict(zip((node.name for node in more), others))
        found.context, found.noise = named.get("context"), named.get("noise")
        if "t" in wanted:
            own = named.get("time")
            found.t = torch.tensor(of_time, dtype=self.dtype) if own is None else own.reshape(t.shape)
        return found

    def _behind(
        self, program: GraphProgram, sums: ProgramSums, of_vector: list[tuple[Node, Tensor]], times_too: bool
    ) -> tuple[list[tuple[Node, Tensor]], Sequence[Node], float, list[tuple[GraphProgram, ProgramSums]]]:
        timed, of_time, further = program.writer.timed if times_too else (), 0.0, []
        if program.ahead is not None and of_vector:
            given = dict(of_vector)
            grads = [given[n].to(self.dtype) if n in given else torch.zeros(n.rows, dtype=self.dtype) for n in program.ahead.rows]
            own, found, _ = program.ahead.backward(self, torch.zeros(1, dtype=self.dtype), torch.cat(grads))
            further.append((own, found))
            of_vector = [(node, grad) for node, grad in of_vector if node not in program.ahead.rows]
        if program.of_time is not None and timed:
            timed = ()
            if len(sums.times):
                own, found, bars = program.of_time.backward(self, sums.times.to(self.dtype), sums.time_cotangents.to(self.dtype).contiguous())
                of_time = float(bars.sum(dtype=torch.float64))
                further.append((own, found))
        return of_vector, timed, of_time, further

    def solve_backward(
        self, request: SolveRequest, result: SolveResult, grad_xs: Tensor, grad_ls: Tensor | None, wanted: Collection[str]
    ) -> Gradient:
        program = self._program(True)
        x, noise = self._ready(request.x, "y0"), self._ready_noise(request.noise, request.x)
        grad_xs, grad_ls = self._ready_cotangents(request, grad_xs, grad_ls)
        batch = x.shape[0]
        context = self._ready_context(request.context, batch)
        rows = self._context(program, context, noise, batch)
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
        found, of_time = self._gradient(program, sums_of(program.writer, raw), context, noise, grad_rows, wanted)
        found.x, found.l = grad_x, grad_l
        if "times" in wanted:
            found.times = times_gradient(request, result, grad_xs, grad_ls, of_time)
        return found
