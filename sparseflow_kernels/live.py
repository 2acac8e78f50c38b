"""What a field with live parameters watches: whether anything of its module but the values of parameters has
changed."""

from __future__ import annotations

import operator
from typing import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from .callables import FunctionModule
from .counting import Counters
from .hooks import hooks_of
from .live_attributes import Attributes
from .packing import Snapshot, strided
from .trained import is_fresh


class Watch:
    """A module as it was compiled.

    `changed` notices what makes another field of it than one with other numbers: parameters and buffers that came or
    went, submodules and hooks that are others, buffers, masks and attributes with other numbers, a switch between
    training and evaluation, and pruned entries (exact zeros) that are no longer zero.
    """

    def __init__(
        self, module: nn.Module, names: Collection[str] = (), context: frozenset[str] = frozenset(),
        counters: Counters | None = None,
    ) -> None:  # fmt: skip
        """names: of the parameters that the field reads.  context: names of the tensors that are its context.
        counters: what the module counts, which is no part of what it computes."""
        self._module, self._counters = module, counters
        parts = list(module.modules())
        if isinstance(module, FunctionModule) and counters is not None:
            parts = module.used(counters.run, names)
        self._structure = [
            (names, _which(names)) for part in parts for names in (part._parameters, part._buffers)
        ]  # TorchScript's dictionaries are no others
        self._children = [(part._modules, tuple(part._modules.values())) for part in parts]
        self._hooks = [(hooks, list(hooks.values())) for part in parts for hooks in hooks_of(part)[:2]]  # of forward
        self._modes = [(part, part.training, type(part)) for part in parts]
        self._held = [
            (part, key)
            for part in parts
            for key in part._buffers.keys()
            if not counters or key not in counters.of(part)
        ]
        self._buffers = self._snapshot(self._present_buffers())
        self._zeros = [
            (part._parameters, name, Zeros(parameter.detach()))
            for part in parts for name, parameter in part._parameters.items()
            if parameter is not None and parameter.layout == torch.strided and not bool(parameter.detach().all())
            and not (parameter.requires_grad and is_fresh(parameter.detach()))
        ]  # fmt: skip
        self._attributes = Attributes(module, parts, context, counters)

    def _present_buffers(self) -> list[Tensor]:
        held = [buffer for part, key in self._held if (buffer := part._buffers[key]) is not None]
        return [part for buffer in held for part in strided(buffer)]

    @staticmethod
    def _snapshot(tensors: list[Tensor]) -> Snapshot | None:
        return Snapshot(tensors) if tensors else None

    def __getstate__(self) -> dict:
        return {"_module": self._module}

    @property
    def records(self) -> str | None:
        """The name of a list or dict in which forward notes what it sees; None if it does not."""
        return None if self._counters is None else self._counters.records

    def count(self, evaluations: int) -> None:
        """Of so many evaluations the module's own counters know by this."""
        if self.__dict__.get("_counters"):
            self._counters.add(evaluations)

    def counted(self, part: nn.Module) -> frozenset[str]:
        """Names of the attributes in which a part of the module counts its evaluations."""
        return self._counters.of(part) if self.__dict__.get("_counters") else frozenset()

    def changed(self) -> bool:
        """Whether the module has to be compiled anew. It has in a copy, which knows nothing of what was compiled."""
        if "_structure" not in self.__dict__:
            return True
        if any(_which(names) != before for names, before in self._structure):
            return True
        if any(not _are(now.values(), before) for now, before in self._children):
            return True
        if any(list(hooks.values()) != before for hooks, before in self._hooks):
            return True
        if any(part.training != mode or type(part) is not kind for part, mode, kind in self._modes):
            return True
        if self._buffers is not None and not self._buffers.same(self._present_buffers()):
            return True
        if not self._attributes.same():
            return True
        return not all(zeros.still(parameters[name]) for parameters, name, zeros in self._zeros)


def _which(names: Mapping[str, Tensor | None]) -> list[tuple[str, bool]]:
    """The names, and which of them hold something."""
    return [(name, value is None) for name, value in names.items()]


def _are(children: Iterable[nn.Module], others: tuple[nn.Module, ...]) -> bool:
    """Whether these modules are those."""
    found = tuple(children)
    return len(found) == len(others) and all(map(operator.is_, found, others))


class Zeros:
    """Which entries of a tensor are exactly zero. `still` is asked at every call, and on the CPU is one pass over
    memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._native = self._where = None
        if (kind := _native_kind(tensor)) is not None:
            self._native = kind(tensor.data_ptr(), tensor.numel())
        self._shape, self._dtype = tensor.shape, tensor.dtype
        if self._native is None:
            self._where = (tensor == 0).reshape(-1).nonzero()[:, 0]

    @torch.no_grad()
    def still(self, tensor: Tensor) -> bool:
        """Whether those entries of a tensor are zero. False for one of another shape or dtype."""
        if (tensor.shape, tensor.dtype) != (self._shape, self._dtype):
            return False
        if self._native is not None and _native_kind(tensor) is not None:
            return self._native.still(tensor.data_ptr())
        if self._where is None:  # it has moved to another device
            return False
        return not bool(tensor.reshape(-1)[self._where.to(tensor.device)].any())


def _native_kind(tensor: Tensor) -> type | None:
    """The native class for the zeros of a tensor; None where there is none."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    try:
        from . import _cpu
    except ImportError:  # a checkout without the extension
        return None
    return {torch.float32: _cpu.ZerosF32, torch.float64: _cpu.ZerosF64}.get(tensor.dtype)
