"""Modules whose vector fields are graphs, of the kinds that people write, for the engines that run on a GPU: each with a
state; and what an engine makes of such a field, against the reference engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import sparseflow_kernels as sfk
import torch
from sparseflow_kernels import divergence
from sparseflow_kernels.engines.base import SolveRequest
from sparseflow_kernels.engines.graph_reference import GraphReferenceEngine
from sparseflow_kernels.field import GraphField
from sparseflow_kernels.numerics.step_control import StepOptions
from sparseflow_kernels.numerics.tableaus import METHODS
from test_compiled_graph import Net, gru, hamiltonian, points, residual
from torch import Tensor, nn

F64 = torch.float64


def conditional():
    def rule(s, t, x):
        embedding = torch.cat([torch.sin(s.frequency * t), torch.cos(s.frequency * t)])
        h = s.a(torch.cat([x, s.context, embedding.expand(len(x), 6)], 1))
        return s.b(torch.nn.functional.silu(h)) * torch.sigmoid(s.gate(s.context))

    module = Net(rule, a=nn.Linear(10, 12), b=nn.Linear(12, 2), gate=nn.Linear(2, 2),
                 frequency=nn.Parameter(torch.tensor([1.0, 2.0, 4.0])))
    module.context = torch.linspace(-1, 1, 10, dtype=F64).view(5, 2)
    return module, (5, 2)


def lookup():
    def rule(s, t, y):
        return s.b(torch.tanh(s.a(y))) * s.table[torch.searchsorted(s.knots, t).clamp(max=3)] + y

    module = Net(rule, a=nn.Linear(3, 6), b=nn.Linear(6, 3))
    module.register_buffer("table", torch.randn(4, 3))
    module.register_buffer("knots", torch.tensor([0.0, 0.5, 1.0, 2.0]))
    return module, (4, 3)


def mixed():
    """Several activations at once, a slice that is read again, two hidden depths."""

    def rule(s, t, y):
        h = torch.cat([torch.tanh(s.a(y)), torch.sin(s.b(y)), torch.nn.functional.softplus(s.c(y[:, 1:3]))], 1)
        return s.d(h) + y * torch.exp(-t) - h[:, 2:5] ** 2 / (1.5 + torch.abs(y))

    return Net(rule, a=nn.Linear(3, 4), b=nn.Linear(3, 4), c=nn.Linear(2, 4), d=nn.Linear(12, 3)), (5, 3)


def second_order():
    def rule(s, t, state):
        x, v = state
        return v, s.net(torch.cat([x, v], 1)) - x

    return Net(rule, net=nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))), None


FIELDS = {
    "residual": residual, "gru": gru, "hamiltonian": hamiltonian, "conditional": conditional, "lookup": lookup,
    "mixed": mixed, "points": points,
}  # fmt: skip


def made(make, dtype: torch.dtype = F64):
    """(module, a state of it)."""
    torch.manual_seed(0)
    module, shape = make()
    module = module.to(dtype).eval()
    if hasattr(module, "context"):
        module.context = module.context.to(dtype)
    if shape is None:
        return module, (torch.randn(4, 2).to(dtype), 10 * torch.randn(4, 2).to(dtype))
    return module, 0.5 * torch.randn(shape, dtype=dtype)


def graph_of(make, dtype: torch.dtype = F64) -> tuple[GraphField, Tensor, Tensor | None]:
    """(the field as plain data, rows of a state, its context)."""
    module, y0 = made(make, dtype)
    field = sfk.compile(module, "reference", like=y0)
    graph = field.vector_field
    assert isinstance(graph, GraphField), make
    x = y0 if field.layout is None else field.layout.flatten(y0)
    return graph, x.detach(), field.context_of(len(x))


@dataclass(frozen=True)
class Against:
    """An engine's class beside the reference, on a device. close(got, wanted, bound, what) is the tests' own."""

    engine: type
    device: torch.device
    close: Callable[..., None]
    bound: float = 1e-10

    def engines(self, field: GraphField, kind: str | None = None):
        field = field.map_tensors(lambda tensor: tensor.to(self.device))
        plan = None if kind is None else divergence.plan(field, kind)
        return self.engine(field, plan), GraphReferenceEngine(field, plan)

    def gradients(self, got, want, bound: float) -> None:
        for name in ("x", "t", "l", "times", "context", "noise"):
            one, other = getattr(got, name), getattr(want, name)
            self.close(None if one is None else one.cpu(), None if other is None else other.cpu(), bound, name)
        for number, (one, other) in enumerate(zip(got.tensors, want.tensors, strict=True)):
            self.close(one, other, bound, f"part {number}")

    def evaluations(
        self, field: GraphField, x: Tensor, context: Tensor | None, kind: str | None, times=(0.375,), bound: float | None = None
    ) -> None:  # fmt: skip
        """Values, traces and the gradients of both."""
        bound = self.bound if bound is None else bound
        generator = torch.Generator().manual_seed(3)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64).to(x)
        x, context = x.to(self.device), None if context is None else context.to(self.device)
        own, reference = self.engines(field, kind)
        noise = normal(*x.shape) if kind == "hutchinson" else None
        given = {} if context is None else {"context": context}
        wanted = {"x", "t", "context", "tensors", *(("noise",) if noise is not None else ())}
        for t in times:
            t = torch.as_tensor(t, dtype=x.dtype, device=self.device)
            if kind is None:
                self.close(own.evaluate(t, x, context), reference.evaluate(t, x, context), bound, "f")
            else:
                found = own.evaluate_with_divergence(t, x, noise, context)
                for one, other in zip(found, reference.evaluate_with_divergence(t, x, noise, context)):
                    self.close(one, other, bound, "f and trace")
            of_f, of_trace = normal(*x.shape), None if kind is None else normal(len(x))
            self.gradients(
                own.evaluate_backward(t, x, noise, of_f, of_trace, wanted, **given),
                reference.evaluate_backward(t, x, noise, of_f, of_trace, wanted, **given), bound,
            )  # fmt: skip

    def solves(
        self, field: GraphField, x: Tensor, context: Tensor | None, kind: str | None = None, method: str = "dopri5", *,
        bound: float = 1e-9, gradient: bool = True, times=(0.0, 0.1, 0.3), **more,
    ) -> None:  # fmt: skip
        """The same steps, states and gradients."""
        x, context = x.to(self.device), None if context is None else context.to(self.device)
        own, reference = self.engines(field, kind)
        generator = torch.Generator().manual_seed(4)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64).to(x)
        noise = normal(*x.shape) if kind == "hutchinson" else None
        tolerance = (1e-4,) * (1 if kind is None else 2)
        request = SolveRequest(**dict(
            x=x, l=None if kind is None else x.new_zeros(len(x)), times=torch.tensor(times, dtype=F64), sign=1,
            tableau=METHODS[method], rtol=tolerance, atol=tolerance, options=StepOptions(first_step=0.1), noise=noise,
            record=True, context=context,
            grid=torch.linspace(times[0], times[-1], 3, dtype=F64) if method in ("rk4", "midpoint") else None,
        ) | more)  # fmt: skip
        got, want = own.solve(request), reference.solve(request)
        assert (got.status, got.nfe, got.accepted, got.rejected) == (want.status, want.nfe, want.accepted, want.rejected)
        self.close(got.xs, want.xs, bound, "xs")
        self.close(got.ls, want.ls, bound, "ls")
        if gradient:
            wanted = {"x", "tensors", "context", *(("l",) if kind else ()), *(("times",) if method == "dopri5" else ())}
            wanted |= {"noise"} if noise is not None else set()
            assert own.no_gradient(wanted, request) is None
            xs, ls = normal(*got.xs.shape), None if kind is None else normal(*got.ls.shape)
            self.gradients(
                own.solve_backward(request, got, xs, ls, wanted), reference.solve_backward(request, want, xs, ls, wanted), bound
            )
