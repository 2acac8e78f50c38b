"""What the engines that run graphs as programs have in common: the numbers of a field that programs hold, what comes with a
call, and how the sums of an adjoint program become gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Collection, Sequence

import torch
from torch import Tensor

from ..divergence import DivergencePlan
from ..field import GraphField, Matrix, Node
from ..field.graph import evaluate, from_parts
from .base import Gradient, SolveRequest
from .lower import GraphWriter
from .native import NativeEngine


@dataclass(eq=False)
class GraphProgram:
    """A compiled program, its writer, and the program that answers for what depends on time.

    matrices: (native number, matrix) of those whose values may change.  plain: (native number, part, entries) of the row
    vectors that are values of a part.  constant: (native number, node) of those that no part has a say in.  computed: of all
    others."""

    native: Any
    writer: GraphWriter
    time: GraphProgram | None = None
    ahead: Any = None  # `ahead.Ahead` of those that are computed, where the engine has such programs
    of_time: Any = None  # and of the time answer, for gradients
    stamp: int = -1  # of the engine, when the numbers were those that the program holds

    def __post_init__(self) -> None:
        self.matrices = [(number, matrix) for number, matrix in self.writer.matrices if not matrix.constant]
        self.plain = [(number, node.part, node.tensor) for number, node in self.writer.vectors if node.kind == "vector"]
        others = [(number, node) for number, node in self.writer.vectors if node.kind != "vector"]
        self.computed = [(number, node) for number, node in others if from_parts([node])]
        self.constant = [(number, node) for number, node in others if not from_parts([node])]


@dataclass
class ProgramSums:
    """What an adjoint program summed up over samples and evaluations.

    matrix: by native number, of its values, float64.  vectors: by native number, of row vectors that have a sum.
    times, time_cotangents: points in time [n], and the cotangents [n, rows] of the time answers there.
    """

    matrix: Callable[[int], Tensor]
    vectors: dict[int, Tensor]
    times: Tensor
    time_cotangents: Tensor


class GraphNativeEngine(NativeEngine):
    """An engine that runs the programs of `lower`."""

    def __init__(self, field: GraphField, plan: DivergencePlan | None = None) -> None:
        super().__init__(field, plan)
        self._values: list[Tensor] = []
        self._take(field)

    # ---- the field's numbers

    def _take(self, field: GraphField) -> None:
        """The field's numbers of now. A copy: the program of a gradient is packed when one is asked for, and the field's
        own may have changed by then."""
        self._field = field
        present = [part.values.detach() for part in field.parts]
        with torch.inference_mode(False), torch.no_grad():  # memory that is written again outside of it too
            if self._values:
                torch._foreach_copy_(self._values, present)
            else:
                self._values = [values.clone(memory_format=torch.contiguous_format) for values in present]

    def _takes_over(self, field: GraphField) -> bool:
        if field.graph is not self._field.graph or field.output is not self._field.output:
            return False
        return (field.dtype, field.device) == (self.dtype, self.device)

    @torch.no_grad()
    def renew(self, program: GraphProgram) -> None:
        """Tells a program the present numbers of the field's parts."""
        self._tell(program, program.native)
        if program.time is not None:
            self.renew(program.time)
        program.stamp = self.stamp

    def _tell(self, program: GraphProgram, numbers: Any) -> None:
        """numbers: what takes them, by `set_values` and `set_vector`."""
        like, of_part = torch.empty(0, dtype=self.dtype, device=self.device), self._values.__getitem__
        for number, matrix in program.matrices:
            numbers.set_values(number, matrix.values(of_part, like))
        for number, part, entries in program.plain:
            numbers.set_vector(number, of_part(part) if entries is None else of_part(part)[entries.to(self.device)])
        changed = program.computed if program.stamp >= 0 else [*program.computed, *program.constant]
        for (number, _), value in zip(changed, self._numbers(program, [node for _, node in changed])):
            numbers.set_vector(number, value)

    def _numbers(self, program: GraphProgram, nodes: Sequence[Node]) -> Sequence[Tensor]:
        """[rows] of nodes that follow from the parameters alone."""
        return [value[0] for value in self._in_torch(nodes, {})] if nodes else ()

    # ---- what comes with a call

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

    def _state_and_time(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor | float, bool]:
        """(the rows of a program's state, its time, whether every sample has its own, which is a last row then)."""
        x = self._ready(x, "y")
        if isinstance(t, Tensor) and t.numel() > 1:
            return torch.cat((x, t.detach().reshape(-1, 1).to(x)), 1), 0.0, True
        return x, t, False

    def _context(
        self, program: GraphProgram, context: Tensor | None, noise: Tensor | None, batch: int
    ) -> Tensor | None:
        """The rows [batch, rows] that follow from the context, for this call."""
        nodes = program.writer.contexts
        if not nodes:
            return None
        with torch.no_grad():
            values = self._in_torch(nodes, {"context": context, "noise": noise})
            return torch.cat([value.expand(batch, node.rows) for value, node in zip(values, nodes)], 1).contiguous()

    def _in_torch(self, nodes: Sequence[Node], inputs: dict, parts: Sequence[Tensor] | None = None) -> list[Tensor]:
        parts = self._values if parts is None else parts
        inputs = {name: value for name, value in inputs.items() if value is not None}
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return evaluate(nodes, inputs, lambda n: parts[n], like=like)

    @torch.no_grad()
    def _answer_in_torch(self, timed: Sequence[Node], times: Sequence[float]) -> Tensor:
        """The time answers [times, rows] where some of what depends on time is a function in Python."""
        values = self._in_torch(timed, {"time": torch.tensor(times, dtype=self.dtype, device=self.device)[:, None]})
        return torch.cat([value.expand(len(times), value.shape[1]) for value in values], 1)

    # ---- evaluations

    def evaluate(self, t: Tensor | float, y: Tensor, context: Tensor | None = None) -> Tensor:
        wants_noise = self.plan is not None and self.plan.kind == "hutchinson"  # for the trace, which nobody asks for here
        return self._run(t, y, y.new_zeros(len(y), self.dim) if wants_noise else None, context)[0]

    def evaluate_with_divergence(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.plan is None:
            raise ValueError("this engine was packed without a divergence: pack it with a plan")
        return self._run(t, x, noise, context)

    def _run(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(f, the trace, or None without a divergence). An engine has this one, or both of the above."""
        raise NotImplementedError

    # ---- gradients

    def no_gradient(self, wanted: Collection[str], request: SolveRequest | None = None) -> str | None:
        if request is not None:
            return super().no_gradient([name for name in wanted if name != "noise"], request)
        return None

    def _no_adjoint(self) -> None:
        return None

    def _gradient(
        self, program: GraphProgram, sums: ProgramSums, context: Tensor | None, noise: Tensor | None,
        grad_rows: Tensor | None, wanted: Collection[str],
    ) -> tuple[Gradient, float]:  # fmt: skip
        """What native sums are carried on to: the parts, the context and the noise; and the gradient of the time."""
        writer, dtype = program.writer, self.dtype
        parts = self._values
        of_parts: list[Tensor | None] = [None] * len(parts)

        def give(part: int, grad: Tensor, entries: Tensor | None = None) -> None:
            if of_parts[part] is None:
                if entries is None:
                    of_parts[part] = grad
                    return
                of_parts[part] = grad.new_zeros(len(parts[part]), dtype=torch.float64)
            if entries is None:
                of_parts[part] = of_parts[part] + grad
            else:
                of_parts[part].index_add_(0, entries.to(grad.device), grad)

        made, of_vector = self._parts(program, sums, give) if "tensors" in wanted else ([], [])
        times_too = not {"tensors", "t", "times"}.isdisjoint(wanted)
        of_vector, timed, of_time, further = self._behind(program, sums, of_vector, times_too)
        for more in further:
            for own, others in zip((made, of_vector), self._parts(*more, give)):
                own += others
        named: dict[str, Tensor | None] = {}
        if made or of_vector or timed or grad_rows is not None:
            named, own = self._carry_on(writer, sums, parts, give, made, of_vector, timed, context, noise, grad_rows)
            of_time += own
        found = Gradient(tensors=())
        if "tensors" in wanted:
            found.tensors = tuple(
                torch.zeros_like(part) if total is None else total.to(dtype) for part, total in zip(parts, of_parts)
            )
        for name, like in (("context", context), ("noise", noise)):
            if name in wanted and like is not None:
                setattr(found, name, torch.zeros_like(like) if named.get(name) is None else named[name])
        return found, of_time

    def _parts(
        self, program: GraphProgram, sums: ProgramSums, give: Callable[..., None]
    ) -> tuple[list[tuple[Matrix, Tensor]], list[tuple[Node, Tensor]]]:
        """Gives the gradients of what are values of parts, and returns the others: of matrices that were computed, and of
        row vectors that were."""
        made = []
        for number, matrix in program.writer.gradients:
            grad = sums.matrix(number)
            if matrix.made is not None:
                made.append((matrix, grad.to(self.dtype)))
            else:
                give(matrix.part, grad, matrix.entries)
        for number, part, entries in program.plain:
            if number in sums.vectors:
                give(part, sums.vectors[number], entries)
        return made, [(node, sums.vectors[number]) for number, node in program.computed if number in sums.vectors]

    def _behind(
        self, program: GraphProgram, sums: ProgramSums, of_vector: list[tuple[Node, Tensor]], times_too: bool
    ) -> tuple[list[tuple[Node, Tensor]], Sequence[Node], float, list[tuple[GraphProgram, ProgramSums]]]:
        """Gradients of numbers, carried on by programs: (those that are left for torch, the nodes of the time answer if they
        are, what reaches the time, the programs and what they summed up). An engine without such programs leaves all.

        times_too: whether anybody wants what the time answer's gradients lead to."""
        return of_vector, program.writer.timed if times_too else (), 0.0, []

    def _carry_on(
        self, writer: GraphWriter, sums: ProgramSums, parts: Sequence[Tensor], give: Callable[[int, Tensor], None],
        made: Sequence[tuple[Matrix, Tensor]], of_vector: Sequence[tuple[Node, Tensor]], timed: Sequence[Node],
        context: Tensor | None, noise: Tensor | None, grad_rows: Tensor | None,
    ) -> tuple[dict[str, Tensor | None], float]:  # fmt: skip
        """By autograd, through what was computed in torch: ({name of an input: its gradient}, the gradient of time)."""
        dtype = self.dtype
        times = sums.times.to(dtype) if timed else torch.empty(0, dtype=dtype, device=self.device)
        with torch.enable_grad():
            leaves = [part.clone().requires_grad_() for part in parts]
            inputs = {"context": context, "noise": noise, "time": times[:, None] if len(times) else None}
            inputs = {name: value.detach().requires_grad_() for name, value in inputs.items() if value is not None}
            outputs = [matrix.values(leaves.__getitem__, times) for matrix, _ in made]
            grads = [grad for _, grad in made]
            for (_, grad), value in zip(of_vector, self._in_torch([node for node, _ in of_vector], {}, leaves)):
                outputs.append(value[0])
                grads.append(grad.to(dtype))
            if len(times):
                cotangents = sums.time_cotangents.to(dtype).reshape(len(times), -1)
                outputs += self._in_torch(timed, {"time": inputs["time"]}, leaves)
                grads += cotangents.split([node.rows for node in timed], 1)
            if grad_rows is not None:
                given = {name: inputs[name] for name in ("context", "noise") if name in inputs}
                values = self._in_torch(writer.contexts, given, leaves)
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


def summands(trace: Node) -> list[Node]:
    """The terms of a sum."""
    found, waiting = [], [trace]
    while waiting:
        node = waiting.pop()
        if node.kind == "add":
            waiting += node.operands
        else:
            found.append(node)
    return found
