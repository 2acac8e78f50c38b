"""Numbers for decisions on the host: what a solver reads off tensors, also inside torch.func's transforms."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor


def largest(values: Sequence[Tensor | float], device: torch.device) -> list[float]:
    """Absolute values of numbers and of tensors without axes, in one transfer.

    Under torch.func.vmap, where a tensor stands for many, the largest of them (NaN if one is): they are decided on
    together, so that all take the steps which the most demanding one needs.
    """
    found = []
    for value in values:
        value = plain(torch.as_tensor(value, device=device)).abs().to(torch.float64)
        found.append(value.amax() if value.dim() else value)
    return torch.stack(found).tolist()


def plain(tensor: Tensor) -> Tensor:
    """The tensor inside torch.func's wrappers: that of vmap with the axes of all its items, in some place."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor
