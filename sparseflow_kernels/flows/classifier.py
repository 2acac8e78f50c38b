"""Classification by a neural ODE whose state is the logits (the classifiers of Sparse Flows, arXiv 2106.12718)."""

from __future__ import annotations

import torch
from torch import Tensor

from .neural_ode import NeuralODE


class NeuralClassifier(NeuralODE):
    """Classes of points in R^dim, as many classes as dimensions: the state at the end of the interval is the logits,
    with no augmentation and no layer before or after.

    Called with x [n, dim] it gives logits [n, dim]. Arguments and `stats` are NeuralODE's.
    """

    supervised = True

    def row_nll(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each row's label, nats: x [n, dim], labels int64 [n] in 0..dim-1 -> [n]."""
        check_labels(labels, len(x), self.dim)
        return torch.nn.functional.cross_entropy(self(x), labels, reduction="none")

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The class of the largest logit, int64 [n]."""
        return self(x).argmax(1)


def check_labels(labels: Tensor | None, rows: int, classes: int) -> None:
    """Raises ValueError unless labels are int64 [rows], in 0..classes-1."""
    if labels is None:
        raise ValueError("labels: a classifier needs the class of every row, int64 [n]; the data has none")
    if labels.dtype != torch.int64 or labels.shape != (rows,):
        raise ValueError(f"labels must be int64 [{rows}], one class a row; got {labels.dtype} {list(labels.shape)}")
    if rows and not bool(((labels >= 0) & (labels < classes)).all()):
        least, most = int(labels.min()), int(labels.max())
        raise ValueError(f"labels must be classes 0 to {classes - 1} of this net; they go from {least} to {most}")
