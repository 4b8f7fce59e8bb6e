"""Autoencoders of diffusers: audit one on data (σ, rate, latents, the numbers that it should have), and export one."""

import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sigma_vae import __version__, models
from sigma_vae.config import DataConfig, EvaluationSettings, RunConfig, read, write_whole
from sigma_vae.data import Batches, Splits
from sigma_vae.evaluation import Evaluation, EvaluationData, evaluate
from sigma_vae.evaluation.base import Estimate, Record, each_example, evaluation_batch
from sigma_vae.evaluation.information import Information, information
from sigma_vae.evaluation.plots import drawable, pairs, save_grid
from sigma_vae.evaluation.suite import chosen, measure
from sigma_vae.likelihoods import Gaussian, Laplace
from sigma_vae.networks.autoencoder_kl import autoencoder_kl, config_of, folder_of, has_weights
from sigma_vae.networks.spatial import MapStatistics
from sigma_vae.runs.evaluate import read_evaluation
from sigma_vae.runs.folder import fitted_on, open_run, sigma_fitted_on
from sigma_vae.runs.page import Picture, Section, Table, template
from sigma_vae.training import resolve_device
from sigma_vae.types import Batch
from sigma_vae.vae import VAE

PREFIX = "hf-vae:"
"""Begins the name of an autoencoder of diffusers, in place of a run."""
NEEDED = [f"{folder}{name}" for folder in ("", "vae/") for name in ("config.json", "diffusion_pytorch_model*.safetensors*")]
PICTURES, COLUMNS = 16, 8
SHIFT_LOSS, SCALE_LOSS = 0.1, 1.1
"""Means and factors that are remarked upon, in units of the latents' std."""


@dataclass(frozen=True, eq=False)
class Fit(Record):
    """One likelihood with its best scale, on held-out data.

    The scale is σ of a Gaussian, b of a Laplace likelihood, in units of pictures in [0, 1]. ``implied_kl_weight`` is the
    weight of the KL for which training finds this scale: on the *mean* squared error over [−1, 1] for the Gaussian (the
    loss of diffusers' script), on the *sum* of absolute errors over [−1, 1] for the Laplace likelihood (that of CompVis).
    """

    scale: float
    elbo_nats: Estimate
    bits_per_dim: Estimate | None
    implied_kl_weight: float


@dataclass(frozen=True, eq=False)
class Audit(Record):
    """An autoencoder of diffusers on the user's data; see :func:`audit`."""

    name: str
    data: str
    shape: list[int]
    latent_shape: list[int]
    examples: int
    gaussian: Fit
    laplace: Fit
    psnr_db: Estimate
    rate_nats: Estimate
    rate_bits_per_latent: float
    marginal_kl_at_least_nats: float
    active_channels: int
    kl_per_channel_nats: list[float]
    latents_mean: list[float]
    latents_std: list[float]
    excess_kurtosis: list[float]
    scaling_factor: float
    shift_factor: float
    config_scaling_factor: float
    config_shift_factor: float | None
    kl_weight: float | None = None
    """The KL weight that it was trained with, as the user says."""
    sigma_fitted_on: dict[str, Any] | None = None


class _Opened(NamedTuple):
    """The autoencoder with a Gaussian likelihood, its folder's configuration, and the data."""

    vae: VAE
    config: dict[str, Any]
    data: Splits


def name_of(source: str) -> str:
    """A word for the files written of an audit.

    >>> name_of("hf-vae:models/sd-vae-ft-mse/"), name_of("hf-vae:stabilityai/sdxl-vae")
    ('sd-vae-ft-mse', 'sdxl-vae')
    """
    return Path(source.removeprefix(PREFIX)).name or "vae"


