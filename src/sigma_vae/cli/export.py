"""Commands that write models for other libraries."""

from pathlib import Path
from typing import Literal

from sigma_vae.cli.options import RunFolder, to_read

__all__ = ["export"]


def export(run: RunFolder, *, out: str, to: Literal["diffusers"] = "diffusers", device: str = "auto") -> None:
    """Write a run's autoencoder for another library.

    The folder has config.json, weights (safetensors) and a model card: AutoencoderKL.from_pretrained opens it. Scaling
    factor, shift factor, and mean and std of each channel of the latents are measured on the training split.

    Args:
        run: Folder of the run: network spatial (images) or autoencoder-kl, and a likelihood with a mean and a scale.
        out: Folder to write, never overwritten.
        to: Library.
        device: auto, cpu, cuda or cuda:1.
    """
    from sigma_vae.runs.export import export as write

    for name, value in write(to_read(run), Path(out), device=device).items():
        print(f"{name}: {value}")
    print(out)
