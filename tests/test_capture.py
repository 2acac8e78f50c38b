"""capture reads the program out of user modules by meaning: equal to the module to rounding, or a clear refusal."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
from torch import Tensor, nn

from fields import ACTS, FIELDS, KINDS, TimeFullLike, make_ffjord
from random_fields import plain_forward
from sparseflow_kernels.capture import capture, capture_with_origins
from sparseflow_kernels.field import GraphField, LinearShift, SigmoidGate, UnsupportedFieldError, VectorField
from sparseflow_kernels.field.graph import TIME, order

TIMES = (-1.0, 0.0, 0.3, 1.9)
DTYPES = {"float64": (torch.float64, 1e-12), "float32": (torch.float32, 1e-4)}


def assert_equal(module: nn.Module, field: VectorField, tolerance: float = 1e-12) -> None:
    generator = torch.Generator().manual_seed(5)
    y = torch.randn(6, field.dim, generator=generator, dtype=torch.float64).to(field.dtype)
    for value in TIMES:
        t = torch.tensor(value, dtype=field.dtype)
        with torch.no_grad():
            torch.testing.assert_close(plain_forward(field, t, y)[0], module(t, y), rtol=tolerance, atol=tolerance)


def linears(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(m, "weight") for m in module.modules() if isinstance(m, nn.Linear)]


class Doubled(nn.Module):
    """A parametrization: the weight is computed from its parameter."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


