"""What every loader returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..finite import refuse_not_finite


@dataclass(frozen=True)
class Dataset:
    """Rows of a data set, split. train, val, test: float32 CPU [n, dim], finite: ValueError names rows that are not.

    floor: the least mean negative log-likelihood any model can reach, in nats, where the true density is known.
    train_labels, val_labels, test_labels: int64 [n] for data with classes, else None.
    shape, levels: of images, (channels, height, width) of a row, and how many grey levels there are: rows are whole
    numbers 0..levels-1. None for other data.
    """

    name: str
    train: Tensor
    val: Tensor
    test: Tensor
    floor: float | None = None
    train_labels: Tensor | None = None
    val_labels: Tensor | None = None
    test_labels: Tensor | None = None
    shape: tuple[int, int, int] | None = None
    levels: int | None = None

    def __post_init__(self) -> None:
        for part in ("train", "val", "test"):
            refuse_not_finite(getattr(self, part), f"data set {self.name!r}: {part}")

    @property
    def dim(self) -> int:
        return self.train.shape[1]
