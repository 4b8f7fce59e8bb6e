"""The model: a network and a likelihood give ELBO terms, samples and reconstructions."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, final

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from sigma_vae.conditions import Given
from sigma_vae.networks.autoencoder_kl import as_autoencoder_kl
from sigma_vae.networks.sequence import FRAMES, starts
from sigma_vae.networks.spatial import MapStatistics, map_statistics
from sigma_vae.priors.gaussian import StandardNormal, best_prior
from sigma_vae.registry import needed_by
from sigma_vae.types import (
    Batch,
    Elbo,
    Inference,
    Likelihood,
    Network,
    Noise,
    Prior,
    Temperature,
    as_argument,
    fitted,
    in_full_precision,
    per_layer,
    standard_normal,
)

if TYPE_CHECKING:
    from sigma_vae.networks.spatial import SpatialNetwork

__all__ = [
    "SEED_OFFSET",
    "VAE",
    "Examples",
    "FeaturePairs",
    "Scores",
    "Show",
    "in_eval_mode",
    "keyed_noise",
    "latents_of",
    "sigma_by_place",
]

Examples = Batch | Tensor | Sequence[Tensor]
"""A batch as a loader gives it: x, or (x, ...)."""

CACHE_BYTES = 2**30

SEED_OFFSET = 2**20
"""Added to a seed, so that a density is fitted to latents with other noise than those that it is evaluated on."""

Show = Literal["mean", "draw"]
"""Value that stands for p(x|z): its mean, or a draw."""


class Scores(NamedTuple):
    """Terms of each example's bound from one posterior draw, ``(*batch,)``, in nats; ``kl`` ``(*batch, layers)``.

    "Post-hoc" values use the σ that :meth:`VAE.calibrate` solved. The masses are log bin probabilities, None where the
    data have no levels or the likelihood is not normalised. ``dims`` counts the scored values. ``log_ratio`` is
    log p(z) − log q(z|x) at the draw: added to the log-likelihood it gives a log importance weight, which the rate,
    where in closed form, does not.
    """

    rate: Tensor
    log_likelihood: Tensor
    log_likelihood_post_hoc: Tensor
    log_mass: Tensor | None
    log_mass_post_hoc: Tensor | None
    kl: Tensor
    dims: Tensor
    log_ratio: Tensor


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
        network.encoder_input = likelihood.encoder_input
        self.origin: Any = None
        """:class:`sigma_vae.models.Origin`, for saving: names of the parts, shape and scaling of the data; None where not known."""

    def forward(self, x: Tensor, condition: Given | None = None) -> Elbo:
        """Call :meth:`elbo`; wrappers such as DistributedDataParallel need it."""
        return self.elbo(x, condition=condition)

    def elbo(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Noise | None = None,
        condition: Given | None = None,
    ) -> Elbo:
        """Log-likelihood and KL of each example (each clip for video), in nats, from one posterior draw.

        Under ``torch.autocast`` only the network is in half precision; the likelihood of its features is in float32.

        Args:
            x: data ``(*batch, C, *space)``.
            context: conditioning frames of clips, where x does not begin with them.
            mask: valid frames of clips ``(batch, frames)``; the other frames do not count.
            noise: source of the posterior's standard normal numbers; torch's global generator unless given.
            condition: of a network that reads conditions: rows ``(batch, variables)``, one row for all, or values by
                name. The bound is then one on log p(x|c).
        """
        inference = self.network.infer(x, context, mask, noise, *self._rows(condition, len(x)))
        h, target = inference.scored()
        with in_full_precision(x.device.type):
            return Elbo(inference.per_example(self.likelihood(h, target).log_prob(target)), inference.kl)

    @torch.no_grad()
    def score(
        self, x: Tensor, noise: Noise | None = None, mask: Tensor | None = None, condition: Given | None = None
    ) -> Scores:
        """Terms of each example's bound, from one posterior draw; call it in eval mode, after :meth:`calibrate`."""
        return self.scores_of(self.network.infer(x, None, mask, noise, *self._rows(condition, len(x))))

    @torch.no_grad()
    def scores_of(self, inference: Inference) -> Scores:
        """Terms of each example's bound, from what the network inferred; see :meth:`score`."""
        h, target = inference.scored()
        likelihood, sum_up = self.likelihood, inference.per_example
        log_likelihood = log_likelihood_post_hoc = sum_up(likelihood(h).log_prob(target))
        mass = mass_post_hoc = sum_up(likelihood.log_mass(h, target)) if likelihood.has_mass else None
        if likelihood.has_post_hoc or not likelihood.has_scale:  # else σ is its own refit
            log_likelihood_post_hoc = sum_up(likelihood.distribution(h, refitted=True).log_prob(target))
            mass_post_hoc = sum_up(likelihood.log_mass(h, target, refitted=True)) if likelihood.has_mass else None
        return Scores(
            rate=inference.kl.sum(-1),
            log_likelihood=log_likelihood,
            log_likelihood_post_hoc=log_likelihood_post_hoc,
            log_mass=mass,
            log_mass_post_hoc=mass_post_hoc,
            kl=inference.kl,
            dims=inference.dims(),
            log_ratio=inference.log_ratio,
        )

    def sample(
        self,
        n: int,
        show: Show = "mean",
        *,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: Temperature = 1.0,
        condition: Given | None = None,
    ) -> Tensor:
        """Draw n latents from the prior, and decode them to data ``(n, C, *space)``.

        Args:
            n: number of samples.
            show: ``"mean"`` of p(x|z), or a ``"draw"`` from it.
            context: of networks that read clips, conditioning frames ``(1 or n, frames, C, H, W)``. The samples are
                then the ten frames that follow; :meth:`predict` makes more.
            generator: source of the latents' randomness; a draw from p(x|z) uses torch's global one.
            temperature: scales the spread of the latents: one number, or one per layer from the top down.
            condition: as for :meth:`elbo`; where a network reads conditions and none is given, they are drawn too.
        """
        if self.network.reads_clips:
            (single,) = per_layer(temperature, 1)
            if condition is None and self.network.conditions is not None:
                condition = self.network.conditions.draw(n, generator)
            context = starts(n, context)
            return self.predict(context, show=show, generator=generator, temperature=single, condition=condition)[0]
        h = self.network.generate(n, context, generator, temperature, *self._rows(condition, n))
        return _shown(self.likelihood, h, show)

    def predict(
        self,
        context: Tensor,
        frames: int = FRAMES,
        samples: int = 1,
        show: Show = "mean",
        *,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        batch_statistics: bool = False,
        condition: Given | None = None,
    ) -> Tensor:
        """Continue clips, with several samples per clip: ``(samples, batch, frames, C, H, W)``.

        Each frame is predicted from the one shown before it. With ``"mean"`` this is SVG's way; with ``"draw"`` the
        samples are draws from the model that the ELBO bounds. Call it in eval mode.

        Args:
            context: conditioning frames ``(batch, past, C, H, W)``.
            frames: number of frames to predict.
            samples: number of predictions per clip.
            show: as in :meth:`sample`.
            generator: likewise.
            temperature: scales the spread of the latents.
            batch_statistics: use batch norm as SVG's own evaluation does; see :meth:`SequenceNetwork.predict`.
            condition: as for :meth:`elbo`.

        Raises:
            ValueError: the network does not read clips, or context and counts do not fit.
        """
        if samples < 1:
            raise ValueError(f"samples is the number of predictions per clip and at least 1, got {samples}")
        rows = [rows.repeat(samples, 1) for rows in self._rows(condition, len(context))]
        predicted = self.network.predict(
            context.repeat(samples, *(1 for _ in context.shape[1:])),
            frames,
            lambda h: _shown(self.likelihood, h, show),
            lambda shape: torch.randn(shape, device=context.device, generator=generator),
            temperature,
            batch_statistics=batch_statistics,
            condition=rows[0] if rows else None,
        )
        return predicted.frames.reshape(samples, len(context), *predicted.frames.shape[1:])

    def reconstruct(
        self,
        x: Tensor,
        show: Show = "mean",
        *,
        noise: Noise | None = None,
        condition: Given | None = None,
        shown_as: Given | None = None,
    ) -> Tensor:
        """Encode x, draw its latents and decode them; for clips, to the frames after the conditioning frames.

        With ``shown_as`` the latents are decoded with another condition than that of x: a counterfactual.

        Raises:
            ValueError: ``shown_as`` is given, and the network cannot decode given latents.
        """
        rows = self._rows(condition, len(x))
        if shown_as is None:
            return _shown(self.likelihood, self.network.infer(x, None, None, noise, *rows).h, show)
        other = self._rows(shown_as, len(x))
        return _shown(self.likelihood, self.network.decode(self.network.draw_latents(x, noise, *rows), *other), show)

    def encode(self, x: Tensor, condition: Given | None = None) -> Normal:
        """q(z|x), parameters ``(batch, latent_dim)``; ValueError unless ``network.has_posterior``."""
        return self.network.posterior(x, *self._rows(condition, len(x)))

    def decode(self, z: Tensor, show: Show = "mean", condition: Given | None = None) -> Tensor:
        """Data of given latents ``(batch, *shape of z)``: the mean of p(x|z), or a draw; ValueError if the network cannot."""
        n = len(z) if isinstance(z, Tensor) else len(z[0])
        return _shown(self.likelihood, self.network.decode(z, *self._rows(condition, n)), show)

    def resize(self, size: Sequence[int]) -> None:
        """Take examples of this size from now on, (H, W) for images, where the network reads several.

        The weights and σ do not change. A fitted prior knows latents of one size, so N(0, I) takes its place.

        Raises:
            ValueError: the network reads one size, or not this one, or σ has a value for each place.

        >>> from sigma_vae import VAE, Gaussian, models
        >>> vae = VAE(models.network("spatial:f4c3", (3, 16, 16), 3, width=8), Gaussian(channels=3))
        >>> vae.resize((24, 40))
        >>> vae.network.latents.shapes
        ((3, 6, 10),)
        """
        if sigma_by_place(self.likelihood, len(size)):
            raise ValueError(f"{self.likelihood} has a σ for each place of the training size, and knows no other size")
        self.network.resize(size)

    def _rows(self, condition: Given | None, n: int) -> tuple[Tensor, ...]:
        """A condition as rows ``(n, variables)`` on the model's device, and as an argument: none where none is given."""
        if condition is None:
            return ()
        if self.network.conditions is None:
            raise ValueError(f"{type(self.network).__name__} reads no condition; leave condition out")
        return (self.network.conditions.rows(condition, n).to(self.device),)

    def plot_samples(self, n: int = 64, seed: int = 0) -> Any:
        """A grid of samples as a matplotlib figure; ValueError where examples are no pictures."""
        return _plots().figure_of_samples(self, n, seed)

    def plot_reconstructions(self, x: Tensor) -> Any:
        """Pictures x ``(n, C, H, W)`` above their reconstructions, as a matplotlib figure."""
        return _plots().figure_of_reconstructions(self, x)

    def plot_latents(self, x: Tensor, colours: Sequence[float] | None = None) -> Any:
        """Posterior means of x in the two latents with the largest KL, as a matplotlib figure.

        Args:
            x: data ``(n, C, *space)``.
            colours: a number for each example, such as its class.
        """
        return _plots().figure_of_latents(self, x, colours)

    def _repr_html_(self) -> str:
        weights = sum(parameter.numel() for parameter in self.parameters())
        sigma = None
        with suppress(ValueError):  # it is not solved yet
            sigma = self.likelihood.sigma()
        rows = {
            "network": f"{type(self.network).__name__}, {weights:,} weights",
            "latents": " + ".join(map(str, self.network.latents.sizes)),
            "likelihood": str(self.likelihood),
            "σ": "not known yet" if sigma is None else f"{float(sigma.log().mean().exp()):.4g}",
        }
        made: str = import_module("sigma_vae.evaluation.suite").table("A VAE with a calibrated decoder", rows)
        return made

    def save_pretrained(self, folder: str | Path, evaluation: Any = None) -> Path:
        """Write the model with a card into a folder: see :func:`sigma_vae.hub.save_pretrained`."""
        saved: Path = _hub().save_pretrained(self, folder, evaluation)
        return saved

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        network: Network | None = None,
        likelihood: Likelihood | None = None,
    ) -> "VAE":
        """Open a model from a folder, or from the Hugging Face Hub as OWNER/NAME: see :func:`sigma_vae.hub.from_pretrained`."""
        found: VAE = _hub().from_pretrained(
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            network=network,
            likelihood=likelihood,
        )
        return found

    def push_to_hub(self, name: str, *, evaluation: Any = None, private: bool = False, token: str | None = None) -> str:
        """Write the model with a card to the Hugging Face Hub, and return its address: see :func:`sigma_vae.hub.push_to_hub`."""
        address: str = _hub().push_to_hub(self, name, evaluation=evaluation, private=private, token=token)
        return address

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @torch.no_grad()
    def calibrate(self, loader: "Iterable[Examples]", seed: int = 0, *, only_observed: bool = False) -> None:
        """Solve the likelihood's scales exactly on the loader's data; the weights do not change.

        Each example is decoded from one posterior draw, the same in each pass. Use validation data, or training data
        where there are many: a σ from a small training set is too narrow for new data.

        Args:
            loader: batches ``x`` or ``(x, ...)`` in a fixed order, or :class:`Batch` with positions; no generator.
            seed: of the posterior's noise.
            only_observed: leave out the σ for levels of a likelihood that is a density (``likelihood.observes``), whose
                search takes several passes.
        """
        likelihood = self.likelihood
        with in_eval_mode(self), standard_prior(self):
            solve = likelihood.calibrate_observed if only_observed else likelihood.calibrate
            solve(FeaturePairs(self.network, loader, seed, self.device))

    @torch.no_grad()
    def start_from(self, loader: "Iterable[Examples]") -> float | None:
        """Start at the best linear VAE of these data, probabilistic PCA; training then learns what it leaves.

        Its encoder and decoder have a closed form, and are added to the network's own, whose last layers are set to 0. Take
        σ from validation data afterwards: a VAE that starts here fits its training data well, and soon too well.

        Args:
            loader: training data in random order, as for :meth:`calibrate`: some thousands of examples are enough.

        Returns:
            The std of the residuals of this start, None where the data have no variance; σ of a learned scale may start there.

        Raises:
            ValueError: the network has no such start (``network.has_start``).

        >>> from sigma_vae import VAE, Gaussian, mlp
        >>> x = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> vae = VAE(mlp((1, 4, 4), 1, latent_dim=2), Gaussian(1))
        >>> std = vae.start_from([x])
        >>> vae.calibrate([x])
        >>> abs(vae.likelihood.sigma().item() - std) < 0.02
        True
        """
        data = _Values(loader)
        with in_eval_mode(self):  # layers such as batch norm see one example
            return self.network.start_from(data, self.likelihood.mean_map, partial(self.likelihood.start_features_for, data))

    @torch.no_grad()
    @needed_by("VAE.fit_prior")
    def fit_prior(
        self,
        loader: "Iterable[Examples]",
        prior: Prior | Sequence[Prior],
        validation: "Iterable[Examples] | None" = None,
        seed: int = 0,
    ) -> dict[str, float]:
        """Fit a prior to one posterior draw of each example, and use it in place of the network's prior.

        Nothing else changes: call it after training and :meth:`calibrate`. The ELBO is then the bound of the model with
        that prior, and :meth:`sample` draws from it. Where the fit fails, the network keeps its prior.

        With ``validation``, the fitted prior is compared with simpler ones on held-out latents: N(0, I), and a Gaussian with
        the latents' moments. The best of them is used, so that it is never worse there than N(0, I).

        Args:
            loader: training data, as for :meth:`calibrate`; only their latents are kept in memory.
            prior: moved to the model's device and dtype, and fitted there. Of a sequence, those that cannot be fitted are
                left out, and ``validation`` chooses.
            validation: held-out data, by which :class:`MixturePrior` chooses its number of components and
                :class:`FlowPrior` when to stop, and by which the priors are compared.
            seed: of the fit and of the noise, which differs from that of an evaluation with this seed.

        Returns:
            Mean log-density of the held-out latents under each prior, in nats, the best one first; the prior that was given
            is called by its class. Empty without ``validation``.

        Raises:
            ValueError: the network's prior cannot be replaced, or the prior cannot be fitted to these latents.

        >>> from sigma_vae import VAE, Gaussian, mlp
        >>> from sigma_vae.priors import GaussianPrior
        >>> likelihood = Gaussian(channels=1)
        >>> vae = VAE(mlp((1, 8, 8), likelihood.in_channels, latent_dim=3), likelihood)
        >>> vae.fit_prior(torch.rand(4, 16, 1, 8, 8), GaussianPrior(latent_dim=3))
        {}
        >>> vae.network.prior.mean.shape
        torch.Size([3])
        """
        network = self.network
        if not (network.has_posterior and network.has_prior):
            raise ValueError(f"{type(network).__name__} has no single layer of flat latents with a prior that can be replaced")
        with in_eval_mode(self):
            draws, condition = _draws_of(network, loader, seed + SEED_OFFSET)
            held_out, held_condition = (
                (None, None) if validation is None else _draws_of(network, validation, seed + 2 * SEED_OFFSET)
            )
        if isinstance(prior, Prior):
            fitted(prior.to(draws), draws, held_out, seed, condition, held_condition)
            priors = [prior]
        elif held_out is None:
            raise ValueError("several priors are compared on held-out data, and there are none; give validation")
        else:
            priors = []
            for each in prior:
                with suppress(ValueError):
                    fitted(each.to(draws), draws, held_out, seed, condition, held_condition)
                    priors.append(each)
        best, densities = (priors[0], {}) if held_out is None else best_prior(priors, draws, held_out, held_condition)
        network.replace_prior(best)
        return densities

    @torch.no_grad()
    def map_statistics(self, loader: "Iterable[Examples]") -> MapStatistics:
        """Mean, std and kurtosis of each channel of latent maps over these data; see :func:`map_statistics`.

        Args:
            loader: as for :meth:`calibrate`.

        Raises:
            ValueError: the network's latents are no maps.
        """
        (shape, *others) = self.network.latents.shapes
        if others or len(shape) == 1 or not self.network.has_posterior:
            raise ValueError(f"{type(self.network).__name__} has no latent maps; take spatial or autoencoder-kl")
        with in_eval_mode(self):
            return map_statistics(self.encode(batch.x.to(self.device)) for batch in _examples(loader))

    @torch.no_grad()
    def to_diffusers(self, loader: "Iterable[Examples] | None" = None) -> Any:
        """Make an ``AutoencoderKL`` of diffusers that encodes and decodes as this model does, bit for bit.

        It reads and gives pictures in [−1, 1]. Feature channels for a predicted σ are left out.

        Args:
            loader: training data, on which ``scaling_factor``, ``shift_factor``, ``latents_mean`` and ``latents_std`` are
                measured: moments over examples, posterior draws and places. Without it they are those of the network's
                configuration, or diffusers' defaults.

        Raises:
            ValueError: the network has no such layers, or the likelihood's mean is not the decoder's output.

        >>> from sigma_vae import VAE, Gaussian, models
        >>> vae = VAE(models.network("spatial:f2c4", (3, 8, 8), 3, width=8), Gaussian(channels=3))
        >>> x = torch.rand(16, 3, 8, 8)
        >>> exported = vae.to_diffusers([x])
        >>> torch.equal(exported.encode(2 * x - 1).latent_dist.mean, vae.encode(x).loc)
        True
        """
        network, likelihood = self.network, self.likelihood
        if network.diffusers_config is None:
            raise ValueError(
                f"{type(network).__name__} does not have the layers of diffusers' AutoencoderKL; train on images with"
                " --network spatial:f4c3 --start random, or with --network autoencoder-kl:CONFIG"
            )
        if likelihood.mean_map != "identity":
            raise ValueError(
                f"the mean of {likelihood} is not the decoder's output, which is all that diffusers decodes; train a likelihood with a mean"
                " and a scale, such as gaussian/optimal, with --mean auto"
            )
        with in_eval_mode(self):
            return as_autoencoder_kl(
                cast("SpatialNetwork", network), {} if loader is None else self.map_statistics(loader).to_config()
            )

    @property
    def flat_network(self) -> Network:
        """Deprecated: use :attr:`network`, and ask ``network.has_posterior``."""
        return self._deprecated("flat_network", has=self.network.has_posterior and self.network.has_prior)

    @property
    def video_network(self) -> Network:
        """Deprecated: use :attr:`network`, and ask ``network.reads_clips``."""
        return self._deprecated("video_network", has=self.network.reads_clips)

    def _deprecated(self, name: str, *, has: bool) -> Network:
        if not has:
            raise AttributeError(f"{type(self.network).__name__} is no {name.replace('_', ' ')}; VAE.{name} is now VAE.network")
        warnings.warn(f"VAE.{name} is now VAE.network", DeprecationWarning, stacklevel=3)
        return self.network

    def __dir__(self) -> list[str]:
        # Without the deprecated names, which inspect.getmembers and torch.jit.trace would look up.
        return [name for name in super().__dir__() if name not in ("flat_network", "video_network")]  # type: ignore[no-untyped-call]


