"""The CPU engine of graphs: programs that `lower` writes, run by csrc/cpu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from ..divergence import DivergencePlan
from ..field import GraphField, Matrix, Node
from ..field.graph import CONTEXT, STATE, evaluate, order
from ..threads import get_num_threads
from .base import Gradient, SolveRequest, SolveResult
from .cpu import _BUILDERS, STAGE_BYTES, _native, unready
from .lower import COTANGENT, TRACE_COTANGENT, GraphWriter, state_bindings, time_bindings
from .native import NativeEngine, address, native_options, native_tableau, solve_result, times_gradient


@dataclass(eq=False)
class _Program:
    """A compiled program, its writer, and the program that answers for what depends on time.

    plain: (native number, part) of the row vectors that are a part of the field.  computed: (native number, node) of all
    others."""

    native: object
    writer: GraphWriter
    time: "_Program | None" = None
    stamp: int = -1  # of the engine, when the numbers were those that the program holds

    def __post_init__(self) -> None:
        self.plain = [(number, node.part) for number, node in self.writer.vectors if node.kind == "vector"]
        self.computed = [(number, node) for number, node in self.writer.vectors if node.kind != "vector"]


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
        self._take(field)
        self._programs: dict[tuple[bool, tuple[Node, ...]], _Program] = {}  # by (adjoint, what is in the state besides)
        self._program(False)

    def _take(self, field: GraphField) -> None:
        """The field's numbers of now. A copy: the program of a gradient is packed when one is asked for, and the field's own
        may have changed by then."""
        self._field = field
        self._values = [part.values.detach().clone() for part in field.parts]

    # ---- programs

    def _program(self, adjoint: bool, more: tuple[Node, ...] = ()) -> _Program:
        """more: inputs that are rows of the state too (`state_bindings`)."""
        key = adjoint, more
        if key not in self._programs:
            with torch.no_grad():
                self._programs[key] = self._write(adjoint, more)
        program = self._programs[key]
        if program.stamp != self.stamp:
            self._renew(program)
        return program

    def _write(self, adjoint: bool, more: tuple[Node, ...]) -> _Program:
        field, g = self._field, self._field.graph
        trace = None if self.plan is None else self.plan.form.trace
        builder = getattr(_native(), _BUILDERS[field.dtype])()
        writer = GraphWriter(builder, field, state_bindings(field, *more))
        if adjoint:
            names = {COTANGENT: g.input(COTANGENT, field.dim, STATE), TRACE_COTANGENT: g.input(TRACE_COTANGENT, 1, STATE)}
            writer.write_adjoint(field.output, trace, names)
            program = _Program(builder.compile_adjoint(), writer)
        else:
            writer.write(field.output, [] if trace is None else _summands(trace))
            program = _Program(builder.compile(), writer)
        if writer.timed:
            self._answer_times(program)
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

    @torch.no_grad()
    def _renew(self, program: _Program) -> None:
        """The present numbers of the field's parts."""
        writer, like, of_part = program.writer, torch.empty(0, dtype=self.dtype), self._values.__getitem__
        for number, matrix in writer.matrices:
            if not matrix.constant:
                program.native.set_values(number, _array(matrix.values(of_part, like)))
        for number, part in program.plain:
            program.native.set_vector(number, _array(of_part(part)))
        values = evaluate([node for _, node in program.computed], {}, of_part, like=like) if program.computed else ()
        for (number, _), value in zip(program.computed, values):
            program.native.set_vector(number, _array(value[0]))
        if program.time is not None:
            self._renew(program.time)
        program.stamp = self.stamp

    @torch.no_grad()
    def update(self, field: GraphField) -> bool:
        if field.graph is not self._field.graph or field.output is not self._field.output:
            return False
        if (field.dtype, field.device) != (self.dtype, self.device):
            return False
        self._take(field)
        self.stamp += 1
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
        parts = self._values if parts is None else parts
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
        point, time, more = self._ready_point(t, x, noise, context)
        program = self._program(True, more)
        grad_f = self._ready_like(grad_f, x.detach(), "grad_f")
        grad_trace = self._ready_channel(grad_trace, x.shape[:1], "grad_trace")
        grad = torch.empty_like(point)
        raw = program.native.evaluate(
            t=time, x=point.data_ptr(), noise=0, batch=len(x), threads=get_num_threads(), grad_f=grad_f.data_ptr(),
            grad_trace=address(grad_trace), grad_x=grad.data_ptr(),
        )
        found, of_time = self._gradient(program, raw, None, None, None, wanted)
        found.x, *others = grad.split([self.dim, *(node.rows for node in more)], 1)
        named = dict(zip((node.name for node in more), others))
        found.context, found.noise = named.get("context"), named.get("noise")
        if "t" in wanted:
            own = named.get("time")
            found.t = torch.tensor(of_time, dtype=self.dtype) if own is None else own.reshape(t.shape)
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
        """What native sums are carried on to: the parts, the context and the noise; and the gradient of the time."""
        writer, dtype = program.writer, self.dtype
        parts = self._values
        of_parts: list[Tensor | None] = [None] * len(parts)

        def give(part: int, grad: Tensor, entries: Tensor | None = None) -> None:
            if of_parts[part] is None:
                if entries is None:
                    of_parts[part] = grad
                    return
                of_parts[part] = torch.zeros(len(parts[part]), dtype=torch.float64)
            if entries is None:
                of_parts[part] = of_parts[part] + grad
            else:
                of_parts[part].index_add_(0, entries, grad)

        made = []
        for number, matrix in writer.gradients:
            grad = torch.from_numpy(raw["matrices"][number])
            if matrix.made is not None:
                made.append((matrix, grad.to(dtype)))
            else:
                give(matrix.part, grad, matrix.entries)
        for number, part in program.plain:
            if len(grad := raw["vectors"][number]):
                give(part, torch.from_numpy(grad))
        of_vector = [(node, raw["vectors"][number]) for number, node in program.computed if len(raw["vectors"][number])]
        named, of_time = {}, 0.0
        if made or of_vector or writer.timed or grad_rows is not None:
            named, of_time = self._carry_on(writer, raw, parts, give, made, of_vector, context, noise, grad_rows)
        found = Gradient(tensors=())
        if "tensors" in wanted:
            found.tensors = tuple(
                torch.zeros_like(part) if total is None else total.to(dtype) for part, total in zip(parts, of_parts)
            )
        for name, like in (("context", context), ("noise", noise)):
            if name in wanted and like is not None:
                setattr(found, name, torch.zeros_like(like) if named.get(name) is None else named[name])
        return found, of_time

    def _carry_on(
        self, writer: GraphWriter, raw: dict, parts: Sequence[Tensor], give: Callable[[int, Tensor], None],
        made: Sequence[tuple[Matrix, Tensor]], of_vector: Sequence[tuple[Node, np.ndarray]], context: Tensor | None,
        noise: Tensor | None, grad_rows: Tensor | None,
    ) -> tuple[dict[str, Tensor | None], float]:  # fmt: skip
        """By autograd, through what was computed in torch: ({name of an input: its gradient}, the gradient of time)."""
        dtype = self.dtype
        times = torch.from_numpy(raw["time_points"]).to(dtype) if writer.timed else torch.empty(0, dtype=dtype)
        with torch.enable_grad():
            leaves = [part.clone().requires_grad_() for part in parts]
            inputs = {"context": context, "noise": noise, "time": times[:, None] if len(times) else None}
            inputs = {name: value.detach().requires_grad_() for name, value in inputs.items() if value is not None}
            outputs = [matrix.values(leaves.__getitem__, times) for matrix, _ in made]
            grads = [grad for _, grad in made]
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
        for number, grad in enumerate(carried[: len(parts)]):
            if grad is not None:
                give(number, grad)
        named = dict(zip(inputs, carried[len(parts) :]))
        of_time = named.pop("time", None)
        return named, 0.0 if of_time is None else float(of_time.sum(dtype=torch.float64))


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
