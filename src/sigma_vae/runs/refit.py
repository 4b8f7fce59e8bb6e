"""Refit σ or the prior of a finished run."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sigma_vae import models
from sigma_vae.config import EvaluationSettings, RunConfig, check_seed, read, write
from sigma_vae.data import Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation import Evaluation
from sigma_vae.evaluation.elbo import has_fitted_prior, refitted_scales
from sigma_vae.evaluation.plots import drawable
from sigma_vae.runs.evaluate import draw, evaluate_anew, evaluation, priors_of, remove_stale_pages, with_kept
from sigma_vae.runs.folder import (
    SIGMA_FITTED_ON,
    Run,
    evaluation_batch,
    fitted_on,
    lock_run,
    new_config,
    open_model,
    open_run,
    save_refitted,
    sigma_fitted_on,
    write_json,
)
from sigma_vae.training import resolve_device
from sigma_vae.training.distributed import first_of_node_first, from_first, joined, shared
from sigma_vae.types import Likelihood, Prior
from sigma_vae.vae import VAE

__all__ = ["calibrate_run", "check_latents", "fit_prior", "take_prior"]

STANDARD_PICTURE = "samples-standard-prior.png"


def calibrate_run(
    out: Path, data: str | None = None, split: SplitName = "validation", *, device: str = "auto", seed: int = 0
) -> dict[str, Any]:
    r"""Refit σ of a finished run, whatever it was trained with, and evaluate it again on its own test split.

    The weights do not change, and neither does the σ of a fixed, shared, running or predicted scale: their *post-hoc*
    values change, one for the density and one for the bin probabilities (predicted scales: a factor). An
    :class:`Optimal` scale has no other σ than these. The folder does not change before the new σ is known.

    Args:
        out: folder of the run.
        data: data to fit σ on in place of the run's own: a name or a path, read with the options of the run's data; or
            a ``config.yaml``, read with the options in its ``data``. Values are standardised by the mean and std of the
            run's data.
        split: split to fit σ on. Of training data, σ is too small where the model overfits; a σ fitted on test has seen
            the examples that it is evaluated on.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        seed: seed of the posterior's noise.

    Returns:
        ``sigma_post_hoc`` (or ``factor_post_hoc``): for ``density`` and ``level`` the value ``before`` and ``after`` (a
        geometric mean where there are many, None where there is none); ``sigma_fitted_on``: data, split, number of
        examples, fingerprint, noise seed; ``evaluation``, as in ``evaluation.json``.

    Raises:
        ValueError: there is no such run, its likelihood has no σ, the data do not fit the model, or another process is
            writing into its folder.
        OSError: the folder cannot be written.
    """
    check_seed(seed)
    with joined(resolve_device(device)), lock_run(out):
        return _calibrate(out, data, split, device, seed)


def _calibrate(out: Path, data: str | None, split: SplitName, device: str, seed: int) -> dict[str, Any]:
    run = open_run(out, device)
    likelihood = run.vae.likelihood
    if not likelihood.has_scale:
        raise ValueError(
            f"{likelihood} of {out} has no σ to fit: its uncertainty is in the decoder's features alone; calibrate a family with a scale"
        )
    fitting = _fitting(out, run, data)
    before = _sigma(likelihood)
    run.vae.calibrate(shared(fitting, split, evaluation_batch(fitting), run.vae.device), seed)
    known = (sigma_fitted_on(out) or {}).get("training_sigma")
    record = fitted_on(fitting, split) | {"noise_seed": seed} | ({} if known is None else {"training_sigma": known})
    priors = priors_of(out)  # σ does not change them
    from_first(lambda: save_refitted(out, run.vae, record))
    report = evaluate_anew(out, EvaluationSettings(metrics=()), device, priors)
    after = _sigma(likelihood)
    return {
        "factor_post_hoc" if likelihood.predicts_scale else "sigma_post_hoc": {
            name: {"before": before[name], "after": after[name]} for name in after
        },
        SIGMA_FITTED_ON: record,
        "evaluation": report.to_json(),
    }


def _fitting(out: Path, run: Run, data: str | None) -> Splits:
    """The run's own data; or others of the kind that the model was trained on, scaled like the run's."""
    if data is None:
        return run.data
    is_config = data.endswith((".yaml", ".yml"))
    config = read(Path(data), RunConfig).data if is_config else new_config(out, run.data.scaling, data)
    try:
        with first_of_node_first():
            found = models.data(config)
    except ValueError as error:
        raise ValueError(
            f"{config.source}, read with the options of the run's data: {error} (or pass a config.yaml as --data)"
        ) from error
    ours, theirs = _kind(run.data), _kind(found)
    if theirs != ours:
        raise ValueError(
            f"a run is refitted on data like those that the model was trained on: {run.config.data.source}, {ours}; got"
            f" {config.source}, {theirs}; pass a config.yaml as --data to read them in another way"
        )
    known, has = (", ".join(each.record.get("columns", ())) for each in (run.data, found))
    if known and has and known != has:
        raise ValueError(
            f"the model was trained on the columns {known}, {config.source} has {has}; pass a config.yaml as --data to choose columns"
        )
    conditions = run.vae.network.conditions
    if conditions is not None and not conditions.means_the_same(found.conditions):
        raise ValueError(
            f"{config.source} needs the conditions of the model, {', '.join(conditions.names)} with all of their classes, to fit it; give"
            " data that have them"
        )
    return replace(found, scaling=run.data.scaling)


def _kind(data: Splits) -> str:
    values = "real values" if data.levels is None else f"{data.levels} levels"
    return f"{values}, with clips of such frames: {data.shape}" if data.clips else f"{values} in examples of shape {data.shape}"


def _sigma(likelihood: Likelihood) -> dict[str, float | None]:
    known = refitted_scales(likelihood)
    return {name: known.get(name) for name in ("density", "level")}


def fit_prior(out: Path, prior: str = models.AUTO, data: str | None = None, *, device: str = "auto") -> Evaluation:
    """Fit another prior to the latents of a finished run's training split; the rest of the model does not change.

    With other ``data``, given as for :func:`calibrate_run`, the latents are those of their training split, and their
    validation split makes the choices.

    The model, ``config.yaml``, the evaluation and the pictures are first made beside the old ones, and replace them
    together: after a failure the run is as it was. The run is then the one that training with ``prior=...`` would have
    made.

    The prior is ``mixture`` (number of components chosen on the validation split), ``mixture:20``, ``gaussian`` or
    ``flow``; ``auto`` is the best of N(0, I), a Gaussian and a mixture on the validation split; ``standard`` goes back to
    N(0, I). The result is the evaluation, as in ``evaluation.json``.

    Raises:
        ValueError: there is no such run or prior, the run's network has no single layer of flat latents, or another
            process is writing into its folder.
        OSError: the folder cannot be written.
    """
    with joined(resolve_device(device)), lock_run(out):
        return from_first(lambda: _fit_prior(out, prior, data, device))


def _fit_prior(out: Path, prior: str, data: str | None, device: str) -> Evaluation:
    aside, before = out / "prior.new", out / "model.before"
    if before.exists() and not (out / "model").exists():  # killed between the two renames
        before.rename(out / "model")
    saved = open_model(out, device)
    models.check_prior("gaussian" if prior == models.AUTO else prior, saved.config.network, saved.vae.network)
    run = open_run(out, device)
    fitting = _fitting(out, run, data)
    check_latents(prior, run.vae, fitting)
    densities = take_prior(prior, run.vae, fitting, run.config.seed)
    for left_over in (aside, before):
        shutil.rmtree(left_over, ignore_errors=True)
    config = replace(run.config, model=replace(run.config.model, prior=prior))
    try:
        report = with_kept(out, _write(aside, Run(config, run.vae, run.data), sigma_fitted_on(out), densities))
        if data is not None:
            report.about["prior_fitted_on"] = fitted_on(fitting, "train")
        write_json(aside / "evaluation.json", report.to_json())
        _exchange(out / "model", aside / "model", before)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for path in aside.iterdir():
        path.replace(out / path.name)
    aside.rmdir()
    if not has_fitted_prior(run.vae):
        (out / STANDARD_PICTURE).unlink(missing_ok=True)
    remove_stale_pages(out, report)
    return report


def check_latents(prior: str, vae: VAE, data: Splits) -> None:
    """Refuse before training a prior that has more parameters than the training split can fit.

    Raises:
        ValueError: the prior needs more training examples.
    """
    if prior in ("standard", models.AUTO):
        return
    (size,) = vae.network.latents.sizes
    made = models.prior(prior, size, None, vae.network.conditions)
    if made.needs_fit and len(data.train) < made.least_latents:
        raise ValueError(
            f"the prior {prior} over {size} latents needs at least {made.least_latents} training examples,"
            f" {data.name} has {len(data.train)}; take prior=standard, or fewer latents"
        )


def take_prior(prior: str, vae: VAE, data: Splits, seed: int, most: int | None = None) -> dict[str, float]:
    """Put the named prior into the model, fitted to the latents of the training split, and return what its fit found.

    The validation split makes its choices, and takes a simpler prior where that is better. Where several processes
    train, the first one fits it and the others take it over. At most ``most`` examples of each split are encoded.
    """
    if most is not None:
        data = data.sampled("train", most).sampled("validation", most)
    made = models.priors(prior, vae.network, len(data.train))
    if not any(each.needs_fit for each in made):
        for each in made:
            vae.network.replace_prior(each.to(vae.device))
        return {}
    size = evaluation_batch(data)
    training, validation = (data.batches(split, size, device=vae.device) for split in ("train", "validation"))

    def fitted() -> tuple[Prior, dict[str, float]]:
        densities = vae.fit_prior(training, made if prior == models.AUTO else made[0], validation, seed)
        return vae.network.prior, densities

    best, densities = from_first(fitted)
    vae.network.replace_prior(best.to(vae.device))
    return densities


def _write(folder: Path, run: Run, sigma: dict[str, Any] | None, priors: Mapping[str, float]) -> Evaluation:
    config, vae, data = run
    models.save(folder / "model", vae, config.model, data.shape, data.scaling)
    if sigma is not None:
        save_refitted(folder, vae, sigma)
    write(folder / "config.yaml", config)
    report = evaluation(folder, run, priors=priors)
    if drawable(data.shape):
        draw(folder, vae, data)
    return report


def _exchange(old: Path, new: Path, before: Path) -> None:
    """Replace one folder by another, with two renames; if the second fails, the first is undone."""
    old.rename(before)
    try:
        new.rename(old)
    except OSError:
        before.rename(old)
        raise
    shutil.rmtree(before, ignore_errors=True)
