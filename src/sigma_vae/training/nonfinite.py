"""The error of a loss that is not finite; the step that raised it is kept in the run folder, and can be replayed."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sigma_vae.config import TrainingConfig, parse, write_whole
from sigma_vae.training.checkpoints import damage, step_of
from sigma_vae.training.distributed import on_any, processes, rows_of_all, whole_state
from sigma_vae.training.hardware import Choices, applied
from sigma_vae.training.objective import current_sigma, step_loss
from sigma_vae.types import Batch, Elbo
from sigma_vae.vae import VAE, keyed_noise

FILE = "non-finite.safetensors"
"""Name of the saved step in the run folder."""
WEIGHTS = "weights."
REMEDY = "Checkpoints written before are intact. Train again with a lower learning rate: a third of it, say"


class Suspect(NamedTuple):
    """A batch in training or validation.

    ``rng`` is the generator's state when the step began (a GPU's own, where there is one); empty in a validation, whose
    noise belongs to the examples. ``here``: a term of this process is not finite.
    """

    step: int
    batch: Batch
    rng: Tensor
    split: Literal["train", "validation"] = "train"
    here: bool = False


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the last checkpoint holds the state before."""

    def __init__(self, message: str, suspect: Suspect | None = None) -> None:
        super().__init__(message)
        self.suspect = suspect


def diagnosis(vae: VAE, suspect: Suspect, elbo: Elbo) -> NonFiniteLossError:
    """The error for this batch: step, broken term, σ, range of the batch, weights that are not finite."""
    terms = {"log-likelihood": elbo.log_likelihood, "KL": elbo.rate}
    broken = [name for name, term in terms.items() if not torch.isfinite(term).all()]
    weights = [name for name, p in vae.named_parameters() if not torch.isfinite(p).all()]
    elsewhere = "their mean" if processes().world_size == 1 else "another process's"
    sigma, x = current_sigma(vae), suspect.batch.x
    return NonFiniteLossError(
        f"the loss is not finite at step {suspect.step}: broken term: {' and '.join(broken) or elsewhere};"
        f" σ: {'none' if sigma is None else f'{float(sigma):.4g}'};"
        f" batch in [{float(x.min()):.4g}, {float(x.max()):.4g}];"
        f" weights that are not finite: {', '.join(weights[:3]) or 'none'}."
        f" {REMEDY}",
        suspect._replace(here=bool(broken)),
    )


# -- keeping -----------------------------------------------------------------------------------------------------------


class BrokenStep(NamedTuple):
    """A step that failed: the batch as the model saw it, the generator's state, and the weights by name.

    ``about`` has ``step``, ``split``, ``diagnosis``, the hardware ``choices``, an example's ``shape``, and the data's
    ``scaling``. If several processes train, the batch is the share of the first one with a broken term.
    """

    batch: Batch
    rng: Tensor
    weights: dict[str, Tensor]
    about: dict[str, Any]


def keep_broken_step(folder: Path, vae: VAE, suspect: Suspect | None, about: Mapping[str, Any]) -> str | None:
    """Write the step whose loss is not finite into the run folder.

    Every process calls this; the first one with a broken term writes. ``suspect`` is None before the first step.

    Returns:
        The problem if it could not be written: that must not hide the loss that is not finite.
    """
    if suspect is None:
        return "it was before the first one"
    problem = None
    try:
        weights = {name: value.cpu() for name, value in whole_state(vae).items()}
        first = rows_of_all(torch.tensor(float(suspect.here))).argmax()  # the lowest rank, if it is so nowhere
        if processes().rank == first:
            about = {**about, "step": suspect.step, "split": suspect.split}
            write_whole(folder / FILE, _packed(BrokenStep(suspect.batch, suspect.rng, weights, about)))
    except Exception as error:  # whatever it is, the other processes wait to hear of it
        problem = f"{type(error).__name__}: {error}"
    if on_any(problem is not None):  # also waits: a process that ends may take the writing one with it
        return problem or "another process could not"
    return None


