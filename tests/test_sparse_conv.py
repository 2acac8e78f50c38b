"""SparseConv2d: an nn.Conv2d without its zeros."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from torch import nn
from torch.func import grad, jvp, vmap
from torch.nn.utils import prune

import sparseflow_kernels as sfk
from sparseflow_kernels import SparseConv2d, SparseLinear, _cpu, sparsify_, threads
from sparseflow_kernels.field import Pattern

F32, F64 = torch.float32, torch.float64


@pytest.fixture
def with_threads(monkeypatch):
    monkeypatch.setattr(threads, "_count", None)
    _cpu.force_threads(True)
    yield sfk.set_num_threads
    _cpu.force_threads(False)


def pruned(in_=3, out=4, kernel=3, density=0.4, dtype=F64, **options) -> nn.Conv2d:
    conv = nn.Conv2d(in_, out, kernel, dtype=dtype, **options)
    prune.custom_from_mask(conv, "weight", torch.rand(conv.weight.shape) < density)
    return conv


def compare(conv: nn.Conv2d, x: torch.Tensor, tolerance: float) -> None:
    """Value and gradients of the sparse layer and of the dense one."""
    layer, mask = SparseConv2d.from_conv(conv), conv.weight_mask.bool()
    x = x.requires_grad_()
    wanted = conv(x)
    y, cotangent = layer(x), torch.randn_like(wanted)
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    theirs = torch.autograd.grad(wanted, [x, conv.weight_orig, *([] if conv.bias is None else [conv.bias])], cotangent)
    ours = torch.autograd.grad(y, [x, layer.values, *([] if layer.bias is None else [layer.bias])], cotangent)
    for one, other in zip(ours, (theirs[0], theirs[1][mask], *theirs[2:])):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=30 * tolerance)


def random_case(seed: int, dtype: torch.dtype) -> tuple[nn.Conv2d, torch.Tensor]:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    pair = lambda low, high: (draw.randint(low, high), draw.randint(low, high))
    while True:
        kernel, stride, padding, dilation, size = pair(1, 4), pair(1, 3), pair(0, 3), pair(1, 3), pair(1, 24)
        groups, mode = draw.choice([1, 1, 2, 3]), draw.choice(["zeros", "zeros", "circular"])
        fits = all(n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in zip(size, padding, dilation, kernel))
        if fits and (mode == "zeros" or all(p <= n for p, n in zip(padding, size))):
            break
    in_, out = groups * draw.randint(1, 4), groups * draw.randint(1, 3)
    conv = pruned(
        in_, out, kernel, draw.choice([0.1, 0.5, 1.0]), dtype, stride=stride, padding=padding, dilation=dilation,
        groups=groups, bias=draw.random() < 0.7, padding_mode=mode,
    )  # fmt: skip
    x = torch.randn(draw.choice([1, 2, 5, 17]), in_, *size, dtype=dtype)
    return conv, x.contiguous(memory_format=torch.channels_last) if draw.random() < 0.3 else x


@pytest.mark.parametrize("dtype,tolerance", [(F64, 1e-11), (F32, 3e-5)])
def test_random_geometries_are_the_dense_layer(dtype, tolerance):
    for seed in range(60):
        compare(*random_case(seed, dtype), tolerance)


@pytest.mark.parametrize("padding", ["same", "valid", (2, 0)])
def test_paddings_and_an_even_kernel(padding):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch copies for an even kernel
        compare(pruned(3, 4, (4, 3), padding=padding), torch.randn(2, 3, 9, 8, dtype=F64), 1e-11)


def test_depthwise():
    compare(pruned(6, 6, 3, 0.6, groups=6, padding=1), torch.randn(3, 6, 12, 11, dtype=F64), 1e-11)


def test_images_without_a_batch_and_with_two():
    conv = pruned(padding=1)
    layer = SparseConv2d.from_conv(conv)
    x = torch.randn(3, 7, 6, dtype=F64)
    torch.testing.assert_close(layer(x), conv(x))
    x = torch.randn(2, 5, 3, 7, 6, dtype=F64)
    torch.testing.assert_close(layer(x), conv(x.flatten(0, 1)).unflatten(0, (2, 5)))
    assert layer(x[:0]).shape == (0, 5, 4, 7, 6)


def test_no_weights_at_all():
    conv = pruned(density=0.0)
    x = torch.randn(2, 3, 5, 5, dtype=F64, requires_grad=True)
    y = SparseConv2d.from_conv(conv)(x)
    torch.testing.assert_close(y, conv.bias[:, None, None].expand_as(y))
    assert not torch.autograd.grad(y.sum(), x)[0].any()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_bits_do_not_depend_on_threads(dtype, with_threads):
    layer = SparseConv2d.from_conv(pruned(8, 8, 3, 0.5, dtype, padding=1))
    x = torch.randn(19, 8, 15, 15, dtype=dtype, requires_grad=True)
    results = []
    for count in (1, 2, 3):
        with_threads(count)
        y = layer(x)
        results.append((y, *torch.autograd.grad(y, [x, layer.values], torch.ones_like(y).cumsum(0))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_bits_of_an_image_do_not_depend_on_its_batch():
    layer = SparseConv2d.from_conv(pruned(8, 8, 3, 0.5, F32, padding=1, stride=2))
    x = torch.randn(40, 8, 15, 15)
    whole = layer(x)
    assert all(torch.equal(layer(x[i: i + n]), whole[i: i + n]) for i, n in ((0, 1), (7, 3), (20, 20)))


def test_channels_last_comes_out_as_it_came():
    layer = SparseConv2d.from_conv(pruned(padding=1))
    x = torch.randn(2, 3, 8, 8, dtype=F64)
    y = layer(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(y, layer(x))


def test_derivatives_of_every_kind():
    layer = SparseConv2d.from_conv(pruned(2, 2, 2, 0.7, stride=2, padding=1))
    x = torch.randn(2, 2, 4, 3, dtype=F64, requires_grad=True)
    call = lambda x, values, bias: torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))
    parameters = layer.values.detach().requires_grad_(), layer.bias.detach().requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *parameters), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, (x, *parameters))


def test_torch_func():
    conv = pruned(padding=1)
    layer, x = SparseConv2d.from_conv(conv), torch.randn(3, 3, 5, 5, dtype=F64)
    torch.testing.assert_close(vmap(layer)(x), conv(x))
    torch.testing.assert_close(jvp(layer, (x,), (x,))[1], jvp(conv, (x,), (x,))[1])
    loss = lambda values, x: torch.func.functional_call(layer, {"values": values}, (x,)).square().sum()
    each = vmap(grad(loss), (None, 0))(layer.values, x)
    torch.testing.assert_close(each.sum(0), grad(loss)(layer.values, x))


def test_compiled_and_exported():
    conv = pruned(padding=1, dtype=F32)
    layer, x = SparseConv2d.from_conv(conv), torch.randn(3, 3, 6, 5, requires_grad=True)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, conv(x))
    ours = torch.autograd.grad(y.square().sum(), (x, layer.values))
    theirs = torch.autograd.grad(conv(x).square().sum(), (x, conv.weight_orig))
    torch.testing.assert_close(ours, (theirs[0], theirs[1][conv.weight_mask.bool()]), rtol=1e-4, atol=1e-4)
    program = torch.export.export(layer, (x.detach(),), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
    again = torch.randn(7, 3, 6, 5)
    torch.testing.assert_close(program.module()(again), conv(again))


@pytest.mark.parametrize("name", ["convolution", "convolution_transposed", "convolution_gradient"])
def test_operators_are_well_made(name):
    layer = SparseConv2d.from_conv(pruned(padding=1))
    where = list(layer._of_size((5, 4), layer._around))
    where[4:9] = map(list, where[4:9])
    x, y = torch.randn(2, 3, 5, 4, dtype=F64, requires_grad=True), torch.randn(2, 4, 5, 4, dtype=F64, requires_grad=True)
    first = {
        "convolution": (x, layer.values, layer.bias), "convolution_transposed": (y, layer.values),
        "convolution_gradient": (y, x),
    }[name]  # fmt: skip
    torch.library.opcheck(getattr(torch.ops.sparseflow, name).default, (*first, *where))


def test_states_and_copies():
    layer = SparseConv2d.from_conv(pruned())
    other = SparseConv2d.from_conv(pruned(density=0.2))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 6, 6, dtype=F64)
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    wrong = SparseConv2d.from_conv(pruned(out=5))
    with pytest.raises(RuntimeError, match="pattern has 4 rows, this layer 5.*same in_channels, out_channels"):
        wrong.load_state_dict(layer.state_dict())


def test_there_and_back():
    conv = pruned(4, 6, (3, 2), stride=(2, 1), padding=1, groups=2, padding_mode="circular", bias=False)
    layer = SparseConv2d.from_conv(conv)
    back = layer.to_conv()
    x = torch.randn(2, 4, 7, 6, dtype=F64)
    torch.testing.assert_close(back(x), conv(x))
    assert torch.equal(layer.weight, conv.weight) and layer.nnz == int(conv.weight_mask.sum())
    assert "groups=2" in repr(layer) and "nnz=" in repr(layer)


def test_the_torch_backend():
    conv = pruned(padding="same", dtype=torch.bfloat16)
    layer, x = SparseConv2d.from_conv(conv, backend="torch"), torch.randn(2, 3, 6, 6, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), conv(x))


def test_autocast_computes_in_the_dtype_of_the_parameters():
    layer = SparseConv2d.from_conv(pruned(dtype=F32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(1, 3, 5, 5).bfloat16()).dtype == F32


def test_training_goes_as_that_of_the_masked_layer():
    conv = pruned(padding=1)
    layer, x = SparseConv2d.from_conv(conv), torch.randn(4, 3, 6, 6, dtype=F64)
    both = [torch.optim.Adam(module.parameters(), 1e-2) for module in (conv, layer)]
    for _ in range(3):
        for module, optimizer in zip((conv, layer), both):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer(x), conv(x))


def test_sparsify_takes_both_kinds():
    model = nn.Sequential(pruned(padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1, dtype=F64), nn.Flatten(), nn.Linear(64, 5, dtype=F64))
    prune.random_unstructured(model[4], "weight", 0.8)
    x = torch.randn(2, 3, 4, 4, dtype=F64)
    wanted = model(x)
    made = sparsify_(model)
    assert list(made) == ["0", "4"] and isinstance(made["0"], SparseConv2d) and isinstance(made["4"], SparseLinear)
    torch.testing.assert_close(model(x), wanted)
    with pytest.raises(ValueError, match=r"is an nn.Conv2d; use SparseConv2d.from_conv\(model\)"):
        sparsify_(pruned())


def test_bad_input():
    layer = SparseConv2d.from_conv(pruned())
    for x, text in (
        (torch.randn(2, 4, 5, 5, dtype=F64), r"x must be \[..., 3, height, width\], not \[2, 4, 5, 5\]"),
        (torch.randn(3, 5, dtype=F64), r"x must be"),
        (torch.randn(2, 3, 2, 5, dtype=F64), r"images of \[2, 5\] pixels .* smaller than the kernel"),
        (torch.randn(2, 3, 5, 5), "x is torch.float32 on cpu, the layer torch.float64"),
    ):
        with pytest.raises(ValueError, match=text):
            layer(x)
    with pytest.raises(ValueError, match="float32 and float64, not torch.bfloat16"):
        layer.bfloat16()(torch.randn(1, 3, 5, 5).bfloat16())
    with pytest.raises(RuntimeError, match="kernels for the CPU alone"):
        SparseConv2d.from_conv(pruned()).to("meta")._of_size  # made, but not run
        from sparseflow_kernels.products.convolution import _kernels
        _kernels(SparseConv2d.from_conv(pruned())._where, torch.device("cuda"))


def test_bad_construction():
    pattern = Pattern.from_mask(torch.ones(4, 27, dtype=torch.bool))
    for arguments, text in (
        ((pattern, 2), "27 columns, which are no whole kernels of 2 x 2 taps"),
        ((pattern, (3, 3), 0), "stride must be a whole number"),
        ((pattern, 3, 1, -1), "padding must be a whole number"),
        ((pattern, 3, 2, "same"), "padding='same' needs stride 1"),
        ((pattern, 3, 1, "full"), "'same' or 'valid', not 'full'"),
        ((pattern, 3, 1, 0, (1, 2, 3)), "dilation must be"),
        ((pattern, 3, 1, 0, 1, 3), "groups must be a whole number that divides the 4"),
        ((pattern, 3, 1, 0, 1, 1, True, "mirror"), "padding_mode must be one of"),
    ):
        with pytest.raises(ValueError, match=text):
            SparseConv2d(*arguments)
    with pytest.raises(ValueError, match="backend must be one of"):
        SparseConv2d(pattern, 3, backend="triton")
    with pytest.raises(TypeError, match="must be a Pattern"):
        SparseConv2d(torch.ones(4, 27), 3)
    with pytest.raises(TypeError, match="an nn.Conv2d is needed"):
        SparseConv2d.from_conv(nn.Conv1d(1, 1, 1))
    conv = nn.Conv2d(1, 1, 1)
    conv.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="1 of the 1 entries of the weight are NaN"):
        SparseConv2d.from_conv(conv)


def test_the_native_layer_checks_its_window():
    pointers, columns = torch.tensor([0, 1], dtype=torch.int32).numpy(), torch.tensor([0], dtype=torch.int32).numpy()
    good = [(4, 4), (2, 2), (3, 3), (1, 1), (0, 0), (1, 1)]
    _cpu.SparseConvolutionF32(1, 1, pointers, columns, tuple(good))
    for place, value, text in (
        (0, (0, 4), "sizes, strides and dilations"), (3, (1, 0), "sizes, strides"), (2, (0, 3), "needs a window|sizes"),
        (1, (2,), "six pairs"), (0, (1 << 20, 1 << 20), "offsets reach"), (5, (1 << 20, 1), "reaches further"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            _cpu.SparseConvolutionF32(1, 1, pointers, columns, tuple(good[:place] + [value] + good[place + 1:]))
    with pytest.raises(ValueError, match="column"):
        _cpu.SparseConvolutionF32(1, 1, pointers, columns + 9, tuple(good))
