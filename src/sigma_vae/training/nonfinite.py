"""Keep the step whose loss is not finite, and replay it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from sigma_vae.config import TrainingConfig, parse, write_whole
from sigma_vae.training.checkpoints import damage, step_of
from sigma_vae.training.distributed import first_where, on_any, processes, whole
from sigma_vae.training.hardware import Choices, applied
from sigma_vae.training.module import NonFiniteLossError, TrainingModule
from sigma_vae.training.objective import step_loss
from sigma_vae.types import Batch, Elbo
from sigma_vae.vae import VAE, keyed_noise

__all__ = ["FILE", "BrokenStep", "KeepsBrokenStep", "first_broken", "load_broken_step"]

FILE = "non-finite.safetensors"
"""Its name in the run folder."""
WEIGHTS = "weights."


class BrokenStep(NamedTuple):
    """What a step was made of.

    Shapes:
        batch as the model saw it (of several processes the share of the first that has a broken term); rng ``(bytes,)`` the state of
        the generator (a GPU's own, where there is one) when the step began, empty where it does not matter; weights by their names in
        the model; about: ``step``, ``split``, ``diagnosis``, the ``choices`` of what the hardware is used for, ``shape`` of an example
        and ``scaling`` of the data.
    """

    batch: Batch
    rng: Tensor
    weights: dict[str, Tensor]
    about: dict[str, Any]


class KeepsBrokenStep(pl.Callback):
    """Writes down the step whose loss is not finite.

    Args:
        folder: of the run.
        about: shape and scaling of its data.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        self.about = dict(about)
        self.validated: Batch | None = None
        self.problem: str | None = "it was before the first one"

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Steps begin, of which the module itself remembers the one at hand."""
        self.validated = None

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, *_: Any) -> None:
        """A batch of a validation begins, whose noise belongs to the examples."""
        self.validated = batch

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what there is: all processes come here, after the same step, and the first whose own terms are broken writes."""
        if not isinstance(exception, NonFiniteLossError):
            return
        assert isinstance(pl_module, TrainingModule)
        try:
            self._keep(pl_module, str(exception))
        except Exception as error:  # whatever goes wrong here must not hide what did there
            self.problem = f"{type(error).__name__}: {error}"

    def _keep(self, module: TrainingModule, diagnosis: str) -> None:
        at_hand = module.at_hand if self.validated is None else (self.validated, torch.zeros(0, dtype=torch.uint8))
        if at_hand is None:
            return
        weights = {name: whole(value).cpu() for name, value in module.vae.state_dict().items()}
        (batch, rng), split = at_hand, "train" if self.validated is None else "validation"
        about = {"step": module.newest_step, "split": split, "diagnosis": diagnosis, "choices": asdict(module.choices)}
        self.problem = None
        if processes().rank == first_where(module.fails_here):
            try:
                write_whole(self.folder / FILE, _packed(BrokenStep(batch, rng, weights, self.about | about)))
            except Exception as error:  # whatever it is, the others wait to hear of it
                self.problem = f"{type(error).__name__}: {error}"
        if on_any(self.problem is not None):  # also waits: a process that ends may take the writing one with it
            self.problem = self.problem or "another process could not"

    def told(self, error: NonFiniteLossError, step: int) -> NonFiniteLossError:
        """The error, with what is there to go on from and to look at.

        Args:
            error: of the step.
            step: how many steps lay behind it: a checkpoint with as many is of the weights that failed.
        """
        found = [self.folder / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt")]
        steps = {path: step_of(path) for path in found if damage(path) is None}
        good = next((path for path, behind in steps.items() if behind < step), None)
        says = (
            "There is no checkpoint of before" if good is None else f"The last good checkpoint is {good} (step {steps[good]})"
        )
        if good == found[1] and found[0] in steps:
            says += ", which a resumption takes when last.ckpt is deleted"
        kept = f"The batch is in {self.folder / FILE}: sigma-vae rerun {self.folder} looks at it"
        if self.problem is not None:
            kept = f"The step could not be kept ({self.problem})"
        return NonFiniteLossError(f"{error}. {says}. {kept}")


def load_broken_step(path: Path) -> BrokenStep:
    """Read what :class:`KeepsBrokenStep` wrote: tensors and JSON, no code is run.

    Raises:
        ValueError: the file is missing, damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            # Copies: as they lie in the file they are not aligned, and sums may then be rounded otherwise than in the step.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        weights = {name.removeprefix(WEIGHTS): value for name, value in tensors.items() if name.startswith(WEIGHTS)}
        if tensors["rng"].dtype != torch.uint8 or tensors["rng"].dim() != 1:
            raise ValueError(f"the state of a generator is bytes, got {tensors['rng'].dtype}")
        batch = Batch(tensors["x"], tensors["positions"], tensors.get("mask"))
        return BrokenStep(batch, tensors["rng"], weights, dict(about))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no step whose loss was not finite: {type(error).__name__}: {error}") from error


def first_broken(vae: VAE, step: BrokenStep, config: TrainingConfig = TrainingConfig()) -> list[str]:  # noqa: B008 (frozen)
    """Modules whose output is not finite where their input was, in the order in which they run: where the trouble begins.

    The step is done again as it was, but for compilation and other processes: with its weights, its noise (that of a GPU on a GPU alone),
    its micro-batches and its precision. A parameter that is not finite itself is named first.

    Args:
        vae: a model of the kind that failed; it takes the weights of the step.
        step: as it was kept.
        config: what the run was trained with.
    """
    choices = parse(step.about.get("choices"), Choices, FILE)
    device = choices.device if torch.cuda.is_available() else "cpu"
    choices = replace(choices, device=device, threads=torch.get_num_threads(), allocator="default")
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
    x, positions, mask = step.batch
    batch = Batch(x.to(choices.device), positions, None if mask is None else mask.to(choices.device))
    if not vae.training:
        with torch.no_grad():
            return vae.elbo(batch.x, mask=batch.mask, noise=keyed_noise(positions))
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


def _packed(step: BrokenStep) -> bytes:
    from safetensors.torch import save

    batch = {name: value for name, value in step.batch._asdict().items() if value is not None}
    tensors = batch | {"rng": step.rng} | {f"{WEIGHTS}{name}": value for name, value in step.weights.items()}
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    return save(plain, metadata={"about": json.dumps(step.about)})
