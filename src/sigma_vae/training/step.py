"""A training step (forward, backward, gradient handling, update, averaged weights) and a validation pass."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from operator import index
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sigma_vae.config import TrainingConfig
from sigma_vae.data import Batches, Splits
from sigma_vae.optimisers import AdamW
from sigma_vae.training.distributed import (
    average_gradients,
    clip,
    fabric_for,
    gradient_norm,
    is_sharded,
    load_optimizer_state,
    load_whole_state,
    mean_over_all,
    processes,
    sum_over_all,
    whole_optimizer_state,
    whole_state,
)
from sigma_vae.training.hardware import Choices, compiled
from sigma_vae.training.objective import StepLoss, Suspect, current_sigma, diagnosis, step_loss, validated_total
from sigma_vae.types import Batch, Elbo, Flat, Noise, as_argument
from sigma_vae.vae import VAE, keyed_noise, sigma_by_place

MOST_SKIPPED_IN_A_ROW = 100
"""A rare gradient that is skipped saves a training; where so many are, none will ever be small enough again."""


class _Unchecked(NamedTuple):
    """A step whose loss has not been looked at."""

    suspect: Suspect
    elbo: Elbo
    loss: Tensor


def endless_skipping(steps: str, config: TrainingConfig) -> ValueError:
    """The error where no step is taken any more."""
    return ValueError(
        f"{steps} were all skipped: each gradient norm reached skip_gradient_norm={config.skip_gradient_norm:g} or was not finite."
        " Set it well above the usual norm (train/gradient_norm in metrics.csv), leave it out, or lower the learning rate."
        " Checkpoints written before are intact"
    )


def optimizer_for(vae: VAE, config: TrainingConfig, *, fused: bool = False) -> torch.optim.AdamW:
    """AdamW; the likelihood's own parameters (a shared σ, a ν) have their own learning rate and no decay."""
    rate = config.learning_rate
    scales = {id(p): p for p in vae.likelihood.parameters()}
    weights = [p for p in vae.parameters() if id(p) not in scales]
    groups: list[dict[str, Any]] = [
        {"params": weights, "lr": rate, "weight_decay": config.weight_decay},
        {"params": list(scales.values()), "lr": rate * config.scale_learning_rate_factor, "weight_decay": 0.0},
    ]
    return AdamW([group | {"full_lr": group["lr"]} for group in groups if group["params"]], lr=rate, fused=fused)


