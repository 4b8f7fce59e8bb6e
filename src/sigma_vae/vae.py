"""Network + likelihood = ELBO terms, samples, reconstructions."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from sigma_vae.networks.flat import FlatNetwork
from sigma_vae.types import Batch, Elbo, Inference, Likelihood, Network, Noise, Temperature

__all__ = ["VAE", "Scores", "Show", "keyed_noise", "per_example"]

Show = Literal["mean", "draw"]
"""What of p(x|z) is shown: its mean, or a draw."""

CACHE_BYTES = 2**30


class Scores(NamedTuple):
    """What one posterior draw says of each example, ``(*batch,)``, in nats; kl ``(*batch, layers)`` is the rate layer by layer.

    "Post-hoc" is with the σ that :meth:`VAE.calibrate` solved; for an optimal scale that is its own. The masses are None where the
    data have no levels, or the likelihood is an objective that gives them no probability.
    """

    rate: Tensor
    log_likelihood: Tensor
    log_likelihood_post_hoc: Tensor
    log_mass: Tensor | None
    log_mass_post_hoc: Tensor | None
    kl: Tensor


@final
class VAE(nn.Module):
    r"""A variational autoencoder with a calibrated decoder.

    The training loss is ``-vae.elbo(x).total.mean()``: nothing is weighted, nothing is averaged over pixels.

    .. math:: \text{ELBO}(x) = E_{q(z|x)} \log p(x|z) - KL(q(z|x) \| p(z)) \le \log p(x)

    Args:
        network: encoder, latents and decoder.
        likelihood: turns the decoder's features into p(x|z).

    >>> from sigma_vae import VAE, Gaussian, mlp
    >>> likelihood = Gaussian(channels=1)
    >>> vae = VAE(mlp((1, 8, 8), likelihood.in_channels), likelihood)
    >>> elbo = vae.elbo(torch.rand(16, 1, 8, 8))
    >>> (-elbo.total.mean()).backward()
    >>> elbo.total.shape, elbo.kl.shape
    (torch.Size([16]), torch.Size([16, 1]))
    """

    def __init__(self, network: Network, likelihood: Likelihood) -> None:
        super().__init__()
        self.network = network
        self.likelihood = likelihood

    def forward(self, x: Tensor) -> Elbo:
        """The ELBO's terms of each example: what a wrapper such as DistributedDataParallel calls."""
        return self.elbo(x)

    def elbo(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, noise: Noise | None = None) -> Elbo:
        """Log-likelihood and KL of each example (each clip for video), in nats, from one posterior draw.

        Args:
            x: data ``(*batch, C, *space)``.
            context: a video's conditioning frames.
            mask: a video's valid frames.
            noise: where the posterior's standard normal numbers come from; torch's global generator unless given.

        Shapes:
            log_likelihood ``(*batch,)``, kl ``(*batch, layers)``.
        """
        inference = self.network.infer(x, context, mask, noise)
        log_likelihood = self.likelihood(inference.h, inference.target).log_prob(inference.target)
        return Elbo(per_example(log_likelihood, inference), inference.kl)

    @torch.no_grad()
    def score(self, x: Tensor, noise: Noise | None = None) -> Scores:
        """All that an evaluation reports of each example, from one posterior draw; call it in eval mode, after ``calibrate``."""
        inference = self.network.infer(x, noise=noise)
        h, target = inference.h, inference.target
        mass = mass_post_hoc = None
        if self.likelihood.levels is not None and self.likelihood.normalised:
            mass = per_example(self.likelihood.log_mass(h, target), inference)
            mass_post_hoc = per_example(self.likelihood.log_mass(h, target, post_hoc=True), inference)
        return Scores(
            rate=inference.kl.sum(-1),
            log_likelihood=per_example(self.likelihood(h).log_prob(target), inference),
            log_likelihood_post_hoc=per_example(self.likelihood.post_hoc(h).log_prob(target), inference),
            log_mass=mass,
            log_mass_post_hoc=mass_post_hoc,
            kl=inference.kl,
        )

    def sample(
        self,
        n: int,
        show: Show = "mean",
        *,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: Temperature = 1.0,
    ) -> Tensor:
        """Draw n latents, and show each by the mean of p(x|z) or by a draw from it: ``(n, C, *space)``.

        Args:
            n: how many.
            show: ``"mean"`` or ``"draw"``.
            context: a video's conditioning frames.
            generator: of the latents; a draw from p(x|z) uses torch's global one.
            temperature: scales the spread of the latents: one number, or one for each layer.
        """
        h = self.network.generate(n, context, generator, temperature)
        return _shown(self.likelihood, h, show)

    def reconstruct(self, x: Tensor, show: Show = "mean", *, noise: Noise | None = None) -> Tensor:
        """Encode x, draw its latents, and decode them, to the shape of x."""
        return _shown(self.likelihood, self.network.infer(x, noise=noise).h, show)

    def encode(self, x: Tensor) -> Normal:
        """q(z|x), parameters ``(batch, latent_dim)``.

        Raises:
            ValueError: the network has no flat latents.
        """
        return self.flat_network.encode(x)

    @property
    def flat_network(self) -> FlatNetwork:
        """The network, where it has one layer of flat latents."""
        if not isinstance(self.network, FlatNetwork):
            raise ValueError(
                f"{type(self.network).__name__} has no single layer of flat latents; this works on FlatNetwork alone"
            )
        return self.network

    @torch.no_grad()
    def calibrate(self, loader: Iterable[Tensor | Sequence[Tensor]], seed: int = 0) -> None:
        """Solve the likelihood's scales exactly on the loader's data, with the weights as they are.

        Each example is decoded from one posterior draw, the same in each pass. Use training data (or validation data, where the
        training set is small: its σ is then too narrow for new data).

        Args:
            loader: batches ``x`` or ``(x, ...)``; gone through more than once, so no generator. Give it a fixed order, or
                :class:`Batch` with positions.
            seed: of the posterior's noise.
        """
        training = [(module, module.training) for module in self.modules()]  # a part of it may be frozen
        self.eval()
        try:
            self.likelihood.calibrate(_Decoded(self, loader, seed))
        finally:
            for module, mode in training:
                module.training = mode


