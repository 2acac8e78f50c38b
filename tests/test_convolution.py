"""Convolutions in graphs: matrices whose weights all pixels share, against torch and against the same field written out."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import sparseflow_kernels as sfk
from sparseflow_kernels import _cpu, threads
from sparseflow_kernels.capture import capture_graph, graph_linear
from sparseflow_kernels.engines.graph_cuda import GraphCudaEngine
from sparseflow_kernels.engines.triton.graph_engine import GraphTritonEngine
from sparseflow_kernels.field import Convolution, Pattern, Window
from sparseflow_kernels.field.graph import order

F64 = torch.float64


@pytest.fixture
def shared(monkeypatch):
    """Small convolutions share their weights as large ones do."""
    monkeypatch.setattr(graph_linear, "MOST_UNROLLED", 0)


# ------------------------------------------------------------------------------------------------------ the matrix itself


def random_convolution(seed: int) -> tuple[Convolution, torch.Tensor]:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    pair = lambda low, high: (draw.randint(low, high), draw.randint(low, high))
    source, kernel, stride, dilation, padding = pair(1, 7), pair(1, 3), pair(1, 3), pair(1, 2), pair(0, 2)
    size = lambda n, k, s, d, p: (n + 2 * p - d * (k - 1) - 1) // s + 1
    target = tuple(max(1, size(*numbers)) for numbers in zip(source, kernel, stride, dilation, padding))
    pattern = Pattern.from_mask(torch.rand(draw.randint(1, 3), draw.randint(1, 3) * kernel[0] * kernel[1]) < 0.6)
    matrix = Convolution(pattern, 0, window=Window(source, target, kernel, stride, padding, dilation))
    return matrix, torch.randn(pattern.nnz, dtype=F64)


def test_the_matrix_its_product_and_its_transpose():
    for seed in range(40):
        matrix, values = random_convolution(seed)
        row, column, entry = matrix.places
        dense = torch.zeros(matrix.shape, dtype=F64).index_put((row, column), values[entry])
        assert len(set(zip(row.tolist(), column.tolist()))) == len(row) <= matrix.multiply_adds
        for transposed, wanted in ((False, dense), (True, dense.T)):
            x = torch.randn(2, wanted.shape[1], dtype=F64)
            torch.testing.assert_close(matrix.product(x, values, transposed), x @ wanted.T)


# ------------------------------------------------------------------------------------------- what people write, captured


def with_time(t, x):
    return torch.cat([torch.ones_like(x[:, :1]) * t, x], 1)


class ConcatConv(nn.Module):
    """FFJORD's layer: time as a channel."""

    def __init__(self, in_, out, kernel=3, transposed=False, **options):
        super().__init__()
        self.layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(in_ + 1, out, kernel, **options)

    def forward(self, t, x):
        return self.layer(with_time(t, x))


class FfjordField(nn.Module):
    def __init__(self, channels=2, width=4, hidden=2, activation=F.softplus):
        super().__init__()
        sizes = [channels, *[width] * hidden, channels]
        self.layers = nn.ModuleList(ConcatConv(a, b, padding=1) for a, b in zip(sizes, sizes[1:]))
        self.activation = activation

    def forward(self, t, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(t, x))
        return self.layers[-1](t, x)


class OdenetField(nn.Module):
    """torchdiffeq's odenet_mnist."""

    def __init__(self, dim=4):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(2, dim) for _ in range(3))
        self.first, self.second = ConcatConv(dim, dim, padding=1), ConcatConv(dim, dim, padding=1)

    def forward(self, t, x):
        x = self.first(t, torch.relu(self.norms[0](x)))
        return self.norms[2](self.second(t, torch.relu(self.norms[1](x))))


class HourglassField(nn.Module):
    """Down by a stride and up by a transposed convolution, depthwise and dilated ones between, and a residual."""

    def __init__(self):
        super().__init__()
        self.down, self.up = ConcatConv(2, 4, stride=2, padding=1), ConcatConv(4, 2, 4, True, stride=2, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False)

    def forward(self, t, x):
        inner = torch.tanh(self.down(t, x))
        return x + self.up(t, torch.tanh(self.depthwise(inner)) + inner)


