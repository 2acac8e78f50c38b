"""How a suite of measurements is run within a time budget, so that nothing measured is lost: items in order of weight, a
result file that is whole after every item, and a supervisor that goes on behind a crash or a hang. Knows nothing of GPUs.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

FORMAT = 1
LOST = 3  # exit code of a process that cannot go on, but whose successor can
SETTLED = ("done", "hung", "crashed")  # a rerun leaves these alone: the last two would only happen again

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_DEATH_SIGNAL = 1  # Linux's PR_SET_PDEATHSIG

Sections = dict[str, Any]  # parts of the result file: lists are added to, dicts are updated


@dataclass(frozen=True)
class Item:
    """A measurement. name: parts joined by "/".  run: allowance in seconds -> what it found; lists of dicts in it may
    have entries with "failed" or "skipped", a reason.  weight: its share of the time among the items that are left.
    least: seconds below which it is not begun.  reserve: seconds that earlier items leave to it."""

    name: str
    run: Callable[[float], Sections]
    weight: float = 1.0
    least: float = 2.0
    reserve: float = 0.0


class Budget:
    """Seconds from now."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.end = clock() + seconds

    def left(self) -> float:
        return self.end - self.clock()


def slug(name: str) -> str:
    """A name that files can have: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "device"


class Results:
    """The result file: `document` holds sections, and under "items" what became of every item. Entries of lists carry
    the name of the item they came from, so that a repeated item replaces its own."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path, self.document = path, document

    @staticmethod
    def open(path: Path, resume: bool, about: dict[str, Any]) -> "Results":
        """A new file, or with `resume` the one that is there. `about`: what a new file says of itself. Raises ValueError
        for a file that is none of ours, or of another kind (a dry run's)."""
        if resume and path.exists():
            results = Results.load(path)
            for key, value in about.items():
                if results.document.get(key) != value:
                    found = f"{key} is {results.document.get(key)!r}, this run's is {value!r}"
                    raise ValueError(f"{path}: {found}; move the file away")
            return results
        path.parent.mkdir(parents=True, exist_ok=True)
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        results = Results(path, {"format": FORMAT, **about, "started": started, "items": {}, "running": None})
        results.save()
        return results

    @staticmethod
    def load(path: Path) -> "Results":
        try:
            document = json.loads(path.read_text())
            if document["format"] != FORMAT or not isinstance(document["items"], dict):
                raise KeyError(f"format {document['format']}")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result of bench/gpu.py: {error!r}") from error
        return Results(path, document)

    def save(self) -> None:
        """The old file or the new one is there at any time, whole."""
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with open(beside, "w") as file:
            json.dump(self.document, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)

    def forget(self, names: Iterable[str]) -> None:
        """What became of these items; their entries stay until others take their place."""
        for name in names:
            self.document["items"].pop(name, None)
        self.save()

    def settled(self, name: str) -> bool:
        return self.document["items"].get(name, {}).get("status") in SETTLED

    def begin(self, name: str, limit: float) -> None:
        self.document["running"] = {"item": name, "since": time.time(), "limit": limit}
        self.save()

    def end(self, name: str, status: str, reason: str = "", seconds: float = 0.0, found: Sections | None = None) -> None:
        entry: dict[str, Any] = {"status": status, "seconds": round(seconds, 2)}
        if reason:
            entry["reason"] = reason
        self.document["items"][name] = entry
        self.document["running"] = None
        if found is not None:
            self._merge(name, found)
        self.save()

    def _merge(self, name: str, found: Sections) -> None:
        for section, value in found.items():
            if isinstance(value, list):
                others = [entry for entry in self.document.get(section, []) if entry.get("item") != name]
                self.document[section] = others + [{"item": name, **entry} for entry in value]
            elif isinstance(value, dict):
                self.document[section] = {**self.document.get(section, {}), **value}
            else:
                raise TypeError(f"item {name!r}: section {section!r} must be a list or a dict, not {type(value).__name__}")

    def failures(self) -> list[str]:
        """One line for every item, or entry of one, that failed."""
        bad, items = ("failed", "hung", "crashed"), self.document["items"].items()
        lines = [f"{name}: {e['status']}: {e.get('reason', '')}" for name, e in items if e["status"] in bad]
        return lines + self._reasons("failed")

    def skipped(self) -> list[str]:
        items = self.document["items"].items()
        lines = [f"{name}: {entry.get('reason', '')}" for name, entry in items if entry["status"] == "skipped"]
        return lines + self._reasons("skipped")

    def _reasons(self, kind: str) -> list[str]:
        return [f"{entry['item']}: {_label(entry)}{entry[kind]}" for entry in self._entries() if entry.get(kind)]

    def _entries(self) -> Iterable[dict[str, Any]]:
        for value in self.document.values():
            if isinstance(value, list):
                yield from (entry for entry in value if isinstance(entry, dict) and "item" in entry)


def _label(entry: dict[str, Any]) -> str:
    words = [str(entry[key]) for key in ("engine", "task") if entry.get(key)]
    return " ".join(words) + ": " if words else ""


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def chosen(items: Sequence[Item], only: Sequence[str]) -> list[Item]:
    """The items whose name is, or begins with the parts of, one of `only` (all if empty). Raises ValueError for a name
    that chooses nothing."""

    def wanted(item: Item, name: str) -> bool:
        return item.name == name or item.name.startswith(name.rstrip("/") + "/")

    for name in only:
        if not any(wanted(item, name) for item in items):
            known = ", ".join(dict.fromkeys("/".join(item.name.split("/")[:2]) for item in items))
            raise ValueError(f"--only: {name!r} chooses nothing; there are {known}, and their parts")
    return [item for item in items if not only or any(wanted(item, name) for name in only)]


