"""How a user's state, one tensor or a tuple of tensors, lies in the rows [batch, dim] that a field runs on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

State = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Layout:
    """How a state lies in rows [batch, dim]: its tensors, each flattened, one after the other.

    shapes: for every tensor of the state, its shape in one sample.  is_tuple: the state is a tuple of tensors, else one
    tensor.  batched: every tensor has a first axis for the samples, all of one size; else the whole state is one sample.
    """

    shapes: tuple[tuple[int, ...], ...]
    is_tuple: bool = False
    batched: bool = True

    @property
    def dim(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def plain(self) -> bool:
        """The state is [batch, dim] itself."""
        return not self.is_tuple and self.batched and len(self.shapes[0]) == 1

    def fits(self, state: State) -> str | None:
        """Why a state is not of this layout, as the end of a sentence; None if it is."""
        parts = self._parts(state)
        if parts is None:
            kind = f"a tuple of {len(self.shapes)} tensors" if self.is_tuple else "one tensor"
            return f"must be {kind}, {self}"
        batch = {part.shape[0] for part in parts if part.dim() and self.batched}
        for part, shape in zip(parts, self.shapes):
            if tuple(part.shape[1:] if self.batched else part.shape) != shape or (self.batched and not part.dim()):
                return f"must be {self}, not {', '.join(str(list(p.shape)) for p in parts)}"
        if len(batch) > 1:
            return f"must have as many samples in each tensor, not {', '.join(str(list(p.shape)) for p in parts)}"
        return None

    def _parts(self, state: State) -> tuple[Tensor, ...] | None:
        if self.is_tuple:
            if not isinstance(state, (tuple, list)) or len(state) != len(self.shapes):
                return None
            return tuple(state) if all(isinstance(part, Tensor) for part in state) else None
        return (state,) if isinstance(state, Tensor) else None

    def flatten(self, state: State) -> Tensor:
        """The rows [batch, dim] of a state that fits."""
        parts = self._parts(state)
        batch = parts[0].shape[0] if self.batched else 1
        flat = [part.reshape(batch, math.prod(shape)) for part, shape in zip(parts, self.shapes)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, 1)

    def unflatten(self, rows: Tensor) -> State:
        """rows [..., batch, dim] as a state, whose tensors keep the axes before the batch."""
        lead = rows.shape[:-1] if self.batched else rows.shape[:-2]
        split = rows.split([math.prod(shape) for shape in self.shapes], -1)
        parts = tuple(part.reshape((*lead, *shape)) for part, shape in zip(split, self.shapes))
        return parts if self.is_tuple else parts[0]

    def __str__(self) -> str:
        lead = "batch, " if self.batched else ""
        return ", ".join(f"[{lead}{', '.join(map(str, shape))}]" for shape in self.shapes)
