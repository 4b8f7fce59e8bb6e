"""Images a second of a training step of diffusers' ``AutoencoderKL``: ours beside the loop of diffusers' script, taking turns.

    OMP_NUM_THREADS=1 python -m benchmarks.autoencoder_kl

The script's loop, without its discriminator and LPIPS: encode, draw, decode, mean squared error + 1e-6·KL, clip the gradient's norm at
1, AdamW. Ours is the step of ``sigma-vae train`` with ``gaussian/optimal`` and the same clipping, on the same batches; also in bfloat16,
which ``train`` takes where the processor has it. Peaks of memory are those of separate processes.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from sigma_vae import VAE, Gaussian
from sigma_vae.config import TrainingConfig
from sigma_vae.networks.autoencoder_kl import autoencoder_kl
from sigma_vae.training.hardware import Choices
from sigma_vae.training.step import Stepper
from sigma_vae.types import Batch

WARM_UP = 2


def config(width: int) -> dict[str, object]:
    """Factor 4, four latent channels."""
    widths = [width, 2 * width, 2 * width]
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "norm_num_groups": 8,
        "latent_channels": 4,
    }


def theirs(width: int) -> Callable[[torch.Tensor], None]:
    """A step of the script's loop."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL.from_config(config(width)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(x: torch.Tensor) -> None:
        targets = 2 * x - 1
        posterior = model.encode(targets).latent_dist
        again = model.decode(posterior.sample()).sample
        loss = torch.nn.functional.mse_loss(again, targets) + 1e-6 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(width: int, precision: Literal["float32", "bfloat16"] = "float32") -> Callable[[torch.Tensor], None]:
    """A step of ``fit``."""
    torch.manual_seed(0)
    vae = VAE(autoencoder_kl((3, 32, 32), 3, config(width)), Gaussian(3)).train()
    settings = TrainingConfig(gradient_clip_norm=1.0, ema_decay=None)
    choices = Choices(
        "cpu",
        "",
        precision,
        "contiguous",
        fused_optimiser=True,
        allocator="default",
        compile=False,
        threads=1,
        steps_per_call=1,
    )
    stepper = Stepper(vae, settings, choices, 10**6, 0.0)
    numbers = iter(range(1, 10**6))

    def step(x: torch.Tensor) -> None:
        stepper.step(Batch(x, torch.arange(len(x))), next(numbers))

    return step


SIDES = {"ours": ours, "ours, bfloat16": partial(ours, precision="bfloat16"), "diffusers": theirs}


def main() -> None:
    """Time both sides in turn, or run one alone and print its peak of memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--alone", choices=SIDES)
    given = parser.parse_args()
    x = torch.rand(given.batch, 3, given.side, given.side)
    if given.alone:
        step = SIDES[given.alone](given.width)
        for _ in range(4):
            step(x)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    steps = {name: make(given.width) for name, make in SIDES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(given.rounds + WARM_UP):
        for name, step in steps.items():
            began = time.process_time()
            step(x)
            if number >= WARM_UP:
                seconds[name].append(time.process_time() - began)
    for name, times in seconds.items():
        words = [sys.executable, "-m", "benchmarks.autoencoder_kl", "--alone", name, *_sizes(given)]
        peak = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1]
        rate = given.batch / statistics.median(times)
        print(f"{name}: {rate:.1f} images/s of processor time (median of {len(times)} steps), peak {peak} MiB")
    for name in ("ours", "ours, bfloat16"):
        ratios = [b / a for a, b in zip(seconds[name], seconds["diffusers"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name}: {middle:.3f} times as fast as diffusers' (quartiles {low:.3f} to {high:.3f})")


def _sizes(given: argparse.Namespace) -> list[str]:
    return ["--side", str(given.side), "--batch", str(given.batch), "--width", str(given.width)]


if __name__ == "__main__":
    main()
