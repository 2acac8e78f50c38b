"""Penalties on a flow's dynamics, integrated beside its log-density as further rows of the state.

Per sample and over d dimensions, along the trajectory: "kinetic" |f|^2 / d (Finlay et al. 2020, RNODE), "jacobian"
|df/dx|_F^2 / d, by the Hutchinson probe |(df/dx) e|^2 / d where the divergence is estimated by it, and "directional"
|(df/dx) f|^2 / d, how much the velocity changes along the path. (FFJORD's l2int, JFrobint and dl2int are roots of such
squares; its directional derivative is f' df/dx.)

A compiled field is turned into one graph, (x, l, penalties) -> their derivatives, made of the field's own nodes, so
that an engine integrates all rows in one solve and gives its gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from .. import gradients
from ..compiled_field import CompiledField
from ..engines import reference_engine
from ..field import GraphField
from ..field.from_chain import graph_of_chain
from ..field.graph import Graph, Node, order
from ..field.transforms import tangent
from ..odeint import solve
from ..packing import Packing
from ..solution import SolverError, Stats
from ..solving.arguments import request_of, upward

PENALTIES = ("kinetic", "jacobian", "directional")


def checked_penalties(penalties: dict[str, float] | None) -> dict[str, float]:
    """Name -> weight. Raises ValueError for unknown names and weights that are not above 0."""
    found = dict(penalties or {})
    for name, weight in found.items():
        if name not in PENALTIES:
            raise ValueError(f"penalties must be named {', '.join(PENALTIES)}; got {name!r}")
        if not weight > 0.0:
            raise ValueError(f"penalties[{name!r}] must be above 0, got {weight!r}")
    return found


class RegularisedSolves:
    """Solves of one field with its log-density and penalties. kind: of the divergence.  names: of the penalties."""

    def __init__(self, field: nn.Module, kind: str, names: Sequence[str]) -> None:
        self.field, self.kind, self.names = field, kind, tuple(names)
        if isinstance(field, CompiledField):
            if field.layout is not None or field.has_context:
                raise ValueError("penalties: need fields of states [batch, dim] without numbers per sample")
            self._packing = Packing("auto" if field.requested not in ("reference", "cpu") else field.requested)
            self._graph: tuple[Any, GraphField] | None = None

    def __call__(
        self, x: Tensor, change: Tensor, probe: Tensor | None, times: Tensor, settings: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Stats]:
        """(x at the end [n, dim], l [n], penalties [n, names], how it went). times: two.  settings: rtol, atol, method,
        options of the solver. Raises SolverError for a compiled field's solve that cannot go on."""
        if isinstance(self.field, CompiledField):
            return self._by_engine(x, change, probe, times, settings)
        wanted = _Plain(self.field, probe, self.names)
        state = (x, change, *(x.new_zeros(len(x)) for _ in self.names))
        solution = solve(wanted, state, times, **settings)
        x, change, *sums = (part[-1] for part in solution.ys)
        return x, change, torch.stack(sums, 1), solution.stats

    def _by_engine(
        self, x: Tensor, change: Tensor, probe: Tensor | None, t: Tensor, settings: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Stats]:
        field = self.field
        if self._graph is None or self._graph[0] is not field.skeleton:
            skeleton = field.skeleton
            chain = skeleton if isinstance(skeleton, GraphField) else graph_of_chain(skeleton)
            self._graph = skeleton, augmented(chain, self.kind, self.names)
        given = iter(field.ordered())
        made = self._graph[1].map_tensors(lambda _: next(given))
        engine = self._packing.engine(None, list(field._tensors()), lambda: made)
        times, sign = upward(t, x.device)
        method, parts = settings["method"] or "dopri5", 2 + len(self.names)
        rtol, atol = ((float(settings[name]),) * parts for name in ("rtol", "atol"))
        state = torch.cat((x, change.unsqueeze(1), x.new_zeros(len(x), len(self.names))), 1)
        request = request_of(state, None, None, t, times, sign, rtol, atol, method, dict(settings["options"] or {}))
        request = replace(request, context=probe, parts=(field.dim, *(1,) * (parts - 1)))
        engine = reference_engine(made) if engine.differentiable else engine
        result = gradients.solve(engine, lambda: reference_engine(made), request)
        if result.status != "ok":
            raise SolverError.of(result, request, (result.xs,), False)
        end = result.xs[-1]
        stats = Stats(result.nfe, result.accepted, result.rejected, result.steps, engine.name, method, "shared")
        return end[:, : field.dim], end[:, field.dim], end[:, field.dim + 1 :], stats


