"""Two photographs that are always at hand, as 8x8 grey patches by BSDS300's recipe and in its shape (63-d), and as
3x32x32 crops, CIFAR-10's shape.

The photographs come with scikit-learn; see ATTRIBUTION.md beside this file for the photographers and the licence.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._sklearn import sklearn_datasets
from .dataset import Dataset

PATCH = 8
CROP, STRIDE = 32, 8


def load(*, seed: int = 0, rows: int | None = None) -> Dataset:
    """All 531,720 overlapping 8x8 patches x 63 (or `rows` of them at random, about the same share of every split).

    A patch is (grey level + U[0, 1)) / 256 with noise of its own, less the patch's mean; the last pixel is dropped, as
    it follows from the others. Split by place: of each photograph's patch columns the left 80 % are train, the next
    10 % val, the rest test, so that test patches are of scenery not trained on; patches within 7 columns of a border
    share pixels across it.
    seed: of noise and choice of rows. Raises ImportError without scikit-learn and pillow, ValueError for rows out of
    range.
    """
    rng = np.random.default_rng(seed)
    splits: list[list[np.ndarray]] = [[], [], []]
    for image in _photographs("photos"):
        grey = np.rint(image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
        windows = np.lib.stride_tricks.sliding_window_view(grey, (PATCH, PATCH))
        width = windows.shape[1]
        borders = [0, width * 8 // 10, width * 9 // 10, width]
        for part, start, stop in zip(splits, borders, borders[1:]):
            part.append(windows[:, start:stop].reshape(-1, PATCH * PATCH))
    parts = [np.concatenate(part) for part in splits]
    total = sum(map(len, parts))
    if rows is not None:
        if not 30 <= rows <= total:
            raise ValueError(f"rows must be between 30 and {total:,}, or None for all; got {rows}")
        parts = [part[rng.choice(len(part), max(1, len(part) * rows // total), replace=False)] for part in parts]
    train, val, test = (_dequantise(part, rng) for part in parts)
    return Dataset("photos", train, val, test)


def load_crops(*, seed: int = 0) -> Dataset:
    """Crops of 3x32x32 at every eighth pixel, as rows of whole levels 0 to 255, shuffled by the seed: 6,100 train, 300
    val, 600 test. Those whose pixels are all in the left 80 % of a photograph are train, all in the next 8 % val, all
    in the rest test, so that no pixel is in two of them. Raises ImportError without scikit-learn and pillow."""
    rng = np.random.default_rng(seed)
    splits: list[list[np.ndarray]] = [[], [], []]
    for image in _photographs("photo_crops"):
        width = image.shape[1]
        borders = [0, width * 80 // 100, width * 88 // 100, width]
        for part, start, stop in zip(splits, borders, borders[1:]):
            windows = np.lib.stride_tricks.sliding_window_view(image[:, start:stop], (CROP, CROP), axis=(0, 1))
            part.append(windows[::STRIDE, ::STRIDE].reshape(-1, 3 * CROP * CROP))
    parts = [np.concatenate(part) for part in splits]
    train, val, test = (torch.from_numpy(part[rng.permutation(len(part))].astype(np.float32)) for part in parts)
    return Dataset("photo_crops", train, val, test, shape=(3, CROP, CROP), levels=256)


def _photographs(needed_for: str) -> list[np.ndarray]:
    """uint8 [height, width, 3]"""
    datasets = sklearn_datasets(needed_for)
    try:
        return [datasets.load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    except ImportError as error:
        raise ImportError(
            f"data set {needed_for!r} needs pillow to read the photographs: pip install pillow"
        ) from error


def _dequantise(levels: np.ndarray, rng: np.random.Generator) -> Tensor:
    values = levels.astype(np.float32)
    values += rng.random(values.shape, dtype=np.float32)
    values /= 256.0
    values -= values.mean(1, keepdims=True)
    return torch.from_numpy(np.ascontiguousarray(values[:, :-1]))
