"""The times a solver hands to f: kept in double precision, given out in the state's real dtype, nudged by one unit in
the last place where f must be seen from one side, and tied to the caller's times when those want a gradient."""

from __future__ import annotations

import torch
from torch import Tensor


class Clock:
    """Time for a state of `like`'s dtype and device. Inside a solve times are Python floats; `origin` is None, or a
    differentiable zero, times[0] - its value, which moves along with the first time."""

    def __init__(self, times: Tensor, like: Tensor) -> None:
        self.dtype = like.real.dtype
        self.device = like.device
        self.origin = (times[0] - times[0].detach()) if times.requires_grad and torch.is_grad_enabled() else None
        self._exact = self.dtype == torch.float64

    def round(self, value: float) -> float:
        """value rounded to the state's real dtype."""
        return value if self._exact else float(torch.tensor(value, dtype=self.dtype))

    def node(self, t0: float, c: float, dt: float) -> float:
        """t0 + c * dt, formed in the state's real dtype."""
        return self.round(self.round(t0) + self.round(self.round(c) * self.round(dt)))

    def seen(self, t: float, side: int = 0) -> float:
        """t as f sees it, in the state's real dtype: the neighbour below it for side = -1, above it for +1."""
        here = torch.tensor(t, dtype=self.dtype)
        return (torch.nextafter(here, torch.full_like(here, side * torch.inf)) if side else here).item()

    def tell(self, t: float, shift: Tensor | None = None, side: int = 0) -> Tensor:
        """The 0-d tensor that f gets for time t (`seen`). `shift`: a zero that carries the gradient of t."""
        value = torch.full((), self.seen(t, side), dtype=self.dtype, device=self.device)
        return value if shift is None else value + shift.to(value)
