"""Derivatives that forward takes and ends, lookups and casts, and what live fields of unusual modules hold."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchdiffeq
from torch import nn
from torch.nn import functional as F

import sparseflow_kernels as sfk
from sparseflow_kernels.field import GraphField
from test_capture_graph import FLAT, TOKENS, check, flat, given, made, net, parameter, state
from test_capture_forwards import FROM, TO, TRIANGLE

F64 = torch.float64
T = torch.tensor(0.4, dtype=F64)


# ------------------------------------------------------------------------------------------------- derivatives and detach


def curved(m, t, y):
    value, moved = torch.func.jvp(m.n, (y,), (m.n(y),))
    return value + 0.05 * moved


def free_of_divergence(m, t, y):
    def one(x):
        a = lambda x: (lambda k: k - k.T)(m.n(x).view(3, 3))
        return torch.einsum("ijj->i", torch.func.jacfwd(a)(x))

    return torch.func.vmap(one)(y)


def lagrangian(m, t, y):
    """Accelerations by the Hessian of an energy, with velocities that are the last two of three numbers."""

    def one(x):
        energy = lambda x: m.n(x).squeeze(-1) + 0.5 * (x[1:] ** 2).sum()
        slope, bent = torch.func.grad(energy)(x), torch.func.hessian(energy)(x)
        return torch.cat([x[1:2], torch.linalg.solve(bent[1:, 1:] + 2.0 * torch.eye(2, dtype=x.dtype), slope[1:])])

    return torch.func.vmap(one)(y)


FORWARD = {"jvp": (curved, 3), "jacfwd": (free_of_divergence, 9), "hessian": (lagrangian, 1)}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_derivatives_inside_forward(name: str) -> None:
    rule, outputs = FORWARD[name]
    check(made(rule, {"n": net(3, 5, outputs, act=nn.Softplus)}), FLAT, False)


def energy_of(start):
    def rule(m, t, y):
        with torch.enable_grad():
            x = start(y)
            return torch.autograd.grad(m.n(x).sum(), x, create_graph=True)[0] + 0.1 * y

    return rule


DETACHED = {
    "detached": lambda y: y.detach().requires_grad_(True),
    "its data": lambda y: torch.autograd.Variable(y.data, requires_grad=True),
    "only unless it is differentiated": lambda y: y if y.requires_grad else y.detach().requires_grad_(True),
}  # fmt: skip


@pytest.mark.parametrize("name", DETACHED)
def test_gradients_end_where_forward_detaches(name: str) -> None:
    module = made(energy_of(DETACHED[name]), {"n": net(3, 5, 1)})
    field, y, weights = sfk.compile(module, like=FLAT, live=True), state(FLAT, 3), state(FLAT, 4)
    assert field.is_detached == ("unless" not in name)
    found, want = [], []
    for f, grads in ((field, found), (module, want)):
        x = y.clone().requires_grad_(True)
        out = (sfk if f is field else torchdiffeq).odeint(
            f, x, torch.tensor([0.0, 1.0], dtype=F64), method="rk4", options={"step_size": 0.25})
        grads += torch.autograd.grad(
            (out[-1] * weights).sum(), [x, *module.parameters()], allow_unused=True, materialize_grads=True)
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@torch.no_grad()
def without_gradient(m, y):
    return m.b(y) * F.softplus(m.k)


def with_checkpoint(m, y):
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda h: torch.tanh(m.b(h)), y, use_reentrant=False)


def in_block(m, y):
    with torch.no_grad():
        h, k = m.b(y), m.k.exp()
        with torch.enable_grad():
            kept = m.n(y).sin()
    return h + kept * k


WITHOUT = {"a decorated function": without_gradient, "a block": in_block, "a checkpoint": with_checkpoint}


@pytest.mark.parametrize("name", WITHOUT)
def test_gradients_end_where_forward_allows_none(name: str) -> None:
    rule = lambda m, t, y: m.n(y) + WITHOUT[name](m, y)
    check(made(rule, {"n": net(3, 5, 3), "b": net(3, 4, 3), "k": parameter(0.3)}), FLAT, False)


def test_the_divergence_of_what_is_detached_warns() -> None:
    detached, other = (made(energy_of(DETACHED[name]), {"n": net(3, 5, 1)}) for name in ("detached", "only unless it is differentiated"))
    with pytest.warns(UserWarning, match="detaches its state"):
        aug = sfk.with_divergence(sfk.compile(detached, like=FLAT))
    _, dl = aug(T, (state(FLAT, 3), torch.zeros(len(FLAT), dtype=F64)))
    torch.testing.assert_close(dl, torch.full_like(dl, -0.3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sfk.with_divergence(sfk.compile(other, like=FLAT))


def test_a_state_that_is_only_kept_stays_a_chain() -> None:
    def rule(m, t, y):
        m.seen.append(y.detach())
        return m.n(y)

    field = sfk.compile(made(rule, {"n": net(3, 6, 3), "seen": []}))
    assert not isinstance(field.vector_field, GraphField) and not field.is_detached


LENGTHS = {
    "norm": lambda d: d.norm(dim=-1, keepdim=True), "vector norm": lambda d: torch.linalg.vector_norm(d, dim=-1, keepdim=True),
    "p-norm": lambda d: d.norm(p=3, dim=-1, keepdim=True), "std": lambda d: d.std(-1, keepdim=True),
}  # fmt: skip


@pytest.mark.parametrize("name", LENGTHS)
def test_the_gradient_of_a_length_of_nothing_is_zero(name: str) -> None:
    """As between a point and itself."""

    def rule(m, t, x):
        d = x[:, None] - x[:, :, None]
        return (m.n(LENGTHS[name](d)) * d).sum(2)

    check(made(rule, {"n": net(1, 4, 1)}), TOKENS, True)
    field, x = sfk.compile(made(rule, {"n": net(1, 4, 1)}), like=TOKENS), state(TOKENS, 3).requires_grad_(True)
    (slope,) = torch.autograd.grad(field(T, x).square().sum(), x)
    y = x.detach().requires_grad_(True)
    (want,) = torch.autograd.grad(made(rule, {"n": net(1, 4, 1)})(T, y).square().sum(), y)
    torch.testing.assert_close(slope, want, rtol=1e-9, atol=1e-9)


def test_distances_between_the_same_points() -> None:
    rule = lambda m, t, x: (m.n(torch.cdist(x, x)[..., None]) * (x[:, None] - x[:, :, None])).sum(2)
    field, module, x = None, made(rule, {"n": net(1, 4, 1)}), state(TOKENS, 3)
    field = sfk.compile(module, like=TOKENS)
    slopes = [torch.autograd.grad(f(T, y).square().sum(), y)[0] for f in (field, module) for y in (x.clone().requires_grad_(True),)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------- lookups, and casts


def embedded(m, t, y):
    step = (t.clamp(0, 1) * 4).long()
    return m.n(torch.cat([y, m.steps(step.expand(len(y)))], 1)) * y


def weights_at(m, t, y):
    i = torch.bucketize(t, m.knots)
    return torch.tanh(y @ m.w[i].t() + m.c[i])


def between_knots(m, t, y):
    i = torch.searchsorted(m.knots, t).clamp(1, 3)
    part = (t - m.knots[i - 1]) / (m.knots[i] - m.knots[i - 1])
    return m.n(y) * torch.lerp(m.c[i - 1], m.c[i], part) + y.sin()


KNOTS = torch.tensor([0.0, 0.3, 0.6, 1.0], dtype=F64)
LOOKUPS = {
    "an embedding": (embedded, lambda: {"n": net(5, 6, 3), "steps": nn.Embedding(5, 2)}),
    "weights of an interval": (weights_at, lambda: {
        "w": nn.Parameter(torch.randn(5, 3, 3)), "c": nn.Parameter(torch.randn(5, 3)), "knots": KNOTS}),
    "between knots": (between_knots, lambda: {"n": net(3, 6, 3), "c": nn.Parameter(torch.randn(4, 3)), "knots": KNOTS}),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKUPS)
def test_parameters_that_are_looked_up_are_trained(name: str) -> None:
    rule, parts = LOOKUPS[name]
    check(made(rule, parts), FLAT, False)


def test_parameters_in_a_function_of_t_that_is_not_followed_are_refused() -> None:
    module = made(lambda m, t, y: y.sin() * (m.k.float() * t.float()).cos().double() + y, {"k": parameter(0.7)})
    with pytest.raises(sfk.UnsupportedFieldError, match="reads the parameters 'k'"):
        sfk.compile(module, like=FLAT)


@pytest.mark.parametrize("rule", [
    lambda m, t, y: m.n(y) * m.k.item(), lambda m, t, y: m.n(y) + torch.full_like(y, m.k.exp()), lambda m, t, y: m.n(y) ** float(m.k),
])  # fmt: skip
def test_numbers_read_out_of_parameters_are_refused_unless_these_are_frozen(rule) -> None:
    module = made(rule, {"n": net(3, 4, 3), "k": parameter(2.0)})
    with pytest.raises(sfk.UnsupportedFieldError, match="read out of the parameter 'k'"):
        sfk.compile(module, like=FLAT)
    module.k.requires_grad_(False)
    field, y = sfk.compile(module, like=FLAT), state(FLAT, 3)
    torch.testing.assert_close(field(T, y), module(T, y))


def test_time_in_another_dtype_is_rounded_as_forward_rounds_it() -> None:
    frequencies = torch.exp(torch.arange(3, dtype=torch.float32))

    def rule(m, t, y):
        angle = t.expand(len(y))[:, None].float() * frequencies
        return m.n(torch.cat([y.sin(), angle.cos().to(y)], 1)) * y

    check(made(rule, {"n": net(6, 5, 3)}), FLAT, False)


def inside(m, t, y):
    near, half = (y.norm(dim=1, keepdim=True) < 1.2).float(), (y[:, :1] > 0).float()
    return near * m.n(y) + (1 - near) * (1.0 - half * near) * y.sin()


def test_truth_values_as_numbers_of_another_dtype() -> None:
    check(made(inside, {"n": net(3, 5, 3)}), FLAT, False)


def test_other_numbers_of_another_dtype_are_refused() -> None:
    with pytest.raises(sfk.UnsupportedFieldError, match="dtype to torch.float32"):
        sfk.compile(made(lambda m, t, y: m.n(y).float().sin().double() + y, {"n": net(3, 5, 3)}), like=FLAT)
    with pytest.raises(sfk.UnsupportedFieldError, match="dtype to torch.float32"):
        sfk.compile(made(lambda m, t, y: ((y > 0).float() * 0.3).double() + m.n(y), {"n": net(3, 5, 3)}), like=FLAT)


# ---------------------------------------------------------------------------------------------------- what training starts at


def test_the_zeros_of_an_identity_are_trained() -> None:
    def rule(m, t, y):
        return y @ (m.w * m.d.clamp(0.0, 1.5)) @ m.w.t() - m.a(y)

    module = made(rule, lambda: {"w": nn.Parameter(torch.eye(3)), "d": nn.Parameter(torch.ones(3)), "a": nn.Identity()})
    module.a = nn.Linear(3, 3, bias=False, dtype=F64)
    nn.init.eye_(module.a.weight)
    check(module, FLAT, False)


# -------------------------------------------------------------------------------------------- live, of unusual containers


def sparse_rule(m, t, y):
    return torch.stack([torch.sparse.mm(m.adj, x) for x in m.n(y)]) - y


LIVE = {
    "a sparse buffer": lambda: (made(sparse_rule, {"n": net(3, 4, 3), "adj": TRIANGLE.to_sparse()}), TOKENS),
    "indices and masks beside numbers": lambda: (
        made(lambda m, t, y: m.n(y)[:, m.index] * m.mask, {"n": net(3, 4, 3), "index": FROM[:3], "mask": TO[:3] > 0}), FLAT),
    "a traced part": lambda: (made(lambda m, t, y: m.n(y) - y, lambda: {"n": torch.jit.trace(net(3, 4, 3), torch.zeros(2, 3))}), FLAT),
    "a scripted part": lambda: (made(lambda m, t, y: m.n(y) - y, lambda: {"n": torch.jit.script(net(3, 4, 3))}), FLAT),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LIVE)
def test_live_fields_of_unusual_tensors_and_modules(name: str) -> None:
    module, like = LIVE[name]()
    field, y = sfk.compile(module, like=like, live=True), state(like, 3)
    for _step in range(3):
        torch.testing.assert_close(flat(field(T, y)), flat(module(T, given(y))), rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.1)


# ----------------------------------------------------------------------------------------------- gradients by hand


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 0.1 * gradient


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-1e3, 1e3)


def hooked(x):
    if x.requires_grad:
        x.register_hook(lambda gradient: 0.1 * gradient)
    return x


class ByHand(torch.nn.Module):
    def __init__(self, function, of_weights=False):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 4).double(), torch.nn.Linear(4, 3).double()
        self.function, self.of_weights = function, of_weights

    def forward(self, t, y):
        if self.of_weights:
            return self.b(torch.nn.functional.linear(y, self.function(self.a.weight)))
        return self.b(self.function(self.a(y)))


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    "function, of_weights", [(Scaled.apply, False), (Scaled.apply, True), (Clipped.apply, False), (hooked, False)],
    ids=["state", "weights", "clipped", "hook"],
)
def test_other_gradients_than_the_derivative_are_refused(function, of_weights, live):
    with pytest.raises(sfk.UnsupportedFieldError, match="ByHand: (it has a gradient of its own|forward puts a hook on a tensor)"):
        sfk.compile(ByHand(function, of_weights), live=live)


ASKED = {
    "mode": lambda y, h: torch.is_grad_enabled(), "state": lambda y, h: y.requires_grad, "value": lambda y, h: h.grad_fn is not None,
}  # fmt: skip


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", ASKED)
def test_what_computes_something_else_while_gradients_are_wanted_is_refused(name, live):
    class Asks(ByHand):
        def forward(self, t, y):
            h = self.a(y).tanh()
            return self.b(h if ASKED[name](y, h) else 0.5 * h)

    module, y = Asks(None), torch.randn(5, 3).double()
    with pytest.raises(sfk.UnsupportedFieldError, match="something else where gradients are wanted"):
        sfk.compile(module, live=live)
    t = torch.tensor([0.0, 1.0]).double()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = y.clone().requires_grad_()
            wanted = torchdiffeq.odeint(module, start, t, method="rk4", options={"step_size": 0.25})
            with sfk.accelerate():
                found = torchdiffeq.odeint(module, start, t, method="rk4", options={"step_size": 0.25})
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("of_weights", [False, True])
def test_the_derivative_by_hand_is_the_fields(of_weights):
    module, y = ByHand(Square.apply, of_weights), torch.randn(5, 3).double()
    field = sfk.compile(module, live=True)
    found, wanted = field(0.0, y), module(0.0, y)
    torch.testing.assert_close(found, wanted)
    parameters = [p for name, p in module.named_parameters() if name != "a.bias" or not of_weights]
    grads = [torch.autograd.grad(out.square().sum(), parameters) for out in (found, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mode", [torch.no_grad, lambda: torch.set_grad_enabled(False)], ids=["no_grad", "set"])
def test_a_part_without_gradients(mode):
    class Part(ByHand):
        def forward(self, t, y):
            with mode():
                h = self.a(y)
            return self.b(h) + self.b(self.a(y).tanh())

    module, y = Part(None), torch.randn(5, 3).double().requires_grad_()
    field = sfk.compile(module, live=True)
    grads = [torch.autograd.grad(f(0.0, y).square().sum(), [y, *module.parameters()]) for f in (field, module)]
    torch.testing.assert_close(*grads)


def test_parameters_that_cannot_change_the_field_have_no_gradient():
    """Zeros for them would be moved by an optimizer's weight decay."""

    class Energy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
            self.other = torch.nn.Linear(4, 4).double()

        def forward(self, t, y):
            with torch.enable_grad():
                y.requires_grad_(True)
                g = torch.autograd.grad(self.net(y).sum(), y, create_graph=True)[0]
            return torch.cat([g[:, 2:], -g[:, :2]], 1) + self.other(y).detach()

    module, y = Energy(), torch.randn(3, 4).double()
    field = sfk.compile(module, like=y, live=True)
    grads = []
    for f in (module, field):
        module.zero_grad()
        f(torch.tensor(0.0), y.clone()).square().sum().backward()
        grads.append([p.grad for p in module.parameters()])
    assert [g is None for g in grads[0]] == [g is None for g in grads[1]] == [False, False, False, True, True, True]
    torch.testing.assert_close([g for g in grads[1] if g is not None], [g for g in grads[0] if g is not None])


