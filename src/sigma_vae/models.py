"""Models by name, and models as files (safetensors and JSON)."""

import json
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sigma_vae import data as data_sources
from sigma_vae.config import ModelConfig, parse, read_text, write_whole
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
from sigma_vae.likelihoods.base import Discrete, LocationScale, MeanMap, Unscaled
from sigma_vae.networks import FlatNetwork, SequenceNetwork, conv, hierarchical, mlp, residual, sequence
from sigma_vae.networks.hierarchical import check_plan
from sigma_vae.networks.residual import SMALLEST
from sigma_vae.priors import FittedPrior, FlowPrior, GaussianPrior, MixturePrior, StandardNormal
from sigma_vae.types import Likelihood, Network, Observes, Prior
from sigma_vae.vae import VAE

__all__ = [
    "Saved",
    "check_network",
    "check_prior",
    "data",
    "default_network",
    "likelihood",
    "load",
    "network",
    "positive",
    "prior",
    "prior_name",
    "save",
    "sized",
    "unknown",
    "vae",
]

PRIORS: dict[str, Callable[[int], Prior]] = {
    "standard": StandardNormal,
    "gaussian": GaussianPrior,
    "mixture": MixturePrior,
    "flow": FlowPrior,
}


def prior(name: str, latent_dim: int) -> Prior:
    """A prior by its name; those that are fitted come unfitted. ``mixture`` takes its number of components after a colon.

    Raises:
        ValueError: the name does not exist (the nearest is given), or the number is none.

    >>> prior("mixture:20", latent_dim=8).components
    20
    """
    kind, colon, number = name.partition(":")
    if not colon and kind in PRIORS:
        return PRIORS[kind](latent_dim)
    if kind != "mixture":
        raise ValueError(unknown("prior", name, [*PRIORS, "mixture:20"]))
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"{name}: mixture takes a number of components, as in mixture:20; got {number!r}")
    return MixturePrior(latent_dim, int(number))


def prior_name(prior: Prior) -> str:
    """The name that builds such a prior, of a mixture with the number of components that it has.

    Raises:
        ValueError: it is a user's own.

    >>> prior_name(MixturePrior(latent_dim=8, components=20))
    'mixture:20'
    """
    if isinstance(prior, MixturePrior) and prior.components is not None:
        return f"mixture:{prior.components}"
    for name, kind in PRIORS.items():
        if type(prior) is kind:
            return name
    raise ValueError(f"{type(prior).__name__} has no name to be saved under; known: {', '.join(PRIORS)}")


def check_prior(name: str, network_name: str, network: Network) -> None:
    """Refuse before training what could not be fitted after it.

    Raises:
        ValueError: there is no such prior, or the network has no flat latents that it could be fitted to.
    """
    made = prior(name, network.latent_dim if isinstance(network, FlatNetwork) else 1)
    if isinstance(made, FittedPrior) and not isinstance(network, FlatNetwork):
        raise ValueError(
            f"the prior {name} is fitted to a single layer of flat latents, which {network_name} does not have;"
            " take residual, conv or mlp, or prior=standard"
        )


def positive(name: str, kind: str, number: str, what: str, example: str) -> float:
    """The number after a colon in a name."""
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: {kind} takes a number above 0 ({what}), as in {kind}:{example}; got {number!r}")
    return value


def unknown(kind: str, name: str, names: Sequence[str]) -> str:
    """The sentence about a name that does not exist."""
    near = get_close_matches(name, names, n=1, cutoff=0.0)
    return f"there is no {kind} {name!r}; did you mean {near[0]!r}? Known: {', '.join(names)}"


def default_network(shape: Sequence[int], *, clips: bool = False) -> str:
    """The name of the network that ``auto`` means for examples, or frames of clips, of this shape.

    >>> default_network((3, 32, 32)), default_network((12,)), default_network((1, 64, 64), clips=True)
    ('residual', 'mlp', 'sequence')
    """
    if clips:
        return "sequence"
    return "residual" if len(shape) in (2, 3) and min(shape[1:]) >= SMALLEST else "mlp"


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


def data(source: object) -> Splits:
    """Read data: a name or path, a config, or an object from Python; see :func:`sigma_vae.data.as_splits`.

    >>> data("digits").shape
    (1, 8, 8)
    """
    return data_sources.as_splits(source)


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


FORMAT = 2
MODEL = "model"
"""A run's folder of its model."""
DESCRIPTION_BYTES = 2**20
BUFFER_VALUES = 2**24
"""That a model may have beside those in its file: tables of its likelihood, say."""


