"""Mode analysis against mixtures whose answers are known."""

import math

import pytest
import torch

from sparseflow_kernels import data
from sparseflow_kernels.analysis.modes import THRESHOLDS, ModeCoverage, Modes, mode_coverage

CENTRES = torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 40.0]], dtype=torch.float64)
SPREADS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def round_modes() -> Modes:
    return Modes(CENTRES, torch.eye(2, dtype=torch.float64) * SPREADS[:, None, None] ** 2)


def draw(n: int, classes=(0, 1, 2)) -> torch.Tensor:
    which = torch.tensor(classes)[torch.randint(len(classes), (n,))]
    return CENTRES[which] + SPREADS[which, None] * torch.randn(n, 2, dtype=torch.float64)


def test_modes_are_class_means_and_covariances():
    rows = torch.tensor([[0.0, 0.0], [2.0, 2.0], [10.0, 5.0], [10.0, 7.0]])
    modes = Modes.of(rows, torch.tensor([4, 4, 7, 7]))
    assert len(modes) == 2
    assert torch.equal(modes.means, torch.tensor([[1.0, 1.0], [10.0, 6.0]], dtype=torch.float64))
    expected = torch.tensor([[[2.0, 2.0], [2.0, 2.0]], [[0.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    assert torch.allclose(modes.covariances, expected)
    with pytest.raises(ValueError, match="two rows"):
        Modes.of(rows, torch.tensor([0, 0, 0, 1]))
    with pytest.raises(ValueError, match=r"got \[4, 2\] and \[3\]"):
        Modes.of(rows, torch.zeros(3))


def test_distance_counts_standard_deviations_along_the_joining_direction():
    modes = Modes(torch.zeros(1, 2).double(), torch.tensor([[[4.0, 1.5], [1.5, 1.0]]]).double())
    points = torch.tensor([[6.0, 0.0], [0.0, 3.0], [1.0, 1.0], [0.0, 0.0], [math.nan, 0.0], [math.inf, 1.0]])
    found = modes.distances(points)[:, 0].tolist()
    # along an axis: that axis's own standard deviation; along (1, 1): variance (4 + 2 * 1.5 + 1) / 2 = 4
    assert found[:4] == pytest.approx([3.0, 3.0, math.sqrt(2) / 2, 0.0])
    assert found[4:] == [math.inf, math.inf]
    flat = Modes(torch.zeros(1, 2).double(), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]).double())
    assert flat.distances(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))[:, 0].tolist() == [2.0, math.inf]


def test_round_clusters_have_rayleigh_shares_and_all_modes():
    torch.manual_seed(0)
    coverage = mode_coverage(draw, round_modes(), samples=4000, repeats=5)
    assert isinstance(coverage, ModeCoverage) and coverage.thresholds == THRESHOLDS
    for threshold, share, spread in zip(THRESHOLDS, coverage.high_quality, coverage.high_quality_std):
        expected = 1 - math.exp(-(threshold**2) / 2)
        deviation = math.sqrt(expected * (1 - expected) / 4000)
        assert share == pytest.approx(expected, abs=4 * deviation / math.sqrt(5) + 1e-9)
        assert spread < 4 * deviation + 1e-9
    assert coverage.captured == (3.0,) * len(THRESHOLDS) and coverage.captured_std == (0.0,) * len(THRESHOLDS)
    assert (coverage.modes, coverage.samples, coverage.repeats) == (3, 4000, 5)


def test_a_missed_mode_is_not_captured_and_bad_samples_are_not_of_high_quality():
    torch.manual_seed(0)
    coverage = mode_coverage(lambda n: draw(n, (0, 2)), round_modes(), samples=500, repeats=2, thresholds=(1.0, 3.0))
    assert coverage.captured == (2.0, 2.0)

    def half_bad(n):
        found = draw(n)
        found[: n // 2] = math.nan
        return found

    coverage = mode_coverage(half_bad, round_modes(), samples=500, repeats=1, thresholds=(20.0,))
    assert coverage.high_quality == (0.5,) and coverage.high_quality_std == (0.0,)
    lost = mode_coverage(lambda n: torch.full((n, 2), 1e6), round_modes(), samples=10, repeats=2)
    assert set(lost.high_quality) == set(lost.captured) == {0.0}
    with pytest.raises(ValueError, match="at least 1"):
        mode_coverage(draw, round_modes(), samples=0)


def test_the_toys_have_their_clusters_as_modes():
    rows = data.load("gaussians", n=600)
    modes = Modes.of(rows.train, rows.train_labels)
    assert len(modes) == 6
    test_rows = iter(rows.test.split(len(rows.test) // 2))
    coverage = mode_coverage(lambda n: next(test_rows), modes, samples=10, repeats=2, thresholds=(1.0, 3.0))
    assert coverage.high_quality == pytest.approx((1 - math.exp(-0.5), 1 - math.exp(-4.5)), abs=0.03)
    assert coverage.captured[1] == 3.0  # rows are in the order of their clusters: each half has three
