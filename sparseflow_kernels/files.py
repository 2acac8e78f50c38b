"""Where downloaded, derived and measured data live, and how files get there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator


class ChecksumError(ValueError):
    """A cached or downloaded file is not the one that was pinned."""


def cache_dir() -> Path:
    """The cache folder, not necessarily existing: SPARSEFLOW_CACHE, or `sparseflow` in the platform's cache folder."""
    chosen = os.environ.get("SPARSEFLOW_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sparseflow"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place when the block ends well, and is removed if
    not. Readers see the old file, the new one, or none, never a part."""
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


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, expected: str) -> None:
    """Raises ChecksumError unless the file's sha256 is `expected`."""
    found = sha256(path)
    if found != expected:
        raise ChecksumError(f"{path} has sha256 {found}, expected {expected}; delete the file and fetch it again")
