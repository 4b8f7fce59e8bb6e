"""Priors of runs: fitted after training, and exchanged in a finished run."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from sigma_vae import build
from sigma_vae.config import RunConfig
from sigma_vae.configfile import write
from sigma_vae.data import Splits
from sigma_vae.evaluation.pictures import drawable
from sigma_vae.naming import check_prior
from sigma_vae.priors import FittedPrior
from sigma_vae.runs.evaluating import draw, evaluation, kept, remove_page_of_others
from sigma_vae.runs.folder import Run, evaluation_batch, open_model, open_run
from sigma_vae.runs.held import held
from sigma_vae.runs.reports import write_json
from sigma_vae.runs.sigma import fitted_on, keep
from sigma_vae.training import resolve_device
from sigma_vae.training.processes import from_first, joined
from sigma_vae.types import Prior
from sigma_vae.vae import VAE

__all__ = ["check_codes", "fit_prior", "take_prior"]

STANDARD_PICTURE = "samples-standard-prior.png"


def fit_prior(out: Path, prior: str = "mixture", *, device: str = "auto") -> dict[str, Any]:
    """Give a finished run another prior, fitted to the codes of its training split; all else of the model stays as it is.

    The model, ``config.yaml``, the evaluation and the pictures are made beside the old ones, which they replace when all are there: where
    something fails, the run is as it was. The run is then what training it with ``prior=...`` would have made.

    Args:
        out: folder of the run.
        prior: its name: ``mixture`` (as many components as validation data are worth), ``mixture:20``, ``gaussian``, ``flow``; with
            ``standard`` the run goes back to N(0, I).
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

    Returns:
        The evaluation, as ``evaluation.json`` holds it.

    Raises:
        ValueError: there is no such run or prior, the run's network has no flat latents, or another process is at work in its folder.
        OSError: the folder cannot be written.
    """
    with joined(resolve_device(device)), held(out):
        return from_first(lambda: _fit_prior(out, prior, device))


def _fit_prior(out: Path, prior: str, device: str) -> dict[str, Any]:
    aside, before = out / "prior.new", out / "model.before"
    if before.exists() and not (out / "model").exists():  # killed between two renames
        before.rename(out / "model")
    saved = open_model(out, device)
    check_prior(prior, saved.config.network, saved.vae.network)
    run = open_run(out, device)
    check_codes(prior, run.vae, run.data)
    take_prior(prior, run.vae, run.data, run.config.seed)
    for left_over in (aside, before):
        shutil.rmtree(left_over, ignore_errors=True)
    config = replace(run.config, model=replace(run.config.model, prior=prior))
    try:
        report = _write(aside, config, run.vae, run.data, fitted_on(out))
        report |= kept(out, report)
        write_json(aside / "evaluation.json", report)
        _exchange(out / "model", aside / "model", before)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for path in aside.iterdir():
        path.replace(out / path.name)
    aside.rmdir()
    if not isinstance(run.vae.flat_network.prior, FittedPrior):
        (out / STANDARD_PICTURE).unlink(missing_ok=True)
    remove_page_of_others(out, report)
    return report


def check_codes(prior: str, vae: VAE, data: Splits) -> None:
    """Refuse before training what has too few examples to be fitted after it.

    Raises:
        ValueError: a prior with so many parameters needs more examples.
    """
    if prior == "standard":
        return
    made = build.prior(prior, vae.flat_network.latent_dim)
    if isinstance(made, FittedPrior) and len(data.train) < made.least_codes:
        raise ValueError(
            f"the prior {prior} over {made.latent_dim} latents needs at least {made.least_codes} training examples,"
            f" {data.name} has {len(data.train)}; take prior=standard, or fewer latents"
        )


def take_prior(prior: str, vae: VAE, data: Splits, seed: int) -> None:
    """Fit the named prior to the codes of the training split, with the validation split to choose by, and put it into the model.

    Of several processes the first fits it, and the others take it over.
    """
    network = vae.flat_network
    device = next(vae.parameters()).device
    made = build.prior(prior, network.latent_dim)
    if not isinstance(made, FittedPrior):
        network.prior = made.to(device)
        return
    size = evaluation_batch(data)
    training, validation = (data.batches(split, size, device=device) for split in ("train", "validation"))

    def fitted() -> Prior:
        vae.fit_prior(training, made, validation, seed)
        return network.prior

    network.prior = from_first(fitted).to(device)


def _write(folder: Path, config: RunConfig, vae: VAE, data: Splits, sigma: dict[str, Any] | None) -> dict[str, Any]:
    build.save(folder / "model", vae, config.model, data.shape, data.scaling)
    if sigma is not None:
        keep(folder, vae, sigma)
    write(folder / "config.yaml", config)
    report = evaluation(folder, Run(config, vae, data))
    if drawable(data.shape):
        draw(folder, vae, data)
    return report


def _exchange(old: Path, new: Path, before: Path) -> None:
    """A folder for another, by two renames; where the second fails, the first is undone."""
    old.rename(before)
    try:
        new.rename(old)
    except OSError:
        before.rename(old)
        raise
    shutil.rmtree(before, ignore_errors=True)
