"""What all metrics share: means with standard errors, passes over a split on any number of processes, seeding."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from sigma_vae.data import Batches, Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.types import Batch
from sigma_vae.vae import VAE

__all__ = ["about", "add_up", "each_example", "mean_and_error", "seeded", "subset", "sum_over_examples"]


def mean_and_error(values: Tensor) -> dict[str, float | None]:
    """Mean over examples ``(examples,)`` and its standard error, None of a single example.

    >>> import torch
    >>> mean_and_error(torch.tensor([0.0, 0.0, 0.0, 4.0]))
    {'mean': 1.0, 'standard_error': 1.0}
    """
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(values.mean()), "standard_error": error}


Rows = Callable[[Batch], Tensor]
"""What is said of each example of a batch: ``(batch, columns)``, or ``(batch,)``."""


@torch.no_grad()
def each_example(vae: VAE, batches: Batches, rows: Rows) -> Tensor:
    """What ``rows`` says of every example, in the order of the split, on the CPU in float64.

    Where the batches are one process's share (``world_size`` above 1), the shares of all processes of the default group are gathered:
    each must call this, and each gets everything.

    Args:
        vae: the model; batches are moved to its device.
        batches: of the split.
        rows: is given the batches.

    Shapes:
        result ``(examples, columns)``, or ``(examples,)``.

    Raises:
        ValueError: the batches are a share, and no group of as many processes is there.
    """
    _check_group(batches)
    device = next(vae.parameters()).device
    found = [(batch.positions, rows(batch).cpu().double()) for batch in _on(device, batches)]
    positions, values = torch.cat([p for p, _ in found]), torch.cat([v for _, v in found])
    if batches.world_size > 1:
        both = _all_rows(torch.cat([positions[:, None].double(), values.reshape(len(values), -1)], 1), device)
        positions, values = both[:, 0].long(), both[:, 1:].reshape(-1, *values.shape[1:])
    return values[positions.argsort()]


@torch.no_grad()
def sum_over_examples(vae: VAE, batches: Batches, rows: Rows) -> Tensor:
    """The sum over all examples of what ``rows`` says, ``(columns,)``: for what is too much to keep of each; see :func:`each_example`."""
    _check_group(batches)
    device = next(vae.parameters()).device
    sums = (rows(batch).cpu().double().sum(0) for batch in _on(device, batches))
    total = sum(sums, torch.zeros((), dtype=torch.float64))
    assert isinstance(total, Tensor)
    add_up(vae, batches, [total])
    return total


def add_up(vae: VAE, batches: Batches, sums: Iterable[Tensor]) -> None:
    """Make sums on the CPU over one process's share those over all examples, in place, on every process."""
    if batches.world_size == 1:
        return
    device = next(vae.parameters()).device
    for mine in sums:
        total = mine.to(device)
        distributed.all_reduce(total)
        mine.copy_(total)


def _on(device: torch.device, batches: Batches) -> Iterator[Batch]:
    for x, positions, mask in batches:
        yield Batch(x.to(device), positions, None if mask is None else mask.to(device))


def _check_group(batches: Batches) -> None:
    known = distributed.is_available() and distributed.is_initialized()
    processes = distributed.get_world_size() if known else 1
    if batches.world_size not in (1, processes):
        raise ValueError(
            f"these batches are the share of one of {batches.world_size} processes, but there are {processes}: what the others hold"
            " would be missing; initialise torch.distributed in each of them, or give all examples (world_size=1)"
        )


def _all_rows(mine: Tensor, device: torch.device) -> Tensor:
    """The rows of all processes, whose numbers may differ."""
    count = torch.tensor([len(mine)], device=device)
    counts = [torch.empty_like(count) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, count)
    most = max(int(n) for n in counts)
    padded = torch.zeros(most, mine.shape[1], dtype=mine.dtype, device=device)
    padded[: len(mine)] = mine.to(device)
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)]).cpu()


def about(data: Splits) -> dict[str, Any]:
    """Which data, and how they were cut and resized: what the record says of them."""
    return {
        "name": data.name,
        "shape": list(data.shape),
        "preprocessing": data.record.get("preprocessing"),
        "fingerprint": data.record.get("fingerprint"),
    }


@contextmanager
def seeded(seed: int, number: int, device: torch.device) -> Iterator[None]:
    """Let torch's global generators begin at a place of their own, and afterwards go on where they were.

    >>> first, again = [], []
    >>> for numbers in (first, again):
    ...     with seeded(0, 5, torch.device("cpu")):
    ...         numbers.append(torch.rand(1))
    >>> first == again
    True
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]))
        yield


def subset(data: Splits, split: SplitName, n: int, batch: int, seed: int, device: torch.device) -> Batches:
    """N examples of a split, chosen at random, as files may be sorted, and in their order; all where there are no more."""
    store = data.store(split)
    if n < len(store):
        chosen = torch.randperm(len(store), generator=torch.Generator().manual_seed(seed))[:n]
        store = store.select(chosen.sort().values)
    return Batches(store.to(device), data.scaling, batch)
