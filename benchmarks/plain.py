"""The usual training loop, and how the models of :mod:`benchmarks.speed` are judged, whoever trained them.

The loop is what public repositories have: a PIL image made and converted example by example in a Dataset, a DataLoader without workers,
float32, Adam at 1e-3, batches of 128, ``loss.item()`` in each step. The network is the paper's at full width.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks import keep
from sigma_vae import VAE, Gaussian
from sigma_vae.data import Splits
from sigma_vae.evaluation import score
from sigma_vae.networks import FlatNetwork, conv

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)
BATCH, RATE, LATENTS = 128, 1e-3, 20
CALIBRATION_EXAMPLES = 5000
"""Training examples that σ is refitted on: its error then costs under a tenth of a nat."""
JUDGED_VALUES = 2**24
"""Values of a split that are looked at: all images of Fashion-MNIST, some clips."""
FIRST_LOOKS = (0.25, 0.5)
"""Fractions of the first epoch after which the model is judged too."""


class PilImages(Dataset[Tensor]):
    """Bytes ``(n, H, W)`` or ``(n, H, W, 3)`` in memory; each image becomes PIL's, then a tensor in [0, 1], whenever it is asked for."""

    def __init__(self, images: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return to_tensor(Image.fromarray(self.images[index]))


def to_tensor(image: Image.Image) -> Tensor:
    """Bytes to ``(channels, H, W)`` in [0, 1], in the steps of torchvision's ToTensor."""
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
    return (
        pixels.view(image.size[1], image.size[0], len(image.getbands()))
        .permute(2, 0, 1)
        .contiguous()
        .to(torch.float32)
        .div(255)
    )


def images_of(data: Splits) -> DataLoader[Tensor]:
    """The training split in the usual pipeline."""
    channels_last = data.train.take(torch.arange(len(data.train))).movedim(1, -1)
    bytes_ = np.ascontiguousarray(channels_last.squeeze(-1).numpy())
    return DataLoader(PilImages(bytes_), BATCH, shuffle=True, num_workers=0)


@dataclass
class PlainLoop:
    """Encoder, decoder, Adam; ``sigma`` None: optimal, and softly clipped from below where the paper's code does so."""

    encoder: nn.Module
    decoder: nn.Module
    sigma: float | None = None
    soft_clip: float | None = None
    """In log σ; -6 in the paper's code."""

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], lr=RATE)
        self.total = 0.0

    def step(self, x: Tensor) -> None:
        """One batch: negative log-likelihood summed over pixels plus KL, averaged over the batch."""
        self.optimizer.zero_grad()
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        x_hat = torch.sigmoid(self.decoder(z))
        sigma = ((x - x_hat) ** 2).mean().sqrt() if self.sigma is None else torch.tensor(self.sigma, device=x.device)
        if self.soft_clip is not None:
            sigma = (self.soft_clip + functional.softplus(sigma.log() - self.soft_clip)).exp()
        nll = (0.5 * ((x - x_hat) / sigma) ** 2 + sigma.log() + 0.5 * np.log(2 * np.pi)).flatten(1).sum(1)
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)
        loss = (nll + kl).mean()
        loss.backward()
        self.optimizer.step()
        self.total += loss.item()


def network_of(data: Splits, seed: int) -> FlatNetwork:
    """The paper's network, full width, of torch's own layers."""
    torch.manual_seed(seed)
    return usual(conv(data.shape, out_channels=data.shape[0], latent_dim=LATENTS))


def usual(network: AnyNetwork) -> AnyNetwork:
    """The same network with torch's own transposed convolutions, as anybody writes it: other trainers get it so."""
    for module in network.modules():
        if isinstance(module, nn.ConvTranspose2d):
            module.__class__ = nn.ConvTranspose2d
    return network


def plain(out: Path, data: Splits, epochs: int, seed: int) -> None:
    """Train as usual; write images seen, seconds of training and test ELBO as soon as they are known."""
    network = network_of(data, seed)
    loop, loader = PlainLoop(network.encoder, network.decoder), images_of(data)
    looks = {round(part * len(loader)) for part in FIRST_LOOKS} | {len(loader) * (epoch + 1) for epoch in range(epochs)}
    rows: list[dict[str, float]] = []
    record = {"epochs": epochs, "seed": seed, "batch": BATCH, "threads": torch.get_num_threads(), "rows": rows}
    for images, seconds in timed(loop, loader, epochs, looks):
        rows.append({"images": images, "seconds": round(seconds, 2), "test_elbo_nats": judged_elbo(network, data)})
        print(rows[-1], flush=True)
        keep(out, "plain", record)


def timed(loop: PlainLoop, loader: DataLoader[Tensor], epochs: int, looks: set[int]) -> Iterator[tuple[int, float]]:
    """Images seen and seconds of training after each of the steps ``looks``; what is done with them meanwhile takes no time."""
    images, steps, seconds, start = 0, 0, 0.0, time.process_time()
    for _ in range(epochs):
        for x in loader:
            loop.step(x)
            images, steps = images + len(x), steps + 1
            if steps in looks:
                seconds += time.process_time() - start
                yield images, seconds
                start = time.process_time()


def judged_elbo(network: Any, data: Splits, device: str = "cpu") -> float:
    """Nats of the density on the test split, float32, σ refitted on training data; noise keyed by the example."""
    likelihood = Gaussian(data.shape[0], levels=None, mean="unit")
    vae = VAE(network, likelihood).to(device)
    some = min(JUDGED_VALUES // data.values_per_example, CALIBRATION_EXAMPLES)
    size = min(250, JUDGED_VALUES // 16 // data.values_per_example)
    with torch.random.fork_rng():
        vae.calibrate(data.batches("train", size, device=device, limit=some))
        vae.eval()
        scores = score(vae, data.batches("test", size, device=device, limit=JUDGED_VALUES // data.values_per_example))
    vae.train()
    return float((scores.log_likelihood - scores.rate).mean())
