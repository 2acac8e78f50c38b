"""Linear systems, losses, distributions and gradients without a graph inside forward."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from torch import nn
from torch.nn import functional as F

import sparseflow_kernels as sfk
from test_capture_graph import FLAT, TOKENS, check, made, net, parameter, state

F64 = torch.float64
T = torch.tensor(0.4, dtype=F64)


def eye(n: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.eye(n, dtype=F64)


def square(h: torch.Tensor, n: int) -> torch.Tensor:
    return h.view(-1, n, n)


def exchanged(m, t, y):
    """A matrix that is a cycle but for small entries: without pivots its elimination divides by these."""
    a = torch.eye(4, dtype=F64).roll(1, 0) + 1e-9 * square(m.n(y).sin(), 4)
    return torch.linalg.solve(a, y) + 0.1 * torch.linalg.solve(a, m.k).sum(-1)


def positive(m, y):
    low = square(m.n(y), 4)
    return low @ low.mT + eye(4)


SYSTEMS = {
    "a system with pivots": (exchanged, lambda: {"n": net(4, 5, 16), "k": nn.Parameter(torch.randn(4, 2))}),
    "from the right": (
        lambda m, t, y: torch.linalg.solve(square(m.n(y), 4).tanh() + eye(4, 2.0), y[:, None], left=False)[:, 0],
        lambda: {"n": net(4, 5, 16)}),
    "inverse": (lambda m, t, y: (torch.inverse(square(m.n(y), 4).tanh() + eye(4, 2.0)) @ y[:, :, None])[:, :, 0],
                lambda: {"n": net(4, 5, 16)}),
    "determinants": (
        lambda m, t, y: y * torch.linalg.det(square(m.n(y), 4))[:, None] + torch.linalg.slogdet(square(m.n(y), 4)[:, :2, :2])[1][:, None],
        lambda: {"n": net(4, 5, 16)}),
    "cholesky": (
        lambda m, t, y: torch.cholesky_solve(y[:, :, None], torch.linalg.cholesky(positive(m, y)))[:, :, 0],
        lambda: {"n": net(4, 5, 16)}),
    "cholesky, upper": (
        lambda m, t, y: torch.linalg.solve_triangular(torch.linalg.cholesky(positive(m, y), upper=True), y[:, :, None], upper=True)[:, :, 0],
        lambda: {"n": net(4, 5, 16)}),
    "unit triangle": (
        lambda m, t, y: torch.linalg.solve_triangular(square(m.n(y), 4), y[:, None], upper=False, unitriangular=True, left=False)[:, 0],
        lambda: {"n": net(4, 5, 16)}),
    "a constant mass": (
        lambda m, t, y: torch.linalg.solve(m.w @ m.w.T + eye(4), m.n(y).T).T, lambda: {"n": net(4, 5, 4), "w": nn.Parameter(torch.randn(4, 4))}),
    "a constant mass of samples": (
        lambda m, t, y: torch.linalg.solve(m.w @ m.w.T + eye(4), m.n(y)[:, :, None])[:, :, 0],
        lambda: {"n": net(4, 5, 4), "w": nn.Parameter(torch.randn(4, 4))}),
    "constant factors": (
        lambda m, t, y: torch.cholesky_solve(y.T, torch.linalg.cholesky(m.w @ m.w.T + eye(4))).T
        + torch.linalg.solve_triangular(m.w.triu() + eye(4, 2.0), m.n(y).T, upper=True).T,
        lambda: {"n": net(4, 5, 4), "w": nn.Parameter(torch.randn(4, 4))}),
}  # fmt: skip


@pytest.mark.parametrize("name", SYSTEMS)
def test_linear_systems(name: str) -> None:
    check(made(*SYSTEMS[name]), torch.zeros(4, 4, dtype=F64), False)


def test_large_systems_of_the_state_are_refused() -> None:
    rule = lambda m, t, y: torch.linalg.solve(y[:, :, None] * y[:, None] + eye(9), m.n(y))
    with pytest.raises(sfk.UnsupportedFieldError, match="more than 8"):
        sfk.compile(made(rule, lambda: {"n": net(9, 5, 9)}), like=torch.zeros(4, 9, dtype=F64))


def test_second_derivatives_by_functions_of_torch() -> None:
    """`torch.func.hessian` over one of two arguments asks for zeros in a way of its own."""

    def lagrangian(m, t, y):
        def energy(q, v):
            return m.n(torch.cat([q, v])).sum() + 0.5 * (v**2).sum()

        def one(s):
            bent = torch.func.hessian(energy, 1)(s[:2], s[2:])
            mixed = torch.func.jacrev(torch.func.grad(energy, 1), 0)(s[:2], s[2:])
            slope = torch.func.grad(energy, 0)(s[:2], s[2:])
            return torch.cat([s[2:], torch.linalg.solve(bent + eye(2), slope - mixed @ s[2:])])

        return torch.vmap(one)(y)

    check(made(lagrangian, lambda: {"n": net(4, 4, 1, act=nn.Softplus)}), torch.zeros(4, 4, dtype=F64), False)


def test_what_a_loop_over_the_samples_computes_from_parameters_is_one_thing() -> None:
    """Each sample's Hessian multiplies the same weights anew."""

    def rule(m, t, y):
        energy = lambda z: m.n(z).sum()
        rows = [torch.linalg.inv(torch.autograd.functional.hessian(energy, q, create_graph=True) + eye(3, 4.0)) @ q for q in y]
        return torch.stack(rows)

    check(made(rule, lambda: {"n": net(3, 5, 1, act=nn.Softplus)}), torch.zeros(4, 3, dtype=F64), False)


