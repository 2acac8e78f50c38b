"""Launch shapes that were measured to be the quickest: kept in the cache folder, by device and field, and read once."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Sequence

from ..files import atomic_write, cache_dir

Shape = tuple[int, ...]


def forced() -> Shape | None:
    """SPARSEFLOW_CUDA_SHAPE, "tile,per thread,parts,threads" (csrc/cuda/plan.cpp lists what there is); None if not set."""
    text = os.environ.get("SPARSEFLOW_CUDA_SHAPE")
    if not text:
        return None
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 4:
        raise ValueError(f"SPARSEFLOW_CUDA_SHAPE must be four numbers, tile,per thread,parts,threads, not {text!r}")
    return shape


def _file() -> Path:
    return cache_dir() / "shapes.json"


@lru_cache
def _table(path: Path) -> dict[str, dict[str, list[int]]]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or not ours: measured again when somebody tunes
        return {}


def tuned(device: str, signature: str) -> Shape | None:
    found = _table(_file()).get(device, {}).get(signature)
    return None if found is None else tuple(found)


def remember(device: str, signature: str, measured: Sequence[tuple[Shape, float]]) -> None:
    """Keep the quickest of (shape, seconds), the quickest first."""
    table = _table(_file())
    table.setdefault(device, {})[signature] = list(measured[0][0])
    with atomic_write(_file()) as temporary:
        temporary.write_text(json.dumps(table, indent=1))
