"""What a field with live parameters watches: whether its module is still the one that it was compiled from, but for the
values of its parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .live_attributes import Attributes
from .packing import Snapshot, strided
from .trained import is_fresh


class Watch:
    """A module as it was compiled. `changed` tells of everything that its program, and not only its numbers, may follow
    from: parameters, buffers and submodules that came or went, buffers, masks and attributes with other numbers, a switch
    between training and evaluation, pruned entries (exact zeros) that are no longer zero."""

    def __init__(self, module: nn.Module, context: frozenset[str] = frozenset()) -> None:
        """context: names of the tensors that are the field's context."""
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
            and not (parameter.requires_grad and is_fresh(parameter.detach()))
        ]  # fmt: skip
        self._attributes = Attributes(module, context)
        self._seen: Snapshot | None = None

    def _present_buffers(self) -> list[Tensor]:
        held = [buffer for part in self._module.modules() for _, buffer in part._buffers.items() if buffer is not None]
        return [part for buffer in held for part in strided(buffer)]

    @staticmethod
    def _snapshot(tensors: list[Tensor]) -> Snapshot | None:
        return Snapshot(tensors) if tensors else None

    def changed(self) -> bool:
        if any(tuple(names.keys()) != before for names, before in self._structure):
            return True
        if any(part.training != mode for part, mode in self._modes):
            return True
        if self._buffers is not None and not self._buffers.same(self._present_buffers()):
            return True
        if not self._attributes.same():
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

