"""What training shares between processes when torch.distributed is initialised (torchrun); trivial when it is not.

`train` and `sparse_flow` need nothing more than an initialised group: one message per step carries the gradients and
whether every rank could compute its own, so that a step is skipped by all or by none. A loop of one's own can use
torch's DistributedDataParallel instead; a flow is called as any module, and gives log-densities:

    model = torch.nn.parallel.DistributedDataParallel(flow.compile())
    loss = -model(my_share_of_the_batch).mean()
"""

from __future__ import annotations

from typing import Callable, Iterable, Sequence, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def agree(value: _T) -> _T:
    """Rank 0's value, a picklable object, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_0(action: Callable[[], None]) -> None:
    """Do it on rank 0 alone; what it raises there every rank raises, so that none waits for one that is gone."""
    error = None
    if rank() == 0:
        try:
            action()
        except Exception as raised:  # noqa: BLE001 - raised below, by all
            error = raised
    error = agree(error)
    if error is not None:
        raise error


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Make all ranks' tensors rank 0's."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def sum_gradients_(parameters: Sequence[Tensor], numbers: Sequence[float]) -> list[float]:
    """Sum `grad` over the ranks in place, and return the sums of `numbers`; one message. A parameter without a gradient
    on every rank keeps none."""
    if world_size() == 1:
        return list(numbers)
    like = parameters[0]
    flags = [float(p.grad is not None) for p in parameters]
    head = torch.tensor([*numbers, *flags], dtype=torch.float64, device=like.device).to(like.dtype)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    message = torch.cat([head, *(part.reshape(-1) for part in parts)])
    dist.all_reduce(message)
    head, *sums = message.split([len(head), *(p.numel() for p in parameters)])
    sums_of_numbers, flags = head.tolist()[: len(numbers)], head.tolist()[len(numbers) :]
    for parameter, flag, total in zip(parameters, flags, sums):
        parameter.grad = total.view_as(parameter).clone() if flag else None
    return sums_of_numbers
