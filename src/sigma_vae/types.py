"""Shared types and abstract interfaces: batches, ELBO terms, and the contracts of network, likelihood and prior."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from sigma_vae.conditions import Conditions

__all__ = [
    "Batch",
    "ChooseLatents",
    "DataDistribution",
    "Elbo",
    "FittedPrior",
    "Flat",
    "Frames",
    "Hierarchy",
    "Inference",
    "Latents",
    "Likelihood",
    "Maps",
    "MeanMap",
    "Network",
    "Noise",
    "Observes",
    "Prediction",
    "Prior",
    "Temperature",
    "as_argument",
    "at_least_float32",
    "fitted",
    "in_full_precision",
    "per_layer",
    "standard_normal",
]

Noise = Callable[[torch.Size], Tensor]
"""Draws standard normal numbers of the given shape, whose leading axes are the batch."""

Temperature = float | Sequence[float]
"""Scales the spread of latents drawn from the prior: one number, or one for each layer, from the top down."""

MeanMap = Literal["identity", "unit"]
"""From features to the mean: themselves, or a sigmoid onto [0, 1]."""

Observes = Literal["density", "level"]
"""Probability of the real value (a density), or of the observed level (the mass of its bin)."""


class Batch(NamedTuple):
    """Examples of a data set.

    Args:
        x: the examples ``(batch, C, *space)``, or clips ``(batch, frames, C, H, W)``.
        positions: their positions in their split ``(batch,)``, which key the noise of an evaluation.
        mask: valid frames of clips of unequal lengths ``(batch, frames)``; None where all are.
        condition: labels or covariates ``(batch, variables)``, NaN where unknown; None where the data have none.
    """

    x: Tensor
    positions: Tensor
    mask: Tensor | None = None
    condition: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; positions stay on the CPU."""
        mask, condition = (None if each is None else each.to(device) for each in (self.mask, self.condition))
        return Batch(self.x.to(device), self.positions, mask, condition)


