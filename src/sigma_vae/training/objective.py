"""The training loss: the negative ELBO, or a weighted objective; and what is kept of a step where it is not finite."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sigma_vae.config import TrainingConfig, parse, write_whole
from sigma_vae.training.checkpoints import damage, step_of
from sigma_vae.training.distributed import mean_over_all, on_any, processes, rows_of_all, sum_over_all, whole_state
from sigma_vae.training.hardware import Choices, applied
from sigma_vae.types import Batch, Elbo, Inference, as_argument, in_full_precision
from sigma_vae.vae import VAE, keyed_noise

NO_KL = 1e-9
"""KL in nats per latent that counts as none."""


def validated_total(vae: VAE) -> str:
    """Name of the metric that is maximised: the ELBO, or an objective where there is no likelihood (grey Bernoulli)."""
    return "validation/elbo_nats" if vae.likelihood.normalised else "validation/objective_nats"


def current_sigma(vae: VAE) -> Tensor | None:
    """The σ that training uses, if any: the geometric mean of several, or an optimal scale's running one."""
    log_sigma = vae.likelihood.log_sigma()
    return None if log_sigma is None else log_sigma.detach().mean().exp()


class Losses(NamedTuple):
    """The ELBO of each example, and the objective to minimise, ``(*batch,)`` in nats."""

    elbo: Elbo
    minimised: Tensor


def check_weights(vae: VAE, config: TrainingConfig) -> None:
    """Refuse weights of the objective that do not apply to this model.

    Raises:
        ValueError: β-NLL is asked for where no σ is predicted, or a balance where there is one layer.
    """
    if config.beta_nll and not vae.likelihood.predicts_scale:
        raise ValueError(
            f"beta_nll weights each value by the σ predicted for it, which {vae.likelihood} does not predict; use a per-pixel or"
            " per-image scale, or beta_nll=0"
        )
    if config.condition_dropout and vae.network.conditions is None:
        raise ValueError(
            "condition_dropout hides conditions, and this network reads none; give the data's condition, or condition_dropout=0"
        )
    if config.kl_balancing_steps and vae.network.latents.layers == 1:
        raise ValueError(
            f"kl_balancing_steps balances several layers of latents, and {type(vae.network).__name__} has one; use a hierarchical"
            " network, or 0 steps"
        )


def losses(vae: VAE, batch: Batch, config: TrainingConfig, step: int = 0, elbo_of: Callable[..., Elbo] | None = None) -> Losses:
    r"""ELBO and objective of one batch, from one posterior draw.

    .. math:: -\sum_i \sigma_i^{2 \beta} \log p(x_i|z) + w \sum_l \gamma_l \max(\lambda, KL_l)

    with σ to the power 2β detached (Seitzer et al. 2022, β-NLL), w the ``kl_weight`` (Beta-Sigma VAE, arXiv 2409.09361,
    which puts it on an optimal σ), λ the ``free_bits_nats`` (Kingma et al. 2016, arXiv 1606.04934, section 2.4: the
    mean of KL_l over the batch of all processes is compared) and γ the balance over layers while ``step`` is below
    ``kl_balancing_steps``. With β = λ = 0, w = 1 and no balance it is the negative ELBO, ``vae.elbo`` or a compiled
    ``elbo_of``. Under autocast the network alone is in half precision.
    """
    condition = _partly_hidden(batch.condition, config.condition_dropout)
    if not config.weighted:
        elbo = (elbo_of or vae.elbo)(batch.x, mask=batch.mask, condition=condition)
        return Losses(elbo, -elbo.total)
    inference = vae.network.infer(batch.x, None, batch.mask, None, *as_argument(condition))
    with in_full_precision(batch.x.device.type):
        return _weighted(vae, inference, config, step)


def _partly_hidden(condition: Tensor | None, share: float) -> Tensor | None:
    """The conditions, with a share of the examples' hidden at random (Ho and Salimans 2022, arXiv 2207.12598)."""
    if condition is None or not share:
        return condition
    hidden = torch.rand(len(condition), 1, device=condition.device) < share
    return condition.masked_fill(hidden, math.nan)


def _weighted(vae: VAE, inference: Inference, config: TrainingConfig, step: int) -> Losses:
    h, target = inference.scored()
    distribution = vae.likelihood(h, target)
    elbo = Elbo(inference.per_example(distribution.log_prob(target)), inference.kl)
    log_likelihood = elbo.log_likelihood
    if config.beta_nll:
        log_likelihood = inference.per_example(distribution.weighted_log_prob(target, config.beta_nll))
    kl = elbo.kl
    if config.free_bits_nats:
        heard = mean_over_all(kl.flatten(0, -2)) >= config.free_bits_nats
        kl = torch.where(heard, kl, config.free_bits_nats)
    if step < config.kl_balancing_steps:
        kl = kl * balance(elbo.kl, vae.network.latents.sizes)
    return Losses(elbo, config.kl_weight * kl.sum(-1) - log_likelihood)


