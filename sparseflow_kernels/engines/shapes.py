"""Launch shapes that were measured to be the quickest: kept in the cache folder, by device and field, and read once."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Sequence

from ..files import DamagedFileError, cache_dir, read_json, write_json
from ..warn import warn

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
    """Empty where there is no file yet, and, with a warning, where it is damaged: tuning writes it anew."""
    remedy = "it is ignored; delete it, or tune again"
    try:
        table = read_json(path, remedy)
    except OSError:
        return {}
    except DamagedFileError as error:
        warn(str(error))
        return {}
    if not _is_table(table):
        warn(f"{path} is damaged, no table of launch shapes; {remedy}")
        return {}
    return table


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(shapes, dict)
        and all(isinstance(s, list) and len(s) == 4 and all(type(n) is int for n in s) for s in shapes.values())
        for shapes in value.values()
    )


def tuned(device: str, signature: str) -> Shape | None:
    found = _table(_file()).get(device, {}).get(signature)
    return None if found is None else tuple(found)


def remember(device: str, signature: str, measured: Sequence[tuple[Shape, float]]) -> None:
    """Keep the quickest of (shape, seconds), the quickest first."""
    table = _table(_file())
    table.setdefault(device, {})[signature] = list(measured[0][0])
    write_json(_file(), table)
