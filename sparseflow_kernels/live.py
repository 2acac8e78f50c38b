"""What a field with live parameters watches: whether anything of its module but the values of parameters has changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .packing import Snapshot, strided


class Watch:
    """A module as it was compiled.

    `changed` notices what makes another field of it than one with other numbers: parameters, buffers and submodules that
    came or went, buffers and masks with other numbers, a switch between training and evaluation, and pruned entries (exact
    zeros) that are no longer zero.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        parts = list(module.modules())
        self._structure = [
            (names, tuple(names.keys()))  # TorchScript's dictionaries are no others
            for part in parts for names in (part._parameters, part._buffers, part._modules)
        ]
        self._modes = [(part, part.training) for part in parts]
        self._buffers = self._snapshot(self._present_buffers())
        self._zeros = [
            (part._parameters, name, (parameter.detach() == 0).reshape(-1).nonzero()[:, 0])
            for part in parts for name, parameter in part._parameters.items()
            if parameter is not None and parameter.layout == torch.strided and not bool(parameter.detach().all())
        ]  # fmt: skip
        self._seen: Snapshot | None = None

    def _present_buffers(self) -> list[Tensor]:
        held = [buffer for part in self._module.modules() for _, buffer in part._buffers.items() if buffer is not None]
        return [part for buffer in held for part in strided(buffer)]

    @staticmethod
    def _snapshot(tensors: list[Tensor]) -> Snapshot | None:
        return Snapshot(tensors) if tensors else None

    def changed(self) -> bool:
        """Whether the module has to be compiled anew."""
        if any(tuple(names.keys()) != before for names, before in self._structure):
            return True
        if any(part.training != mode for part, mode in self._modes):
            return True
        if self._buffers is not None and not self._buffers.same(self._present_buffers()):
            return True
        if not self._zeros:
            return False
        pruned = [parameters[name] for parameters, name, _ in self._zeros]
        if self._seen is not None and self._seen.same(pruned):
            return False
        with torch.no_grad():
            for parameter, (_, _, zeros) in zip(pruned, self._zeros):
                if bool(parameter.reshape(-1)[zeros.to(parameter.device)].any()):
                    return True
        self._seen = Snapshot(pruned)
        return False