def test_a_pseudo_inverse_is_refused_in_words() -> None:
    rule = lambda m, t, y: (torch.linalg.pinv(torch.diag_embed(m.n(y))) @ y[:, :, None])[:, :, 0]
    with pytest.raises(sfk.UnsupportedFieldError, match="pinv.*use torch.linalg.solve or torch.linalg.inv"):
        sfk.compile(made(rule, lambda: {"n": net(3, 5, 3)}), like=torch.zeros(4, 3, dtype=F64))


# ------------------------------------------------------------------------------------------------- losses, distributions

LABELS = torch.tensor([0, 2, 1, -100])


def descent(loss):
    def rule(m, t, y):
        with torch.enable_grad():
            x = y.requires_grad_(True)
            return m.n(x) - torch.autograd.grad(loss(m, x), x, create_graph=True)[0]

    return rule


def mixture(m, x):
    of = torch.distributions
    parts = of.Independent(of.Normal(m.mean, m.scale.exp()), 1)
    return of.MixtureSameFamily(of.Categorical(logits=m.weights), parts).log_prob(x).sum()


def gaussian(m, x):
    return torch.distributions.MultivariateNormal(m.mean[0], scale_tril=m.low.tril() + eye(3, 2.0)).log_prob(x).sum()


GUIDED = {
    "mse_loss": lambda m, x: F.mse_loss(m.n(x), torch.ones_like(x), reduction="sum"),
    "huber_loss": lambda m, x: F.huber_loss(m.n(x), x.detach().sin(), reduction="sum", delta=0.4),
    "smooth_l1_loss": lambda m, x: F.smooth_l1_loss(m.n(x), m.mean[0].expand_as(x), reduction="none", beta=0.3).sum(),
    "logits": lambda m, x: F.binary_cross_entropy_with_logits(m.n(x), torch.full_like(x, 0.3), reduction="sum"),
    "weighted logits": lambda m, x: F.binary_cross_entropy_with_logits(
        m.n(x), torch.full_like(x, 0.3), torch.full_like(x, 0.7), reduction="sum", pos_weight=m.weights.detach().exp()),
    "cross entropy": lambda m, x: F.cross_entropy(
        m.n(x), torch.ones(len(x), dtype=torch.int64), m.weights.detach().exp(), reduction="sum"),
    "a mixture": mixture, "a gaussian": gaussian,
}  # fmt: skip


@pytest.mark.parametrize("name", GUIDED)
def test_losses_and_distributions(name: str) -> None:
    parts = lambda: {
        "n": net(3, 4, 3), "mean": nn.Parameter(torch.randn(2, 3)), "scale": nn.Parameter(torch.zeros(2, 3)),
        "weights": parameter(0.3, -0.2) if name == "a mixture" else parameter(0.3, -0.2, 0.1),
        "low": nn.Parameter(torch.randn(3, 3)),
    }  # fmt: skip
    check(made(descent(GUIDED[name]), parts), FLAT, False)


def test_labels_of_samples_some_of_which_are_ignored() -> None:
    loss = lambda m, x: F.cross_entropy(m.n(x), LABELS)
    check(made(descent(loss), {"n": net(3, 4, 3)}), FLAT, True)


def test_losses_that_are_values() -> None:
    def rule(m, t, y):
        h = m.n(y)
        return F.mse_loss(h, y, reduction="none") + F.huber_loss(y, h, reduction="none", delta=0.5) + F.smooth_l1_loss(
            h, y, reduction="none", beta=0.0) + F.mse_loss(h[0], y[0]) * 0

    check(made(rule, {"n": net(3, 4, 3)}), FLAT[:1], True)


