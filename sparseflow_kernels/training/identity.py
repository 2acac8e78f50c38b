"""What a run is known by, so that a checkpoint of another one is refused with what differs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Sequence

import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..flows import NeuralODE
from .checkpoint import CheckpointError


def plain(value: Any) -> Any:
    """A value as it comes back from JSON, so that it compares equal; what JSON has no word for by its repr."""
    return json.loads(json.dumps(value, default=repr))


def fingerprint(data: Dataset | Tensor, labelled: bool = False) -> dict[str, Any]:
    """Name, number and sha256 of the training and validation rows; labelled: and of their labels."""
    rows = [data.train, data.val] if isinstance(data, Dataset) else [data]
    labels = [data.train_labels, data.val_labels] if labelled else []
    digest = hashlib.sha256()
    for part in [*rows, *(known for known in labels if known is not None)]:
        digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    name = data.name if isinstance(data, Dataset) else None
    return {"name": name, "rows": [len(part) for part in rows], "sha256": digest.hexdigest()}


def solver_settings(flow: NeuralODE) -> dict[str, Any]:
    """What of a flow is not in its state dict and decides how it trains."""
    names = ("divergence", "noise", "t0", "t1", "rtol", "atol", "method", "options", "gradient")
    later = ("penalties",)  # what flows of earlier versions had not: told where it is there
    found = {name: getattr(flow, name) for name in names if hasattr(flow, name)}
    return plain(found | {name: value for name in later if (value := getattr(flow, name, None))})


def check_identity(path: Path, found: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """Raises CheckpointError, naming what differs, unless a checkpoint is of the run wanted."""
    if found != wanted:
        found = found or {}
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise another_run(f"{path} is of another run", differing, found, wanted)


def another_run(what: str, differing: Sequence[str], theirs: dict[str, Any], ours: dict[str, Any]) -> CheckpointError:
    """The error that says what differs, and how."""
    details = [text for name in differing for text in _differences(name, theirs.get(name), ours.get(name))]
    return CheckpointError(
        f"{what} (differing: {', '.join(sorted(differing))}): {'; '.join(details)}; choose another folder, or delete "
        "it to start anew"
    )


def _differences(name: str, theirs: Any, ours: Any) -> list[str]:
    """In words, one for each part that differs."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        if theirs.keys() == ours.keys() == {"name", "rows", "sha256"}:  # of `fingerprint`
            return [f"it was trained on other data, {_rows(theirs)}, not on {_rows(ours)}"]
        keys = [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
        return [text for key in keys for text in _differences(key, theirs.get(key), ours.get(key))]
    return [f"{name} was {theirs!r} and is now {ours!r}"]


def _rows(facts: dict[str, Any]) -> str:
    return f"{' + '.join(map(str, facts['rows']))} rows of {facts['name'] or 'a tensor'} (sha256 {facts['sha256'][:8]})"