def run_items(
    items: Sequence[Item], results: Results, budget: Budget, tell: Callable[[int, str], None],
    lost: Callable[[], str | None] = lambda: None,
) -> str | None:  # fmt: skip
    """Run what is not settled yet, in order, as the budget allows. Every failure is recorded and the next item is run.

    tell: (items behind us, a line).  lost: asked after a failure; a reason why this process cannot go on, or None.
    Returns that reason, or None when the end of the list was reached.
    """
    for place, item in enumerate(items):
        if results.settled(item.name):
            tell(place + 1, f"{item.name}: kept from an earlier run")
            continue
        later = [other for other in items[place + 1 :] if not results.settled(other.name)]
        free = budget.left() - sum(other.reserve for other in later)
        least = min(item.least, item.reserve or item.least)
        if free < least:
            reason = f"time budget: {max(free, 0):.0f} s are left for it, it is not begun below {least:.0f} s"
            results.end(item.name, "skipped", reason)
            tell(place + 1, f"{item.name}: skipped, {reason}")
            continue
        share = item.weight / (item.weight + sum(other.weight for other in later if not other.reserve))
        allowance = min(free, max(min(item.least, 20.0), item.reserve, free * share))
        results.begin(item.name, 60 + 2 * allowance)
        before = budget.left()
        try:
            found = item.run(allowance)
        except Exception as error:
            status, reason, found = "failed", first_line(error), None
        else:
            entries = [entry for value in found.values() if isinstance(value, list) for entry in value]
            whole = not any(entry.get("failed") or entry.get("skipped") for entry in entries)
            status, reason = "done" if whole else "partial", ""
        seconds = before - budget.left()
        obstacle = lost() if found is None or any(entry.get("failed") for entry in entries) else None
        if obstacle is not None:  # what cost this process its device would cost the next one its own
            status, reason = "crashed", obstacle
        results.end(item.name, status, reason, seconds, found)
        tell(place + 1, f"{item.name}: {_summary(found) if found is not None and obstacle is None else f'{status}, {reason}'}")
        if obstacle is not None:
            return obstacle
    return None


def _summary(found: Sections) -> str:
    """What a line can hold of an item's findings."""
    words = []
    for row in found.get("rows", []):
        if row.get("median"):
            ratio = f", {row['ratio']:.3g}x torchdiffeq" if row.get("ratio") else ""
            words.append(f"{row['engine']} {row['task']} {row['median'] * 1e3:.4g} ms, {row['nfe']} NFE{ratio}")
        else:
            words.append(f"{row['engine']} {row['task']} {row.get('failed') or row.get('skipped')}")
    for section, value in found.items():
        if isinstance(value, dict):
            words += [f"{key} {number:.4g}" for key, number in value.items() if isinstance(number, (int, float))]
        elif section != "rows":
            words.append(f"{len(value)} x {section}")
    return "; ".join(words) or "done"


def end_with_parent() -> None:
    """In a child, before it becomes another program (`preexec_fn`): a parent that is killed takes it along."""
    if _LIBC is not None:
        _LIBC.prctl(_DEATH_SIGNAL, signal.SIGKILL)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A request to end (SIGTERM, SIGHUP) is an exception within, so that what was started is ended too."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread, and so do their handlers
        return

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def supervise(
    command: Callable[[float], Sequence[str]], path: Path, budget: Budget, say: Callable[[str], None],
    poll: float = 1.0, grace: float = 60.0,
) -> int:  # fmt: skip
    """Run a worker process that runs the items, and another one when it crashed, hung or lost its device. Returns the
    exit code of the last one, 1 if one was ended. No worker outlives this process.

    command: the time (`time.time`) of the budget's end -> the worker's command line, which must resume.  path: the result file.
    grace: seconds beyond the budget until a worker is ended in any case.
    """
    with _ended_by_signals():
        return _supervise(command, path, budget, say, poll, grace)


def _supervise(
    command: Callable[[float], Sequence[str]], path: Path, budget: Budget, say: Callable[[str], None], poll: float,
    grace: float,
) -> int:  # fmt: skip
    ended = False
    while True:
        process = subprocess.Popen(
            command(time.time() + budget.left()), start_new_session=True, preexec_fn=end_with_parent
        )
        try:
            reason = None
            while reason is None:
                try:
                    process.wait(poll)
                    break
                except subprocess.TimeoutExpired:
                    reason = _overdue(path, budget, grace)
            _kill(process)
        except BaseException:
            _kill(process)
            raise
        code = process.returncode
        running = Results.load(path).document["running"] if path.exists() else None
        if code in (0, 1, 2) and running is None:
            return 1 if ended and code == 0 else code
        ended = True
        if running is not None:
            status = "hung" if reason else "crashed"
            ended_by = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with code {code}"
            what = reason or f"the process {ended_by}"
            Results.load(path).end(running["item"], status, what, time.time() - running["since"])
            say(f"{running['item']}: {status}: {what}")
        elif code != LOST:
            say(f"the measuring process left with code {code}")
            return 1
        if budget.left() < 10:
            say("no time is left for another process; --resume goes on from here")
            return 1
        say("going on in a new process")


def _overdue(path: Path, budget: Budget, grace: float) -> str | None:
    try:
        running = Results.load(path).document["running"]
    except (OSError, ValueError):
        running = None
    if running is not None and time.time() - running["since"] > running["limit"]:
        return f"no end after {running['limit']:.0f} s"
    return f"no end {grace:.0f} s after the time budget" if budget.left() < -grace else None


def _kill(process: subprocess.Popen) -> None:
    """The worker and what it started."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
