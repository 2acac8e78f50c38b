"""Positions that depend on the state or on t: where a value is largest, orders, lookups in tables at the state."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from torch import nn
from torch.nn import functional as F

import sparseflow_kernels as sfk
from test_capture_graph import FLAT, check, made, net

F64 = torch.float64
NET = lambda: {"n": net(3, 6, 3)}
EXPERTS = lambda: {"n": net(3, 8, 4), "e": nn.ModuleList(net(3, 4, 3) for _ in range(4))}
TABLE = lambda *shape: nn.Parameter(torch.randn(*shape))
IMAGE = torch.zeros(2, 2, 4, 4, dtype=F64)


def routed(m, t, y):
    """A mixture of experts with the two best gates."""
    values, chosen = m.n(y).topk(2, -1)
    gates = torch.zeros(len(y), 4, dtype=F64).scatter(1, chosen, values.softmax(-1))
    return (gates[:, None] * torch.stack([e(y) for e in m.e], -1)).sum(-1)


def switched(m, t, y):
    """The best expert's answer."""
    logits = m.n(y)
    answers = torch.stack([e(y) for e in m.e], 1)
    best = logits.argmax(-1)
    return answers.gather(1, best[:, None, None].expand(-1, 1, 3))[:, 0] + F.one_hot(best, 4).to(y) @ m.w


def bilinear(m, t, y):
    """A look at a map as it is written by hand."""
    at = y[:, :2].clamp(-0.9, 0.9) * 2.4 + 2.4
    low = at.floor().long()
    fx, fy = (at - low).unbind(-1)
    ix, iy = low.unbind(-1)
    top = m.map[iy, ix] * (1 - fx) + m.map[iy, ix + 1] * fx
    bottom = m.map[iy + 1, ix] * (1 - fx) + m.map[iy + 1, ix + 1] * fx
    return (top * (1 - fy) + bottom * fy)[:, None] * m.n(y)


def interpolated(m, t, y):
    """np.interp at the state, in torch."""
    i = torch.searchsorted(m.knots, y.detach().contiguous()).clamp(1, 4)
    x0, x1, f0, f1 = m.knots[i - 1], m.knots[i], m.f[i - 1], m.f[i]
    return m.n(y) * (f0 + (y.clamp(-1, 1) - x0) / (x1 - x0) * (f1 - f0))