OTHERS = {
    "rrelu": lambda x: F.rrelu(x, training=False), "copysign": lambda x: torch.copysign(x.sin(), x), "logaddexp2": lambda x: torch.logaddexp2(x, 2 * x),
    "logit": lambda x: torch.logit(x.sigmoid()) + torch.logit(x.sigmoid(), eps=0.3), "angles": lambda x: torch.deg2rad(x) + torch.rad2deg(x),
    "nan_to_num": lambda x: torch.nan_to_num(x + 1 / (x > 0).to(x), nan=0.3, posinf=2.0) * torch.nan_to_num(x - 1 / (x > 0).to(x), neginf=-5.0),
    "entr": lambda x: torch.special.entr(x.square()), "xlog1py": lambda x: torch.special.xlog1py(x, x.square()),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions(name: str) -> None:
    check(made(lambda m, t, y: OTHERS[name](m.n(y)), {"n": net(3, 4, 3)}), FLAT, False)


@pytest.mark.parametrize("p", [1.0, 3.0, float("inf")])
def test_distances_of_other_norms(p: float) -> None:
    check(made(lambda m, t, x: x * torch.cdist(x, m.n(x), p=p).sum(-1, keepdim=True), {"n": net(3, 4, 3)}), TOKENS, True)


# ------------------------------------------------------------------------------------------------ gradients without a graph


def of_numbers(m, t, y):
    with torch.enable_grad():
        x = y.requires_grad_(True)
        return m.b(y) - torch.autograd.grad(m.n(x).sum(), x)[0]


def by_backward(m, t, y):
    with torch.enable_grad():
        x = y.detach().requires_grad_(True)
        m.n(x).sum().backward()
        return m.b(y) - x.grad


@pytest.mark.parametrize("rule", [of_numbers, by_backward])
def test_gradients_without_a_graph_are_numbers(rule) -> None:
    module, y, weights = made(rule, {"n": net(3, 4, 1), "b": net(3, 4, 3)}), state(FLAT, 3), state(FLAT, 4)
    field, times = sfk.compile(module, like=FLAT, live=True), torch.tensor([0.0, 1.0], dtype=F64)
    assert field.is_detached
    found, want = [], []
    for f, solver, grads in ((field, sfk, found), (module, torchdiffeq, want)):
        x = y.clone().requires_grad_(True)
        out = solver.odeint(f, x, times, method="rk4", options={"step_size": 0.25})
        grads += torch.autograd.grad(
            (out[-1] * weights).sum(), [x, *module.parameters()], allow_unused=True, materialize_grads=True)
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------------------------------------------- what stands round a field


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.c = nn.Linear(4, 2).double(), torch.zeros(5, 2, dtype=F64)

    def forward(self, t, y):
        return torch.tanh(self.net(torch.cat([y, self.c], -1)))


@pytest.mark.parametrize("live", [False, True])
def test_contexts_that_are_alike_at_first(live: bool) -> None:
    """Zeros to begin with, and an example of as many samples."""
    module = Conditioned()
    field, times = sfk.compile(module, like=torch.zeros(5, 2, dtype=F64), live=live), torch.tensor([0.0, 1.0], dtype=F64)
    for batch in (5, 3):
        module.c, y = torch.randn(batch, 2, dtype=F64), torch.randn(batch, 2, dtype=F64)
        torch.testing.assert_close(sfk.odeint(field, y, times), torchdiffeq.odeint(module, y, times), rtol=1e-10, atol=1e-10)


def test_a_live_field_whose_module_holds_a_context_at_last() -> None:
    module = Conditioned()
    module.c = torch.zeros(2, dtype=F64)
    module.forward = lambda t, y: torch.tanh(module.net(torch.cat([y, module.c.expand(len(y), 2)], -1)))
    y, times = torch.randn(5, 2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    for call in (lambda field: sfk.odeint(field, y, times)[-1], lambda field: field(T, y)):
        module.c = torch.zeros(2, dtype=F64)
        field = sfk.compile(module, like=y, live=True)
        module.c = torch.randn(5, 2, dtype=F64)
        torch.testing.assert_close(call(field), call(sfk.compile(module, like=y)), rtol=1e-10, atol=1e-10)


def test_a_state_of_a_single_number() -> None:
    module = made(lambda m, t, y: torch.sin(t) - m.k * y, lambda: {"k": parameter(0.7)})
    y, times = torch.tensor(1.3, dtype=F64), torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    want = torchdiffeq.odeint(module, y, times)
    torch.testing.assert_close(sfk.odeint(sfk.compile(module, like=y), y, times), want, rtol=1e-10, atol=1e-10)
    with sfk.accelerate() as context:
        torch.testing.assert_close(torchdiffeq.odeint(module, y, times), want, rtol=1e-10, atol=1e-10)
    assert "handed" not in context.report()


def test_callbacks_of_a_module_are_called() -> None:
    module, steps = made(lambda m, t, y: m.n(y), {"n": net(3, 4, 3)}), []
    module.callback_accept_step = lambda t, y, dt: steps.append(float(t.detach()))
    y, times = state(FLAT, 3), torch.tensor([0.0, 1.0], dtype=F64)
    torchdiffeq.odeint(module, y, times)
    want, steps[:] = list(steps), []
    sfk.odeint(sfk.compile(module, live=True), y, times)
    assert steps == pytest.approx(want, abs=1e-9) and steps
