"""Solves that do not fit into memory: how much they asked for, and what decides it."""

from __future__ import annotations

import math
import os
from typing import NoReturn, Sequence

import torch
from torch import Tensor

_WORDS = ("can't allocate memory", "not enough memory", "cannot allocate memory", "out of memory", "bad_alloc")
_WORTH_A_LOOK = 1 << 30  # bytes of outputs


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in _WORDS)


def refuse_what_never_fits(parts: Sequence[Tensor], outputs: int, stages: int) -> None:
    """Raises MemoryError for outputs larger than this machine's memory: it would be promised, and the process killed
    when it is used."""
    size = sum(part.numel() * part.element_size() for part in parts) * outputs
    if size > _WORTH_A_LOOK and parts[0].device.type == "cpu" and size > _physical():
        raise MemoryError(_told(parts, outputs, stages))


def explain(error: BaseException, parts: Sequence[Tensor], outputs: int, stages: int) -> NoReturn:
    """Raise the error of memory that ran out again, with the sizes. torch's own error of a GPU keeps its type.

    parts: the state.  outputs: how many times of output.  stages: of the method.
    """
    text = _told(parts, outputs, stages)
    if str(error).startswith(text):  # `refuse_what_never_fits`
        raise error
    if isinstance(error, torch.OutOfMemoryError):
        error.add_note(text)
        raise error
    raise MemoryError(f"{text} ({error})") from error


def _told(parts: Sequence[Tensor], outputs: int, stages: int) -> str:
    shape = list(parts[0].shape)
    one = sum(part.numel() * part.element_size() for part in parts)
    rows = math.prod(shape[:-1])
    return (
        f"a solve does not fit into memory: its outputs take {_size(outputs * one)}, {outputs} time(s) of {_size(one)} "
        f"for a state of {rows} row(s) of {shape[-1]} ({parts[0].dtype}); its workspace takes about as much as "
        f"{stages + 6} such states, {_size((stages + 6) * one)}, and a gradient keeps up to {stages} more, "
        f"{_size(stages * one)}, for every accepted step. Solve for fewer rows or fewer times at once"
    )


def _size(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{count} bytes ({size:.3g} {unit})"


def _physical() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf
