"""Networks, likelihoods and data by name."""

from collections.abc import Callable, Sequence
from functools import partial

from sigma_vae import data as data_sources
from sigma_vae.config import DataConfig, ModelConfig
from sigma_vae.data import Scaling, Splits
from sigma_vae.likelihoods import (
    Bernoulli,
    BitwiseCategorical,
    Categorical,
    ContinuousBernoulli,
    Fixed,
    Gaussian,
    Laplace,
    Logistic,
    LogisticMixture,
    Optimal,
    PerImage,
    PerPixel,
    RunningMinimum,
    Scale,
    Shared,
    StudentT,
)
from sigma_vae.likelihoods.base import LocationScale, MeanMap
from sigma_vae.likelihoods.unscaled import Discrete, Unscaled
from sigma_vae.naming import check_prior, positive, unknown
from sigma_vae.networks import SequenceNetwork, conv, hierarchical, mlp, residual, sequence
from sigma_vae.networks.default import default_network
from sigma_vae.networks.hierarchical import check_plan
from sigma_vae.types import Likelihood, Network, Observes
from sigma_vae.vae import VAE

__all__ = ["check_network", "data", "likelihood", "network", "vae"]

FAMILIES: dict[str, Callable[..., LocationScale]] = {
    "gaussian": Gaussian,
    "laplace": Laplace,
    "logistic": Logistic,
    "student-t": StudentT,
    "student-t:learned": partial(StudentT, df="learned"),
    "student-t:predicted": partial(StudentT, df="predicted"),
}

FAMILIES_WITH_A_NUMBER: dict[str, Callable[[float], Callable[..., LocationScale]]] = {
    "student-t": lambda df: partial(StudentT, df=df),
}

UNSCALED: dict[str, type[Bernoulli | ContinuousBernoulli | Categorical | BitwiseCategorical | LogisticMixture]] = {
    "bernoulli": Bernoulli,
    "continuous-bernoulli": ContinuousBernoulli,
    "categorical": Categorical,
    "bitwise-categorical": BitwiseCategorical,
    "logistic-mixture": LogisticMixture,
}
"""Families that have no scale."""

SCALES: dict[str, Callable[[], Scale]] = {
    "optimal": Optimal,
    "optimal-image": lambda: Optimal(per="image"),
    "optimal-channel": lambda: Optimal(per="channel"),
    "optimal-pixel": lambda: Optimal(per="pixel"),
    "shared": Shared,
    "per-image": PerImage,
    "per-pixel": PerPixel,
    "running-minimum": RunningMinimum,
}

SCALES_WITH_A_NUMBER: dict[str, Callable[[float], Scale]] = {"fixed": Fixed, "beta": Fixed.from_beta}

NETWORKS: dict[str, Callable[..., Network]] = {"residual": residual, "conv": conv, "mlp": mlp, "hierarchical": hierarchical}

NETWORKS_WITH_A_PLAN: dict[str, Callable[[str], Callable[..., Network]]] = {
    "hierarchical": lambda plan: partial(hierarchical, plan=plan),
}

VIDEO_NETWORKS: dict[str, Callable[..., SequenceNetwork]] = {
    "sequence": sequence,
    "sequence:dcgan": sequence,
    "sequence:vgg": partial(sequence, backbone="vgg"),
    "sequence:dcgan-fixed": partial(sequence, learned_prior=False),
    "sequence:vgg-fixed": partial(sequence, backbone="vgg", learned_prior=False),
}
"""Networks for clips, told how many frames are given."""


def likelihood(
    name: str,
    channels: int,
    *,
    spatial_dims: int = 2,
    levels: int | None = 256,
    mean: MeanMap = "unit",
    observes: Observes = "density",
) -> Likelihood:
    """A likelihood by its name: ``family/scale``, or the family alone where it has no scale.

    Either takes a number after a colon where it has one: ``student-t:3/fixed:0.1``. ``mean`` and ``observes`` are for scaled ones.

    Raises:
        ValueError: the family or the scale does not exist (the nearest name is given), a number is missing, or the family has no
            scale, or no level masses to be trained on.

    >>> likelihood("gaussian/fixed:0.1", channels=3)
    Gaussian(channels=3, scale=Fixed(0.1))
    >>> likelihood("logistic-mixture:5", channels=1)
    LogisticMixture(channels=1, components=5)
    """
    first, _, rest = name.partition("/")
    if first.partition(":")[0] in UNSCALED:
        return _unscaled(name, channels, spatial_dims, levels, observes)
    if not rest:
        raise ValueError(unknown("likelihood", name, _likelihood_names()))
    family, scale = _family(name, first), _scale(name, rest)
    return family(channels, scale, spatial_dims=spatial_dims, levels=levels, mean=mean, observes=observes)


