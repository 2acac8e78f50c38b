"""What running a module shows beside its operations: which tensors it reads at all, and what of it was taken as it was.

A tensor that forward never touches is no part of the field. And some numbers are no part of what can be computed again:
Python has asked for them (an if, an int(), a list), or they are positions, or numbers per sample that all samples share.
The field that was read holds for as long as these are what they were (`Answers`).
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .context import attributes, tensor_named
from .replay import Forms, Leaf, Node, Replay
from .trees import tree_leaves
from .values import Constant

# Operations that take whole numbers or truth values of a constant for positions.
AT_POSITIONS = {
    "index", "index_put", "index_select", "index_add", "index_copy", "index_fill", "gather", "scatter", "scatter_add",
    "scatter_reduce", "take", "embedding", "masked_select", "masked_scatter", "nonzero", "repeat_interleave",
}  # fmt: skip


_REQUIRES_GRAD, _GRAD = Tensor.requires_grad.__get__, Tensor.grad.__get__


class Seen:
    """ids: of the tensors that torch was called with, be it for their shape alone. Kept by `collecting`.

    hooked: forward has put a hook on a tensor.  flags, grads: ids of the tensors that it has asked for requires_grad, and
    for their .grad.  moving: tensors beside the parameters, by the names of `attributes`, that
    are to be read like parameters, as they will be others.  zeros: exact zeros of trained parameters are no pruned
    entries.  reached: names of the parameters that gradients of forward reach."""

    def __init__(self, moving: Mapping[str, Tensor] | None = None, zeros: bool = False) -> None:
        self.moving, self.zeros, self.hooked = moving or {}, zeros, False
        self.ids: set[int] = set()
        self.flags: set[int] = set()
        self.grads: set[int] = set()
        self.reached: frozenset[str] = frozenset()
        self._forms = Forms()
        self._taken: dict[int, tuple[Node | Leaf, bool]] = {}

    def begin(self) -> None:
        """The module is read anew."""
        self._taken.clear()

    def take(self, value: Any, is_zero: bool = False) -> None:
        """A constant was taken as it is. is_zero: for where it is zero, that is, pruned."""
        if isinstance(value, Constant) and value.node is not None:
            self._taken[self._forms.number(value.node)] = value.node, is_zero

    def answers(self, module: nn.Module, dtype: torch.dtype, zeros: bool = True) -> Answers | None:
        """zeros: with those that were taken for pruned entries."""
        nodes = [node for node, is_zero in self._taken.values() if zeros or not is_zero]
        return Answers(module, nodes, dtype) if nodes else None

    def unread(self, module: nn.Module) -> frozenset[str]:
        """Names of the tensors that a module holds, as `attributes` gives them, and that no run has read. None of
        TorchScript's modules, inside which nothing is seen."""
        if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            return frozenset()
        return frozenset(name for name, tensor in attributes(module) if id(tensor) not in self.ids)


class Answers:
    """What was taken of a module's numbers: how it is computed from them, and what it was."""

    def __init__(self, module: nn.Module, nodes: Sequence[Node | Leaf], dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype
        self._replays = [Replay(node, dtype) for node in nodes]
        self.leaves: frozenset[Leaf] = frozenset().union(*(replay.all_leaves() for replay in self._replays))
        self._first = next(iter(self.leaves)).name
        self._were = self._now()

    @torch.no_grad()
    def _now(self) -> list[Tensor]:
        def moved(name: str) -> Tensor:
            value = tensor_named(self._module, name)
            return value.detach().to(self._dtype) if value.is_floating_point() else value.detach()

        device = tensor_named(self._module, self._first).device
        like = torch.empty(0, dtype=self._dtype, device=device)
        return [replay.run(like, None, moved).clone() for replay in self._replays]

    def same(self) -> bool:
        try:
            present = self._now()
        except Exception:  # noqa: BLE001 - of tensors that have become smaller, say
            return False
        return all(map(_alike, present, self._were))


def _alike(now: Tensor, was: Tensor) -> bool:
    """NaN is NaN: numbers that are missing in data."""
    return now.shape == was.shape and bool(((now == was) | ((now != now) & (was != was))).all())


_here = threading.local()


@contextlib.contextmanager
def collecting(moving: Mapping[str, Tensor] | None = None, zeros: bool = False) -> Iterator[Seen]:
    """Gives what is seen of the modules that `watched` runs meanwhile, in this thread. moving, zeros: as of `Seen`."""
    before, _here.seen = getattr(_here, "seen", None), Seen(moving, zeros)
    try:
        yield _here.seen
    finally:
        _here.seen = before


def current() -> Seen:
    """What is being collected; what is noted outside of `collecting` is lost."""
    return getattr(_here, "seen", None) or Seen()


class _Calls(TorchFunctionMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.seen.ids.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        self.seen.hooked |= func is Tensor.register_hook
        if args and (func == _REQUIRES_GRAD or func == _GRAD):
            (self.seen.flags if func == _REQUIRES_GRAD else self.seen.grads).add(id(args[0]))
        return func(*args, **kwargs)


def watched(run: Callable[[], Any]) -> Any:
    seen = getattr(_here, "seen", None)
    if seen is None:
        return run()
    with _Calls(seen):
        return run()
