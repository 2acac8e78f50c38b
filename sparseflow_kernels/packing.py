"""A field's program, packed for its engine once and used until a number in it changes."""

from __future__ import annotations

from typing import Any, Callable, Sequence

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import divergence
from .divergence import DivergencePlan
from .engines import choose
from .engines.base import Engine
from .field import VectorField


def _tell_of_fused_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """torch's fused optimizers change parameters without raising their version counters, as every other change in place
    does; a packed field would go on with the old values."""
    fused = [group["params"] for group in optimizer.param_groups if group.get("fused")]
    if fused:
        increment_version([parameter for group in fused for parameter in group])


register_optimizer_step_post_hook(_tell_of_fused_step)


class Packing:
    """The engines that hold one field's values: without a divergence, and with each kind of it.

    requested: the engine asked for, as in `engines.choose`.
    """

    def __init__(self, requested: str) -> None:
        self.requested = requested
        self._plans: dict[str, DivergencePlan] = {}
        self._engines: dict[str | None, tuple[Any, Engine, list[Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._engines)

    def clear(self) -> None:
        """Forget what was packed (a change that went past torch's version counters)."""
        self._engines.clear()

    def plan(self, kind: str | None, field: Callable[[], VectorField]) -> DivergencePlan | None:
        """How the divergence is computed (`divergence.plan`), counted once; None for kind None."""
        if kind is not None and kind not in self._plans:
            self._plans[kind] = divergence.plan(field(), kind)
        return None if kind is None else self._plans[kind]

    def engine(self, kind: str | None, tensors: Sequence[Tensor], field: Callable[[], VectorField]) -> Engine:
        """An engine that holds the present values; `field` gives the program over `tensors`."""
        # An inference tensor counts no versions; an object equal to nothing says "always changed".
        key = [(p.data_ptr(), object() if p.is_inference() else p._version) for p in tensors]
        known = self._engines.get(kind)
        if known is None or known[0] != key:
            program = field()
            engine = None if known is None else known[1]
            if engine is None or not engine.update(program):
                engine_class, _ = choose(program, self.requested)
                engine = engine_class(program, self.plan(kind, field))
            # The aliases keep the old memory from being given to a new parameter, which the key could not tell. Another
            # dtype or device is other memory.
            known = self._engines[kind] = (key, engine, [p.detach() for p in tensors])
        return known[1]
