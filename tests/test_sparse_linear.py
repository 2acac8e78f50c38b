"""SparseLinear: an nn.Linear without its zeros, in every way torch lets one use it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from cpu_cases import in_a_process_of_its_own
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils import parametrize, prune

import sparseflow_kernels as sfk
from sparseflow_kernels import SparseLinear, _cpu, threads
from sparseflow_kernels.products import packed
from sparseflow_kernels.field import Pattern

F32, F64 = torch.float32, torch.float64


@pytest.fixture
def with_threads(monkeypatch):
    monkeypatch.setattr(threads, "_count", None)
    _cpu.force_threads(True)
    yield sfk.set_num_threads
    _cpu.force_threads(False)


def pruned(out=5, in_=7, density=0.4, dtype=F64, bias=True) -> nn.Linear:
    linear = nn.Linear(in_, out, bias, dtype=dtype)
    prune.custom_from_mask(linear, "weight", torch.rand(out, in_) < density)
    return linear


def gradients(output, inputs, cotangent):
    return torch.autograd.grad(output, inputs, cotangent)


# --------------------------------------------------------------------------------------------------------- the numbers

SHAPES = [(1, 1), (5, 7), (16, 64), (33, 130), (257, 19), (70, 600)]
BATCHES = [(1,), (3,), (64,), (65,), (200,), (2, 3, 17), (0,), (2, 0), ()]


@pytest.mark.parametrize("density", [0.03, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("out,in_", SHAPES)
def test_products_and_gradients_are_the_dense_ones(out, in_, dtype, density):
    linear = pruned(out, in_, density, dtype)
    layer, mask = SparseLinear.from_linear(linear), linear.weight_mask.bool()
    assert layer.nnz == int(mask.sum())
    dense = linear.weight.detach().double().requires_grad_()
    tolerance = 3e-5 if dtype == F32 else 1e-12
    for batch in BATCHES:
        x = torch.randn(*batch, in_, dtype=dtype, requires_grad=True)
        x64, bias = x.detach().double().requires_grad_(), linear.bias.detach().double().requires_grad_()
        y, wanted = layer(x), F.linear(x64, dense, bias)
        assert y.dtype == dtype and y.shape == wanted.shape and y.is_contiguous()
        torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)
        cotangent = torch.randn_like(y)
        found = gradients(y, (x, layer.values, layer.bias), cotangent)
        reference = gradients(wanted, (x64, dense, bias), cotangent.double())
        for ours, theirs in zip(found, (reference[0], reference[1][mask], reference[2])):
            assert ours.dtype == dtype and ours.shape == theirs.shape
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=10 * tolerance)


def test_dense_blocks_and_many_tiles():
    """Density 0.9 is packed in dense groups and dense gradient blocks; 1000 samples are many tiles of every kind."""
    linear = pruned(40, 50, 0.9, F32)
    layer, x = SparseLinear.from_linear(linear), torch.randn(1000, 50)
    cotangent = torch.randn(1000, 40)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)
    (values,) = gradients(layer(x), (layer.values,), cotangent)
    torch.testing.assert_close(values, (cotangent.T @ x)[linear.weight_mask.bool()], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "view",
    [lambda x: x.T, lambda x: x[:, None].expand(-1, 3, -1).transpose(0, 1), lambda x: x[::2], lambda x: x.flip(0)],
)
def test_any_strides(view):
    linear = pruned(5, 7)
    layer = SparseLinear.from_linear(linear)
    x = view(torch.randn(7, 7, dtype=F64)).requires_grad_()
    y, cotangent = layer(x), torch.randn(5, dtype=F64).expand(*x.shape[:-1], 5)  # a cotangent with strides of zero
    torch.testing.assert_close(y, linear(x))
    torch.testing.assert_close(gradients(y, (x,), cotangent), gradients(linear(x), (x,), cotangent))


def test_no_weights_at_all():
    linear = pruned(4, 3, density=0.0)
    layer, x = SparseLinear.from_linear(linear), torch.randn(6, 3, dtype=F64, requires_grad=True)
    assert layer.nnz == 0 and layer.density == 0.0
    torch.testing.assert_close(layer(x), linear.bias.expand(6, 4))
    grad_x, grad_values, grad_bias = gradients(layer(x).sum(), (x, layer.values, layer.bias), None)
    assert not grad_x.any() and grad_values.shape == (0,) and bool((grad_bias == 6).all())


@pytest.mark.parametrize("out,in_", [(0, 3), (3, 0)])
def test_no_features(out, in_):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on initialising nothing
        layer = SparseLinear.from_linear(nn.Linear(in_, out))
    x = torch.randn(2, in_, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, out)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_without_bias():
    linear = pruned(bias=False)
    layer, x = SparseLinear.from_linear(linear), torch.randn(3, 7, dtype=F64)
    assert layer.bias is None and set(layer.state_dict()) == {"values", "row_ptr", "col"}
    torch.testing.assert_close(layer(x), linear(x))


# ------------------------------------------------------------------------------------------------------------- the bits


@pytest.mark.parametrize("dtype", [F32, F64])
def test_bits_do_not_depend_on_threads(dtype, with_threads):
    layer = SparseLinear.from_linear(pruned(300, 90, 0.2, dtype))
    x, cotangent = torch.randn(333, 90, dtype=dtype, requires_grad=True), torch.randn(333, 300, dtype=dtype)
    found = []
    for count in (1, 2, 5):
        with_threads(count)
        y = layer(x)
        found.append((y, *gradients(y, (x, layer.values, layer.bias), cotangent)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_bits_of_a_sample_do_not_depend_on_its_batch():
    layer, x = SparseLinear.from_linear(pruned(70, 600, 0.2, F32)), torch.randn(150, 600)
    with torch.no_grad():
        whole = layer(x)
        for rows in (slice(0, 1), slice(140, 150), slice(3, 40)):
            assert torch.equal(layer(x[rows]), whole[rows])


@pytest.mark.parametrize("dtype,name", [(F32, "SparseLinearF32"), (F64, "SparseLinearF64")])
def test_bits_do_not_depend_on_the_tile_width(dtype, name):
    pattern, batch = Pattern.from_mask(torch.rand(20, 30) < 0.3), 100
    native = getattr(_cpu, name)(20, 30, pattern.row_ptr.int().numpy(), pattern.col.int().numpy())
    x, values = torch.randn(batch, 30, dtype=dtype), torch.randn(pattern.nnz, dtype=dtype)
    found = []
    for width in range(5):
        native.force_width(width)
        out = torch.empty(batch, 20, dtype=dtype)
        native.multiply(False, values.data_ptr(), x.data_ptr(), batch, 0, 1, out.data_ptr())
        found.append(out)
    assert all(torch.equal(found[0], other) for other in found[1:])
    with pytest.raises(ValueError, match="no such width"):
        native.force_width(5)


def test_the_native_layer_checks_its_pattern():
    row_ptr, col = torch.tensor([0, 1, 2]).int(), torch.tensor([0, 3]).int()
    with pytest.raises(ValueError, match="column 3 is outside"):
        _cpu.SparseLinearF32(2, 3, row_ptr.numpy(), col.numpy())
    with pytest.raises(ValueError, match="row pointers"):
        _cpu.SparseLinearF32(3, 3, row_ptr.numpy(), col.numpy())


# ------------------------------------------------------------------------------------------------------ differentiation


def as_function(layer):
    return lambda x, values, bias: functional_call(layer, {"values": values, "bias": bias}, (x,))


def test_gradcheck_of_every_kind():
    layer, x = SparseLinear.from_linear(pruned(3, 4, 0.5)), torch.randn(2, 2, 4, dtype=F64, requires_grad=True)
    inputs = (x, layer.values, layer.bias)
    assert torch.autograd.gradcheck(
        as_function(layer), inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(as_function(layer), inputs)


def test_create_graph_is_that_of_the_dense_layer():
    linear = pruned(6, 5)
    layer, x = SparseLinear.from_linear(linear), torch.randn(9, 5, dtype=F64, requires_grad=True)

    def penalty(module, weight):
        (slope,) = torch.autograd.grad(module(x).tanh().sum(), x, create_graph=True)
        loss = slope.square().sum()
        return [loss, *torch.autograd.grad(loss, (x, weight, module.bias))]

    ours, theirs = penalty(layer, layer.values), penalty(linear, linear.weight_orig)
    theirs[2] = theirs[2][linear.weight_mask.bool()]
    torch.testing.assert_close(ours, theirs)


def test_only_what_is_wanted_gets_a_gradient():
    layer, x = SparseLinear.from_linear(pruned()), torch.randn(3, 7, dtype=F64)
    layer.values.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.values.grad is None and layer.bias.grad is not None
    layer.bias.requires_grad_(False)
    assert not layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x.requires_grad_()).requires_grad


def test_a_change_in_place_before_the_backward_is_an_error():
    layer, x = SparseLinear.from_linear(pruned()), torch.randn(3, 7, dtype=F64, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ------------------------------------------------------------------------------------------------------- new values


def changes():
    def copy_(layer, new):
        with torch.no_grad():
            layer.values.copy_(new)

    def through_data(layer, new):  # raises no version counter
        layer.values.data.copy_(new)

    def fused(layer, new):
        optimizer = torch.optim.SGD([layer.values], lr=1.0, fused=True)
        layer.values.grad = layer.values.detach() - new
        optimizer.step()

    def other_parameter(layer, new):
        layer.values = nn.Parameter(new)

    return {f.__name__: f for f in (copy_, through_data, fused, other_parameter)}


@pytest.mark.parametrize("change", changes())
def test_every_change_of_the_values_is_seen(change):
    layer, x = SparseLinear.from_linear(pruned()), torch.randn(3, 7, dtype=F64)
    layer(x)
    new = torch.randn(layer.nnz, dtype=F64)
    changes()[change](layer, new)
    torch.testing.assert_close(layer(x), F.linear(x, layer.pattern.dense(new), layer.bias))


def test_training_goes_as_that_of_the_masked_layer():
    linear = pruned(6, 7)
    layer, x, y = SparseLinear.from_linear(linear), torch.randn(50, 7, dtype=F64), torch.randn(50, 6, dtype=F64)
    ours = torch.optim.Adam(layer.parameters(), lr=0.1)
    theirs = torch.optim.Adam([linear.weight_orig, linear.bias], lr=0.1)
    for _ in range(5):
        for model, optimizer in ((layer, ours), (linear, theirs)):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(layer(x), linear(x))


# ---------------------------------------------------------------------------------------------- from and to nn.Linear


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16])
def test_from_linear_reads_masks_that_are_newer_than_the_last_forward(dtype):
    linear = pruned(dtype=dtype).eval()
    with torch.no_grad():
        linear.weight_orig.mul_(3)  # the attribute `weight` is stale now
    linear.bias.requires_grad_(False)
    layer = SparseLinear.from_linear(linear)
    assert torch.equal(layer.weight, linear.weight_orig * linear.weight_mask)
    assert layer.values.dtype == dtype and layer.values.requires_grad and not layer.bias.requires_grad
    assert not layer.training and not layer.values.data_ptr() == linear.weight_orig.data_ptr()


def test_from_linear_reads_parametrizations():
    class Tril(nn.Module):
        def forward(self, weight):
            return weight.tril()

    linear = nn.Linear(4, 4)
    parametrize.register_parametrization(linear, "weight", Tril())
    layer, x = SparseLinear.from_linear(linear), torch.randn(2, 4)
    assert layer.nnz == 10 and layer.values.requires_grad
    torch.testing.assert_close(layer(x), linear(x))
    linear.parametrizations.weight.original.requires_grad_(False)
    assert not SparseLinear.from_linear(linear).values.requires_grad


def test_to_linear():
    layer, x = SparseLinear.from_linear(pruned()).eval(), torch.randn(2, 7, dtype=F64)
    layer.values.requires_grad_(False)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and not linear.training
    assert not linear.weight.requires_grad and linear.bias.requires_grad
    torch.testing.assert_close(linear(x), layer(x))


def test_from_a_pattern():
    mask = torch.rand(50, 40) < 0.3
    layer = SparseLinear(Pattern.from_mask(mask), dtype=F64)
    assert torch.equal(layer.weight != 0, mask) and torch.equal(layer.pattern.col, Pattern.from_mask(mask).col)
    bound = mask.sum(1).clamp(min=1).rsqrt()
    assert bool((layer.weight.abs() <= bound[:, None]).all()) and bool((layer.bias.abs() <= bound).all())
    assert float((layer.weight.detach().abs() / bound[:, None]).max()) > 0.95
    assert SparseLinear(Pattern.from_mask(mask), bias=False).bias is None


def test_its_description():
    layer = SparseLinear.from_linear(pruned(5, 7))
    assert repr(layer) == (
        f"SparseLinear(in_features=7, out_features=5, bias=True, nnz={layer.nnz}, density={layer.nnz / 35:.3g})"
    )
    assert "backend='torch'" in repr(SparseLinear(layer.pattern, backend="torch"))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(again):
    layer, x = SparseLinear.from_linear(pruned()), torch.randn(3, 7, dtype=F64)
    y = layer(x)
    other = again(layer)
    with torch.no_grad():
        other.values.zero_()
    assert torch.equal(layer(x), y) and torch.equal(other(x), other.bias.expand(3, 5))


def test_it_moves_to_other_dtypes():
    layer, x = SparseLinear.from_linear(pruned(dtype=F32)), torch.randn(3, 7)
    y = layer(x)
    torch.testing.assert_close(layer.double()(x.double()).float(), y)
    assert layer.row_ptr.dtype == torch.int64


# ---------------------------------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_brings_its_pattern(assign):
    source, target = SparseLinear.from_linear(pruned()), SparseLinear.from_linear(pruned(density=0.8))
    x = torch.randn(3, 7, dtype=F64)
    target(x).sum().backward()
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    values = target.values
    target.load_state_dict(torch.load(buffer), assign=assign)
    assert target.nnz == source.nnz and torch.equal(target.pattern.col, source.pattern.col)
    assert assign or target.values is values  # optimizers hold it
    x.requires_grad_()
    torch.testing.assert_close(target(x), source(x))
    torch.testing.assert_close(
        gradients(target(x).sum(), (x, target.values), None), gradients(source(x).sum(), (x, source.values), None)
    )


def test_a_state_of_as_many_weights_in_other_places():
    mask = torch.eye(3, dtype=torch.bool)
    source, target = (SparseLinear(Pattern.from_mask(m)) for m in (mask, mask.flip(0)))
    x = torch.randn(2, 3)
    target(x)
    nn.Sequential(target).load_state_dict(nn.Sequential(source).state_dict())
    assert torch.equal(target(x), source(x))


def test_a_state_of_the_same_pattern_is_copied_in_place():
    source, target = (SparseLinear(Pattern.from_mask(torch.eye(3, dtype=torch.bool))) for _ in range(2))
    memory, col = target.values.data_ptr(), target.col
    target.load_state_dict(source.state_dict())
    assert target.values.data_ptr() == memory and target.col is col and torch.equal(target.values, source.values)


def test_states_that_do_not_fit():
    layer = SparseLinear.from_linear(pruned(5, 7))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="the state's pattern has 4 rows, this layer 5"):
        layer.load_state_dict(SparseLinear.from_linear(pruned(4, 7)).state_dict())
    with pytest.raises(RuntimeError, match=r"columns must lie in \[0, 7\), found 0 to 8"):
        layer.load_state_dict(SparseLinear.from_linear(pruned(5, 9, 1.0)).state_dict())
    wrong = layer.state_dict() | {"values": torch.zeros(layer.nnz + 1)}
    with pytest.raises(RuntimeError, match=rf"the state has \[{layer.nnz + 1}\] values for \[{layer.nnz}\] entries"):
        layer.load_state_dict(wrong)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    with pytest.raises(RuntimeError, match='Missing key.*"values"'):
        layer.load_state_dict(nn.Linear(7, 5).state_dict())


def test_a_state_for_a_layer_on_meta():
    source = SparseLinear.from_linear(pruned(5, 7))
    target = SparseLinear(Pattern.from_mask(torch.eye(5, 7, dtype=torch.bool)), device="meta", dtype=F64)
    assert target(torch.empty(3, 7, device="meta", dtype=F64)).shape == (3, 5)
    target.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 7, dtype=F64)
    assert torch.equal(target(x), source(x))


# --------------------------------------------------------------------------------------------------------- whole models


def test_sparsify_():
    class Sub(nn.Linear):
        pass

    shared = pruned(6, 6)
    model = nn.Sequential(
        pruned(6, 7, 0.3), nn.Tanh(), nn.ModuleDict({"a": shared, "b": pruned(6, 6, 0.95), "c": Sub(2, 2)}), shared,
    )  # fmt: skip
    nn.init.zeros_(model[2]["c"].weight)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.init.zeros_(tied[0].weight)
    tied[1].weight = tied[0].weight
    model.append(tied)
    x = torch.randn(4, 7, dtype=F64)
    before = shared(model[1](model[0](x)))
    replaced = sfk.sparsify_(model, below=0.5)
    assert list(replaced) == ["0", "2.a", "3"]
    assert model[3] is model[2]["a"] is replaced["3"] and replaced["0"].nnz == int((model[0].weight != 0).sum())
    assert type(model[2]["b"]) is type(tied[0]) is nn.Linear and type(model[2]["c"]) is Sub
    torch.testing.assert_close(model[3](model[1](model[0](x))), before)
    assert sfk.sparsify_(model, below=0.5) == {}
    assert list(sfk.sparsify_(model, below=1, backend="torch")) == ["2.b"] and model[2]["b"].backend == "torch"


def test_sparsify_refuses():
    for below in (0, 1.5, True, "0.5", float("nan")):
        with pytest.raises(ValueError, match=r"below must be a number in \(0, 1\]"):
            sfk.sparsify_(nn.Sequential(), below=below)
    with pytest.raises(ValueError, match="SparseLinear.from_linear"):
        sfk.sparsify_(nn.Linear(2, 2))


# --------------------------------------------------------------------------------------- operators, tracing, transforms


def operator_arguments():
    layer, x = SparseLinear.from_linear(pruned()), torch.randn(2, 3, 7, dtype=F64, requires_grad=True)
    cotangent = torch.randn(2, 3, 5, dtype=F64, requires_grad=True)
    where = (layer.row_ptr, layer.col, 7, "auto")
    return {
        "linear": (x, layer.values, layer.bias, *where),
        "spmm_transposed": (cotangent, layer.values, *where),
        "sddmm": (cotangent, x, *where),
    }


@pytest.mark.parametrize("name", ["linear", "spmm_transposed", "sddmm"])
def test_operators_are_well_made(name):
    operator, arguments = getattr(torch.ops.sparseflow, name).default, operator_arguments()[name]
    torch.library.opcheck(operator, arguments)
    if name == "linear":
        torch.library.opcheck(operator, (*arguments[:2], None, *arguments[3:]))
    tensors = arguments[:2]
    assert torch.autograd.gradgradcheck(lambda *given: operator(*given, *arguments[2:]), tensors)


def test_compiled_whole():
    linear = pruned(7, 7)
    model = nn.Sequential(SparseLinear.from_linear(linear), nn.Tanh(), SparseLinear.from_linear(pruned(4, 7)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = len(packed._packed)
    for batch in (3, 5, 6):
        x = torch.randn(batch, 7, dtype=F64, requires_grad=True)
        assert torch.equal(compiled(x), model(x))
        inputs = (x, *model.parameters())
        ours, theirs = (gradients(f(x).square().sum(), inputs, None) for f in (compiled, model))
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        model[0].values.mul_(2)
        assert torch.equal(compiled(x), model(x))
    assert len(packed._packed) <= before + 2  # a graph finds what eager calls have packed


def test_exported():
    layer = SparseLinear.from_linear(pruned())
    example = torch.randn(4, 7, dtype=F64)
    program = torch.export.export(layer, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    again, x = torch.export.load(buffer).module(), torch.randn(9, 7, dtype=F64)
    assert torch.equal(again(x), layer(x))


def test_vmap_over_the_batch():
    layer, x = SparseLinear.from_linear(pruned()), torch.randn(3, 6, 7, dtype=F64)
    torch.testing.assert_close(vmap(layer, in_dims=1, out_dims=1)(x), layer(x))
    torch.testing.assert_close(vmap(vmap(layer))(x), layer(x))


@pytest.mark.parametrize("rows", [(), (4,)])
def test_gradients_by_the_sample(rows):
    linear = pruned()
    layer, x, mask = SparseLinear.from_linear(linear), torch.randn(3, *rows, 7, dtype=F64), linear.weight_mask.bool()

    def of(module, name):
        def loss(parameter, x):
            return functional_call(module, {name: parameter}, (x,)).square().sum()

        return vmap(grad(loss), (None, 0))

    dense = layer.to_linear()
    torch.testing.assert_close(of(layer, "values")(layer.values, x), of(dense, "weight")(dense.weight, x)[:, mask])


def test_ensembles_of_one_pattern():
    layer, x = SparseLinear.from_linear(pruned()), torch.randn(4, 7, dtype=F64)
    values, bias = torch.randn(3, layer.nnz, dtype=F64), torch.randn(3, 5, dtype=F64)
    found = vmap(as_function(layer), (None, 0, 0))(x, values, bias)
    wanted = torch.stack([F.linear(x, layer.pattern.dense(v), b) for v, b in zip(values, bias)])
    torch.testing.assert_close(found, wanted)
    stacked = {name: torch.stack([tensor] * 2) for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match="one pattern for all of them"):
        vmap(lambda state: functional_call(layer, state, (x,)))(stacked)


def test_torch_func():
    layer = SparseLinear.from_linear(pruned())
    x, tangent = torch.randn(7, dtype=F64), torch.randn(7, dtype=F64)
    torch.testing.assert_close(jvp(layer, (x,), (tangent,))[1], layer.weight @ tangent)
    torch.testing.assert_close(jacrev(layer)(x), layer.weight)
    torch.testing.assert_close(jacfwd(layer)(x), layer.weight)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    torch.testing.assert_close(
        hessian(lambda x: layer(x).pow(3).sum())(x), hessian(lambda x: F.linear(x, weight, bias).pow(3).sum())(x)
    )


# -------------------------------------------------------------------------------------------------- backends and dtypes


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16])
def test_the_torch_backend(dtype):
    linear = pruned(dtype=dtype)
    layer, x = SparseLinear.from_linear(linear, backend="torch"), torch.randn(3, 7, dtype=dtype)
    assert torch.equal(layer(x), linear(x))
    (found,) = gradients(layer(x).sum(), (layer.values,), None)
    (wanted,) = gradients(linear(x).sum(), (linear.weight_orig,), None)
    assert torch.equal(found, wanted[linear.weight_mask.bool()])


def test_autocast_computes_in_the_dtype_of_the_parameters():
    layer, x = SparseLinear.from_linear(pruned(dtype=F32)), torch.randn(3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
        assert SparseLinear(layer.pattern, backend="torch")(x).dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16().float()))


def test_the_triton_backend_in_the_interpreter():
    pytest.importorskip("triton")
    done = in_a_process_of_its_own(
        """