@pytest.mark.parametrize("shape", [(4,), (5, 4)], ids=["moving", "context"])
def test_gradients_by_hand_of_what_a_module_holds(shape):
    """The graph behind it is the caller's, and is not freed."""

    class Holds(ByHand):
        def forward(self, t, y):
            return self.b(torch.tanh(self.a(y)) + self.function(self.held))

    y, encoder = torch.randn(5, 3).double(), torch.nn.Linear(2, 4).double()
    given = torch.randn(*shape[:-1], 2).double()
    for function, right in ((Scaled.apply, False), (Square.apply, True)):
        module = Holds(function)
        module.held = encoder(given).exp()
        if not right:
            with pytest.raises(sfk.UnsupportedFieldError, match="a gradient of its own"):
                sfk.compile(module, like=y, live=True)
            continue
        field = sfk.compile(module, like=y, live=True)
        grads = [torch.autograd.grad(f(0.0, y).sum(), encoder.weight, retain_graph=True)[0] for f in (field, module)]
        torch.testing.assert_close(*grads)


def test_hessians_are_not_made_of_states_of_other_shapes():
    """To see whether forward takes more axes it is run with some; a Hessian of (16, 16, 4) numbers took 16 GB."""
    sizes = []

    class Lagrangian(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 16), nn.Softplus(), nn.Linear(16, 1))

        def lagrangian(self, q, v):
            return self.net(torch.cat((q, v))).squeeze() + 1.5 * v.square().sum()

        def acceleration(self, x):
            sizes.append(x.numel())
            q, v = x[:2], x[2:]
            hessian = torch.func.hessian(self.lagrangian, 1)(q, v)
            mixed = torch.func.jacrev(torch.func.grad(self.lagrangian, 1), 0)(q, v)
            return torch.cat((v, torch.linalg.solve(hessian, torch.func.grad(self.lagrangian, 0)(q, v) - mixed @ v)))

        def forward(self, t, x):
            return torch.vmap(self.acceleration)(x)

    module, x = Lagrangian(), torch.randn(5, 4)
    field = sfk.compile(module, like=x)
    torch.testing.assert_close(field(0.0, x), module(0.0, x), rtol=1e-4, atol=1e-5)
    assert max(sizes) < 1024
