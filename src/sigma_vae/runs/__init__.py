"""A run folder: trained into, resumed, opened, evaluated."""

from sigma_vae.registry import needed_by

with needed_by("sigma_vae.runs"):
    import yaml  # noqa: F401  # every run has a config.yaml: what is missing is named before anything is read

    from sigma_vae.evaluation.base import evaluation_batch
    from sigma_vae.runs.evaluate import calibrate_run, compare, evaluate_run, evaluation_file, fit_prior, read_evaluation
    from sigma_vae.runs.folder import (
        Run,
        columns_of,
        config_of,
        move_data,
        new_config,
        new_data,
        open_model,
        open_run,
        read_json,
        word_of,
    )
    from sigma_vae.runs.page import report
    from sigma_vae.runs.train import has_checkpoint, rerun, resume, train

__all__ = [
    "Run",
    "calibrate_run",
    "columns_of",
    "compare",
    "config_of",
    "evaluate_run",
    "evaluation_batch",
    "evaluation_file",
    "fit_prior",
    "has_checkpoint",
    "move_data",
    "new_config",
    "new_data",
    "open_model",
    "open_run",
    "read_evaluation",
    "read_json",
    "report",
    "rerun",
    "resume",
    "train",
    "word_of",
]
