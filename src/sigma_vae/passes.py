"""Passes over a loader's examples under noise that repeats: each example's draw is the same, whatever batch it comes in."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from sigma_vae.networks.flat import FlatNetwork
from sigma_vae.types import Batch, Network, Noise

__all__ = ["APART", "Decoded", "Examples", "codes", "in_eval_mode", "in_full_precision", "keyed_noise"]

Examples = Batch | Tensor | Sequence[Tensor]
"""A batch as a loader may give it: x, or (x, ...)."""

CACHE_BYTES = 2**30

APART = 2**20
"""Added to a seed: noise that draws with the seed do not have. Where latents know little, codes are noise, and if those that a density
is fitted to had the noise of those that it is judged by, they would be the same codes."""


def keyed_noise(positions: Tensor, seed: int = 0) -> Noise:
    """Standard normal numbers that depend on an example's position and the seed, not on the batch it comes in.

    Args:
        positions: ``(batch,)``; the shapes asked for have ``batch`` as their first axis.
        seed: another seed gives other numbers.

    >>> torch.equal(keyed_noise(torch.tensor([3, 5]))(torch.Size([2, 4]))[1], keyed_noise(torch.tensor([5]))(torch.Size([1, 4]))[0])
    True
    """
    # torch's CPU generator reads 32 bits of a seed; a step that is prime to them keeps neighbouring seeds apart.
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**32) for i in positions.tolist()]

    def noise(shape: torch.Size) -> Tensor:
        return torch.stack([torch.randn(shape[1:], generator=generator) for generator in generators])

    return noise


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put it into eval mode, and back into the modes that its parts had."""
    training = [(part, part.training) for part in module.modules()]  # a part of it may be frozen
    module.eval()
    try:
        yield
    finally:
        for part, mode in training:
            part.training = mode


def in_full_precision(device: str) -> AbstractContextManager[object]:
    """Where autocast is on, the context that switches it off: for a likelihood, whose terms half precision would round to whole nats."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class Decoded:
    """Pairs (h, target) of a loader's data under noise that repeats; kept in memory after the first pass where they are few."""

    def __init__(self, network: Network, loader: Iterable[Examples], seed: int, device: torch.device) -> None:
        self.network = network
        self.device = device
        self.loader = loader
        self.seed = seed
        self.cache: list[tuple[Tensor, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._decoded() if self.cache is None else self.cache)

    def _decoded(self) -> Iterator[tuple[Tensor, Tensor]]:
        cache: list[tuple[Tensor, Tensor]] = []
        held = 0
        for x, positions, mask in _examples(self.loader):
            mask = None if mask is None else mask.to(self.device)
            pair = self.network.infer(x.to(self.device), mask=mask, noise=keyed_noise(positions, self.seed)).scored()
            held += sum(t.numel() * t.element_size() for t in pair)
            if held <= CACHE_BYTES:
                cache.append(pair)
            else:
                cache.clear()
            yield pair
        if held <= CACHE_BYTES:
            self.cache = cache


def codes(network: FlatNetwork, loader: Iterable[Examples], seed: int) -> Tensor:
    """One posterior draw of each example, ``(n, latent_dim)``, under noise of the example's position and the seed.

    Raises:
        ValueError: the loader is empty.
    """
    device = next(network.parameters()).device
    draws = []
    for x, positions, _ in _examples(loader):
        posterior = network.encode(x.to(device))
        mean, std = posterior.loc, posterior.scale
        draws.append(mean + std * keyed_noise(positions, seed)(mean.shape).to(mean))
    if not draws:
        raise ValueError("the loader gave no batch, so there are no codes")
    return torch.cat(draws)


def _examples(loader: Iterable[Examples]) -> Iterator[Batch]:
    """The loader's batches; where they have no positions, they are counted."""
    seen = 0
    for batch in loader:
        if isinstance(batch, Batch):
            yield batch
            continue
        x = batch if isinstance(batch, Tensor) else batch[0]
        yield Batch(x, torch.arange(seen, seen + len(x)))
        seen += len(x)
