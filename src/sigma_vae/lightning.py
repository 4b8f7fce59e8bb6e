"""A VAE as a LightningModule, for a Trainer of your own; needs pytorch-lightning (extra ``lightning``)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sigma_vae.config import TrainingConfig
from sigma_vae.registry import needed_by
from sigma_vae.types import Batch
from sigma_vae.vae import VAE, keyed_noise

with needed_by("sigma_vae.lightning"):
    import pytorch_lightning as pl

    from sigma_vae.training.objective import current_sigma, step_loss, validated_total
    from sigma_vae.training.step import optimizer_for

__all__ = ["VAEModule"]


class VAEModule(pl.LightningModule):
    """Minimises ``-vae.elbo(x).total.mean()`` (or the objective that ``config`` weights) by automatic optimisation.

    Under DDP the loss is the mean over the examples of all processes, and an optimal σ is solved for all of them.
    Everything else is the trainer's: epochs, precision, checkpoints, accumulation. After training, call
    ``module.vae.calibrate(loader)`` once.

    Args:
        vae: the model.
        config: learning rates, weight decay and weights of the objective are read; the trainer decides about the rest.

    Shapes:
        a batch is x ``(n, C, *space)``, or a sequence that begins with x, or a :class:`Batch`.

    >>> from sigma_vae import VAE, Gaussian, mlp
    >>> module = VAEModule(VAE(mlp((1, 4, 4), 1, latent_dim=2, width=8), Gaussian(channels=1)))
    >>> trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False)  # doctest: +SKIP
    >>> trainer.fit(module, torch.utils.data.DataLoader(torch.rand(64, 1, 4, 4), batch_size=16))  # doctest: +SKIP
    """

    def __init__(self, vae: VAE, config: TrainingConfig = TrainingConfig()) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.vae = vae
        self.config = replace(config, accumulate=1)

    def training_step(self, batch: Batch | Tensor | Sequence[Tensor], index: int) -> Tensor:
        """The loss of a batch, in nats."""
        elbo, loss = step_loss(self.vae, _batch(batch), self.config, self.global_step)
        rate, distortion = elbo.rate.detach().mean(), elbo.distortion.detach().mean()
        self.log_dict({"train/loss_nats": rate + distortion, "train/rate_nats": rate, "train/distortion_nats": distortion})
        if (sigma := current_sigma(self.vae)) is not None:
            self.log("train/sigma", sigma)
        return loss

    def validation_step(self, batch: Batch | Tensor | Sequence[Tensor], index: int) -> None:
        """The bound of held-out data, with the σ of the training so far; a sanity check comes before that."""
        if self.trainer.sanity_checking:
            return
        x, positions, mask, condition = _batch(batch)
        elbo = self.vae.elbo(x, mask=mask, noise=keyed_noise(positions), condition=condition)
        self.log(validated_total(self.vae), elbo.total.mean(), batch_size=len(x), prog_bar=True, sync_dist=True)
        terms = {"validation/rate_nats": elbo.rate.mean(), "validation/distortion_nats": elbo.distortion.mean()}
        self.log_dict(terms, batch_size=len(x), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam(W), in which the likelihood's own parameters have their own learning rate."""
        return optimizer_for(self.vae, self.config)


def _batch(batch: Batch | Tensor | Sequence[Tensor]) -> Batch:
    if isinstance(batch, Batch):
        return batch
    x = batch if isinstance(batch, Tensor) else batch[0]
    return Batch(x, torch.arange(len(x)))
