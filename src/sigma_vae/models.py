"""Models by name, and models as files (safetensors and JSON)."""

import inspect
import json
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sigma_vae import data as data_sources
from sigma_vae.columns import Column
from sigma_vae.conditions import Conditions
from sigma_vae.config import ModelConfig, TrainingConfig, parse, read_text, write_whole
from sigma_vae.data import Batches, Scaling, Splits
from sigma_vae.data.inspect import suggested
from sigma_vae.networks.flat import SMALLEST
from sigma_vae.networks.principal import best_components, sample_of
from sigma_vae.registry import Entry, Registry, needed_by, register
from sigma_vae.types import Likelihood, MeanMap, Network, Observes, Prior
from sigma_vae.vae import VAE

__all__ = [
    "AUTO",
    "UNNAMED",
    "Origin",
    "Saved",
    "check_network",
    "check_prior",
    "check_savable",
    "data",
    "default_network",
    "from_anywhere",
    "has_size",
    "latents_for",
    "likelihood",
    "likelihood_for",
    "load",
    "network",
    "network_for",
    "prior",
    "prior_name",
    "priors",
    "save",
    "sized",
    "takes_counts",
    "training_for",
    "vae",
]

MOST_LATENTS, EXAMPLES_TOGETHER = 128, 256
UNNAMED = "unnamed"
"""Name of a part that is not registered: the model can be loaded only into a given object."""


def prior(
    name: str,
    latent_dim: int,
    package: str | None = None,
    conditions: Conditions | None = None,
    shape: Sequence[int] | None = None,
) -> Prior:
    """Make a prior by its name; a prior that is fitted to latents comes unfitted.

    Args:
        name: such as ``standard``, ``gaussian``, ``flow``, ``mixture`` or ``mixture:20``, with 20 components.
        latent_dim: size of z.
        package: where a saved model says that the name comes from.
        conditions: what the network is given, for priors that depend on it.
        shape: of the map that z is the flat form of, for priors that ask for it.

    Raises:
        ValueError: the name does not exist (the nearest is suggested), the text after its colon means nothing, or the prior
            depends on a condition and there is none.

    >>> prior("mixture:20", latent_dim=8).components
    20
    """
    make = register.prior.make(name, package)
    reads_condition = register.prior.fact(name, "reads_condition", False)
    if reads_condition and conditions is None:
        raise ValueError(f"the prior {name} depends on a condition, and the model has none; give the data's condition")
    known = {"shape": shape} if shape is not None and "shape" in inspect.signature(make).parameters else {}
    return cast(Prior, make(latent_dim, *([conditions] if reads_condition else []), **known))


def prior_name(prior: Prior) -> str:
    """The name that makes such a prior; a mixture's has its number of components.

    Raises:
        ValueError: its class is not registered.

    >>> from sigma_vae.priors import MixturePrior
    >>> prior_name(MixturePrior(latent_dim=8, components=20))
    'mixture:20'
    """
    name = register.prior.name_of(prior)
    if name is None:
        raise ValueError(
            f"{type(prior).__name__} has no name to be saved under; register it with @register.prior(NAME). Known:"
            f" {', '.join(register.prior.names())}"
        )
    return name


AUTO = "auto"
"""In place of a name: the best on held-out latents of N(0, I), a Gaussian, and the priors below."""
AUTO_PRIORS, AUTO_PRIORS_OF_CLASSES, AUTO_MAP_PRIORS = ("mixture",), ("mixture", "class-mixture"), ("gaussian",)
"""Priors of latent vectors, of those whose classes are given, and of maps, that are fitted in seconds; a flow takes longer."""


