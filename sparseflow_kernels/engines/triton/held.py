"""What both Triton engines, of chains and of graphs, keep between calls, and what they say of a call."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Callable

import torch
from torch import Tensor

from ..base import SolveRequest
from ..native import OneCaller

HELD = 8  # batch sizes and methods whose memory and graphs are kept


def check_request(request: SolveRequest) -> None:
    if request.step_control != "shared":
        raise ValueError(
            f"step_control={request.step_control!r}: the triton engine knows only 'shared'; engine='cuda' steps tiles "
            "and samples on their own"
        )
    if request.replay is not None:
        raise ValueError("the triton engine does not take recorded steps again: its gradients are solve_backward's")


def tell(times: Tensor, t: Tensor | float) -> None:
    """One time, without reading the device."""
    if isinstance(t, Tensor) and t.device == times.device:
        times.copy_(t.detach().reshape(-1)[:1])
    else:
        times.fill_(float(t))


class HeldMemory:
    """Workspaces by batch size and method, on a device."""

    device: torch.device

    def _hold_memory(self) -> None:
        self._lock = OneCaller()  # one workspace is one caller's at a time
        self._held: OrderedDict = OrderedDict()

    def _refuse_captured_solves(self) -> None:
        if self._capturing():
            raise RuntimeError(
                "a solve cannot be captured in a CUDA graph: its host reads the error after every step. Capture "
                "evaluations instead; the solve replays graphs of its own"
            )

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _hold(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Memory for a call, from the last ones with the same key on the same stream. A captured call gets its own."""
        if self._capturing():
            return make()
        if self.device.type == "cuda":
            key = (*key, torch.cuda.current_stream().cuda_stream)
        if key not in self._held:
            try:
                self._held[key] = make()
            except torch.OutOfMemoryError:  # what is kept of other batch sizes may make room
                self._held.clear()
                self._held[key] = make()
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]
