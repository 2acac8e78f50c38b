"""The methods' coefficients: the order conditions, the measured order, and equality with torchdiffeq's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchdiffeq._impl.odeint import SOLVERS

from sparseflow_kernels.numerics.adaptive import replay_adaptive
from sparseflow_kernels.numerics.fixed_grid import solve_fixed
from sparseflow_kernels.numerics.tableaus import ADAPTIVE, FIXED, METHODS, FixedTableau, Tableau

EMBEDDED_ORDER = {"dopri5": 4, "dopri8": 7, "tsit5": 4, "bosh3": 2, "fehlberg2": 1, "adaptive_heun": 1}
MIDDLE_ORDER = {"dopri5": 4, "dopri8": 5, "tsit5": 4, "bosh3": 1, "fehlberg2": 1, "adaptive_heun": 1}


def nodes(tree):
    return 1 + sum(map(nodes, tree))


def density(tree):
    return nodes(tree) * math.prod(map(density, tree))


def elementary(tree, a):
    value = np.ones(len(a))
    for branch in tree:
        value = value * (a @ elementary(branch, a))
    return value


def square_matrix(tableau):
    stages = tableau.stages_per_step + isinstance(tableau, Tableau)
    a = np.zeros((stages, stages))
    first = stages - len(tableau.a)
    for i, row in enumerate(tableau.a):
        a[first + i, : len(row)] = row
    return a


def residual(weights, a, order, theta=1.0):
    """Largest violation of the order conditions for the value at t + theta h, over all trees up to `order` nodes."""
    b = np.asarray(weights)
    trees = [tree for n in range(1, order + 1) for tree in TREES[n]]
    return max(abs(b @ elementary(tree, a) - theta ** nodes(tree) / density(tree)) for tree in trees)


def rooted_trees(up_to):
    """{n: the rooted trees with n nodes}, grown leaf by leaf; a tree is the sorted tuple of its branches."""
    trees = {1: [()]}

    def with_leaf(tree):
        yield tuple(sorted((*tree, ())))
        for i, branch in enumerate(tree):
            for grown in with_leaf(branch):
                yield tuple(sorted((*tree[:i], grown, *tree[i + 1 :])))

    for n in range(2, up_to + 1):
        trees[n] = sorted({grown for tree in trees[n - 1] for grown in with_leaf(tree)})
    return trees


TREES = rooted_trees(9)


def test_tree_count():
    assert [len(TREES[n]) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@pytest.mark.parametrize("name", METHODS)
def test_nodes_are_row_sums(name):
    tableau = METHODS[name]
    for node, row in zip(tableau.c, tableau.a):
        assert sum(row) == pytest.approx(node, abs=3e-15)


@pytest.mark.parametrize("name", METHODS)
def test_order_conditions(name):
    tableau, a = METHODS[name], square_matrix(METHODS[name])
    assert residual(tableau.b, a, tableau.order) < 2e-14
    assert residual(tableau.b, a, tableau.order + 1) > 1e-7, "the order stated is not the order it has"


@pytest.mark.parametrize("name", ADAPTIVE)
def test_embedded_and_middle_weights(name):
    tableau, a = ADAPTIVE[name], square_matrix(ADAPTIVE[name])
    low = np.asarray(tableau.b) - np.asarray(tableau.b_error)
    assert residual(low, a, EMBEDDED_ORDER[name]) < 2e-14
    assert residual(low, a, EMBEDDED_ORDER[name] + 1) > 1e-7
    assert residual(tableau.b_mid, a, MIDDLE_ORDER[name], theta=0.5) < 2e-11


@pytest.mark.parametrize("name", sorted(set(ADAPTIVE) & set(SOLVERS)))
def test_equal_to_torchdiffeq_to_the_last_bit(name):
    ours, solver = ADAPTIVE[name], SOLVERS[name]
    theirs = solver.tableau
    assert ours.order == solver.order
    assert ours.c == tuple(theirs.alpha.tolist())
    assert ours.a == tuple(tuple(row.tolist()) for row in theirs.beta)
    assert ours.b == tuple(theirs.c_sol.tolist())
    assert ours.b_error == tuple(theirs.c_error.tolist())
    assert ours.b_mid == tuple(solver.mid.tolist())


def test_shapes_and_flags():
    stages = {name: tableau.stages_per_step for name, tableau in METHODS.items()}
    assert stages == {
        "dopri5": 6, "dopri8": 13, "tsit5": 6, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 1,
        "euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4,
    }  # fmt: skip
    reuse = {name for name, tableau in ADAPTIVE.items() if tableau.last_stage_is_solution}
    assert reuse == {"dopri5", "dopri8", "tsit5", "bosh3"}
    prev = {name: tableau.prev_stages for name, tableau in FIXED.items()}
    assert prev == {"euler": (), "midpoint": (), "heun2": (1,), "heun3": (), "rk4": (3,)}
    assert all(tableau.next_stages == (0,) for tableau in FIXED.values())
    with pytest.raises(ValueError, match="row i of a"):
        Tableau("bad", 1, (0.5,), ((0.5, 0.5),), (0.5, 0.5), (0.5, 0.5), (0.5, 0.5))
    with pytest.raises(ValueError, match="c starts with 0"):
        FixedTableau("bad", 1, (0.5,), ((),), (1.0,))


def forced_pendulum(t, y):
    return torch.stack((y[1], -torch.sin(y[0]) + 0.3 * torch.cos(2 * t)))


@pytest.mark.parametrize("name", METHODS)
def test_measured_order(name):
    """Halving h divides the error at the end by 2^order."""
    y0 = torch.tensor([1.2, 0.1], dtype=torch.float64)
    end = 2.0
    times = torch.tensor([0.0, end], dtype=torch.float64)

    def final(tableau, count):
        grid = torch.linspace(0.0, end, count + 1, dtype=torch.float64)
        if isinstance(tableau, FixedTableau):
            return solve_fixed(forced_pendulum, y0, times, grid, tableau).ys[-1]
        steps = torch.stack((grid[:-1], grid[1:] - grid[:-1]), 1)
        return replay_adaptive(forced_pendulum, y0, times, tableau, steps).ys[-1]

    exact = final(METHODS["dopri8"], 200)
    counts = (4, 8) if name == "dopri8" else (16, 32, 64)
    errors = [(final(METHODS[name], count) - exact).abs().max().item() for count in counts]
    slopes = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]
    assert slopes[-1] == pytest.approx(METHODS[name].order, abs=0.35), (errors, slopes)
