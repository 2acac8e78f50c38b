"""Whole solves with divergence on one core: this library and torchdiffeq's dense solve on the same pruned field.

For ratios taken in turns, with errors and floors, use `sparseflow bench`; this suite is for comparing two commits
(pytest bench --benchmark-save NAME, then --benchmark-compare).
"""

import pytest

from sparseflow_kernels.analysis.peers import BASELINE, OURS, one_thread
from sparseflow_kernels.analysis.problems import FIELDS, make_problem


@pytest.fixture(autouse=True)
def on_one_thread():
    with one_thread():
        yield


@pytest.mark.parametrize("contender", [OURS, BASELINE], ids=lambda contender: contender.name)
@pytest.mark.parametrize("keep", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("name", ["toy", "power", "hepmass", "miniboone"])
def test_solve(benchmark, name, keep, contender):
    if contender is BASELINE and keep != 0.1:
        pytest.skip("a dense solve costs the same at every keep ratio")
    benchmark.group = f"{name}, keep {keep:g}"
    outcome = benchmark.pedantic(contender.prepare(make_problem(FIELDS[name], keep)), rounds=5, warmup_rounds=1)
    benchmark.extra_info["nfe"] = outcome.nfe