def priors(name: str, network: Network, examples: int) -> list[Prior]:
    """The priors to fit after training: the named one; for ``auto`` each that so many training examples can fit.

    >>> from sigma_vae.networks import mlp
    >>> [type(each).__name__ for each in priors("auto", mlp((1, 8, 8), 1), examples=1000)]
    ['MixturePrior']
    >>> [type(each).__name__ for each in priors("auto", mlp((1, 8, 8), 1), examples=10)]
    []
    """
    if not (network.has_posterior and network.has_prior):
        return []
    ((shape,), (latent_dim,)) = network.latents.shapes, network.latents.sizes
    if network.prior.is_learned and name in (AUTO, "learned"):
        return [network.prior]
    of_classes = network.conditions is not None and network.conditions.only_classes is not None
    of_maps = AUTO_MAP_PRIORS if latent_dim < examples else ()
    automatic = of_maps if len(shape) > 1 else AUTO_PRIORS_OF_CLASSES if of_classes else AUTO_PRIORS
    made = [prior(each, latent_dim, None, network.conditions, shape) for each in (automatic if name == AUTO else (name,))]
    return [each for each in made if name != AUTO or each.least_latents <= examples]


def check_prior(name: str, network_name: str, network: Network | None = None) -> None:
    """Refuse, before training, a prior that the network (or one of this name, where none is given) could not take.

    Raises:
        ValueError: there is no such prior, or the network has no flat latents to fit it to.
    """
    if name == AUTO:
        return
    if network is None:
        takes = register.network.fact(network_name, "has_prior", True)
        if register.prior.entry(name).facts.get("reads_condition", False):
            return
    else:
        takes = network.has_posterior and network.has_prior
    conditions = None if network is None else network.conditions
    made = prior(name, network.latents.sizes[0] if network is not None and takes else 1, None, conditions)
    if not made.is_standard and not takes:
        raise ValueError(
            f"the prior {name} is fitted to a single layer of flat latents, which {network_name} does not have;"
            " take residual, conv or mlp, or prior=standard"
        )


def default_network(shape: Sequence[int], *, clips: bool = False) -> str:
    """The network that ``auto`` stands for, by the shape of examples or of clips' frames.

    >>> default_network((3, 32, 32)), default_network((12,)), default_network((1, 64, 64), clips=True)
    ('residual', 'mlp', 'sequence')
    """
    if clips:
        return "sequence"
    return "residual" if len(shape) in (2, 3) and min(shape[1:]) >= SMALLEST else "mlp"


def likelihood(
    name: str,
    channels: int,
    *,
    spatial_dims: int = 2,
    levels: int | None = 256,
    mean: MeanMap = "unit",
    observes: Observes = "density",
    columns: Sequence[Column] = (),
) -> Likelihood:
    """A likelihood by its name: ``family/scale``, or the family alone where it takes no scale.

    Either may have an argument after a colon: ``student-t:3/fixed:0.1``. ``mean`` is for families with a scale,
    ``columns`` of a table for ``mixed``.

    Raises:
        ValueError: the family or the scale does not exist (the nearest name is given), its argument means nothing, or
            the family takes no scale, or cannot be trained on levels.

    >>> likelihood("gaussian/fixed:0.1", channels=3)
    Gaussian(channels=3, scale=Fixed(0.1))
    >>> likelihood("logistic-mixture:5", channels=1)
    LogisticMixture(channels=1, components=5)
    """
    head, slash, tail = name.partition("/")
    if head not in register.likelihood:
        raise ValueError(_unknown_likelihood(name))
    counts = takes_counts(head)
    if counts and observes == "level":
        raise ValueError(f"{name} is trained on probabilities of counts in any case; leave observes out")
    if _takes_scale(register.likelihood.entry(head)):
        if not slash:
            raise ValueError(f"{name} takes a scale, one of {_patterns(register.scale)}; did you mean '{name}/optimal'?")
        if tail not in register.scale:
            raise ValueError(_unknown_likelihood(name))
        family, scale = register.likelihood.make(head), register.scale.make(tail)
        if counts:
            counting: Likelihood = family(channels, scale(), spatial_dims=spatial_dims)
            return counting
        scaled: Likelihood = family(channels, scale(), spatial_dims=spatial_dims, levels=levels, mean=mean, observes=observes)
        return scaled
    if slash:
        raise ValueError(f"{name}: {head} takes no scale, its features alone say how sure they are; write {head!r}")
    given: dict[str, Any] = {} if counts else {"levels": levels}
    if columns:
        if "columns" not in inspect.signature(register.likelihood.entry(head).object).parameters:
            raise ValueError(f"{name} does not read columns of all types; take the likelihood mixed, or leave out mixed data")
        given["columns"] = columns
    made: Likelihood = register.likelihood.make(head)(channels, spatial_dims=spatial_dims, **given)
    if observes == "level" and made.observes != "level":
        raise ValueError(f'{name} is trained on the values, not on the probabilities of their levels: take observes="density"')
    return made


