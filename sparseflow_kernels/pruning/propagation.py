"""Dead parameters found by their gradient, as in the Sparse Flows experiments (arXiv 2106.12718).

`prune_weights_` finds what nobody reads from the masks alone, exactly and without data. This is the experiments' way,
kept to compare with: an entry whose gradient is exactly zero on a few held-out rows is taken for dead. So a saturated
neuron can be taken for dead, too.
"""

from __future__ import annotations

import math
import warnings
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..masks import copy_module, effective, set_mask_
from .arguments import check_keep
from .neurons import prune_neurons_
from .size import dense_size, size
from .weights import prune_weights_

_Flow = TypeVar("_Flow", bound=nn.Module)

_CLOSE_ENOUGH = 0.005  # relative to the size wanted
_MOST_TRIALS = 20


def prune_with_propagation_(
    flow: _Flow, keep: float, rows: Tensor, method: str = "weights", **options
) -> _Flow:
    """Prune a flow in place to the keep ratio `keep` of all parameters, and mask what then has no gradient.

    flow: a module with `log_prob(rows)`.  rows: [n, dim], held out; a hundred or two are enough.
    method: "weights": every entry of every parameter whose gradient of the mean log-likelihood is exactly zero is
        masked, biases and time parameters included; "neurons": rows of weights only. (The experiments also drop, with
        "neurons", input columns that are constant over the rows; that changes the function, so it is not done here.)
    options: further ones for `prune_weights_` or `prune_neurons_`.

    How much to prune before the dead entries go is searched by bisection, in at most 20 trials, until the size is
    within 0.5 % of keep times the dense size; the closest trial is taken. Raises ValueError for bad arguments.
    """
    check_keep(keep, "parameters")
    if method not in ("weights", "neurons"):
        raise ValueError(f"method must be 'weights' or 'neurons', got {method!r}")
    if len(rows) == 0:
        raise ValueError("rows has no rows to take gradients on")
    total = dense_size(flow)
    wanted = keep * total
    low, high = 0.4 * keep, max(keep, size(flow) / total)
    best: tuple[float, float] = (math.inf, keep)
    for trial in range(_MOST_TRIALS):
        ratio = keep if trial == 0 else (low + high) / 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of trials; the one taken repeats them
            reached = size(_prune_and_propagate_(copy_module(flow), ratio, rows, method, options))
        best = min(best, (abs(reached - wanted), ratio))
        if best[0] <= _CLOSE_ENOUGH * wanted:
            break
        low, high = (ratio, high) if reached < wanted else (low, ratio)
    return _prune_and_propagate_(flow, best[1], rows, method, options)


def _prune_and_propagate_(flow: _Flow, keep: float, rows: Tensor, method: str, options: dict) -> _Flow:
    if method == "weights":
        prune_weights_(flow, keep, **{"remove_dead": False, **options})
    else:
        prune_neurons_(flow, keep, **options)
    parameters = {name: p for name, p in flow.named_parameters() if p.requires_grad}
    like = next(iter(parameters.values()))
    with torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else []):
        torch.manual_seed(0)
        with torch.enable_grad():
            loss = flow.log_prob(rows.to(like)).mean()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients):
        if gradient is None:
            continue
        path, _, leaf = name.rpartition(".")
        owner, leaf = flow.get_submodule(path), leaf.removesuffix("_orig")
        alive = gradient != 0
        if method == "neurons":
            if gradient.ndim < 2:
                continue
            alive = alive.flatten(1).any(1).view(-1, *[1] * (gradient.ndim - 1)).expand_as(gradient)
        alive = alive | (effective(owner, leaf) == 0)  # what is zero already need not be masked
        if not bool(alive.all()):
            set_mask_(owner, leaf, alive)
    return flow
