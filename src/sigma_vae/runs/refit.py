"""Refit σ or the prior of a finished run."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from sigma_vae import models
from sigma_vae.config import DataConfig, EvaluationSettings, RunConfig, read, write
from sigma_vae.data import Splits, names
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation.plots import drawable
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.models import check_prior
from sigma_vae.priors import FittedPrior
from sigma_vae.runs.evaluate import draw, evaluate_anew, evaluation, kept, remove_page_of_others
from sigma_vae.runs.folder import KEY, Run, evaluation_batch, fitted_on, held, keep, open_model, open_run, write_json
from sigma_vae.training import resolve_device
from sigma_vae.training.distributed import first_of_node_first, from_first, joined, shared
from sigma_vae.types import Prior
from sigma_vae.vae import VAE

__all__ = ["calibrate_run", "check_codes", "fit_prior", "take_prior"]


def calibrate_run(
    out: Path, data: str | None = None, split: SplitName = "train", *, device: str = "auto", seed: int = 0
) -> dict[str, Any]:
    r"""Refit σ of a finished run, whatever it was trained with, and evaluate it anew on its own test split.

    The weights stay as they are, and so does the σ of a fixed, shared, running or predicted scale: the *post-hoc* values change, one
    for the density and one for the levels (predicted scales: a factor). An :class:`Optimal` scale has no other σ than these. Nothing
    in the folder changes before the new σ is known.

    Args:
        out: folder of the run.
        data: what to fit σ on, in place of the run's own data: a name or a path, read with the options of the run's own data; or
            a ``config.yaml``, whose ``data`` say how they are read. Standardised values are so by the run's mean and deviation.
        split: whose examples; the test split's σ would have seen what it is evaluated on.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        seed: of the posterior's noise.

    Returns:
        ``sigma_post_hoc`` (or ``factor_post_hoc``), of ``density`` and ``level`` the value ``before`` and ``after`` (a geometric mean
        where there are many, None where there is none); ``sigma_fitted_on``: data, split, number of examples, fingerprint, noise
        seed; ``evaluation``, as ``evaluation.json`` holds it, with ``sigma_fitted_on``.

    Raises:
        ValueError: there is no such run, its likelihood has no σ, the data do not fit the model, or another process is at work in its
            folder.
        OSError: the folder cannot be written.
    """
    with joined(resolve_device(device)), held(out):
        return _calibrate(out, data, split, device, seed)


def _calibrate(out: Path, data: str | None, split: SplitName, device: str, seed: int) -> dict[str, Any]:
    run = open_run(out, device)
    likelihood = run.vae.likelihood
    if not isinstance(likelihood, LocationScale):
        raise ValueError(
            f"{likelihood} of {out} has no σ to fit: its features alone say how sure it is; calibrate a family with a scale"
        )
    fitting = run.data if data is None else _fitting(_config(data, run), run)
    before = _sigma(run.vae)
    where = next(run.vae.parameters()).device
    run.vae.calibrate(shared(fitting, split, evaluation_batch(fitting), where), seed)
    record = {
        "data": fitting.record["source"],
        "split": split,
        "examples": len(fitting.store(split)),
        "fingerprint": fitting.record["fingerprint"],
        "noise_seed": seed,
    }
    from_first(lambda: keep(out, run.vae, record))
    report = evaluate_anew(out, EvaluationSettings(metrics=()), device)
    after = _sigma(run.vae)
    return {
        "factor_post_hoc" if likelihood.scale.predicted else "sigma_post_hoc": {
            name: {"before": before[name], "after": after[name]} for name in after
        },
        KEY: record,
        "evaluation": report,
    }


def _config(data: str, run: Run) -> DataConfig:
    """Where these data are, and how they are read."""
    if data.endswith((".yaml", ".yml")):
        return read(Path(data), RunConfig).data
    scaling = run.data.scaling
    return replace(
        run.config.data,
        source=data if data in names() or not Path(data).exists() else str(Path(data).resolve()),
        root=None,
        cache=None,
        levels=None if data in names() else scaling.levels,
        standardise="yes" if scaling.standardised else "no",
    )


def _fitting(config: DataConfig, run: Run) -> Splits:
    """Data of the kind that the model knows, scaled as it knows them."""
    try:
        with first_of_node_first():
            data = models.data(config)
    except ValueError as error:
        raise ValueError(
            f"{config.source}, read as the run's own data were: {error} (or give a config.yaml as --data)"
        ) from error
    ours, theirs = _kind(run.data), _kind(data)
    if theirs != ours:
        raise ValueError(
            f"σ can be fitted on data of the kind that the model was trained on: {run.config.data.source}, {ours}; got"
            f" {config.source}, {theirs}; a config.yaml as --data says how else they are read"
        )
    known, found = (", ".join(each.record.get("columns", ())) for each in (run.data, data))
    if known and found and known != found:
        raise ValueError(
            f"the model knows the columns {known}, {config.source} has {found}; a config.yaml as --data says which are read"
        )
    return replace(data, scaling=run.data.scaling)


def _kind(data: Splits) -> str:
    values = "real values" if data.levels is None else f"{data.levels} levels"
    return (
        f"{values} in examples of shape {data.shape}"
        if not data.clips
        else f"{values}, with clips of such frames: {data.shape}"
    )


def _sigma(vae: VAE) -> dict[str, float | None]:
    """The refitted σ of each measure, as their geometric mean where there are many."""
    assert isinstance(vae.likelihood, LocationScale)
    scale = vae.likelihood.scale
    stored = {"density": scale.density_log_scale, "level": scale.level_log_scale}
    return {name: float(value.mean().exp()) if value.numel() else None for name, value in stored.items()}


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
    made = models.prior(prior, vae.flat_network.latent_dim)
    if isinstance(made, FittedPrior) and len(data.train) < made.least_latents:
        raise ValueError(
            f"the prior {prior} over {made.latent_dim} latents needs at least {made.least_latents} training examples,"
            f" {data.name} has {len(data.train)}; take prior=standard, or fewer latents"
        )


def take_prior(prior: str, vae: VAE, data: Splits, seed: int) -> None:
    """Fit the named prior to the codes of the training split, with the validation split to choose by, and put it into the model.

    Of several processes the first fits it, and the others take it over.
    """
    network = vae.flat_network
    device = next(vae.parameters()).device
    made = models.prior(prior, network.latent_dim)
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
    models.save(folder / "model", vae, config.model, data.shape, data.scaling)
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
