"""What training takes for its data, as rows in memory."""

from __future__ import annotations

from typing import Any, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..data.dataset import Dataset
from ..finite import refuse_not_finite

Rows = Tensor | np.ndarray | TorchDataset | DataLoader
Data = Dataset | Rows | tuple[Rows, Rows]
_NEEDED = (
    "rows [n, dim]: a tensor, a numpy array, a dataset or DataLoader of torch's that gives rows (or tuples that begin "
    "with them), a pair of these (training rows, validation rows), or a sparseflow_kernels.data.Dataset"
)


def as_dataset(data: Data) -> Dataset:
    """The data with their splits; what is not given has no rows. A Dataset is returned as it is.

    A dataset or DataLoader of torch's is read once, all of it, in its own order, and kept in memory: `train` shuffles
    and batches rows itself, so that a training can go on bit for bit. Random augmentations are therefore drawn once.
    Raises TypeError for other data, ValueError for rows of more or fewer axes than two, or that are no numbers.
    """
    if isinstance(data, Dataset):
        return data
    train, val = data if isinstance(data, (tuple, list)) and len(data) == 2 else (data, None)
    rows = _read(train, "data" if val is None else "data's training rows")
    validation = rows[:0] if val is None else _read(val, "data's validation rows")
    return Dataset("rows", rows, validation, rows[:0])


def batch_of(data: Data) -> dict[str, int]:
    """A DataLoader's batch size, as a setting of the training; nothing for other data."""
    first = data[0] if isinstance(data, (tuple, list)) and data else data
    size = first.batch_size if isinstance(first, DataLoader) else None
    return {} if size is None else {"batch": size}


def _read(data: Any, what: str) -> Tensor:
    if isinstance(data, np.ndarray):
        if data.dtype.kind not in "fiu":
            raise ValueError(f"{what}: numpy's {data.dtype} is no number to train on; convert it to float32")
        data = torch.from_numpy(np.ascontiguousarray(data))
    elif isinstance(data, TorchDataset):
        data = _gathered(DataLoader(data, batch_size=1024), what)
    elif isinstance(data, DataLoader):
        data = _gathered(data, what)
    if not isinstance(data, Tensor):
        raise TypeError(f"{what}: must be {_NEEDED}; got {type(data).__name__}")
    if data.ndim != 2:
        raise ValueError(f"{what}: must be [n, dim], one row a sample, got {list(data.shape)}; flatten the samples")
    return data.detach()


def _gathered(batches: Iterable[Any], what: str) -> Tensor:
    parts = []
    for batch in batches:
        rows = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(rows, Tensor):
            raise TypeError(f"{what}: gives {type(batch).__name__}; it must give rows, or tuples that begin with rows")
        parts.append(rows)
    if not parts:
        raise ValueError(f"{what}: gives no rows")
    return torch.cat(parts)


def check_rows(rows: Tensor, what: str, dim: int | None = None) -> None:
    """Raises ValueError unless rows are [n, dim] and finite; `what` names them."""
    if rows.ndim != 2 or (dim is not None and rows.shape[1] != dim):
        raise ValueError(f"{what} must be [n, {'dim' if dim is None else dim}], got {list(rows.shape)}")
    refuse_not_finite(rows, what)
