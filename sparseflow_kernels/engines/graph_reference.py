"""The reference engine of graphs: plain PyTorch on dense weights. It defines what a graph, its divergence and a solve
mean. The exact divergence is the Jacobian's diagonal, column by column."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Collection, Sequence

import torch
from torch import Tensor, nn

from ..divergence import DivergencePlan
from ..field import GraphField, Node
from ..field.graph import STATE, evaluate, order
from ..field.transforms import tangent
from ..numerics.adaptive import solve_request
from .base import Gradient, SolveRequest, SolveResult
from .reference import ReferenceEngine, lent, own_precision

SEED = "seed"  # a further input: the direction of a tangent


class GraphReferenceEngine(ReferenceEngine):
    """Runs any graph, in float32 and float64, on the CPU and on GPUs. Results are differentiable in the state, the time, the
    noise, the context and every part of the field."""

    @staticmethod
    def unsupported(field: GraphField) -> str | None:
        if not field.dtype.is_floating_point:
            return f"the field's dtype is {field.dtype}, not floating point; convert the module first"
        return None

    def __init__(self, field: GraphField, plan: DivergencePlan | None = None) -> None:
        self.field = field
        self.plan = plan

    def evaluate(self, t: Tensor | float, y: Tensor, context: Tensor | None = None) -> Tensor:
        """dy/dt [batch, dim] of y [batch, dim]. t: 0-d, or [batch], a time per sample.  context: [batch, context]; a field
        that has one raises ValueError without it."""
        with own_precision(y):
            return self._values([self.field.output], t, y, context)[0]

    def evaluate_with_divergence(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.plan is None:
            raise ValueError("evaluate_with_divergence: this engine was packed without a divergence plan")
        with own_precision(x):
            return self._with_divergence(t, x, noise, context)

    def solve(self, request: SolveRequest) -> SolveResult:
        def f(t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor | None]:
            if self.plan is None:
                return self.evaluate(t, x, request.context), None
            dx, trace = self._with_divergence(t, x, request.noise, request.context)
            return dx, -trace

        with own_precision(request.x):
            return SolveResult(**vars(solve_request(request, f)))

    # ------------------------------------------------------------------------------------------------- gradients

    def tensors(self) -> list[Tensor]:
        functions = {id(p): p for module in _time_modules(self.field) for p in module.parameters()}
        return [tensor for _, tensor in self.field.tensors()] + list(functions.values())

    def evaluate_backward(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, grad_f: Tensor, grad_trace: Tensor | None,
        wanted: Collection[str], graph: bool = False, context: Tensor | None = None,
    ) -> Gradient:  # fmt: skip
        def run(
            engine: GraphReferenceEngine, t: Tensor, x: Tensor, noise: Tensor | None, context: Tensor | None
        ) -> tuple[Tensor, ...]:
            if self.plan is None:
                return (engine.evaluate(t, x, context),)
            return engine.evaluate_with_divergence(t, x, noise, context)

        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        inputs = {"t": t, "x": x, "noise": noise, "context": context}
        return self._pull_back(run, inputs, (grad_f, grad_trace), wanted, graph)

    def solve_backward(
        self, request: SolveRequest, result: SolveResult, grad_xs: Tensor, grad_ls: Tensor | None,
        wanted: Collection[str], graph: bool = False,
    ) -> Gradient:  # fmt: skip
        def run(engine: GraphReferenceEngine, **inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
            again = engine.solve(replace(request, replay=result.steps, record=False, **inputs))
            return again.xs, again.ls

        inputs = {name: getattr(request, name) for name in ("x", "l", "times", "grid", "noise", "context")}
        return self._pull_back(run, inputs, (grad_xs, grad_ls), wanted, graph)

    def over(self, tensors: Sequence[Tensor]) -> GraphReferenceEngine:
        other = {id(own): tensor for own, tensor in zip(self.tensors(), tensors)}
        given = iter(tensors)
        engine = GraphReferenceEngine(self.field.map_tensors(lambda _: next(given)), self.plan)
        engine._functions = {id(module): lent(module, other) for module in _time_modules(self.field)}
        return engine

    # ------------------------------------------------------------------------------------------------- the formulas

    _functions: dict[int, Any] = {}

    def _values(
        self, outputs: Sequence[Node], t: Tensor | float, y: Tensor, context: Tensor | None,
        known: dict[Node, Tensor] | None = None, **more: Tensor | None,
    ) -> list[Tensor]:  # fmt: skip
        t = torch.as_tensor(t, dtype=y.dtype, device=y.device).reshape(-1, 1)
        inputs = {"state": y, "time": t, "context": context, **more}
        if context is None and self.field.context is not None:
            raise ValueError(f"this field has a context [batch, {self.field.context.rows}], and none was given")
        inputs = {name: value for name, value in inputs.items() if value is not None}
        parts = self.field.parts
        values = evaluate(outputs, inputs, lambda number: parts[number].values, known, self._functions)
        return [value.expand(len(y), value.shape[1]) for value in values]

    def _with_divergence(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        field, g = self.field, self.field.graph
        nodes = [node for node in order([field.output]) if node.kind != "input"]
        known = dict(zip(nodes, self._values(nodes, t, x, context)))
        dx = x if field.output is field.state else known[field.output] if nodes else None
        if dx is None:
            (dx,) = self._values([field.output], t, x, context)
        (dot,) = tangent(g, [field.output], {field.state: g.input(SEED, field.dim, STATE)})
        if dot is None:
            return dx, x.new_zeros(len(x))
        if self.plan.kind == "hutchinson":
            if noise is None:
                raise ValueError('evaluate_with_divergence: a "hutchinson" divergence needs noise [batch, dim]')
            (product,) = self._values([dot], t, x, context, known, **{SEED: noise})
            return dx, (noise * product).sum(1)
        trace = x.new_zeros(len(x))
        for column, unit in enumerate(torch.eye(field.dim, dtype=x.dtype, device=x.device)):
            (product,) = self._values([dot], t, x, context, known, **{SEED: unit[None]})
            trace = trace + product[:, column]
        return dx, trace


def _time_modules(field: GraphField) -> list[nn.Module]:
    return [node.function for node in field.functions if isinstance(node.function, nn.Module)]
