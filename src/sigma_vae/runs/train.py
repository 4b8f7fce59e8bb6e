"""Train a run into a new folder, resume it, or repeat the step that stopped it."""

import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sigma_vae import __version__, models
from sigma_vae.conditions import Conditions
from sigma_vae.config import DataConfig, RunConfig, parse, write
from sigma_vae.data import Scaling, Splits, names
from sigma_vae.evaluation import Evaluation
from sigma_vae.evaluation.plots import drawable
from sigma_vae.runs.evaluate import BOUNDS_ALONE, check_latents, draw, evaluation, fewer, store, take_prior
from sigma_vae.runs.folder import Run, config_of, data_of, fitted_on, save_refitted, write_json, write_splits
from sigma_vae.runs.page import write_page
from sigma_vae.training import fit, held_out_examples, resolve_device
from sigma_vae.training.checkpoints import BEFORE, LOCK, exclusive, with_remedy
from sigma_vae.training.distributed import first_of_node_first, from_first, joined, processes
from sigma_vae.training.hardware import Choices, choices_for
from sigma_vae.training.objective import FILE, first_broken, load_broken_step
from sigma_vae.types import Observes
from sigma_vae.vae import VAE

NOT_YET_A_RUN = {
    LOCK,
    *(f"{name}{ending}" for name in ("environment", "splits") for ending in (".json", ".new.json")),
    "config.new.yaml",
}
"""Files left by a training that stopped before its folder was a run."""


def train(config: RunConfig, out: Path, *, progress: bool = True, page: bool = True) -> Evaluation:
    """Train into a new folder, calibrate, fit the prior, evaluate on the test split, and draw pictures.

    Processes started by ``torchrun`` share the work; all of them have to see the folder.

    Args:
        config: of the run.
        out: a new folder.
        progress: show a bar, or where output is redirected a line a minute.
        page: write ``report.html``, which takes seconds.

    Returns:
        The evaluation, as in ``evaluation.json``.

    Raises:
        ValueError: the folder is not empty, another process is writing into it, or the config is not possible.
        OSError: the folder cannot be written; files written before are whole.
    """
    with joined(resolve_device(config.device)):
        return _train(config, out, progress=progress, page=page)


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(path.name not in NOT_YET_A_RUN for path in out.iterdir())):
        raise ValueError(
            f"{out} already exists and is never overwritten; give another --out, or continue it: sigma-vae resume {out}"
        )


def _train(config: RunConfig, out: Path, *, progress: bool, page: bool) -> Evaluation:
    from_first(lambda: _check_new(out))
    name, given = config.model.likelihood, _from_anywhere(config.data)
    mixed, counts = given.mixed or name.partition(":")[0] == "mixed", given.counts or models.takes_counts(name)
    config = replace(config, data=replace(given, mixed=mixed, counts=counts))
    with first_of_node_first():
        data = models.data(config.data)
    say: Callable[[str], None] = print if progress and processes().first else lambda words: None
    say(f"{data.name}: {data.record['counts']}; {data.record['preprocessing']}")
    if config.model.network == "auto":
        chosen, reason = models.network_for(config.model, data)
        config = replace(config, model=chosen, training=models.training_for(chosen, config.training))
        if reason:
            say(f"network {chosen.network}: {reason}")
    config = replace(config, model=replace(config.model, network=models.from_anywhere(config.model.network)))
    if config.model.likelihood == "auto":
        name, reason = models.likelihood_for(config.model, data)
        config = replace(config, model=replace(config.model, likelihood=name))
        say(f"likelihood {name}: {reason}")
    if config.model.latent_dim == "auto":
        config = replace(config, model=replace(config.model, latent_dim=models.latents_for(config.model, data)))
        say(f"{config.model.latent_dim} latents, by the held-out likelihood of probabilistic PCA")
    vae = _new_vae(config, data)
    choices = choices_for(vae, data, config.training, resolve_device(config.device))
    environment = _environment(config, data, choices)
    with with_remedy(out, "train again"), exclusive(out):
        from_first(lambda: _begin(config, out, environment, data))
        with with_remedy(out, f"continue: sigma-vae resume {out}"):
            return _finish(config, out, vae, data, resumed=False, progress=progress, page=page)


def _from_anywhere(data: DataConfig) -> DataConfig:
    """The same data, with paths that hold in any folder; a source is looked for in its root, where it has one."""
    inside = data.root is not None or data.source in names() or not Path(data.source).exists()
    source = data.source if inside else str(Path(data.source).resolve())
    return replace(data, source=source, root=_absolute(data.root), cache=_absolute(data.cache))


def _absolute(folder: str | None) -> str | None:
    return None if folder is None else str(Path(folder).expanduser().resolve())


def _begin(config: RunConfig, out: Path, environment: dict[str, Any], data: Splits) -> None:
    _check_new(out)  # again: another process may have trained into it while the data were read
    write_json(out / "environment.json", environment)
    write_splits(out, data)
    write(out / "config.yaml", config)  # from here on the folder is a run, which can be resumed


