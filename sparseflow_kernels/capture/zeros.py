"""Zeros of computed weights, which are left out like pruned entries."""

from __future__ import annotations

from typing import Mapping

from torch import Tensor

from ..trained import Held, may_come_back
from .algebra import apply
from .operations import aten
from .provenance import ParameterNumbers
from .values import Constant


def take_zeros(value: Constant, left_out: Tensor, parameters: ParameterNumbers, held: Mapping[str, Held]) -> None:
    """Tells of entries that are left out for being zero, and need not stay so where a parameter moves far."""
    if not bool(left_out.any()) or value.node is None:
        return
    where = left_out.reshape(-1).nonzero()[:, 0]
    index = Constant(where.to(value.value.device))
    entries = apply(aten.index.Tensor, apply(aten.reshape.default, value, [-1]), [index])
    if bool(may_come_back(parameters.origin(entries), held).any()):
        parameters.take(apply(aten.ne.Scalar, entries, 0), True)