def takes_counts(name: str) -> bool:
    """Whether a likelihood of this name is one of counts.

    >>> takes_counts("negative-binomial/optimal"), takes_counts("gaussian/optimal")
    (True, False)
    """
    return bool(register.likelihood.fact(name.partition("/")[0], "counts", False))


def _unknown_likelihood(name: str) -> str:
    scaled = [entry for entry in register.likelihood if _takes_scale(entry)]
    others = [entry for entry in register.likelihood if not _takes_scale(entry)]
    names = [f"{family.example}/{scale.example}" for family in scaled for scale in register.scale]
    (near,) = get_close_matches(name, names + [family.example for family in others], n=1, cutoff=0.0)
    return (
        f"there is no likelihood {name!r}; did you mean {near!r}? Known: FAMILY/SCALE, where FAMILY is one of {_patterns(scaled)},"
        f" and SCALE one of {_patterns(register.scale)}; and without a scale {_patterns(others)}"
    )


def _takes_scale(entry: Entry) -> bool:
    """Whether a likelihood is made with a scale: its class says so, or its function has a parameter ``scale``."""
    said: bool | None = getattr(entry.object, "takes_scale", None)
    return said if said is not None else "scale" in inspect.signature(entry.object).parameters


def _patterns(entries: Iterable[Entry]) -> str:
    return ", ".join(entry.pattern for entry in entries)


PICTURES_FROM = 48
"""Least side in pixels of pictures for which ``auto`` takes a map of latents."""
PICTURE_NETWORK, PICTURE_WIDTH, PICTURE_PRIOR = "spatial:f8c4", 8, "flow-matching"
PICTURE_EPOCHS, PICTURE_STEPS = 20, 2_000
"""Model of such pictures, and length of its training, whose steps are slow on a CPU: after minutes it is better than
``residual`` in bits per dimension and in Fréchet distance (docs/networks.md)."""


def network_for(config: ModelConfig, data: Splits) -> tuple[ModelConfig, str]:
    """The config with the network that ``auto`` stands for, and why: by the data, where the other options allow it.

    Colour pictures from 48 pixels on whose sides 8 divides get a map of latents, with a width and a prior that go with it
    unless these are given. Other data, pictures with a condition, and models with a given number of latents have the
    network of :func:`default_network`.

    >>> network_for(ModelConfig(), data("digits"))[0].network
    'residual'
    """
    default, sides = default_network(data.shape, clips=data.clips), data.shape[1:]
    pictures = default == "residual" and data.shape[0] == 3 and len(sides) == 2 and min(sides) >= PICTURES_FROM
    if not pictures or data.conditions is not None or config.latent_dim is not None or any(side % 8 for side in sides):
        return replace(config, network=default), ""
    width = PICTURE_WIDTH if config.width is None else config.width
    fitted = PICTURE_PRIOR if config.prior == AUTO else config.prior
    return replace(config, network=PICTURE_NETWORK, width=width, prior=fitted), (
        f"width {width}, prior {fitted}: for pictures from {PICTURES_FROM} pixels on, bits per dimension and samples are better than with"
        " residual (docs/networks.md), though with more time a step; --network residual is the quick one"
    )


def training_for(model: ModelConfig, config: TrainingConfig) -> TrainingConfig:
    """The config of a training, shortened where :func:`network_for` chose a map of latents and no length was given.

    >>> training_for(ModelConfig("spatial:f8c4"), TrainingConfig()).total_steps(steps_per_epoch=19)
    380
    """
    given = (config.epochs, config.max_steps, config.max_minutes) != (None, None, None)
    return (
        config if model.network != PICTURE_NETWORK or given else replace(config, epochs=PICTURE_EPOCHS, max_steps=PICTURE_STEPS)
    )