def per_example(log_likelihood: Tensor, inference: Inference) -> Tensor:
    """Sum the likelihood over what one example holds beyond the KL's batch axes: the frames of a clip."""
    batch_axes = inference.kl.dim() - 1
    return log_likelihood.flatten(batch_axes).sum(-1) if log_likelihood.dim() > batch_axes else log_likelihood


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


def _shown(likelihood: Likelihood, h: Tensor, show: Show) -> Tensor:
    if show not in ("mean", "draw"):
        raise ValueError(f'show is "mean" or "draw", got {show!r}')
    distribution = likelihood(h)
    shown: Tensor = distribution.mean if show == "mean" else distribution.sample()
    return shown


class _Decoded:
    """Pairs (h, target) of a loader's data under noise that repeats; kept in memory after the first pass where they are few."""

    def __init__(self, vae: VAE, loader: Iterable[Tensor | Sequence[Tensor]], seed: int) -> None:
        self.vae = vae
        self.loader = loader
        self.seed = seed
        self.cache: list[tuple[Tensor, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._decoded() if self.cache is None else self.cache)

    def _decoded(self) -> Iterator[tuple[Tensor, Tensor]]:
        cache: list[tuple[Tensor, Tensor]] = []
        held = seen = 0
        device = next(self.vae.parameters()).device
        for batch in self.loader:
            x = (batch if isinstance(batch, Tensor) else batch[0]).to(device)
            positions = batch.positions if isinstance(batch, Batch) else torch.arange(seen, seen + len(x))
            seen += len(x)
            inference = self.vae.network.infer(x, noise=keyed_noise(positions, self.seed))
            pair = (inference.h, inference.target)
            held += sum(t.numel() * t.element_size() for t in pair)
            if held <= CACHE_BYTES:
                cache.append(pair)
            else:
                cache.clear()
            yield pair
        if held <= CACHE_BYTES:
            self.cache = cache
