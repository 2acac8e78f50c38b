"""torch's hooks on modules, as those ask who run a module's work without calling it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as nn_module

GLOBAL_HOOKS = (
    nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks, nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)  # fmt: skip


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """The dicts that hold the hooks of a module's calls and of their gradients; they live as long as the module."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