KNOTS = torch.tensor([-1.0, -0.4, 0.1, 0.5, 1.0])
FIELDS = {
    "argmax": (lambda m, t, y: m.n(y) * y.argmax(-1, keepdim=True) - m.n(y).argmin(-1)[:, None], NET, FLAT),
    "the position of a maximum": (lambda m, t, y: m.n(y) * y.max(1, keepdim=True).indices + y.min(1).indices[:, None], NET, FLAT),
    "argsort": (lambda m, t, y: m.n(y).gather(1, m.n(y).argsort(1)) + y.take_along_dim(y.sort(1, descending=True)[1], 1), NET, FLAT),
    "topk": (lambda m, t, y: m.n(y) * m.n(y).topk(2, 1)[1].sum(1, keepdim=True), NET, FLAT),
    "few of many": (lambda m, t, y: m.n(y) * m.n(y).topk(2, 1, largest=False).indices.sum(1, keepdim=True),
                    lambda: {"n": net(30, 4, 30)}, torch.zeros(3, 30, dtype=F64)),
    "quantile": (lambda m, t, y: y * m.n(y).quantile(0.3, dim=1, keepdim=True) - y.median(1, keepdim=True).indices, NET, FLAT),
    "the last of the best": (lambda m, t, y: m.n(y) + y.cummax(1).indices * y.cummin(1)[1], NET, FLAT),
    "experts": (routed, EXPERTS, FLAT),
    "one expert": (switched, lambda: {**EXPERTS(), "w": TABLE(4, 3)}, FLAT),
    "nearest neighbours": (
        lambda m, t, x: (x.gather(1, torch.cdist(x, x.detach()).topk(3, -1, largest=False)[1][..., 1:].reshape(len(x), -1, 1)
                                  .expand(-1, -1, 2)).view(len(x), 5, 2, 2).mean(2) - x) @ m.w, lambda: {"w": TABLE(2, 2)}, torch.zeros(2, 5, 2, dtype=F64)),
    "a map": (bilinear, lambda: {**NET(), "map": TABLE(6, 6)}, FLAT),
    "knots": (interpolated, lambda: {**NET(), "knots": KNOTS, "f": TABLE(5)}, FLAT),
    "buckets": (lambda m, t, y: m.n(y) * m.f[torch.bucketize(y, m.knots, right=True)] - m.f[torch.bucketize(y, m.knots)],
                lambda: {**NET(), "knots": KNOTS, "f": TABLE(6)}, FLAT),
    "an embedding": (lambda m, t, y: m.n(y) + m.e(torch.bucketize(y[:, 0], m.knots)) + m.e((t * 2).long().clamp(0, 5)),
                     lambda: {**NET(), "knots": KNOTS, "e": nn.Embedding(6, 3)}, FLAT),
    "numbers of the state": (lambda m, t, y: m.n(y) * ((y > 0).sum(1, keepdim=True) + (2 * y).int().clamp(-1, 1)).to(y), NET, FLAT),
    "from the end": (lambda m, t, y: m.n(y) * m.f[y.long().clamp(-2, 2)], lambda: {**NET(), "f": TABLE(4)}, FLAT),
    "written": (lambda m, t, y: torch.ones_like(y).scatter_add(1, y.argsort(1)[:, :2], m.n(y)[:, :2]).scatter(1, y.argmax(1, True), 0.5), NET, FLAT),
    "pooling": (
        lambda m, t, x: F.interpolate(F.max_pool2d(m.c(x), 3, 2, 1), scale_factor=2) + F.adaptive_max_pool2d(x, 3).mean((2, 3), keepdim=True)
        * F.max_pool2d(x, 2, return_indices=True)[1].to(x).mean((2, 3), keepdim=True), lambda: {"c": nn.Conv2d(2, 2, 3, padding=1)}, IMAGE),
    "rows at t": (lambda m, t, y: m.n(y)[:, (t > 0.5).long() + torch.arange(2)].repeat(1, 2)[:, :3] * y, NET, FLAT),
    "unpooled": (
        lambda m, t, x: F.max_unpool2d(m.c(F.max_pool2d(x, 2)), F.max_pool2d(x, 2, return_indices=True)[1], 2)
        + torch.func.grad(lambda z: F.max_pool2d(m.c(z), 3, 2, 1).square().sum())(x), lambda: {"c": nn.Conv2d(2, 2, 1)}, IMAGE),
    "a single sample": (lambda m, t, y: m.n(y) * y[y.argmax()] + m.f[y.argmin()], lambda: {**NET(), "f": TABLE(3)}, torch.zeros(3, dtype=F64)),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_positions(name: str) -> None:
    rule, parts, like = FIELDS[name]
    module = made(rule, parts)
    check(module, like, True)


TIES = {
    "max": lambda x: x.max(1).values[:, None] * x, "min": lambda x: x.min(1)[0][:, None] * x, "sort": lambda x: x.sort(dim=1, stable=True)[0] * torch.arange(3),
    "cummax": lambda x: x.cummax(1)[0] * torch.arange(3), "pooling": lambda x: x * F.max_pool1d(x[:, None], 3)[:, 0],
    "sort down": lambda x: x.sort(dim=1, descending=True, stable=True)[0] * torch.arange(3), "amax": lambda x: x.amax(1, keepdim=True) * x,
    "relu before a maximum": lambda x: (x - 1).relu().max(1).values[:, None] + x,
}  # fmt: skip


@pytest.mark.parametrize("name", TIES)
def test_equal_values_have_the_gradient_that_torch_gives_them(name: str) -> None:
    """States of zeros and ones are where solves begin."""
    module = made(lambda m, t, y: TIES[name](y), {})
    field = sfk.compile(module, like=FLAT)
    for y in (torch.ones(2, 3, dtype=F64), torch.tensor([[2.0, 1.0, 2.0], [0.0, 0.0, 1.0]], dtype=F64)):
        grads = []
        for f in (module, field):
            x = y.clone().requires_grad_()
            grads.append(torch.autograd.grad((f(torch.tensor(0.1, dtype=F64), x) * torch.tensor([1.0, 2.0, 4.0])).sum(), x)[0])
        torch.testing.assert_close(grads[1], grads[0])


class Path(nn.Module):
    """A cubic path for every sample, as torchcde holds it."""

    def __init__(self, knots, coefficients) -> None:
        super().__init__()
        self.register_buffer("_t", knots)
        for name, part in zip(("_b", "_two_c", "_three_d"), coefficients.chunk(3, -1)):
            self.register_buffer(name, part)

    def derivative(self, t):
        t = torch.as_tensor(t, dtype=self._b.dtype, device=self._b.device)
        index = torch.bucketize(t.detach(), self._t.detach()).sub(1).clamp(0, self._b.size(-2) - 1)
        part = (t - self._t[index]).unsqueeze(-1)
        return self._b[..., index, :] + (self._two_c[..., index, :] + self._three_d[..., index, :] * part) * part


def test_paths_of_controlled_equations_are_no_python() -> None:
    """Looked up once an evaluation, in numbers that are the samples' own, and followed when they are others."""
    rule = lambda m, t, z: (m.n(z).tanh().view(-1, 3, 2) @ m.path.derivative(t).unsqueeze(-1)).squeeze(-1)
    module = made(rule, lambda: {"n": net(3, 8, 6), "path": Path(torch.linspace(0, 1, 6), torch.randn(4, 5, 6))})
    field = sfk.compile(module, like=FLAT, live=True)
    assert field.engine_name == "cpu" and "general function" not in field.report()
    times, options = torch.tensor([0.0, 0.3, 1.1], dtype=F64), {"step_size": 0.1}
    for _ in range(2):
        results = []
        for f, odeint in ((module, torchdiffeq.odeint), (field, sfk.odeint)):
            y = torch.linspace(-1, 1, 12, dtype=F64).view(4, 3).requires_grad_()
            ys = odeint(f, y, times, method="rk4", options=options)
            results.append([ys.detach(), *torch.autograd.grad(ys[-1].square().sum(), [y, *module.parameters()])])
        for a, b in zip(*results):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
        module.path._b.mul_(-0.5)


def test_a_position_outside_of_a_table_is_no_number() -> None:
    field = sfk.compile(made(lambda m, t, y: y * m.f[(10 * t).long()], lambda: {"f": TABLE(8)}), like=FLAT)
    assert bool(field(0.35, torch.ones(2, 3, dtype=F64)).isfinite().all())
    with pytest.raises(sfk.SolverError, match="non_finite|finite"):
        sfk.odeint(field, torch.ones(2, 3, dtype=F64), torch.tensor([0.4, 0.9], dtype=F64))


def test_what_positions_cannot_do_is_refused() -> None:
    for rule, words in (
        (lambda m, t, y: y.index_copy(1, y[0].argsort(), y), "index_copy at an index"),
        (lambda m, t, y: y * m.big[y.long().clamp(0, 4000)], "4001 places|1024"),
        (lambda m, t, y: y * y.flatten().unique().sum(), "size that its values say"),
    ):
        with pytest.raises(sfk.UnsupportedFieldError, match=words):
            sfk.compile(made(rule, lambda: {"big": torch.randn(4001)}), like=FLAT)
