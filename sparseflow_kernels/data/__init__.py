"""Data sets by name: generated toys and mixtures, what comes with scikit-learn, POWER and MNIST on request, MAF's
tables, Fashion-MNIST and CIFAR-10 from files."""

from __future__ import annotations

from typing import Any, Callable

from . import digits, images, maf, mixture, photos, power, toy
from ..files import ChecksumError, DamagedFileError, cache_dir
from .dataset import Dataset

LOADERS: dict[str, Callable[..., Dataset]] = {
    **{name: (lambda name=name, **options: toy.load(name, **options)) for name in toy.TOYS},
    "digits": digits.load,
    "digits_images": digits.load_images,
    **{name: (lambda name=name, **options: images.load(name, **options)) for name in images.SHAPES},
    "photos": photos.load,
    "photo_crops": photos.load_crops,
    "power": power.load,
    **{name: (lambda name=name, **options: maf.load(name, **options)) for name in maf.SPLITS if name != "power"},
    **{f"mixture{dim}": (lambda dim=dim, **options: mixture.load(dim, **options)) for dim in (8, 21, 43)},
}


def load(name: str, **options: Any) -> Dataset:
    """The data set `name`, one of `LOADERS`; options are the loader's (seed, n, rows, download, folder).

    Raises ValueError for an unknown name, TypeError for an option the loader does not have.
    """
    if name not in LOADERS:
        raise ValueError(f"name must be one of {', '.join(LOADERS)}; got {name!r}")
    return LOADERS[name](**options)


__all__ = ["LOADERS", "ChecksumError", "DamagedFileError", "Dataset", "cache_dir", "load"]
