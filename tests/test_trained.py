"""A compiled field trains what its module trains, and nothing else."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.utils.prune as prune
import torchdiffeq
from fields import FIELDS
from torch import nn
from torch.nn.utils import parametrizations

import sparseflow_kernels as sfk
from sparseflow_kernels.capture.replay import Computed

F64 = torch.float64
T = torch.tensor([0.0, 0.4, 1.0], dtype=F64)
FIRST_STEP = {"options": {"first_step": 0.05}}  # torchdiffeq differentiates the one that it chooses


class Made(nn.Module):
    def __init__(self, make, run) -> None:
        super().__init__()
        torch.manual_seed(0)
        make(self)
        self.run = run

    def forward(self, t, y):
        return self.run(self, t, y)


def linears(**sizes):
    def make(m):
        for name, (a, b) in sizes.items():
            setattr(m, name, nn.Linear(a, b))

    return make


def with_buffer(m):
    m.register_buffer("B", torch.randn(8, 2))
    m.out = nn.Linear(8, 2)


def frozen_first(m):
    linears(a=(2, 8), b=(8, 2))(m)
    m.a.requires_grad_(False)


def frozen_bias(m):
    linears(a=(2, 8), b=(8, 2))(m)
    m.a.bias.requires_grad_(False)


def pruned_rows(m):
    """Neurons without inputs: constants, which are folded into the next bias."""
    linears(a=(2, 8), b=(8, 8), c=(8, 2))(m)
    prune.custom_from_mask(m.a, "weight", (torch.arange(8) > 3)[:, None].expand(8, 2))
    prune.custom_from_mask(m.b, "weight", (torch.arange(8) % 3 > 0)[:, None].expand(8, 8))
    prune.custom_from_mask(m.c, "bias", torch.tensor([1.0, 0.0]))


def output_row_pruned(m):
    linears(a=(2, 2))(m)
    prune.custom_from_mask(m.a, "weight", torch.tensor([[1.0, 1.0], [0.0, 0.0]]))


def zero_start(m):
    linears(a=(2, 8), b=(8, 2))(m)
    nn.init.zeros_(m.b.weight)
    nn.init.zeros_(m.b.bias)


def gated_shut(m):
    linears(a=(2, 8), b=(8, 2))(m)
    m.s = nn.Parameter(torch.zeros(2))


def zero_low_rank(m):
    linears(a=(2, 8), b=(8, 2))(m)
    m.A, m.B = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.zeros(2, 3))


def normed(norm):
    def make(m):
        linears(a=(2, 8), b=(8, 2))(m)
        norm(m.a)
        m.eval()

    return make


def sparse_layers(m):
    linears(a=(2, 8), b=(8, 2), s=(1, 8))(m)
    for layer in (m.a, m.b):
        prune.l1_unstructured(layer, "weight", amount=0.6)
    sfk.sparsify_(m)


def time_network(m):
    linears(a=(2, 8), b=(8, 2), e=(2, 8))(m)


two = lambda m, t, y: m.b(torch.tanh(m.a(y)))
scattered = lambda v: torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 0]]), v, (2, 2), check_invariants=False)
wave = lambda t: torch.stack([torch.sin(t), torch.cos(3.0 * t)])
three = lambda m, t, y: m.c(torch.tanh(m.b(torch.tanh(m.a(y)))))
small = linears(a=(2, 8), b=(8, 2))
MADE = {
    "buffer": (with_buffer, lambda m, t, y: m.out(torch.tanh(y @ m.B.T))),
    "scales in the code": (small, lambda m, t, y: 0.5 * m.b(torch.tanh(2.0 * m.a(y)))),
    "constants in the code": (small, lambda m, t, y: m.b(torch.tanh(m.a(y) + 1.0)) + 0.1 * t),
    "powers of the state": (small, lambda m, t, y: m.b(torch.tanh(m.a(y**3)))),
    "normalised state": (small, lambda m, t, y: m.b(torch.tanh(m.a((y - y.new_tensor([0.3, -0.2])) / 1.7)))),
    "frozen layer": (frozen_first, two),
    "frozen bias": (frozen_bias, two),
    "two biases, one frozen": (frozen_bias, lambda m, t, y: m.b(torch.tanh(m.a(y) + m.b.bias.sum()))),
    "used twice": (linears(a=(2, 2)), lambda m, t, y: m.a(torch.tanh(m.a(y)))),
    "transpose of the first": (linears(a=(2, 8)), lambda m, t, y: torch.tanh(m.a(y)) @ m.a.weight),
    "one row shared": (small, lambda m, t, y: m.b(torch.tanh(m.a(y) + m.b.weight[0]))),
    "folded": (pruned_rows, three),
    "folded, with time": (pruned_rows, lambda m, t, y: m.c(torch.tanh(m.b(m.a(y) + t)))),
    "output row pruned": (output_row_pruned, lambda m, t, y: torch.tanh(m.a(y))),
    "zero start": (zero_start, two),
    "zero scale": (gated_shut, lambda m, t, y: m.s * m.b(torch.tanh(m.a(y)))),
    "zero scale, computed": (gated_shut, lambda m, t, y: torch.tanh(m.s) * m.b(torch.tanh(m.a(y)))),
    "zero low rank": (zero_low_rank, lambda m, t, y: torch.tanh(m.a(y)) @ (m.B @ m.A).T),
    "zero low rank, added": (zero_low_rank, lambda m, t, y: m.b(h := torch.tanh(m.a(y))) + h @ (m.B @ m.A).T),
    "weight norm": (normed(parametrizations.weight_norm), two),
    "old weight norm": (normed(torch.nn.utils.weight_norm), two),
    "spectral norm": (normed(parametrizations.spectral_norm), two),
    "product of two parameters": (linears(a=(2, 8), b=(8, 2), s=(1, 8)), lambda m, t, y: m.b(torch.tanh(m.a(y) * m.s.bias * m.s.weight[:, 0]))),
    "low rank": (linears(a=(2, 3), b=(3, 8), c=(8, 2)), lambda m, t, y: m.c(torch.tanh(nn.functional.linear(y, m.b.weight @ m.a.weight)))),
    "antisymmetric": (linears(a=(2, 2)), lambda m, t, y: torch.tanh(y @ (m.a.weight - m.a.weight.T) + m.a.bias)),
    "written in place": (small, lambda m, t, y: m.b(torch.tanh(nn.functional.linear(y, m.a.weight.clone().mul_(2.0).add_(0.1), m.a.bias)))),
    "scaled sparse layer": (sparse_layers, lambda m, t, y: m.b(torch.tanh(m.a(y) * m.s.bias))),
    "sparse tensor made of a parameter": (linears(a=(2, 2)), lambda m, t, y: torch.tanh(torch.sparse.mm(scattered(m.a.bias), y.T).T)),
    "detached twin": (linears(a=(2, 2)), lambda m, t, y: torch.tanh(m.a(y) + 0.5 * m.a.bias.detach())),
    "data of a parameter": (linears(a=(2, 2)), lambda m, t, y: torch.tanh(m.a(y) + m.a.bias.data)),
    "network of time": (time_network, lambda m, t, y: m.b(torch.tanh(m.a(y) + m.e(wave(t))))),
    "gate of time": (time_network, lambda m, t, y: m.b(torch.tanh(m.a(y)) * m.e(wave(t)).exp())),
    "time network shared": (time_network, lambda m, t, y: m.b(torch.tanh(m.a(y) + m.e(wave(t)) + m.e.bias))),
}  # fmt: skip


def made(name: str) -> nn.Module:
    module = Made(*MADE[name]) if name in MADE else FIELDS[name]()
    module = module.double()
    module.dim = 2 if name in MADE else module.dim
    return module


def loss_of(ys: torch.Tensor) -> torch.Tensor:
    weights = torch.randn(ys[-1].shape, generator=torch.Generator().manual_seed(5), dtype=F64)
    return (ys[-1] * weights).sum() + ys[1].square().sum()


def start(module: nn.Module) -> torch.Tensor:
    return 0.5 * torch.randn(4, module.dim, generator=torch.Generator().manual_seed(3), dtype=F64)


def pruned(name: str) -> nn.Module:
    module = made(name)
    torch.manual_seed(2)
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and "weight" in layer._parameters:
            prune.l1_unstructured(layer, "weight", amount=0.6)
    return module.eval()


# A pruned layer's plain attribute `weight` is made anew by the layer's own forward alone, which these do not call.
PAST_FORWARD = {"product of two parameters", "one row shared", "low rank", "antisymmetric", "written in place"}
CASES = [(name, masked) for name in (*MADE, *FIELDS) for masked in (False, True) if not masked or name not in PAST_FORWARD]


@pytest.mark.parametrize("name", sorted(PAST_FORWARD))
def test_attributes_that_masks_left_behind_are_refused(name: str) -> None:
    with pytest.raises(sfk.UnsupportedFieldError, match="requires a gradient and is no parameter"):
        sfk.compile(pruned(name))


@pytest.mark.parametrize("name, masked", CASES)
def test_gradients_and_a_step_are_the_modules(name: str, masked: bool) -> None:
    module = pruned(name) if masked else made(name)
    field = sfk.compile(module)
    y0 = start(module)
    parameters = dict(module.named_parameters())
    trained = [p for p in field.parameters() if p.requires_grad]
    assert bool(trained) == any(p.requires_grad for p in parameters.values())
    if not trained:
        return
    loss_of(torchdiffeq.odeint(module, y0, T, rtol=1e-7, atol=1e-7, **FIRST_STEP)).backward()
    loss_of(sfk.odeint(field, y0, T, rtol=1e-7, atol=1e-7, **FIRST_STEP)).backward()
    scale = max(float(p.grad.abs().max()) for p in parameters.values() if p.grad is not None)
    rest = {name: (torch.zeros_like(p) if p.grad is None else p.grad.clone()) for name, p in parameters.items()}
    for name, held in field.held(lambda p: torch.zeros_like(p) if p.grad is None else p.grad).items():
        theirs = rest[name].view(-1)
        elements = torch.arange(theirs.numel()) if held.elements is None else held.elements
        torch.testing.assert_close(held.values.reshape(-1), theirs[elements], rtol=1e-5, atol=1e-7 * scale)
        theirs[elements] = 0
    for name, gradient in rest.items():  # what the field does not hold has no gradient in the module either
        assert float(gradient.abs().max()) <= 1e-9 * scale, name

    stepped = {name: p.detach() - (0.0 if p.grad is None else 0.05 * p.grad) for name, p in parameters.items()}
    torch.optim.SGD(trained, lr=0.05).step()
    field.copy_to(module)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), stepped[name], rtol=1e-5, atol=1e-8 * scale, msg=lambda text: f"{name}: {text}")
    t = torch.tensor(0.7, dtype=F64)
    torch.testing.assert_close(field(t, y0), module(t, y0), rtol=1e-9, atol=1e-10)


def test_a_formula_that_gives_something_else_is_refused(monkeypatch) -> None:
    evaluate = Computed.evaluate
    monkeypatch.setattr(Computed, "evaluate", lambda self, derivation: 1.01 * evaluate(self, derivation))
    with pytest.raises(sfk.UnsupportedFieldError, match="0.values of the field.*something else when it is computed again"):
        sfk.compile(made("low rank"))


@pytest.mark.parametrize("name", ["scales in the code", "folded", "weight norm", "used twice", "network of time"])
def test_made_tensors_go_wherever_a_field_goes(name: str) -> None:
    module = made(name)
    field, y = sfk.compile(module), start(module)
    buffer = io.BytesIO()
    torch.save(field, buffer)
    buffer.seek(0)
    others = [copy.deepcopy(field), torch.load(buffer, weights_only=False), sfk.compile(field), sfk.compile(module)]
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(1.1)
        for other in others:
            assert not torch.allclose(other(0.3, y), field(0.3, y))
            other.load_state_dict(field.state_dict())
            torch.testing.assert_close(other(0.3, y), field(0.3, y))
        again = sfk.compile(field, "reference")
        torch.testing.assert_close(again(0.3, y), field(0.3, y))
        assert {n for n, _ in again.named_parameters()} == {n for n, _ in field.named_parameters()}
        torch.testing.assert_close(copy.deepcopy(field).float()(0.3, y.float()).double(), field(0.3, y), rtol=1e-4, atol=1e-5)
        again.copy_to(module)
        torch.testing.assert_close(module(torch.tensor(0.3, dtype=F64), y), field(0.3, y))


WAYS = ["scales in the code", "folded", "used twice", "network of time", "time network shared"]


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("name", WAYS)
def test_parameters_lent_for_a_call_get_the_gradients(name: str, engine: str) -> None:
    module = made(name)
    field, y, t = sfk.compile(module, engine), start(module), torch.tensor(0.3, dtype=F64)
    wanted = torch.autograd.grad(field(t, y).square().sum(), list(field.parameters()))
    lent = {n: p.detach().clone().requires_grad_() for n, p in field.named_parameters()}
    for _ in range(2):
        found = torch.autograd.grad(torch.func.functional_call(field, lent, (t, y)).square().sum(), list(lent.values()))
        torch.testing.assert_close(found, wanted)
        assert all(p.grad is None for p in field.parameters())
    again = torch.autograd.grad(field(t, y).square().sum(), list(field.parameters()))
    torch.testing.assert_close(again, wanted)


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("name", WAYS)
def test_states_that_are_assigned_or_averaged_load(name: str, engine: str) -> None:
    module = made(name)
    one, other, y = sfk.compile(module, engine), sfk.compile(module, engine), start(module)
    with torch.no_grad():
        for p in one.parameters():
            p.mul_(1.1)
    before = other(0.3, y)
    other.load_state_dict({n: v.clone() for n, v in one.state_dict().items()}, assign=True)
    assert not torch.equal(other(0.3, y), before)
    for field in (one, other):
        field(0.3, y).square().sum().backward()
    for (n, p), q in zip(other.named_parameters(), one.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text: f"{n}: {text}")
    assert torch.equal(other(0.3, y), one(0.3, y))
    mean = {n: 0.999 * v + 0.001 * v for n, v in one.state_dict().items()}
    for tensor, v in zip(mean.values(), one.state_dict().values()):
        tensor.mul_(0.9).add_(v, alpha=0.1)
    other.load_state_dict(mean)
    torch.testing.assert_close(other(0.3, y), one(0.3, y))


def test_entries_that_the_module_does_not_have_get_no_gradient() -> None:
    module = made("powers of the state")
    prune.custom_from_mask(module.b, "bias", torch.tensor([1.0, 0.0]))
    field, y, t = sfk.compile(module), start(module), torch.tensor(0.3, dtype=F64)
    lent = {n: p.detach().clone().requires_grad_() for n, p in field.named_parameters()}
    for one in (field, copy.deepcopy(field)):
        one.load_state_dict(field.state_dict(), assign=True)
        one(t, y).sum().backward()
        assert one.layers[-1].bias.grad.tolist() == [4.0, 0.0]
        one.layers[-1].bias.grad = None
    torch.func.functional_call(field, lent, (t, y)).sum().backward()
    assert lent[f"layers.{len(field.layers) - 1}.bias"].grad.tolist() == [4.0, 0.0]


def test_a_field_follows_its_dtype_there_and_back() -> None:
    field, y = sfk.compile(made("powers of the state")), start(made("buffer"))
    before = field(0.3, y)
    for dtype in (torch.float32, F64, torch.float32, F64):
        out = field.to(dtype)(0.3, y.to(dtype))
        torch.testing.assert_close(out.double(), before, rtol=1e-5, atol=1e-6)


def test_weights_that_training_leaves_at_zero_and_frozen_copies_can_be_written_to_again() -> None:
    def make() -> nn.Module:
        module = Made(linears(a=(2, 8), b=(8, 2)), lambda m, t, y: m.b(torch.relu(m.a(y)))).double()
        nn.init.zeros_(module.b.weight)
        with torch.no_grad():
            module.a.bias[:3] = -10.0  # units that never fire
        return module

    module, y = make(), start(made("buffer"))
    field, copies = sfk.compile(module), [module, make().requires_grad_(False)]
    copies[1].b.weight.requires_grad_(True)
    optimizer = torch.optim.SGD(field.parameters(), lr=0.1)
    for _ in range(3):
        field(0.3, y).square().sum().backward()
        optimizer.step()
        for one in copies:
            field.copy_to(one)
            assert torch.equal(one.b.weight[:, :3], torch.zeros(2, 3))
            torch.testing.assert_close(one(torch.tensor(0.3, dtype=F64), y), field(0.3, y))


def test_a_parameter_that_starts_at_zero_is_no_missing_one() -> None:
    def run(m, t, y):
        h = m.a(y)
        return m.b(h * (torch.sigmoid(h) + m.e.bias))

    module = Made(linears(a=(2, 8), b=(8, 2), e=(1, 8)), run)
    nn.init.zeros_(module.e.bias)
    field = sfk.compile(module)
    assert {"a", "b", "e"} <= {name.split(".")[0] for origin in field.origins.values() for name in origin.parameters}


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, torch.nn.utils.spectral_norm])
def test_norms_that_update_themselves_in_training_ask_for_eval(norm) -> None:
    module = Made(normed(norm), two).double()
    with pytest.raises(sfk.UnsupportedFieldError, match=r"spectral norm.*Call .eval\(\)"):
        sfk.compile(module.train())
    sfk.compile(module.eval())


def test_freezing_a_field_and_thawing_it_trains_no_more_than_the_module_has() -> None:
    field = sfk.compile(made("constants in the code"))
    before = {name: b.clone() for name, b in field.named_buffers()}
    assert before
    field.requires_grad_(False).requires_grad_(True)
    field(0.3, start(made("buffer"))).sum().backward()
    torch.optim.SGD(field.parameters(), lr=1.0, weight_decay=0.5).step()
    assert all(torch.equal(b, before[name]) for name, b in field.named_buffers())


def test_a_tensor_of_outside_that_is_trained_is_refused() -> None:
    outside = nn.Parameter(torch.ones(2, dtype=F64))
    module = Made(linears(a=(2, 2)), lambda m, t, y: m.a(y) * outside).double()
    with pytest.raises(sfk.UnsupportedFieldError, match="requires a gradient and is no parameter.*Register it"):
        sfk.compile(module, dim=2)
    outside.requires_grad_(False)
    assert len(list(sfk.compile(module, dim=2).parameters())) == 2


def with_masks(row: int) -> nn.Module:
    module = made("powers of the state")
    mask = torch.ones(8, 2)
    mask[row, 1] = 0
    return prune.custom_from_mask(module.a, "weight", mask) and module


def test_a_state_dict_of_other_masks_is_refused() -> None:
    one, other = sfk.compile(with_masks(0)), sfk.compile(with_masks(1))
    assert [p.shape for p in one.parameters()] == [p.shape for p in other.parameters()]
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError, match="layer 'a'.*other masks"):
        other.load_state_dict(one.state_dict())
    assert all(torch.equal(b, before[name]) for name, b in other.state_dict().items())
    sfk.compile(with_masks(0)).load_state_dict(one.state_dict())
    old = {name: tensor for name, tensor in one.state_dict().items() if "_extra_state" not in name}
    with pytest.warns(UserWarning, match="does not say for which pattern"):
        sfk.compile(with_masks(0)).load_state_dict(old)


def test_pruning_or_parametrizing_a_compiled_field_says_what_to_do() -> None:
    field, y = sfk.compile(made("folded")), start(made("folded"))
    before = field(0.2, y)
    for call in (
        lambda: prune.l1_unstructured(field.layers[0], "values", amount=0.5),
        lambda: prune.global_unstructured([(field.layers[0], "values")], prune.L1Unstructured, amount=0.5),
        lambda: prune.identity(field.layers[1], "values"),
    ):
        with pytest.raises(TypeError, match="Prune or parametrize the module, then compile it"):
            call()
        assert torch.equal(field(0.2, y), before)
    with pytest.raises(TypeError, match="Prune or parametrize the module"), pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(field.layers[0], "bias", dim=None)
    with pytest.raises(RuntimeError, match="prune or parametrize the module, then compile"):
        field(0.2, y)


def test_a_field_used_twice_in_a_flow_stays_one() -> None:
    torch.manual_seed(1)
    field = sfk.flows.mlp_field(2, (8,)).double()
    flow = sfk.ContinuousFlow([field, field], 2)
    compiled, x = flow.compile(), start(made("buffer"))
    assert compiled.vector_fields[0] is compiled.vector_fields[1]
    for one in (flow, compiled):
        one.log_prob(x).mean().backward()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
    torch.testing.assert_close(compiled.log_prob(x), flow.log_prob(x), rtol=1e-5, atol=1e-5)
    compiled.copy_to(flow)
    torch.testing.assert_close(compiled.log_prob(x), flow.log_prob(x), rtol=1e-5, atol=1e-5)
    other = sfk.flows.mlp_field(2, (8,)).double()
    other.layers[0] = field.layers[0]
    with pytest.raises(ValueError, match=r"vector_fields\[1\] shares its parameter"):
        sfk.ContinuousFlow([field, other], 2).compile()
