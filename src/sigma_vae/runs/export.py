"""Export a run's autoencoder to diffusers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sigma_vae import __version__
from sigma_vae.evaluation import Evaluation
from sigma_vae.runs.evaluate import read_evaluation
from sigma_vae.runs.folder import evaluation_batch, open_run, sigma_fitted_on

__all__ = ["export"]

CARD = "README.md"
NUMBERS = ("elbo_nats", "objective_nats", "rate_nats", "bits_per_dim")


def export(run: Path, out: Path, *, device: str = "auto") -> dict[str, Any]:
    """Write a run's autoencoder as a folder that ``AutoencoderKL.from_pretrained`` opens, with a model card.

    The numbers that pipelines read (``scaling_factor``, ``shift_factor``, ``latents_mean``, ``latents_std``) are measured
    on the run's training split.

    Args:
        run: folder of the run.
        out: folder to write; new, or empty.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

    Returns:
        These numbers, by their name in ``config.json``.

    Raises:
        ValueError: the folder is not empty, there is no such run, or its model cannot be exported.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty, and is never overwritten; give another --out")
    opened = open_run(run, device)
    if opened.data.scaling.standardised:
        raise ValueError(
            f"the values of {opened.data.name} were standardised, and pictures of diffusers are in [−1, 1]; train with --standardise no"
        )
    training = opened.data.batches("train", evaluation_batch(opened.data), device=opened.vae.device)
    model = opened.vae.to_diffusers(training)
    model.cpu().save_pretrained(str(out), safe_serialization=True)
    numbers = {name: model.config[name] for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")}
    sigma = opened.vae.likelihood.sigma()
    shown = None if sigma is None else float(sigma.log().mean().exp())
    lines = _card(read_evaluation(run), numbers, shown, len(opened.data.train), sigma_fitted_on(run) or {})
    (out / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return numbers


def _card(
    report: Evaluation, numbers: dict[str, Any], sigma: float | None, examples: int, fitted: dict[str, Any]
) -> Iterator[str]:
    """The model card, line by line."""
    about = report.about
    yield from (
        "---",
        "library_name: diffusers",
        "tags:",
        "- autoencoder",
        "- sigma-vae",
        "---",
        "",
        "# Calibrated autoencoder",
        "",
    )
    network = about["network"].partition(":/")[0]  # without the place of a config
    yield f"An `AutoencoderKL` trained by sigma-vae {__version__} on {Path(about['data']).name}: network `{network}`, likelihood"
    yield f"`{about['likelihood']}`. No KL weight was chosen: σ is solved from the data, and the loss is the negative ELBO."
    yield ""
    if sigma is not None:
        yield f"σ of the decoder: {sigma:.5g} in units of pictures in [0, 1], {2 * sigma:.5g} in [−1, 1]"
        yield f"(solved on {fitted.get('examples', 'the')} examples of the {fitted.get('split', 'training')} split)."
        yield ""
    yield f"| {report.bounds.examples} {about['split']} examples | mean | ± s.e. |"
    yield "| --- | --- | --- |"
    for name in NUMBERS:
        if name in report:
            yield f"| {name} | {report[name]['mean']:.4f} | {report[name]['standard_error'] or 0:.4f} |"
    yield ""
    yield f"Measured on {examples} training examples, over posterior draws and places:"
    yield ""
    yield "| entry of config.json | value | use |"
    yield "| --- | --- | --- |"
    for name, use in USES.items():
        yield f"| `{name}` | {_words(numbers[name])} | {use} |"


USES = {
    "scaling_factor": "1 / std of all latents: (z − shift_factor) · scaling_factor has unit variance",
    "shift_factor": "mean of all latents",
    "latents_mean": "mean of each channel",
    "latents_std": "std of each channel: (z − latents_mean) / latents_std has unit variance, channel by channel",
}


def _words(value: Any) -> str:
    return ", ".join(f"{each:.4f}" for each in value) if isinstance(value, list | tuple) else f"{value:.4f}"
