"""Patterns, plans and points of time live on the CPU, whatever the caller has made torch's default device."""

from __future__ import annotations

import functools
from typing import Callable, ParamSpec, TypeVar

import torch

# set_default_device is a mode of torch functions. That there is none is told in no time; which device it is, later.
_modes = getattr(torch._C, "_len_torch_function_stack", None)
P = ParamSpec("P")
R = TypeVar("R")


def _no_modes() -> bool:
    return _modes is not None and _modes() == 0


def factories_on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """While `function` runs, tensors made without a device are made on the CPU (torch.set_default_device would put them
    elsewhere). Values of a field and of a state keep their device: they are made like others."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or _no_modes() or torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run
