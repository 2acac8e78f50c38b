"""The Hessian over live parameters against autograd on the masked module, and Lanczos against full decompositions."""

import pytest
import torch

from sparseflow_kernels.analysis.hessian import (
    Curvature, LossHessian, curvature, exact_curvature, lanczos, trace_estimate,
)  # fmt: skip
from sparseflow_kernels.flows import ContinuousFlow, multiscale_flow, toy_field
from sparseflow_kernels.pruning import prune_weights_, size
from sparseflow_kernels.pruning.masks import set_mask_


def masked_flow(shape="l2_h6", keep=0.6, **settings):
    torch.manual_seed(1)
    flow = ContinuousFlow(toy_field(shape, "tanh"), method="rk4", options={"step_size": 0.25}, **settings).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(2.0)
    if keep < 1:
        prune_weights_(flow, keep)
    return flow


def unread_neuron(flow):
    """Neuron 0 has inputs and a bias, and nobody reads it: three parameters or more, without any curvature."""
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 0] = False
    set_mask_(flow.vector_fields[0].layers[1].linear, "weight", mask)
    return flow


def rows(n=24):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(2)).double()


def hessian_by_autograd(flow, x):
    """Of the masked module through torchdiffeq, restricted to the entries that are not zero."""
    named = dict(flow.named_parameters())
    live = {name: torch.ones_like(p, dtype=torch.bool) for name, p in named.items()}
    for name, mask in flow.named_buffers():
        live[name.replace("_mask", "_orig")] = mask != 0

    def loss(vector):
        start, given = 0, {}
        for name, parameter in named.items():
            count = int(live[name].sum())
            given[name] = parameter.detach().masked_scatter(live[name], vector[start : start + count])
            start += count
        return -torch.func.functional_call(flow, given, (x,)).mean()

    at = torch.cat([parameter.detach()[live[name]] for name, parameter in named.items()])
    return torch.autograd.functional.hessian(loss, at)


@pytest.mark.parametrize("keep", [1.0, 0.8])
def test_dense_matrix_is_autograds_on_the_masked_module(keep):
    flow = masked_flow(keep=keep)
    hessian = LossHessian(flow, rows())
    assert hessian.size == size(flow)  # no neuron died of this
    matrix = hessian.dense()
    expected = hessian_by_autograd(flow, rows())
    assert matrix.shape == expected.shape
    found, wanted = torch.linalg.eigvalsh(matrix), torch.linalg.eigvalsh(expected)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-11)
    assert torch.allclose(hessian.product(torch.ones(hessian.size)), matrix.sum(1), atol=1e-11)


def test_what_is_dead_has_no_part_in_the_spectrum():
    flow = unread_neuron(masked_flow(keep=1.0))
    hessian, masked = LossHessian(flow, rows()), hessian_by_autograd(flow, rows())
    assert hessian.size == len(masked) - 3 == size(flow) - 3
    wanted = torch.linalg.eigvalsh(masked)
    wanted = wanted[wanted.abs().argsort(descending=True)[: hessian.size]].sort().values
    assert torch.allclose(torch.linalg.eigvalsh(hessian.dense()), wanted, atol=1e-11)


def test_products_are_differences_of_gradients_and_do_not_depend_on_batches():
    flow = ContinuousFlow(toy_field("l3_h5"), rtol=1e-4, atol=1e-4)  # adaptive, float32, dense
    whole = LossHessian(flow, rows(10).float())
    parts = LossHessian(flow, rows(10).float(), batch=10)
    vector = torch.randn(whole.size).double()
    assert whole.gradient().dtype == torch.float64 and torch.equal(whole.product(vector), parts.product(vector))

    flow = masked_flow("l3_h5", keep=1.0)
    whole, parts = LossHessian(flow, rows(10)), LossHessian(flow, rows(10), batch=4)
    vector = torch.randn(whole.size).double()
    assert torch.allclose(whole.product(vector), parts.product(vector), atol=1e-11)
    assert torch.allclose(whole.gradient(), parts.gradient(), atol=1e-12)
    moved = masked_flow("l3_h5", keep=1.0)
    names, start = [name for name, _ in whole._flow.named_parameters()], 0
    compiled = moved.compile()
    step = 1e-5
    with torch.no_grad():
        for name in names:
            parameter = compiled.get_parameter(name)
            parameter += step * vector[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
    difference = (LossHessian(compiled, rows(10)).gradient() - whole.gradient()) / step
    assert torch.allclose(difference, whole.product(vector), rtol=1e-3, atol=1e-4)


def image_flow():
    """Fields before and behind a squeeze, and of the half that goes on."""
    torch.manual_seed(1)
    settings = {"method": "midpoint", "options": {"step_size": 1.0}, "levels": 5, "alpha": 0.05, "flip": True}
    return multiscale_flow((1, 4, 4), (2,), scales=2, blocks=1, train_end_time=True, **settings).double()


def test_of_images_it_is_that_of_one_draw_of_noise():
    flow, x = image_flow(), torch.randint(5, (6, 16), generator=torch.Generator().manual_seed(2))
    prune_weights_(flow, 0.3)
    hessian = LossHessian(flow, x, seed=3)

    class Drawn(torch.nn.Module):
        def forward(self, x):
            torch.manual_seed(3)
            return flow.eval().log_prob(x)

    drawn = Drawn()
    drawn.flow = flow
    matrix, expected = hessian.dense(), hessian_by_autograd(drawn, x)
    found, wanted = torch.linalg.eigvalsh(matrix), torch.linalg.eigvalsh(expected)
    assert len(found) == hessian.size < size(image_flow()) and float(found.abs().max()) > 1.0
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
    before = torch.get_rng_state()
    parts = LossHessian(flow, x, batch=2, seed=3)
    vector = torch.randn(hessian.size, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(parts.product(vector), parts.product(vector)) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(LossHessian(flow, x, seed=4).gradient(), hessian.gradient())


def test_full_lanczos_is_the_exact_spectrum_and_a_short_one_has_its_ends():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40).double()).Q
    spectrum = torch.cat([torch.linspace(-1, 1, 38).double(), torch.tensor([-7.0, 12.0]).double()])
    matrix = (basis * spectrum) @ basis.T
    probe = torch.ones(40).double()
    values, weights = lanczos(lambda v: matrix @ v, probe, 100)
    assert len(values) == 40 and torch.allclose(values, spectrum.sort().values, atol=1e-10)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float(40 * (weights * values).sum()) == pytest.approx(float(probe @ matrix @ probe))
    short, weights = lanczos(lambda v: matrix @ v, probe, 12)
    assert len(short) == 12 and float(short[0]) == pytest.approx(-7) and float(short[-1]) == pytest.approx(12)
    assert float(40 * (weights * short**3).sum()) == pytest.approx(float(probe @ matrix @ matrix @ matrix @ probe))


