"""The step: minimise the negative ELBO (or what the config weights of it), and say what it is made of."""

import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor

from sigma_vae.config import TrainingConfig
from sigma_vae.likelihoods import Shared
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.training.accumulation import step_loss
from sigma_vae.training.objective import check_weights, is_weighted
from sigma_vae.training.processes import processes
from sigma_vae.training.sharding import average_gradients, clip, gradient_norm, is_sharded, shard
from sigma_vae.training.shares import mean_over_all, sum_over_all
from sigma_vae.types import Batch, Elbo
from sigma_vae.vae import VAE, keyed_noise

__all__ = ["NonFiniteLossError", "TrainingModule", "validated_total"]

REMEDY = "Checkpoints written before are intact. Lower the learning rate, or clip gradients (gradient_clip_norm)"


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; what went before is in the last checkpoint."""


class TrainingModule(pl.LightningModule):
    """A VAE and its optimiser, as pytorch-lightning drives them.

    Args:
        vae: the model.
        config: how to train it.
        log_volume_nats: what is logged is smaller by it than the model's log-density: the Jacobian of a standardisation.
    """

    def __init__(self, vae: VAE, config: TrainingConfig, log_volume_nats: float = 0.0) -> None:
        super().__init__()
        check_weights(vae, config)
        self.vae = vae
        self.config = config
        self.log_volume_nats = log_volume_nats
        self.skipped_steps = 0
        self.just_skipped = False
        self._row: dict[str, Tensor] | None = None

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Mean negative ELBO (or weighted objective) of the batch, in nats."""
        if self.config.accumulate > 1:  # not before the last micro-batch's backward pass, where the engine would do it
            self.zero_grad()
        elbo, loss = step_loss(self.vae, batch, self.config, self.global_step)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(self._diagnosis(batch, elbo))
        if self.global_step % self.config.log_every == 0:
            self._log_step(loss.detach(), elbo)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip a step whose gradient, before clipping, is too long; write the row of metrics, which tells how long it was."""
        limit = self.config.skip_gradient_norm
        self.just_skipped = False
        if limit is None and self._row is None:
            return
        norm = gradient_norm(self.parameters())
        if limit is not None and not norm < limit:  # not "norm >= limit", which NaN passes
            self.just_skipped = True
            self.skipped_steps += 1
            optimizer.zero_grad()  # Adam leaves alone what has no gradient: its value, its moments, its decay
        if self._row is not None:
            self._write(self._row | {"train/gradient_norm": norm})

    def configure_model(self) -> None:
        """Runs where the processes know each other."""
        if is_sharded(self.config) and not isinstance(next(self.vae.network.parameters()), DTensor):
            assert self.device_mesh is not None
            shard(self.vae, self.device_mesh["data_parallel"])

    def on_after_backward(self) -> None:
        """What is shared out has its gradients averaged by torch."""
        if is_sharded(self.config):
            average_gradients(self.vae.likelihood.parameters())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """The engine's way cannot add up what is shared out and what is not."""
        if is_sharded(self.config) and gradient_clip_val is not None:
            clip(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Runs between the last forward and backward pass of a step, where earlier micro-batches have left gradients."""
        if self.config.accumulate == 1:
            optimizer.zero_grad()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the count of skipped steps."""
        checkpoint["skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back; checkpoints of versions that skipped nothing have none."""
        self.skipped_steps = checkpoint.get("skipped_steps", 0)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Bounds on held-out data, with noise that belongs to the example: no number depends on the batch size."""
        inference = self.vae.network.infer(batch.x, mask=batch.mask, noise=keyed_noise(batch.positions))
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
            raise NonFiniteLossError(self._diagnosis(batch, elbo))
        # Not the engine's mean over processes, which takes shares of 6 and 7 examples for 12.
        examples = int(sum_over_all(torch.tensor(len(batch.x))))
        for name, mean in zip(metrics, means, strict=True):
            shown = name in (validated_total(self.vae), "validation/bits_per_dim")
            self.log(name, mean, batch_size=examples, on_epoch=True, prog_bar=shown)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, or AdamW where weights decay; what a likelihood learns (a shared σ, a ν) has its own rate and no decay."""
        rate = self.config.learning_rate
        scales = {id(p): p for p in self.vae.likelihood.parameters()}
        groups = [
            {"params": [p for p in self.vae.parameters() if id(p) not in scales], "weight_decay": self.config.weight_decay},
            {"params": list(scales.values()), "lr": rate * self.config.scale_learning_rate_factor, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate_factor(self, step: int) -> float:
        config = self.config
        warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.schedule == "constant":
            return warm
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        return warm * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))

    def _log_step(self, loss: Tensor, elbo: Elbo) -> None:
        metrics = {
            "train/loss_nats": self.log_volume_nats - mean_over_all(elbo.total.flatten()),
            "train/rate_nats": mean_over_all(elbo.rate.flatten()),
            "train/distortion_nats": mean_over_all(elbo.distortion.flatten()) + self.log_volume_nats,
        }
        if is_weighted(self.config):
            metrics["train/weighted_objective_nats"] = loss
        if (sigma := current_sigma(self.vae)) is not None:
            metrics["train/sigma"] = sigma
        self._row = metrics
        self.log("loss", loss, prog_bar=True, logger=False)

    def _write(self, row: dict[str, Tensor]) -> None:
        values = {name: float(value) for name, value in row.items()}
        if self.config.skip_gradient_norm is not None:
            values["train/skipped_steps"] = self.skipped_steps
        for logger in self.trainer.loggers:  # not self.log_dict, which repeats old values at steps that log nothing
            logger.log_metrics(values, self.global_step)
        self._row = None

    def _diagnosis(self, batch: Batch, elbo: Elbo) -> str:
        terms = {"log-likelihood": elbo.log_likelihood, "KL": elbo.rate}
        broken = [name for name, term in terms.items() if not torch.isfinite(term).all()]
        weights = [name for name, p in self.vae.named_parameters() if not torch.isfinite(p).all()]
        elsewhere = "their mean" if processes().world_size == 1 else "another process's"
        sigma = current_sigma(self.vae)
        return (
            f"the loss is not finite at step {self.global_step}: broken term: {' and '.join(broken) or elsewhere};"
            f" σ: {'none' if sigma is None else f'{float(sigma):.4g}'};"
            f" batch in [{float(batch.x.min()):.4g}, {float(batch.x.max()):.4g}];"
            f" weights that are not finite: {', '.join(weights[:3]) or 'none'}."
            f" {REMEDY}"
        )


def validated_total(vae: VAE) -> str:
    """The name under which a validation logs what is maximised: a bound, or where there is no likelihood (grey Bernoulli) an objective."""
    return "validation/elbo_nats" if vae.likelihood.normalised else "validation/objective_nats"


def current_sigma(vae: VAE) -> Tensor | None:
    """The σ that training uses (the geometric mean of several; the running one of an optimal scale), where there is one."""
    likelihood = vae.likelihood
    if not isinstance(likelihood, LocationScale) or likelihood.scale.predicted:
        return None
    if isinstance(likelihood.scale, Shared):
        return likelihood.scale.log_scale.detach().exp()
    own = likelihood.scale(torch.zeros((), device=likelihood.scale.density_log_scale.device), likelihood.observes, None)
    sigma: Tensor = own.mean().exp()
    return sigma
