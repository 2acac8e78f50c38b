"""One process at a time trains in a folder; another one is told who is at it.

The lock is the system's (flock) on a small file that says who holds it. The system lets go of it when its holder ends,
however it ends, so what a killed process leaves behind is taken over without asking.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ContextManager, Iterator

from ..warn import warn
from .checkpoint import CheckpointError
from .distributed import on_rank_0

_NAME = "lock.json"
_NOT_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # file systems without locks
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)  # where nothing can be written, nothing can be overwritten


class FolderInUseError(CheckpointError):
    """Another process trains in the folder; the message has its number, its machine and since when."""


@dataclass
class _Held:
    """A lock of this process. descriptor: None where the file system has no locks.  holders: how many of the thread's
    calls, one inside the other, rely on it."""

    descriptor: int | None
    process: int
    thread: int
    holders: int = 1


_held: dict[Path, _Held] = {}
_guard = threading.Lock()


def locked_folder(folder: str | Path | None) -> ContextManager[None]:
    """Hold the folder for this process, and make it where it is not there; None holds nothing.

    Calls of the same thread may be one inside the other. With torch.distributed rank 0 holds it for all ranks. Raises
    FolderInUseError, at once, where another process or thread holds it.
    """
    return nullcontext() if folder is None else _locked(Path(folder) / _NAME)


def locked_file(path: str | Path | None) -> ContextManager[None]:
    """`locked_folder` for a single checkpoint file."""
    return nullcontext() if path is None else _locked(Path(f"{path}.lock"))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path = Path(os.path.realpath(path))
    on_rank_0(lambda: _acquire(path))
    try:
        yield
    finally:
        _release(path)


def _acquire(path: Path) -> None:
    me = os.getpid(), threading.get_ident()
    with _guard:
        held = _held.get(path)
        if held is not None and held.process == me[0]:  # else it is a copy, made by fork, of the parent's
            if held.thread != me[1]:
                raise FolderInUseError(f"another thread of this process ({me[0]}) trains in {path.parent}; wait for it")
            held.holders += 1
            return
        _held[path] = _Held(_lock(path), *me)


def _release(path: Path) -> None:
    with _guard:
        held = _held.get(path)
        if held is None or held.process != os.getpid():
            return
        held.holders -= 1
        if held.holders == 0:
            del _held[path]
            if held.descriptor is not None:
                if _is_at(path, held.descriptor):  # and not another's, where somebody deleted the folder meanwhile
                    path.unlink()  # before the lock goes: who opened this file already sees that it is gone
                os.close(held.descriptor)


def _lock(path: Path) -> int | None:
    """A descriptor of the lock file, locked, with our name in it."""
    try:
        import fcntl
    except ImportError:  # no POSIX system
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno in _NOT_OURS:
                return None
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):  # else its holder removed it after we opened it
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_myself()).encode())
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise FolderInUseError(_message(path)) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NOT_HERE:
                raise
            path.unlink(missing_ok=True)
            warn(f"{path.parent} is on a file system without locks ({error}): let one process at a time train there")
            return None


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that the path names."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _myself() -> dict[str, object]:
    return {
        "pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", timespec="seconds"),
        "command": shlex.join(sys.argv)[:200],
    }  # fmt: skip


def _message(path: Path) -> str:
    who = "another process"
    for _ in range(10):  # its holder may be about to write its name
        try:
            facts = json.loads(path.read_text())
            who = f"process {facts['pid']} on {facts['host']}, since {facts['since']} ({facts['command']}),"
            break
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.02)
    return f"{who} trains in {path.parent}; wait for it or end it, or choose another folder"
