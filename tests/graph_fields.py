"""Modules whose vector fields are graphs, of the kinds that people write, for the engines that run on a GPU: each with a
state. `compiled` gives what an engine and the reference make of one."""

from __future__ import annotations

import sparseflow_kernels as sfk
import torch
from sparseflow_kernels.field import GraphField
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
