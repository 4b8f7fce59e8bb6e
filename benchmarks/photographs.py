"""A folder of photographs, with no option but the network: bits per dimension and samples at equal CPU time.

    python -m benchmarks.photographs --cifar cifar10_slice.npz --out benchmarks/results/photographs.json

3 000 JPEGs of 64×64: half are CIFAR images, twice as large, half are squares cut from bundled photographs (scikit-learn's, and
scikit-image's where it is installed). One thread and the CPU seconds of this process, so that a busy machine makes no difference.
Each network is trained once, and measured on the way at each of the times; what a prior's fit takes is extra, and reported. Fréchet
distances are those of EfficientNet-Lite0's features, of 600 means of samples to the training pictures. Squares of one photograph may
overlap between the splits, for all networks alike.
"""

import copy
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import tyro
from PIL import Image

from sigma_vae import VAE, models
from sigma_vae.config import ModelConfig, TrainingConfig
from sigma_vae.data import Splits
from sigma_vae.evaluation.elbo import elbo
from sigma_vae.evaluation.features import Extractor, load_extractor
from sigma_vae.evaluation.plots import pairs, save_grid
from sigma_vae.evaluation.quality import frechet_distance
from sigma_vae.runs.evaluate import take_prior
from sigma_vae.training import fit
from sigma_vae.training.callbacks import Callback, Context

SIDE, COUNT, SAMPLES, SHOWN = 64, 3000, 600, 64
FROM_SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
NETWORKS = ("hierarchical:tiny", "residual", "spatial:f8c4,8")
CUTS = 64, 256
"""Least and largest side of the squares that are cut from photographs, in pixels."""
LARGER = 64, 128
"""Sides of the squares that are reconstructed as they are."""


