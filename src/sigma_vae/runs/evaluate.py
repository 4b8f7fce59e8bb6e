"""Evaluate a finished run: numbers on its test split, and pictures; and refit its σ or its prior."""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sigma_vae import __version__, models
from sigma_vae.config import EvaluationSettings, ModelConfig, RunConfig, check_seed, read, write
from sigma_vae.data import Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation import Estimate, Evaluation, EvaluationData, score
from sigma_vae.evaluation.base import evaluation_batch, metrics, plain
from sigma_vae.evaluation.elbo import refitted_scales
from sigma_vae.evaluation.plots import drawable, pairs, reconstructed, sampled, sampled_per_class, save_clips, save_grid
from sigma_vae.evaluation.suite import chosen, measure
from sigma_vae.runs.folder import (
    SIGMA_FITTED_ON,
    Run,
    fitted_on,
    lock_run,
    model_digest,
    new_config,
    new_data,
    open_model,
    open_run,
    read_json,
    save_refitted,
    sigma_fitted_on,
    word_of,
    write_json,
)
from sigma_vae.training import resolve_device
from sigma_vae.training.distributed import first_of_node_first, from_first, joined, shared
from sigma_vae.types import Likelihood, Prior
from sigma_vae.vae import VAE, Scores, has_fitted_prior, standard_prior

BOUNDS_ALONE = EvaluationSettings(metrics=())
LEAST_EXAMPLES = 64
AFFORDABLE_VALUES, CALIBRATION_VALUES = 2**25, 2**24
"""Values that are evaluated, and that σ is fitted to, where it is not said how many examples: all of CIFAR-10's fit in."""
PICTURES = 64
ALL = "all"
"""Split of examples that are in none."""
CLASS_SAMPLES, MOST_ROWS = 8, 50
CLIPS = 8
"""Clips in a picture, one per row."""


def evaluate_run(
    out: Path,
    settings: EvaluationSettings = EvaluationSettings(),  # noqa: B008 (frozen)
    data: str | None = None,
    *,
    device: str = "auto",
) -> Evaluation:
    """Evaluate a finished run on a device, and write ``evaluation.json`` (or ``evaluation-validation.json``).

    Where neither metrics nor a number of examples are given, at most :func:`affordable` ones are measured, chosen at
    random; the report then has their number, and that of all (``of_examples``).

    Each metric has its own section, which says how it was measured. Sections that are not asked for this time are kept,
    as long as they are about the same weights. Under ``torchrun`` the processes share the work; some metrics
    (``quality``, ``predictions``) are measured by the first one, while the others wait.

    With other ``data``, a name or a path, these are read and scaled like the run's own, which are not needed. All of
    them are measured where they have no splits, and the results are written aside (:func:`evaluation_file`).

    Raises:
        ValueError: there is no such run, a metric does not apply to it, or another process is working in its folder.
        OSError: the folder cannot be written.
    """
    with joined(resolve_device(device)), lock_run(out):
        return evaluate_anew(out, settings, device) if data is None else _evaluate_new(out, settings, data, device)


def evaluate_anew(out: Path, settings: EvaluationSettings, device: str, about: Mapping[str, Any] | None = None) -> Evaluation:
    """Do what :func:`evaluate_run` does, where the folder is already locked; ``about`` is added to the report."""
    run = open_run(out, device)
    if settings.metrics is None and settings.examples is None:
        most = affordable(run, settings.split)
        settings = replace(settings, examples=most if most < len(run.data.store(settings.split)) else None)
    report = evaluation(out, run, settings)
    report.about.update(about or {})
    return from_first(lambda: _store_with_pages(out, report, run.data.name, settings.split))


def _evaluate_new(out: Path, settings: EvaluationSettings, source: str, device: str) -> Evaluation:
    saved = open_model(out, device)
    new = new_data(out, saved, source, settings.split)
    about = _about(out, saved.config, saved.vae, source, new.split or ALL)
    about["how"] |= {"data_fingerprint": new.batches.store.fingerprint()}
    report = _measured(saved.vae, EvaluationData(new.batches), settings, about)
    return from_first(lambda: _store_with_pages(out, report, source, word_of(source)))


def evaluation_file(out: Path, data: str) -> Path:
    """The file with the evaluation on other data: ``evaluation-NAME.json``."""
    return _file(out, "evaluation", ".json", word_of(data))


def _store_with_pages(out: Path, report: Evaluation, title: str, word: str) -> Evaluation:
    for name, metric in metrics().items():
        if metric.draws_page and name in report.results:
            metric.draw_page(report.results[name], _file(out, name, ".png", word), title)
    return store(out, report, word)


