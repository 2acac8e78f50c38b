"""Where downloaded, derived and measured data live, and how files get there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np
import platformdirs


class DamagedFileError(ValueError):
    """A file does not hold what its name promises."""


class ChecksumError(DamagedFileError):
    """A cached or downloaded file is not the one that was pinned, or not the one that was written."""


def cache_dir() -> Path:
    """The cache folder, not necessarily existing: SPARSEFLOW_CACHE, or `sparseflow` in the platform's cache folder."""
    chosen = os.environ.get("SPARSEFLOW_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return platformdirs.user_cache_path("sparseflow", appauthor=False)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place when the block ends well, and is removed if
    not. Readers see the old file, the new one, or none, never a part. Where the process is killed meanwhile a file
    whose name begins with a dot stays, which nobody reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would hide a shared cache from others
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """The value as JSON with a last newline, whole or not at all; indent None: on one line."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """What the JSON file holds. Raises OSError, or DamagedFileError with the remedy for a file that is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
        raise DamagedFileError(f"{path} is damaged, no readable JSON ({error}); {remedy}") from error


def read_arrays(path: Path, names: Sequence[str], remedy: str) -> dict[str, np.ndarray]:
    """These arrays of an .npz file. Raises FileNotFoundError, or DamagedFileError with the remedy for a file that is no
    .npz file, is cut short or changed (a zip file has a checksum of every member), lacks an array, or holds Python
    objects in one."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is a folder, not an .npz file' if path.is_dir() else 'does not exist'}")
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                found = [name.removesuffix(".npy") for name in archive.namelist()]
            missing = sorted(set(names) - set(found))
            if missing:
                raise DamagedFileError(
                    f"{path} has no array {', '.join(missing)}; it has {', '.join(found) or 'none'}; {remedy}"
                )
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: _array(path, arrays, name, remedy) for name in names}
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a place outside the file is
                raise
            raise DamagedFileError(f"{path} is no .npz file, or a damaged one ({error}); {remedy}") from error


def _array(path: Path, arrays: Any, name: str, remedy: str) -> np.ndarray:
    try:
        found = arrays[name]
        if not isinstance(found, np.ndarray):
            raise ValueError("not one of numpy's arrays")
        return found
    except ValueError as error:
        what = "holds Python objects, not numbers" if "allow_pickle" in str(error) else f"is damaged ({error})"
        raise DamagedFileError(f"{path}: array {name} {what}; {remedy}") from error


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, expected: str) -> None:
    """Raises ChecksumError unless the file's sha256 is `expected`."""
    found = sha256(path)
    if found != expected:
        raise ChecksumError(f"{path} has sha256 {found}, expected {expected}; delete the file and fetch it again")
