"""What a field with live parameters watches: whether anything of its module but the values of parameters has
changed."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.weight_norm import WeightNorm

from .callables import FunctionModule
from .capture.context import PREFIX, attributes, part_named, tensor_named
from .capture.seen import Answers
from .counting import Counters
from .hooks import hooks_of
from .live_attributes import Attributes, kind_of
from .packing import Snapshot, strided
from .trained import is_fresh


_MAKERS = (prune.BasePruningMethod, WeightNorm)
MOST_MOVING = 1 << 16  # elements of a tensor


def may_move(tensor: Tensor) -> bool:
    """Whether a tensor that is no parameter may be read at every call like one. Many zeros, or others of one size
    beside them, may be those of a mask, by which the field is pruned: such a tensor stays a constant, unless a gradient
    is wanted."""
    if tensor.layout != torch.strided or not tensor.is_floating_point() or not 0 < tensor.numel() <= MOST_MOVING:
        return False
    if tensor.requires_grad or tensor.is_meta:
        return tensor.requires_grad
    others = tensor.detach()[tensor.detach() != 0].abs()
    few = 4 * (tensor.numel() - others.numel()) <= tensor.numel()
    return others.numel() == tensor.numel() or (few and not bool((others == others[0]).all()))


@dataclass
class Run:
    """What running a module has shown. counters: what it counts, which is no part of what it computes.  unread: names
    of tensors that forward never reads.  answers: what of the module's numbers was taken as it was.  moving: names of
    tensors beside the parameters that the field reads like them at every call.  zeros: those of trained parameters are
    no pruned entries.  reached: names of the parameters that gradients reach.  flags: names of those of which forward
    has asked whether they require one."""

    counters: Counters
    unread: frozenset[str]
    answers: Answers | None
    moving: frozenset[str] = frozenset()
    zeros: bool = False
    reached: frozenset[str] = frozenset()
    flags: frozenset[str] = frozenset()


class Watch:
    """A module as it was compiled.

    `changed` notices what makes another field of it than one with other numbers: parameters and buffers that came or
    went, submodules and hooks that are others, buffers, masks and attributes with other numbers (of the context: with
    other shapes), a switch between training and evaluation, and pruned entries (exact zeros) that are no longer zero.
    """

    def __init__(
        self, module: nn.Module, names: Collection[str] = (), followed: Mapping[str, int] | None = None,
        run: Run | None = None,
    ) -> None:  # fmt: skip
        """names: of the parameters that the field reads.  followed: names of other tensors that it reads at every call,
        and how many of their first axes may have another size: one of the context's, none of others."""
        followed = followed or {}
        counters = None if run is None else run.counters
        unread, self._answers = (frozenset(), None) if run is None else (run.unread, run.answers)
        self._module, self._counters = module, counters
        self.zeros = run is not None and run.zeros  # those of trained parameters are no pruned entries
        parts = list(module.modules())
        if isinstance(module, FunctionModule) and counters is not None:
            parts = module.used(counters.run, counters.reached, names)
        path = {part: path for path, part in module.named_modules()}
        self._parts, self._where = [(path[part], part) for part in parts], _places(module)
        self._children = [tuple(part._modules.values()) for part in parts]
        self._held = [
            (number, key, followed.get(f"{PREFIX}{path[part]}/{key}"))
            for number, part in enumerate(parts)
            for key in part._buffers.keys()
            if f"{PREFIX}{path[part]}/{key}" not in unread and not (counters and key in counters.of(part))
        ]
        self._asked = () if run is None else tuple(run.flags)
        self._flags = self._present_flags()
        self._ties: dict[int, int] = {}  # numbers of the present parameters, by their ids
        self._look_at()
        self._structure = self._present_structure()
        self._attributes = Attributes(self._parts, followed, unread, counters, self._ties)
        self._hooks = [list(hooks.values()) for hooks in self._hooks_now]
        self._modes, self._kinds = [part.training for part in parts], [type(part) for part in parts]
        shapes, buffers = self._present_buffers()
        self._shapes, self._buffers = shapes, Snapshot(buffers) if buffers else None
        self._zeros = [
            (number, name, Zeros(parameter.detach()))
            for number, part in enumerate(parts) for name, parameter in part._parameters.items()
            if parameter is not None and parameter.layout == torch.strided and not bool(parameter.detach().all())
            and not (parameter.requires_grad and is_fresh(parameter.detach()))
            and not (self.zeros and parameter.requires_grad)
        ]  # fmt: skip
        self._makers = [
            (hook, part) for part in parts for hook in part._forward_pre_hooks.values() if isinstance(hook, _MAKERS)
        ]
        self._made_at: list[tuple[int, int]] | None = None  # of which parameters, and in which state
        left = {*followed, *unread}
        fixed = ((name, tensor) for name, tensor in attributes(module) if name not in left)
        self._fixed = {name: tensor.detach().clone() for name, tensor in fixed if may_move(tensor)}

    def _look_at(self) -> None:
        """The dictionaries of the present parts, which are looked at in every call."""
        self._names = [names for _, part in self._parts for names in (part._parameters, part._buffers)]
        self._hooks_now = [hooks for _, part in self._parts for hooks in hooks_of(part)[:2]]  # of forward

    def _present_flags(self) -> list[bool]:
        """Of the parameters of which forward asks whether they require a gradient."""
        return [tensor_named(self._module, name).requires_grad for name in self._asked]

    def _present_structure(self) -> list:
        """The names of parameters and buffers, which of them hold something, the parameters' shapes, and which of them
        are one parameter; which buffers require a gradient."""
        parameters, buffers = self._names[::2], self._names[1::2]
        self._ties.clear()

        def kind(parameter: Tensor | None) -> tuple | None:
            if parameter is None:
                return None
            return parameter.shape, self._ties.setdefault(id(parameter), len(self._ties))

        return [
            [[(name, kind(one)) for name, one in names.items()] for names in parameters],
            [[(name, None if one is None else one.requires_grad) for name, one in names.items()] for names in buffers],
        ]

    def _present_buffers(self) -> tuple[list, list[Tensor]]:
        """(Kinds and shapes of those of which the field reads the numbers at every call; the others)."""
        shapes: list[Any] = []
        tensors: list[Tensor] = []
        for number, key, free in self._held:
            buffer = self._parts[number][1]._buffers[key]
            if free is not None:
                shapes.append(kind_of(buffer, free))
            elif buffer is not None:
                tensors += strided(buffer)
        return shapes, tensors

    def make_weights(self) -> None:
        """What torch's hooks make of masked and of normalized weights in front of every forward: `layer.weight` is to
        be of the present parameters for those who read it beside the field, for a penalty, or to prune further. A
        backward pass uses its graph up; without one it is made where a parameter has changed."""
        if not self._makers:
            return
        graph = torch.is_grad_enabled()
        held = () if graph else (p for _, part in self._makers for p in part._parameters.values() if p is not None)
        versions = None if graph else [(id(parameter), parameter._version) for parameter in held]
        if graph or versions != self._made_at:
            for hook, part in self._makers:
                hook(part, ())
        self._made_at = versions

    def __getstate__(self) -> dict:
        return {"_module": self._module, "zeros": self.zeros}

    @property
    def records(self) -> str | None:
        """The name of a list or dict in which forward notes what it sees; None if it does not."""
        return None if self._counters is None else self._counters.records

    @property
    def by_number(self) -> bool:
        """Whether what the module computes depends on how often it was called."""
        return self._counters is not None and self._counters.by_number

    @property
    def bare_zeros(self) -> bool:
        """Whether entries of trained parameters count as pruned which no mask keeps at zero: torch would train them."""
        for number, name, _ in self._zeros:
            part = self._parts[number][1]
            parameter = part._parameters.get(name)
            if parameter is not None and parameter.requires_grad:
                mask = part._buffers.get(f"{name[:-5]}_mask") if name.endswith("_orig") else None
                if mask is None or bool(((parameter.detach() == 0) & (mask != 0)).any()):
                    return True
        return False

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
        if not self._children_are_same() and not self._goes_on():
            return True
        if self._present_structure() != self._structure:
            return True
        if [list(hooks.values()) for hooks in self._hooks_now] != self._hooks:
            return True
        if [part.training for _, part in self._parts] != self._modes:
            return True
        if self._asked and self._present_flags() != self._flags:
            return True
        if [type(part) for _, part in self._parts] != self._kinds:
            return True
        shapes, buffers = self._present_buffers()
        if shapes != self._shapes or (self._buffers is not None and not self._buffers.same(buffers)):
            return True
        if not self._attributes.same() or not (self._answers is None or self._answers.same()):
            return True
        return not all(zeros.still(self._parts[number][1]._parameters[name]) for number, name, zeros in self._zeros)

    def moved(self) -> frozenset[str]:
        """Names of tensors that were taken for constants, and have other numbers now."""
        present = {name: tensor for name, tensor in attributes(self._module) if name in self.__dict__.get("_fixed", ())}
        return frozenset(
            name for name, tensor in present.items()
            if may_move(tensor) and kind_of(tensor, 0) == kind_of(self._fixed[name], 0)
            and not torch.equal(tensor, self._fixed[name])
        )  # fmt: skip

    def _children_are_same(self) -> bool:
        for (_, part), before in zip(self._parts, self._children):
            if not _are(part._modules.values(), before):
                return False
        return True

    def _goes_on(self) -> bool:
        """Whether submodules that are others stand where those stood, without parameters of their own: a path through
        data, a wrapper round a network, which are made anew for every batch. They are watched instead from now on."""
        if _places(self._module) != self._where:
            return False
        parts = [(path, part_named(self._module, path)) for path, _ in self._parts]
        children = [tuple(part._modules.values()) for _, part in parts]
        for now, before in zip(children, self._children):
            if not all(new is old or self._replaces(new, old) for new, old in zip(now, before)):
                return False
        if self._counters is not None:
            self._counters.replace({old: new for (_, old), (_, new) in zip(self._parts, parts)})
        self._parts, self._children = parts, children
        self._attributes.look_at(parts)
        self._look_at()
        return True

    @staticmethod
    def _replaces(new: nn.Module | None, old: nn.Module | None) -> bool:
        if new is None or old is None or type(new) is not type(old):
            return False
        return list(new._modules) == list(old._modules) and not has_own_parameters(new)


def has_own_parameters(part: nn.Module) -> bool:
    return any(parameter is not None for parameter in part._parameters.values())


def _places(module: nn.Module) -> list[tuple[str, int]]:
    """The paths of all modules in a module, and which of them are one."""
    numbers: dict[int, int] = {}
    found = module.named_modules(remove_duplicate=False)
    return [(path, numbers.setdefault(id(part), len(numbers))) for path, part in found]


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