def resume(out: Path, *, epochs: int | None = None, progress: bool = True) -> Evaluation:
    """Continue a run exactly where it stopped; from the beginning, if it has no checkpoint yet.

    ``epochs`` is the total number of epochs, in place of the run's own.

    Raises:
        ValueError: the folder holds no run, its data have changed, it has more than these epochs behind it, all its
            checkpoints are damaged, or another process is writing into it.
        OSError: the folder cannot be written.
    """
    config = given = config_of(out)
    if epochs is not None:
        config = replace(config, training=replace(config.training, epochs=epochs))
    with joined(resolve_device(config.device)):
        data = data_of(out, config)
        vae = _new_vae(config, data)
        with with_remedy(out, f"continue: sigma-vae resume {out}"), exclusive(out):
            # At once, so that a resumption of an interrupted resumption has the same end.
            from_first(lambda: write(out / "config.yaml", config))
            try:
                return _finish(config, out, vae, data, resumed=has_checkpoint(out), progress=progress)
            except ValueError:
                if processes().first:
                    write(out / "config.yaml", given)
                raise


def rerun(out: Path) -> dict[str, Any]:
    """Repeat the step whose loss was not finite.

    It is read from ``non-finite.safetensors`` in the run folder; the data are not needed.

    Returns:
        ``step``, ``split``, the ``diagnosis`` given when the run stopped, and ``begins_in``: in their order, the
        modules whose output is not finite although their input was, and the terms and examples (positions in the split)
        that are not finite.

    Raises:
        ValueError: the folder holds no run, or no such step.
    """
    step = load_broken_step(out / FILE)
    shape = step.about.get("shape")
    if not isinstance(shape, list) or not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"{out / FILE} does not say the shape of an example, got {shape!r}")
    config = config_of(out)
    scaling = parse(step.about.get("scaling"), Scaling, str(out / FILE))
    sizes = {name: value.shape for name, value in step.weights.items()}
    try:
        trained = config.model if config.model.prior == "learned" else replace(config.model, prior="standard")
        known = step.about.get("conditions")
        conditions = None if known is None else parse(known, Conditions, str(out / FILE))
        vae = models.sized(trained, tuple(shape), scaling, sizes, conditions=conditions)
        begins = first_broken(vae, step, config.training)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:  # tensors of any kind and size
        raise ValueError(f"{out / FILE} does not fit the model of {out}: {error}") from error
    return {name: step.about.get(name) for name in ("step", "split", "diagnosis")} | {"begins_in": begins}


def has_checkpoint(out: Path) -> bool:
    """Whether a run has a checkpoint to continue from."""
    return any((out / "checkpoints" / name).exists() for name in ("last.ckpt", "previous.ckpt"))


def _finish(
    config: RunConfig, out: Path, vae: VAE, data: Splits, *, resumed: bool, progress: bool, page: bool = True
) -> Evaluation:
    done = fit(
        vae,
        data,
        config.training,
        out=out,
        seed=config.seed,
        device=config.device,
        resume=resumed,
        progress=progress,
        save=False,  # the model of a run is there when its prior is fitted: the run is then finished
    )
    if progress and done.skipped_steps:
        print(f"{done.skipped_steps} of {done.steps} steps were skipped: their gradient norm reached skip_gradient_norm")
    vae.to(resolve_device(config.device))
    examples = held_out_examples(config.training, data, done.steps)
    priors = take_prior(config.model.prior, vae, data, config.seed, examples)
    from_first(lambda: _save(out, config, vae, data, examples, done.training_sigma))
    examples = max(1, examples * data.values_per_example // math.prod(data.test.shape))  # test clips may be longer
    if vae.network.has_prior:
        examples = fewer(examples, vae.network.prior.density_passes)
    report = evaluation(out, Run(config, vae, data), replace(BOUNDS_ALONE, examples=examples), priors)
    return from_first(lambda: _write_report(out, report, Run(config, vae, data), page=page))


def _save(
    out: Path, config: RunConfig, vae: VAE, data: Splits, examples: int, training_sigma: Mapping[Observes, float]
) -> None:
    models.save(out / "model", vae, config.model, data.shape, data.scaling)
    if training_sigma:
        record = fitted_on(data.sampled("validation", examples), "validation")
        record |= {"noise_seed": 0, "training_sigma": dict(training_sigma)}
        if examples < len(data.validation):
            record["of_examples"] = len(data.validation)
        save_refitted(out, vae, record)


def _write_report(out: Path, report: Evaluation, run: Run, *, page: bool) -> Evaluation:
    report = store(out, report)  # sections are kept where nothing was left to train
    if drawable(run.data.shape) and not run.data.scaling.counts:
        draw(out, run.vae, run.data)
    if page:
        write_page(out, run, report)
    for name in BEFORE.values():  # the run is whole: the newest checkpoint is enough to continue it
        (out / "checkpoints" / name).unlink(missing_ok=True)
    return report


def _new_vae(config: RunConfig, data: Splits) -> VAE:
    torch.manual_seed(config.seed)
    vae = models.vae(config.model, data.shape, data.scaling, conditions=data.conditions)
    if vae.network.reads_clips != data.clips:
        have, remedy = ("clips", "take sequence") if data.clips else ("no clips", "take residual, conv, hierarchical or mlp")
        raise ValueError(f"{config.data.source} has {have}, and the network {config.model.network} is not for that; {remedy}")
    if data.frames is not None and data.frames <= vae.network.context_frames:
        raise ValueError(
            f"context_frames={vae.network.context_frames} leaves nothing to predict of clips of {data.frames} frames; give fewer"
        )
    check_latents(config.model.prior, vae, data)
    return vae


def _environment(config: RunConfig, data: Splits, choices: Choices) -> dict[str, Any]:
    return {
        "sigma_vae": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "seed": config.seed,
        "threads": choices.threads,
        "choices": asdict(choices),
        "processes": processes().world_size,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "data": data.record,
    }