class Saved(NamedTuple):
    """A model and what it was built from."""

    vae: VAE
    config: ModelConfig
    shape: tuple[int, ...]
    scaling: Scaling


def save(folder: Path, model: VAE, config: ModelConfig, shape: Sequence[int], scaling: Scaling) -> None:
    """Write weights and scales (safetensors) and what they belong to (JSON): enough to load without any training code.

    The prior is named after what the model has: a mixture whose number of components was chosen is saved with that number. A file that
    is there stands until the new one is whole.
    """
    from safetensors.torch import save as packed

    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model.network, FlatNetwork):
        config = replace(config, prior=prior_name(model.network.prior))
    description = {"format": FORMAT, "model": asdict(config), "shape": list(shape), "scaling": asdict(scaling)}
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_whole(folder / "model.safetensors", packed(state))
    write_whole(folder / "model.json", json.dumps(description, indent=2) + "\n")


def load(folder: str | Path) -> Saved:
    """Read a model that :func:`save` wrote; nothing is unpickled, no code is run, and no more memory is taken than the files have bytes.

    Args:
        folder: of the model, or of a run that has one.

    Raises:
        ValueError: the folder holds no model, a broken one, or one of a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = _of_model(Path(folder))
    path = folder / "model.json"
    description = _description(path)
    config = parse(description["model"], ModelConfig, str(path))
    shape = tuple(description["shape"])
    scaling = parse(description["scaling"], Scaling, str(path))
    weights = folder / "model.safetensors"
    try:
        model = sized(config, shape, scaling, _shapes(weights))
        model.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights} does not hold the weights of {config}: {error}") from error
    return Saved(model.eval(), config, shape, scaling)


def _of_model(folder: Path) -> Path:
    return folder / MODEL if not (folder / "model.json").exists() and (folder / MODEL).is_dir() else folder


def sized(config: ModelConfig, shape: tuple[int, ...], scaling: Scaling, stored: Mapping[str, Sequence[int]]) -> VAE:
    """A new model, whose sizes are compared with those of stored weights before any memory is taken for it.

    Raises:
        ValueError: the config names no model.
        RuntimeError: it names one of other sizes.
    """
    with torch.device("meta"):
        sketch = _named(lambda: vae(replace(config, prior="standard"), shape, scaling), config)  # priors come after
    _check_sizes(sketch, stored)
    model = vae(config, shape, scaling)
    if isinstance(model.network, FlatNetwork):
        latent_dim = model.network.latent_dim
        if config.prior != "flow":  # its layers cannot be sketched, and grow with the latents alone
            with torch.device("meta"):
                _check_sizes(_named(lambda: prior(config.prior, latent_dim), config), stored, "network.prior.")
        model.network.prior = prior(config.prior, latent_dim)
    return model


def _named(make: Any, config: ModelConfig) -> Any:
    try:
        return make()
    except ValueError:
        raise
    except Exception as error:  # of sizes that nothing has, each network and torch itself complain in their own way
        raise ValueError(f"{config} is no model: {error}") from error


def _check_sizes(model: nn.Module, stored: Mapping[str, Sequence[int]], prefix: str = "") -> None:
    for name, value in model.named_parameters(prefix.removesuffix(".")):
        if list(stored.get(name, ())) != list(value.shape):
            raise RuntimeError(f"{name} needs the shape {tuple(value.shape)}, the file has {tuple(stored.get(name, ()))}")
    have = sum(torch.Size(size).numel() for size in stored.values())
    if (more := sum(value.numel() for value in model.buffers())) > have + BUFFER_VALUES:
        raise RuntimeError(f"the model has {more} values beside its weights, the file {have} in all")


def _shapes(path: Path) -> dict[str, list[int]]:
    """Sizes of the stored tensors, which the reader has found to lie within the file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


def _description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(read_text(path, DESCRIPTION_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or no JSON, so there is no model to load: {error}") from error
    found = description.get("format") if isinstance(description, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} has model format {found!r}, this version reads {FORMAT}; load it with the version that wrote it"
        )
    shape = description.get("shape")
    numbers = isinstance(shape, list) and shape and all(isinstance(size, int) and size > 0 for size in shape)
    if not numbers or "scaling" not in description or "model" not in description:
        raise ValueError(f"{path} lacks the model, its data's shape or scaling; got {reprlib.repr(description)}")
    mean = description["scaling"].get("mean") if isinstance(description["scaling"], dict) else None
    if isinstance(mean, list) and len(mean) != shape[0]:
        raise ValueError(f"{path} standardises {len(mean)} channels of data that have {shape[0]}")
    result: dict[str, Any] = description
    return result
