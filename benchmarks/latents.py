"""Latent maps under four objectives: CompVis', diffusers' script, and two calibrated ones, with one network.

    python -m benchmarks.latents --data cifar10_slice.npz --out benchmarks/results/latents.json

Everything but the objective is the same: ``spatial:f4c3``, Adam at 1e-3 with a cosine, steps, batches, seeds. σ is then solved on
validation data for all, and bits per dimension are those of the better of a Gaussian and a Laplace likelihood. Samples come from the
same flow-matching prior, fitted to each one's latents for the same number of steps. Discriminator and perceptual term are left out of
all. Fréchet distances are those of EfficientNet-Lite0's features to the test images; of reconstructions, and of samples.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.nn.functional import mse_loss

from sigma_vae import VAE, Gaussian, Laplace, models
from sigma_vae.data import Splits
from sigma_vae.evaluation import information as information_module
from sigma_vae.evaluation.elbo import elbo
from sigma_vae.evaluation.features import Extractor, load_extractor
from sigma_vae.evaluation.information import information
from sigma_vae.evaluation.quality import frechet_distance
from sigma_vae.priors import FlowMatchingPrior

BATCH, RATE, WEIGHT = 32, 1e-3, 1e-6

Objective = Callable[[VAE, Tensor], Tensor]


def compvis(vae: VAE, x: Tensor) -> Tensor:
    """Absolute errors over [−1, 1], summed and divided by the batch, and the customary weight."""
    inference = vae.network.infer(x)
    return 2 * (inference.h - x).abs().sum() / len(x) + WEIGHT * inference.kl.sum() / len(x)


def diffusers(vae: VAE, x: Tensor) -> Tensor:
    """Mean squared error over [−1, 1], and the customary weight."""
    inference = vae.network.infer(x)
    return 4 * mse_loss(inference.h, x) + WEIGHT * inference.kl.mean()


def calibrated(vae: VAE, x: Tensor) -> Tensor:
    """The negative ELBO."""
    return -vae.elbo(x).total.mean()


ARMS: dict[str, tuple[Objective, type[Gaussian] | type[Laplace]]] = {
    "CompVis: sum of L1 + 1e-6·KL": (compvis, Laplace),
    "diffusers: mean MSE + 1e-6·KL": (diffusers, Gaussian),
    "laplace/optimal": (calibrated, Laplace),
    "gaussian/optimal": (calibrated, Gaussian),
}


def main(
    data: str,
    out: Path | None = None,
    width: int = 16,
    steps: int = 400,
    prior_steps: int = 300,
    images: int = 1000,
    seeds: int = 3,
) -> None:
    """Train each arm with each seed, measure it, write what was measured, and print the table.

    Args:
        data: File or name of 32×32 colour images.
        out: JSON file of the results.
        width: Of the network.
        steps: Of training, with batches of 32.
        prior_steps: Of the flow-matching prior, with batches of 128.
        images: Of each kind, for the Fréchet distance.
        seeds: How many.
    """
    torch.set_num_threads(1)
    information_module.COMPONENTS = 1  # a Gaussian: a mixture over 192 latents takes minutes
    splits, extractor = models.data(data), load_extractor("efficientnet")
    real = _features(extractor, splits.values("test")[:images])
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for name, (objective, family) in ARMS.items():
            torch.manual_seed(seed)
            vae = VAE(models.network("spatial:f4c3", splits.shape, 3, width=width), family(3))
            seconds = _train(vae, splits, objective, steps, seed)
            rows.append(
                {"arm": name, "seed": seed, "seconds": seconds} | _measure(vae, splits, extractor, real, prior_steps, seed)
            )
            print(rows[-1], flush=True)
            if out is not None:
                record = {
                    "data": Path(data).name,
                    "width": width,
                    "steps": steps,
                    "prior_steps": prior_steps,
                    "images": images,
                    "results": rows,
                }
                out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(_table(rows)))


def _train(vae: VAE, splits: Splits, objective: Objective, steps: int, seed: int) -> float:
    optimizer = torch.optim.Adam(vae.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches, began, done = splits.batches("train", BATCH, shuffle=True, seed=seed), time.monotonic(), 0
    torch.manual_seed(seed)
    while done < steps:
        for batch in batches:
            optimizer.zero_grad()
            objective(vae, batch.x).backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                break
    return time.monotonic() - began


def _measure(vae: VAE, splits: Splits, extractor: Extractor, real: Tensor, prior_steps: int, seed: int) -> dict[str, float]:
    fits = [VAE(vae.network, family(3)) for family in (Gaussian, Laplace)]
    bits, nats = [], []
    for each in fits:
        each.calibrate(splits.batches("validation", 256))
        report = elbo(each, splits.batches("test", 256))
        bits.append(report["bits_per_dim_post_hoc"]["mean"])
        nats.append(report["elbo_post_hoc_nats"]["mean"])
    vae = fits[0].eval()
    test, training = splits.batches("test", 256), splits.batches("train", 256)
    found = information(vae, test, training)
    moments = vae.map_statistics(training)
    x = splits.values("test")
    with torch.no_grad():
        again = torch.cat([vae.decode(vae.encode(part).loc) for part in x.split(256)])
    row = {
        "bits_per_dim": min(bits),
        "elbo_nats": max(nats),
        "rate_nats": found.mean_kl_nats.mean,
        "marginal_kl_nats_per_latent": found.marginal_kl_at_least_nats / found.latent_dim,
        "psnr_db": float((-10 * (again - x).square().flatten(1).mean(1).log10()).mean()),
        "frechet_reconstructions": frechet_distance(_features(extractor, again[: len(real)].clamp(0, 1)), real),
        "scaling_factor": moments.scaling_factor,
        "least_std": min(moments.std),
        "largest_std": max(moments.std),
    }
    size = math.prod(vae.network.latents.shapes[0])
    vae.fit_prior(training, FlowMatchingPrior(size, vae.network.latents.shapes[0], prior_steps), seed=seed)
    drawn = vae.sample(len(real), generator=torch.Generator().manual_seed(seed)).clamp(0, 1)
    return row | {"frechet_samples": frechet_distance(_features(extractor, drawn), real)}


@torch.no_grad()
def _features(extractor: Extractor, images: Tensor) -> Tensor:
    return torch.cat([extractor(part) for part in images.split(64)])


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = [name for name in rows[0] if name not in ("arm", "seed")]
    yield "| objective | " + " | ".join(name.replace("_", " ") for name in names) + " |"
    yield "| --- " * (len(names) + 1) + "|"
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        yield f"| {arm} | " + " | ".join(_cell([row[name] for row in mine]) for name in names) + " |"


def _cell(values: list[float]) -> str:
    digits = 3 if abs(mean(values)) < 10 else 1
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    tyro.cli(main)
