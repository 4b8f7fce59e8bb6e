"""The step: minimise the negative ELBO (or what the config weights of it), and say what it is made of."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor

from sigma_vae.config import TrainingConfig
from sigma_vae.networks import FlatNetwork
from sigma_vae.training.calls import Calls, recount
from sigma_vae.training.distributed import (
    average_gradients,
    clip,
    gradient_norm,
    is_sharded,
    mean_over_all,
    processes,
    shard,
    sum_over_all,
)
from sigma_vae.training.hardware import Choices
from sigma_vae.training.objective import check_weights, current_sigma, is_weighted, step_loss, validated_total
from sigma_vae.types import Batch, Elbo, Noise
from sigma_vae.vae import VAE, keyed_noise

__all__ = ["NonFiniteLossError", "TrainingModule"]

REMEDY = "Checkpoints written before are intact. Lower the learning rate, or clip gradients (gradient_clip_norm)"


class _Step(NamedTuple):
    """What is looked at when steps are checked; ``rng`` is the state of torch's generator when it began."""

    number: int
    batch: Batch
    rng: Tensor
    elbo: Elbo
    loss: Tensor


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; what went before is in the last checkpoint."""


class TrainingModule(pl.LightningModule):
    """A VAE and its optimiser, as pytorch-lightning drives them.

    Optimisation is by hand: a call of the engine makes several steps, as many as :class:`Calls` gives it batches.

    Args:
        vae: the model.
        config: how to train it.
        choices: what the steps make of the hardware.
        calls: over the training split.
        log_volume_nats: what is logged is smaller by it than the model's log-density: the Jacobian of a standardisation.
    """

    def __init__(self, vae: VAE, config: TrainingConfig, choices: Choices, calls: Calls, log_volume_nats: float = 0.0) -> None:
        super().__init__()
        check_weights(vae, config)
        self.automatic_optimization = False
        self.vae = vae
        self.config = config
        self.choices = choices
        self.log_volume_nats = log_volume_nats
        self.calls = calls
        self.skipped_steps = 0
        self.just_skipped = False
        self._elbo_of = torch.compile(vae.elbo) if choices.compile else None
        self.at_hand: tuple[Batch, Tensor] | None = None
        self.failed: int | None = None
        """The step that was found to have failed; ``at_hand`` are batch and noise (the generator's state) of it, or of the newest."""
        self.fails_here = False
        """Whether, where a loss is not finite, it is for a term of this process."""
        self._unchecked: list[_Step] = []
        self._broken: Tensor | None = None
        self._remembered: dict[int, Tensor] = {}

    def training_step(self, batches: Iterator[Batch], call: int) -> None:
        """Some steps, each down the gradient of a batch's mean negative ELBO (or weighted objective), in nats."""
        self._broken = None
        for batch in batches:
            self._step(batch)
            if self.global_step == self.config.max_steps:
                break
        self._check()

    def _step(self, batch: Batch) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        step, rng = self.global_step, _rng(batch.x.device)
        self.at_hand = batch, rng
        optimizer.zero_grad()  # not between the forward and the backward pass, when earlier micro-batches have left gradients
        with self.choices.autocast():
            elbo, loss = step_loss(self.vae, batch, self.config, step, self._elbo_of)
        self._unchecked.append(_Step(step, batch, rng, elbo, loss.detach()))
        if self._looks_later(loss):
            self._hold_where_broken(optimizer, loss.detach())
        else:
            self._check()
        self._backward(loss)
        row = self._row(loss.detach(), elbo) if step % self.config.log_every == 0 else None
        self._handle_gradient(optimizer, row)
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * self._rate_factor(step)
        if row is not None:
            self._write(row, step)
        self._descend(optimizer)

    def _looks_later(self, loss: Tensor) -> bool:
        """Whether losses are looked at when the call ends: on a GPU a look waits for it."""
        return loss.is_cuda and self.choices.fused_optimiser and not is_sharded(self.config)

    def _hold_where_broken(self, optimizer: LightningOptimizer, loss: Tensor) -> None:
        """From a loss that is not finite on, the call's steps leave weights and moments as they are: the device itself decides."""
        broken = 1.0 - loss.isfinite().float()
        self._broken = broken if self._broken is None else torch.maximum(self._broken, broken)
        optimizer.optimizer.found_inf = self._broken  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells a fused optimiser

    def _backward(self, loss: Tensor) -> None:
        if self.trainer.world_size > 1:
            self.manual_backward(loss)  # which lets the processes agree on the gradient
        else:
            loss.backward()  # type: ignore[no-untyped-call]

    def _descend(self, optimizer: LightningOptimizer) -> None:
        if self.trainer.world_size > 1:
            optimizer.step()
            return
        optimizer._on_before_step()  # the engine counts steps by these two; what else it does takes longer than the update
        optimizer.optimizer.step()
        optimizer._on_after_step()

    def _handle_gradient(self, optimizer: LightningOptimizer, row: dict[str, Tensor] | None) -> None:
        """Skip the step where the gradient is too long, clip where it is long; say in the row of metrics how long it was."""
        limit, longest = self.config.skip_gradient_norm, self.config.gradient_clip_norm
        self.just_skipped = False
        if limit is None and longest is None and row is None:
            return
        norm = gradient_norm(self.parameters())
        if limit is not None and not norm < limit:  # not "norm >= limit", which NaN passes
            self.just_skipped = True
            self.skipped_steps += 1
            optimizer.zero_grad()  # Adam leaves alone what has no gradient: its value, its moments, its decay
        elif longest is not None:
            clip(self.parameters(), longest, norm)
        if row is not None:
            row["train/gradient_norm"] = norm

    def _check(self) -> None:
        """Raise what is to be said of the first step whose loss is not finite."""
        steps, self._unchecked = self._unchecked, []
        if steps and not torch.stack([step.loss for step in steps]).isfinite().all():
            first = next(step for step in steps if not step.loss.isfinite())
            self.at_hand, self.failed = (first.batch, first.rng), first.number
            raise NonFiniteLossError(self._diagnosis(first.number, first.batch, first.elbo))

    def configure_model(self) -> None:
        """Runs where the processes know each other."""
        if is_sharded(self.config) and not isinstance(next(self.vae.network.parameters()), DTensor):
            assert self.device_mesh is not None
            shard(self.vae, self.device_mesh["data_parallel"])

    def on_after_backward(self) -> None:
        """What is shared out has its gradients averaged by torch."""
        if is_sharded(self.config):
            average_gradients(self.vae.likelihood.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the count of skipped steps."""
        checkpoint["skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back, and count calls as they are made now.

        Raises:
            ValueError: the checkpoint is of a version that set the learning rate otherwise.
        """
        if any("full_lr" not in group for state in checkpoint["optimizer_states"] for group in state["param_groups"]):
            raise ValueError(
                "the checkpoint is of an earlier version, which alone can go on from it; train anew into another folder"
            )
        self.skipped_steps = checkpoint["skipped_steps"]
        recount(checkpoint, self.calls.steps, len(self.calls.batches))

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Bounds on held-out data, with noise that belongs to the example: no number depends on the batch size."""
        inference = self.vae.network.infer(batch.x, mask=batch.mask, noise=self._noise(batch, batch_index))
        likelihood, (h, target) = self.vae.likelihood, inference.scored()
        elbo = Elbo(inference.per_example(likelihood(h).log_prob(target)), inference.kl)
        metrics = {
            validated_total(self.vae): elbo.total - self.log_volume_nats,
            "validation/rate_nats": elbo.rate,
            "validation/distortion_nats": elbo.distortion + self.log_volume_nats,
        }
        if likelihood.levels is not None and likelihood.normalised:
            mass = inference.per_example(likelihood.log_mass(h, target))
            metrics["validation/bits_per_dim"] = (elbo.rate - mass) / (inference.dims() * math.log(2))
        means = mean_over_all(torch.stack(list(metrics.values()), 1))
        if not torch.isfinite(means[0]):
            raise NonFiniteLossError(self._diagnosis(self.global_step, batch, elbo))
        # Not the engine's mean over processes, which takes shares of 6 and 7 examples for 12.
        examples = int(sum_over_all(torch.tensor(len(batch.x))))
        for name, mean in zip(metrics, means, strict=True):
            shown = name in (validated_total(self.vae), "validation/bits_per_dim")
            self.log(name, mean, batch_size=examples, on_epoch=True, prog_bar=shown, logger=False)  # ValidationRow writes it

    def _noise(self, batch: Batch, batch_index: int) -> Noise:
        """Keyed by the example; where there is little of it, remembered: drawing it takes as long as a small network's pass."""
        network = self.vae.network
        if not isinstance(network, FlatNetwork):
            return keyed_noise(batch.positions)
        if batch_index not in self._remembered:
            shape = torch.Size([len(batch.x), network.latent_dim])
            self._remembered[batch_index] = keyed_noise(batch.positions)(shape)
        return lambda _: self._remembered[batch_index]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, or AdamW where weights decay; what a likelihood learns (a shared σ, a ν) has its own rate and no decay."""
        rate = self.config.learning_rate
        scales = {id(p): p for p in self.vae.likelihood.parameters()}
        groups = [
            {
                "params": [p for p in self.vae.parameters() if id(p) not in scales],
                "lr": rate,
                "weight_decay": self.config.weight_decay,
            },
            {"params": list(scales.values()), "lr": rate * self.config.scale_learning_rate_factor, "weight_decay": 0.0},
        ]
        groups = [group | {"full_lr": group["lr"]} for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=rate, fused=self.choices.fused_optimiser)

    @property
    def newest_step(self) -> int:
        """The step that was found to have failed, else the one at hand."""
        return self.global_step if self.failed is None else self.failed

    @property
    def total_steps(self) -> int:
        """Of the whole training, unless it is stopped before."""
        whole = self.config.epochs * len(self.calls.batches)
        return whole if self.config.max_steps is None else min(self.config.max_steps, whole)

    def _rate_factor(self, step: int) -> float:
        config = self.config
        warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.schedule == "constant":
            return warm
        return warm * 0.5 * (1 + math.cos(math.pi * min(step / self.total_steps, 1.0)))

    def _row(self, loss: Tensor, elbo: Elbo) -> dict[str, Tensor]:
        metrics = {
            "train/loss_nats": self.log_volume_nats - mean_over_all(elbo.total.flatten()),
            "train/rate_nats": mean_over_all(elbo.rate.flatten()),
            "train/distortion_nats": mean_over_all(elbo.distortion.flatten()) + self.log_volume_nats,
        }
        if is_weighted(self.config):
            metrics["train/weighted_objective_nats"] = loss
        if (sigma := current_sigma(self.vae)) is not None:
            metrics["train/sigma"] = sigma
        self.log("loss", loss, prog_bar=True, logger=False)
        return metrics

    def _write(self, row: dict[str, Tensor], step: int) -> None:
        values = {name: float(value) for name, value in row.items()}
        if self.config.skip_gradient_norm is not None:
            values["train/skipped_steps"] = self.skipped_steps
        for logger in self.trainer.loggers:  # not self.log_dict, which repeats old values at steps that log nothing
            logger.log_metrics(values, step)

    def _diagnosis(self, step: int, batch: Batch, elbo: Elbo) -> str:
        terms = {"log-likelihood": elbo.log_likelihood, "KL": elbo.rate}
        broken = [name for name, term in terms.items() if not torch.isfinite(term).all()]
        self.fails_here = bool(broken)
        weights = [name for name, p in self.vae.named_parameters() if not torch.isfinite(p).all()]
        elsewhere = "their mean" if processes().world_size == 1 else "another process's"
        sigma = current_sigma(self.vae)
        return (
            f"the loss is not finite at step {step}: broken term: {' and '.join(broken) or elsewhere};"
            f" σ: {'none' if sigma is None else f'{float(sigma):.4g}'};"
            f" batch in [{float(batch.x.min()):.4g}, {float(batch.x.max()):.4g}];"
            f" weights that are not finite: {', '.join(weights[:3]) or 'none'}."
            f" {REMEDY}"
        )


def _rng(device: torch.device) -> Tensor:
    """The state of the generator that draws the noise."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
