"""The 8x8 hand-written digits that come with scikit-learn (UCI optical recognition test set), as a 64-d density, and as
images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ._sklearn import sklearn_datasets
from .dataset import Dataset


LEVELS = 17  # counts of dark pixels of 4x4 blocks, 0 to 16


def load(*, seed: int = 0) -> Dataset:
    """1,797 rows x 64: grey levels 0 to 16, dequantised, (level + U[0, 1)) / 17; 80 / 10 / 10 % at random.

    seed: of split and noise. Raises ImportError without scikit-learn.
    """
    levels, digits, order, rng = _drawn(seed)
    return _split("digits", ((levels + rng.random(levels.shape)) / LEVELS).astype(np.float32), digits, order)


def load_images(*, seed: int = 0) -> Dataset:
    """The same split of the images, 1x8x8, as rows of whole levels 0 to 16, for a flow that dequantises them itself."""
    levels, digits, order, _ = _drawn(seed)
    found = _split("digits_images", levels.astype(np.float32), digits, order)
    return replace(found, shape=(1, 8, 8), levels=LEVELS)


def _drawn(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.random.Generator]:
    levels, digits = sklearn_datasets("digits").load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    return levels, digits, rng.permutation(len(levels)), rng


def _split(name: str, rows: np.ndarray, digits: np.ndarray, order: np.ndarray) -> Dataset:
    held = len(rows) // 10
    sizes = [len(rows) - 2 * held, held, held]
    train, val, test = torch.from_numpy(rows[order]).split(sizes)
    classes = torch.from_numpy(digits.astype(np.int64)[order])
    labels = dict(zip(("train_labels", "val_labels", "test_labels"), classes.split(sizes)))
    return Dataset(name, train, val, test, **labels)
