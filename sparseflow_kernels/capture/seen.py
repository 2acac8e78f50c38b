"""Which tensors forward has read while it was run: what it never touches is no part of the field."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .context import attributes
from .trees import tree_leaves

_here = threading.local()


class Seen(TorchFunctionMode):
    """ids: of the tensors that torch was called with, be it for their shape alone."""

    def __init__(self, ids: set[int]) -> None:
        super().__init__()
        self.ids = ids

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.ids.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **kwargs)


@contextlib.contextmanager
def collecting() -> Iterator[set[int]]:
    """Gives the ids of the tensors that modules read when they are run by `watched` meanwhile, in this thread."""
    before, _here.ids = getattr(_here, "ids", None), set()
    try:
        yield _here.ids
    finally:
        _here.ids = before


def watched(run: Callable[[], Any]) -> Any:
    ids = getattr(_here, "ids", None)
    if ids is None:
        return run()
    with Seen(ids):
        return run()


def note(tensor: Tensor) -> None:
    """An operation has met this tensor, though torch may have been called with none: by an extension in C++."""
    if (ids := getattr(_here, "ids", None)) is not None:
        ids.add(id(tensor))


def unread(module: nn.Module, ids: set[int]) -> frozenset[str]:
    """Names of the tensors that a module holds, as `attributes` gives them, and that are not among these. None of
    TorchScript's modules, inside which nothing is seen."""
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        return frozenset()
    return frozenset(name for name, tensor in attributes(module) if id(tensor) not in ids)