def network(
    name: str,
    shape: Sequence[int],
    out_channels: int,
    latent_dim: int | None = None,
    width: int | None = None,
    context_frames: int = 2,
) -> Network:
    """A network by its name, sized for examples of this shape (of clips, for their frames); sizes not given are the network's own.

    Raises:
        ValueError: the name does not exist, or the sizes do not fit.

    >>> network("hierarchical:14,14d14/1,14m1,14", (1, 28, 28), out_channels=1).plan.layers
    3
    """
    check_network(name)
    kind, colon, plan = name.partition(":")
    sizes = {"latent_dim": latent_dim, "width": width}
    given = {what: size for what, size in sizes.items() if size is not None}
    for what, size in given.items():
        if size < 1:
            raise ValueError(f"{what} is at least 1, got {size}")
    if name in VIDEO_NETWORKS:
        return VIDEO_NETWORKS[name](shape, out_channels, **given, context_frames=context_frames)
    make = NETWORKS_WITH_A_PLAN[kind](plan) if colon else NETWORKS[kind]
    return make(shape, out_channels, **given)


def check_network(name: str) -> None:
    """Refuse what is no network, whatever the data.

    Raises:
        ValueError: the name does not exist, or its plan cannot be read.

    >>> check_network("hierarchical:tiny")
    """
    kind, colon, plan = name.partition(":")
    if name not in VIDEO_NETWORKS and kind not in (NETWORKS_WITH_A_PLAN if colon else NETWORKS):
        plans = [f"{kind}:tiny" for kind in NETWORKS_WITH_A_PLAN]
        raise ValueError(unknown("network", name, [*NETWORKS, *plans, *VIDEO_NETWORKS]))
    if colon and name not in VIDEO_NETWORKS:
        check_plan(plan)


def vae(config: ModelConfig, shape: Sequence[int], scaling: Scaling, *, clips: bool = False) -> VAE:
    """The model that a config names, for data of this shape ``(C, *space)``, scaled like this; for clips, with the shape of a frame.

    Its prior is the one that it is trained with, N(0, I) where the latents are flat: :meth:`VAE.fit_prior` comes after training.

    Raises:
        ValueError: a name is unknown, or what it names does not fit the data or the other options.
    """
    mean: MeanMap = config.mean if config.mean != "auto" else "identity" if scaling.standardised else "unit"
    decoder = likelihood(
        config.likelihood, shape[0], spatial_dims=len(shape) - 1, levels=scaling.levels, mean=mean, observes=config.observes
    )
    if config.mean != "auto" and not isinstance(decoder, LocationScale):
        raise ValueError(
            f"{config.likelihood} makes of features more than a mean, and takes no mean={config.mean!r}; leave it at auto"
        )
    sizes = (config.latent_dim, config.width, config.context_frames)
    name = config.network if config.network != "auto" else default_network(shape, clips=clips)
    made = network(name, shape, decoder.in_channels, *sizes)
    check_prior(config.prior, name, made)
    return VAE(made, decoder)


def data(config: DataConfig) -> Splits:
    """The data that a config names."""
    return data_sources.load(config)


def _family(name: str, first: str) -> Callable[..., LocationScale]:
    if first in FAMILIES:
        return FAMILIES[first]
    kind, _, number = first.partition(":")
    if kind not in FAMILIES_WITH_A_NUMBER:
        raise ValueError(unknown("likelihood", name, _likelihood_names()))
    what = "its degrees of freedom, learned or predicted"
    return FAMILIES_WITH_A_NUMBER[kind](positive(name, kind, number, what, "3"))


def _unscaled(name: str, channels: int, spatial_dims: int, levels: int | None, observes: Observes) -> Unscaled:
    head, slash, scale = name.partition("/")
    family, colon, number = head.partition(":")
    if slash:
        raise ValueError(
            f"{name}: {family} has no scale, its features alone say how sure they are; got {scale!r}, write {head!r}"
        )
    kind = UNSCALED[family]
    if observes == "level" and not issubclass(kind, Discrete):
        raise ValueError(f'{name} is trained on the values, not on the masses of their levels: take observes="density"')
    if not colon:
        return kind(channels, spatial_dims=spatial_dims, levels=levels)
    if kind is not LogisticMixture or not number.isdigit() or int(number) < 1:
        raise ValueError(
            f"{name}: only logistic-mixture takes a number, of components, as in logistic-mixture:10; got {number!r}"
        )
    return LogisticMixture(channels, int(number), spatial_dims=spatial_dims, levels=levels)


def _scale(name: str, rest: str) -> Scale:
    kind, colon, number = rest.partition(":")
    if kind in SCALES and not colon:
        return SCALES[kind]()
    if kind not in SCALES_WITH_A_NUMBER:
        raise ValueError(unknown("likelihood", name, _likelihood_names()))
    what = "σ, in units of the data's range" if kind == "fixed" else "β of ‖x − x̂‖² + β·KL"
    return SCALES_WITH_A_NUMBER[kind](positive(name, kind, number, what, "0.1"))


def _likelihood_names() -> list[str]:
    scales = [*SCALES, *(f"{kind}:0.1" for kind in SCALES_WITH_A_NUMBER)]
    return [*(f"{family}/{scale}" for family in FAMILIES for scale in scales), *UNSCALED, "logistic-mixture:10"]
