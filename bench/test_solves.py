"""Whole solves, and training steps, on one core: this library and torchdiffeq on the same pruned field.

For ratios taken in turns, with errors and floors, use `sparseflow bench`; this suite is for comparing two commits
(pytest bench --benchmark-save NAME, then --benchmark-compare).
"""

import pytest

from sparseflow_kernels.analysis.bench import SOLVE, TASKS, known_fields
from sparseflow_kernels.analysis.graph_problems import GRAPHS
from sparseflow_kernels.analysis.peers import one_thread

NAMES = {task.name: [*task.fields[:4], *(name for name in task.fields if name in GRAPHS)] for task in TASKS.values()}


@pytest.fixture(autouse=True)
def on_one_thread():
    with one_thread():
        yield


@pytest.mark.parametrize("ours", [True, False], ids=["sparseflow", "torchdiffeq"])
@pytest.mark.parametrize("keep", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("task, name", [(task, name) for task in TASKS.values() for name in NAMES[task.name]])
def test_whole(benchmark, task, name, keep, ours):
    if not ours and keep != 0.1:
        pytest.skip("a dense solve costs the same at every keep ratio")
    benchmark.group = f"{task.unit}, {name}, keep {keep:g}"
    spec = known_fields()[name]
    own = task.of(spec)
    run = (own.ours if ours else own.baseline).prepare(spec.problem(keep))
    outcome = benchmark.pedantic(run, rounds=5 if ours or task is SOLVE else 2, warmup_rounds=1)
    benchmark.extra_info["nfe"] = outcome.nfe
