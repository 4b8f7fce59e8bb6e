"""Several processes train one model: `fit` needs no change, each process calls it with the same arguments.

torchrun --standalone --nproc-per-node 2 -m examples.several_processes
"""

from pathlib import Path

from sigma_vae import models
from sigma_vae.config import ModelConfig, TrainingConfig
from sigma_vae.training import fit


def main(out: Path = Path("several-processes"), steps: int = 400) -> int:
    """Train; the batch size counts the examples of all processes together. Return the number of steps."""
    data = models.data("digits")
    vae = models.vae(ModelConfig("mlp", "gaussian/optimal", latent_dim=8), data.shape, data.scaling)
    result = fit(vae, data, TrainingConfig(max_steps=steps, batch_size=128), out=out, progress=False)
    print(f"{result.steps} steps, best validation {result.best_score:.1f} nats")
    return result.steps


if __name__ == "__main__":
    main()