def audit(
    source: str, data: str, *, kl_weight: float | None = None, split: str = "validation", seed: int = 0, device: str = "auto"
) -> tuple[Audit, bytes | None]:
    """Measure an autoencoder of diffusers on data, with σ solved on the validation split.

    Bounds, rate and reconstructions are on the test split; the moments of the latents on the training split.

    Args:
        source: ``hf-vae:FOLDER`` (of the autoencoder, or of its pipeline), or ``hf-vae:OWNER/NAME`` on the Hugging Face
            Hub. Only safetensors are opened.
        data: name or path of the data, or a ``config.yaml`` with the options in its ``data`` section.
        kl_weight: the weight that it was trained with, for the record.
        split: split that σ is solved on.
        seed: seed of the posterior's noise.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

    Returns:
        The audit, and a PNG of originals above their reconstructions where they can be drawn.

    Raises:
        ValueError: there is no such autoencoder, its weights are missing or pickles, or it does not read these data.
    """
    if kl_weight is not None and not 0 < kl_weight < math.inf:
        raise ValueError(f"--kl-weight is the weight of the KL in a loss, above 0, got {kl_weight}")
    opened = _open(source, data, device)
    vae, splits = opened.vae, opened.data
    size = evaluation_batch(splits)
    test, training, fitting = (splits.batches(name, size, device=vae.device) for name in ("test", "train", split))  # type: ignore[arg-type]
    vae.calibrate(fitting, seed)
    laplace = VAE(vae.network, Laplace(vae.likelihood.channels, levels=vae.likelihood.levels)).to(vae.device)
    laplace.calibrate(fitting, seed)
    found = information(vae, test, training, seed)
    assert isinstance(found, Information)
    statistics = vae.map_statistics(training)
    gaussian = evaluate(vae, test, training, seed)
    numbers = _numbers(opened, found, statistics)
    dims = math.prod(splits.shape)
    return Audit(
        name=source.removeprefix(PREFIX),
        data=splits.name,
        examples=len(test.store),
        gaussian=_as_fit(vae, gaussian, 8 * _scale(vae) ** 2 / dims),
        laplace=_as_fit(laplace, evaluate(laplace, test, training, seed), 2 * _scale(laplace)),
        psnr_db=_psnr(vae, test),
        rate_nats=gaussian.bounds.rate_nats,
        kl_weight=kl_weight,
        sigma_fitted_on=fitted_on(splits, split),  # type: ignore[arg-type]
        **numbers,
    ), _picture(vae, test)


def evaluate_audited(source: str, data: str, settings: EvaluationSettings, device: str = "auto") -> Evaluation:
    """Evaluate an autoencoder of diffusers by any metrics, with a Gaussian likelihood whose σ is solved on validation data."""
    vae, _, splits = _open(source, data, device)
    size = evaluation_batch(splits)
    vae.calibrate(splits.batches("validation", size, device=vae.device), settings.seed)
    count = len(splits.store(settings.split))
    splits = splits.sampled(settings.split, settings.examples or count)
    held_out, training = (splits.batches(name, size, device=vae.device) for name in (settings.split, "train"))
    about: dict[str, Any] = {"data": splits.name, "split": settings.split, "network": source, "likelihood": "gaussian/optimal"}
    about |= {"prior": "standard", "sigma_fitted_on": fitted_on(splits, "validation")}
    if len(held_out.store) < count:
        about["of_examples"] = count
    examples = EvaluationData(held_out, training, splits)
    return Evaluation(measure(vae, examples, settings, chosen(vae, examples, settings)), about)


def _open(source: str, data: str, device: str) -> _Opened:
    folder = _folder(source.removeprefix(PREFIX))
    config = config_of(folder)
    if not has_weights(folder_of(folder)):
        raise ValueError(f"{folder} has no weights (diffusion_pytorch_model.safetensors), so there is nothing to audit")
    is_config = data.endswith((".yaml", ".yml"))
    splits = models.data(read(Path(data), RunConfig).data if is_config else DataConfig(data))
    if splits.scaling.standardised or splits.clips:
        raise ValueError(
            f"an autoencoder of diffusers reads pictures in [0, 1]; {splits.name} has clips or standardised values"
        )
    likelihood = Gaussian(splits.shape[0], spatial_dims=len(splits.shape) - 1, levels=splits.levels)
    vae = VAE(autoencoder_kl(splits.shape, likelihood.in_channels, folder), likelihood)
    return _Opened(vae.to(resolve_device(device)).eval(), config, splits)


def _folder(source: str) -> Path:
    """A folder here, or one that the hub's client fetches: configuration and safetensors alone."""
    folder = Path(source).expanduser()
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return folder
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=NEEDED))
    except Exception as error:  # of the network, of the hub, of its cache
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"there is no folder {source} here, and the hub's client could not fetch it: {reason}") from error