class Clock(Callback):
    """Ends a training after so many CPU seconds of this process; those before a resumption count."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.began = -time.process_time()

    def on_step(self, context: Context) -> None:
        """Look at the clock."""
        if self.used() >= self.seconds:
            context.stop()

    def used(self) -> float:
        """Seconds of this training."""
        return time.process_time() + self.began

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far."""
        return {"seconds": self.used()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from them."""
        self.began = state["seconds"] - time.process_time()


def main(
    cifar: Path,
    out: Path,
    networks: tuple[str, ...] = NETWORKS,
    minutes: tuple[float, ...] = (2.0, 10.0),
    seed: int = 0,
    start: Literal["auto", "principal", "random"] = "auto",
    pictures: Path | None = None,
    keep: Path | None = None,
) -> None:
    """Train and measure each network, add the results to the file, and print the table.

    Args:
        cifar: NPZ file with CIFAR images as "train".
        out: JSON file of the results; those that it has are kept.
        networks: with their width after a comma, if it is not the default: spatial:f8c4,16.
        minutes: of CPU time, in ascending order.
        seed: of the weights, the data's order, and the samples.
        start: of training; principal is the best linear VAE, of patches where latents are maps or a ladder, and auto takes it but
            for a ladder.
        pictures: folder for a mosaic of samples of each.
        keep: folder for checkpoints; a network that has some there is trained on.
    """
    torch.set_num_threads(1)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
    rows = json.loads(out.read_text(encoding="utf-8"))["results"] if out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        make_folder(cifar, Path(folder))
        data, extractor = models.data(folder), load_extractor("efficientnet")
        real = _features(extractor, data.values("train"))
        floor = frechet_distance(_features(extractor, _held_out(data)), real)
        record = {"data": f"{COUNT} JPEGs of {SIDE}×{SIDE}", "threads": 1, "samples": SAMPLES, "frechet_of_held_out": floor}
        measure = partial(measured, data=data, extractor=extractor, real=real, seed=seed)
        trainings = [trained(name, data, minutes, seed, start, _folder(keep, name)) for name in networks]
        for each in itertools.chain.from_iterable([trainings] * len(minutes)):
            about, vae = next(each)
            if about["network"].startswith("spatial"):
                about |= larger(
                    vae, None if pictures is None else pictures / f"{_plain(about['network'])}-{about['minutes']:g}"
                )
            for prior in ("gaussian", "flow-matching") if about["network"].startswith("spatial") else ("auto",):
                rows.append(about | measure(copy.deepcopy(vae), prior, picture=_picture(pictures, about, prior)))
                print(rows[-1], flush=True)
            out.write_text(json.dumps(record | {"results": rows}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))


def make_folder(cifar: Path, folder: Path) -> None:
    """Write the pictures."""
    generator, photographs = np.random.default_rng(0), bundled_photographs()
    small = np.load(cifar)["train"].transpose(0, 2, 3, 1)[: COUNT // 2]
    for number in range(COUNT):
        if number < len(small):
            picture = Image.fromarray(small[number])
        else:
            picture = cut(photographs[number % len(photographs)], generator, *CUTS)
        resized = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        resized.save(folder / f"{number:04}.jpg", quality=95)


def bundled_photographs() -> list[Image.Image]:
    """Photographs that installed packages carry."""
    from sklearn.datasets import load_sample_images

    found = [Image.fromarray(each) for each in load_sample_images().images]
    if (spec := find_spec("skimage")) is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "data"
        found += [Image.open(folder / name).convert("RGB") for name in FROM_SKIMAGE]
    return found


def cut(photograph: Image.Image, generator: np.random.Generator, least: int, most: int) -> Image.Image:
    """A random square of a photograph, its side between two lengths."""
    side = int(generator.integers(least, most + 1))
    left, top = (int(generator.integers(0, length - side + 1)) for length in photograph.size)
    return photograph.crop((left, top, left + side, top + side))


def trained(
    name: str, data: Splits, minutes: tuple[float, ...], seed: int, start: Literal["auto", "principal", "random"], folder: Path
) -> Iterator[tuple[dict[str, Any], VAE]]:
    """Train a network, and give it back after each of the times."""
    network, _, width = name.partition(",")
    config = ModelConfig(network=network, width=int(width) if width else None)
    likelihood, _ = models.likelihood_for(config, data)
    torch.manual_seed(seed)
    vae = models.vae(replace(config, likelihood=likelihood), data.shape, data.scaling)
    for until in minutes:
        clock = Clock(60 * until)
        done = fit(
            vae,
            data,
            TrainingConfig(start=start),
            out=folder,
            seed=seed,
            device="cpu",
            resume=(folder / "checkpoints" / "last.ckpt").exists(),
            progress=False,
            callbacks=[clock],
            save=False,
        )
        about = {"network": name, "likelihood": likelihood, "minutes": until, "seed": seed, "start": start}
        yield about | {"steps": done.steps, "best_step": done.best_step, "trained_minutes": clock.used() / 60}, vae


def _folder(keep: Path | None, name: str) -> Path:
    return Path(tempfile.mkdtemp()) if keep is None else keep / _plain(name)


def _picture(folder: Path | None, about: dict[str, Any], prior: str) -> Path | None:
    return None if folder is None else folder / f"{_plain(about['network'])}-{prior}-{about['minutes']:g}.png"


def _plain(name: str) -> str:
    return name.replace(":", "-").replace("/", "-")


def _held_out(data: Splits) -> torch.Tensor:
    return torch.cat([data.values("validation"), data.values("test")])


def measured(
    vae: VAE, prior: str, *, data: Splits, extractor: Extractor, real: torch.Tensor, seed: int, picture: Path | None
) -> dict[str, Any]:
    """Fit the prior and measure a trained model, on the test split."""
    began = time.process_time()
    take_prior(prior, vae, data, seed)
    seconds = time.process_time() - began
    began = time.process_time()
    found = elbo(vae, data.batches("test", 50))
    bound_seconds = time.process_time() - began
    x = data.values("test")
    torch.manual_seed(seed)
    with torch.no_grad():
        again = torch.cat([vae.reconstruct(part) for part in x.split(50)]).clamp(0, 1)
        drawn = torch.cat([vae.sample(50) for _ in range(SAMPLES // 50)]).clamp(0, 1)
    if picture is not None:
        save_grid(picture, drawn[:SHOWN], columns=8, zoom=1)
    return {
        "prior": prior,
        "prior_seconds": seconds,
        "bound_seconds_per_example": bound_seconds / found["examples"],
        "bits_per_dim": found["bits_per_dim_post_hoc"]["mean"],
        "rate_nats": found["rate_nats"]["mean"],
        "psnr_db": _psnr(x, again),
        "frechet_samples": frechet_distance(_features(extractor, drawn), real),
        "frechet_reconstructions": frechet_distance(_features(extractor, again), real),
        "parameters": sum(p.numel() for p in vae.network.parameters() if p.requires_grad),
    }


@torch.no_grad()
def larger(vae: VAE, picture: Path | None) -> dict[str, float]:
    """Reconstruct squares of the photographs, 64 and 128 pixels wide and not resized: signal-to-noise ratios in dB."""
    found = {}
    for side in LARGER:
        generator = np.random.default_rng(1)
        squares = [np.asarray(cut(each, generator, side, side)) for each in bundled_photographs() for _ in range(4)]
        x = torch.from_numpy(np.stack(squares)).movedim(-1, 1) / 255
        again = torch.cat([vae.decode(vae.encode(part).loc) for part in x.split(4)]).clamp(0, 1)
        found[f"psnr_db_of_{side}"] = _psnr(x, again)
        if picture is not None:
            save_grid(Path(f"{picture}-pairs-{side}.png"), pairs(x[::4], again[::4], 7), columns=7, zoom=1)
    return found


def _psnr(x: torch.Tensor, again: torch.Tensor) -> float:
    return float((-10 * (again - x).square().flatten(1).mean(1).log10()).mean())


@torch.no_grad()
def _features(extractor: Extractor, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([extractor(part) for part in images.split(50)])


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The results as Markdown."""
    yield "| CPU minutes | network | start | prior | steps | bits/dim | rate, nats | PSNR, dB | Fréchet, samples | prior's fit, s |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in sorted(rows, key=lambda row: row["minutes"]):
        yield (
            f"| {row['minutes']:g} | `{row['network']}` | {row['start']} | {row['prior']} | {row['steps']} | {row['bits_per_dim']:.3f}"
            f" | {row['rate_nats']:.0f} | {row['psnr_db']:.1f} | {row['frechet_samples']:.1f} | {row['prior_seconds']:.0f} |"
        )


if __name__ == "__main__":
    tyro.cli(main)