def evaluation(
    out: Path, run: Run, settings: EvaluationSettings = BOUNDS_ALONE, priors: Mapping[str, float] | None = None
) -> Evaluation:
    """Evaluate a run whose model is saved in this folder, and record the weights, data and versions.

    ``priors`` is what :meth:`VAE.fit_prior` found.
    """
    config, vae, whole = run
    count = len(whole.store(settings.split))
    data = whole.sampled(settings.split, settings.examples or count)
    size = evaluation_batch(data)
    held_out, training = (shared(data, split, size, vae.device) for split in (settings.split, "train"))
    about = _about(out, config.model, vae, config.data.source, settings.split, priors)
    about["how"] |= {
        "data_fingerprint": data.record["fingerprint"],
        "split_fingerprint": data.store(settings.split).fingerprint(),
        "preprocessing": data.record["preprocessing"],
    }
    if data is not whole:
        about["of_examples"] = count
    return _measured(vae, EvaluationData(held_out, training, data), settings, about)


def _about(
    out: Path, model: ModelConfig, vae: VAE, source: str, split: str, priors: Mapping[str, float] | None = None
) -> dict[str, Any]:
    about: dict[str, Any] = {"data": source, "split": split, "network": model.network, "likelihood": model.likelihood}
    if vae.network.reads_clips:
        about["context_frames"] = vae.network.context_frames
    if vae.network.has_prior:
        about["prior"] = models.prior_name(vae.network.prior)
    if priors:
        about["prior_held_out_nats"] = dict(priors)
    fitted = sigma_fitted_on(out)
    if fitted is not None:
        about[SIGMA_FITTED_ON] = fitted
    about["how"] = {"sigma_vae": __version__, "torch": torch.__version__, "model_sha256": model_digest(out)}
    return about


def _measured(vae: VAE, examples: EvaluationData, settings: EvaluationSettings, about: dict[str, Any]) -> Evaluation:
    vae.eval()
    return Evaluation(measure(vae, examples, settings, chosen(vae, examples, settings), from_first), about)


def store(out: Path, report: Evaluation, word: str = "test") -> Evaluation:
    """Write the report, with the sections that are kept, and return the whole; ``word`` tells its files from others."""
    report = with_kept(out, report, word)
    write_json(_file(out, "evaluation", ".json", word), report.to_json())
    remove_stale_pages(out, report, word)
    return report


def with_kept(out: Path, report: Evaluation, word: str = "test") -> Evaluation:
    """Add the sections that the folder's report has beside bounds of the same weights, data and versions."""
    try:
        known = read_evaluation(out, word)
    except ValueError:  # there is none, or it is broken
        return report
    if known.about.get("how") != report.about["how"]:
        return report
    return Evaluation(known.sections, _of_prior(known) | report.about).updated(report.results)


def _examples_before(out: Path) -> int | None:
    """Number of examples of the folder's evaluation, where they were a part of the split; None: all, or it is not known."""
    try:
        known = read_evaluation(out)
    except ValueError:  # there is none, or it is broken
        return None
    return known.bounds.examples if "of_examples" in known.about else None


def priors_of(out: Path) -> dict[str, Any]:
    """Read from the folder's report how its prior was chosen."""
    try:
        return _of_prior(read_evaluation(out))
    except ValueError:  # there is none, or it is broken
        return {}


def _of_prior(report: Evaluation) -> dict[str, Any]:
    return {key: report.about[key] for key in ("prior_held_out_nats", "prior_fitted_on") if key in report.about}


def remove_stale_pages(out: Path, report: Evaluation, word: str = "test") -> None:
    """Remove pages of results that the report does not have: they are about other weights."""
    for name, metric in metrics().items():
        if metric.draws_page and name not in report.results:
            _file(out, name, ".png", word).unlink(missing_ok=True)


def read_evaluation(out: Path, word: str = "test") -> Evaluation:
    """Read the report of a run: on its test or validation split, or on other data by their word.

    Raises:
        ValueError: it is missing or broken.
    """
    path = _file(out, "evaluation", ".json", word)
    try:
        return Evaluation.from_json(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path} does not hold what an evaluation writes ({error}); evaluate the run anew") from error


def _file(out: Path, name: str, ending: str, word: str) -> Path:
    return out / (name + ("" if word == "test" else f"-{word}") + ending)


