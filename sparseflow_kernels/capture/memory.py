"""Tensors that share memory: which elements of one are elements of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .algebra import apply, as_time
from .operations import aten
from .values import Constant, StateValue, TimeValue


def geometry(x: Tensor) -> tuple:
    return (x.shape, x.stride(), x.storage_offset(), x.dtype)


def places(x: Tensor) -> Tensor:
    """Where in its memory every element lies, int64 of its shape."""
    where = torch.full((), x.storage_offset())
    for axis, (size, stride) in enumerate(zip(x.shape, x.stride())):
        shape = [size if d == axis else 1 for d in range(x.dim())]
        where = where + (torch.arange(size) * stride).view(shape)
    return where.expand(x.shape)


def found_in(part: Tensor, whole: Tensor) -> Tensor:
    """For every element of one tensor its number among those of another of the same memory; -1: it is none of them."""
    a, b = places(part), places(whole).reshape(-1)
    if not a.numel() or not b.numel():
        return torch.full(part.shape, -1)
    last = int(max(a.max(), b.max()))
    number = torch.full((last + 1,), -1)
    number[b] = torch.arange(b.numel())
    return number[a]


def overlap(a: Tensor, b: Tensor) -> bool:
    def span(x: Tensor) -> tuple[int, int]:
        last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
        return x.storage_offset(), last

    (a0, a1), (b0, b1) = span(a), span(b)
    return a.numel() > 0 and b.numel() > 0 and a0 <= b1 and b0 <= a1


def taken(value: Any, number: Tensor) -> Any:
    """Elements of a value, by their numbers."""
    if isinstance(value, StateValue):
        return StateValue(value.ids.reshape(-1)[number])
    flat = apply(aten.reshape.default, value, [-1])
    return apply(aten.index.Tensor, flat, [Constant(number.to(value.value.device))])


def replaced(old: Any, new: Any, number: Tensor, ids: Any) -> Any:
    """A value with elements of another in place of its own where number is not -1. ids: makes elements of a value."""
    if bool((number >= 0).all()):
        return taken(new, number)
    if isinstance(old, StateValue) or isinstance(new, StateValue):
        rows = ids(new).reshape(-1)[number.clamp(min=0)]
        return StateValue(torch.where(number >= 0, rows, ids(old)))
    flat = [apply(aten.reshape.default, v, [-1]) for v in (new, old)]
    if flat[0].value.dtype != flat[1].value.dtype:
        flat[0] = apply(aten._to_copy.default, flat[0], dtype=flat[1].value.dtype)
    if isinstance(flat[0], TimeValue) != isinstance(flat[1], TimeValue):
        flat = [v if isinstance(v, TimeValue) else as_time(v) for v in flat]
    both = apply(aten.cat.default, flat)
    index = torch.where(number >= 0, number, flat[0].value.numel() + torch.arange(number.numel()).view(number.shape))
    return apply(aten.index.Tensor, both, [Constant(index.to(flat[0].value.device))])