import torch
from sparseflow_kernels import SparseLinear
torch.manual_seed(0)
linear = torch.nn.Linear(9, 6)
with torch.no_grad():
    linear.weight.mul_(torch.rand(6, 9) < 0.4)
for dtype in (torch.float32, torch.float64):
    native = SparseLinear.from_linear(linear.to(dtype))
    layer = SparseLinear.from_linear(linear, backend="triton")
    x = torch.randn(2, 5, 9, dtype=dtype, requires_grad=True)
    def passes(layer):
        y = layer(x)
        first = torch.autograd.grad(y.square().sum(), (x, layer.values, layer.bias), create_graph=True)
        return (y, *first, *torch.autograd.grad(first[0].square().sum(), (x, layer.values)))
    torch.testing.assert_close(passes(layer), passes(native), rtol=1e-4, atol=1e-4)
print("done")
""",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]


def test_a_missing_triton_is_named(monkeypatch):
    import sys

    layer = SparseLinear.from_linear(pruned(dtype=F32), backend="triton")
    for name in [name for name in sys.modules if name.startswith("sparseflow_kernels.engines.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match='package triton.*pip install triton.*backend="torch"'):
        layer(torch.randn(2, 7))


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_input():
    layer = SparseLinear.from_linear(pruned(dtype=F32))
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 7\], not \[3, 5\]"):
        layer(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 7\], not \[\]"):
        layer(torch.tensor(1.0))
    with pytest.raises(ValueError, match="x is torch.float64 on cpu, the layer torch.float32 on cpu"):
        layer(torch.randn(3, 7, dtype=F64))
    with pytest.raises(ValueError, match="x is torch.float32 on meta, the layer torch.float32 on cpu"):
        layer(torch.randn(3, 7, device="meta"))
    with pytest.raises(ValueError, match="compute in float32 and float64, not torch.bfloat16.*backend=\"torch\""):
        copy.deepcopy(layer).bfloat16()(torch.randn(3, 7, dtype=torch.bfloat16))
    other = copy.deepcopy(layer)
    other.values = nn.Parameter(torch.randn(3))
    with pytest.raises(ValueError, match=rf"values must be \[{layer.nnz}\], one per entry of the pattern, not \[3\]"):
        other(torch.randn(3, 7))
    with pytest.raises(ValueError, match="values must be"):
        other.weight  # noqa: B018
    for bias in (torch.randn(3), torch.randn(5, dtype=F64)):
        other = copy.deepcopy(layer)
        other.bias = nn.Parameter(bias)
        with pytest.raises(ValueError, match=r"bias must be \[5\], torch.float32 on cpu"):
            other(torch.randn(3, 7))


def test_bad_construction():
    with pytest.raises(TypeError, match="pattern must be a Pattern, not int"):
        SparseLinear(3)
    pattern = Pattern.from_mask(torch.eye(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'cpu', 'triton', 'torch', not 'mkl'"):
        SparseLinear(pattern, backend="mkl")
    with pytest.raises(TypeError, match="an nn.Linear is needed, not Conv1d"):
        SparseLinear.from_linear(nn.Conv1d(1, 1, 1))
    linear = pruned()
    linear.weight_mask[1, 2] = float("nan")
    with pytest.raises(ValueError, match="1 of the 35 entries of the weight are NaN.*its mask"):
        SparseLinear.from_linear(linear)


def test_a_backend_that_cannot_run_here():
    layer = SparseLinear.from_linear(pruned(dtype=F32), backend="triton")
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        with pytest.raises(RuntimeError, match='backend="triton" needs tensors on a CUDA device, not on cpu'):
            layer(torch.randn(2, 7))
    where = packed.Where(layer.row_ptr, layer.col, 7, "auto")
    matrices = packed.packed_of(where)
    with pytest.raises(RuntimeError, match='kernels for the CPU and for CUDA, the tensors are on mps.*backend="torch"'):
        matrices.matrix("auto", torch.device("mps"))
    with pytest.raises(RuntimeError, match='backend="cpu" needs tensors on the CPU, the tensors are on cuda:0'):
        matrices.matrix("cpu", torch.device("cuda:0"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    linear = pruned(70, 130, 0.2, F32)
    layer = SparseLinear.from_linear(linear).cuda()
    x = torch.randn(300, 130, device="cuda", requires_grad=True)
    host = x.detach().cpu().requires_grad_()
    torch.testing.assert_close(layer(x).cpu(), linear(host), rtol=1e-4, atol=1e-4)
    cotangent = torch.randn(300, 70)
    found = gradients(layer(x), (x, layer.values), cotangent.cuda())
    wanted = gradients(linear(host), (host, linear.weight_orig), cotangent)
    torch.testing.assert_close(found[0].cpu(), wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1].cpu(), wanted[1][linear.weight_mask.bool()], rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="x is torch.float32 on cpu, the layer torch.float32 on cuda:0"):
        layer(host)


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_an_older_norm_makes_is_made_of_the_present_parameters(norm):
    layer, other = (norm(torch.nn.Linear(4, 3)) for _ in range(2))
    layer(torch.randn(2, 4))
    other.load_state_dict(layer.state_dict())  # its attribute `weight` is of the last forward pass: there was none
    x = torch.randn(5, 4)
    torch.testing.assert_close(sfk.SparseLinear.from_linear(other.eval())(x), layer.eval()(x))
