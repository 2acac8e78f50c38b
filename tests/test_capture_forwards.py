"""What forwards do beside computing: they fill tensors, put numbers in order, check them and mask them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparseflow_kernels as sfk
from sparseflow_kernels.field.graph import order
from test_capture_graph import FLAT, POINTS, TOKENS, L, check, made, net, parameter

F64 = torch.float64
T = torch.tensor(0.4, dtype=F64)
FROM, TO = torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0, 2, 0])


# --------------------------------------------------------------------------------------------------- tensors are filled


def added_at_an_index(m, t, y):
    out = torch.zeros_like(y)
    out.index_add_(1, TO, m.n(y)[:, FROM])
    return out - y


def added_in_a_loop(m, t, y):
    out = torch.zeros(len(y), 3, dtype=y.dtype)
    for i in range(3):
        for j in range(3):
            if i != j:
                out[:, i] += m.k[j] * torch.sin(y[:, j] - y[:, i])
    return out


def added_to_another_dtype(m, t, y):
    out = torch.zeros(len(y), 3).to(y)
    out += m.n(y)
    out *= t
    return out


def scattered(m, t, y):
    out = y.new_zeros(len(y), 3)
    out.scatter_add_(1, TO[None].expand(len(y), -1), m.n(y)[:, FROM])
    return out


def filled_beside_time(m, t, y):
    features = torch.ones(len(y), 2, dtype=y.dtype)
    features[:, 1] = features[:, 1] * t
    return m.n(torch.cat([y, features], 1))


def edges_kept_by_batch(m, t, y):
    """The indices of all samples' edges, made at the first call for so many samples."""
    if len(y) not in m.kept:
        m.kept[len(y)] = torch.cat([FROM + 3 * i for i in range(len(y))]), torch.cat([TO + 3 * i for i in range(len(y))])
    row, col = m.kept[len(y)]
    x = y.reshape(-1, 1)
    sent = m.n(torch.cat([x[row], x[col], torch.full((len(row), 1), t.item(), dtype=y.dtype)], 1))
    return torch.zeros_like(x).index_add_(0, row, sent).view_as(y)


def matrix_of_entries(m, t, y):
    """A lower triangle written into zeros, its square, and something on its diagonal."""
    low = torch.zeros(len(y), 3, 3, dtype=y.dtype)
    low[:, [1, 2, 2], [0, 0, 1]] = m.n(y)
    square = low @ low.mT
    for i in range(3):
        square[:, i, i] += 0.1
    return (square @ y[:, :, None])[:, :, 0]


