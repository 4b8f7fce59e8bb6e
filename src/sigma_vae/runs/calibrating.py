"""σ of a finished run, refitted: on its own data, or on others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sigma_vae import build
from sigma_vae.config import DataConfig, RunConfig
from sigma_vae.configfile import read
from sigma_vae.data import NAMES, Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation.settings import EvaluationSettings
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.runs.evaluating import evaluate_anew
from sigma_vae.runs.folder import Run, evaluation_batch, open_run
from sigma_vae.runs.held import held
from sigma_vae.runs.sigma import KEY, keep
from sigma_vae.training import resolve_device
from sigma_vae.training.processes import first_of_node_first, from_first, joined
from sigma_vae.training.shares import shared
from sigma_vae.vae import VAE

__all__ = ["calibrate_run"]


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
        source=data if data in NAMES or not Path(data).exists() else str(Path(data).resolve()),
        root=None,
        cache=None,
        levels=None if data in NAMES else scaling.levels,
        standardise="yes" if scaling.standardised else "no",
    )


def _fitting(config: DataConfig, run: Run) -> Splits:
    """Data of the kind that the model knows, scaled as it knows them."""
    try:
        with first_of_node_first():
            data = build.data(config)
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
