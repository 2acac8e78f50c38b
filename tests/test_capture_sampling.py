"""Images and potentials that are looked at at the state, exponentials and pseudo-inverses of matrices made of it, gamma
functions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparseflow_kernels as sfk
from test_capture_graph import check, made, net

F64 = torch.float64
PLACES = torch.zeros(4, 2, dtype=F64)
WAYS = list(itertools.product(("bilinear", "nearest"), ("zeros", "border", "reflection"), (False, True)))


@pytest.mark.parametrize("mode, padding, aligned", WAYS)
def test_looks_at_a_map(mode: str, padding: str, aligned: bool) -> None:
    def rule(m, t, y):
        seen = F.grid_sample(m.map.expand(len(y), -1, -1, -1), 0.7 * y[:, None, None], mode, padding, aligned)
        return seen[:, :, 0, 0] + m.n(y)

    module = made(rule, lambda: {"n": net(2, 4, 2), "map": nn.Parameter(torch.randn(1, 2, 4, 5))})
    check(module, PLACES, True)
    field = sfk.compile(module, like=PLACES)
    grads = []
    for f in (module, field):
        y = torch.linspace(-2.1, 1.9, 12, dtype=F64).view(6, 2).requires_grad_()
        grads.append(torch.autograd.grad(f(torch.tensor(0.2, dtype=F64), y).square().sum(), y)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)


def test_a_state_that_is_warped_by_itself() -> None:
    def rule(m, t, x):
        flow = torch.tanh(m.c(x)).permute(0, 2, 3, 1)
        return F.grid_sample(x, flow, align_corners=False) - x

    check(made(rule, lambda: {"c": nn.Conv2d(2, 2, 3, padding=1)}), torch.zeros(2, 2, 4, 4, dtype=F64), True)


MATRICES = {
    "an exponential": lambda h, y: torch.matrix_exp(h) @ y,
    "of a rotation": lambda h, y: torch.linalg.matrix_exp(h - h.mT) @ y,
    "of time": lambda h, y: torch.matrix_exp(0.3 * h + 1.0) @ y,
}


@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name: str) -> None:
    rule = lambda m, t, y: MATRICES[name](m.n(y).view(-1, 3, 3), y[:, :, None])[:, :, 0]
    check(made(rule, lambda: {"n": net(3, 5, 9)}), torch.zeros(4, 3, dtype=F64), True)


def test_exponentials_of_any_size_are_exact_or_no_number() -> None:
    field = sfk.compile(made(lambda m, t, y: torch.matrix_exp(y.view(-1, 3, 3)).flatten(1), {}), like=torch.zeros(4, 9, dtype=F64))
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-9, 0.1, 1.0, 10.0, 100.0):
        y = scale * torch.randn(5, 9, generator=generator, dtype=F64)
        want = torch.matrix_exp(y.view(-1, 3, 3)).flatten(1)
        size = want.abs().amax(1, keepdim=True)
        assert float(((field(0.0, y) - want).abs() / size).max()) < 1e-12 * max(1.0, scale)
    assert bool(field(0.0, -3000.0 * torch.eye(3, dtype=F64).view(1, 9)).isnan().all())


def test_turned_in_time_by_an_exponential() -> None:
    rule = lambda m, t, y: m.n(y @ torch.matrix_exp(t * (m.a - m.a.T)))
    module = made(rule, lambda: {"n": net(3, 5, 3), "a": nn.Parameter(torch.randn(3, 3))})
    check(module, torch.zeros(4, 3, dtype=F64), True)
    assert "general function" not in sfk.compile(module).report()


@pytest.mark.parametrize("name", ("lgamma", "digamma"))
def test_gamma_functions(name: str) -> None:
    """Large, small and negative. torch's own derivative of digamma is good to ten digits."""
    function = getattr(torch, name)
    module = made(lambda m, t, y: m.k * function(y), lambda: {"k": nn.Parameter(torch.ones(1))})
    y = torch.cat([torch.linspace(*ends, 40, dtype=F64) for ends in ((1e-3, 9.0), (9.0, 1e6), (-0.99, -0.01), (-7.95, -7.05))])
    grads = []
    for f in (module, sfk.compile(module, dim=1)):
        x = y[:, None].requires_grad_()
        out = f(torch.tensor(0.0, dtype=F64), x)
        grads.append((out.detach(), torch.autograd.grad(out.sum(), x)[0]))
    torch.testing.assert_close(grads[1][0], grads[0][0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grads[1][1], grads[0][1], rtol=1e-9, atol=1e-9)
