"""Where and how tensors are made that outlive a call. Patterns, plans and points of time live on the CPU, whatever the
caller has made torch's default device."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, ParamSpec, TypeVar

import torch
from torch.autograd.graph import saved_tensors_hooks

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


def lasting(function: Callable[P, R]) -> Callable[P, R]:
    """What `function` makes is kept: made on the CPU, as above; of tensors that autograd takes, though it be under
    torch.inference_mode (a model is often met there first, by a validation before the training); and unseen by hooks on
    what autograd saves, because a checkpoint counts that, and meets it the first time alone."""
    inner = factories_on_cpu(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return inner(*args, **kwargs)
        inference, hooked = torch.is_inference_mode_enabled(), _hooked()
        if not (inference or hooked):
            return inner(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            if inference:
                stack.enter_context(torch.inference_mode(False))
            if hooked:
                stack.enter_context(saved_tensors_hooks(_as_it_is, _as_it_is))
            return inner(*args, **kwargs)

    return run


def _hooked() -> bool:
    """Are there hooks on what autograd saves?"""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def ordinary(state: Any) -> Any:
    """The tensor, or the tensors of a tuple, which autograd takes: copies of those that are an inference_mode's."""
    if isinstance(state, tuple):
        return tuple(map(ordinary, state))
    return state.clone() if isinstance(state, torch.Tensor) and state.is_inference() else state