def augmented(field: GraphField, kind: str, names: Sequence[str]) -> GraphField:
    """(x, l, penalties) -> (f, -div f, penalties' integrands) as one graph over the same parts; the probe is its
    context."""
    g = Graph()
    state, time, context = GraphField.inputs(
        g, field.dim + 1 + len(names), field.dim if kind == "hutchinson" else 0
    )
    x = g.select(state, torch.arange(field.dim))
    f = _rebuilt(g, field, {field.state: x, field.time: time})
    if context is None:
        directions = [g.constant(unit) for unit in torch.eye(field.dim, dtype=torch.float64)]
    else:
        directions = [context]
    trace, squares = None, None
    for e in directions:
        (dot,) = tangent(g, [f], {x: e})
        dot = g.zeros(field.dim) if dot is None else g.spread(dot, field.dim)
        trace = g.add(trace, g.total(g.mul(e, dot)))
        squares = g.add(squares, g.total(g.square(dot)))
    rows = [f, g.neg(trace)]
    for name in names:
        if name == "kinetic":
            integrand = g.total(g.square(f))
        elif name == "jacobian":
            integrand = squares
        else:
            (dot,) = tangent(g, [f], {x: f})
            integrand = g.zeros(1) if dot is None else g.total(g.square(g.spread(dot, field.dim)))
        rows.append(g.scaled(integrand, 1.0 / field.dim))
    return GraphField(g, state, time, context, g.concatenate(rows), field.parts, field.device, field.dtype)


def _rebuilt(g: Graph, field: GraphField, known: dict[Node, Node]) -> Node:
    """The field's output in another builder, with other nodes for its inputs."""
    made = dict(known)
    for node in order([field.output], stop=lambda node: node in made):
        if node not in made:
            made[node] = replace(node, operands=tuple(made[operand] for operand in node.operands))
            if node in field.graph.activations:
                activation, z = field.graph.activations[node]
                if z in made:
                    g.activations[made[node]] = (activation, made[z])
    return g.spread(made[field.output], field.dim)


class _Plain(nn.Module):
    """The same of any module f(t, x), by autograd: what the graph is held to."""

    def __init__(self, field: nn.Module, probe: Tensor | None, names: Sequence[str]) -> None:
        super().__init__()
        self.field, self.probe, self.names = field, probe, names

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            x = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
            f = self.field(t, x)

            def product(direction: Tensor) -> Tensor:
                """(df/dx) direction, by the derivative of a transposed product."""
                dummy = torch.zeros_like(f, requires_grad=True)
                (pulled,) = torch.autograd.grad(f, x, dummy, create_graph=True)
                (pushed,) = torch.autograd.grad(pulled, dummy, direction, create_graph=True)
                return pushed

            units = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            directions = [unit.expand_as(x) for unit in units] if self.probe is None else [self.probe]
            dots = [product(e) for e in directions]
            trace = sum((e * dot).sum(1) for e, dot in zip(directions, dots))
            integrands = {
                "kinetic": lambda: f.square().mean(1), "directional": lambda: product(f).square().mean(1),
                "jacobian": lambda: sum(dot.square().mean(1) for dot in dots),
            }  # fmt: skip
            found = (f, -trace, *(integrands[name]() for name in self.names))
        return found if wanted else tuple(part.detach() for part in found)