@final
class Stepper:
    """Takes optimiser steps, each down the gradient of a batch's mean negative ELBO (or weighted objective), in nats.

    Args:
        vae: model, on its device.
        config: training settings.
        choices: hardware settings.
        total_steps: length of the training; the cosine schedule ends there.
        log_volume_nats: subtracted from the model's log-density in logged bounds (the Jacobian of a standardisation).
    """

    def __init__(self, vae: VAE, config: TrainingConfig, choices: Choices, total_steps: int, log_volume_nats: float) -> None:
        self.vae = vae
        self.config = config
        self.choices = choices
        self.total_steps = total_steps
        self.log_volume_nats = log_volume_nats
        self.average = None if config.decay is None else Averaged(vae, config.decay)
        module = _Loss(vae, config, self._compiled_elbo() if choices.compile else None)
        self._loss: Callable[[Batch, int], StepLoss] = module.forward
        if processes().world_size > 1:
            wrapped = fabric_for(vae, config, vae.device).setup_module(module)  # which shards the module itself
            self._loss = module.forward if is_sharded(config) else wrapped
        self.parameters = list(vae.parameters())
        self.optimizer = optimizer_for(vae, config, fused=choices.fused_optimiser)
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.suspect: Suspect | None = None
        """The newest step."""
        self._unchecked: list[_Unchecked] = []
        self._broken: Tensor | None = None
        # Reading a loss waits for the GPU: `check` reads several, and until then the device itself protects the weights.
        self._checks_later = choices.device == "cuda" and choices.fused_optimiser and not is_sharded(config)

    def _compiled_elbo(self) -> Callable[..., Elbo]:
        needed = self.config.hardware.compile == "yes"
        return compiled(self.vae.elbo, needed=needed, ragged=self.vae.network.reads_clips)

    def step(self, batch: Batch, number: int) -> dict[str, float] | None:
        """Take step ``number`` (from 0) on this process's share of the batch; return a row of metrics where one is due.

        Raises:
            NonFiniteLossError: the loss is not finite; on a GPU :meth:`check` raises it later.
            ValueError: so many steps in a row were skipped that this one will not be the last.
        """
        self.suspect = Suspect(number, batch, _rng(batch.x.device))
        self._forget_gradient()
        with self.choices.autocast():
            elbo, loss = self._loss(batch, number)
        self._unchecked.append(_Unchecked(self.suspect, elbo, loss.detach()))
        if self._checks_later:
            self._hold_where_broken(loss.detach())
        else:
            self.check()
        self._backward(loss)
        row = self._row(elbo, loss.detach()) if number % self.config.log_every == 0 else {}
        skipped = self._handle_gradient(row)
        rate = self._rate_factor(number)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * rate
        self.optimizer.step()
        if self.average is not None and not skipped:
            self.average.update_parameters(self.vae)
        if skipped and self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise endless_skipping(f"the last {self.skipped_in_a_row} steps, up to step {number},", self.config)
        return None if not row else {name: value if isinstance(value, int) else float(value) for name, value in row.items()}

    def check(self) -> None:
        """Raise the error of the first step whose loss is not finite, of those since the last call."""
        steps, self._unchecked, self._broken = self._unchecked, [], None
        losses = torch.stack([step.loss for step in steps]).tolist() if steps else []  # one look at the device
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                raise diagnosis(self.vae, step.suspect, step.elbo)

    def weights(self) -> dict[str, Tensor]:
        """The weights to evaluate and export, whole (the averages, if any); every process must call this."""
        return whole_state(self.vae) if self.average is None else self.average.module.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser and averages, whole; every process must call this."""
        average = self.average
        return {
            "model": self.weights(),
            "current": None if average is None else self.vae.state_dict(),
            "averaged_steps": None if average is None else int(average.n_averaged),
            "optimizer": whole_optimizer_state(self.optimizer),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        load_whole_state(self.vae, state["model"] if state["current"] is None else state["current"])
        if self.average is not None:
            self.average.module.load_state_dict(state["model"])
            self.average.n_averaged.fill_(state["averaged_steps"] or 0)
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.skipped_steps = index(state["skipped_steps"])
        self.skipped_in_a_row = index(state.get("skipped_in_a_row", 0))

    def _hold_where_broken(self, loss: Tensor) -> None:
        """From a loss that is not finite until :meth:`check`, leave weights and moments unchanged."""
        broken = 1.0 - loss.isfinite().float()
        self._broken = broken if self._broken is None else torch.maximum(self._broken, broken)
        self.optimizer.found_inf = self._broken  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells a fused optimiser

    def _backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        if is_sharded(self.config):  # sharded weights have their gradients averaged by torch
            average_gradients(self.vae.likelihood.parameters())

    def _forget_gradient(self) -> None:
        for parameter in self.parameters:  # the optimiser's own way takes a fiftieth of a small network's step
            parameter.grad = None

    def _handle_gradient(self, row: dict[str, Tensor | float]) -> bool:
        """Clip the gradient, or skip the step; log its norm with other metrics or a skip. Return whether it was skipped."""
        limit, longest = self.config.skip_gradient_norm, self.config.gradient_clip_norm
        if limit is None and longest is None and not row:
            return False
        norm = gradient_norm(self.parameters)
        skipped = limit is not None and not norm < limit  # not "norm >= limit", which NaN passes
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self.skipped_steps += 1
            self._forget_gradient()  # Adam leaves alone what has no gradient: its value, its moments, its decay
        elif longest is not None:
            clip(self.parameters, longest, norm)
        if row or skipped:
            row["train/gradient_norm"] = norm
            if limit is not None:
                row["train/skipped_steps"] = self.skipped_steps
        return skipped

    def _rate_factor(self, step: int) -> float:
        config = self.config
        warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.schedule == "constant":
            return warm
        return warm * 0.5 * (1 + math.cos(math.pi * min(step / self.total_steps, 1.0)))

    def _row(self, elbo: Elbo, loss: Tensor) -> dict[str, Tensor | float]:
        metrics: dict[str, Tensor | float] = {
            "train/loss_nats": self.log_volume_nats - mean_over_all(elbo.total.flatten()),
            "train/rate_nats": mean_over_all(elbo.rate.flatten()),
            "train/distortion_nats": mean_over_all(elbo.distortion.flatten()) + self.log_volume_nats,
        }
        if self.config.weighted:
            metrics["train/weighted_objective_nats"] = loss
        if (sigma := current_sigma(self.vae)) is not None:
            metrics["train/sigma"] = sigma
        return metrics


class _Loss(nn.Module):
    """The loss of a step as a module, which DistributedDataParallel can wrap."""

    def __init__(self, vae: VAE, config: TrainingConfig, elbo_of: Callable[..., Elbo] | None) -> None:
        super().__init__()
        self.vae = vae
        self.config = config
        self.elbo_of = elbo_of

    def forward(self, batch: Batch, number: int) -> StepLoss:
        return step_loss(self.vae, batch, self.config, number, self.elbo_of)


_Place = tuple[dict[str, Tensor | None], str]


def _places(module: nn.Module) -> list[_Place]:
    """Where a module has its parameters and buffers, each once, in order."""
    modules = list(module.modules())
    kept: list[Any] = [*(each._parameters for each in modules), *(each._buffers for each in modules)]
    return list({id(each): (tensors, name) for tensors in kept for name, each in tensors.items() if each is not None}.values())


def _at(place: _Place) -> Tensor:
    tensors, name = place
    tensor = tensors[name]
    assert tensor is not None
    return tensor


@final
class Averaged(AveragedModel):
    """An exponential moving average of weights and buffers; ``decay`` is the weight of the past.

    At first it is smaller: after t steps, at most (1 + t) / (10 + t), so that the first weights are soon forgotten.
    """

    def __init__(self, vae: VAE, decay: float) -> None:
        super().__init__(vae, use_buffers=True)
        self.decay = decay
        # Found once: looking for all tensors in all modules takes as long as a small network's forward pass.
        self._places: dict[torch.dtype, list[tuple[_Place, _Place]]] = {}
        for ours, theirs in zip(_places(self.module), _places(vae), strict=True):
            self._places.setdefault(_at(ours).dtype, []).append((ours, theirs))

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's tensors into the averages, the first time as they are; those of whole numbers always so."""
        steps = int(self.n_averaged)
        weight = 1 - min(self.decay, (1 + steps) / (10 + steps)) if steps else 1.0
        for dtype, places in self._places.items():
            averages, current = ([_at(place) for place in column] for column in zip(*places, strict=True))
            if steps and dtype.is_floating_point:
                torch._foreach_lerp_(averages, current, weight)
            else:
                torch._foreach_copy_(averages, current)
        self.n_averaged += 1

    @contextmanager
    def in_place_of(self, vae: VAE) -> Iterator[None]:
        """Let the model have the averages for as long as this lasts; changes to the model are changes to them."""
        self._swap(vae)
        try:
            yield
        finally:
            self._swap(vae)

    @torch.no_grad()
    def _swap(self, vae: VAE) -> None:
        averages = chain(self.module.parameters(), self.module.buffers())
        for average, current in zip(averages, chain(vae.parameters(), vae.buffers()), strict=True):
            kept = average.clone()
            average.copy_(current)
            current.copy_(kept)


