"""Flows: layer kinds against their formulas, the zoo's exact sizes, and densities that are densities."""

import math

import pytest
import torch
from torch import nn

from sparseflow_kernels.flows import LAYERS, TABULAR, ContinuousFlow, mlp_field, tabular_flow, toy_field
from sparseflow_kernels.pruning import dense_size, prunable_layers

torch.set_num_threads(1)


def make_flow(*, n_fields=1, layer="concatsquash", dim=2, dtype=torch.float64, scale=1.5, **settings):
    torch.manual_seed(0)
    fields = [mlp_field(dim, (16, 16), layer=layer) for _ in range(n_fields)]
    flow = ContinuousFlow(fields, dim, **settings).to(dtype)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "end_time" not in name:
                parameter.mul_(scale)
    return flow


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind not in ("blend", "hyper")])
def test_layer_is_its_formula(kind):
    torch.manual_seed(1)
    layer = LAYERS[kind](3, 4).double()
    t, x = torch.tensor(0.6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    weight, bias = layer.linear.weight, layer.linear.bias
    if kind in ("concat", "concatcoord"):
        expected = x @ weight[:, 1:].T + bias + weight[:, 0] * t
    else:
        expected = x @ weight.T + bias
    if kind in ("squash", "concatsquash"):
        expected = expected / (1 + torch.exp(-(layer.time_gate.weight[:, 0] * t + layer.time_gate.bias)))
    if kind in ("concat_v2", "concatsquash"):
        expected = expected + layer.time_bias.weight[:, 0] * t
    torch.testing.assert_close(layer(t, x), expected)


@pytest.mark.parametrize(
    ("name", "total", "weights", "n_layers"),
    [
        ("power", 43_325, 39_600, 20),
        ("gas", 278_565, 268_800, 20),
        ("hepmass", 546_850, 529_200, 30),
        ("miniboone", 820_613, 813_560, 3),
        ("bsds300", 6_698_666, 6_667_920, 8),
    ],
)
def test_tabular_sizes(name, total, weights, n_layers):
    flow = tabular_flow(name)
    layers = prunable_layers(flow)
    assert dense_size(flow) == total
    assert (sum(layer.weight.numel() for layer in layers.values()), len(layers)) == (weights, n_layers)
    assert flow.dim == TABULAR[name].dim


@pytest.mark.parametrize(
    ("shape", "total", "weights"),
    [
        ("l2_h3", 17, 12),
        ("l2_h128", 642, 512),
        ("l4_h64", 8642, 8448),
        ("l8_h37", 8623, 8362),
        ("l2_h1700", 8502, 6800),
    ],
)
def test_toy_sizes(shape, total, weights):
    field = toy_field(shape)
    assert dense_size(field) == total
    assert sum(layer.weight.numel() for layer in prunable_layers(field).values()) == weights


def test_bad_shapes_are_refused():
    for shape in ("l1_h3", "l2h3", "h3_l2"):
        with pytest.raises(ValueError, match="shape must look like"):
            toy_field(shape)
    with pytest.raises(ValueError, match="layer must be one of"):
        mlp_field(2, (3,), layer="concatsqash")
    with pytest.raises(ValueError, match="name must be one of"):
        tabular_flow("adult")


@pytest.mark.parametrize("layer", ["ignore", "concat", "concatsquash"])
def test_density_integrates_to_one(layer):
    """The sign of l: with it wrong the integral is far from 1."""
    flow = make_flow(layer=layer, dtype=torch.float32, scale=2.0)
    side = 120
    points = torch.linspace(-6, 6, side)
    grid = torch.cartesian_prod(points, points)
    with torch.no_grad():
        log_p = flow.log_prob(grid)
    cell = (12 / (side - 1)) ** 2
    assert float(log_p.exp().sum()) * cell == pytest.approx(1.0, abs=0.01)
    wrong = flow._base(grid).log_prob(flow.transform(grid)[0]) - flow.transform(grid)[1]
    assert abs(float(wrong.detach().exp().sum()) * cell - 1.0) > 0.02


@pytest.mark.parametrize("n_fields", [1, 3])
def test_logdet_is_the_jacobians_and_inverse_inverts(n_fields):
    flow = make_flow(n_fields=n_fields, rtol=1e-9, atol=1e-9)
    x = torch.randn(6, 2, dtype=torch.float64)
    z, logdet = flow.transform(x)
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda r: flow.transform(r[None])[0][0], x[row])
        assert float(torch.linalg.slogdet(jacobian).logabsdet) == pytest.approx(float(logdet[row].detach()), abs=1e-6)
    assert float((flow.inverse(z) - x).detach().abs().max()) < 1e-7
    assert float((z - x).detach().abs().max()) > 0.1
    expected = -0.5 * (z * z).sum(1) - math.log(2 * math.pi) + logdet
    torch.testing.assert_close(flow.log_prob(x), expected)


