"""Gradients that forward has of its own: of an autograd.Function with a backward by hand, by hooks on tensors, or as it
computes something else while gradients are wanted.

What is read of a module are the operations of its forward, and their derivatives are the field's. A backward by hand
may be the same one, computed with less memory, or another one on purpose (a straight-through estimator).
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from .capture.context import attributes
from .capture.untouched import untouched
from .capture.seen import Seen, watched
from .field import UnsupportedFieldError
from .field.layout import State

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # relative
SIZES = (1.0, 1e-6, 1e6)
KNOWN = ("torch.", "sparseflow_kernels.")  # whose functions have the derivative of what they compute


def check_own_gradients(
    module: nn.Module, call: Callable[[State], State], field: Callable[[], Callable[[State], State]], start: State,
    seen: Seen,
) -> None:  # fmt: skip
    """Raises UnsupportedFieldError where the module has gradients of its own, and they are not the field's, or where it
    computes something else while gradients are wanted. Notes the parameters that gradients reach (`Seen.reached`).

    call: an evaluation of the module.  field: gives one of what was read, over the module's parameters.  start: the
    state to evaluate at.  seen: what reading the module has shown.
    """
    parts = start if isinstance(start, tuple) else (start,)
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    state = tuple(leaves) if isinstance(start, tuple) else leaves[0]
    with untouched(module), torch.enable_grad():
        plain: tuple[Tensor, ...] | None = None
        with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), torch.no_grad():  # it may need a graph
            copies = [part.detach().clone() for part in parts]
            plain = _flat(call(tuple(copies) if isinstance(start, tuple) else copies[0]))
        try:
            out = _flat(watched(lambda: call(state)))
        except Exception:  # noqa: BLE001 - it runs for states of another shape alone: what it needs is told when it is asked for
            return
        if seen.hooked:
            raise UnsupportedFieldError(
                f"module {type(module).__name__}: forward puts a hook on a tensor, which would not be called. Use the "
                "module uncompiled with sfk.odeint, which hands it to torchdiffeq"
            )
        if any(id(parameter) in seen.grads for parameter in module.parameters()):
            raise UnsupportedFieldError(
                f"module {type(module).__name__}: forward reads the gradient of a parameter (.grad), which changes "
                "from step to step. Use the module uncompiled with sfk.odeint, which hands it to torchdiffeq"
            )
        if plain is not None and not all(map(_alike, plain, out)):
            raise UnsupportedFieldError(
                f"module {type(module).__name__}: forward computes something else where gradients are wanted "
                "(torch.is_grad_enabled() or requires_grad decides in it), and a compiled field does not. "
                "Use the module uncompiled with sfk.odeint, which hands it to torchdiffeq"
            )
        reached = _variables(out)
        seen.reached = frozenset(name for name, p in module.named_parameters() if id(p) in reached)
        # TorchScript detaches what it differentiates itself, once it has seen gradients wanted.
        scripted = any(isinstance(part, torch.jit.ScriptModule) for part in module.modules())
        if not scripted and not any(map(_has_own, out)):
            return
        held = [tensor for _, tensor in attributes(module) if tensor.requires_grad]
        wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad), *held]
        # of cotangents of several sizes: a derivative is linear in them, and what clips gradients is not
        ours = _gradient(_flat(field()(state)), wanted)
        theirs = [[one / size for one in _gradient(out, wanted, size)] for size in SIZES]
    for mine, *own in zip(ours, *theirs):
        if not all(
            bool((mine - one).abs().max() <= TOLERANCE[mine.dtype] * (1.0 + mine.abs().max())) for one in own
        ):
            raise UnsupportedFieldError(
                f"module {type(module).__name__}: it has a gradient of its own (an autograd.Function with a "
                "backward, a part of TorchScript), which is not the derivative of what forward computes, as a compiled "
                "field has it. Use the module uncompiled with sfk.odeint, which hands it to torchdiffeq"
            )


def _alike(a: Tensor, b: Tensor) -> bool:
    limit = TOLERANCE.get(a.dtype, 1e-3)
    return a.shape == b.shape and torch.allclose(a.detach(), b.detach(), rtol=limit, atol=limit, equal_nan=True)


def _flat(state: Any) -> tuple[Tensor, ...]:
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)


def _gradient(out: Sequence[Tensor], wanted: Sequence[Tensor], size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(one.shape, generator=generator, dtype=torch.float64).mul(size).to(one) for one in out]
    loss = sum((one * weight).sum() for one, weight in zip(out, weights))
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return [torch.zeros_like(one) for one in wanted]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)  # the caller's, in part
    return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(wanted, found)]


def _home(node: Any) -> str:
    return getattr(getattr(node, "_forward_cls", None), "__module__", "")


def _has_own(tensor: Tensor) -> bool:
    """Whether there is a function by hand among those that a gradient goes back through."""
    return any(
        isinstance(node, BackwardCFunction) and not _home(node).startswith(KNOWN) for node in _functions([tensor])
    )


def _variables(out: Sequence[Tensor]) -> set[int]:
    """The ids of the leaves that a gradient goes back to."""
    return {id(node.variable) for node in _functions(out) if hasattr(node, "variable")}


def _functions(out: Sequence[Tensor]) -> Iterator[Any]:
    """What a gradient goes back through."""
    waiting, known = [tensor.grad_fn for tensor in out], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]
