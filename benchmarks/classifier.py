"""A small network that tells the classes of Fashion-MNIST apart: its 64 features are what pictures of clothes are compared by.

    OMP_NUM_THREADS=1 python -m benchmarks.classifier --out classifier.pt

Seconds to train. The file is TorchScript: images (n, 1, 28, 28) in [0, 1] to features (n, 64). `load_extractor("classifier.pt")` reads it.
"""

import gzip
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from sigma_vae.config import DataConfig
from sigma_vae.data import load
from sigma_vae.data.arrays import read_images
from sigma_vae.evaluation.features import load_extractor
from sigma_vae.evaluation.quality import frechet_distance

BATCH, LEARNING_RATE = 64, 2e-3
LABELS_MAGIC = 0x00000801  # unsigned bytes, one axis
HEADER = 8
SIDE = 5_000
"""Images on each side of a distance."""


def main(out: Path, data: str = "fashion-mnist", root: str | None = None, epochs: int = 2, seed: int = 0) -> None:
    """Train, print the accuracy on the test images, write the features.

    Args:
        out: TorchScript file.
        data: fashion-mnist or mnist; their labels lie beside their images.
        root: Folder of their files.
        epochs: Passes over the 60 000 training images.
        seed: Of weights and order.
    """
    train, test = (read_images(path) for path in image_files(data, root))
    train_labels, test_labels = (read_labels(path) for path in map(beside, image_files(data, root)))
    torch.manual_seed(seed)
    features, head = network()
    fit(features, head, as_input(train), train_labels, epochs)
    print(f"accuracy on {len(test)} test images: {accuracy(features, head, as_input(test), test_labels):.4f}")
    for name, distance in distances(features.eval(), as_input(train[:SIDE]), as_input(test[:SIDE])).items():
        print(f"Fréchet distance of {SIDE} {name} from as many test images: {distance:.2f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.")
        torch.jit.script(features.eval()).save(str(out))


def image_files(data: str, root: str | None) -> list[Path]:
    """Of the training and of the test images."""
    return [Path(file["path"]) for file in load(DataConfig(data, root=root)).record["files"]]


def beside(images: Path) -> Path:
    """The labels that belong to images.

    >>> beside(Path("a/t10k-images-idx3-ubyte.gz")).name
    't10k-labels-idx1-ubyte.gz'
    """
    return images.with_name(images.name.replace("images-idx3", "labels-idx1"))


def read_labels(path: Path) -> Tensor:
    """Labels ``(N,)`` of an IDX file, gzipped or not."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    magic, count = struct.unpack(">II", content[:HEADER])
    if magic != LABELS_MAGIC or len(content) != HEADER + count:
        raise SystemExit(
            f"{path} needs an IDX header of labels and as many bytes as it says, got {magic:#010x} and {len(content)} bytes"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=HEADER).astype(np.int64))


def network() -> tuple[nn.Module, nn.Module]:
    """From images to features, and from features to classes."""
    features = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
    )
    return features, nn.Linear(64, 10)


def fit(features: nn.Module, head: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Adam, with a learning rate that falls to zero."""
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], lr=LEARNING_RATE)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(images)), BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(head(features(images[rows])), labels[rows]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(features: nn.Module, head: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose class is told."""
    right = [head(features(x)).argmax(1) == y for x, y in zip(images.split(1000), labels.split(1000), strict=True)]
    return float(torch.cat(right).double().mean())


def distances(features: nn.Module, train: Tensor, test: Tensor) -> dict[str, float]:
    """What the features make of real images, and of two ways to spoil them."""
    noise = 0.1 * torch.randn(train.shape, generator=torch.Generator().manual_seed(0))
    pictures = {
        "training images": train,
        "of them after a 5×5 box blur": functional.avg_pool2d(train, 5, stride=1, padding=2),
        "of them with noise of 0.1": (train + noise).clamp(0, 1),
    }
    extractor = load_extractor(features)
    known = extractor.of(test.split(BATCH))
    return {name: frechet_distance(known, extractor.of(shown.split(BATCH))) for name, shown in pictures.items()}


def as_input(images: np.ndarray) -> Tensor:
    """Images ``(N, 1, 28, 28)`` in [0, 1]."""
    return torch.from_numpy(images.astype(np.float32) / 255).unsqueeze(1)


if __name__ == "__main__":
    tyro.cli(main)
