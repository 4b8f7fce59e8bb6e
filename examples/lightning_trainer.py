"""A Trainer of pytorch-lightning (extra ``lightning``): checkpoints, loggers and devices are the trainer's.

python -m examples.lightning_trainer
"""

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from sigma_vae import VAE, Gaussian, mlp, models
from sigma_vae.evaluation import evaluate
from sigma_vae.lightning import VAEModule


def main(epochs: int = 20) -> float:
    """Train, solve σ on held-out data, and return the bound on test data, in nats."""
    data = models.data("digits")
    likelihood = Gaussian(channels=1, levels=17, mean="unit")
    vae = VAE(mlp((1, 8, 8), likelihood.in_channels, latent_dim=8), likelihood)
    train, validation = (next(iter(data.batches(split, 10_000))).x for split in ("train", "validation"))
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(VAEModule(vae), DataLoader(train, batch_size=128, shuffle=True))
    vae.calibrate([validation])
    report = evaluate(vae, data)
    print(f"bound: {report.elbo_nats.mean:.1f} nats, {report.bits_per_dim.mean:.3f} bits per value")
    return float(report.elbo_nats.mean)


if __name__ == "__main__":
    main()