@final
class Validation:
    """Bounds on held-out data: ``batches`` are this process's share of them, in a fixed order.

    The noise belongs to the example, so no number depends on the batch size. ``log_volume_nats`` as in :class:`Stepper`.
    """

    def __init__(self, vae: VAE, batches: Batches, log_volume_nats: float) -> None:
        self.vae = vae
        self.batches = batches
        self.log_volume_nats = log_volume_nats
        self._noise: dict[int, _RememberedNoise] = {}

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, float]:
        """Means over all examples, in eval mode, after ``step`` steps.

        Raises:
            NonFiniteLossError: the bound is not finite.
        """
        totals: dict[str, Tensor] = {}
        examples = 0
        for number, batch in enumerate(self.batches):
            size = int(sum_over_all(torch.tensor(len(batch.x))))
            for name, mean in self._means(batch, number, step).items():
                totals[name] = totals.get(name, torch.zeros(())) + mean * size
            examples += size
        return {name: float(total / examples) for name, total in totals.items()}

    def _means(self, batch: Batch, number: int, step: int) -> dict[str, Tensor]:
        noise = self._noise_of(batch, number)
        inference = self.vae.network.infer(batch.x, None, batch.mask, noise, *as_argument(batch.condition))
        likelihood, (h, target) = self.vae.likelihood, inference.scored()
        elbo = Elbo(inference.per_example(likelihood(h).log_prob(target)), inference.kl)
        metrics = {
            validated_total(self.vae): elbo.total - self.log_volume_nats,
            "validation/rate_nats": elbo.rate,
            "validation/distortion_nats": elbo.distortion + self.log_volume_nats,
        }
        if likelihood.has_mass:
            mass = inference.per_example(likelihood.log_mass(h, target))
            metrics["validation/bits_per_dim"] = (elbo.rate - mass) / (inference.dims() * math.log(2))
        means = mean_over_all(torch.stack(list(metrics.values()), 1))
        if not torch.isfinite(means[0]):
            empty = torch.zeros(0, dtype=torch.uint8)
            raise diagnosis(self.vae, Suspect(step, batch, empty, "validation"), elbo)
        return dict(zip(metrics, means.cpu(), strict=True))

    def _noise_of(self, batch: Batch, number: int) -> Noise:
        """Remember the noise of flat latents: it is small, and drawing it takes as long as a small network's pass."""
        if not isinstance(self.vae.network.latents, Flat):
            return keyed_noise(batch.positions)
        if number not in self._noise:
            self._noise[number] = _RememberedNoise(keyed_noise(batch.positions))
        return self._noise[number].replay()