def test_hutchinson_averages_to_exact_in_train_and_is_exact_in_eval():
    flow = make_flow(divergence="hutchinson", eval_divergence="exact", noise="rademacher")
    exact = make_flow(divergence="exact")
    x = torch.randn(1, 2, dtype=torch.float64)
    torch.manual_seed(5)
    draws = flow.log_prob(x.expand(2000, 2)).detach()
    truth = float(exact.log_prob(x).detach())
    assert float(draws.std()) > 1e-3
    # one solve with its own noise per row; the rows share steps only
    assert abs(float(draws.mean()) - truth) < 4 * float(draws.std()) / math.sqrt(2000) + 1e-5
    flow.eval()
    assert float(flow.log_prob(x).detach()) == pytest.approx(truth, abs=1e-12)


def test_samples_follow_the_density():
    flow = make_flow(dtype=torch.float32)
    torch.manual_seed(3)
    x = flow.sample((40, 100))
    assert x.shape == (40, 100, 2) and not x.requires_grad and flow.sample(7).shape == (7, 2)
    x = x.view(-1, 2)
    points = torch.linspace(-6, 6, 100)
    grid = torch.cartesian_prod(points, points)
    with torch.no_grad():
        weight = flow.log_prob(grid).exp()
    weight = weight / weight.sum()
    mean = (weight[:, None] * grid).sum(0)
    std = ((weight[:, None] * grid**2).sum(0) - mean**2).sqrt()
    assert bool(((x.mean(0) - mean).abs() < 4 * std / math.sqrt(len(x))).all())
    torch.testing.assert_close(x.std(0), std, rtol=0.06, atol=0.0)


def test_trained_end_time_has_a_true_gradient():
    flow = make_flow(n_fields=2, train_end_time=True, rtol=1e-8, atol=1e-8)
    x = torch.randn(5, 2, dtype=torch.float64)
    flow.log_prob(x).sum().backward()
    for parameter in flow.sqrt_end_time:
        with torch.no_grad():
            value = float(parameter)
            ends = []
            for shifted in (value + 1e-4, value - 1e-4):
                parameter.fill_(shifted)
                ends.append(float(flow.log_prob(x).sum()))
            parameter.fill_(value)
        assert float(parameter.grad) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3)
        assert abs(float(parameter.grad)) > 1e-3


def test_adjoint_gradient_agrees():
    flow = make_flow(rtol=1e-9, atol=1e-9)
    adjoint = make_flow(rtol=1e-9, atol=1e-9, gradient="adjoint")
    x = torch.randn(4, 2, dtype=torch.float64)
    for f in (flow, adjoint):
        f.log_prob(x).mean().backward()
    for a, b in zip(flow.parameters(), adjoint.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_stats_and_base_and_compile():
    base = torch.distributions.Independent(torch.distributions.Laplace(torch.zeros(2).double(), 1.0), 1)
    flow = make_flow(n_fields=2, base=base, train_end_time=True)
    x = torch.randn(8, 2, dtype=torch.float64)
    expected = flow.log_prob(x).detach()
    assert len(flow.stats.solves) == 2 and flow.stats.nfe == sum(s.nfe for s in flow.stats.solves) > 10
    compiled = flow.compile(engine="reference")
    assert compiled.base is base and compiled.vector_fields[0] is not flow.vector_fields[0]
    torch.testing.assert_close(compiled.log_prob(x).detach(), expected, rtol=1e-9, atol=1e-9)
    assert compiled.stats.nfe == flow.stats.nfe
    compiled.log_prob(x).mean().backward()
    flow.log_prob(x).mean().backward()
    torch.testing.assert_close(compiled.sqrt_end_time[0].grad, flow.sqrt_end_time[0].grad, rtol=1e-3, atol=1e-6)


def test_bad_input_is_named():
    flow = make_flow(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x must be a tensor \[n, 2\].*\[4, 3\]"):
        flow.log_prob(torch.zeros(4, 3))
    with pytest.raises(TypeError, match="x is torch.float64.*parameters are torch.float32"):
        flow.log_prob(torch.zeros(4, 2).double())
    x = torch.zeros(6, 2)
    x[2, 1], x[5, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match="x has NaN or infinite entries in 2 of 6 rows: 2, 5"):
        flow.log_prob(x)
    with pytest.raises(ValueError, match="divergence must be one of"):
        ContinuousFlow(toy_field(), divergence="trace")
    with pytest.raises(ValueError, match="base must be a distribution over vectors"):
        ContinuousFlow(toy_field(), base=torch.distributions.Normal(0.0, 1.0))
    with pytest.raises(TypeError, match="odefunc must be an nn.Module"):
        ContinuousFlow([])
    assert isinstance(flow.vector_fields, nn.ModuleList)
