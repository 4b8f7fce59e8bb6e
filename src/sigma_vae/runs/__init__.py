"""A run folder: trained into, resumed, opened, evaluated."""

from sigma_vae.extras import needed_by

with needed_by("sigma_vae.runs"):
    from sigma_vae.runs.compare import compare
    from sigma_vae.runs.evaluate import evaluate_run, evaluation_file
    from sigma_vae.runs.folder import Run, config_of, evaluation_batch, new_data, open_model, open_run, word_of
    from sigma_vae.runs.page import report
    from sigma_vae.runs.refit import calibrate_run, fit_prior
    from sigma_vae.runs.train import has_checkpoint, rerun, resume, train

__all__ = [
    "Run",
    "calibrate_run",
    "compare",
    "config_of",
    "evaluate_run",
    "evaluation_batch",
    "evaluation_file",
    "fit_prior",
    "has_checkpoint",
    "new_data",
    "open_model",
    "open_run",
    "report",
    "rerun",
    "resume",
    "train",
    "word_of",
]