def build(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return FIELDS[name]().to(dtype)


def module_of(function: Callable, **parts: nn.Module) -> nn.Module:
    """A module with the given parts whose forward is function(self, t, y), in float64."""

    class Module(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return function(self, t, y)

    torch.manual_seed(0)
    module = Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module.double()


# ------------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FIELDS)
def test_equals_the_module(name: str, dtype: str) -> None:
    module = build(name, DTYPES[dtype][0])
    field = capture(module)
    assert field.dim == module.dim and field.dtype == DTYPES[dtype][0]
    assert not any(x.requires_grad for _, x in field.tensors())
    assert_equal(module, field, DTYPES[dtype][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, build in FIELDS.items() if linears(build())])
def test_reads_through_prune_masks(name: str, dtype: str) -> None:
    module = build(name, DTYPES[dtype][0])
    targets = linears(module)
    full = capture(module).nnz
    prune.global_unstructured(targets, pruning_method=prune.L1Unstructured, amount=0.7)
    field = capture(module)
    assert field.nnz < full
    assert bool(torch.cat([x.values for x in field.layers]).all())
    assert_equal(module, field, DTYPES[dtype][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, build in FIELDS.items() if linears(build())])
def test_reads_through_a_parametrization(name: str, dtype: str) -> None:
    module = build(name, DTYPES[dtype][0])
    parametrize.register_parametrization(linears(module)[0][0], "weight", Doubled())
    assert_equal(module, capture(module), DTYPES[dtype][1])


def test_time_functions_follow_the_dtype_of_t() -> None:
    module = build("time_mlp", torch.float32)
    field = capture(module).map_tensors(lambda x: x.double())
    assert_equal(module.double(), field, 1e-12)


# -------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("kind", KINDS)
def test_ffjord_kinds_have_native_modulation(kind: str) -> None:
    torch.manual_seed(0)
    field = capture(make_ffjord(kind, 3, (5, 6), "tanh"))
    assert [layer.pattern.shape for layer in field.layers] == [(5, 3), (6, 5), (3, 6)]
    assert [layer.activation.name for layer in field.layers] == ["tanh", "tanh", "identity"]
    assert [layer.name for layer in field.layers] == [f"diffeq.layers.{i}._layer" for i in range(3)]
    for layer in field.layers:
        assert isinstance(layer.gate, SigmoidGate) == (kind in ("squash", "concatsquash"))
        assert isinstance(layer.shift, LinearShift) == (kind in ("concat", "concat_v2", "concatsquash"))
    assert field.notes == []


@pytest.mark.parametrize("act", ACTS)
def test_activation_names(act: str) -> None:
    torch.manual_seed(0)
    field = capture(make_ffjord("ignore", 2, (6, 7), act))
    if act == "identity":
        assert len(field.layers) == 3  # never multiplied out
    assert field.layers[0].activation.name == {"swish": "silu"}.get(act, act)


def test_activation_parameters() -> None:
    field = capture(build("autonomous_mlp", torch.float64))
    assert field.layers[0].activation.params == (2.0, 15.0) and field.layers[1].activation.params == (0.7,)


def test_concat_weights_are_the_parameter_without_its_time_column() -> None:
    module = build("ffjord_concat", torch.float64)
    layer, weight = capture(module).layers[0], module.diffeq.layers[0]._layer.weight
    assert torch.equal(layer.weight, weight[:, 1:]) and torch.equal(layer.shift.slope, weight[:, 0])
    assert not layer.shift.offset.any()


def test_ends_get_identity_layers() -> None:
    field = capture(build("ode_demo", torch.float64))
    assert [x.activation.name for x in field.layers] == ["cube", "tanh", "identity"]
    assert torch.equal(field.layers[0].weight, torch.eye(2, dtype=torch.float64))
    field = capture(build("ends_in_scaled_activation", torch.float64))
    assert torch.equal(field.layers[-1].weight, 3.0 * torch.eye(2, dtype=torch.float64))


def test_low_rank_factors_are_not_multiplied_out() -> None:
    field = capture(build("double_linear", torch.float64))
    assert [x.pattern.shape for x in field.layers] == [(2, 4), (11, 2), (4, 11)]


def test_gates_that_are_no_native_modulation_are_nodes() -> None:
    field = capture(build("gate_then_linear", torch.float64))
    assert isinstance(field, GraphField)  # a gated shift, and two gates
    assert {node.kind for node in order([field.output])} & {"time"} == set()
    assert TIME in {node.binding for node in order([field.output]) if node.kind == "sigmoid"}


def test_a_dead_layer_is_legal_and_noted() -> None:
    module = build("ffjord_ignore", torch.float64)
    prune.random_unstructured(module.diffeq.layers[1]._layer, "weight", amount=1.0)
    field = capture(module)
    assert field.layers[1].pattern.nnz == 0
    assert any("layer 1" in note and "no weights" in note for note in field.notes)
    assert_equal(module, field)


L = nn.Linear


@pytest.mark.parametrize("function, parts", [
    (lambda m, t, y: y + m.a(y), {"a": L(2, 2)}),
    (lambda m, t, y: torch.cat([y[:, 1:], m.a(y)], 1), {"a": L(2, 1)}),
    (lambda m, t, y: m.b(F.selu(m.a(y))), {"a": L(2, 5), "b": L(5, 2)}),
    (lambda m, t, y: m.b(torch.tanh(m.n(m.a(y)))), {"a": L(2, 5), "b": L(5, 2), "n": nn.BatchNorm1d(5).eval()}),
    (lambda m, t, y: torch.cat([m.b(h := torch.tanh(m.a(y))[:, :4]), m.c(h[:, 1:])], 1),
     {"a": L(2, 5), "b": L(4, 1), "c": L(3, 1)}),
    (lambda m, t, y: m.c(torch.cat([torch.tanh(m.a(y)), torch.tanh(m.b(y) * torch.sigmoid(t))], 1)),
     {"a": L(2, 5), "b": L(2, 4), "c": L(9, 2)}),
    (lambda m, t, y: m.b(torch.cat([m.a(y), t.expand(y.shape[0], 1)], 1)), {"a": L(2, 5), "b": L(6, 2)}),
    (lambda m, t, y: m.b((h := m.a(y)) * torch.sigmoid(1.7 * h)), {"a": L(2, 5), "b": L(5, 2)}),
    (lambda m, t, y: m.b(torch.tanh((y[:, None, :] * m.a.weight).sum(-1))), {"a": L(2, 5), "b": L(5, 2)}),
    (lambda m, t, y: torch.addcmul(t.view(1, 1), m.a(y), t, value=0.5), {"a": L(2, 2)}),
    (lambda m, t, y: torch.addcmul(m.a(y), m.a.bias, t), {"a": L(2, 2)}),
    (lambda m, t, y: m.a(y) + torch.full_like(t, 3.0) + t.clone().fill_(2.0), {"a": L(2, 2)}),
    (lambda m, t, y: m.b(h := m.a(y)) - m.c(h) * 0.5, {"a": L(2, 5), "b": L(5, 2), "c": L(5, 2)}),
    (lambda m, t, y: torch.vmap(lambda v: m.b(torch.tanh(m.a(v))))(y), {"a": L(2, 5), "b": L(5, 2)}),
    (lambda m, t, y: m.a(torch.cat([y, torch.full_like(y[:, :1], t)], 1)), {"a": L(3, 2)}),
    (lambda m, t, y: m.a(torch.cat([y, torch.empty_like(y[:, :1]).fill_(t)], 1)), {"a": L(3, 2)}),
    (lambda m, t, y: m.a(torch.cat([y, torch.ones_like(y[:, :1]) * float(t)], 1)), {"a": L(3, 2)}),
    (lambda m, t, y: m.a(y) / (2.0 + torch.cos(t)), {"a": L(2, 2)}),
    (lambda m, t, y: m.a(y) * 2**t, {"a": L(2, 2)}),
    (lambda m, t, y: m.a(y) * (torch.zeros_like(y) + t), {"a": L(2, 2)}),
    (lambda m, t, y: (m.a(y) * t + m.a.bias) * torch.sigmoid(t) - 1.0, {"a": L(2, 2)}),
    (lambda m, t, y: torch.addmm(m.a.bias, y, m.a.weight, beta=0.5, alpha=2.0), {"a": L(2, 2)}),
    (lambda m, t, y: torch.addmm(y, torch.ones_like(y) * t, m.a.weight), {"a": L(2, 2)}),
    (lambda m, t, y: m.a(y) if torch.equal(m.a.bias, m.a.bias) else y, {"a": L(2, 2)}),
    (lambda m, t, y: t * m.a(y), {"a": L(2, 2)}),
    (lambda m, t, y: m.a(y) / m.a.bias + m.a.weight[0] * m.a.weight[1], {"a": L(2, 2)}),
    (lambda m, t, y: m.a(y) * torch.cat([y, t.expand(y.shape[0], 1)], 1)[:, 2:], {"a": L(2, 2)}),
    (lambda m, t, y: m.a(y) + torch.cat([y, t.expand(y.shape[0], 1)], 1)[:, 2:] * t, {"a": L(2, 2)}),
    (lambda m, t, y: m.b(torch.cat([h := m.a(y).tanh(), h], 1)), {"a": L(2, 5), "b": L(10, 2)}),
    (lambda m, t, y: m.b(m.a(y).tanh()) + m.c(m.a(y).tanh() * 2.0), {"a": L(2, 5), "b": L(5, 2), "c": L(5, 2)}),
    (lambda m, t, y: m.b(m.a(torch.ones_like(y) * t).tanh()) + (y + t).mean(1, keepdim=True),
     {"a": L(2, 5), "b": L(5, 2)}),
    (lambda m, t, y: (m.a.weight @ y.T).T, {"a": L(2, 2)}),
    (lambda m, t, y: m.a(torch.bmm(y[:, None], m.a.weight.expand(y.shape[0], 2, 2))[:, 0].tanh()), {"a": L(2, 2)}),
    (lambda m, t, y: m.a(torch.einsum("bg,gh->bh", y, m.a.weight).clamp(min=0.0)), {"a": L(2, 2)}),
    (lambda m, t, y: m.b(torch.cat([y[:, :1] * torch.sigmoid(y[:, :1] * 0.3), t.expand(y.shape[0], 1)], 1)),
     {"b": L(2, 2)}),
    (lambda m, t, y: 1.0 - m.a(0.5 - y), {"a": L(2, 2)}),
    (lambda m, t, y: torch.zeros_like(y) + t * t, {}),
])
def test_more_idioms(function, parts) -> None:
    module = module_of(function, **parts)
    if not parts.get("n", module).training:
        module.eval()
    assert_equal(module, capture(module, dim=2))


def test_time_read_as_a_number() -> None:
    torch.manual_seed(0)
    module = TimeFullLike().double()
    assert_equal(module, capture(module))


def test_time_functions_can_be_copied_and_pickled() -> None:
    module = build("time_mlp", torch.float64)
    field = capture(module)
    assert_equal(module, field)
    assert_equal(module, copy.deepcopy(field))
    assert_equal(module, pickle.loads(pickle.dumps(field)))


def test_a_field_that_needs_t_of_shape_1() -> None:
    module = module_of(lambda m, t, y: m.a(y) + m.h(t), a=L(2, 2), h=L(1, 2))
    field = capture(module)
    t, y = torch.tensor([0.7], dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(plain_forward(field, t[0], y)[0], module(t, y))


def test_dead_rows_before_a_second_matrix() -> None:
    module = module_of(lambda m, t, y: m.b(m.a(y)), a=L(2, 5), b=L(5, 2))
    with torch.no_grad():
        module.a.weight[1:3] = 0
    assert_equal(module, capture(module))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_compiled_modules() -> None:
    module = build("autonomous_mlp", torch.float64)
    t, y = torch.tensor(0.1, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    assert_equal(module, capture(torch.jit.trace(module, (t, y))))
    assert_equal(module, capture(torch.compile(module)))


# --------------------------------------------------------------------------------------------------------- refusals


def net(**parts):
    return {"a": L(2, 5), "b": L(5, 2), **parts}


@pytest.mark.parametrize("words, function, parts", [
    (["'n'", "batch", ".eval()"], lambda m, t, y: m.b(m.n(m.a(y))), net(n=nn.BatchNorm1d(5))),
    (["'n'", ".eval()"], lambda m, t, y: m.b(m.n(m.a(y))), net(n=nn.Dropout(0.3))),
    (["randomness"], lambda m, t, y: m.b(torch.tanh(m.a(y))) + torch.randn_like(y), net()),
    (["samples of the batch"], lambda m, t, y: m.b(torch.tanh(m.a(y - y.mean(0)))), net()),
    (["samples of the batch", "like=y0"], lambda m, t, y: m.b(m.a(torch.softmax(y @ y.T, -1) @ y).tanh()), net()),
    (["number out of the state"], lambda m, t, y: m.b(m.a(y).tanh()) * y[0, 0].item(), net()),
    (["whole number", "torch.where"], lambda m, t, y: m.b([m.a, m.c][int(t) % 2](y).tanh()), net(c=L(2, 5))),
    (["state outside torch", "numpy"], lambda m, t, y: m.b(m.a(y).tanh()) * float(y.detach().numpy().max()), net()),
    (["branches on values of t", "torch.where"], lambda m, t, y: m.b(m.a(y).tanh()) if 2 * t.item() < 7.3 else -y, net()),
    (["size that its values say"], lambda m, t, y: m.b(m.a(y).mode(-1, keepdim=True)[0] * m.a(y)), net()),
    (["depends on t or on the state", "torch.where"], lambda m, t, y: m.b(m.a(y).index_fill(1, (t > 0).long().reshape(1), 0.0)), net()),
])
def test_refusals_name_place_and_remedy(words, function, parts) -> None:
    module = module_of(function, **parts)
    with pytest.raises(UnsupportedFieldError) as error:
        capture(module, dim=2)
    for word in words:
        assert word in str(error.value)


def test_state_between_calls_is_refused() -> None:
    def counting(m, t, y):
        m.calls = getattr(m, "calls", 0) + 1
        return m.a(y) * m.calls

    module = module_of(counting, a=L(2, 2))
    with pytest.raises(UnsupportedFieldError, match="keep state between calls"):
        capture(module)
    assert not hasattr(module, "calls")


def test_bad_weights_and_arguments() -> None:
    module = build("ffjord_ignore", torch.float32)
    with pytest.raises(TypeError, match="nn.Module"):
        capture(lambda t, y: y)
    with pytest.raises(UnsupportedFieldError, match="failed"):
        capture(module, dim=5)
    with pytest.raises(ValueError, match=r"y \[7, 2\] returned tuple"):
        capture(module_of(lambda m, t, y: (m.a(y), t), a=L(2, 2)), dim=2)
    with pytest.raises(ValueError, match="pass dim="):
        capture(module_of(lambda m, t, y: torch.sin(y)))
    with pytest.raises(UnsupportedFieldError, match=re.escape("torch.float16")):
        capture(copy.deepcopy(module).half())
    mixed = copy.deepcopy(module)
    mixed.diffeq.layers[0].double()
    with pytest.raises(UnsupportedFieldError, match="more than one dtype"):
        capture(mixed)
    with torch.no_grad():
        module.diffeq.layers[1]._layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="diffeq.layers.1._layer.weight.*NaN"):
        capture(module)


# ------------------------------------------------------------------------------------------ the module is untouched


def test_the_module_and_the_random_state_are_untouched() -> None:
    def forward(m, t, y):
        m.evaluations += 1
        m.history.append(float(t))
        return m.b(torch.tanh(m.a(y)))

    module = module_of(forward, **net())
    module.register_buffer("evaluations", torch.tensor(0))
    module.history = []
    prune.l1_unstructured(module.a, "weight", amount=0.5)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    masked, random_state, hooks = module.a.weight, torch.get_rng_state(), dict(module.a._forward_pre_hooks)
    capture(module)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert module.a.weight is masked and masked.requires_grad
    assert module.history == [] and module.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert dict(module.a._forward_pre_hooks) == hooks
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_the_field_owns_its_tensors() -> None:
    module = build("ffjord_concatsquash", torch.float64)
    field = capture(module)
    before = {name: x.clone() for name, x in field.tensors()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(x, before[name]) for name, x in field.tensors())


def test_works_with_gradients_off_and_on() -> None:
    module = build("ffjord_concat", torch.float64)
    with torch.no_grad():
        a = capture(module)
    with torch.inference_mode():
        b = capture(module)
    for (_, x), (_, y) in zip(a.tensors(), b.tensors()):
        assert torch.equal(x, y) and not y.is_inference()


# ------------------------------------------------------------------------------------------------------- provenance


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", FIELDS)
def test_sources_say_where_entries_came_from(name: str, masked: bool) -> None:
    module = build(name, torch.float64)
    if masked and linears(module):
        prune.global_unstructured(linears(module), pruning_method=prune.L1Unstructured, amount=0.5)
    field, sources = capture_with_origins(module)
    parameters = {k: v.detach().reshape(-1) for k, v in module.named_parameters()}
    for index, layer in enumerate(field.layers):
        for key, tensor in layer.tensors():
            source = sources[index, key]
            for i in range(tensor.numel()):
                if source.parameter[i] >= 0:
                    entry = parameters[source.parameters[source.parameter[i]]][source.index[i]]
                    torch.testing.assert_close(tensor[i], entry * source.scale[i], rtol=1e-15, atol=0)
    if name.startswith("ffjord"):
        for index in range(len(field.layers)):
            assert sources[index, "values"].complete and sources[index, "bias"].complete
            assert (index, "gate.slope") not in sources or (
                sources[index, "gate.slope"].complete or masked) and sources[index, "gate.offset"].complete
            assert (index, "shift.slope") not in sources or masked or sources[index, "shift.slope"].complete


def test_sources_keep_the_sign() -> None:
    module = module_of(lambda m, t, y: F.linear(y, torch.zeros_like(m.a.weight) - m.a.weight, -m.a.bias), a=L(2, 2))
    _, sources = capture_with_origins(module)
    assert sources[0, "values"].complete and sources[0, "values"].scale.tolist() == [-1.0] * 4
    assert sources[0, "bias"].complete and sources[0, "bias"].scale.tolist() == [-1.0] * 2