def _scale(vae: VAE) -> float:
    sigma = vae.likelihood.sigma(refitted=True)
    assert sigma is not None
    return float(sigma)


def _as_fit(vae: VAE, report: Evaluation, weight: float) -> Fit:
    bounds = report.bounds
    assert bounds.elbo_post_hoc_nats is not None
    return Fit(_scale(vae), bounds.elbo_post_hoc_nats, bounds.bits_per_dim_post_hoc, weight)


def _numbers(opened: _Opened, found: Information, statistics: MapStatistics) -> dict[str, Any]:
    config = opened.config
    return {
        "shape": list(opened.data.shape),
        "latent_shape": list(opened.vae.network.latents.shapes[0]),
        "rate_bits_per_latent": found.mean_kl_nats.mean / found.latent_dim / math.log(2),
        "marginal_kl_at_least_nats": found.marginal_kl_at_least_nats,
        "active_channels": found.active_channels,
        "kl_per_channel_nats": found.kl_per_channel_nats,
        "latents_mean": statistics.mean,
        "latents_std": statistics.std,
        "excess_kurtosis": statistics.excess_kurtosis,
        "scaling_factor": statistics.scaling_factor,
        "shift_factor": statistics.shift_factor,
        "config_scaling_factor": float(config.get("scaling_factor", 0.18215)),
        "config_shift_factor": config.get("shift_factor"),
    }


def _psnr(vae: VAE, batches: Batches) -> Estimate:
    """Mean over pictures of 10·log10(1 / mean squared error), decoded from the posterior's mean."""

    def rows(batch: Batch) -> torch.Tensor:
        again = vae.decode(vae.encode(batch.x).loc)
        return -10 * (again - batch.x).square().flatten(1).mean(1).clamp_min(1e-12).log10()

    return Estimate.of(each_example(vae, batches, rows))


@torch.no_grad()
def _picture(vae: VAE, batches: Batches) -> bytes | None:
    if not drawable(batches.store.shape):
        return None
    x = next(iter(Batches(batches.store, batches.scaling, PICTURES))).x
    again = vae.decode(vae.encode(x).loc)
    with tempfile.TemporaryDirectory() as folder:
        save_grid(path := Path(folder) / "pictures.png", pairs(x.cpu(), again.cpu(), COLUMNS), COLUMNS)
        return path.read_bytes()


def audit_rows(found: Audit) -> Iterator[tuple[str, str, str]]:
    """The table of an audit: name, value, meaning."""
    sigma, laplace = found.gaussian.scale, found.laplace.scale
    size = math.prod(found.latent_shape)
    yield "σ (Gaussian)", f"{sigma:.5f}", f"root mean squared error in [0, 1]; {2 * sigma:.5f} in [−1, 1]"
    yield "b (Laplace)", f"{laplace:.5f}", "mean absolute error, likewise"
    yield "PSNR", f"{_words(found.psnr_db, 2)} dB", "of the posterior's mean, decoded"
    yield "rate", f"{_words(found.rate_nats, 1)} nats", f"KL(q(z|x)‖N(0, I)) over {size} latents"
    yield "rate per latent", f"{found.rate_bits_per_latent:.3f} bits", "the same, shared out"
    yield (
        "KL(q(z)‖N(0, I))",
        f"at least {found.marginal_kl_at_least_nats:.1f} nats",
        "why samples from N(0, I) are not pictures",
    )
    for name, fit in (("Gaussian", found.gaussian), ("Laplace", found.laplace)):
        yield f"ELBO ({name})", f"{_words(fit.elbo_nats, 1)} nats", "of the density, σ refitted"
        if fit.bits_per_dim is not None:
            yield f"bits/dim ({name})", _words(fit.bits_per_dim, 4), "bound on the bits of the levels, σ refitted"
    channels = len(found.latents_std)
    yield "active channels", f"{found.active_channels} of {channels}", "with a posterior mean that varies by more than 0.01"
    yield "rate by channel", _list(found.kl_per_channel_nats, 1), "nats"
    yield "latents' mean by channel", _list(found.latents_mean, 3), "latents_mean of config.json"
    yield "latents' std by channel", _list(found.latents_std, 3), "latents_std of config.json"
    yield "excess kurtosis by channel", _list(found.excess_kurtosis, 2), "0 for a normal distribution"
    had = f"config.json has {found.config_scaling_factor:.4g}"
    yield "scaling factor", f"{found.scaling_factor:.4f}", f"1 / std of all latents; {had}"
    shift = "none" if found.config_shift_factor is None else f"{found.config_shift_factor:.4g}"
    yield "shift factor", f"{found.shift_factor:.4f}", f"mean of all latents; config.json has {shift}"
    yield "implied KL weight, mean MSE", f"{found.gaussian.implied_kl_weight:.3g}", "on the mean squared error over [−1, 1]"
    yield "implied KL weight, sum of L1", f"{found.laplace.implied_kl_weight:.3g}", "on the summed absolute error over [−1, 1]"
    if found.kl_weight is not None:
        times = (found.gaussian.implied_kl_weight / found.kl_weight, found.laplace.implied_kl_weight / found.kl_weight)
        meaning = f"implied weights are {times[0]:.3g} (mean MSE) and {times[1]:.3g} (sum of L1) times as large"
        yield "KL weight it was trained with", f"{found.kl_weight:.3g}", meaning


