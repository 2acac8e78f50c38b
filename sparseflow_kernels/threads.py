"""How many threads the native engines use at most: they take as many as the work at hand merits, and no more than the
cores that the process may use. Results do not depend on it."""

from __future__ import annotations

import torch

_MOST = 2**31 - 1  # what native code can count
_count: int | None = None  # None: follow torch


def set_num_threads(count: int) -> None:
    """Use up to `count` threads (>= 1) in native solves and evaluations from now on, whatever torch uses.

    Raises TypeError for anything but an int, ValueError below 1 and beyond what native code can count.
    """
    global _count
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"set_num_threads: count must be an int, not {type(count).__name__}")
    if count < 1:
        raise ValueError(f"set_num_threads: count must be at least 1, not {count}")
    if count > _MOST:
        raise ValueError(f"set_num_threads: count must be at most {_MOST}, not {count}")
    _count = count


def get_num_threads() -> int:
    """The most threads that native engines use: what `set_num_threads` said, else `torch.get_num_threads()`."""
    return torch.get_num_threads() if _count is None else _count