@needed_by("plotting")
def _plots() -> Any:
    """The module for plots, imported when it is used."""
    import_module("matplotlib")
    return import_module("sigma_vae.evaluation.plots")


def _hub() -> Any:
    """The module for the Hub, imported when it is used: it is above this one, and needs more than torch."""
    return import_module("sigma_vae.hub")


def sigma_by_place(likelihood: Likelihood, axes: int) -> bool:
    """Whether a known σ differs between the places of examples that have so many axes of space.

    >>> from sigma_vae import Gaussian, Optimal
    >>> likelihood = Gaussian(1, Optimal(per="pixel"))
    >>> likelihood.calibrate([(torch.rand(4, 1, 2, 2), torch.rand(4, 1, 2, 2))])
    >>> sigma_by_place(likelihood, 2), sigma_by_place(Gaussian(1), 2)
    (True, False)
    """
    sigma = None
    with suppress(ValueError):  # it is not solved yet
        sigma = likelihood.log_sigma()
    return sigma is not None and sigma.dim() > axes and any(n > 1 for n in sigma.shape[-axes:])


def keyed_noise(positions: Tensor, seed: int = 0) -> Noise:
    """Standard normal numbers that depend on an example's position ``(batch,)`` and the seed, but not on its batch.

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
    """Put a module into eval mode, and afterwards each of its parts back into the mode it had."""
    training = [(part, part.training) for part in module.modules()]  # a part of it may be frozen
    module.eval()
    try:
        yield
    finally:
        for part, mode in training:
            part.training = mode


def has_fitted_prior(vae: "VAE") -> bool:
    """Whether the network has a replaceable prior that was fitted to latents, after training with N(0, I)."""
    return vae.network.has_prior and not vae.network.prior.is_standard and not vae.network.prior.is_learned


@contextmanager
def standard_prior(vae: "VAE") -> Iterator[None]:
    """Give the model N(0, I) for a block; a model without a fitted prior is left as it is.

    The density of a fitted prior may take longer than the network: what does not ask for it is done without.
    """
    if not has_fitted_prior(vae):
        yield
        return
    fitted = vae.network.prior
    vae.network.replace_prior(StandardNormal(sum(vae.network.latents.sizes)).to(next(vae.parameters())))
    try:
        yield
    finally:
        vae.network.replace_prior(fitted)


class FeaturePairs:
    """Pairs of features and target of a loader's data, with the same posterior draws in each pass.

    After the first pass the pairs are kept in memory, up to 1 GiB.
    """

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
        size = 0
        for batch in _examples(self.loader):
            x, positions, mask, condition = batch.to(self.device)
            noise = keyed_noise(positions, self.seed)
            pair = self.network.infer(x, None, mask, noise, *as_argument(condition)).scored()
            size += sum(t.nbytes for t in pair)
            if size <= CACHE_BYTES:
                cache.append(pair)
            else:
                cache.clear()
            yield pair
        if size <= CACHE_BYTES:
            self.cache = cache


def latents_of(network: Network, loader: Iterable[Examples], seed: int) -> Tensor:
    """One posterior draw of each example, ``(n, latent_dim)``, with noise keyed by the example's position and the seed.

    Raises:
        ValueError: the loader is empty.
    """
    return _draws_of(network, loader, seed)[0]


def _draws_of(network: Network, loader: Iterable[Examples], seed: int) -> tuple[Tensor, Tensor | None]:
    """Do what :func:`latents_of` does, and return the conditions too."""
    device = next(network.parameters()).device
    draws, conditions = [], []
    for batch in _examples(loader):
        x, positions, _, condition = batch.to(device)
        posterior = network.posterior(x, *as_argument(condition))
        conditions += [] if condition is None else [condition]
        z = posterior.loc + posterior.scale * standard_normal(posterior.loc, keyed_noise(positions, seed))
        draws.append(z.flatten(1))
    if not draws:
        raise ValueError("the loader gave no batch, so there are no latents")
    return torch.cat(draws), torch.cat(conditions) if conditions else None


def _examples(loader: Iterable[Examples]) -> Iterator[Batch]:
    """The loader's batches; examples without positions are numbered."""
    seen = 0
    for batch in loader:
        if isinstance(batch, Batch):
            yield batch
            continue
        x = batch if isinstance(batch, Tensor) else batch[0]
        yield Batch(x, torch.arange(seen, seen + len(x)))
        seen += len(x)


class _Values:
    """The examples of a loader, without positions."""

    def __init__(self, loader: Iterable[Examples]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Tensor]:
        return (batch.x for batch in _examples(self.loader))


def _shown(likelihood: Likelihood, h: Tensor, show: Show) -> Tensor:
    if show not in ("mean", "draw"):
        raise ValueError(f'show is "mean" or "draw", got {show!r}')
    distribution = likelihood(h)
    shown: Tensor = distribution.mean if show == "mean" else distribution.sample()
    return shown