class Inference(NamedTuple):
    """A network's result for a batch.

    Shapes:
        h ``(*batch, in_channels, *space)``, target ``(*batch, C, *space)``, kl ``(*batch, layers)`` in nats,
        log_ratio ``(*batch,)``: log p(z) − log q(z|x) at the draw that gave h. For clips h and target are
        ``(*batch, frames, ...)``; mask ``(*batch, frames)`` marks valid frames, None where all are.
    """

    h: Tensor
    target: Tensor
    kl: Tensor
    log_ratio: Tensor
    mask: Tensor | None = None

    def scored(self) -> tuple[Tensor, Tensor]:
        """Features and target for the likelihood: all, or the valid frames of all clips in one row."""
        return (self.h, self.target) if self.mask is None else (self.h[self.mask], self.target[self.mask])

    def per_example(self, log_likelihood: Tensor) -> Tensor:
        """Sum the log-likelihood of what is :meth:`scored` over each example or clip, ``(*batch,)``."""
        if self.mask is not None:
            frames = log_likelihood.new_zeros(self.mask.shape)
            return frames.index_put((self.mask,), log_likelihood).sum(-1)
        batch_axes = self.kl.dim() - 1
        return log_likelihood.flatten(batch_axes).sum(-1) if log_likelihood.dim() > batch_axes else log_likelihood

    def dims(self) -> Tensor:
        """Number of scored values in each example, ``(*batch,)``."""
        batch = self.kl.shape[:-1]
        values = self.target.shape[len(batch) :].numel()
        if self.mask is None:
            return torch.full(batch, values, device=self.target.device)
        return self.mask.sum(-1) * (values // self.mask.shape[-1])


class Elbo(NamedTuple):
    r"""The evidence lower bound of each example, in nats: :math:`\log p(x|z) - \sum_l KL_l`.

    Shapes:
        log_likelihood ``(*batch,)``, kl ``(*batch, layers)``; every property ``(*batch,)``.

    >>> elbo = Elbo(torch.tensor([-10.0]), torch.tensor([[1.0, 2.0]]))
    >>> elbo.total, elbo.rate, elbo.distortion
    (tensor([-13.]), tensor([3.]), tensor([10.]))
    """

    log_likelihood: Tensor
    kl: Tensor

    @property
    def rate(self) -> Tensor:
        """KL of all stochastic layers together."""
        return self.kl.sum(-1)

    @property
    def distortion(self) -> Tensor:
        """Negative log-likelihood of the data given the latents."""
        return -self.log_likelihood

    @property
    def total(self) -> Tensor:
        """The bound itself: higher is better."""
        return self.log_likelihood - self.rate


class Prior(nn.Module, ABC):
    """p(z) over flat latents ``(*batch, latent_dim)``; one that is fitted sets :attr:`needs_fit` and defines :meth:`fit`."""

    is_standard: bool = False
    """Whether it is N(0, I)."""
    is_learned: bool = False
    """Whether it is trained together with the network."""
    needs_fit: bool = False
    """Whether :meth:`fit` has to be called before the prior can be used."""
    least_latents: int = 0
    """The smallest number of latents that :meth:`fit` accepts."""
    density_passes: int = 1
    """About how many passes of its network a density takes as long as: after short trainings, fewer examples are evaluated."""

    def given(self, condition: Tensor | None) -> "Prior":
        """p(z|c) of the examples with these conditions ``(batch, variables)``; itself, where it does not depend on them."""
        return self

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z, ``(*batch,)``, in nats."""

    @abstractmethod
    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        """KL(q‖p), ``(*batch,)``, in nats: in closed form where there is one, else estimated from the draw z."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """N draws ``(n, latent_dim)``; the temperature scales their spread."""

    def fit(self, latents: Tensor, held_out: Tensor | None = None, seed: int = 0) -> None:
        """Fit the density to posterior draws ``(n, latent_dim)``, :attr:`least_latents` or more.

        Args:
            latents: posterior draws.
            held_out: other draws ``(m, latent_dim)``, for choices such as the number of components.
            seed: of the fit's randomness.

        Raises:
            ValueError: the prior has nothing to fit, or cannot be fitted to these latents.
        """
        raise ValueError(f"{type(self).__name__} has nothing to fit: it does not define fit(latents)")

    def fit_given(
        self,
        latents: Tensor,
        condition: Tensor | None,
        held_out: Tensor | None = None,
        held_condition: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        """Fit p(z|c) to latents and their conditions ``(n, variables)``; a prior without conditions fits p(z)."""
        self.fit(latents, held_out, seed)

    def as_mixture(self) -> tuple[Tensor, Tensor, Tensor]:
        """The density as a mixture of K Gaussians: log-weights ``(K,)``, means ``(K, d)``, Cholesky factors ``(K, d, d)``.

        Raises:
            ValueError: it is no such mixture.
        """
        raise ValueError(
            f"{type(self).__name__} is no mixture of Gaussians, so its latents cannot be coded one after the other; take the"
            " prior mixture, gaussian or standard (sigma-vae fit-prior RUN --prior mixture)"
        )


ChooseLatents = Callable[[Normal, Normal | None], Tensor]
"""Chooses a layer's latents, given their prior, and their posterior where there are data."""


class Prediction(NamedTuple):
    """Features ``(n, frames, in_channels, H, W)`` of predicted frames, and the frames ``(n, frames, C, H, W)``."""

    h: Tensor
    frames: Tensor


@dataclass(frozen=True)
class Latents:
    """Shapes of one example's latents in each layer, from the top down."""

    shapes: tuple[tuple[int, ...], ...]

    @property
    def layers(self) -> int:
        """Number of stochastic layers."""
        return len(self.shapes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of latents in each layer."""
        return tuple(math.prod(shape) for shape in self.shapes)


class _Vectors(Latents):
    __match_args__ = ("dim",)

    def __init__(self, dim: int) -> None:
        super().__init__(((dim,),))

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.shapes[0][0]


@final
class Flat(_Vectors):
    """One vector per example: z ``(*batch, dim)``.

    >>> Flat(20).sizes
    (20,)
    """


@final
class Frames(_Vectors):
    """One vector per frame of a clip: z ``(*batch, frames, dim)``."""


@final
class Maps(Latents):
    """One feature map per example: z ``(*batch, channels, *space)``, with ``space`` for data of the training size."""

    def __init__(self, channels: int, *space: int) -> None:
        super().__init__(((channels, *space),))


@final
class Hierarchy(Latents):
    """Several layers, each conditioned on those above it."""


def _unchanged(x: Tensor) -> Tensor:
    return x


class Network(nn.Module, ABC):
    """Encoder, latents and decoder.

    A subclass defines :attr:`latents`, :meth:`infer` and :meth:`generate`: enough to train, evaluate, sample and save
    it. Each other method is a capability, which :attr:`has_posterior` and its like report; that of the base class
    raises ValueError with the reason. To allow :meth:`VAE.fit_prior`, keep a :class:`Prior` as ``self.prior`` and use
    it in both methods.
    """

    reads_clips: bool = False
    """Whether examples are clips ``(batch, frames, C, H, W)``; if so, :meth:`predict` continues them."""
    context_frames: int = 0
    """Number of given frames at the start of a clip: the likelihood covers the frames after them."""
    reads_condition: bool = False
    """Whether ``condition`` is read: labels or covariates, ``(batch, variables)``."""
    conditions: Conditions | None = None
    """The variables of ``condition``, where it is read."""
    encoder_input: Callable[[Tensor], Tensor] = staticmethod(_unchanged)
    """Map from data x to the encoder's input; :class:`~sigma_vae.VAE` sets it to :meth:`Likelihood.encoder_input`."""
    trains_in_bfloat16: bool = False
    """Whether bfloat16 training was measured to give the same results, so that ``precision="auto"`` may choose it."""
    starts_solved: bool = True
    """Whether ``start="auto"`` takes the start that :attr:`has_start` tells of; ``start="principal"`` does in any case."""
    prior: Prior
    """p(z), where :attr:`has_prior`."""
    portable_name: str | None = None
    """Name that makes such a network again without other files, where the name that it was made by needs some."""
    diffusers_config: dict[str, Any] | None = None
    """Configuration of the ``AutoencoderKL`` of diffusers that has the same layers, where there is one."""

    @property
    @abstractmethod
    def latents(self) -> Latents:
        """Shape of the latents."""

    @abstractmethod
    def infer(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Noise | None = None,
        condition: Tensor | None = None,
    ) -> Inference:
        """Features, target and KL of a batch, from one posterior draw.

        Args:
            x: data ``(batch, C, *space)``, or clips ``(batch, frames, C, H, W)``.
            context: conditioning frames of clips.
            mask: valid frames of clips, ``(batch, frames)``.
            noise: source of the posterior's standard normal numbers; torch's global generator unless given.
            condition: labels or covariates ``(batch, variables)``, NaN where unknown.
        """

    @abstractmethod
    def generate(
        self,
        n: int,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: Temperature = 1.0,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Features ``(n, in_channels, *space)`` of n draws from the prior.

        A network that reads conditions draws them too where none is given.
        """

    @property
    def has_posterior(self) -> bool:
        """Whether one layer of latents has a :meth:`posterior` and a :meth:`decode`."""
        return self._defines("posterior") and self._defines("decode")

    @property
    def has_prior(self) -> bool:
        """Whether ``self.prior`` can be replaced by a prior fitted to the latents."""
        return isinstance(getattr(self, "prior", None), Prior)

    @property
    def has_draw(self) -> bool:
        """Whether :meth:`draw` decodes several draws of each example from one posterior."""
        return self._defines("draw")

    @property
    def has_descent(self) -> bool:
        """Whether :meth:`descend` decodes latents that are chosen layer by layer."""
        return self._defines("descend")

    @property
    def has_latent_kl(self) -> bool:
        """Whether :meth:`latent_kl` gives the KL of each latent."""
        return self._defines("latent_kl")

    def posterior(self, x: Tensor, condition: Tensor | None = None) -> Normal:
        """q(z|x) of a network with one layer of latents; its parameters have the shape of z."""
        raise self._lacks("no single layer of flat latents", "posterior(x)")

    def decode(self, z: Tensor | Sequence[Tensor], condition: Tensor | None = None) -> Tensor:
        """Features of given latents."""
        raise self._lacks("no way to decode given latents", "decode(z)")

    def draw(self, x: Tensor, posterior: Normal, unit: Tensor, condition: Tensor | None = None) -> Inference:
        """Do what :meth:`infer` does, for several draws of each example from a posterior that is already computed.

        Shapes:
            unit ``(*draws, batch, *shape of z)``, standard normal numbers; h ``(*draws, batch, in_channels, *space)``,
            kl ``(*draws, batch, layers)`` and so on.
        """
        raise self._lacks("no way to decode several draws at once", "draw(x, posterior, unit)")

    def draw_latents(self, x: Tensor, noise: Noise | None = None, condition: Tensor | None = None) -> Tensor | Sequence[Tensor]:
        """One posterior draw of the latents, as :meth:`decode` takes them."""
        raise self._lacks("no latents that could be decoded again", "draw_latents(x)")

    def descend(self, choose: ChooseLatents, x: Tensor | None = None) -> Tensor:
        """Features of one example whose latents are chosen layer by layer, from the top down.

        ``choose(prior, posterior)`` gets p(z_l | z_<l), and with data ``(1, C, *space)`` also q(z_l | z_<l, x); it returns z_l.
        """
        raise self._lacks("no layers of latents that are chosen one by one", "descend(choose, x)")

    @property
    def has_start(self) -> bool:
        """Whether :meth:`start_from` can start training at the best linear VAE."""
        return self._defines("start_from")

    def start_from(self, data: Iterable[Tensor], mean: MeanMap | None, features: Callable[[float], Tensor]) -> float | None:
        """Set the weights so that the network is the best linear VAE of these data: training starts there.

        Args:
            data: batches ``(batch, C, *space)`` in random order, the same in each pass; a list or a loader.
            mean: map from the first C feature channels to the mean; None where they have another meaning.
            features: ``(in_channels,)``, at which residuals have the given std.

        Returns:
            The std of the residuals that a linear decoder leaves; None where the data have no variance, so that nothing changes.
        """
        raise self._lacks("no start that can be solved", "start_from(data, mean, features)")

    def replace_prior(self, prior: Prior) -> None:
        """Use this prior from now on; ValueError unless :attr:`has_prior`."""
        if not self.has_prior:
            raise self._lacks("no replaceable prior", "a Prior as self.prior")
        self.prior = prior

    @property
    def has_resize(self) -> bool:
        """Whether :meth:`resize` takes examples of another size."""
        return self._defines("resize")

    def resize(self, size: Sequence[int]) -> None:
        """Take examples of this size ``(*space)`` from now on; ValueError unless :attr:`has_resize`.

        The weights do not change. A fitted prior knows latents of one size, so N(0, I) takes its place.
        """
        raise self._lacks("one size of examples", "resize(size)")

    def latent_kl(self, x: Tensor, noise: Noise | None = None, condition: Tensor | None = None) -> list[Tensor]:
        """KL(q‖p) of each latent, ``(batch, *shape)`` for each layer, in nats."""
        raise self._lacks("no report of the KL of single latents", "latent_kl(x)")

    def predict(
        self,
        context: Tensor,
        frames: int,
        show: Callable[[Tensor], Tensor],
        noise: Noise | None = None,
        temperature: float = 1.0,
        *,
        batch_statistics: bool = False,
        condition: Tensor | None = None,
    ) -> Prediction:
        """Continue clips frame by frame; ``show`` turns features into the frame that the next one is predicted from."""
        raise ValueError(f"{type(self).__name__} predicts no frames: it reads single examples, not clips")

    def shards(self) -> Sequence[nn.Module]:
        """Blocks whose weights can be sharded across processes one by one (FSDP)."""
        return ()

    def refuse_unread(self, context: Tensor | None = None, mask: Tensor | None = None, condition: Tensor | None = None) -> None:
        """Raise ValueError for arguments that are given and not read: see :attr:`reads_clips`, :attr:`reads_condition`."""
        for name, value in (("context", context), ("mask", mask)):
            if value is not None and not self.reads_clips:
                raise ValueError(f"{name} is for video networks; {type(self).__name__} reads single examples and takes none")
        if condition is not None and not self.reads_condition:
            raise ValueError(f"{type(self).__name__} reads no condition; leave condition out")

    def _defines(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(Network, method)

    def _lacks(self, what: str, remedy: str) -> ValueError:
        return ValueError(f"{type(self).__name__} has {what}: it does not define {remedy}")


class DataDistribution(Distribution, ABC):
    """p(x|z): the distribution of one example's values, batch ``(*batch,)``, event ``(C, *space)``.

    A subclass defines ``log_prob``, ``mean`` and ``sample`` as every torch distribution does, and :meth:`element_cdf`.
    """

    exponential_family: bool = False
    """Whether it is a density of an exponential family with an ``entropy()`` (for Damm et al. 2023)."""

    @abstractmethod
    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """F(x−) and F(x) of each value, of the data's shape; of dependent values, given those before."""

    def element_log_prob(self, value: Tensor) -> Tensor | None:
        """Log-probability of each value, of the data's shape, which add up to ``log_prob``; None where there are none."""
        return None

    def standardised(self, value: Tensor) -> Tensor | None:
        """Residuals in units of σ, of the data's shape; None unless it is a density with a location and a scale."""
        return None

    def squared_errors(self, value: Tensor, scores: Tensor) -> tuple[Tensor, Tensor] | None:
        """Predicted variance of each value, and a square of that mean where the prediction is right; None if costly.

        ``scores`` are the values' normal scores, Φ⁻¹ of a randomised F.
        """
        return None


class Likelihood(nn.Module, ABC):
    """p(x|z): from decoder features to a distribution over data.

    A subclass says how many feature channels it reads, :attr:`in_channels`, and makes the :meth:`distribution`, from
    which bin probabilities and distribution functions are derived. The base has no scale; a subclass with one overrides
    :attr:`has_scale`, :meth:`calibrate` and so on.
    """

    takes_scale: bool = False
    """Whether it is made with a scale, so that it is named ``family/scale``."""
    unit_interval: bool = False
    """Whether data must lie in [0, 1]."""
    mean_map: MeanMap | None = None
    """Map from the first ``channels`` features to the mean; None where features have another meaning."""
    observes: Observes = "density"
    """Objective of training: the density of the values, or the probability of their levels' bins."""
    normalised: bool = True
    """Whether ``log_prob`` is the logarithm of a probability; otherwise it is an objective, without ``log_mass``."""
    independent_channels: bool = True
    """Whether the channels of a place are independent of each other given the features; else each follows those before it."""

    def __init__(self, channels: int, spatial_dims: int, levels: int | None) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels counts the data's channels and is at least 1, got {channels}")
        if spatial_dims < 0:
            raise ValueError(f"spatial_dims is 0 for tables, 1 for series, 2 for images, got {spatial_dims}")
        if levels is not None and levels < 2:
            raise ValueError(f"levels counts the values a datum can take: at least 2, or None for real data, got {levels}")
        self.channels = channels
        self.spatial_dims = spatial_dims
        self.levels = levels

    @property
    @abstractmethod
    def in_channels(self) -> int:
        """Feature channels that the decoder must give."""

    @abstractmethod
    def distribution(
        self, h: Tensor, x: Tensor | None = None, *, observes: Observes | None = None, refitted: bool = False
    ) -> DataDistribution:
        """The distribution p(x|h): batch ``(*batch,)``, event ``(C, *space)``.

        Args:
            h: decoder features ``(*batch, in_channels, *space)``.
            x: data, which are checked. In training an optimal σ is solved for them; evaluation never takes σ from them.
            observes: ``self.observes`` unless given.
            refitted: with the σ that ``calibrate`` solved, whatever the scale.
        """

    def forward(self, h: Tensor, x: Tensor | None = None) -> DataDistribution:
        """Call :meth:`distribution`."""
        return self.distribution(h, x)

    def log_mass(self, h: Tensor, x: Tensor, *, refitted: bool = False, post_hoc: bool | None = None) -> Tensor:
        """Log-probability ``(*batch,)`` of the observed levels' bins, in nats: the number that compares all families.

        ``post_hoc`` is the deprecated name of ``refitted``.

        Raises:
            ValueError: the data have no levels, x is off them, or no σ is known yet.
        """
        distribution, x = self._of_data(h, x, "level", refitted, post_hoc)
        log_prob: Tensor = distribution.log_prob(x)
        return log_prob

    def element_cdf(
        self, h: Tensor, x: Tensor, observes: Observes, *, refitted: bool = False, post_hoc: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """F(x−) and F(x) of each value, of the data's shape: see :meth:`DataDistribution.element_cdf`.

        ``post_hoc`` is the deprecated name of ``refitted``.

        Raises:
            ValueError: the likelihood has no such probabilities, x cannot be drawn from them, or no σ is known yet.

        >>> from sigma_vae import Fixed, Gaussian
        >>> likelihood = Gaussian(1, Fixed(0.5), spatial_dims=0, levels=3)
        >>> likelihood.element_cdf(torch.zeros(1, 1) + 0.5, torch.zeros(1, 1) + 0.5, "level")  # Φ(−½), Φ(½)
        (tensor([[0.3085]]), tensor([[0.6915]]))
        """
        distribution, x = self._of_data(h, x, observes, refitted, post_hoc)
        return distribution.element_cdf(x)

    def calibrate(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Solve the stored scales exactly on pairs (h, x), a list or a loader; do nothing where there is no scale."""

    def calibrate_observed(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Solve the scales for what the likelihood observes; others may stay as they are, where that is sooner done."""
        self.calibrate(pairs)

    @property
    def has_scale(self) -> bool:
        """Whether the likelihood has a σ."""
        return False

    @property
    def predicts_scale(self) -> bool:
        """Whether the decoder predicts σ for each example or value; a refit is then one factor on all predictions."""
        return False

    @property
    def has_post_hoc(self) -> bool:
        """Whether ``calibrate`` solves a σ apart from the likelihood's own, for ``refitted=True``."""
        return False

    @property
    def sigma_is_rmse(self) -> bool:
        """Whether σ is one number, at its best the root mean squared error: a Gaussian's density with one σ."""
        return False

    @property
    def log_floor(self) -> float:
        """The least log σ that ``calibrate`` solves; −∞ where there is no scale."""
        return -math.inf

    def log_sigma(self, observes: Observes | None = None, *, refitted: bool = False) -> Tensor | None:
        """Log σ in evaluation, broadcastable to the data's event; None where there is no σ, or the decoder predicts it.

        Arguments are those of :meth:`distribution`: the best σ for a density is not the best for bin probabilities.
        """
        return None

    def sigma(self, observes: Observes | None = None, *, refitted: bool = False) -> Tensor | None:
        """The exponential of :meth:`log_sigma`."""
        log_sigma = self.log_sigma(observes, refitted=refitted)
        return None if log_sigma is None else log_sigma.exp()

    def refitted_log_scales(self) -> dict[Observes, Tensor]:
        """Log σ that ``calibrate`` solved, for each objective; a log factor where the decoder predicts σ."""
        return {}

    def start(self, std: float) -> None:
        """Start a learned σ from the std of the data, unless it was given or learned before."""

    def widen(self, ratio: float) -> None:
        """Train a solved σ with so many times the batch's: the ratio of held-out residuals to training residuals."""

    @property
    def has_mass(self) -> bool:
        """Whether :meth:`log_mass` gives a probability, so that there are bits per dimension."""
        return self.levels is not None and self.normalised

    def encoder_input(self, x: Tensor) -> Tensor:
        """Encoder input for data x, of the same shape: x itself, or for counts their logarithm."""
        return x

    def start_features(self, std: float) -> Tensor:
        """Features ``(in_channels,)`` from which training may start, if residuals have this std; 0 where nothing is known."""
        return torch.zeros(self.in_channels)

    def start_features_for(self, data: Iterable[Tensor], std: float) -> Tensor:
        """Do the same for these data, batches ``(batch, channels, *space)``: by :meth:`start_features`, or by a look at them."""
        return self.start_features(std)

    def set_floor(self, relative: float | None = None, std: float = 1.0) -> None:
        """Set the least σ where there is one and none was given to the scale.

        Args:
            relative: in distances of two levels, or in units of ``std`` for real values; None: the default of each.
            std: of the data.
        """

    def post_hoc(self, h: Tensor) -> DataDistribution:
        """Deprecated: write ``distribution(h, refitted=True)``."""
        warnings.warn("post_hoc(h) is now distribution(h, refitted=True)", DeprecationWarning, stacklevel=2)
        return self.distribution(h, refitted=True)

    def check_observes(self, observes: Observes | None) -> Observes:
        """Return what is asked for, ``self.observes`` unless given.

        Raises:
            ValueError: it is levels, and there are none, or their probabilities would not sum to one.
        """
        observes = observes or self.observes
        if observes == "level" and self.levels is None:
            raise ValueError(
                f"{self} models real-valued data (levels=None), which have a density but no probability of a level; report"
                " `likelihood(h).log_prob(x)`, or say how many levels the data have"
            )
        if observes == "level" and not self.has_mass:
            raise ValueError(
                f"{self} is an objective, not a likelihood, of data with {self.levels} levels: its values sum to no probability,"
                " so there are no bits/dim to report; build it with levels=2 for binary data, or take ContinuousBernoulli"
            )
        return observes

    def check_data(self, x: Tensor, shape: Sequence[int], observes: Observes) -> None:
        """Refuse data that the distribution cannot have drawn.

        Raises:
            ValueError: x has another shape, is off its levels where they are observed, or outside [0, 1] where the
                family is bounded.
        """
        if x.shape != torch.Size(shape):
            raise ValueError(f"{self} was given data of shape {tuple(x.shape)} for features of shape {tuple(shape)}")
        if torch.compiler.is_compiling():  # the checks below read values off the device
            return
        if observes == "level":
            assert self.levels is not None
            _check_levels(x, self.levels)
        elif self.unit_interval and x.numel():
            low, high = (float(v) for v in x.aminmax())
            if not (low >= 0 and high <= 1):
                raise ValueError(f"{self} expects data in [0, 1], got values in [{low:.4g}, {high:.4g}]; rescale the data")

    def extra_repr(self) -> str:
        """Arguments as they would be written."""
        return f"channels={self.channels}" + ("" if self.levels == 256 else f", levels={self.levels}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def _of_data(
        self, h: Tensor, x: Tensor, observes: Observes, refitted: bool, post_hoc: bool | None
    ) -> tuple[DataDistribution, Tensor]:
        """The distribution of evaluation, which has not seen x, and x: checked, in full precision."""
        if post_hoc is not None:
            warnings.warn("post_hoc= is now refitted=", DeprecationWarning, stacklevel=3)
            refitted = post_hoc
        x = at_least_float32(x)
        distribution = self.distribution(h, observes=observes, refitted=refitted)
        self.check_data(x, distribution.batch_shape + distribution.event_shape, observes)
        return distribution, x


def _check_levels(x: Tensor, levels: int) -> None:
    top = levels - 1
    off = (x * top - torch.round(x * top).clamp(0, top)).abs().max() if x.numel() else 0.0
    if not float(off) <= 0.01:
        low, high = (float(v) for v in x.aminmax())
        raise ValueError(
            f"log_mass expects levels k/{top} in [0, 1] (levels={levels}), got values in [{low:.4g}, {high:.4g}] that lie"
            f" {float(off):.3g} of a level off; scale {levels}-level data by 1/{top} and do not add noise,"
            " or build the likelihood with the data's own `levels`"
        )


def standard_normal(like: Tensor, noise: Noise | None) -> Tensor:
    """Standard normal numbers like this tensor, from ``noise`` or else torch's global generator."""
    return torch.randn_like(like) if noise is None else noise(like.shape).to(like)


def in_full_precision(device: str) -> AbstractContextManager[object]:
    """Context that switches autocast off: half precision would round a likelihood's terms to whole nats."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def as_argument(condition: Tensor | None) -> tuple[Tensor, ...]:
    """A condition as the last argument of a network's method: none where there is none, as not every network takes it."""
    return () if condition is None else (condition,)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision, integers and booleans to float32; single and double precision stay.

    KL terms and densities would lose whole nats in half precision, and differences of unsigned integers wrap around.

    Raises:
        ValueError: the numbers are complex.
    """
    if x.is_complex():
        raise ValueError(f"expected real numbers, got {x.dtype}; take real and imaginary part as two channels")
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


HOTTEST = 1e30
"""Largest temperature: latents remain finite."""


def per_layer(temperature: Temperature, layers: int) -> list[float]:
    """One temperature for each layer, from one for all or from as many as there are.

    Raises:
        ValueError: one is below 0 or too large, or their number is wrong.

    >>> per_layer(0.5, layers=2), per_layer([1.0, 0.0], layers=2)
    ([0.5, 0.5], [1.0, 0.0])
    """
    values = list(temperature) if isinstance(temperature, Sequence) else [temperature] * layers
    if len(values) != layers:
        raise ValueError(f"temperature is one number, or one for each of {layers} layers of latents; got {len(values)} of them")
    for value in values:
        if not 0 <= value <= HOTTEST:
            raise ValueError(f"temperature scales the spread of latents, up to {HOTTEST:g}, and is at least 0, got {value}")
    return values


# -- priors that are fitted --------------------------------------------------------------------------------------------


class FittedPrior(Prior):
    r"""A density fitted to latents, draws z ~ q(z|x) of many examples. Their distribution is the aggregate posterior.

    .. math:: q(z) = \tfrac1N \sum_n q(z|x_n), \qquad E_x KL(q(z|x) \| p(z)) = I_q(x; z) + KL(q(z) \| p(z))

    The prior with the highest mean log-density of the latents has the smallest KL(q(z)‖p(z)). This term separates the
    ELBO from the best bound that encoder and decoder allow (Hoffman and Johnson 2016, "ELBO surgery"). With the fitted
    prior the ELBO is still a bound.

    A subclass keeps its fit in buffers (NaN before) and in parameters without gradients, so that it is saved with the
    model. Loading them makes the prior a fitted one.

    Args:
        latent_dim: size of z.
        least_latents: smallest number of latents that it can be fitted to.

    Raises:
        ValueError: latent_dim is below 1.
    """

    needs_fit = True

    def __init__(self, latent_dim: int, least_latents: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim is the size of z, at least 1; got {latent_dim}")
        self.latent_dim = latent_dim
        self.least_latents = least_latents
        self.fitted = False
        self.register_load_state_dict_post_hook(_see_whether_fitted)  # type: ignore[no-untyped-call]

    @abstractmethod
    def fit(self, latents: Tensor, held_out: Tensor | None = None, seed: int = 0) -> None:
        """Fit as :meth:`Prior.fit` says: in float64 on the CPU, stored in this module's dtype and device."""

    def checked(self, latents: Tensor, least: int | None = None) -> Tensor:
        """Check shape and number of the latents, and convert them to float64 on the CPU."""
        least = self.least_latents if least is None else least
        if latents.dim() != 2 or latents.shape[1] != self.latent_dim:
            raise ValueError(f"latents are (n, {self.latent_dim}), one row per example; got {tuple(latents.shape)}")
        if len(latents) < least:
            raise ValueError(
                f"{type(self).__name__} over {self.latent_dim} latents needs at least {least} examples, got {len(latents)};"
                " give more examples or take fewer latents"
            )
        if not bool(latents.isfinite().all()):
            raise ValueError("latents are finite numbers, got NaN or infinity; the encoder has diverged")
        return latents.detach().double().cpu()

    def require_fitted(self) -> None:
        """Refuse to be used before the fit."""
        if not self.fitted:
            raise ValueError(f"this {type(self).__name__} is not fitted yet; fit it to latents: vae.fit_prior(loader, prior)")


def fitted(
    prior: Prior,
    latents: Tensor,
    held_out: Tensor | None,
    seed: int,
    condition: Tensor | None = None,
    held_condition: Tensor | None = None,
) -> None:
    """Fit a prior to latents, and to their conditions, in place.

    Raises:
        ValueError: it cannot be fitted to them, or not in the numbers that it is kept in.
    """
    try:
        prior.fit_given(latents, condition, held_out, held_condition, seed)
    except RuntimeError as error:  # of a decomposition
        raise ValueError(
            f"{type(prior).__name__} cannot be fitted to these latents, they are too large or lie in a plane"
        ) from error
    broken = [name for name, value in prior.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"{type(prior).__name__} fitted to latents up to {float(latents.abs().max()):.3g} is not finite ({broken[0]}); train the model"
            " again with a lower learning rate"
        )


def _see_whether_fitted(module: nn.Module, incompatible_keys: object) -> None:
    """Update ``fitted`` after loading: an unfitted prior holds NaN or nothing."""
    assert isinstance(module, FittedPrior)
    module.fitted = all(buffer.numel() > 0 and bool(torch.isfinite(buffer).all()) for buffer in module.buffers())
