"""How a flow is trained, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable

import torch

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class TrainingSettings:
    """Optimizer, schedule and length of one training; checked when made (ValueError).

    epochs or steps: how long, exactly one of the two. An epoch goes through the rows in random order in batches of
        `batch`; a last batch of less than half of that is left out (unless it is the only one).
    optimizer: "adamw", "adam" or "sgd" with `lr` and `weight_decay`, otherwise as torch has them.
    lr_end: the learning rate falls geometrically from lr at the first step to this at the last.
    milestones, factor: the learning rate is multiplied by `factor` when that many epochs are done. With neither of
        lr_end and milestones it is constant.
    clip: largest norm of the gradient, None for no clipping.
    select: "last" keeps the parameters of the last epoch; "best" those of the epoch with the lowest NLL on the
        validation rows, where an epoch whose NLL is not finite never counts.
    max_failures: a step with a non-finite loss or gradient, or a failed solve, is skipped and counted; that many in a
        row raise NonFiniteLossError.
    """

    epochs: int | None = None
    steps: int | None = None
    batch: int = 1024
    lr: float = 5e-3
    lr_end: float | None = None
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    optimizer: str = "adamw"
    weight_decay: float = 1e-5
    clip: float | None = None
    select: str = "last"
    max_failures: int = 10

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        for name in ("epochs", "steps", "batch", "max_failures"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or int(value) != value or value < 1):
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        for name in ("lr", "factor", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay!r}")
        if self.lr_end is not None and not 0 < self.lr_end <= self.lr:
            raise ValueError(f"lr_end must be None, or above 0 and at most lr ({self.lr!r}); got {self.lr_end!r}")
        milestones = tuple(int(epoch) for epoch in self.milestones)
        if any(epoch < 1 for epoch in milestones) or list(milestones) != sorted(set(milestones)):
            raise ValueError(f"milestones must be whole numbers of epochs that rise, got {self.milestones!r}")
        if milestones and self.lr_end is not None:
            raise ValueError("give milestones or lr_end, not both")
        object.__setattr__(self, "milestones", milestones)
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}")
        if self.select not in ("last", "best"):
            raise ValueError(f"select must be 'last' or 'best', got {self.select!r}")

    def changed(self, **changes: Any) -> "TrainingSettings":
        """The same with these differences; `epochs` takes the place of `steps` and the other way round."""
        if changes.get("epochs") is not None:
            changes.setdefault("steps", None)
        elif changes.get("steps") is not None:
            changes.setdefault("epochs", None)
        if changes.get("milestones"):
            changes.setdefault("lr_end", None)
        elif changes.get("lr_end") is not None:
            changes.setdefault("milestones", ())
        return replace(self, **changes)

    def learning_rate(self, epoch: int, step: int, total: int) -> float:
        """At 0-based `epoch` and `step` of `total` steps."""
        if self.lr_end is not None:
            return self.lr * (self.lr_end / self.lr) ** (step / max(1, total - 1))
        return self.lr * self.factor ** sum(epoch >= milestone for milestone in self.milestones)
