"""How good a flow is on rows it was not trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..finite import refuse_not_finite
from ..flows import ContinuousFlow, NeuralODE


@dataclass(frozen=True)
class Evaluation:
    """nll: mean negative log-likelihood, nats.  nfe: evaluations of the field per solve, mean over batches; None where
    the solver does not tell."""

    nll: float
    nfe: float | None


@torch.no_grad()
def evaluate(
    model: NeuralODE, x: Tensor, labels: Tensor | None = None, *, exact: bool = True, batch: int | None = None
) -> Evaluation:
    """The model's mean negative log-likelihood on rows x [n, dim], solved in batches, in eval mode, without gradient:
    of the rows, by a flow; of their labels int64 [n], by a classifier.

    exact: with the exact divergence whatever the flow trains with, but for images, whose dimension forbids it; False:
    as the flow does it in eval mode (one Hutchinson draw per batch, from torch's global generator: a noisy estimate).
    batch: rows that are solved at once, None for the model's `evaluation_rows`.
    The NLL is NaN or infinite if the model's density is; nothing is hidden. Raises ValueError for no rows and for
    labels that are none, SolverError for a solve that cannot go on.
    """
    if len(x) == 0:
        raise ValueError("x has no rows to evaluate")
    refuse_not_finite(x, "x")
    like = next(model.parameters())
    batch = model.evaluation_rows if batch is None else batch
    was_training = model.training
    was_divergence = getattr(model, "eval_divergence", None)
    model.eval()
    if exact and model.exact_evaluation and isinstance(model, ContinuousFlow):
        model.eval_divergence = "exact"
    total, nfes = 0.0, []
    try:
        for start in range(0, len(x), batch):
            part = slice(start, start + batch)
            told = None if labels is None else labels[part].to(like.device)
            total += float(model.row_nll(x[part].to(like), told).double().sum())
            if model.stats is not None:
                nfes.append(model.stats.nfe)
    finally:
        model.train(was_training)
        if isinstance(model, ContinuousFlow):
            model.eval_divergence = was_divergence
    return Evaluation(total / len(x), sum(nfes) / len(nfes) if nfes else None)


def evaluate_nll(
    model: NeuralODE, x: Tensor, labels: Tensor | None = None, *, exact: bool = True, batch: int | None = None
) -> float:
    """`evaluate`'s nll."""
    return evaluate(model, x, labels, exact=exact, batch=batch).nll


def evaluate_or_nan(model: NeuralODE, x: Tensor, labels: Tensor | None = None) -> Evaluation:
    """`evaluate`, with NaN for a model whose solve fails."""
    try:
        return evaluate(model, x, labels)
    except AssertionError:  # SolverError, and torchdiffeq's own
        return Evaluation(math.nan, None)