def with_saved_step(error: NonFiniteLossError, folder: Path, step: int, problem: str | None = None) -> NonFiniteLossError:
    """Add to the error which checkpoint is good, and where the step is kept (or the problem in keeping it).

    ``step`` is the number of steps before it: a checkpoint after as many has the weights that failed.
    """
    found = [folder / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt")]
    steps = {path: step_of(path) for path in found if damage(path) is None}
    good = next((path for path, behind in steps.items() if behind < step), None)
    says = "There is no checkpoint of before" if good is None else f"The last good checkpoint is {good} (step {steps[good]})"
    if good == found[1] and found[0] in steps:
        says += ", which a resumption takes when last.ckpt is deleted"
    kept = f"The batch is in {folder / FILE}: sigma-vae rerun {folder} looks at it"
    if problem is not None:
        kept = f"The step could not be kept ({problem})"
    return NonFiniteLossError(f"{error}. {says}. {kept}", error.suspect)


def _packed(step: BrokenStep) -> bytes:
    from safetensors.torch import save

    batch = {name: value for name, value in step.batch._asdict().items() if value is not None}
    tensors = batch | {"rng": step.rng} | {f"{WEIGHTS}{name}": value for name, value in step.weights.items()}
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    return save(plain, metadata={"about": json.dumps(step.about)})


# -- replaying ---------------------------------------------------------------------------------------------------------


def load_broken_step(path: Path) -> BrokenStep:
    """Read what :func:`keep_broken_step` wrote: tensors and JSON, no code is run.

    Raises:
        ValueError: the file is missing, damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            # Copied: tensors in the file are not aligned, and their sums may be rounded differently than in the step.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        weights = {name.removeprefix(WEIGHTS): value for name, value in tensors.items() if name.startswith(WEIGHTS)}
        if tensors["rng"].dtype != torch.uint8 or tensors["rng"].dim() != 1:
            raise ValueError(f"the state of a generator is bytes, got {tensors['rng'].dtype}")
        batch = Batch(tensors["x"], tensors["positions"], tensors.get("mask"), tensors.get("condition"))
        return BrokenStep(batch, tensors["rng"], weights, dict(about))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no step whose loss was not finite: {type(error).__name__}: {error}") from error


def first_broken(vae: VAE, step: BrokenStep, config: TrainingConfig = TrainingConfig()) -> list[str]:  # noqa: B008 (frozen)
    """Replay a step, and name the modules whose output is not finite although their input was, in their order.

    Weights (which ``vae`` takes over), noise (a GPU's on a GPU alone), micro-batches and precision are the step's; the
    replay is not compiled and takes one process. A parameter that is not finite itself is named first.
    """
    known = step.about.get("choices")
    choices = parse(known | {"allocator": "default"} if isinstance(known, dict) else known, Choices, FILE)
    device = choices.device if torch.cuda.is_available() else "cpu"
    choices = replace(choices, device=device, threads=torch.get_num_threads())
    vae.load_state_dict(step.weights)
    vae.to(device).train(step.about["split"] == "train")
    found = [f"{name} (weights)" for name, p in vae.named_parameters() if not torch.isfinite(p).all()]
    handles = [module.register_forward_hook(_watch(name, found)) for name, module in vae.named_modules() if name]
    try:
        with applied(choices, vae):
            elbo = _again(vae, step, config, choices)
    finally:
        for handle in handles:
            handle.remove()
    for name, term in (("log-likelihood", elbo.log_likelihood), ("KL", elbo.kl)):
        broken = (~torch.isfinite(term.flatten(1) if term.dim() > 1 else term[:, None])).any(-1)
        if broken.any():
            examples = step.batch.positions[broken.cpu()].tolist()
            found.append(f"{name} of {len(examples)} of {len(broken)} examples: {', '.join(map(str, examples[:5]))}")
    return list(dict.fromkeys(found))  # each micro-batch finds the same


def _again(vae: VAE, step: BrokenStep, config: TrainingConfig, choices: Choices) -> Elbo:
    batch = step.batch.to(torch.device(choices.device))
    if not vae.training:
        with torch.no_grad():
            return vae.elbo(batch.x, mask=batch.mask, noise=keyed_noise(batch.positions), condition=batch.condition)
    if len(step.rng) == len(torch.get_rng_state()):
        torch.set_rng_state(step.rng)
    elif choices.device == "cuda" and len(step.rng):
        torch.cuda.set_rng_state(step.rng)
    with choices.autocast():
        return step_loss(vae, batch, config, step.about["step"]).elbo


def _watch(name: str, found: list[str]) -> Any:
    def watch(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if not _finite(output) and _finite(inputs):
            found.append(f"{name} ({type(module).__name__})")

    return watch


def _finite(values: Any) -> bool:
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(torch.isfinite(values).all())
    return all(map(_finite, values)) if isinstance(values, tuple | list) else True
