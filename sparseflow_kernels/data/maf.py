"""The five tabular benchmarks of MAF (Papamakarios et al. 2017) from its public files, with MAF's own preprocessing.

The files are those of https://zenodo.org/record/1161203 (data.tar.gz, 817 MB), unpacked into a folder:
power/data.npy, gas/ethylene_CO.pickle, hepmass/1000_train.csv and 1000_test.csv, miniboone/data.npy,
BSDS300/BSDS300.hdf5. Nothing is downloaded here. The folder is the argument, or what SPARSEFLOW_MAF names, or `maf` in
the cache.

Columns and rows are checked against the published splits. GAS needs pandas, BSDS300 h5py.
"""

from __future__ import annotations

import functools
import os
import pickle
from pathlib import Path
from typing import Callable

import numpy as np
import torch

from ..files import DamagedFileError, cache_dir
from .dataset import Dataset

SOURCE = "https://zenodo.org/record/1161203 (data.tar.gz)"
SPLITS = {  # dimensions; rows of train, validation and test
    "power": (6, 1_659_917, 184_435, 204_928),
    "gas": (8, 852_174, 94_685, 105_206),
    "hepmass": (21, 315_123, 35_013, 174_987),
    "miniboone": (43, 29_556, 3_284, 3_648),
    "bsds300": (63, 1_000_000, 50_000, 250_000),
}
"""Of the published data sets."""
FILES = {
    "power": ("power/data.npy",), "gas": ("gas/ethylene_CO.pickle",),
    "hepmass": ("hepmass/1000_train.csv", "hepmass/1000_test.csv"), "miniboone": ("miniboone/data.npy",),
    "bsds300": ("BSDS300/BSDS300.hdf5",),
}  # fmt: skip

Splits = tuple[np.ndarray, np.ndarray, np.ndarray]


def default_folder() -> Path:
    return Path(os.environ["SPARSEFLOW_MAF"]).expanduser() if "SPARSEFLOW_MAF" in os.environ else cache_dir() / "maf"


def load(name: str, *, folder: str | Path | None = None) -> Dataset:
    """One of `SPLITS`. Raises FileNotFoundError, with where to get it, for files that are not there, DamagedFileError
    for others than the published ones, ImportError without the library that reads them."""
    return _load(name, Path(folder) if folder is not None else default_folder())


@functools.lru_cache(maxsize=1)  # a run asks several times, and reading a CSV of gigabytes takes a minute
def _load(name: str, folder: Path) -> Dataset:
    missing = [file for file in FILES[name] if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{name.upper()} needs {' and '.join(missing)} in {folder}: get it from {SOURCE}, unpack it, and name the "
            "folder that has power/, gas/, ... by SPARSEFLOW_MAF"
        )
    paths = [folder / file for file in FILES[name]]
    parts = _READERS[name](*paths)
    dim, *rows = SPLITS[name]
    found = [list(part.shape) for part in parts]
    if found != [[n, dim] for n in rows]:
        raise DamagedFileError(
            f"{paths[0].parent}: train, validation and test come to {found}, the published {name.upper()} has "
            f"{[[n, dim] for n in rows]}: the files are cut short, or other ones; get them anew from {SOURCE}"
        )
    return Dataset(name, *(torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32)) for part in parts))


# ------------------------------------------------------------------------------------------------------ preprocessing


def _tenths(data: np.ndarray) -> Splits:
    """The last tenth is the test set, the last tenth of the rest the validation set."""
    test = len(data) // 10
    val = (len(data) - test) // 10
    rest = len(data) - test
    return data[: rest - val], data[rest - val : rest], data[rest:]


def _by_train_and_val(parts: Splits) -> Splits:
    train, val, _ = parts
    both = np.concatenate((train, val))
    mean, std = both.mean(0), both.std(0)
    return tuple((part - mean) / std for part in parts)  # type: ignore[return-value]


def _array(path: Path, columns: int) -> np.ndarray:
    try:
        data = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DamagedFileError(f"{path} is no .npy file of numbers ({error}); get it anew from {SOURCE}") from error
    if data.ndim != 2 or data.shape[1] != columns or data.dtype.kind != "f":
        raise DamagedFileError(f"{path} must hold real numbers [rows, {columns}], not {data.dtype} {list(data.shape)}")
    return data.astype(np.float64)


def power(path: Path) -> Splits:
    """Columns 1 and 3 dropped, shuffled by RandomState(42), uniform noise of a unit of resolution, z-scores by train
    and validation."""
    rng, data = np.random.RandomState(42), _array(path, 8)
    rng.shuffle(data)
    data, n = np.delete(data, (1, 3), axis=1), len(data)
    voltage, active, meters = 0.01 * rng.rand(n, 1), 0.001 * rng.rand(n, 1), rng.rand(n, 3)
    return _by_train_and_val(_tenths(data + np.hstack([active, voltage, meters, np.zeros((n, 1))])))


