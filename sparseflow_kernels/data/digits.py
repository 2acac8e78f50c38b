"""The 8x8 hand-written digits that come with scikit-learn (UCI optical recognition test set), as a 64-d density."""

from __future__ import annotations

import numpy as np
import torch

from ._sklearn import sklearn_datasets
from .dataset import Dataset


def load(*, seed: int = 0) -> Dataset:
    """1,797 rows x 64: grey levels 0 to 16, dequantised, (level + U[0, 1)) / 17; 80 / 10 / 10 % at random.

    seed: of split and noise. Raises ImportError without scikit-learn.
    """
    levels, digits = sklearn_datasets("digits").load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(levels))
    rows = torch.from_numpy(((levels + rng.random(levels.shape)) / 17.0).astype(np.float32)[order])
    classes = torch.from_numpy(digits.astype(np.int64)[order])
    held = len(rows) // 10
    sizes = [len(rows) - 2 * held, held, held]
    train, val, test = rows.split(sizes)
    labels = dict(zip(("train_labels", "val_labels", "test_labels"), classes.split(sizes)))
    return Dataset("digits", train, val, test, **labels)