class _RememberedNoise:
    """Replays the numbers that it drew before, call by call."""

    def __init__(self, fresh: Noise) -> None:
        self.fresh = fresh
        self.drawn: list[Tensor] = []

    def replay(self) -> Noise:
        calls = count()

        def noise(shape: torch.Size) -> Tensor:
            call = next(calls)
            if call == len(self.drawn):
                self.drawn.append(self.fresh(shape))
            return self.drawn[call]

        return noise


def _rng(device: torch.device) -> Tensor:
    """The state of the generator that draws the noise."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


# -- random crops and mirror images of training examples ---------------------------------------------------------------


def augmented(batch: Batch, config: TrainingConfig, seed: int, step: int) -> Batch:
    """Crop and mirror each example at random, as the config says; without either the batch is returned as it is.

    The choices depend on the seed, the step, and the example's position alone, so that a resumed run, or one on another
    number of processes, makes the same ones.

    >>> x = torch.arange(8.0).reshape(1, 1, 2, 4)
    >>> batch = Batch(x, torch.tensor([5]))
    >>> augmented(batch, TrainingConfig(random_crop=2), seed=0, step=3).x.shape
    torch.Size([1, 1, 2, 2])
    >>> augmented(batch, TrainingConfig(), seed=0, step=3) is batch
    True
    """
    if config.random_crop is None and not config.flip:
        return batch
    examples = [
        _augmented(x, config, np.random.default_rng((seed, step, position)))
        for x, position in zip(batch.x, batch.positions.tolist(), strict=True)
    ]
    return batch._replace(x=torch.stack(examples))


def _augmented(x: Tensor, config: TrainingConfig, random: np.random.Generator) -> Tensor:
    if config.random_crop is not None:
        for axis, size in enumerate(x.shape[1:], start=1):
            x = x.narrow(axis, int(random.integers(size - config.random_crop + 1)), config.random_crop)
    return x.flip(-1) if config.flip and random.random() < 0.5 else x


def check_augmentation(vae: VAE, data: Splits, config: TrainingConfig) -> None:
    """Refuse crops and mirror images that these data or this model cannot have.

    Raises:
        ValueError: the data are no images (for mirror images) or have clips, the crop is larger than they are, or the
            network reads one size alone, or another one, or σ has a value for each place.
    """
    if config.flip and (len(data.shape) != 3 or data.clips):
        raise ValueError(f"flip mirrors images (C, H, W), and {data.name} has examples of shape {data.shape}; leave it out")
    crop = config.random_crop
    if crop is None:
        return
    if data.clips or len(data.shape) == 1 or crop > min(data.shape[1:]):
        raise ValueError(
            f"random_crop={crop} cuts squares from images, or pieces from series, of at least that size; {data.name} has"
            f" {'clips of ' if data.clips else ''}examples of shape {data.shape}; take a smaller one, or leave it out"
        )
    if vae.network.latents.layers != 1 or len(vae.network.latents.shapes[0]) == 1:
        raise ValueError(
            f"random_crop changes the size of examples, and {type(vae.network).__name__} reads one size; take spatial or autoencoder-kl"
        )
    if sigma_by_place(vae.likelihood, len(data.shape) - 1):
        raise ValueError(f"random_crop moves places about, and {vae.likelihood} has a σ for each; take another scale")
    with torch.no_grad():
        vae.network.posterior(next(vae.parameters()).new_zeros(1, data.shape[0], *[crop] * (len(data.shape) - 1)))
