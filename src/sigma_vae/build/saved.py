"""Models as files: weights and scales (safetensors), and what they belong to (JSON). Nothing in them is trusted."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sigma_vae.build.names import vae
from sigma_vae.config import ModelConfig
from sigma_vae.configfile import parse, read_text, write_whole
from sigma_vae.data import Scaling
from sigma_vae.naming import prior, prior_name
from sigma_vae.networks import FlatNetwork
from sigma_vae.vae import VAE

__all__ = ["Saved", "load", "save", "sized"]

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