def test_lanczos_goes_on_where_its_space_is_exhausted():
    matrix = torch.diag(torch.tensor([3.0, 3.0, 3.0, -1.0, -1.0, 5.0]).double())
    values, weights = lanczos(lambda v: matrix @ v, torch.ones(6).double(), 6)
    assert torch.allclose(values, matrix.diagonal().sort().values)
    assert float((weights * values).sum()) == pytest.approx(2.0)
    values, _ = lanczos(lambda v: torch.zeros_like(v), torch.ones(3).double(), 3)
    assert torch.equal(values, torch.zeros(3).double())


def test_trace_estimates_are_good_where_few_eigenvalues_dominate_and_unbiased_anywhere():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(80, 80).double()).Q
    steep = 50.0 * 0.6 ** torch.arange(80).double()
    steep[1] = -20.0
    matrix = (basis * steep) @ basis.T
    assert trace_estimate(lambda v: matrix @ v, 80) == pytest.approx(float(steep.sum()), rel=0.01)
    flat = torch.linspace(-1, 2, 80).double()
    matrix = (basis * flat) @ basis.T
    found = torch.tensor([trace_estimate(lambda v: matrix @ v, 80) for _ in range(200)])
    assert abs(float(found.mean() - flat.sum())) < 4 * float(found.std()) / 200**0.5
    assert trace_estimate(lambda v: matrix @ v, 80, products=80) == pytest.approx(float(flat.sum()))


def test_both_definitions_agree_with_the_exact_spectrum():
    hessian = LossHessian(masked_flow(), rows())
    exact = exact_curvature(hessian.dense())
    found = curvature(hessian, steps=1000, probes=2)
    assert isinstance(found, Curvature) and (found.size, found.steps, found.probes) == (hessian.size, hessian.size, 2)
    for name in ("paper_largest", "paper_trace", "largest", "smallest", "trace"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=1e-6), name
    assert exact.paper_trace > exact.trace  # there are negative eigenvalues here, and only one of the two counts them
    assert exact.trace == pytest.approx(float(hessian.dense().trace()))
    assert curvature(hessian, steps=5, seed=3) == curvature(hessian, steps=5, seed=3)
    assert curvature(hessian, steps=5, seed=3) != curvature(hessian, steps=5, seed=4)


def test_definitions_on_a_known_spectrum():
    known = exact_curvature(torch.diag(torch.tensor([-3.0, 0.5, 2.0, 4.0])))
    assert (known.paper_largest, known.paper_trace, known.paper_condition) == (4.0, 6.5, 8.0)
    assert (known.largest, known.smallest, known.trace, known.condition, known.negative) == (4.0, -3.0, 3.5, 8.0, 0.25)
    assert exact_curvature(-torch.eye(2)).paper_trace == 0.0


def test_bad_input():
    with pytest.raises(ValueError, match="no rows"):
        LossHessian(masked_flow(), rows(0))
    with pytest.raises(ValueError, match="no live parameter"):
        LossHessian(masked_flow().requires_grad_(False), rows())
    with pytest.raises(ValueError, match="got 0 and 3"):
        curvature(LossHessian(masked_flow(), rows()), steps=0)
