"""Each process's share of the data, and means over the shares of all."""

import torch
from torch import Tensor, distributed

from sigma_vae.data import Batches, Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.training.processes import processes

__all__ = ["first_where", "mean_over_all", "on_any", "rows_of_all", "shared", "sum_over_all"]


def shared(data: Splits, split: SplitName, size: int, device: torch.device | str = "cpu", limit: int | None = None) -> Batches:
    """This process's share of a split, in its order, for a pass on which no number depends on the size of batches.

    Args:
        data: its splits.
        split: which of them.
        size: examples in a batch of all processes together; more where the last batch would leave a process without any.
        device: where the batches are.
        limit: the first so many examples alone.

    Raises:
        ValueError: there are fewer examples than processes.
    """
    us = processes()
    examples = min(len(data.store(split)), limit or len(data.store(split)))
    sizes = range(max(size, us.world_size), max(size, us.world_size, examples) + 1)
    fitting = next((n for n in sizes if (examples % n or n) >= us.world_size), size)
    return data.batches(split, fitting, device=device, rank=us.rank, world_size=us.world_size, limit=limit)


@torch.no_grad()
def sum_over_all(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in float64, detached; the same on each of them.

    >>> sum_over_all(torch.ones(2))
    tensor([1., 1.], dtype=torch.float64)
    """
    total = values.detach().double()
    if processes().world_size > 1:
        total = total.clone()
        distributed.all_reduce(total)
    return total


def rows_of_all(values: Tensor) -> Tensor:
    """What each process has, ``(processes, ...)``, in float64, detached; the same on each of them.

    >>> rows_of_all(torch.ones(2))
    tensor([[1., 1.]], dtype=torch.float64)
    """
    us = processes()
    rows = values.new_zeros((us.world_size, *values.shape), dtype=torch.float64)
    rows[us.rank] = values.detach()
    return sum_over_all(rows)


def mean_over_all(values: Tensor) -> Tensor:
    """The mean over the examples of all processes, detached: over the first axis, ``(examples, ...)`` to ``(...)``.

    >>> mean_over_all(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([2., 3.])
    """
    if processes().world_size == 1:
        return values.detach().mean(0)
    total = sum_over_all(torch.cat([values.double().sum(0).flatten(), values.new_tensor([len(values)]).double()]))
    return (total[:-1] / total[-1]).reshape(values.shape[1:]).to(values.dtype)


def on_any(flag: bool) -> bool:
    """Whether it is so on any process; the same answer on all.

    >>> on_any(False)
    False
    """
    return flag if processes().world_size == 1 else bool(sum_over_all(torch.tensor(float(flag))))


def first_where(here: bool) -> int:
    """The lowest rank where it is so, 0 where it is so nowhere; the same answer on all processes.

    >>> first_where(True)
    0
    """
    return int(rows_of_all(torch.tensor(float(here))).argmax())
