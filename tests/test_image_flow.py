"""Flows of images: volumes against autograd's Jacobians, sizes as published, native solves, pruning, training, refusals."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparseflow_kernels as sfk
from sparseflow_kernels import flows
from sparseflow_kernels.data import Dataset
from sparseflow_kernels.flows import (
    CONV_LAYERS, ConvField, Dequantise, ImageFlow, Logit, Squeeze, field_shapes, image_flow, load_weights_,
    multiscale_flow,
)  # fmt: skip
from sparseflow_kernels.pruning import (
    KEEP_RATIOS, dense_size, prunable_layers, prune_neurons_, prune_weights_, size, sparsity_report,
)  # fmt: skip
from sparseflow_kernels.training import PRESETS, evaluate, evaluate_nll, sparse_flow
from sparseflow_kernels.training.cycles import prune_cycle_

torch.set_num_threads(1)
F64 = torch.float64


def tiny(shape=(1, 4, 4), hidden=(3,), scales=2, **settings) -> ImageFlow:
    """Three fields, of 1x4x4, 4x2x2 and 2x2x2, one for each part of a multiscale flow."""
    torch.manual_seed(0)
    defaults = {"blocks": 1, "levels": 5, "alpha": 0.05, "rtol": 1e-8, "atol": 1e-8, "train_end_time": True}
    return multiscale_flow(shape, hidden, scales=scales, **(defaults | settings)).double()


def images(n, shape=(1, 4, 4), levels=5, seed=1):
    return torch.randint(levels, (n, *shape), generator=torch.Generator().manual_seed(seed))


def log_volume(function, x):
    """log|det| of the Jacobian at one sample x [...]."""
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x[None])[0].flatten(), x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))[1]


# ------------------------------------------------------------------------------------------------------------- volumes


@pytest.mark.parametrize("transform", [Logit(0.05), Logit(1e-6), Squeeze(), Dequantise(7)], ids=lambda t: type(t).__name__)
def test_volumes_are_the_jacobians_and_inverses_undo(transform):
    torch.manual_seed(0)
    x = torch.rand(3, 2, 2, 4, dtype=F64)
    noise = (torch.rand_like(x),) if isinstance(transform, Dequantise) else ()
    y, logdet = transform(x, *noise)
    function = lambda x: transform(x, *(n[:1] for n in noise))[0]
    torch.testing.assert_close(logdet, torch.stack([log_volume(function, row) for row in x]))
    torch.testing.assert_close(transform.inverse(y) - (noise[0] if noise else 0.0), x)
    if isinstance(transform, Logit):
        back, volume = transform.inverted(y)
        torch.testing.assert_close((back, volume), (x, -logdet))


def test_the_logits_ends_are_finite_and_exact_in_single_precision():
    logit = Logit(1e-6)
    y, logdet = logit(torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1, 1))
    expected = math.log(1e-6 / (1 - 1e-6))
    torch.testing.assert_close(y.flatten(), torch.tensor([expected, -expected, 0.0]))
    assert bool(logdet.isfinite().all())


def test_squeezing_makes_channels_of_2x2_blocks():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    y, _ = Squeeze()(x)
    assert y[0, :, 0, 0].tolist() == [0, 1, 4, 5] and y.shape == (1, 4, 2, 2)


def test_dequantised_levels_lie_in_their_bins():
    x = images(50).double()
    y, _ = Dequantise(5)(x)
    assert torch.equal(Dequantise(5).floor(y), x) and not torch.equal(y * 5, x)
    assert Dequantise(5).floor(torch.tensor([-0.1, 1.1])).tolist() == [0, 4]


def test_the_density_of_a_flow_is_its_jacobians():
    flow = tiny(divergence="exact").compile("cpu")
    x = images(1).double() + 0.3
    z, logdet = flow.transform(x, dequantise=False)
    function = lambda x: flow.transform(x, dequantise=False)[0]
    torch.testing.assert_close(logdet, torch.stack([log_volume(function, row) for row in x]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.inverse(z), x, rtol=1e-6, atol=1e-6)
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(flow.log_prob(x, dequantise=False), normal.log_prob(z).sum(1) + logdet)
    assert [stats.nfe > 0 for stats in flow.stats.solves] == [True] * 3


def test_a_log_density_is_pushed_through_both_ways():
    flow = tiny(divergence="exact").compile("cpu")
    x, normal = images(3).double() + 0.3, torch.distributions.Normal(0.0, 1.0)
    z, delta = flow.push(x, torch.zeros(3, 1, dtype=F64))
    torch.testing.assert_close(normal.log_prob(z).sum(1) - delta[:, 0], flow.log_prob(x, dequantise=False))
    back, logp = flow.push(z, normal.log_prob(z).sum(1), reverse=True)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logp, flow.log_prob(x, dequantise=False), rtol=1e-6, atol=1e-6)
    assert torch.equal(flow.push(x), z) and torch.equal(flow.push(z, reverse=True), flow.inverse(z))


def test_a_density_integrates_to_one_and_bounds_the_probabilities():
    flow = tiny((1, 1, 2), (4,), scales=1, levels=3, divergence="exact", rtol=1e-6, atol=1e-6, alpha=1e-6)
    line = (torch.arange(90, dtype=F64) + 0.5) / 30
    grid = torch.cartesian_prod(line, line)
    density = flow.log_prob(grid, dequantise=False).detach()
    assert float(density.exp().sum()) / 900 == pytest.approx(1.0, abs=1e-3)
    of_one = density[(grid.floor() == torch.tensor([1.0, 2.0])).all(1)]  # image's bin
    bits = flow.bits_per_dim(torch.tensor([[1.0, 2.0]], dtype=F64).expand(400, 2)).detach()
    assert float(bits.mean() + of_one.mean() / math.log(4)) == pytest.approx(0.0, abs=4 * float(bits.std()) / 20)
    assert float(bits.mean()) > -float(of_one.exp().mean().log2()) / 2  # that of the image's probability
    assert bits.shape == (400,)


# --------------------------------------------------------------------------------------------------------------- sizes

SIZES = {
    "mnist": (800_646, 798_678, 40, "640517 497812 386901 300701 233705 181637 141169 109717 85272 66274 51508 40032"),
    "cifar10": (
        1_358_882, 1_355_922, 56,
        "1087106 844902 656660 510359 396652 308279 239596 186215 144727 112482 87421 67944",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_papers(name):
    flow, (total, weights, layers, sizes) = image_flow(name), SIZES[name]
    assert dense_size(flow) == size(flow) == total and len(flow.vector_fields) == layers // 4
    report = sparsity_report(flow)
    assert report.total_weights == weights and len(prunable_layers(flow)) == layers
    keeps = KEEP_RATIOS["images"]
    assert [round(keep * total) for keep in keeps] == list(map(int, sizes.split()))
    preset = PRESETS[name]
    assert preset.keep_ratios == keeps and dense_size(preset.flow("h8")) < total / 20
    settings = preset.training
    assert (settings.epochs, settings.batch, settings.lr, settings.milestones) == (50, 200, 1e-3, (45,))
    assert settings.weight_decay == 0 and settings.optimizer == "adam" and settings.select == "best"
    assert (flow.alpha, flow.levels, flow.rtol, flow.noise, flow.flip) == (1e-6, 256, 1e-5, "gaussian", name == "cifar10")


def test_scales_are_ffjords():
    channels = [shape[0] for shape in field_shapes((1, 28, 28))]
    assert channels == [1, 1, 4, 4, 2, 2, 8, 8, 4, 4]
    assert [shape[0] for shape in field_shapes((3, 32, 32))] == [3, 3, 12, 12, 6, 6, 24, 24, 12, 12, 48, 48, 24, 24]
    assert field_shapes((1, 8, 8))[-1] == (2, 4, 4) and len(field_shapes((1, 8, 8), blocks=1)) == 3


# --------------------------------------------------------------------------------------------------------------- solves


@pytest.mark.parametrize("layer", CONV_LAYERS)
def test_every_layer_is_read_and_run_natively(layer):
    torch.manual_seed(0)
    field = ConvField((2, 3, 4), (3,), layer).double()
    x = torch.randn(5, 2, 3, 4, dtype=F64)
    compiled = sfk.compile(field, engine="cpu", like=x[:1])
    t = torch.tensor(0.7, dtype=F64)
    torch.testing.assert_close(compiled(t, x), field(t, x))
    for kind, noise in (("exact", None), ("hutchinson", torch.randn_like(x))):
        state = (x, torch.zeros(5, dtype=F64))
        own, native = (sfk.with_divergence(f, kind, noise)(t, state) for f in (field, compiled))
        torch.testing.assert_close(native, own)
    assert own[1].shape == (5,) and sfk.with_divergence(field)(t, (x, torch.zeros(5, 1, dtype=F64)))[1].shape == (5, 1)


def test_compiled_flows_are_the_same_with_their_gradients():
    flow = tiny(divergence="hutchinson", noise="gaussian")
    native, x = flow.compile("cpu"), images(6)
    assert isinstance(native, ImageFlow) and native.shape == flow.shape and native.settings() == flow.settings()
    values = []
    for one in (flow, native):
        torch.manual_seed(3)
        values.append(one.row_nll(x))
        values[-1].mean().backward()
        assert len(one.stats.solves) == 3
    torch.testing.assert_close(values[1], values[0])
    assert {stats.engine for stats in native.stats.solves} == {"cpu"}
    for one, other in zip(flow.sqrt_end_time, native.sqrt_end_time):
        torch.testing.assert_close(other.grad, one.grad)
    before = flow.vector_fields[1].layers[0].conv.weight
    with torch.no_grad():
        changed = before - 0.1 * before.grad
        for parameter in native.parameters():
            parameter -= 0.1 * parameter.grad
    native.copy_to(flow)
    torch.testing.assert_close(before.detach(), changed)
    torch.manual_seed(5)
    ours = flow.sample((2, 3))
    torch.manual_seed(5)
    assert torch.equal(native.sample((2, 3)), ours) and ours.shape == (2, 3, 1, 4, 4)
    assert torch.equal(ours, ours.floor()) and 0 <= float(ours.min()) <= float(ours.max()) <= 4


def test_flips_are_drawn_in_training_alone():
    flow = tiny(flip=True, scales=1)
    seen = []
    flow.log_prob = lambda x: seen.append(x) or torch.zeros(len(x))
    x = images(64)
    flow.eval().row_nll(x)
    flow.train().row_nll(x)
    assert torch.equal(seen[0], x)
    turned = (seen[1] == x.flip(3)).flatten(1).all(1)
    assert bool((turned | (seen[1] == x).flatten(1).all(1)).all()) and 16 < int(turned.sum()) < 48


def test_evaluation_estimates_the_trace_of_images():
    flow = tiny(divergence="hutchinson", scales=1)
    assert not flow.exact_evaluation and flow.evaluation_rows < 1024
    torch.manual_seed(0)
    found = evaluate(flow, images(5).flatten(1).double())
    torch.manual_seed(0)
    assert found.nll == float(flow.eval().row_nll(images(5)).detach().mean()) and flow.eval_divergence is None


# -------------------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("prune, keeps", [(prune_weights_, (0.5, 0.2)), (prune_neurons_, (0.6,))])
def test_pruning_reads_small_images_and_finds_the_same(prune, keeps):
    torch.manual_seed(0)
    small = multiscale_flow((1, 8, 8), (4, 4), scales=1, blocks=2)
    whole = copy.deepcopy(small)
    for field in whole.vector_fields:
        assert field.pruning_shape == (1, 4, 4)
        del field.pruning_shape
    for keep in keeps:
        for flow in (small, whole):
            prune(flow, keep)
        assert size(small) == size(whole) <= keep * dense_size(small) + 1
    masks = dict(whole.named_buffers())
    assert all(torch.equal(mask, masks[name]) for name, mask in small.named_buffers()) and masks


def test_filters_go_but_time_and_the_states_own_channels_stay():
    flow = tiny(hidden=(6, 6), scales=1)
    prune_neurons_(flow, 0.4, fold="drop")
    assert size(flow) <= 0.4 * dense_size(flow)
    first, second, last = (layer.conv.weight for layer in flow.vector_fields[0].layers)
    live = (first != 0).flatten(1).any(1)
    assert 0 < int(live.sum()) < 6
    assert bool((second[(second != 0).flatten(1).any(1)][:, 0] != 0).any()), "the field is autonomous"
    assert bool((last[0] != 0).any())


@pytest.mark.parametrize("method", ["weights", "neurons"])
def test_every_field_moves_its_images_down_the_presets_schedule(method):
    """A ranking over all fields cuts some of them off; the presets ask for a floor under it."""
    preset = PRESETS["digits"]
    torch.manual_seed(0)
    flow = multiscale_flow((1, 8, 8), (5, 6), blocks=1).double()
    flow.vector_fields[1].layers[1].conv.weight.data.mul_(1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*but one neuron per hidden layer leaves")
        for keep in preset.keep_ratios[2::3]:
            prune_cycle_(flow, keep, method, "simplify", **preset.prune_options(method))
            assert method == "neurons" or size(flow) <= keep * dense_size(flow)
            for field, shape in zip(flow.vector_fields, flow.shapes):
                x = torch.randn(1, *shape, dtype=F64, requires_grad=True)
                (slope,) = torch.autograd.grad(field(torch.tensor(0.3, dtype=F64), x).square().sum(), x)
                assert bool((slope != 0).any())


def test_a_flow_is_trained_pruned_and_resumed(tmp_path):
    rows = images(40).flatten(1).float()
    data = Dataset("tiny", rows[:30], rows[30:], rows[30:], shape=(1, 4, 4), levels=5)

    def run(**more):
        torch.manual_seed(0)
        flow = multiscale_flow((1, 4, 4), (3,), scales=1, blocks=1, levels=5, alpha=0.05, rtol=1e-3, atol=1e-3)
        return list(sparse_flow(flow, data, (0.5,), steps=3, batch=10, lr=0.02, **more))

    cycles = run(folder=tmp_path, control=True)
    assert cycles[1].size == math.floor(0.5 * dense_size(cycles[0].flow)) and cycles[1].live_size is not None
    assert cycles[0].history[0]["nfe"] >= 14 and math.isfinite(cycles[1].nll) and cycles[1].control_nll is not None
    again = run(folder=tmp_path, control=True)
    assert [cycle.resumed for cycle in again] == [True, True]
    other = run()[-1].flow.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in again[1].flow.state_dict().items())
    assert evaluate_nll(cycles[1].flow, data.test) == pytest.approx(cycles[1].nll, rel=0.2)


def test_weights_of_ffjords_images_are_taken_over():
    torch.manual_seed(0)
    theirs, ours = (multiscale_flow((1, 8, 8), (4,), train_end_time=True) for _ in range(2))
    places = [(0, 1), (0, 2), (0, 4), (0, 5), (1, 0), (1, 1)]  # a logit is 0.0, a squeeze 0.3
    state = {}
    for name, tensor in theirs.state_dict().items():
        part, number, *rest = name.split(".")
        at = "model.transforms.{}.chain.{}.".format(*places[int(number)])
        if part == "vector_fields":
            state[f"{at}odefunc.diffeq.module.layers.{rest[1]}._layer.{rest[3]}"] = tensor
            state[f"{at}odefunc._num_evals"] = torch.zeros(())
        else:
            state[f"{at}sqrt_end_time"] = tensor
    load_weights_(ours, state)
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), ours.state_dict().values()))
    x = torch.randn(2, 1, 8, 8)
    t = torch.tensor(0.4)
    first = lambda name: state[f"model.transforms.0.chain.1.odefunc.diffeq.module.layers.{name}"]
    time = torch.full_like(x, 0.4)
    hidden = F.softplus(F.conv2d(torch.cat([time, x], 1), first("0._layer.weight"), first("0._layer.bias"), padding=1))
    time = torch.full_like(hidden[:, :1], 0.4)
    y = F.conv2d(torch.cat([time, hidden], 1), first("1._layer.weight"), first("1._layer.bias"), padding=1)
    torch.testing.assert_close(ours.vector_fields[0](t, x), y)
    with pytest.raises(ValueError, match="another (flow|shape)"):
        load_weights_(multiscale_flow((1, 8, 8), (5,), train_end_time=True), state)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("make, words", [
    (lambda: image_flow("svhn"), "name must be one of mnist, cifar10, digits"),
    (lambda: multiscale_flow((1, 3, 8)), "at least 4 pixels"),
    (lambda: multiscale_flow((1, 18, 18)), "divisible by 4"),
    (lambda: multiscale_flow((1, 8)), r"\(channels, height, width\)"),
    (lambda: multiscale_flow((1, 8, 8), scales=5), "scales must be at least 1"),
    (lambda: multiscale_flow((1, 8, 8), hidden=(0,)), "hidden must be whole numbers"),
    (lambda: multiscale_flow((1, 8, 8), layer="bayes"), "layer must be one of ignore"),
    (lambda: multiscale_flow((1, 8, 8), levels=1), "levels must be a whole number >= 2"),
    (lambda: multiscale_flow((1, 8, 8), alpha=0.5), "alpha must be in"),
    (lambda: multiscale_flow((1, 8, 8), penalties={"kinetic": 1.0}), "penalties: image flows have none"),
    (lambda: ImageFlow([nn.Identity()], (1, 8, 8)), "fields must be 6"),
])  # fmt: skip
def test_flows_that_cannot_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("change, words", [
    (lambda x: x[:, :, :3], r"must be images \[n, 1, 4, 4\], or rows \[n, 16\]"),
    (lambda x: x[0], "must be images"),
    (lambda x: x + 1, "whole grey levels 0 to 4; its values go from 1 to 5"),
    (lambda x: -x, "go from -4 to 0"),
    (lambda x: x.double() / 4, "are not whole. If it is scaled to"),
    (lambda x: x.double() * math.nan, "finite"),
])  # fmt: skip
def test_images_that_are_no_levels_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        tiny(scales=1).log_prob(change(images(400)))


def test_bytes_and_rows_are_images_and_none_are_none():
    flow = tiny(scales=1).eval()
    torch.manual_seed(0)
    first = flow.log_prob(images(3).to(torch.uint8))
    torch.manual_seed(0)
    assert torch.equal(flow.log_prob(images(3).double().flatten(1)), first)
    assert flow.log_prob(images(0)).shape == (0,) and flow.sample(0).shape == (0, 1, 4, 4)
    assert "shape=(1, 4, 4), levels=5" in repr(flow) and flows.ffjord_flow("digits").shape == (1, 8, 8)
