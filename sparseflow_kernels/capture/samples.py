"""Element numbers of states, sample * STRIDE + row: every element knows the row of the field that it holds (the same
for every sample) and its sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .algebra import apply
from .operations import aten
from .refusal import REMEDY, refuse
from .values import Constant, StateValue, TimeValue

STRIDE = 1 << 40
ROUNDING = 64  # units in the last place by which a library may tell equal rows of a product apart


@dataclass(frozen=True)
class Samples:
    """The batch of the traced run."""

    size: int

    def _numbers(self, first: Tensor, axis: int) -> Tensor:
        sizes = [1] * (first.dim() + 1)
        sizes[axis] = self.size
        return first.unsqueeze(axis) + STRIDE * torch.arange(self.size).view(sizes)

    def spread(self, rows: Tensor, axis: int = 0) -> StateValue:
        """Rows of one sample, in its shape, for every sample."""
        return StateValue(self._numbers(rows, axis))

    def axis_of(self, ids: Tensor) -> int:
        for axis, size in enumerate(ids.shape):
            if size == self.size and ids.numel():
                first = ids.select(axis, 0)
                if bool((first < STRIDE).all()) and torch.equal(self._numbers(first, axis), ids):
                    return axis
        if not ids.numel():
            refuse("an operation that empties the state")
        for axis, length in enumerate(ids.shape):
            if length > self.size and length % self.size == 0 and self._merged(ids, axis, length):
                refuse(
                    f"an operation on the samples laid end to end (the state [{self.size}, dim] is viewed as points, "
                    f"{list(ids.shape)}, and every point goes through the same layer)",
                    "Where the points do not see each other, solve for a state [batch, points, size of a point] and "
                    f"compile the network of one point. Otherwise u{REMEDY[1:]}",
                )
        refuse("an operation that mixes the samples of the batch")

    def _merged(self, ids: Tensor, axis: int, length: int) -> bool:
        """The axis holds the samples, and another axis beside them."""
        for sizes, inner in (((self.size, length // self.size), axis), ((length // self.size, self.size), axis + 1)):
            parts = ids.unflatten(axis, sizes)
            first = parts.select(inner, 0)
            if bool((first < STRIDE).all()) and torch.equal(self._numbers(first, inner), parts):
                return True
        return False

    def one(self, value: Constant | TimeValue, axis: int) -> Constant | TimeValue:
        """value without its sample axis; it must be the same for every sample, up to a matrix product's rounding."""
        first = value.value.select(axis, 0)
        every = first.unsqueeze(axis).expand_as(value.value)
        if not torch.equal(every, value.value):
            scale = value.value.abs().max() if value.value.is_floating_point() else 0.0
            rounding = ROUNDING * torch.finfo(value.value.dtype).eps * scale if scale else 0.0
            if not bool(((every - value.value).abs() <= rounding).all()):
                refuse(
                    "a constant that differs from sample to sample of the batch",
                    "Make it part of the state (columns whose derivative is zero) and cut it off again inside forward. "
                    f"Otherwise u{REMEDY[1:]}",
                )
        return apply(aten.select.int, value, axis, 0)