def balance(kl_nats: Tensor, latents: Sequence[int]) -> Tensor:
    r"""Weights of the layers' KL that let every layer learn to be used, ``(layers,)``, detached.

    .. math:: \gamma_l \propto \overline{KL}_l / d_l, \qquad \sum_l \gamma_l = L

    where :math:`\overline{KL}_l` is the mean over the batch of all processes and :math:`d_l` the layer's number of
    latents. A layer with more KL per latent than others pays more for it; one that is switched off is nearly free (the
    warm-up of NVAE, Vahdat and Kautz 2020, arXiv 2007.03898, appendix A; in its released code :math:`d_l` is the area
    of the layer's map).

    Shapes:
        kl_nats ``(*batch, layers)``; latents: the number of each layer's.

    >>> balance(torch.tensor([[1.0, 8.0], [3.0, 8.0]]), latents=[1, 4])
    tensor([1., 1.])
    """
    density = mean_over_all(kl_nats.flatten(0, -2)) / torch.tensor(latents).to(kl_nats)
    density = density.clamp_min(0) + NO_KL  # without KL anywhere all weigh the same
    return density / density.mean()


class StepLoss(NamedTuple):
    """The bound of each of this process's examples, and the mean objective of all processes' examples, in nats."""

    elbo: Elbo
    loss: Tensor


def step_loss(
    vae: VAE, batch: Batch, config: TrainingConfig, step: int = 0, elbo_of: Callable[..., Elbo] | None = None
) -> StepLoss:
    r"""Loss of a step on this process's share of the global batch, in ``config.accumulate`` micro-batches.

    With :math:`n_i` of all n examples in micro-batch i,

    .. math:: \text{loss} = \sum_i \frac{n_i}{n}\, L_i(\sigma_i), \qquad L_i = \text{mean over the micro-batch's examples}

    An optimal σ is solved for each micro-batch (over all processes), and so are the batch means of free bits and KL
    balancing. Where σ is fixed, learned or predicted, the gradient is that of the whole batch. Where it is optimal, the
    loss lies below the whole batch's, as the mean of :math:`\log \sigma_i` lies below the logarithm of the root mean
    square, and the gradient is that of this mean.

    All micro-batches but the last are differentiated here, which adds to the gradients; the loss returned has the
    gradient of the last one. Gradients are scaled by the number of processes, as data parallelism averages them over
    processes. There are never more micro-batches than each process has examples, which is at least one.

    >>> from sigma_vae import Fixed, Gaussian, mlp
    >>> vae = VAE(mlp((1, 4, 4), 1, latent_dim=2, width=8), Gaussian(1, Fixed(0.5)))
    >>> batch = Batch(torch.rand(6, 1, 4, 4), torch.arange(6))
    >>> elbo, loss = step_loss(vae, batch, TrainingConfig(accumulate=3))
    >>> bool(torch.isclose(loss, -elbo.total.mean()))
    True
    """
    us = processes()
    if us.world_size == 1 and config.accumulate == 1:
        elbo, minimised = losses(vae, batch, config, step, elbo_of)
        return StepLoss(elbo, minimised.mean())
    examples = int(sum_over_all(torch.tensor(len(batch.x))))
    parts = max(1, min(config.accumulate, examples // us.world_size))
    found: list[Elbo] = []
    total = torch.zeros((), dtype=torch.float64, device=batch.x.device)
    for number, part in enumerate(_split(batch, parts), start=1):
        elbo, minimised = losses(vae, part, config, step, elbo_of)
        found.append(elbo)
        total += minimised.detach().sum()
        mine = minimised.sum() * (us.world_size / examples)
        if number < parts:
            with torch.autocast(mine.device.type, enabled=False):
                mine.backward()  # type: ignore[no-untyped-call]
    mean = (sum_over_all(total) / examples).to(mine.dtype)
    whole = Elbo(*(torch.cat([terms.detach() for terms in column]) for column in zip(*found, strict=True)))
    return StepLoss(whole, mine + (mean - mine.detach()))


def _split(batch: Batch, parts: int) -> Iterator[Batch]:
    columns = ([None] * parts if each is None else each.tensor_split(parts) for each in batch)
    return (Batch(*part) for part in zip(*columns, strict=True))


# -- a loss that is not finite -----------------------------------------------------------------------------------------

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
