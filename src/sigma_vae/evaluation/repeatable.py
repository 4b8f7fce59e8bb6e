"""The same images, and the same random numbers, each time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from sigma_vae.data import Batches, Splits
from sigma_vae.data.splits import SplitName

__all__ = ["about", "seeded", "subset"]


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