FILLED = {
    "added at an index": (added_at_an_index, lambda: {"n": net(3, 6, 3)}),
    "added in a loop": (added_in_a_loop, lambda: {"k": parameter(0.7, 1.3, -0.2)}),
    "added to zeros of another dtype": (added_to_another_dtype, lambda: {"n": net(3, 6, 3)}),
    "scattered": (scattered, lambda: {"n": net(3, 6, 3)}),
    "filled with a function of t": (filled_beside_time, lambda: {"n": net(5, 6, 3)}),
    "indices kept at the first call": (edges_kept_by_batch, lambda: {"n": net(3, 6, 1), "kept": {}}),
    "a matrix by its entries": (matrix_of_entries, lambda: {"n": net(3, 6, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILLED)
def test_tensors_that_are_filled(name: str) -> None:
    rule, parts = FILLED[name]
    check(made(rule, parts), FLAT, False)


def test_the_gradient_of_what_was_written_into_a_part() -> None:
    def energy(m, t, y):
        with torch.enable_grad():
            x = y.requires_grad_(True)
            return torch.autograd.grad((matrix_of_entries(m, t, x) * x).sum(), x, create_graph=True)[0]

    check(made(energy, {"n": net(3, 6, 3)}), FLAT, False)


def copied_to_places(m, t, y):
    moved = torch.zeros_like(y).index_copy(1, TO[:1], m.n(y)[:, :1]) + y.index_copy(1, FROM[:1], 2 * y[:, 1:2])
    return moved.index_fill(1, FROM[3:], 0.5)


def written_where(m, t, y):
    h = m.n(y).clone()
    h[h > 0.2] = 0.2
    h[y[:, 0] > 0.5] = 0.1
    return h


MOVED = {"copied to places": copied_to_places, "one number where a condition holds": written_where}


@pytest.mark.parametrize("name", MOVED)
def test_places_and_conditions_that_are_written_to(name: str) -> None:
    check(made(MOVED[name], {"n": net(3, 6, 3)}), FLAT, False)


def test_other_writes_where_a_condition_holds_say_what_to_do() -> None:
    def rule(m, t, y):
        h = m.n(y).clone()
        h[h > 0.2] = y[h > 0.2]
        return h

    with pytest.raises(sfk.UnsupportedFieldError, match="torch.where"):
        sfk.compile(made(rule, {"n": net(3, 6, 3)}), like=FLAT)


# -------------------------------------------------------------------------------------------------- orders, and running products


ORDERED = {
    "sort": lambda x: torch.sort(x, dim=1).values * torch.arange(3.0), "sort down": lambda x: x.sort(descending=True)[0].cumsum(1),
    "median": lambda x: x - x.median(1, keepdim=True).values, "kthvalue": lambda x: x * x.kthvalue(2, 1, keepdim=True)[0],
    "topk": lambda x: x * x.topk(2, 1).values.sum(1, keepdim=True), "smallest": lambda x: x * x.topk(1, 1, largest=False).values,
    "cumprod": lambda x: x.cumprod(1), "cummax": lambda x: x.cummax(1)[0] * x, "logcumsumexp": lambda x: x.logcumsumexp(1),
    "middle of samples": lambda x: x * x.t().sort(0).values.t(),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERED)
def test_orders_and_running_products(name: str) -> None:
    check(made(lambda m, t, y: ORDERED[name](m.n(y)) + y, {"n": net(3, 6, 3)}), FLAT, False)


def test_orders_of_many_numbers_are_refused() -> None:
    wide = torch.zeros(4, 100, dtype=F64)
    with pytest.raises(sfk.UnsupportedFieldError, match="more than 64"):
        sfk.compile(made(lambda m, t, y: y.sort(1).values, {}), like=wide)


REDUCED = {
    f"{name}{' with itself' * itself}": (name, itself) for name in ("mean", "prod", "amax", "sum") for itself in (False, True)
}


@pytest.mark.parametrize("name", REDUCED)
def test_what_is_gathered_from_neighbours(name: str) -> None:
    reduce, itself = REDUCED[name]
    edges = TO[:, None].expand(-1, 3)

    def rule(m, t, x):
        return (0.5 * x.sin()).scatter_reduce(0, edges, m.n(x)[FROM], reduce, include_self=itself) - x

    check(made(rule, {"n": net(3, 4, 3)}), torch.zeros(POINTS, 3, dtype=F64), True)


# --------------------------------------------------------------------------------------------- checks that a solve passes


def asserts(m, t, y):
    assert not torch.isnan(y).any() and torch.isfinite(y).all(), "the state is no number"
    h = m.n(y)
    if torch.isnan(h.sum()) or torch.isinf(h).any().item():
        raise ValueError("the field is no number")
    return h * torch.where(torch.isnan(y), torch.zeros_like(y), y)


def test_checks_that_numbers_are_finite() -> None:
    check(made(asserts, {"n": net(3, 6, 3)}), FLAT, False)


@pytest.mark.parametrize("rule", [
    lambda m, t, y: m.n(y) if (y < 3).all() else y, lambda m, t, y: m.n(y) if y.isnan().any() or y.max() < 3 else y,
    lambda m, t, y: m.n(y) if (torch.isnan(y) | (y > 0)).any() else y,
])  # fmt: skip
def test_other_questions_about_the_state_are_refused(rule) -> None:
    with pytest.raises(sfk.UnsupportedFieldError, match="reading a number"):
        sfk.compile(made(rule, {"n": net(3, 6, 3)}), like=FLAT)


def test_what_the_last_call_was_given_is_refused() -> None:
    def rule(m, t, y):
        dy = m.n(y)
        last, m.last = getattr(m, "last", None), dy.detach()
        return dy if last is None or last.shape != dy.shape else 0.9 * dy + 0.1 * last

    with pytest.raises(sfk.UnsupportedFieldError, match="keep state between calls"):
        sfk.compile(made(rule, {"n": net(3, 6, 3)}).float(), like=FLAT.float())


# ----------------------------------------------------------------------------------------------------- masks of attention


def heads(m, x):
    return m.qkv(x).view(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4)


def causal(m, t, x):
    q, k, v = heads(m, x)
    return m.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(*x.shape[:2], 6)) * t


def masked(m, t, x):
    q, k, v = heads(m, x)
    score = (q @ k.mT / math.sqrt(3)).masked_fill(m.triangle == 0, float("-inf"))
    return m.out((score.softmax(-1) @ v).transpose(1, 2).reshape(*x.shape[:2], 6))


def added_mask(m, t, x):
    h = m.emb(x)
    return m.out(m.attention(h, h, h, attn_mask=m.triangle == 0, need_weights=False)[0])


def neighbours(m, t, x):
    h = m.emb(x)
    score = torch.where(m.triangle > 0, F.leaky_relu(h @ h.mT), -math.inf * torch.ones_like(m.triangle))
    return m.out(torch.softmax(score, 1) @ h)


TRIANGLE = torch.tril(torch.ones(POINTS, POINTS, dtype=F64))
MASKED = {
    "causal": (causal, lambda: {"qkv": L(3, 18), "out": L(6, 3)}),
    "filled with -inf": (masked, lambda: {"qkv": L(3, 18), "out": L(6, 3), "triangle": TRIANGLE}),
    "a mask that is added": (added_mask, lambda: {
        "emb": L(3, 4), "out": L(4, 3), "triangle": TRIANGLE, "attention": nn.MultiheadAttention(4, 2, batch_first=True)}),
    "neighbours": (neighbours, lambda: {"emb": L(3, 4), "out": L(4, 3), "triangle": TRIANGLE}),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKED)
def test_masks_of_attention(name: str) -> None:
    rule, parts = MASKED[name]
    field = check(made(rule, parts), TOKENS, True)
    constants = [node.tensor for node in order([field.output]) if node.kind == "constant"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in constants)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(layer) -> None:
    torch.manual_seed(0)
    rule = lambda m, t, x: m.r(x)[0] - x
    module = made(rule, {"r": layer(3, 3, batch_first=True)})
    for dtype in (torch.float32, F64):  # float32 has an operation of its own
        sfk.compile(module.to(dtype), like=TOKENS.to(dtype))
    check(module, TOKENS, True)


def test_a_line_that_is_masked_whole_is_refused() -> None:
    module = made(masked, {"qkv": L(3, 18), "out": L(6, 3), "triangle": torch.zeros(POINTS, POINTS, dtype=F64)})
    with pytest.raises(sfk.UnsupportedFieldError, match="every element is masked"):
        sfk.compile(module, like=TOKENS)


AT_ZERO = {
    "asinh": torch.asinh, "clamp": lambda y: y.clamp(min=0.0), "clamp_min": lambda y: y.clamp_min(0.0), "sinc": torch.sinc,
    "atan2": lambda y: torch.atan2(y, 2.0 * y), "hardshrink": lambda y: torch.nn.functional.hardshrink(y, 0.0),
    "threshold": lambda y: torch.nn.functional.threshold(y, 0.0, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_ZERO)
def test_derivatives_at_zero_are_torchs(name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, t, y):
            return 2.0 * AT_ZERO[name](y) - y

    module = Module()
    field = sfk.compile(module, dim=2)
    found = [torch.zeros(3, 2).requires_grad_() for _ in range(2)]
    for function, y in zip((field, module), found):
        function(0.0, y).sum().backward()
    torch.testing.assert_close(found[0].grad, found[1].grad)
    for size in (1e-6, 1e-3, 0.1, 3.0):
        y = size * torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(field(0.0, y), module(0.0, y), rtol=1e-5, atol=0)


def test_asinh_of_what_has_no_square() -> None:
    class Module(torch.nn.Module):
        def forward(self, t, y):
            return torch.asinh(y)

    y = torch.tensor([[1e30, -1e30], [math.inf, -math.inf], [1e8, -1e10]])
    torch.testing.assert_close(sfk.compile(Module(), dim=2)(0.0, y), torch.asinh(y.double()).float())


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float64, 1e-15)])
def test_waves_of_large_numbers(dtype: torch.dtype, limit: float) -> None:
    class Module(torch.nn.Module):
        def forward(self, t, y):
            return torch.cos(y) + torch.sin(y)

    y = (torch.rand(500, 2, generator=torch.Generator().manual_seed(0)).double() * 1e5).to(dtype)
    found = sfk.compile(Module(), dim=2).to(dtype)(0.0, y)
    assert float((found.double() - (y.double().cos() + y.double().sin())).abs().max()) < limit


@pytest.mark.parametrize("weights", [False, True])
def test_attention_under_a_mask(weights):
    """Minus infinity above the diagonal, added to the scores of several heads."""

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))
            self.double()

        def forward(self, t, x):
            return self.attention(x, x, x, attn_mask=self.mask, need_weights=weights)[0]

    module, x = Causal(), torch.randn(6, 5, 4).double()
    field = sfk.compile(module, like=x, live=True)
    assert field.layout.batched and field.engine_name == "cpu"
    found = []
    for func in (module, field):
        y = x.clone().requires_grad_()
        out = func(torch.tensor(0.0).double(), y)
        found.append((out, torch.autograd.grad(out.square().sum(), [y, *module.parameters()])))
    torch.testing.assert_close(*found)
