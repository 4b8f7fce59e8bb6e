"""Several steps in one call of the engine: what it does around a call takes as long as the step of a small network."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, final

from sigma_vae.data import Batches
from sigma_vae.data.batches import BatchState
from sigma_vae.types import Batch

__all__ = ["Calls", "recount"]


@final
class Calls:
    """Goes over batches, so many at a time, which are drawn as they are needed: the position in the data is that of the last step.

    >>> from sigma_vae.data.scaling import Scaling
    >>> from sigma_vae.data.stores import InMemory
    >>> import torch
    >>> batches = Batches(InMemory(torch.zeros(5, 1, dtype=torch.uint8)), Scaling(levels=3), batch_size=1)
    >>> [len(list(call)) for call in Calls(batches, steps=2)]
    [2, 2, 1]
    """

    def __init__(self, batches: Batches, steps: int) -> None:
        self.batches = batches
        self.steps = steps

    def __len__(self) -> int:
        return -(-len(self.batches) // self.steps)

    def __iter__(self) -> Iterator[Iterator[Batch]]:
        batches = iter(self.batches)
        while (first := next(batches, None)) is not None:
            yield chain([first], islice(batches, self.steps - 1))

    def state_dict(self) -> BatchState:
        """That of the batches."""
        return self.batches.state_dict()

    def load_state_dict(self, state_dict: BatchState) -> None:
        """That of the batches."""
        self.batches.load_state_dict(state_dict)


def recount(checkpoint: dict[str, Any], steps: int, batches: int) -> None:
    """Let a checkpoint count its calls as if each had made so many ``steps``: those that are left of its epoch come out right.

    Args:
        checkpoint: the engine's, altered in place; its calls may have had another length, and the last one may have ended early.
        steps: of the calls to come.
        batches: in an epoch.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done = checkpoint["global_step"] % batches
    if not done and progress["current"]["ready"]:  # the epoch is over, and the next one has not begun
        done = batches
    ready = -(-batches // steps) - -(-(batches - done) // steps)
    change = ready - progress["current"]["ready"]
    for counts in (progress["current"], progress["total"]):
        counts.update({name: count + change for name, count in counts.items()})
