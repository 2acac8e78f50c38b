"""What the engines that run graphs as programs have in common: what comes with a call, whose numbers go where, and how the
sums of an adjoint program become gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Collection, Sequence

import torch
from torch import Tensor

from ..field import GraphField, Node
from ..field.graph import evaluate
from .base import Gradient
from .lower import GraphWriter
from .native import NativeEngine


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

    def _takes_over(self, field: GraphField) -> bool:
        if field.graph is not self._field.graph or field.output is not self._field.output:
            return False
        return (field.dtype, field.device) == (self.dtype, self.device)

    def _no_adjoint(self) -> None:
        return None

    def no_gradient(self, wanted: Collection[str], request=None) -> str | None:
        if request is not None:
            return super().no_gradient([name for name in wanted if name != "noise"], request)
        return None

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

    def _ready_point(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor | float, bool]:
        """(the rows of the program's state, its time, whether every sample has its own)."""
        x = self._ready(x, "y")
        if isinstance(t, Tensor) and t.numel() > 1:
            return torch.cat((x, t.detach().reshape(-1, 1).to(x)), 1), 0.0, True
        return x, t, False

    def _context_rows(
        self, writer: GraphWriter, context: Tensor | None, noise: Tensor | None, batch: int
    ) -> Tensor | None:
        """The rows [batch, rows] that follow from the context, for this call."""
        nodes = writer.contexts
        if not nodes:
            return None
        with torch.no_grad():
            values = self._evaluate_nodes(nodes, {"context": context, "noise": noise})
            return torch.cat([value.expand(batch, node.rows) for value, node in zip(values, nodes)], 1).contiguous()

    def _evaluate_nodes(
        self, nodes: Sequence[Node], inputs: dict, parts: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        parts = [part.values for part in self._field.parts] if parts is None else parts
        inputs = {name: value for name, value in inputs.items() if value is not None}
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return evaluate(nodes, inputs, lambda n: parts[n], like=like)

    @torch.no_grad()
    def _answer_in_torch(self, timed: Sequence[Node], times: Sequence[float]) -> Tensor:
        """The time answers [times, rows] where some of what depends on time is a function in Python."""
        points = torch.tensor(times, dtype=self.dtype, device=self.device)[:, None]
        values = self._evaluate_nodes(timed, {"time": points})
        return torch.cat([value.expand(len(times), value.shape[1]) for value in values], 1)

    # ---- the present numbers of the field's parts

    def _numbers(self, writer: GraphWriter) -> tuple[list[tuple[int, Tensor]], list[tuple[int, Tensor]]]:
        """(values of matrices that are trained or made, values of row vectors), by native number."""
        parts, like = self._field.parts, torch.empty(0, dtype=self.dtype, device=self.device)
        of_part = lambda number: parts[number].values
        matrices = [(n, matrix.values(of_part, like)) for n, matrix in writer.matrices if not matrix.constant]
        nodes = [node for _, node in writer.vectors]
        values = evaluate(nodes, {}, of_part, like=like)
        return matrices, [(number, value[0]) for (number, _), value in zip(writer.vectors, values)]

    # ---- gradients

    def _gradient(
        self, writer: GraphWriter, sums: ProgramSums, context: Tensor | None, noise: Tensor | None,
        grad_rows: Tensor | None, wanted: Collection[str],
    ) -> tuple[Gradient, float]:  # fmt: skip
        """What native sums are carried on to: the parts, the context and the noise; and the gradient of the time."""
        dtype = self.dtype
        parts = [part.values.detach() for part in self._field.parts]
        of_parts: list[Tensor | None] = [None] * len(parts)
        made = []
        for number, matrix in writer.gradients:
            grad = sums.matrix(number)
            if matrix.made is not None:
                made.append((matrix, grad.to(dtype)))
                continue
            if of_parts[matrix.part] is None:
                of_parts[matrix.part] = grad.new_zeros(len(parts[matrix.part]))
            if matrix.entries is None:
                of_parts[matrix.part] += grad
            else:
                of_parts[matrix.part].index_add_(0, matrix.entries.to(grad.device), grad)
        times = sums.times.to(dtype) if writer.timed else torch.empty(0, dtype=dtype, device=self.device)
        with torch.enable_grad():
            leaves = [part.clone().requires_grad_() for part in parts]
            inputs = {"context": context, "noise": noise, "time": times[:, None] if len(times) else None}
            inputs = {name: value.detach().requires_grad_() for name, value in inputs.items() if value is not None}
            outputs = [matrix.values(leaves.__getitem__, times) for matrix, _ in made]
            grads = [grad for _, grad in made]
            of_vector = [(node, sums.vectors[number]) for number, node in writer.vectors if number in sums.vectors]
            for (_, grad), value in zip(of_vector, self._evaluate_nodes([node for node, _ in of_vector], {}, leaves)):
                outputs.append(value[0])
                grads.append(grad.to(dtype))
            if len(times):
                cotangents = sums.time_cotangents.to(dtype).reshape(len(times), -1)
                outputs += self._evaluate_nodes(writer.timed, {"time": inputs["time"]}, leaves)
                grads += cotangents.split([node.rows for node in writer.timed], 1)
            if grad_rows is not None:
                given = {name: inputs[name] for name in ("context", "noise") if name in inputs}
                values = self._evaluate_nodes(writer.contexts, given, leaves)
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