def network(
    name: str,
    shape: Sequence[int],
    out_channels: int,
    latent_dim: int | None = None,
    width: int | None = None,
    context_frames: int | None = None,
    package: str | None = None,
    conditions: Conditions | None = None,
) -> Network:
    """Make a network by its name; sizes that are not given are its own defaults.

    Args:
        name: such as ``residual`` or ``hierarchical:tiny``.
        shape: of one example ``(C, *space)``, or of one frame for networks that read clips.
        out_channels: the feature channels that the likelihood reads.
        latent_dim: size of the latents.
        width: of its layers.
        context_frames: number of given frames at the start of a clip.
        package: where a saved model says that the name comes from.
        conditions: labels and covariates that it is given.

    Raises:
        ValueError: the name does not exist, it reads no condition, the network has no such size, or the sizes do not fit.

    >>> network("hierarchical:14,14d14/1,14m1,14", (1, 28, 28), out_channels=1).latents.layers
    3
    """
    make = register.network.make(name, package)
    sizes = {"latent_dim": latent_dim, "width": width, "context_frames": context_frames}
    given = {size: value for size, value in sizes.items() if value is not None}
    accepted = inspect.signature(make).parameters
    for size, value in given.items():
        if size not in accepted:
            raise ValueError(f"the network {name} has no {size}, got {size}={value}; leave it out")
        if value < 1:
            raise ValueError(f"{size} is at least 1, got {value}")
    if conditions is None:
        return cast(Network, make(shape, out_channels, **given))
    if "conditions" not in accepted:
        raise ValueError(f"the network {name} reads no condition; leave out {', '.join(conditions.names)}, or take mlp")
    return cast(Network, make(shape, out_channels, conditions=conditions, **given))


def has_size(network: str, size: str) -> bool:
    """Whether a network, by its name, has such a size to choose.

    >>> has_size("mlp", "latent_dim"), has_size("spatial:f8c4", "latent_dim")
    (True, False)
    """
    return size in inspect.signature(register.network.make(network)).parameters


