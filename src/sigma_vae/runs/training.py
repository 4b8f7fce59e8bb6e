"""Runs are trained into a new folder, and resumed where they stopped."""

import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sigma_vae import __version__, build
from sigma_vae.config import RunConfig
from sigma_vae.configfile import write
from sigma_vae.data import NAMES, Splits
from sigma_vae.evaluation.pictures import drawable
from sigma_vae.networks import SequenceNetwork
from sigma_vae.networks.default import default_network
from sigma_vae.runs.evaluating import draw, evaluation, kept, store
from sigma_vae.runs.folder import Run, config_of, same_data
from sigma_vae.runs.priors import check_codes, take_prior
from sigma_vae.runs.reports import write_json
from sigma_vae.training import fit, resolve_device
from sigma_vae.training.choices import Choices
from sigma_vae.training.hardware import choices_for
from sigma_vae.vae import VAE

__all__ = ["resume", "train"]


def train(config: RunConfig, out: Path, *, progress: bool = True) -> dict[str, Any]:
    """Train into a new folder, calibrate, fit the prior where one is asked for, evaluate on the test split, and draw pictures.

    Returns:
        The evaluation, as ``evaluation.json`` holds it.

    Raises:
        ValueError: the folder already holds something, or the config is not possible.
    """
    resolve_device(config.device)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} already exists and is never overwritten; give another --out, or go on with it: sigma-vae resume {out}"
        )
    if config.data.source not in NAMES and Path(config.data.source).exists():  # a path: let the run find it from any folder
        config = replace(config, data=replace(config.data, source=str(Path(config.data.source).resolve())))
    data = build.data(config.data)
    if progress:
        print(f"{data.name}: {data.record['counts']}; {data.record['preprocessing']}")
    if config.model.network == "auto":
        config = replace(config, model=replace(config.model, network=default_network(data.shape, clips=data.clips)))
    vae = _new_vae(config, data)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "config.yaml", config)
    choices = choices_for(vae, data, config.training, resolve_device(config.device))
    write_json(out / "environment.json", _environment(config, data, choices))
    return _finish(config, out, vae, data, resumed=False, progress=progress)


def resume(out: Path, *, epochs: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Go on exactly where a run stopped, perhaps for more epochs than it was given.

    Raises:
        ValueError: the folder holds no run, its data have changed, or it has more epochs behind it than asked for.
    """
    config = given = config_of(out)
    if epochs is not None:
        config = replace(config, training=replace(config.training, epochs=epochs))
    data = same_data(out, config)
    vae = _new_vae(config, data)
    write(out / "config.yaml", config)  # at once: where this is interrupted, the next resumption has the same end
    try:
        return _finish(config, out, vae, data, resumed=True, progress=progress)
    except ValueError:
        write(out / "config.yaml", given)
        raise


def _finish(config: RunConfig, out: Path, vae: VAE, data: Splits, *, resumed: bool, progress: bool) -> dict[str, Any]:
    fit(vae, data, config.training, out=out, seed=config.seed, device=config.device, resume=resumed, progress=progress)
    vae.to(resolve_device(config.device))
    if config.model.prior != "standard":
        take_prior(config.model.prior, vae, data, config.seed)
    build.save(out / "model", vae, config.model, data.shape, data.scaling)
    report = evaluation(out, Run(config, vae, data))
    report |= kept(out, report)  # where nothing was left to train
    store(out, report)
    if drawable(data.shape):
        draw(out, vae, data)
    return report


def _new_vae(config: RunConfig, data: Splits) -> VAE:
    torch.manual_seed(config.seed)
    vae = build.vae(config.model, data.shape, data.scaling)
    if isinstance(vae.network, SequenceNetwork) != (data.frames is not None):
        have, remedy = (
            ("no clips", "take residual, conv, hierarchical or mlp") if data.frames is None else ("clips", "take sequence")
        )
        raise ValueError(f"{config.data.source} has {have}, and the network {config.model.network} is not for that; {remedy}")
    if data.frames is not None and data.frames <= config.model.context_frames:
        raise ValueError(
            f"context_frames={config.model.context_frames} leaves nothing to predict of clips of {data.frames} frames; give fewer"
        )
    check_codes(config.model.prior, vae, data)
    return vae


def _environment(config: RunConfig, data: Splits, choices: Choices) -> dict[str, Any]:
    return {
        "sigma_vae": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "seed": config.seed,
        "threads": choices.threads,
        "choices": asdict(choices),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "data": data.record,
    }
