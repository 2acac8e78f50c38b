"""Rows of data that are no numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def refuse_not_finite(x: Tensor, name: str) -> None:
    """Raises ValueError, naming the rows, where entries of x [n, ...] are NaN or infinite."""
    if math.isfinite(x.detach().sum()):  # one operation; a sum of finite entries may overflow, so it does not decide
        return
    finite = torch.isfinite(x).reshape(len(x), -1).all(1)
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise ValueError(f"{name} has NaN or infinite entries in {len(rows)} of {x.shape[0]} rows: {shown}")