def latents_for(config: ModelConfig, data: Splits) -> int:
    """The number of linear latents under which validation data are likeliest: at most 128, and half the data's dimensions.

    It is chosen without training, by probabilistic PCA of at most 12 000 training examples. For pictures it is nearly
    always the largest: more latents raise the ELBO in nats, but not always the bits per dimension, nor the quality of
    samples.

    Raises:
        ValueError: the network has no flat latents.

    >>> latents_for(ModelConfig(network="mlp"), data("digits"))
    32
    """
    name = network_name(config, data.shape, clips=data.clips)
    if register.network.fact(name, "latents", "flat") != "flat":
        raise ValueError(
            f"latent_dim auto is for networks with one layer of flat latents, and {name} has others; give a number"
        )
    dims, size = math.prod(data.shape), EXAMPLES_TOGETHER
    chosen = sample_of(len(data.train), data.shape)
    training = Batches(data.train.select(chosen), data.scaling, size)
    held_out = data.batches("validation", size)
    most = min(MOST_LATENTS, max(dims // 2, 1))
    seen = _likelihood_of(config, data.shape, data.scaling).encoder_input
    return best_components(lambda: (seen(batch.x) for batch in training), (seen(batch.x) for batch in held_out), most)


def likelihood_for(config: ModelConfig, data: Splits) -> tuple[str, str]:
    """The likelihood that ``auto`` stands for, and why: what ``inspect`` suggests, where the other options allow it.

    >>> likelihood_for(ModelConfig(network="mlp"), data("digits"))
    ('gaussian/optimal', 'one σ for all values, solved exactly, is a good start')
    """
    name, reason = suggested(data)
    try:
        _likelihood_of(replace(config, likelihood=name), data.shape, data.scaling)
    except ValueError as error:
        return "gaussian/optimal", f"{name} suits the data, but not the other options: {error}"
    return name, reason


def check_network(name: str) -> None:
    """Refuse a name that no network has, for any data.

    Raises:
        ValueError: the name does not exist, or its plan or backbone cannot be read.

    >>> check_network("hierarchical:tiny")
    """
    register.network.make(name)


def vae(
    config: ModelConfig,
    shape: Sequence[int],
    scaling: Scaling,
    *,
    clips: bool = False,
    conditions: Conditions | None = None,
) -> VAE:
    """Make the model that a config names.

    Its prior is the one for training, N(0, I) where latents are flat: :meth:`VAE.fit_prior` comes after training.
    ``shape`` is that of one example ``(C, *space)``, or of one frame where examples are ``clips``. The model is given the
    ``conditions``, if any.

    Raises:
        ValueError: a name is unknown, or a part does not fit the data or the other options.
    """
    decoder = _likelihood_of(config, shape, scaling)
    made = VAE(_network_of(config, shape, decoder.in_channels, clips=clips, conditions=conditions), decoder)
    made.origin = Origin(replace(config, network=network_name(config, shape, clips=clips)), tuple(shape), scaling)
    return made


def _likelihood_of(config: ModelConfig, shape: Sequence[int], scaling: Scaling) -> Likelihood:
    if config.likelihood == AUTO:
        raise ValueError("likelihood auto needs data; give the name that models.likelihood_for(config, data) returns")
    mean: MeanMap = "identity" if scaling.standardised else register.network.fact(config.network, "mean", "unit")
    if config.mean != "auto":
        mean = config.mean
    if takes_counts(config.likelihood) != scaling.counts:
        known = ", ".join(entry.name for entry in register.likelihood if entry.facts.get("counts"))
        needs, remedy = ("no ", f"take one of {known}") if scaling.counts else ("a ", "read them as counts: --counts")
        raise ValueError(
            f"{config.likelihood} is {needs}likelihood of counts, and the data are {'' if scaling.counts else 'no '}counts; {remedy}"
        )
    decoder = likelihood(
        config.likelihood,
        shape[0],
        spatial_dims=len(shape) - 1,
        levels=scaling.levels,
        mean=mean,
        observes=config.observes,
        columns=() if scaling.schema is None else scaling.schema.columns,
    )
    if config.mean != "auto" and not (decoder.has_scale and decoder.mean_map == config.mean):
        raise ValueError(
            f"{config.likelihood} has its own map from features to the mean, and takes no mean={config.mean!r}; leave it at auto"
        )
    return decoder


def from_anywhere(network: str) -> str:
    """The same network's name, with a path that holds in any folder where it has one.

    >>> from_anywhere("spatial:f4c3")
    'spatial:f4c3'
    """
    head, _, text = network.partition(":")
    reads_path = register.network.fact(network, "reads_path", False)
    return f"{head}:{Path(text).resolve()}" if reads_path and not text.startswith("{") and Path(text).exists() else network


def network_name(config: ModelConfig, shape: Sequence[int], *, clips: bool = False) -> str:
    """The network's name, or the default one for data of this shape where it is ``auto``."""
    return config.network if config.network != "auto" else default_network(shape, clips=clips)


def _network_of(
    config: ModelConfig,
    shape: Sequence[int],
    out_channels: int,
    *,
    clips: bool = False,
    conditions: Conditions | None = None,
) -> Network:
    name = network_name(config, shape, clips=clips)
    takes_frames = has_size(name, "context_frames")
    frames = config.context_frames if takes_frames else None
    if config.latent_dim == "auto":
        raise ValueError("latent_dim auto needs data; give the number that models.latents_for(config, data) returns")
    made = network(name, shape, out_channels, config.latent_dim, config.width, frames, conditions=conditions)
    check_prior(config.prior, name, made)
    if config.prior == "learned":
        made.replace_prior(prior(config.prior, made.latents.sizes[0], None, conditions))
    return made


@needed_by("models.data")
def data(source: object) -> Splits:
    """Read data: a name or path, a config, or an object from Python; see :func:`sigma_vae.data.as_splits`.

    >>> data("digits").shape
    (1, 8, 8)
    """
    return data_sources.as_splits(source)


Made = TypeVar("Made")
FORMAT = 2
MODEL = "model"
"""Name of the model's folder in a run."""
DESCRIPTION_BYTES = 2**20
BUFFER_VALUES = 2**24
"""Most values that a model may have beside those in its file, such as a likelihood's tables."""


class Origin(NamedTuple):
    """Parts of a model, by name and size, and shape and scaling of the data that it is for."""

    config: ModelConfig
    shape: tuple[int, ...]
    scaling: Scaling

    @classmethod
    def of(cls, model: VAE, data: Splits) -> "Origin":
        """Describe a model that is trained on these data.

        Its parts have the names that it was made by, if it still has them; parts of your own as far as a name makes them.
        """
        known = model.origin.config if isinstance(model.origin, Origin) else None
        likelihood, levels = model.likelihood, data.scaling.levels
        if known is not None and likelihood.levels == levels and _is_made_by(known.likelihood, likelihood):
            return cls(known, data.shape, data.scaling)
        name = likelihood_name(likelihood) if likelihood.levels == levels else None
        config = ModelConfig(UNNAMED, name or UNNAMED)
        if name is not None and likelihood.has_scale:
            config = replace(config, mean=likelihood.mean_map or "auto", observes=likelihood.observes)
        return cls(config, data.shape, data.scaling)


def likelihood_name(made: Likelihood) -> str | None:
    """The name that makes such a likelihood, ``family/scale``; None where no name does.

    >>> from sigma_vae import Fixed, Gaussian
    >>> likelihood_name(Gaussian(channels=3)), likelihood_name(Gaussian(3, Fixed(0.3)))
    ('gaussian/optimal', 'gaussian/fixed:0.3')
    """
    family = register.likelihood.name_of(made)
    if family is None:
        return None
    scales = [entry.name for entry in register.scale if entry.argument is None] if made.has_scale else []
    given = register.scale.name_of(made.scale) if made.has_scale else None
    names = [f"{family}/{scale}" for scale in filter(None, dict.fromkeys((*scales, given)))] or [family]
    return next((name for name in names if _is_made_by(name, made)), None)


def _is_made_by(name: str, made: Likelihood) -> bool:
    observes = made.observes if made.has_scale else "density"
    try:
        other = likelihood(
            name,
            made.channels,
            spatial_dims=made.spatial_dims,
            levels=made.levels,
            mean=made.mean_map or "unit",
            observes=observes,
        )
    except ValueError:
        return False
    sizes = [{key: value.shape for key, value in each.state_dict().items()} for each in (made, other)]
    return repr(other) == repr(made) and sizes[0] == sizes[1]


class Saved(NamedTuple):
    """A model, and the names and sizes that it was made from."""

    vae: VAE
    config: ModelConfig
    shape: tuple[int, ...]
    scaling: Scaling


def check_savable(model: VAE, origin: Origin | None) -> None:
    """Refuse, before training, a model of which checkpoints, or with an origin :func:`save`, could not be written.

    Raises:
        ValueError: a part has a name that is not registered, or state that is no tensor.
    """
    _tensors(model)
    if origin is not None:
        _named_config(model, origin.config)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights, each in memory of its own: tied ones are written twice.

    Raises:
        ValueError: some state is no tensor, or has no values yet.
    """
    found = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor) or nn.parameter.is_lazy(value):
            raise ValueError(
                f"{name} is {type(value).__name__}, and a file of weights holds tensors alone; keep it in a buffer (register_buffer), or"
                " make lazy layers by a first pass"
            )
        found[name] = value.detach().cpu().contiguous()
    seen = set[int]()
    for name, value in found.items():
        if value.untyped_storage().data_ptr() in seen:
            found[name] = value.clone()
        seen.add(value.untyped_storage().data_ptr())
    return found


def _named_config(model: VAE, config: ModelConfig) -> ModelConfig:
    """The config with the name of the model's prior.

    Raises:
        ValueError: a name is not registered.
    """
    if config.network != UNNAMED and model.network.portable_name is not None:
        config = replace(config, network=model.network.portable_name)
    if model.network.has_prior:
        known = register.prior.name_of(model.network.prior) is not None
        given_with_network = config.network == UNNAMED and not known
        config = replace(config, prior=UNNAMED if given_with_network else prior_name(model.network.prior))
    elif config.prior == AUTO:
        config = replace(config, prior="standard")
    for _, registry, name in _registered(config):
        registry.entry(name)
    return config


@needed_by("models.save")
def save(folder: Path, model: VAE, config: ModelConfig | None, shape: Sequence[int], scaling: Scaling) -> None:
    """Write weights and scales (safetensors) and a description (JSON): enough to load the model without training code.

    The prior is named after the model's own: a mixture whose number of components was chosen is saved with that number.
    An existing file is kept until the new one is complete.

    Args:
        folder: made where it does not exist.
        model: the model.
        config: names and sizes of its parts. A user's own network or likelihood is called ``"unnamed"``; None: both.
            Such a model is loaded with ``load(folder, network=..., likelihood=...)``.
        shape: of one example, or of one frame.
        scaling: of the training data.

    Raises:
        ValueError: a name is not registered.
    """
    from safetensors.torch import save as packed

    config = _named_config(model, config or ModelConfig(network=UNNAMED, likelihood=UNNAMED))
    description = {
        "format": FORMAT,
        "model": asdict(config),
        "shape": list(shape),
        "scaling": asdict(scaling),
        **({} if model.network.conditions is None else {"conditions": asdict(model.network.conditions)}),
        "packages": {kind: registry.entry(name).package for kind, registry, name in _registered(config)},
    }
    parts = (("network", config.network, model.network), ("likelihood", config.likelihood, model.likelihood))
    if unnamed := {kind: type(part).__name__ for kind, name, part in parts if name == UNNAMED}:
        description["unnamed"] = unnamed  # for the person who has to give them
    state = _tensors(model)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "model.safetensors", packed(state))
    write_whole(folder / "model.json", json.dumps(description, indent=2) + "\n")


@needed_by("models.load")
def load(folder: str | Path, network: Network | None = None, likelihood: Likelihood | None = None) -> Saved:
    """Read a model that :func:`save` wrote.

    Nothing is unpickled, no module that a file names is imported, and no more memory is taken than the files have
    bytes. A network or likelihood of your own takes the weights in place of the named one.

    Args:
        folder: of the model, or of a run that has one.
        network: of your own.
        likelihood: likewise.

    Raises:
        ValueError: the folder holds no model, a broken one, one with weights that are not finite, one of a newer format,
            one whose parts have no name and are not given, or one made from a package that is not installed, which is named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "model.json").exists() and (folder / MODEL).is_dir():
        folder /= MODEL
    path = folder / "model.json"
    description = _description(path)
    config = parse(_with_standard_prior(description["model"]), ModelConfig, str(path))
    shape = tuple(description["shape"])
    scaling = parse(description["scaling"], Scaling, str(path))
    known = description.get("conditions")
    conditions = None if known is None else parse(known, Conditions, str(path))
    _check_named(path, description, config, network, likelihood)
    weights = folder / "model.safetensors"
    try:
        model = sized(config, shape, scaling, _shapes(weights), network, likelihood, conditions)
        model.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights} does not hold the weights of {config}: {error}") from error
    _check_finite(weights, model)
    model.origin = Origin(config, shape, scaling)
    return Saved(model.eval(), config, shape, scaling)