class CircularField(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular")
        self.second = nn.Conv1d(3, 2, 5, padding="same", padding_mode="circular")

    def forward(self, t, x):
        return self.second(torch.tanh(self.first(x) + t))


class PooledField(nn.Module):
    """Pooling, nearest neighbours and squeezing around convolutions (ANODE's and FFJORD's fixed operations)."""

    def __init__(self):
        super().__init__()
        self.small, self.squeezed = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(12, 8, 1)

    def forward(self, t, x):
        small = F.interpolate(F.elu(self.small(F.avg_pool2d(x, 2))), scale_factor=2, mode="nearest")
        return F.pixel_shuffle(torch.sin(self.squeezed(F.pixel_unshuffle(small, 2))), 2) * t


class EnergyField(nn.Module):
    """Minus the gradient of an energy of the image, by autograd."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 3, stride=2, padding=1)

    def forward(self, t, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            energy = F.softplus(self.layer(x)).sum()
            (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
        return -gradient


FIELDS = {
    "ffjord": (FfjordField, (2, 6, 5)), "odenet": (OdenetField, (4, 5, 4)), "hourglass": (HourglassField, (2, 6, 8)),
    "circular": (CircularField, (2, 7)), "pooled": (PooledField, (2, 8, 8)), "energy": (EnergyField, (2, 5, 6)),
}  # fmt: skip


def make(name: str, batch: int = 3) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    kind, shape = FIELDS[name]
    return kind().double(), torch.randn(batch, *shape, dtype=F64)


def convolutions(module: nn.Module, y: torch.Tensor) -> list[Convolution]:
    field, _ = capture_graph(module, None, y)
    return [node.matrix for node in order([field.output]) if isinstance(node.matrix, Convolution)]


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("name", FIELDS)
def test_values_and_gradients_are_the_modules(name, engine, shared):
    module, y = make(name)
    for part in module.modules():  # some of the weights are pruned
        if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
            prune.random_unstructured(part, "weight", 0.4)
    compiled = sfk.compile(module, engine, like=y, live=True)
    assert convolutions(module, y)
    t = torch.tensor(0.7, dtype=F64, requires_grad=True)
    y.requires_grad_()
    own, cotangent = [p for p in module.parameters()], torch.randn_like(y)
    wanted = module(t, y)
    found = compiled(t, y)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)
    theirs = torch.autograd.grad(wanted, [t, y, *own], cotangent, allow_unused=True, materialize_grads=True)
    ours = torch.autograd.grad(found, [t, y, *own], cotangent, allow_unused=True, materialize_grads=True)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["ffjord", "hourglass"])
def test_a_solve_with_divergence_and_its_gradient(name, shared):
    module, y = make(name, 2)
    noise, results = torch.randn_like(y), []
    for engine in ("reference", "cpu"):
        compiled = sfk.compile(module, engine, like=y)
        field, start = sfk.with_divergence(compiled, "hutchinson", noise), y.clone().requires_grad_()
        x, l = sfk.odeint(  # noqa: E741
            field, (start, torch.zeros(2, dtype=F64)), torch.tensor([0.0, 0.3], dtype=F64), method="rk4",
            options={"step_size": 0.15},
        )  # fmt: skip
        loss = x[-1].square().sum() + l[-1].sum()
        results.append((x, l, *torch.autograd.grad(loss, [start, *compiled.parameters()])))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    with torch.enable_grad():
        x = y.clone().requires_grad_()
        dx = module(torch.tensor(0.0, dtype=F64), x)
        (product,) = torch.autograd.grad(dx, x, noise)
    _, slope = field(torch.tensor(0.0, dtype=F64), (y, torch.zeros(2, dtype=F64)))
    torch.testing.assert_close(slope, -(product * noise).flatten(1).sum(1))


@pytest.mark.parametrize("default", [torch.float32, F64])
def test_the_exact_divergence_takes_colours_and_not_pixels(shared, default):
    torch.manual_seed(0)
    module, y = FfjordField(1, 2, 3).double(), torch.randn(2, 1, 9, 10, dtype=F64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)  # which plans do not depend on
    try:
        compiled = sfk.compile(module, "cpu", like=y)
        assert 0 < compiled.divergence_plan("exact").form.colours < y[0].numel()
    finally:
        torch.set_default_dtype(before)
    _, slope = sfk.with_divergence(compiled)(torch.tensor(0.2, dtype=F64), (y, torch.zeros(2, dtype=F64)))
    flow = lambda one: module(torch.tensor(0.2, dtype=F64), one[None])[0]
    wanted = [torch.func.jacrev(flow)(one).reshape(90, 90).trace() for one in y]
    torch.testing.assert_close(-slope, torch.stack(wanted))


def test_large_convolutions_share_and_small_ones_are_written_out():
    module, y = FfjordField(2, 8).double(), torch.randn(2, 2, 12, 13, dtype=F64)
    compiled = sfk.compile(module, "cpu", like=y)
    found = convolutions(module, y)  # 8 x 8 x 9 weights on 156 pixels are many; 3 x 8 x 9 and 9 x 2 x 9 are not
    assert [one.channels for one in found if one.channels[1] > 1] == [(8, 8)]
    t = torch.tensor(0.2, dtype=F64)
    torch.testing.assert_close(compiled(t, y), module(t, y))


def test_bits_do_not_depend_on_threads(shared, monkeypatch):
    monkeypatch.setattr(threads, "_count", None)
    torch.manual_seed(0)
    module, y = FfjordField(2, 4), torch.randn(70, 2, 6, 5)
    results = []
    _cpu.force_threads(True)
    try:
        for count in (1, 3):
            sfk.set_num_threads(count)
            compiled, start = sfk.compile(module, "cpu", like=y), y.clone().requires_grad_()
            out = compiled(0.3, start)
            results.append((out, *torch.autograd.grad(out, [start, *compiled.parameters()], torch.ones_like(out))))
    finally:
        _cpu.force_threads(False)
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_gpu_engines_refuse_by_name(shared):
    module, y = make("ffjord")
    field, _ = capture_graph(module, None, y)
    for engine in (GraphCudaEngine, GraphTritonEngine):
        found = engine.unsupported(field)
        assert found is None or "convolution, which the" in found or "CUDA" in found or "cuda" in found


@pytest.mark.parametrize("how", ["neurons", "weights"])
def test_pruning_goes_as_in_the_written_out_field(how, monkeypatch):
    masks = []
    for most in (0, 1 << 30):
        monkeypatch.setattr(graph_linear, "MOST_UNROLLED", most)
        module, y = make("ffjord")
        if how == "neurons":
            sfk.prune_neurons_(module, 0.5, like=y)
        else:
            sfk.prune_weights_(module, 0.6, like=y)
        found = {name: buffer for name, buffer in module.named_buffers() if name.endswith("_mask")}
        compiled = sfk.compile(module, "cpu", like=y)
        assert bool(convolutions(module, y)) == (most == 0)
        torch.testing.assert_close(compiled(0.3, y), module(torch.tensor(0.3, dtype=F64), y))
        masks.append(found)
    assert masks[0] and masks[0].keys() == masks[1].keys()
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_the_native_program_checks_a_window():
    pointers, columns = torch.tensor([0, 1]).numpy(), torch.tensor([0]).numpy()
    good = [(4, 4), (2, 2), (3, 3), (1, 1), (0, 0), (1, 1)]
    for rows, window, text in (
        (4, good, None), (5, good, "whole planes"), (4, [*good[:2], (3, 0), *good[3:]], "sizes, strides and dilations"),
        (4, good[:5], "six pairs"),
    ):  # fmt: skip
        builder = _cpu.BuilderF64()
        make_one = lambda: builder.matrix(rows, 16, pointers, columns, torch.ones(1).numpy(), tuple(window))
        if text == "six pairs":
            with pytest.raises(ValueError, match=text):
                make_one()
            continue
        matrix, x, y = make_one(), builder.buffer(16, 1), builder.buffer(rows, 1)
        builder.product(matrix, (x, 0), (y, 0))
        builder.graph_roles(16, rows, False, x, y)
        if text is None:
            builder.compile()
        else:
            with pytest.raises(ValueError, match=text):
                builder.compile()
