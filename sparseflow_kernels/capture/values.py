"""The abstract values that stand beside the tensors of a traced forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..origin import COMPUTED, CONSTANT
from .replay import Attribute, Leaf, Node, Replay

NOT_A_PARAMETER, NOT_PLAIN = CONSTANT, COMPUTED


@dataclass(eq=False)
class Constant:
    """A tensor independent of t and y. source: int64 of its shape, an index into all parameters laid end to end, or
    NOT_A_PARAMETER, or NOT_PLAIN (computed from parameters); value = factor * parameter where source >= 0. None: no
    entry has anything to do with a parameter (source), all factors are 1 (factor). node: how it is computed from
    parameters, where it has a source."""

    value: Tensor
    source: Tensor | None = None
    factor: Tensor | None = None
    node: Node | Leaf | None = None

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def sources(self) -> Tensor:
        return torch.full(self.shape, NOT_A_PARAMETER) if self.source is None else self.source

    @property
    def factors(self) -> Tensor:
        return torch.ones(self.shape, dtype=torch.float64) if self.factor is None else self.factor

    @property
    def zeros(self) -> Tensor:
        """bool of its shape: zero whatever the parameters are."""
        return (self.sources == NOT_A_PARAMETER) & (self.value.cpu() == 0)

    @property
    def in_order(self) -> bool:
        """Its entries are elements of parameters as they are, one after the other."""
        if self.source is None or self.factor is not None or not self.source.numel():
            return False
        flat = self.source.reshape(-1)
        first = int(flat[0])
        return first >= 0 and torch.equal(flat, torch.arange(first, first + flat.numel()))

    @property
    def from_attributes(self) -> bool:
        """It is computed from tensors that the module holds beside its parameters, and may hold others later."""
        if self.node is None:
            return False
        return any(isinstance(leaf, Attribute) for leaf in Replay(self.node, self.value.dtype).all_leaves())

    @property
    def is_zero(self) -> bool:
        return bool(self.zeros.all())


@dataclass(eq=False)
class TimeValue:
    """A function of t alone: its value at the probe time, its graph and, if it is one, slope * t + offset, or
    sigmoid(slope * t + offset)."""

    value: Tensor
    node: Node
    affine: tuple[Constant, Constant] | None = None
    sigmoid: tuple[Constant, Constant] | None = None

    @property
    def shape(self) -> torch.Size:
        return self.value.shape


@dataclass(eq=False)
class StateValue:
    """A tensor that depends on y. ids: int64 of its shape; each element's sample and its row of the field (samples.py
    lays the two into one number).  checks: it only says which numbers are finite, which those of a solve are."""

    ids: Tensor
    checks: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.ids.shape


class Overwritten:
    """A tensor that was changed in place through another view of its memory, or detached: a chain is not read on."""


@dataclass(eq=False)
class Opaque:
    """A tensor that is no value of one sample (a sum over the samples, a position of a maximum), and so can only be
    differentiated: what is computed from it is opaque too, and as a result of forward it is refused. reason: why.
    checks: as of a state."""

    shape: torch.Size
    reason: str
    checks: bool = False