def _with_standard_prior(model: Any) -> Any:
    """A model from before there were priors has N(0, I)."""
    return {"prior": "standard", **model} if isinstance(model, dict) else model


def _registered(config: ModelConfig) -> Iterator[tuple[str, Registry, str]]:
    """Kind, registry and name of each part that has a name."""
    family, _, scale = config.likelihood.partition("/")
    parts = (
        ("network", register.network, config.network),
        ("likelihood", register.likelihood, family),
        ("scale", register.scale, scale),
        ("prior", register.prior, config.prior),
    )
    return ((kind, registry, name) for kind, registry, name in parts if name not in ("", UNNAMED, "auto"))


def _check_named(
    path: Path, description: dict[str, Any], config: ModelConfig, network: Network | None, likelihood: Likelihood | None
) -> None:
    """Refuse a model with a part that is neither registered nor given."""
    given = {"network": network is not None, "likelihood": likelihood is not None, "scale": likelihood is not None}
    for kind, name in (("network", config.network), ("likelihood", config.likelihood)):
        if name == UNNAMED and not given[kind]:
            kinds = description.get("unnamed")
            what = kinds.get(kind) if isinstance(kinds, dict) else None
            raise ValueError(
                f"{path} has no name for its {kind}{f' (a {what})' if isinstance(what, str) else ''}, so it is opened with one of yours:"
                f" sigma_vae.models.load(folder, {kind}=...)"
            )
    packages = description.get("packages", {})
    for kind, registry, name in _registered(config):
        package = packages.get(kind) if isinstance(packages, dict) else None
        if not given.get(kind, False):
            registry.entry(name, package if isinstance(package, str) else None)


