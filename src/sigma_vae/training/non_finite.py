"""A step whose loss is not finite, kept so that it can be looked at: batch, weights and noise in one file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from sigma_vae.configfile import write_whole
from sigma_vae.training.checkpoints import step_of
from sigma_vae.training.module import NonFiniteLossError, TrainingModule
from sigma_vae.types import Batch
from sigma_vae.vae import VAE, keyed_noise

__all__ = ["FILE", "BrokenStep", "KeepsBrokenStep", "first_broken", "load_broken_step"]

FILE = "non-finite.safetensors"
"""Its name in the run folder."""
WEIGHTS = "weights."


class BrokenStep(NamedTuple):
    """What a step was made of.

    Shapes:
        batch as the model saw it; rng ``(bytes,)`` the state of torch's generator when the step began, empty where it does not matter or
        is not known; weights by their names in the model; about: ``step``, ``split``, ``diagnosis``, ``shape`` of an example and
        ``scaling`` of the data.
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

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Steps begin, of which the module itself remembers the one at hand."""
        self.validated = None

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, *_: Any) -> None:
        """A batch of a validation begins, whose noise belongs to the examples."""
        self.validated = batch

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what there is."""
        assert isinstance(pl_module, TrainingModule)
        at_hand = pl_module.at_hand if self.validated is None else (self.validated, torch.zeros(0, dtype=torch.uint8))
        if not isinstance(exception, NonFiniteLossError) or at_hand is None or not trainer.is_global_zero:
            return
        (batch, rng), split = at_hand, "train" if self.validated is None else "validation"
        number = trainer.global_step if pl_module.failed is None else pl_module.failed
        about = self.about | {"step": number, "split": split, "diagnosis": str(exception)}
        write_whole(self.folder / FILE, _packed(BrokenStep(batch, rng, pl_module.vae.state_dict(), about)))

    def told(self, error: NonFiniteLossError, step: int) -> NonFiniteLossError:
        """The error, with what is there to go on from and to look at.

        Args:
            error: of the step.
            step: how many steps lay behind it: a checkpoint with as many is of the weights that failed.
        """
        found = [self.folder / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt")]
        steps = {path: step_of(path) for path in found if path.exists()}
        good = next((path for path, behind in steps.items() if behind < step), None)
        says = (
            "There is no checkpoint of before" if good is None else f"The last good checkpoint is {good} (step {steps[good]})"
        )
        if good == found[1]:
            says += ", which a resumption takes when last.ckpt is deleted"
        return NonFiniteLossError(
            f"{error}. {says}. The batch is in {self.folder / FILE}: sigma-vae rerun {self.folder} looks at it"
        )


def load_broken_step(path: Path) -> BrokenStep:
    """Read what :class:`KeepsBrokenStep` wrote: tensors and JSON, no code is run.

    Raises:
        ValueError: the file is missing, damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        weights = {name.removeprefix(WEIGHTS): value for name, value in tensors.items() if name.startswith(WEIGHTS)}
        batch = Batch(tensors["x"], tensors["positions"], tensors.get("mask"))
        return BrokenStep(batch, tensors["rng"], weights, dict(about))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no step whose loss was not finite: {type(error).__name__}: {error}") from error


def first_broken(vae: VAE, step: BrokenStep) -> list[str]:
    """Modules whose output is not finite where their input was, in the order in which they run: where the trouble begins.

    The step is done again, with its weights and its noise. A parameter that is not finite itself is named first.
    """
    vae.load_state_dict(step.weights)
    found = [f"{name} (weights)" for name, p in vae.named_parameters() if not torch.isfinite(p).all()]
    handles = [module.register_forward_hook(_watch(name, found)) for name, module in vae.named_modules() if name]
    train = step.about["split"] == "train"
    vae.train(train)
    if len(step.rng):
        torch.set_rng_state(step.rng)
    try:
        with torch.no_grad():
            noise = None if train else keyed_noise(step.batch.positions)
            elbo = vae.elbo(step.batch.x, mask=step.batch.mask, noise=noise)
    finally:
        for handle in handles:
            handle.remove()
    for name, term in (("log-likelihood", elbo.log_likelihood), ("KL", elbo.kl)):
        broken = (~torch.isfinite(term.flatten(1) if term.dim() > 1 else term[:, None])).any(-1)
        if broken.any():
            examples = step.batch.positions[broken.cpu()].tolist()
            found.append(f"{name} of {len(examples)} of {len(broken)} examples: {', '.join(map(str, examples[:5]))}")
    return found


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
