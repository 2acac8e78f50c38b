"""torch's hooks on modules, and torchdiffeq's callbacks, as those ask who run a module's work without calling it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as nn_module

GLOBAL_HOOKS = (
    nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks, nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)  # fmt: skip
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")  # of torchdiffeq, at every step
ADJOINT_CALLBACKS = (*CALLBACKS, *(f"{name}_adjoint" for name in CALLBACKS))  # and of its backward solve


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """The dicts that hold the hooks of a module's calls and of their gradients; they live as long as the module."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def is_hooked(module: nn.Module) -> bool:
    """Whether the module or a part of it has hooks of the user's. Those by which torch prunes and normalizes weights
    compute what is read anyway. Those on all modules are everybody's."""
    if any(GLOBAL_HOOKS):
        return True
    for part in module.modules():
        for hooks in hooks_of(part):
            if hooks and any(not _is_torchs(hook) for hook in hooks.values()):
                return True
    return False


def _is_torchs(hook: object) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils.")
