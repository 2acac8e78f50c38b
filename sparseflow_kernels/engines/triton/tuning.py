"""The choice of a tile by the clock, on a GPU, where SPARSEFLOW_TRITON_TUNE=1 asks for it (every candidate has to be
compiled first), and only for operations whose bits do not depend on their tile. It is kept for the life of the process.
"""

from __future__ import annotations

import os
from typing import Any, Callable, Sequence

import torch

from .forms import Tile

TUNE_VARIABLE = "SPARSEFLOW_TRITON_TUNE"
REPEATS = 5

_chosen: dict[tuple[Any, ...], Tile] = {}


def wanted(device: torch.device) -> bool:
    asked = os.environ.get(TUNE_VARIABLE, "0") == "1"
    return asked and device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def seconds(run: Callable[[], None]) -> float:
    """The least of a few runs on the current stream, after one that compiles."""
    run()
    best = float("inf")
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        best = min(best, 1e-3 * begin.elapsed_time(end))
    return best


def best_tile(key: tuple[Any, ...], candidates: Sequence[Tile], run: Callable[[Tile], None]) -> Tile:
    """The fastest of the candidates, timed once for every key."""
    if key not in _chosen:
        _chosen[key] = min(candidates, key=lambda tile: seconds(lambda: run(tile)))
    return _chosen[key]