def sized(
    config: ModelConfig,
    shape: tuple[int, ...],
    scaling: Scaling,
    stored: Mapping[str, Sequence[int]],
    network: Network | None = None,
    likelihood: Likelihood | None = None,
    conditions: Conditions | None = None,
) -> VAE:
    """Make a new model, after comparing its sizes with those of ``stored`` weights: before that, no memory is taken.

    A given network or likelihood is used in place of the named one.

    Raises:
        ValueError: the config describes no model.
        RuntimeError: it describes a model of other sizes.
    """

    def made(config: ModelConfig) -> VAE:
        decoder = likelihood or _likelihood_of(config, shape, scaling)
        return VAE(network or _network_of(config, shape, decoder.in_channels, conditions=conditions), decoder)

    learned = config.prior == "learned"
    trained = config if learned else replace(config, prior="standard")  # a fitted prior comes after
    if network is not None or register.network.entry(network_name(config, shape)).facts.get("sketches", True):
        with torch.device("meta"), _Undrawn():
            sketch = _named(lambda: made(trained), config)
        _check_sizes(sketch, stored)
    model = made(trained)
    if model.network.has_prior and not learned and config.prior not in (UNNAMED, "standard"):
        check_prior(config.prior, config.network, model.network)
        ((shape_of_z,), (latent_dim,)) = model.network.latents.shapes, model.network.latents.sizes
        if register.prior.entry(config.prior).facts.get("sketches", True):
            with torch.device("meta"), _Undrawn():
                sketched = _named(lambda: prior(config.prior, latent_dim, None, conditions, shape_of_z), config)
                _check_sizes(sketched, stored, "network.prior.")
        model.network.replace_prior(prior(config.prior, latent_dim, None, conditions, shape_of_z))
    return model


