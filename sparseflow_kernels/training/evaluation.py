"""How good a flow is on rows it was not trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..finite import refuse_not_finite
from ..flows import ContinuousFlow


@dataclass(frozen=True)
class Evaluation:
    """nll: mean negative log-likelihood, nats.  nfe: evaluations of the field per solve, mean over batches; None where
    the solver does not tell."""

    nll: float
    nfe: float | None


@torch.no_grad()
def evaluate(flow: ContinuousFlow, x: Tensor, *, exact: bool = True, batch: int = 4096) -> Evaluation:
    """The flow's mean negative log-likelihood on rows x [n, dim], solved in batches, in eval mode, without gradient.

    exact: with the exact divergence whatever the flow trains with; False: as the flow does it in eval mode (one
    Hutchinson draw per batch, from torch's global generator, is a noisy estimate).
    The NLL is NaN or infinite if the model's density is; nothing is hidden. Raises ValueError for no rows, SolverError
    for a solve that cannot go on.
    """
    if len(x) == 0:
        raise ValueError("x has no rows to evaluate")
    refuse_not_finite(x, "x")
    like = next(flow.parameters())
    was_training, was_divergence = flow.training, flow.eval_divergence
    flow.eval()
    if exact:
        flow.eval_divergence = "exact"
    total, nfes = 0.0, []
    try:
        for part in x.split(batch):
            total += float(flow.log_prob(part.to(like)).double().sum())
            if flow.stats is not None:
                nfes.append(flow.stats.nfe)
    finally:
        flow.train(was_training)
        flow.eval_divergence = was_divergence
    return Evaluation(-total / len(x), sum(nfes) / len(nfes) if nfes else None)


def evaluate_nll(flow: ContinuousFlow, x: Tensor, *, exact: bool = True, batch: int = 4096) -> float:
    """`evaluate`'s nll."""
    return evaluate(flow, x, exact=exact, batch=batch).nll


def evaluate_or_nan(flow: ContinuousFlow, x: Tensor) -> Evaluation:
    """`evaluate`, with NaN for a flow whose solve fails."""
    try:
        return evaluate(flow, x)
    except AssertionError:  # SolverError, and torchdiffeq's own
        return Evaluation(math.nan, None)
