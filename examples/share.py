"""Share a model on the Hugging Face Hub (extra ``hub``), or in a folder: weights, description and a model card.

python -m examples.share            # writes a folder
python -m examples.share you/digits # uploads; log in first: hf auth login
"""

import sys
from pathlib import Path

import torch

from sigma_vae import VAE, models
from sigma_vae.config import ModelConfig, TrainingConfig
from sigma_vae.evaluation import evaluate
from sigma_vae.training import fit


def main(name: str | None = None, folder: Path = Path("digits-vae"), steps: int = 500) -> VAE:
    """Train, write or upload, and return what comes back: the same model to the bit."""
    data = models.data("digits")
    vae = models.vae(ModelConfig("mlp", "gaussian/optimal"), data.shape, data.scaling)
    fit(vae, data, TrainingConfig(max_steps=steps), progress=False)
    report = evaluate(vae, data)
    if name is not None:
        print(vae.push_to_hub(name, evaluation=report))
        return VAE.from_pretrained(name)
    vae.save_pretrained(folder, evaluation=report)
    again = VAE.from_pretrained(folder)
    ours, theirs = (each.sample(4, generator=torch.Generator().manual_seed(0)) for each in (vae, again))
    print(f"{folder / 'README.md'}: the samples are {'the same' if torch.equal(ours, theirs) else 'other ones'}")
    return again


if __name__ == "__main__":
    main(*sys.argv[1:])