class _Undrawn(TorchFunctionMode):
    """Draws no normal weights: on the meta device there are none, and torch would import its compiler for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.init.normal_:  # which hands itself on with names
            return kwargs["tensor"]
        return args[0] if func is Tensor.normal_ else func(*args, **(kwargs or {}))


def _named(make: Callable[[], Made], config: ModelConfig) -> Made:
    try:
        return make()
    except ValueError:
        raise
    except Exception as error:  # networks and torch report impossible sizes in many ways
        raise ValueError(f"{config} describes no model: {error}") from error


def _check_sizes(model: nn.Module, stored: Mapping[str, Sequence[int]], prefix: str = "") -> None:
    for name, value in model.named_parameters(prefix.removesuffix(".")):
        if list(stored.get(name, ())) != list(value.shape):
            raise RuntimeError(f"{name} needs the shape {tuple(value.shape)}, the file has {tuple(stored.get(name, ()))}")
    have = sum(torch.Size(size).numel() for size in stored.values())
    if (more := sum(value.numel() for value in model.buffers())) > have + BUFFER_VALUES:
        raise RuntimeError(f"the model has {more} values beside its weights, the file {have} in all")


def _check_finite(path: Path, model: nn.Module) -> None:
    broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"{path} holds NaN or infinity in {len(broken)} tensors, the first is {broken[0]}: such a model can neither score nor"
            " sample; copy the model anew from where it came, or train it again with a lower learning rate"
        )


def _shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of the stored tensors; the reader checks that they lie within the file."""
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