def gas(path: Path) -> Splits:
    """Meth, Eth and Time dropped, then the first column that correlates above 0.98 with another one until none does;
    z-scores by all rows."""
    frame = _frame(path)
    try:
        data = frame.drop(columns=["Meth", "Eth", "Time"]).to_numpy(dtype=np.float64)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFileError(f"{path} is no table with columns Meth, Eth, Time and numbers ({error})") from error
    while True:
        several = (np.corrcoef(data, rowvar=False) > 0.98).sum(1) > 1
        if not several.any():
            break
        data = np.delete(data, int(np.argmax(several)), axis=1)
    return _tenths((data - data.mean(0)) / data.std(0, ddof=1))


def hepmass(train_path: Path, test_path: Path) -> Splits:
    """Rows of class 1 without the label, and without the last column of the test file, which is broken; z-scores by the
    training file; columns whose least value occurs more than 5 times are dropped (MAF's test for discrete ones)."""
    train, test = _signal(train_path), _signal(test_path)[:, :-1]
    if train.shape[1] != test.shape[1]:
        raise DamagedFileError(
            f"{test_path} has {test.shape[1]} features where {train_path.name} has {train.shape[1]}; get both from "
            f"{SOURCE}"
        )
    mean, std = train.mean(0), train.std(0, ddof=1)
    train, test = (train - mean) / std, (test - mean) / std
    kept = (train == train.min(0)).sum(0) <= 5
    train, test = train[:, kept], test[:, kept]
    val = len(train) // 10
    return train[: len(train) - val], train[len(train) - val :], test


def miniboone(path: Path) -> Splits:
    """z-scores by train and validation."""
    return _by_train_and_val(_tenths(_array(path, SPLITS["miniboone"][0])))


def bsds300(path: Path) -> Splits:
    """As it is."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("BSDS300 is an HDF5 file: pip install h5py") from error
    try:
        with h5py.File(path, "r") as file:
            return tuple(file[part][:] for part in ("train", "validation", "test"))  # type: ignore[return-value]
    except (OSError, KeyError) as error:
        raise DamagedFileError(f"{path} is no HDF5 file with train, validation and test ({error})") from error


_READERS: dict[str, Callable[..., Splits]] = {
    "power": power, "gas": gas, "hepmass": hepmass, "miniboone": miniboone, "bsds300": bsds300,
}


def _signal(path: Path) -> np.ndarray:
    """float64 [rows of class 1, features] of a HEPMASS file: a header, and the label first."""
    with open(path, encoding="ascii", errors="replace") as file:
        columns = len(file.readline().split(","))
        try:
            data = np.loadtxt(file, delimiter=",", usecols=range(columns), comments=None, ndmin=2)
        except (ValueError, IndexError) as error:
            raise DamagedFileError(f"{path} is not a table of {columns} numbers a row ({error})") from error
    return data[data[:, 0] == 1.0][:, 1:] if data.size else np.empty((0, max(0, columns - 1)))


# A pickle can run code. These are the names that a table of numbers is made of, and nothing else is let through.
_ALLOWED = {
    "numpy": {"ndarray", "dtype", "_reconstruct", "_frombuffer", "scalar"},
    "pandas": {
        "DataFrame", "BlockManager", "Index", "Int64Index", "Float64Index", "RangeIndex", "_new_Index",
        "_unpickle_block", "FloatBlock", "IntBlock", "NumericBlock", "BlockPlacement", "__pyx_unpickle_BlockPlacement",
        "StringDtype", "ArrowStringArray", "StringArray", "ObjectBlock", "__pyx_unpickle_NDArrayBacked",
    },
    "builtins": {"slice", "object"}, "copyreg": {"_reconstructor"}, "copy_reg": {"_reconstructor"},
    "_codecs": {"encode"}, "__builtin__": {"slice", "object"},
}  # fmt: skip


_UNREADABLE = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, ValueError, TypeError)


def _frame(path: Path):
    try:
        from pandas.compat.pickle_compat import Unpickler
    except ImportError as error:
        raise ImportError("GAS is a table that pandas wrote: pip install pandas") from error

    class Restricted(Unpickler):
        def find_class(self, module: str, name: str):
            if name not in _ALLOWED.get(module.split(".")[0], ()):
                raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no part of a table of numbers")
            return super().find_class(module, name)

    try:
        with open(path, "rb") as file:
            return Restricted(file, encoding="latin1").load()
    except _UNREADABLE as error:
        raise DamagedFileError(
            f"{path} cannot be read as a table of numbers ({error}); get it from {SOURCE}"
        ) from error