def draw(out: Path, vae: VAE, data: Splits) -> None:
    """Write pictures of samples and reconstructions, moving for clips; for a fitted prior, also samples of N(0, I)."""
    vae.eval()
    moving = data.frames is not None
    if has_fitted_prior(vae):
        with standard_prior(vae):
            save_grid(out / "samples-standard-prior.png", _samples(vae, data, PICTURES))
    samples = _samples(vae, data, CLIPS if moving else PICTURES)
    batch = next(iter(data.batches("test", CLIPS if moving else PICTURES // 2, device=vae.device)))
    originals, again = map(data.scaling.undo, (batch.x, reconstructed(vae, batch)))
    if not moving:
        save_grid(out / "samples.png", samples)
        label = None if vae.network.conditions is None else vae.network.conditions.only_classes
        if label is not None and len(label.classes or ()) <= MOST_ROWS:
            save_grid(out / "samples-per-class.png", data.scaling.undo(sampled_per_class(vae, CLASS_SAMPLES)), CLASS_SAMPLES)
        save_grid(out / "reconstructions.png", pairs(originals, again, columns=8), columns=8)
        return
    for ending, columns in ((".png", 1), (".gif", 8)):
        save_clips(out / f"samples{ending}", samples)
        save_clips(out / f"reconstructions{ending}", pairs(originals, again, columns), columns)


def _samples(vae: VAE, data: Splits, n: int) -> Tensor:
    generator = torch.Generator(vae.device).manual_seed(0)
    return data.scaling.undo(sampled(vae, data, n, generator))


# -- finished runs side by side ----------------------------------------------------------------------------------------

SAME = ("data", "split", "examples", "levels", "dims")
"""Keys that must agree for numbers to be about the same thing, and so must the fingerprint of the split."""


def compare(outs: Sequence[Path], *, paired: bool = False, device: str = "auto") -> list[dict[str, Any]]:
    """Set finished runs side by side: a row for each run, with the numbers that its metrics compare.

    Bits per dimension compare between all decoders; nats of a density do not compare with nats of levels, and are None
    unless all runs observe the same. The means of runs are over the same examples, so their standard errors say little
    about their difference: ``paired`` scores every example of each run anew, on the device, and gives the mean
    difference to the first run, with its own standard error. Fréchet distances are those of decoder means; where a run
    has a fitted prior, those of N(0, I) stand beside them.

    Raises:
        ValueError: fewer than two runs, one that has no evaluation or one of other weights, or evaluations of different
            examples.
    """
    if len(outs) < 2:
        raise ValueError(f"compare sets runs side by side and needs at least 2, got {len(outs)}")
    reports = [_report(out) for out in outs]
    for name in SAME:
        _check_same(name, outs, [report.get(name) for report in reports])
    _check_same("examples (by their fingerprint)", outs, [report.about["how"]["split_fingerprint"] for report in reports])
    rows = [
        {"run": str(out), **{name: report.about.get(name) for name in ("network", "likelihood", "prior")}}
        for out, report in zip(outs, reports, strict=True)
    ]
    for name, metric in metrics().items():
        for row, numbers in zip(rows, metric.compared([report.results.get(name) for report in reports]), strict=True):
            row |= plain(numbers)
    if paired:
        same_quantity = len({report.bounds.observes for report in reports}) == 1
        for row, differences in zip(rows, _differences(outs, device, same_quantity), strict=True):
            row |= plain(differences)
    return rows


def _report(out: Path) -> Evaluation:
    """The evaluation of the weights that the run has now."""
    if not (out / "evaluation.json").exists():
        raise ValueError(f"{out} has no evaluation; make one: sigma-vae evaluate {out}")
    report = read_evaluation(out)
    how = report.about.get("how")
    if not isinstance(how, dict) or "split_fingerprint" not in how or how.get("model_sha256") != model_digest(out):
        raise ValueError(
            f"{out / 'evaluation.json'} is about other weights than the run has now, or from an older version; evaluate it anew:"
            f" sigma-vae evaluate {out}"
        )
    return report


def _check_same(name: str, outs: Sequence[Path], known: list[Any]) -> None:
    if any(value != known[0] for value in known):
        found = ", ".join(f"{out}: {value}" for out, value in zip(outs, known, strict=True))
        raise ValueError(f"the runs were evaluated on different {name}, so their numbers do not compare ({found})")


def _differences(outs: Sequence[Path], device: str, same_quantity: bool) -> Iterator[dict[str, Any]]:
    """Mean differences of each run to the first; None for the first itself."""
    first: tuple[Tensor | None, Tensor | None] | None = None
    for out in outs:
        run = open_run(out, device)
        scores = score(run.vae, run.data.batches("test", evaluation_batch(run.data), device=run.vae.device))
        bound = same_quantity and run.vae.likelihood.normalised  # an objective bounds nothing
        values = _bits(scores), scores.log_likelihood_post_hoc - scores.rate if bound else None
        bits, nats = (None, None) if first is None else map(_difference, values, first)
        first = values if first is None else first
        yield {"bits_per_dim_post_hoc - first": bits, "elbo_post_hoc_nats - first": nats}


def _difference(values: Tensor | None, first: Tensor | None) -> Estimate | None:
    return None if values is None or first is None else Estimate.of(values - first)


def _bits(scores: Scores) -> Tensor | None:
    """Bits per dimension of each example, with the refitted σ."""
    mass = scores.log_mass_post_hoc
    return None if mass is None else (scores.rate - mass) / (scores.dims * math.log(2))


# -- another σ, another prior ------------------------------------------------------------------------------------------

STANDARD_PICTURE = "samples-standard-prior.png"


def calibrate_run(
    out: Path,
    data: str | None = None,
    split: SplitName = "validation",
    *,
    examples: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    r"""Refit σ of a finished run, whatever it was trained with, and evaluate it again on its own test split.

    The evaluation is on as many test examples as the run's last one.

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
        examples: most examples to fit σ on, chosen at random; unless given, as many as have 2²⁴ values.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        seed: seed of the posterior's noise.

    Returns:
        ``sigma_post_hoc`` (or ``factor_post_hoc``): for ``density`` and ``level`` the value ``before`` and ``after`` (a
        geometric mean where there are many, None where there is none); ``sigma_fitted_on``: data, split, number of
        examples (``of_examples`` of all, where they are a part), fingerprint, noise seed; ``evaluation``, as in
        ``evaluation.json``.

    Raises:
        ValueError: there is no such run, its likelihood has no σ, the data do not fit the model, or another process is
            writing into its folder.
        OSError: the folder cannot be written.
    """
    check_seed(seed)
    with joined(resolve_device(device)), lock_run(out):
        return _calibrate(out, data, split, examples, device, seed)


def _calibrate(out: Path, data: str | None, split: SplitName, examples: int | None, device: str, seed: int) -> dict[str, Any]:
    run = open_run(out, device)
    likelihood = run.vae.likelihood
    if not likelihood.has_scale:
        raise ValueError(
            f"{likelihood} of {out} has no σ to fit: its uncertainty is in the decoder's features alone; calibrate a family with a scale"
        )
    whole = _fitting(out, run, data)
    fitting = whole.sampled(split, examples or _examples_of(CALIBRATION_VALUES, whole, split))
    before = _sigma(likelihood)
    run.vae.calibrate(shared(fitting, split, evaluation_batch(fitting), run.vae.device), seed)
    known = (sigma_fitted_on(out) or {}).get("training_sigma")
    record = fitted_on(fitting, split) | {"noise_seed": seed} | ({} if known is None else {"training_sigma": known})
    record |= {} if fitting is whole else {"of_examples": len(whole.store(split))}
    priors = priors_of(out)  # σ does not change them
    from_first(lambda: save_refitted(out, run.vae, record))
    report = evaluate_anew(out, EvaluationSettings(metrics=(), examples=_examples_before(out)), device, priors)
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


def affordable(run: Run, split: SplitName) -> int:
    """Examples of a split that are evaluated unless more are asked for: 2²⁵ values, fewer where the prior's density takes long."""
    count = _examples_of(AFFORDABLE_VALUES, run.data, split)
    return fewer(count, run.vae.network.prior.density_passes) if run.vae.network.has_prior else count


def _examples_of(values: int, data: Splits, split: SplitName) -> int:
    """Examples of a split that have so many values; 64 at the least."""
    return max(values // math.prod(data.store(split).shape), LEAST_EXAMPLES)


def fewer(examples: int, passes: int) -> int:
    """Examples that cost as much if each takes so many passes of the network; 64 or all at the least."""
    return max(examples // passes, min(examples, LEAST_EXAMPLES))


def take_prior(prior: str, vae: VAE, data: Splits, seed: int, most: int | None = None) -> dict[str, float]:
    """Put the named prior into the model, fitted to the latents of the training split, and return what its fit found.

    The validation split makes its choices, and takes a simpler prior where that is better. Where several processes
    train, the first one fits it and the others take it over. At most ``most`` examples of each split are encoded,
    and fewer where the densities of a prior take long.
    """
    made = models.priors(prior, vae.network, min(len(data.train), most or len(data.train)))
    if most is not None:
        count = fewer(most, max((each.density_passes for each in made), default=1))
        data = data.sampled("train", count).sampled("validation", count)
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
