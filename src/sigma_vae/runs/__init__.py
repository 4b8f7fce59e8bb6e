"""A run folder: trained into, resumed, opened, evaluated."""

from sigma_vae.runs.calibrating import calibrate_run
from sigma_vae.runs.comparing import compare
from sigma_vae.runs.evaluating import evaluate_run
from sigma_vae.runs.folder import Run, evaluation_batch, open_model, open_run
from sigma_vae.runs.priors import fit_prior
from sigma_vae.runs.training import has_checkpoint, rerun, resume, train

__all__ = [
    "Run",
    "calibrate_run",
    "compare",
    "evaluate_run",
    "evaluation_batch",
    "fit_prior",
    "has_checkpoint",
    "open_model",
    "open_run",
    "rerun",
    "resume",
    "train",
]
