"""What forwards do beside computing: they fill tensors, mask, detach, differentiate, look up in t and cast."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torchdiffeq
from torch import nn
from torch.nn import functional as F

import sparseflow_kernels as sfk
from sparseflow_kernels.field import GraphField
from sparseflow_kernels.field.graph import order
from test_capture_graph import FLAT, POINTS, TOKENS, L, check, flat, given, made, net, parameter, state

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


def test_orders_of_many_numbers_and_positions_are_refused() -> None:
    wide = torch.zeros(4, 100, dtype=F64)
    with pytest.raises(sfk.UnsupportedFieldError, match="more than 64"):
        sfk.compile(made(lambda m, t, y: y.sort(1).values, {}), like=wide)
    with pytest.raises(sfk.UnsupportedFieldError, match="an order"):
        sfk.compile(made(lambda m, t, y: torch.zeros_like(y).scatter(1, *m.n(y).topk(2, 1)[::-1]), {"n": net(3, 6, 3)}), like=FLAT)


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

    return checkpoint(lambda h: torch.tanh(m.b(h)), m.n(y), use_reentrant=True)


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
    for step in range(3):
        torch.testing.assert_close(flat(field(T, y)), flat(module(T, given(y))), rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.1)