def notes(found: Audit) -> Iterator[str]:
    """Conclusions, a sentence each."""
    ratio = found.config_scaling_factor / found.scaling_factor
    if not 1 / SCALE_LOSS < ratio < SCALE_LOSS:
        yield f"With the scaling factor of its config the latents have a std of {ratio:.3g} on these data, not of 1."
    if abs(found.shift_factor) * found.scaling_factor > SHIFT_LOSS and found.config_shift_factor is None:
        shift = found.shift_factor * found.scaling_factor
        yield f"The latents' mean lies {shift:.2g} standard deviations from 0, and the config has no shift factor."
    if found.marginal_kl_at_least_nats > 0.1 * found.rate_nats.mean:
        share = found.marginal_kl_at_least_nats / found.rate_nats.mean
        yield f"At least {share:.0%} of the rate tells nothing about the picture: it is the distance of the latents from N(0, I)."


def write_page(found: Audit, picture: bytes | None, path: Path) -> None:
    """Write an audit as one HTML page with nothing outside it."""
    shape, latents = (" × ".join(map(str, sizes)) for sizes in (found.shape, found.latent_shape))
    fitted = found.sigma_fitted_on or {}
    how = f"σ was solved on {fitted.get('examples')} examples ({fitted.get('split')}); moments of the latents are those of the"
    words = "Test examples, each above its reconstruction from the posterior's mean"
    rows = tuple(audit_rows(found))
    section = Section(
        "Numbers",
        points=tuple(notes(found)),
        tables=(Table("± is one standard error over the examples", ("number", "value", "meaning"), rows, stacks=True),),
        pictures=() if picture is None else (Picture("reconstructions.png", picture, words, words),),
        further=(f"{how} training split, over posterior draws and places.",),
    )
    about = f"{found.examples} test examples of {found.data}, {shape} values each; latents {latents}."
    content = {"title": f"Audit of {found.name}", "about": about, "made": f"By sigma-vae {__version__}.", "signs": {}}
    write_whole(path, template("report.html.j2").render(content | {"sections": [section]}))


def _words(value: Estimate, digits: int) -> str:
    error = "" if value.standard_error is None else f" ± {value.standard_error:.{digits}f}"
    return f"{value.mean:.{digits}f}{error}"


def _list(values: list[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


# -- export to diffusers -----------------------------------------------------------------------------------------------

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
        yield f"| `{name}` | {_in_words(numbers[name])} | {use} |"


USES = {
    "scaling_factor": "1 / std of all latents: (z − shift_factor) · scaling_factor has unit variance",
    "shift_factor": "mean of all latents",
    "latents_mean": "mean of each channel",
    "latents_std": "std of each channel: (z − latents_mean) / latents_std has unit variance, channel by channel",
}


def _in_words(value: Any) -> str:
    return ", ".join(f"{each:.4f}" for each in value) if isinstance(value, list | tuple) else f"{value:.4f}"
