"""Pickles of arrays. A pickle can run code: here it can make numpy's arrays, and Python's own containers and numbers,
and nothing else."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any, BinaryIO

from ..files import DamagedFileError

_ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
    (f"numpy.{core}.{module}", name) for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
}  # fmt: skip
_UNREADABLE = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, ValueError, TypeError, MemoryError,
)  # fmt: skip


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no part of an array of numbers")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_pickle(file: BinaryIO | gzip.GzipFile, path: Path, remedy: str, encoding: str = "ASCII") -> Any:
    """What the pickle holds, of arrays, containers and numbers. encoding: of strings that Python 2 wrote.
    Raises DamagedFileError, with the path and the remedy, for everything else; zlib's and OSErrors pass."""
    try:
        return _Restricted(file, encoding=encoding).load()
    except _UNREADABLE as error:
        raise DamagedFileError(f"{path} cannot be read as arrays of numbers ({error}); {remedy}") from error
