"""The CPU engine of graphs: programs that `lower` writes, run by csrc/cpu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Collection, Sequence

import torch
from torch import Tensor

from ..divergence import DivergencePlan
from ..field import GraphField, Node
from ..field.graph import STATE, evaluate, order
from ..threads import get_num_threads
from .base import Gradient, SolveRequest, SolveResult
from .cpu import _BUILDERS, STAGE_BYTES, _native, unready
from .lower import COTANGENT, TRACE_COTANGENT, GraphWriter, state_bindings, time_bindings
from .native import NativeEngine, address, native_options, native_tableau, solve_result, times_gradient


@dataclass(eq=False)
class _Program:
    """A compiled program, its writer, and the program that answers for what depends on time."""

    native: object
    writer: GraphWriter
    time: "_Program | None" = None


class GraphCpuEngine(NativeEngine):
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
            writer.write(field.output, [] if trace is None else _summands(trace))
            program = _Program(builder.compile(), writer)
        if writer.timed:
            self._answer_times(program)
        self._renew(program)
        return program

    def _answer_times(self, program: _Program) -> None:
        timed = program.writer.timed
        if program.writer.time_in_python:
            program.native.set_refresh(lambda times: self._answer_in_torch(timed, times))
            return
        builder = getattr(_native(), _BUILDERS[self.dtype])()
        writer = GraphWriter(builder, self._field, time_bindings(self._field))
        writer.write(self._field.graph.concatenate(timed))
        program.time = _Program(builder.compile(), writer)
        program.native.set_time(program.time.native)

    @torch.no_grad()
    def _answer_in_torch(self, timed: Sequence[Node], times: list[float]) -> list[list]:
        values = self._evaluate(timed, {"time": torch.tensor(times, dtype=self.dtype)[:, None]})
        rows = torch.cat([value.expand(len(times), value.shape[1]) for value in values], 1)
        return [[_array(row)] for row in rows]

    def _renew(self, program: _Program) -> None:
        """The present numbers of the field's parts."""
        parts, writer, like = self._field.parts, program.writer, torch.empty(0, dtype=self.dtype)
        of_part = lambda number: parts[number].values
        for number, matrix in writer.matrices:
            if not matrix.constant:
                program.native.set_values(number, _array(matrix.values(of_part, like)))
        nodes = [node for _, node in writer.vectors]
        values = evaluate(nodes, {}, of_part, like=like)
        for (number, _), value in zip(writer.vectors, values):
            program.native.set_vector(number, _array(value[0]))
        if program.time is not None:
            self._renew(program.time)

    @torch.no_grad()
    def update(self, field: GraphField) -> bool:
        if field.graph is not self._field.graph or field.output is not self._field.output:
            return False
        if (field.dtype, field.device) != (self.dtype, self.device):
            return False
        self._field = field
        self.stamp += 1
        for program in self._programs.values():
            self._renew(program)
        return True

    # ---- what comes with a call

    def _context(self, program: _Program, context: Tensor | None, noise: Tensor | None, batch: int) -> Tensor | None:
        """The rows [batch, rows] that follow from the context, for this call."""
        nodes = program.writer.contexts
        if not nodes:
            return None
        with torch.no_grad():
            values = self._evaluate(nodes, {"context": context, "noise": noise})
            return torch.cat([value.expand(batch, node.rows) for value, node in zip(values, nodes)], 1).contiguous()

    def _evaluate(self, nodes: Sequence[Node], inputs: dict, parts: Sequence[Tensor] | None = None) -> list[Tensor]:
        parts = [part.values for part in self._field.parts] if parts is None else parts
        inputs = {name: value for name, value in inputs.items() if value is not None}
        return evaluate(nodes, inputs, lambda n: parts[n], like=torch.empty(0, dtype=self.dtype))

    def _ready_context(self, context: Tensor | None, batch: int) -> Tensor | None:
        node = self._field.context
        if node is None:
            return None
        if context is None:
            raise ValueError(f"this field has a context [batch, {node.rows}], and none was given")
        if context.shape != (batch, node.rows) or context.dtype != self.dtype or context.device != self.device:
            raise ValueError(
                f"context must be [{batch}, {node.rows}], {self.dtype} on {self.device}, not {list(context.shape)}, "
                f"{context.dtype} on {context.device}"
            )
        return context.detach()

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
        rows = self._context(program, self._ready_context(context, batch), self._ready_noise(noise, x[:, : self.dim]), batch)
        f = x.new_empty(batch, self.dim)
        divergence = None if self.plan is None else x.new_empty(batch)
        program.native.evaluate(
            time, x.data_ptr(), 0, batch, get_num_threads(), f.data_ptr(), address(divergence), context=address(rows)
        )
        return f, divergence

    def _ready_point(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, float, bool]:
        """(the rows of the program's state, its time, whether every sample has its own)."""
        x = self._ready(x, "y")
        if isinstance(t, Tensor) and t.numel() > 1:
            return torch.cat((x, t.detach().reshape(-1, 1).to(x)), 1), 0.0, True
        return x, float(t), False

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

    def no_gradient(self, wanted: Collection[str], request: SolveRequest | None = None) -> str | None:
        if request is not None:
            return super().no_gradient([name for name in wanted if name != "noise"], request)
        return None

    def _no_adjoint(self) -> None:
        return None

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
        rows = self._context(program, context, noise, batch)
        grad_rows = None if rows is None else torch.empty_like(rows)
        grad_x = torch.empty_like(point)
        raw = program.native.evaluate(
            t=time, x=point.data_ptr(), noise=0, batch=batch, threads=get_num_threads(), grad_f=grad_f.data_ptr(),
            grad_trace=address(grad_trace), grad_x=grad_x.data_ptr(), context=address(rows), grad_context=address(grad_rows),
        )
        found, of_time = self._gradient(program, raw, context, noise, grad_rows, wanted)
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
        found, of_time = self._gradient(program, raw, context, noise, grad_rows, wanted)
        found.x, found.l = grad_x, grad_l
        if "times" in wanted:
            found.times = times_gradient(request, result, grad_xs, grad_ls, of_time)
        return found

    def _gradient(
        self, program: _Program, raw: dict, context: Tensor | None, noise: Tensor | None, grad_rows: Tensor | None,
        wanted: Collection[str],
    ) -> tuple[Gradient, float]:
        """The gradient of the parts, the context and the noise, which autograd makes from the native sums; and that of the
        time."""
        writer, dtype = program.writer, self.dtype
        parts = [part.values.detach() for part in self._field.parts]
        of_parts: list[Tensor | None] = [None] * len(parts)
        made = []
        for number, matrix in writer.gradients:
            grad = torch.from_numpy(raw["matrices"][number])
            if matrix.made is not None:
                made.append((matrix, grad.to(dtype)))
                continue
            if of_parts[matrix.part] is None:
                of_parts[matrix.part] = torch.zeros(len(parts[matrix.part]), dtype=torch.float64)
            if matrix.entries is None:
                of_parts[matrix.part] += grad
            else:
                of_parts[matrix.part].index_add_(0, matrix.entries, grad)
        times = torch.from_numpy(raw["time_points"]).to(dtype) if writer.timed else torch.empty(0, dtype=dtype)
        with torch.enable_grad():
            leaves = [part.clone().requires_grad_() for part in parts]
            inputs = {"context": context, "noise": noise, "time": times[:, None] if len(times) else None}
            inputs = {name: value.detach().requires_grad_() for name, value in inputs.items() if value is not None}
            outputs = [matrix.values(leaves.__getitem__, times) for matrix, _ in made]
            grads = [grad for _, grad in made]
            of_vector = [(node, raw["vectors"][number]) for number, node in writer.vectors if len(raw["vectors"][number])]
            for (_, grad), value in zip(of_vector, self._evaluate([node for node, _ in of_vector], {}, leaves)):
                outputs.append(value[0])
                grads.append(torch.from_numpy(grad).to(dtype))
            if len(times):
                cotangents = torch.from_numpy(raw["time_cotangents"]).to(dtype).reshape(len(times), -1)
                outputs += self._evaluate(writer.timed, {"time": inputs["time"]}, leaves)
                grads += cotangents.split([node.rows for node in writer.timed], 1)
            if grad_rows is not None:
                given = {name: inputs[name] for name in ("context", "noise") if name in inputs}
                values = self._evaluate(writer.contexts, given, leaves)
                outputs += [value.expand(len(grad_rows), value.shape[1]) for value in values]
                grads += grad_rows.split([node.rows for node in writer.contexts], 1)
            pairs = [(out, grad) for out, grad in zip(outputs, grads) if out.requires_grad]
            targets = [*leaves, *inputs.values()]
            carried: Sequence[Tensor | None] = [None] * len(targets)
            if pairs:
                carried = torch.autograd.grad([o for o, _ in pairs], targets, [g for _, g in pairs], allow_unused=True)
        tensors = []
        for own, more, part in zip(of_parts, carried, parts):
            total = more if own is None else own.to(dtype) if more is None else own.to(dtype) + more
            tensors.append(torch.zeros_like(part) if total is None else total)
        named = dict(zip(inputs, carried[len(parts) :]))
        found = Gradient(tensors=tuple(tensors) if "tensors" in wanted else ())
        for name in ("context", "noise"):
            if name in wanted and name in inputs:
                setattr(found, name, torch.zeros_like(inputs[name]) if named[name] is None else named[name])
        of_time = named.get("time")
        return found, 0.0 if of_time is None else float(of_time.sum(dtype=torch.float64))


def _summands(trace: Node) -> list[Node]:
    """The terms of a sum."""
    found, waiting = [], [trace]
    while waiting:
        node = waiting.pop()
        if node.kind == "add":
            waiting += node.operands
        else:
            found.append(node)
    return found


def _array(values: Tensor):
    return values.detach().contiguous().numpy()
