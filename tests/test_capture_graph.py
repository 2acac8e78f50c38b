"""Fields that are no chain are read as graphs: the module's values, and the gradients of its parameters by the origins."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import sparseflow_kernels as sfk
from sparseflow_kernels.capture import capture, capture_with_origins
from sparseflow_kernels.field import GraphField
from sparseflow_kernels.field.graph import evaluate, order
from sparseflow_kernels.origin import Derivation, Recipe

F64 = torch.float64
L = nn.Linear
POINTS = 5
EDGES = torch.tensor([[0, 1, 1, 2, 3, 4, 4, 0], [1, 0, 2, 3, 4, 3, 0, 4]])


class Field(nn.Module):
    def __init__(self, rule, **parts) -> None:
        super().__init__()
        self.rule = rule
        for name, part in parts.items():
            if type(part) is Tensor:
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, t, y):
        return self.rule(self, t, y)


def net(*sizes: int, act=nn.Tanh) -> nn.Sequential:
    parts = [part for m, n in zip(sizes, sizes[1:]) for part in (L(m, n), act())]
    return nn.Sequential(*parts[:-1])


def made(rule, parts) -> nn.Module:
    torch.manual_seed(0)
    module = Field(rule, **(parts() if callable(parts) else parts)).double()
    for part in module.modules():
        if type(part) in (L, nn.Conv1d, nn.Conv2d) and not isinstance(part, nn.modules.linear.NonDynamicallyQuantizableLinear):
            prune.l1_unstructured(part, "weight", 0.4)
    return module.eval()


def flat(state) -> Tensor:
    return torch.cat([part.reshape(-1) for part in state]) if isinstance(state, (tuple, list)) else state.reshape(-1)


def state(like, seed: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    one = lambda x: scale * torch.randn(x.shape, generator=generator, dtype=F64)
    return tuple(map(one, like)) if isinstance(like, tuple) else one(like)


def value(field: GraphField, t: float, y, parts: list[Tensor]) -> Tensor:
    rows = y.reshape(-1, field.dim) if field.layout.plain else field.layout.flatten(y)
    inputs = {"state": rows, "time": torch.tensor([[t]], dtype=F64)}
    if field.context is not None:
        inputs["context"] = field.read_context()
    return flat(evaluate([field.output], inputs, parts.__getitem__)[0].expand_as(rows)) if field.layout.plain else flat(
        field.layout.unflatten(evaluate([field.output], inputs, parts.__getitem__)[0].expand_as(rows))
    )


def given(y):
    return tuple(part.clone() for part in y) if isinstance(y, tuple) else y.clone()


def check(module: nn.Module, like, example: bool) -> GraphField:
    """Values at several points, and the gradients of all parameters."""
    field, origins = capture_with_origins(module, like=like) if example else capture_with_origins(module, like.shape[-1])
    assert isinstance(field, GraphField) and list(origins) == [(n, "values") for n in range(len(field.parts))]
    parts = [part.values for part in field.parts]
    for seed, t in enumerate((0.0, 0.37, 1.3, -0.8)):
        y = state(like, seed, (1.0, 0.1, 2.0, 5.0)[seed])
        want = flat(module(torch.tensor(t, dtype=F64), given(y))).detach()
        torch.testing.assert_close(value(field, t, y, parts), want, rtol=1e-10, atol=1e-10)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        return field
    held = Derivation(Recipe(dict.fromkeys(dict(module.named_parameters()))), dict(module.named_parameters()))
    live = [held.tensor(origin) for origin in origins.values()]
    for one, part in zip(live, parts):
        torch.testing.assert_close(one.detach(), part, rtol=1e-12, atol=1e-12)
    y, weights = state(like, 9), torch.randn(flat(like).shape, generator=torch.Generator().manual_seed(5), dtype=F64)
    want = torch.autograd.grad(
        (flat(module(torch.tensor(0.4, dtype=F64), given(y))) * weights).sum(), parameters.values(), allow_unused=True)
    loss = (value(field, 0.4, y, live) * weights).sum()
    got = torch.autograd.grad(loss, parameters.values(), allow_unused=True) if loss.requires_grad else [None] * len(want)
    for (name, p), a, b in zip(parameters.items(), got, want):
        zero = torch.zeros_like(p)
        torch.testing.assert_close(
            zero if a is None else a, zero if b is None else b, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
    return field


FLAT = torch.zeros(4, 3, dtype=F64)  # an example [batch, dim]
H = lambda: {"a": L(3, 6), "b": L(6, 3)}
two = lambda act: (lambda m, t, y: m.b(act(m.a(y))), H)

ELEMENTWISE = {
    name: two(act) for name, act in {
        "leaky_relu": F.leaky_relu, "gelu": lambda x: F.gelu(x) + x, "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "mish": F.mish,
        "relu6": lambda x: F.relu6(3 * x), "hardswish": lambda x: F.hardswish(3 * x), "hardsigmoid": F.hardsigmoid,
        "hardtanh": F.hardtanh, "softsign": F.softsign, "logsigmoid": F.logsigmoid, "tanhshrink": F.tanhshrink,
        "softshrink": F.softshrink, "hardshrink": F.hardshrink, "threshold": lambda x: F.threshold(x, 0.1, -0.3),
        "selu + x": lambda x: F.selu(x) + x, "celu + x": lambda x: F.celu(x, 0.7) + x, "elu * x": lambda x: F.elu(x, 0.5) * x,
        "glu": lambda x: F.glu(torch.cat([x, 2 * x], -1), -1), "exp": lambda x: torch.exp(-x.square()), "expm1": torch.expm1,
        "log": lambda x: torch.log(x.square() + 1), "log1p": lambda x: torch.log1p(x.abs()), "log2": lambda x: (x * x + 1).log2(),
        "log10": lambda x: (x * x + 1).log10(), "sqrt": lambda x: (x * x + 0.1).sqrt(), "rsqrt": lambda x: (x * x + 1).rsqrt(),
        "reciprocal": lambda x: 1 / (2 + x.cos()), "abs": torch.abs, "sign": lambda x: x.sign() * x, "floor": lambda x: x - x.floor(),
        "ceil": lambda x: x.ceil() - x, "round": lambda x: (2 * x).round() * x, "trunc": lambda x: (3 * x).trunc() + x,
        "frac": lambda x: x.frac(), "fmod": lambda x: torch.fmod(x, 0.3), "remainder": lambda x: torch.remainder(x, 0.7),
        "remainder of a constant": lambda x: x % math.pi, "pow 4": lambda x: x**4, "pow 5": lambda x: x**5,
        "pow 1.5": lambda x: (x * x + 0.2) ** 1.5, "pow -1": lambda x: (x * x + 1) ** -1, "2 ** x": lambda x: 2.0**x,
        "x ** x": lambda x: (x * x + 0.5) ** x, "sin cos": lambda x: x.sin() * x.cos(), "tan": lambda x: (0.3 * x.tanh()).tan(),
        "sinh cosh": lambda x: x.sinh() / x.cosh(), "asin": lambda x: x.tanh().mul(0.9).asin(), "acos": lambda x: x.tanh().mul(0.9).acos(),
        "atan": torch.atan, "atan2": lambda x: torch.atan2(x, x * x + 0.3), "asinh": torch.asinh, "atanh": lambda x: (0.5 * x.tanh()).atanh(),
        "erf": torch.erf, "erfc": torch.erfc, "clamp": lambda x: x.clamp(-0.3, 0.4), "clamp max": lambda x: x.clamp(max=0.2),
        "clamp by a tensor": lambda x: torch.clamp(x, min=0.1 * x.cos(), max=torch.tensor(0.5, dtype=F64)),
        "where": lambda x: torch.where(x > 0.1, x, 0.2 * x), "where and": lambda x: torch.where((x > 0) & (x < 0.5), x.sin(), x.cos()),
        "where or not": lambda x: torch.where(~((x > 0.1) | (x <= -0.2)), x.sin(), 2 * x), "mask times": lambda x: (x > 0).to(x) * x.sin(),
        "masked_fill": lambda x: x.masked_fill(x < -0.1, 0.3), "maximum": lambda x: torch.maximum(x, x.sin()),
        "minimum of a number": lambda x: torch.minimum(x, torch.tensor(0.2, dtype=F64)), "heaviside": lambda x: torch.where(x == 0, x, x.sgn()),
        "lerp": lambda x: torch.lerp(x, x.sin(), 0.3), "addcmul": lambda x: torch.addcmul(x, x.sin(), x.cos(), value=0.5),
        "addcdiv": lambda x: torch.addcdiv(x, x.sin(), 2 + x.cos(), value=0.5), "hypot": lambda x: torch.hypot(x, x + 1),
        "rsub": lambda x: torch.rsub(x, 2.0, alpha=0.5) * x, "logaddexp": lambda x: torch.logaddexp(x, x.sin()), "sinc": torch.sinc,
        "nan_to_num": lambda x: torch.nan_to_num(x), "xlogy": lambda x: torch.xlogy(x * x, x * x + 1), "floor_divide": lambda x: x + x.detach() // 0.3,
        "div floor": lambda x: x + torch.div(x, 0.4, rounding_mode="floor"), "ldexp": lambda x: 2 ** torch.floor(x) * x,
        "softplus beta": lambda x: F.softplus(x, beta=3.0, threshold=2.0) * x, "in place": lambda x: x.sin().add_(1.0).mul_(x).relu_(),
        "square_": lambda x: (x + 0.5).square_() - x, "tanh gelu silu": lambda x: F.silu(x) + F.gelu(x) + torch.tanh(x),
        "cube": lambda x: x * x * x + x, "softmax": lambda x: torch.softmax(x, -1), "softmin": lambda x: F.softmin(x, -1),
        "log_softmax": lambda x: F.log_softmax(x, -1), "logsumexp": lambda x: x + torch.logsumexp(x, -1, keepdim=True),
        "layer norm": lambda x: F.layer_norm(x, (6,)), "rms norm": lambda x: F.rms_norm(x, (6,)), "norm": lambda x: x / (x.norm(dim=-1, keepdim=True) + 1),
        "normalize": lambda x: F.normalize(x, dim=-1), "norm 1": lambda x: x / (1 + x.norm(p=1, dim=-1, keepdim=True)),
        "norm 3": lambda x: x / (1 + x.norm(p=3, dim=-1, keepdim=True)), "norm inf": lambda x: x / (1 + x.norm(p=math.inf, dim=-1, keepdim=True)),
        "amax": lambda x: x - x.amax(-1, keepdim=True), "max": lambda x: x - x.max(-1, keepdim=True).values, "min": lambda x: x - x.min(-1, keepdim=True)[0],
        "bilinear": lambda x: x + F.bilinear(x, x.sin(), torch.arange(216.0, dtype=F64).view(6, 6, 6).sin()), "distances": lambda x: x + torch.cdist(x.view(-1, 2, 3), x.view(-1, 2, 3).sin() + 2).sum((1, 2))[:, None],
        "var": lambda x: x * x.var(-1, keepdim=True), "std": lambda x: x / (x.std(-1, keepdim=True) + 0.1), "mean": lambda x: x * x.mean(-1, keepdim=True),
        "var_mean": lambda x: (x - torch.var_mean(x, -1, keepdim=True)[1]), "prod": lambda x: x + x.prod(-1, keepdim=True),
        "cumsum": lambda x: x.cumsum(-1), "flip": lambda x: x.flip(-1) * x, "roll": lambda x: x.roll(1, -1) * x, "diff": lambda x: torch.cat([x.diff(dim=-1), x[:, :1]], 1) * x,
        "pairs": lambda x: (x[:, :, None] * x[:, None, :]).sum(-1), "outer": lambda x: torch.einsum("bi,bj->bij", x, x).mean(1),
        "cross": lambda x: torch.cat([torch.linalg.cross(x[:, :3], x[:, 3:]), x[:, :3]], 1), "gather": lambda x: x.gather(1, torch.arange(6).flip(0).expand(len(x), 6)) * x,
        "index": lambda x: x[:, [3, 1, 1, 0, 5, 2]] * x, "chunk": lambda x: torch.cat([a * b for a, b in [x.chunk(2, -1)] * 2], -1),
        "unbind": lambda x: torch.stack([a * (i + 1) for i, a in enumerate(x.unbind(-1))], -1) * x, "pad": lambda x: F.pad(x, (1, 2), value=0.5)[:, 1:7] * x,
        "group norm": lambda x: F.group_norm(x, 2), "instance norm": lambda x: F.instance_norm(x.view(-1, 2, 3)).reshape(-1, 6),
        "softmax of groups": lambda x: torch.softmax(x.view(-1, 2, 3), 1).reshape(-1, 6), "avg_pool": lambda x: F.avg_pool1d(x[:, None], 3, 1, 1)[:, 0] * x,
        "max_pool": lambda x: F.max_pool1d(x[:, None], 3, 1, 1)[:, 0], "masked sum": lambda x: x + (x * (x > 0)).sum(-1, keepdim=True),
        "any": lambda x: x * (x > 1).any(-1, keepdim=True), "dropout": lambda x: F.dropout(x, 0.3, training=False) * x.sin(), "tril": lambda x: (x[:, :, None] * x[:, None]).tril().sum(1),
        "diagonal": lambda x: torch.diagonal(x[:, :, None] * x[:, None], 0, 1, 2), "trace": lambda x: x * torch.einsum("bii->b", x[:, :, None] + x[:, None])[:, None],
        "cdist": lambda x: x + (x[:, None, :3, None] - x[:, None, None, 3:]).pow(2).sum((1, 3)).sqrt().repeat(1, 2), "kron": lambda x: (x[:, :2, None] * x[:, None, 3:]).flatten(1),
        "bmm of states": lambda x: torch.bmm(x.view(-1, 2, 3), x.view(-1, 3, 2)).flatten(1).repeat(1, 2)[:, :6],
        "matmul vector": lambda x: x + (x.view(-1, 2, 3) @ x[:, :3, None]).squeeze(-1).repeat(1, 3), "baddbmm": lambda x: torch.baddbmm(x.view(-1, 2, 3), x.view(-1, 2, 3), torch.ones(1, 3, 3, dtype=F64).expand(len(x), 3, 3)).flatten(1),
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_functions(name: str) -> None:
    rule, parts = ELEMENTWISE[name]
    check(made(rule, parts), FLAT, False)


def embedded(t: Tensor, rows: int) -> Tensor:
    phase = t.reshape(1, 1) * torch.exp(-torch.arange(4, dtype=F64))
    return torch.cat([phase.sin(), phase.cos()], -1).expand(rows, 8)


def film(m, t, y):
    scale, shift = m.e(embedded(t, len(y))).chunk(2, -1)
    return m.b(F.silu(m.a(y) * (1 + scale) + shift))


def gru(m, t, h):
    r, z = torch.sigmoid(m.r(h)), torch.sigmoid(m.z(h))
    return (1 - z) * (torch.tanh(m.n(r * h)) - h)


def hyper(m, t, y):
    p = m.h(t.reshape(1, 1)).reshape(-1)
    return F.linear(torch.tanh(F.linear(y, p[:12].view(4, 3), p[24:28])), p[12:24].view(3, 4)) + p[28:]


def ada(m, t, y):
    h = m.a(y)
    for block in (m.c, m.d):
        shift, scale, gate = m.e(embedded(t, 1)).chunk(3, -1)
        h = h + gate * block(F.layer_norm(h, (6,)) * (1 + scale) + shift)
    return m.b(h)


def written(m, t, y):
    out = torch.zeros_like(y)
    out[:, 0] = y[:, 1] * t
    out[:, 1:] = m.b(torch.tanh(m.a(y)))[:, :2]
    out[:, 2] += y[:, 0] ** 2
    out[:, 1].mul_(2.0)
    return out


def columns(m, t, y):
    x, dx = y.t(), torch.empty_like(y.t())
    dx[0], dx[1], dx[2] = x[1] * x[2], -x[0] * m.k[0], torch.sin(x[0]) * m.k[1]
    return dx.t()


def lorenz(m, t, y):
    a, b, c = y[..., 0], y[..., 1], y[..., 2]
    return torch.stack([m.s * (b - a), a * (m.r - c) - b, a * b - m.q * c], -1)


def mixture(m, t, y):
    return sum(w * f(y) for w, f in zip(torch.softmax(m.g(torch.cat([y, t.expand(len(y), 1)], 1)), -1).split(1, -1), m.f))


def parameter(*numbers: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(numbers[0] if len(numbers) == 1 else numbers, dtype=F64))


def with_sum(m, t, y):
    total = m.a(y)
    for _ in range(3):
        total = total + torch.tanh(m.c(total))
    return m.b(total)


def half_life(m, t, y):
    rate = torch.where(t > 0.5, m.k[0], m.k[1])
    return -rate * y * torch.exp(-((t - m.k[2]) ** 2)) + y.sin() * torch.clamp(t, 0.0, 1.0)


FIELDS = {
    "residual": (lambda m, t, y: y + m.b(torch.tanh(m.a(y))), H),
    "minus the state": (lambda m, t, y: -y + m.b(torch.relu(m.a(y))), H),
    "second order": (lambda m, t, y: torch.cat([y[:, 1:], m.a(y)], 1), lambda: {"a": net(3, 6, 1)}),
    "two activations": (
        lambda m, t, y: m.c(torch.cat([m.a(y).tanh(), m.a(y).sin()], 1)), lambda: {"a": L(3, 5), "c": L(10, 3)}),
    "layers that see the input again": (with_sum, lambda: {**H(), "c": L(6, 6)}),
    "film": (film, lambda: {**H(), "e": net(8, 10, 12)}),
    "adaptive norms": (ada, lambda: {**H(), "e": net(8, 10, 18), "c": net(6, 6, 6), "d": net(6, 6, 6)}),
    "gru": (gru, lambda: {"r": L(3, 3), "z": L(3, 3), "n": L(3, 3)}),
    "weights made from t": (hyper, lambda: {"h": net(1, 8, 31)}),
    "gated units": (lambda m, t, y: m.b(torch.sigmoid(m.c(y)) * m.a(y)), lambda: {**H(), "c": L(3, 6)}),
    "experts": (mixture, lambda: {"g": L(4, 2), "f": nn.ModuleList([net(3, 5, 3), net(3, 5, 3)])}),
    "prelu": (lambda m, t, y: m.b(m.p(m.a(y))), lambda: {**H(), "p": nn.PReLU(6)}),
    "one prelu": (lambda m, t, y: m.b(m.p(m.a(y))), lambda: {**H(), "p": nn.PReLU()}),
    "learned swish": (lambda m, t, y: m.b((h := m.a(y)) * torch.sigmoid(F.softplus(m.k) * h) / 1.1) + y, lambda: {**H(), "k": parameter(0.5)}),
    "layer norm": (lambda m, t, y: m.b(m.n(m.a(y)).tanh()), lambda: {**H(), "n": nn.LayerNorm(6)}),
    "group norm": (lambda m, t, y: m.b(m.n(m.a(y)).tanh()), lambda: {**H(), "n": nn.GroupNorm(2, 6)}),
    "batch norm": (lambda m, t, y: y + m.b(m.n(m.a(y)).tanh()), lambda: {**H(), "n": nn.BatchNorm1d(6)}),
    "a module used twice": (lambda m, t, y: m.b(m.c(m.c(m.a(y)).tanh()).tanh()) + y, lambda: {**H(), "c": L(6, 6)}),
    "transposed weights": (lambda m, t, y: y - torch.tanh(m.a(y)) @ m.a.weight * 0.5, H),
    "spectral norm": (lambda m, t, y: y + m.b(m.a(y).tanh()), lambda: {"a": parametrizations.spectral_norm(nn.Linear(3, 6)), "b": L(6, 3)}),
    "slices written": (written, H),
    "columns written": (columns, lambda: {"k": parameter(0.7, 1.3)}),
    "lorenz": (lorenz, lambda: {"s": parameter(10.0), "r": parameter(28.0), "q": parameter(2.7)}),
    "time in branches of torch": (half_life, lambda: {"k": parameter(0.7, 1.3, 0.2)}),
    "a lookup in t": (
        lambda m, t, y: m.b(m.a(y).tanh()) * m.table[torch.searchsorted(m.knots, t).clamp(max=3)] + y,
        lambda: {**H(), "table": torch.randn(4, 3), "knots": torch.tensor([0.0, 0.5, 1.0, 2.0])}),
    "numbers of t": (lambda m, t, y: y * float(t) + m.b(m.a(y).tanh()) * torch.full_like(y, t.item()), H),
    "samples twice": (
        lambda m, t, y: (lambda a, b: a + 2 * (a - b) * y)(*m.n(torch.cat([torch.cat([y, y]), torch.cat([torch.ones(len(y), 1, dtype=F64), torch.zeros(len(y), 1, dtype=F64)])], 1)).chunk(2)),
        lambda: {"n": net(4, 6, 3)}),
    "points laid end to end": (lambda m, t, y: m.n(y.reshape(-1, 1)).view_as(y) * y, lambda: {"n": net(1, 4, 1)}),
    "every sample by itself": (lambda m, t, y: torch.stack([m.n(q) * q for q in y]), lambda: {"n": net(3, 6, 3)}),
    "vmap": (lambda m, t, y: torch.func.vmap(lambda q: m.n(q) * q.norm())(y), lambda: {"n": net(3, 6, 3)}),
    "a rotation": (lambda m, t, y: y @ torch.linalg.matrix_exp(m.k - m.k.T) * y, lambda: {"k": nn.Parameter(torch.randn(3, 3))}),
    "orthogonal": (lambda m, t, y: m.a(y) + y.sin(), lambda: {"a": parametrizations.orthogonal(nn.Linear(3, 3))}),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name: str) -> None:
    rule, parts = FIELDS[name]
    check(made(rule, parts), FLAT, False)


# ------------------------------------------------------------------------------------------------ gradients in forward


def gradient_of(energy, **options):
    def rule(m, t, y):
        with torch.enable_grad():
            x = y.detach().requires_grad_(True) if options.get("detached") else y.requires_grad_(True)
            return torch.autograd.grad(energy(m, t, x).sum(), x, create_graph=True)[0]

    return rule


def hamiltonian(m, t, y):
    with torch.enable_grad():
        x = y.requires_grad_(True)
        g = torch.autograd.grad(m.n(x).sum(), x, create_graph=True)[0]
    return torch.cat([g[:, 2:], -g[:, :2]], 1)


ENERGIES = {
    name: nn_act for name, nn_act in {
        "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": F.softplus, "relu": torch.relu, "elu": F.elu, "silu": F.silu,
        "gelu": F.gelu, "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "leaky_relu": F.leaky_relu, "sin": torch.sin, "cos": torch.cos, "mish": F.mish, "exp": torch.exp,
        "log": lambda x: torch.log(1 + x * x), "sqrt": lambda x: (1 + x * x).sqrt(), "pow": lambda x: x**3 + x**2 * 0.5, "div": lambda x: x / (1 + x * x),
        "logsigmoid": F.logsigmoid, "hardtanh": F.hardtanh, "selu": F.selu, "softmax": lambda x: x * torch.softmax(x, -1), "log_softmax": lambda x: F.log_softmax(x, -1) * x,
        "logsumexp": lambda x: torch.logsumexp(x, -1, keepdim=True) * x, "layer norm": lambda x: F.layer_norm(x, (6,)) * x, "norm": lambda x: x.norm(dim=-1, keepdim=True) * x,
        "abs": torch.abs, "max": lambda x: x.amax(-1, keepdim=True) * x, "where": lambda x: torch.where(x > 0, x * x, x), "clamp": lambda x: x.clamp(-0.5, 0.5) * x, "index": lambda x: x[:, [1, 0, 2, 2, 4, 5]] * x,
        "mean": lambda x: x - x.mean(-1, keepdim=True) * x, "var": lambda x: x * x.var(-1, keepdim=True), "cat": lambda x: torch.cat([x[:, 3:].sin(), x[:, :3]], 1) * x, "cumsum": lambda x: x.cumsum(-1) * x, "prelu": lambda x: F.prelu(x, torch.tensor([0.3], dtype=F64)),
        "glu": lambda x: F.glu(torch.cat([x, x.sin()], -1), -1), "in place": lambda x: (x * 2).tanh_(), "conv": lambda x: F.conv1d(x[:, None], torch.tensor([[[0.3, -0.5, 0.7]]], dtype=F64), padding=1)[:, 0].tanh(), "pad": lambda x: F.pad(x, (1, 0))[:, :6] * x,
        "bmm": lambda x: torch.bmm(x.view(-1, 2, 3), x.view(-1, 3, 2)).flatten(1).repeat(1, 2)[:, :6],
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("name", ENERGIES)
def test_gradients_inside_forward(name: str) -> None:
    act = ENERGIES[name]
    check(made(gradient_of(lambda m, t, x: m.c(act(m.a(x)))), lambda: {"a": L(3, 6), "c": L(6, 1)}), FLAT, False)


GRADIENTS = {
    "hamiltonian": (hamiltonian, lambda: {"n": net(4, 8, 8, 1)}, torch.zeros(4, 4, dtype=F64)),
    "with time": (gradient_of(lambda m, t, x: m.n(torch.cat([x, t.expand(len(x), 1)], 1)) * t), lambda: {"n": net(4, 8, 1)}, FLAT),
    "two energies": (gradient_of(lambda m, t, x: 0.5 * m.n(x) + 0.1 * (x**2).sum(1, keepdim=True)), lambda: {"n": net(3, 8, 1)}, FLAT),
    "energies added after their sums": (
        lambda m, t, y: (lambda e: e)(_added(m, y)), lambda: {"n": net(3, 8, 1)}, FLAT),
    "left to the caller to allow": (
        lambda m, t, y: torch.autograd.grad(m.n(y.requires_grad_(True)).sum(), y, create_graph=True)[0] * t,
        lambda: {"n": net(3, 8, 1)}, FLAT),
    "vector-Jacobian product": (
        lambda m, t, y: _vjp(m, y), lambda: {"n": net(3, 8, 3)}, FLAT),
    "torch.func.grad": (
        lambda m, t, y: torch.func.vmap(torch.func.grad(lambda q: m.n(q).squeeze()))(y), lambda: {"n": net(3, 8, 1)}, FLAT),
}  # fmt: skip


def _added(m, y):
    with torch.enable_grad():
        x = y.requires_grad_(True)
        energy = m.n(x).sum() + 0.5 * x.square().sum()
        return -torch.autograd.grad(energy, x, create_graph=True)[0]


def _vjp(m, y):
    with torch.enable_grad():
        x = y.requires_grad_(True)
        dy = m.n(x)
        return torch.autograd.grad(dy, x, torch.ones_like(dy) * 0.5, create_graph=True)[0] + dy


def solved(m, t, y):
    q, v = y[:, :1].repeat(1, 2) + y[:, 1:], y[:, :2]
    mass = 2 * torch.eye(2, dtype=F64) + q[:, :, None] * q[:, None]
    force = torch.linalg.solve(mass, m.n(q)[:, :, None])[:, :, 0] + torch.inverse(mass)[:, 0] * torch.linalg.det(mass)[:, None]
    return torch.cat([force, v[:, :1]], 1)


def test_small_linear_systems() -> None:
    check(made(solved, {"n": net(2, 5, 2)}), FLAT, False)


@pytest.mark.parametrize("name", GRADIENTS)
def test_other_gradients_inside_forward(name: str) -> None:
    rule, parts, like = GRADIENTS[name]
    check(made(rule, parts), like, False)


def test_a_sum_over_samples_is_no_value() -> None:
    module = made(lambda m, t, y: m.n(y) * m.n(y).sum(), {"n": net(3, 4, 3)})
    with pytest.raises(sfk.UnsupportedFieldError, match="over the samples of the batch"):
        capture(module, 3)


# -------------------------------------------------------------------------------------------------- states of any shape


TOKENS, GRID, NODES = (torch.zeros(*shape, dtype=F64) for shape in ((4, POINTS, 3), (2, 3, 6, 6), (POINTS, 3)))


def messages(m, t, x):
    row, col = EDGES
    sent = m.n(torch.cat([x[row], x[col]], -1))
    return torch.zeros_like(x).index_add(0, row, sent) - x


def scattered(m, t, x):
    row, col = EDGES
    score = torch.exp(F.leaky_relu(m.n(torch.cat([x[row], x[col]], -1)), 0.2))
    total = torch.zeros(len(x), 1, dtype=F64).scatter_add(0, row[:, None], score)
    weights = score / total[row]
    return torch.zeros_like(x).scatter_add(0, row[:, None].expand(-1, 3), weights * x[col]) - x


def pairs(m, t, x):
    d = x[:, :, None] - x[:, None]
    r = (d.square().sum(-1, keepdim=True) + 0.1).sqrt()
    return (m.n(r) * d / r**3).sum(2)


def attention(m, t, x):
    q, k, v = m.qkv(x).view(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4)
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], 6))


def unet(m, t, x):
    h = torch.cat([x, t.expand(len(x), 1, *x.shape[2:])], 1)
    low = F.silu(m.down(F.gelu(m.first(h))))
    return m.last(torch.cat([F.interpolate(low, scale_factor=2), m.first(h)], 1))


CONVOLUTIONS = lambda: {
    "down": nn.Conv2d(4, 4, 3, stride=2, padding=1), "first": nn.Conv2d(4, 4, 3, padding=1), "last": nn.Conv2d(8, 3, 1)
}
SHAPED = {
    "tokens with their mean": (lambda m, t, x: m.n(torch.cat([x, x.mean(1, keepdim=True).expand_as(x)], -1)), lambda: {"n": net(6, 8, 3)}, TOKENS),
    "mixer": (lambda m, t, x: x + m.n(x.mT).mT * m.k(x), lambda: {"n": net(POINTS, 8, POINTS), "k": net(3, 6, 3)}, TOKENS),
    "a learned graph": (lambda m, t, x: torch.einsum("ij,bjd->bid", torch.softmax(m.A, -1), m.n(x)) - x, lambda: {"n": net(3, 6, 3), "A": nn.Parameter(torch.randn(POINTS, POINTS))}, TOKENS),
    "a fixed graph": (lambda m, t, x: torch.tanh(m.A @ m.n(x)), lambda: {"n": net(3, 6, 3), "A": torch.rand(POINTS, POINTS)}, TOKENS),
    "attention": (attention, lambda: {"qkv": L(3, 18), "out": L(6, 3)}, TOKENS),
    "multi-head attention": (lambda m, t, x: m.a(h := m.i(x), h, h)[0][..., :3] + x, lambda: {"a": nn.MultiheadAttention(4, 2, batch_first=True), "i": L(3, 4)}, TOKENS),
    "transformer": (lambda m, t, x: m.o(m.a(m.i(x))), lambda: {"a": nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True), "i": L(3, 4), "o": L(4, 3)}, TOKENS),
    "pairs of points": (pairs, lambda: {"n": net(1, 5, 1)}, TOKENS),
    "a place for every point": (lambda m, t, x: m.n(x + m.p) * x, lambda: {"n": net(3, 5, 3), "p": nn.Parameter(torch.randn(POINTS, 3))}, TOKENS),
    "recurrent cell": (lambda m, t, x: m.c(x, torch.tanh(x)) - x, lambda: {"c": nn.GRUCell(3, 3)}, torch.zeros(4, 3, dtype=F64)),
    "nodes": (messages, lambda: {"n": net(6, 8, 3)}, NODES),
    "attention on edges": (scattered, lambda: {"n": net(6, 8, 1)}, NODES),
    "all nodes at once": (lambda m, t, x: torch.softmax(x @ x.T, -1) @ m.n(x), lambda: {"n": net(3, 8, 3)}, NODES),
    "a sparse graph": (lambda m, t, x: torch.sparse.mm(m.A, m.n(x)) - x, lambda: {"n": net(3, 8, 3), "A": torch.sparse_coo_tensor(EDGES, torch.rand(8), (5, 5))}, NODES),
    "halves of the batch": (lambda m, t, x: torch.cat([x[3:], m.n(torch.cat([x[:3], x[3:]], 1))]), lambda: {"n": net(6, 8, 3)}, torch.zeros(6, 3, dtype=F64)),
    "samples as columns": (lambda m, t, x: m.n(x.t()).t() * x, lambda: {"n": net(3, 8, 3)}, torch.zeros(3, 4, dtype=F64)),
    "batch statistics": (lambda m, t, x: m.n(x) * F.batch_norm(x, None, None, training=True), lambda: {"n": net(3, 8, 3)}, torch.zeros(4, 3, dtype=F64)),
    "one vector": (lambda m, t, x: m.n(torch.cat([x, t[None]])) + x.norm() * x, lambda: {"n": net(4, 8, 3)}, torch.zeros(3, dtype=F64)),
    "a matrix": (lambda m, t, x: x @ m.k - m.k @ x + x @ x.mT, lambda: {"k": nn.Parameter(torch.randn(3, 3))}, torch.zeros(2, 3, 3, dtype=F64)),
    "a state of one number": (lambda m, t, x: -m.k * x * x, lambda: {"k": nn.Parameter(torch.rand(1))}, torch.zeros(4, dtype=F64)),
    "a pair": (lambda m, t, s: (s[1], -m.n(s[0]) * s[1]), lambda: {"n": net(3, 8, 3)}, (FLAT, FLAT)),
    "a pair of shapes": (lambda m, t, s: (m.n(s[0]) * s[1].mean((1, 2))[:, None], torch.zeros_like(s[1])), lambda: {"n": net(3, 8, 3)}, (FLAT, torch.zeros(4, 2, 5, dtype=F64))),
    "numbers of no batch": (lambda m, t, s: (s[1], -m.k * s[0].sin()), lambda: {"k": nn.Parameter(torch.rand(()))}, (torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64))),
    "parts of several sizes": (lambda m, t, s: (s[0] * s[1].sum(), s[1] * m.k), lambda: {"k": nn.Parameter(torch.rand(2))}, (torch.zeros(3, dtype=F64), torch.zeros(2, dtype=F64))),
    "convolutions": (lambda m, t, x: m.b(torch.relu(m.a(x))), lambda: {"a": nn.Conv2d(3, 4, 3, padding=1), "b": nn.Conv2d(4, 3, 3, padding=1)}, GRID),
    "strides, groups, dilation": (lambda m, t, x: m.b(torch.tanh(m.a(x))), lambda: {"a": nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3), "b": nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1)}, GRID),
    "dilated and circular": (lambda m, t, x: m.a(x).sin() + m.b(x), lambda: {"a": nn.Conv2d(3, 3, 3, padding=2, dilation=2), "b": nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")}, GRID),
    "transposed, groups": (lambda m, t, x: m.a(x).sin()[..., :6, :6], lambda: {"a": nn.ConvTranspose2d(3, 3, 3, groups=3, output_padding=1, stride=2)}, GRID),
    "unet": (unet, CONVOLUTIONS, GRID),
    "pools": (lambda m, t, x: F.interpolate(F.avg_pool2d(m.a(x), 2) + F.max_pool2d(x, 2), size=(6, 6), mode="bilinear") + F.adaptive_avg_pool2d(x, 1), lambda: {"a": nn.Conv2d(3, 3, 1)}, GRID),
    "group norm of images": (lambda m, t, x: m.a(torch.relu(m.n(x))), lambda: {"a": nn.Conv2d(3, 3, 3, padding=1), "n": nn.GroupNorm(3, 3)}, GRID),
    "batch norm of images": (lambda m, t, x: m.a(torch.relu(m.n(x))) * x, lambda: {"a": nn.Conv2d(3, 3, 3, padding=1), "n": nn.BatchNorm2d(3)}, GRID),
    "channels by their means": (lambda m, t, x: x * torch.sigmoid(m.a(x.mean((2, 3))))[:, :, None, None], lambda: {"a": L(3, 3)}, GRID),
    "a laplacian": (lambda m, t, x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), m.k.expand(3, 1, 3, 3), groups=3) - x**3, lambda: {"k": torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])}, GRID),
    "reflected, rolled": (lambda m, t, x: m.a(F.pad(x, (1, 1, 1, 1), mode="reflect")) * x.roll((1, -1), (2, 3)), lambda: {"a": nn.Conv2d(3, 3, 3)}, GRID),
    "shuffled": (lambda m, t, x: F.pixel_shuffle(F.pixel_unshuffle(x, 2).sin(), 2) * m.k, lambda: {"k": nn.Parameter(torch.rand(3, 1, 1))}, GRID),
    "a sequence": (lambda m, t, x: m.a(x).tanh() + m.b(x.mean(-1, keepdim=True)), lambda: {"a": nn.Conv1d(3, 3, 3, padding=1), "b": nn.Conv1d(3, 3, 1)}, torch.zeros(4, 3, 7, dtype=F64)),
    "unfolded": (lambda m, t, x: torch.einsum("bkl,ck->bcl", F.unfold(x, 3, padding=1), m.w).view_as(x) * x, lambda: {"w": nn.Parameter(torch.randn(3, 27))}, GRID),
    "a flat image": (lambda m, t, x: m.n(x.flatten(1)).view_as(x).sin(), lambda: {"n": net(12, 10, 12)}, torch.zeros(2, 3, 4, dtype=F64)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The inner type of a container", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", SHAPED)
def test_states_of_any_shape(name: str) -> None:
    rule, parts, like = SHAPED[name]
    check(made(rule, parts), state(like, 1), True)


@pytest.mark.parametrize("name, batched, shapes", [
    ("tokens with their mean", True, ((POINTS, 3),)), ("nodes", False, ((POINTS, 3),)), ("one vector", True, ((3,),)),
    ("all nodes at once", False, ((POINTS, 3),)), ("halves of the batch", False, ((6, 3),)), ("a pair", True, ((3,), (3,))),
    ("samples as columns", False, ((3, 4),)), ("batch statistics", False, ((4, 3),)), ("a state of one number", True, ((4,),)),
    ("parts of several sizes", False, ((3,), (2,))), ("convolutions", True, ((3, 6, 6),)), ("numbers of no batch", True, ((), ())),
])
def test_layouts(name: str, batched: bool, shapes: tuple) -> None:
    rule, parts, like = SHAPED[name]
    layout = capture(made(rule, parts), like=state(like, 1)).layout
    assert (layout.batched, layout.shapes, layout.is_tuple) == (batched, shapes, isinstance(like, tuple))


# --------------------------------------------------------------------------------------------------------------- context


class Conditioned(nn.Module):
    def __init__(self, encoded: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.n, self.encoder = net(5, 8, 3), net(4, 6, 2)
        self.given = {"c": torch.randn(6, 4 if encoded else 2)}
        self.encoded = encoded

    def forward(self, t, y):
        c = self.given["c"].to(y)
        return self.n(torch.cat([y, self.encoder(c) if self.encoded else c], 1))


def test_context_is_read_at_every_call() -> None:
    module = Conditioned().double()
    field = capture(module, 3)
    y = torch.randn(6, 3, dtype=F64)
    assert field.context.rows == 2 and field.layout.plain
    for batch in (6, 2):
        module.given["c"] = torch.randn(batch, 2, dtype=F64)
        parts = [part.values for part in field.parts]
        with torch.no_grad():
            want = module(torch.tensor(0.4, dtype=F64), y[:batch])
        torch.testing.assert_close(value(field, 0.4, y[:batch], parts), want.reshape(-1))
    module.given["c"].requires_grad_(True)
    assert field.read_context().requires_grad


def test_an_encoder_inside_forward_is_trained_by_the_context() -> None:
    module = Conditioned(encoded=True).double()
    field = capture(module, 3)
    context = field.read_context()
    torch.testing.assert_close(context, module.encoder(module.given["c"].double()))
    context.square().sum().backward()
    assert all(p.grad is not None for p in module.encoder.parameters())


def test_contexts_that_are_alike_when_they_are_read_are_contexts() -> None:
    module = Conditioned().double()
    module.given["c"] = torch.zeros(6, 2, dtype=F64)
    assert capture(module, 3).context.rows == 2


CONTEXT = torch.randn(6, 2, dtype=F64)
CONTEXTS = {
    "closure": lambda: Field((lambda c: lambda m, t, y: m.n(torch.cat([y, c], 1)))(CONTEXT.clone()), n=net(5, 6, 3)),
    "global": lambda: Field(lambda m, t, y: m.n(torch.cat([y, CONTEXT], 1)), n=net(5, 6, 3)),
    "buffer": lambda: Field(lambda m, t, y: m.n(torch.cat([y, m.c], 1)), n=net(5, 6, 3), c=CONTEXT),
    "gate": lambda: Field(lambda m, t, y: m.n(y) * torch.sigmoid(m.e(m.c)), n=net(3, 6, 3), e=L(2, 3), c=CONTEXT),
    "weights of its own": lambda: Field(
        lambda m, t, y: torch.bmm(m.w, m.n(y)[:, :, None])[:, :, 0], n=net(3, 6, 3), w=torch.randn(6, 3, 3)),
    "vmap of weights": lambda: Field(
        lambda m, t, y: torch.func.vmap(lambda w, q: torch.tanh(w @ m.n(q)))(m.w, y), n=net(3, 6, 3), w=torch.randn(6, 3, 3)),
    "labels": lambda: Field(lambda m, t, y: m.n(y) * m.e(m.c), n=net(3, 6, 3), e=nn.Embedding(4, 3), c=torch.tensor([0, 1, 3, 2, 1, 0])),
    "with time": lambda: Field(lambda m, t, y: m.n(y) + m.e(torch.cat([m.c, t.expand(6, 1)], 1)), n=net(3, 6, 3), e=net(3, 4, 3), c=CONTEXT),
    "a path read by time": lambda: Field(lambda m, t, y: m.n(y) + m.x[:, torch.round(t * 3).long().clamp(0, 8)], n=net(3, 6, 3), x=torch.randn(6, 9, 3)),
    "a spline of time": lambda: Field(_spline, n=net(3, 6, 3), a=torch.randn(6, 4, 3), b=torch.randn(6, 4, 3), knots=torch.linspace(0, 1, 5)),
}  # fmt: skip


def _spline(m, t, y):
    index = (torch.bucketize(t, m.knots) - 1).clamp(0, 3)
    return m.n(y) * (m.a[:, index] + m.b[:, index] * (t - m.knots[index]))


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts(name: str) -> None:
    torch.manual_seed(0)
    module = CONTEXTS[name]().double()
    field = capture(module, 3)
    parts = [part.values for part in field.parts]
    assert field.context is not None
    for t in (0.0, 0.4, 1.1):
        y = torch.randn(6, 3, dtype=F64)
        with torch.no_grad():
            torch.testing.assert_close(value(field, t, y, parts), module(torch.tensor(t, dtype=F64), y).reshape(-1))


# -------------------------------------------------------------------------------------------------------------- refusals


REFUSED = {
    "another dtype": (lambda m, t, y: (m.n(y).float() * 2).double() + y, "dtype to torch.float32"),
    "bits": (lambda m, t, y: m.n(y) * y.view(torch.int64).view(torch.float64), "bits of the state"),
    "sums of truth values": (lambda m, t, y: m.n(y) * ((y > 0) + (y < 1)), "truth values"),
    "where a condition holds": (lambda m, t, y: m.n(y) * y[y > 0].sum(), "torch.where"),
    "an index of other samples": (lambda m, t, y: m.n(y)[:, y.argmax(-1)], "across the samples"),
    "a branch": (lambda m, t, y: m.n(y) if y.sum() > 0 else y, "number out of the state|over the samples"),
    "a branch on an energy": (lambda m, t, y: m.n(y) if bool(m.n(y).mean() > 0) else y, "number out of|over the samples"),
    "complex numbers": (lambda m, t, y: torch.linalg.eigvals(y[:, :, None] * y[:, None]).real, "linalg_eig"),
    "the mean over samples": (lambda m, t, y: m.n(y) * y.mean(0), "over the samples"),
    "other samples": (lambda m, t, y: m.n(y) * y.roll(1, 0), "across the samples"),
    "samples in another order": (lambda m, t, y: m.n(y) + y.flip(0), "across the samples|first axis is not the batch"),
    "the number of samples": (lambda m, t, y: m.n(y) * y / len(y), "differs from the module"),
    "what was last": (lambda m, t, y: _remembering(m, y), "differs from the module"),
    "a large inverse": (
        lambda m, t, y: torch.inverse(torch.eye(9, dtype=F64) + (m.n(y) * y).mean(-1)[:, None, None].sin() * 0.1)[:, 0, :3],
        "matrices of 9 columns"),
}  # fmt: skip


def _remembering(m, y):
    before, m.last = getattr(m, "last", None), y.sum().item() if not torch._C._len_torch_dispatch_stack() else 0.0
    return m.n(y) * y + (before or 0.0)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    rule, words = REFUSED[name]
    with pytest.raises(sfk.UnsupportedFieldError, match=words):
        capture(made(rule, {"n": net(3, 5, 3)}), 3)


def test_parts_are_shared_between_points_and_uses() -> None:
    field = capture(made(*SHAPED["a place for every point"][:2]), like=state(TOKENS, 1))
    assert sorted(part.pattern.shape for part in field.parts if part.pattern is not None) == [(3, 5), (5, 3)]
    twice = capture(made(*FIELDS["a module used twice"]), 3)
    assert sum(part.pattern is not None for part in twice.parts) == 3


@pytest.mark.parametrize("name, act", [
    ("silu", F.silu), ("silu", lambda x: x * torch.sigmoid(x)), ("softplus", F.softplus), ("elu", F.elu), ("gelu", F.gelu),
    ("tanh", torch.tanh), ("relu", torch.relu), ("sin", torch.sin), ("cube", lambda x: x**3), ("cube", lambda x: x * x * x),
])
def test_activations_are_known_to_engines(name: str, act) -> None:
    field = capture(made(lambda m, t, y: y + m.b(act(m.a(y))), H), 3)
    known = field.graph.activations
    assert name in {known[node][0].name for node in order([field.output]) if node in known}


def test_masks_as_wide_as_the_batch_are_no_context() -> None:
    module = made(lambda m, t, y: m.b(torch.tanh(m.a(torch.cat([y, m.c], 1)))) + m.g(y) * m.k, lambda: {
        "a": L(5, 6), "b": L(6, 3), "g": L(3, 3), "k": torch.rand(3), "c": torch.randn(6, 2)})
    field, origins = capture_with_origins(module, 3)
    assert field.context.rows == 2
    assert not any(origin.computed for origin in origins.values())
