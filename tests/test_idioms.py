"""Vector fields as other people write them, and calls as a careless user makes them: read right, or refused clearly."""

from __future__ import annotations

import copy
import functools
import math
import re

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import sparseflow_kernels as sfk

L = nn.Linear
F64 = torch.float64


class Field(nn.Module):
    """A forward given as a function, its parts as submodules, parameters or buffers."""

    def __init__(self, function, parts: dict) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if type(part) is Tensor:
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, t: Tensor, y: Tensor, *args, **kwargs) -> Tensor:
        return self.function(self, t, y)


def hidden(inputs: int = 2, **parts) -> dict:
    return {"a": L(inputs, 8), "b": L(8, 2), **parts}


def assert_is_the_module(module: nn.Module, tolerance: float = 1e-12, **given) -> sfk.CompiledField:
    """Values, both divergences and a whole solve, in the module's own dtype."""
    field = sfk.compile(module, **given)
    dtype, dim = field.dtype, field.dim
    generator = torch.Generator().manual_seed(1)
    y, e = (torch.randn(6, dim, generator=generator, dtype=F64).to(dtype) for _ in range(2))
    zero = torch.zeros(6, dtype=dtype)
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    for t in (-0.8, 0.0, 0.37, 2.3):
        time = torch.tensor(t, dtype=dtype)
        x = y.clone().requires_grad_()
        dx = module(time, x)
        rows = [torch.autograd.grad(dx[:, m].sum(), x, retain_graph=True)[0] for m in range(dim)]
        jacobian = torch.stack(rows, 1)
        got, exact = sfk.with_divergence(field, "exact")(time, (y, zero))
        _, estimate = sfk.with_divergence(field, "hutchinson", noise=e)(time, (y, zero))
        close(got, dx)
        close(-exact, jacobian.diagonal(dim1=1, dim2=2).sum(1))
        close(-estimate, torch.einsum("bi,bij,bj->b", e, jacobian, e))
    if dtype == F64:
        times = torch.linspace(0.0, 1.0, 3, dtype=dtype)
        with torch.no_grad():
            expected = torchdiffeq.odeint(module, y, times, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(
                sfk.odeint(field, y, times, rtol=1e-6, atol=1e-6), expected, rtol=1e-10, atol=1e-10
            )
    return field


# ----------------------------------------------------------------------------------------------------------- idioms


def embedding(t: Tensor, batch: int) -> Tensor:
    """Sinusoids of a time per sample, [batch, 8]."""
    phase = (t * torch.ones(batch, dtype=t.dtype))[:, None] * torch.exp(-torch.arange(4) / 2).to(t)
    return torch.cat([phase.cos(), phase.sin()], -1)


class Depth(nn.Module):
    """Time put into an attribute from outside, by a wrapper that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.t = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.t * torch.ones(x.shape[0], 1).to(x)], 1)


def depth_forward(m: Field, t: Tensor, y: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    for part in m.net.modules():
        if hasattr(part, "t"):
            part.t = t
    return m.net(y)


def blend(first: nn.Module, second: nn.Module, t: Tensor, x: Tensor) -> Tensor:
    return first(x) + (second(x) - first(x)) * t


def film(m: Field, t: Tensor, y: Tensor) -> Tensor:
    scale, shift = m.te(t.expand(len(y))[:, None]).chunk(2, -1)
    return m.b(torch.tanh(m.a(y) * (1 + scale) + shift))


def fourier(m: Field, t: Tensor, y: Tensor) -> Tensor:
    phase = 2 * math.pi * y @ m.w
    return m.b(torch.tanh(m.a(torch.cat([phase.sin(), phase.cos(), t.expand(len(y), 1)], -1))))


IDIOMS = {
    "time column repeated": (
        lambda m, t, y: m.b(F.selu(m.a(torch.cat([y, t.repeat(y.shape[0])[:, None]], 1)))), hidden(3)),
    "time copied into a tensor": (
        lambda m, t, y: m.b(torch.tanh(m.a(torch.cat([y, torch.tensor([[t]], dtype=y.dtype).repeat(len(y), 1)], 1)))),
        hidden(3)),
    "time beside constants": (
        lambda m, t, y: m.b(torch.tanh(m.a(y))) + torch.tensor([t, 0.5], dtype=y.dtype), hidden()),
    "time as a number": (
        lambda m, t, y: m.b(torch.tanh(m.a(torch.cat([y, y.new_full((len(y), 1), float(t))], 1)))), hidden(3)),
    "time by an attribute": (
        depth_forward, {"net": nn.Sequential(Depth(), L(3, 8), nn.Tanh(), Depth(), L(9, 2))}),
    "a time for every sample": (
        lambda m, t, y: m.b(F.silu(m.a(y) + m.te(embedding(t, len(y))))),
        hidden(te=nn.Sequential(L(8, 16), nn.SiLU(), L(16, 8)))),
    "scale and shift by time": (film, hidden(te=L(1, 16))),
    "sinusoids of time": (
        lambda m, t, y: m.b(F.elu(m.a(torch.cat([(m.w * t).cos().expand(len(y), 3), y], -1)))),
        hidden(5, w=torch.arange(1.0, 4.0) * math.pi)),
    "random Fourier features": (fourier, {"a": L(9, 8), "b": L(8, 2), "w": torch.randn(2, 4)}),
    "blended layers": (
        lambda m, t, y: blend(m.b, m.d, t, F.softplus(blend(m.a, m.c, t, y))), hidden(c=L(2, 8), d=L(8, 2))),
    "celu": (lambda m, t, y: m.b(F.celu(m.a(y), alpha=0.5)), hidden()),
    "elu in place": (lambda m, t, y: m.b(m.n(m.a(y))), hidden(n=nn.ELU(0.4, inplace=True))),
    "cosine": (lambda m, t, y: m.b(torch.cos(m.a(y))), hidden()),
    "a sum of gated values": (
        lambda m, t, y: m.b(torch.tanh(
            (m.a(y) * torch.sigmoid(m.h(t.view(1, 1)))).view(len(y), 4, 2).sum(-1).repeat(1, 2))),
        hidden(h=L(1, 8))),
    "activations in a list": (
        lambda m, t, y: functools.reduce(
            lambda x, f: f(x), [m.a, functools.partial(F.elu, alpha=0.3), m.b, torch.tanh], y),
        hidden()),
    "dictionaries": (
        lambda m, t, y: m.d["out"](m.d["act"](m.d["in"](y))),
        {"d": nn.ModuleDict({"in": L(2, 8), "act": nn.Softplus(beta=100), "out": L(8, 2)})}),
    "weight norm": (lambda m, t, y: m.b(torch.tanh(m.a(y))), hidden(a=parametrizations.weight_norm(L(2, 8)))),
    "an extra scale": (
        lambda m, t, y: m.s.exp() * m.b(torch.tanh(m.a(y))), hidden(s=nn.Parameter(torch.tensor(0.3)))),
}


@pytest.mark.parametrize("name", IDIOMS)
def test_idioms_are_read(name: str) -> None:
    function, parts = IDIOMS[name]
    torch.manual_seed(0)
    module = Field(function, copy.deepcopy(parts))
    assert_is_the_module(copy.deepcopy(module), 3e-5, dim=2)
    module = module.double()
    before = dict(vars(module))
    assert_is_the_module(module, dim=2)
    if name != "time by an attribute":
        assert vars(module).keys() == before.keys()
    for part in list(module.modules()):
        if isinstance(part, L) and not torch.nn.utils.parametrize.is_parametrized(part):
            prune.l1_unstructured(part, "weight", amount=0.5)
    assert_is_the_module(module, dim=2)


def test_a_field_of_one_state_is_read_row_by_row() -> None:
    module = Field(lambda m, t, y: torch.mv(m.w, torch.tanh(y)) * torch.cos(t), {"w": nn.Parameter(torch.randn(4, 4))})
    module = module.double()
    field, times = sfk.compile(module), torch.linspace(0.0, 1.0, 3, dtype=F64)
    y = torch.randn(5, 4, dtype=F64)
    rows = [torchdiffeq.odeint(module, row, times) for row in y]
    torch.testing.assert_close(sfk.odeint(field, y[0], times), rows[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(field(0.3, y)[2], module(torch.tensor(0.3, dtype=F64), y[2]), rtol=1e-12, atol=1e-12)


def test_sizes_that_the_weights_do_not_show() -> None:
    halves = Field(lambda m, t, y: torch.cat([y[:, [2, 3]], m.a(y[:, :2])], 1), {"a": L(2, 2)})
    assert sfk.compile(halves).dim == 4


def test_a_gate_of_its_own_for_each_summand() -> None:
    """Two gates make a layer of identity neurons, so the cost stays that of both matrices."""
    gate = lambda h, t: torch.sigmoid(h(t.view(1, 1)))
    module = Field(
        lambda m, t, y: m.b(torch.tanh(m.a(y) * gate(m.g, t) + m.c(y) * gate(m.h, t))),
        hidden(c=L(2, 8), g=L(1, 8), h=L(1, 8)),
    ).double()
    field = assert_is_the_module(module)
    assert field.nnz == 16 + 16 + 16 + 16


def test_what_the_user_froze_stays_frozen() -> None:
    module = Field(lambda m, t, y: m.b(torch.tanh(m.a(y))), hidden())
    module.a.requires_grad_(False)
    field = sfk.compile(module)
    assert [field.layers[0].values.requires_grad, field.layers[1].values.requires_grad] == [False, True]
    assert not any(p.requires_grad for p in sfk.compile(module.requires_grad_(False)).parameters())


# --------------------------------------------------------------------------------------------------------- refusals


class Augmented(nn.Module):
    """The usual field of a flow: state and log-density in, both derivatives out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(L(2, 8), nn.Tanh(), L(8, 2))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, _ = state
        return self.net(y), torch.zeros_like(y[:, :1])


REFUSED = {
    "tuple state": (Augmented, ValueError, "with_divergence"),
    "a tuple returned": (lambda: Field(lambda m, t, y: (m.a(y), y), {"a": L(2, 2)}), ValueError, "returned tuple"),
    "convolution": (
        lambda: Field(lambda m, t, y: m.c(y), {"c": nn.Conv2d(2, 2, 3)}), ValueError, "'c' is a convolution"),
    "lazy": (lambda: Field(lambda m, t, y: m.a(y), {"a": nn.LazyLinear(2)}), ValueError, "'a.weight' has no size"),
    "meta": (
        lambda: Field(lambda m, t, y: m.a(y), {"a": L(2, 2, device="meta")}), ValueError, "'a.weight'.*meta device"),
    "y alone": (lambda: nn.Sequential(L(2, 8), nn.Tanh(), L(8, 2)), TypeError, r"forward\(t, y\).*wrap it"),
    "function": (lambda: lambda t, y: y, TypeError, "not function.*wrap it"),
    "bound method": (lambda: L(2, 2).forward, TypeError, "not method.*wrap it"),
    "partial": (lambda: functools.partial(L(2, 2)), TypeError, "not partial.*wrap it"),
    "class": (lambda: Augmented, TypeError, "the class Augmented; make an instance"),
    "changes at every call": (
        lambda: Field(lambda m, t, y: m.b(torch.tanh(m.a(y))), hidden(a=torch.nn.utils.spectral_norm(L(2, 8)))),
        sfk.UnsupportedFieldError, r"\.eval\(\)"),
    "float32 on the way": (
        lambda: Field(lambda m, t, y: m.a(y) + torch.full((1, 1), float(t)).to(y), {"a": L(2, 2)}).double(),
        sfk.UnsupportedFieldError, "float32 on the way"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_to_do(name: str) -> None:
    make, error, words = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(error, match=words):
        sfk.compile(make())


@pytest.mark.parametrize("dim", ["2", 2.0, True, 0, -1])
def test_bad_dims(dim) -> None:
    with pytest.raises((TypeError, ValueError), match="dim must be"):
        sfk.compile(Field(lambda m, t, y: m.a(y), {"a": L(2, 2)}), dim=dim)


# -------------------------------------------------------------------------------------------------- careless callers


T = torch.linspace(0.0, 1.0, 3)


@pytest.fixture
def field() -> sfk.CompiledField:
    torch.manual_seed(0)
    forward = lambda m, t, y: m.b(torch.tanh(m.a(torch.cat([y, t.expand(*y.shape[:-1], 1)], -1))))
    return sfk.compile(Field(forward, hidden(3)))


@pytest.mark.parametrize("call, error, words", [
    (lambda f, y: sfk.odeint(None, y, T), TypeError, "func must be.*NoneType"),
    (lambda f, y: sfk.odeint(f.vector_field, y, T), TypeError, re.escape("compile(field)")),
    (lambda f, y: sfk.odeint(f, (), T), ValueError, "y0 must be"),
    (lambda f, y: sfk.odeint(f, (y, None), T), TypeError, "y0 must hold.*NoneType"),
    (lambda f, y: sfk.odeint(f, y, T, rtol=None), TypeError, "rtol must be"),
    (lambda f, y: sfk.odeint(f, y, T, atol="1e-3"), TypeError, "atol must be"),
    (lambda f, y: sfk.odeint(f, y, T, options=[1]), TypeError, "options must be a dict"),
    (lambda f, y: sfk.odeint(f, y, torch.tensor([0.0, math.inf])), AssertionError, "t must be finite"),
    (lambda f, y: sfk.odeint(sfk.with_divergence(f), (y, torch.zeros(5, dtype=F64)), T), TypeError, "x is .*l is"),
    (lambda f, y: sfk.with_divergence(sfk.with_divergence(f)), TypeError, "DivergenceField"),
    (lambda f, y: sfk.with_divergence(Augmented), TypeError, "the class Augmented"),
    (lambda f, y: sfk.set_num_threads(10**12), ValueError, "at most"),
    (lambda f, y: sfk.ContinuousFlow(None), TypeError, "odefunc must be"),
    (lambda f, y: sfk.ContinuousFlow(Augmented), TypeError, "odefunc must be"),
    (lambda f, y: sfk.ContinuousFlow(f, dim=0), ValueError, "dim must be"),
    (lambda f, y: sfk.ContinuousFlow(f, 2).sample(-1), ValueError, "shape must be"),
    (lambda f, y: sfk.ContinuousFlow(f, 2).sample(2.5), ValueError, "shape must be"),
])
def test_bad_calls_are_named(field, call, error, words) -> None:
    with pytest.raises(error, match=words):
        call(field, torch.ones(5, 2))


def test_an_empty_batch_has_an_empty_density(field) -> None:
    none = torch.empty(0, 2)
    for flow in (sfk.ContinuousFlow(field, 2), sfk.ContinuousFlow(Field(lambda m, t, y: m.a(y), {"a": L(2, 2)}), 2)):
        assert flow.log_prob(none).shape == (0,) and flow.sample(0).shape == (0, 2)


def test_torch_func_goes_through_a_compiled_field(field) -> None:
    field = copy.deepcopy(field).double()
    y, times = torch.randn(4, 2, dtype=F64), T.double()
    for jacobian_of in (torch.func.jacrev, torch.func.jacfwd):
        jacobian = torch.func.vmap(jacobian_of(lambda v: field(0.3, v)))(y)
        _, trace = sfk.with_divergence(field)(0.3, (y, torch.zeros(4, dtype=F64)))
        torch.testing.assert_close(jacobian.diagonal(dim1=1, dim2=2).sum(1), -trace, rtol=1e-12, atol=1e-12)
    last = lambda v: sfk.odeint(field, v, times)[-1]
    expected = torch.autograd.functional.jacobian(last, y[0])
    torch.testing.assert_close(torch.func.jacrev(last)(y[0]), expected, rtol=1e-10, atol=1e-10)
    _, tangent = torch.func.jvp(last, (y[0],), (y[1],))
    torch.testing.assert_close(tangent, expected @ y[1], rtol=1e-10, atol=1e-10)


def test_forward_mode_tangents_are_not_lost_under_no_grad(field) -> None:
    y = torch.randn(4, 2)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(y, torch.ones_like(y))
        assert torch.autograd.forward_ad.unpack_dual(field(0.3, dual)).tangent is not None
        assert torch.autograd.forward_ad.unpack_dual(sfk.odeint(field, dual, T)).tangent is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_exported_fields_and_the_field_afterwards(field) -> None:
    y, t = torch.randn(5, 2), torch.tensor(0.3)
    before = sfk.odeint(field, y, T)
    exported = torch.export.export(field, (torch.tensor(0.0), y)).module()
    traced = torch.jit.trace(field, (torch.tensor(0.0), y))
    for copied in (exported, traced):
        torch.testing.assert_close(copied(t, y + 1), field(t, y + 1))
    assert torch.equal(sfk.odeint(field, y, T), before)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_autocast_does_not_touch_a_field(engine) -> None:
    torch.manual_seed(0)
    module = Field(lambda m, t, y: m.b(torch.tanh(m.a(y))), hidden())
    y = torch.randn(5, 2, requires_grad=True)
    plain = sfk.compile(module, engine=engine)
    expected = sfk.odeint(plain, y, T)
    (gradient,) = torch.autograd.grad(expected.sum(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sfk.odeint(sfk.compile(module, engine=engine), y, T)
        if engine == "cpu":
            assert torch.equal(torch.autograd.grad(got.sum(), y)[0], gradient)
    assert torch.equal(got, expected)


def test_a_field_compiled_in_inference_mode_can_be_trained(field) -> None:
    with torch.inference_mode():
        inside = sfk.compile(field)
    sfk.odeint(inside, torch.ones(5, 2), T).sum().backward()
    assert inside.layers[0].values.grad is not None


def test_own_linear_layers_are_pruned() -> None:
    class Matrix(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(outputs, inputs))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    module = Field(lambda m, t, y: m.b(torch.tanh(m.a(y))), {"a": Matrix(2, 8), "b": Matrix(8, 2)})
    sfk.prune_weights_(module, keep=0.75, layers=["a"])
    assert int(module.a.weight_mask.sum()) == 8 and not hasattr(module.b, "weight_mask")
    sfk.prune_weights_(module, keep=0.5)
    assert sfk.compile(module).nnz <= 16
