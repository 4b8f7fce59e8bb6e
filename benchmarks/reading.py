"""Reading speed from the mapped cache and from the usual pipelines, in one run; and memory on a cache of 20 GB.

    python -m benchmarks.reading --out benchmarks/results/reading.json

The pictures are JPEGs of CelebA's size (178×218), cut from two photographs in scikit-learn.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tyro
import xxhash
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sigma_vae import VAE, Gaussian, mlp
from sigma_vae.config import DataConfig, ImageConfig
from sigma_vae.data import Batches, Scaling, load
from sigma_vae.data.cache import BLOCK, FOLDER, FORMAT, cached, key_of
from sigma_vae.data.stores import Encoded

BATCH, CROP, SIZE, WORKERS = 128, 148, 64, 2
SHAPE = (3, SIZE, SIZE)


def main(out: Path, pictures: int = 3000, rounds: int = 3, gigabytes: int = 20, steps: int = 200) -> None:
    """Time all pipelines in turns, measure memory, write JSON, print the table."""
    with tempfile.TemporaryDirectory() as folder:
        speeds = speed(Path(folder), pictures, rounds)
    with tempfile.TemporaryDirectory() as folder:
        memory = anonymous_memory(Path(folder), gigabytes, steps)
    command = f"python -m benchmarks.reading --pictures {pictures} --rounds {rounds} --gigabytes {gigabytes} --steps {steps}"
    record = {"command": command, "pictures": pictures, "rounds": rounds, "images_per_second": speeds, "memory": memory}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(speeds)))
    print(f"\na cache of {gigabytes} GB: {memory}")


def speed(folder: Path, pictures: int, rounds: int) -> dict[str, float]:
    """Images per second of each pipeline: the median of rounds in which they take turns."""
    paths = make_pictures(folder / "pictures", pictures)
    start = time.perf_counter()
    images = ImageConfig(crop=CROP, size=SIZE)
    data = load(DataConfig(str(folder / "pictures"), images=images, validation_fraction=0.001, test_fraction=0.001))
    building = time.perf_counter() - start
    decoded = [Image.open(path).convert("RGB").crop(central(178, 218)).resize((SIZE, SIZE)) for path in paths]
    pipelines: dict[str, Callable[[], Any]] = {
        "cache, 1 thread": lambda: data.batches("train", BATCH, shuffle=True),
        "Dataset + PIL + DataLoader, JPEG files, 2 workers": lambda: loader(Files(paths), WORKERS),
        "Dataset + PIL + DataLoader, PIL images in memory, 2 workers": lambda: loader(InMemory(decoded), WORKERS),
        "Dataset + PIL + DataLoader, PIL images in memory, no workers": lambda: loader(InMemory(decoded), 0),
    }
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(rounds):
        for name, make in pipelines.items():
            times[name].append(images_per_second(make()))
    return {name: median(values) for name, values in times.items()} | {"building the cache, once": pictures / building}


def make_pictures(folder: Path, count: int) -> list[Path]:
    """JPEGs of 178×218 pixels."""
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    photographs, state = load_sample_images().images, np.random.RandomState(0)
    paths = []
    for i in range(count):
        photograph = photographs[i % 2]
        top, left = state.randint(photograph.shape[0] - 218), state.randint(photograph.shape[1] - 178)
        paths.append(folder / f"{i:06d}.jpg")
        Image.fromarray(photograph[top : top + 218, left : left + 178]).save(paths[-1], quality=90)
    return paths


def central(width: int, height: int) -> tuple[int, int, int, int]:
    left, top = (width - CROP) // 2, (height - CROP) // 2
    return left, top, left + CROP, top + CROP


class Files(Dataset[Tensor]):
    """The usual way: open, decode, crop and resize a file at every access."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        return to_tensor(image.crop(central(*image.size)).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


class InMemory(Dataset[Tensor]):
    """The usual way for small data sets: decoded images in memory, converted one by one."""

    def __init__(self, images: list[Image.Image]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return to_tensor(self.images[index])


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


def loader(dataset: Dataset[Tensor], workers: int) -> DataLoader[Tensor]:
    return DataLoader(dataset, BATCH, shuffle=True, num_workers=workers)


def images_per_second(batches: Any) -> float:
    start, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch if isinstance(batch, Tensor) else batch.x)
    return seen / (time.perf_counter() - start)


def anonymous_memory(folder: Path, gigabytes: int, steps: int) -> dict[str, float]:
    """Train from a sparse cache of this size, opened and verified like any other; measure memory outside mapped files."""
    count = gigabytes * 10**9 // int(np.prod(SHAPE))
    start = time.perf_counter()
    store, _ = cached(sparse_cache(folder, count))
    opening = time.perf_counter() - start
    likelihood = Gaussian(3, mean="unit")
    vae = VAE(mlp(SHAPE, likelihood.in_channels, width=64), likelihood)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-4)
    batches = iter(Batches(store, Scaling(levels=256), BATCH, shuffle=True))
    start, most = time.perf_counter(), 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        (-vae.elbo(next(batches).x).total.mean()).backward()
        optimizer.step()
        most = max(most, resident("RssAnon"))
    return {
        "gigabytes": gigabytes,
        "examples": count,
        "steps": steps,
        "seconds_to_open_and_verify": opening,
        "images_per_second": steps * BATCH / (time.perf_counter() - start),
        "anonymous_resident_gigabytes": most,
    }


def sparse_cache(folder: Path, count: int) -> Encoded:
    """Make a complete cache of zeros that take no room on the disk."""
    encoded = Encoded(range(count), SHAPE, "uint8", lambda i: np.zeros(SHAPE, np.uint8), {"sparse": count}, folder)  # type: ignore[arg-type]
    place = folder / FOLDER / key_of(encoded.identity, home=None)
    place.mkdir(parents=True)
    with (place / "examples.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *SHAPE)}
        np.lib.format.write_array_header_1_0(file, header)
        first = file.tell()
        file.truncate(first + count * int(np.prod(SHAPE)))
        size = first + count * int(np.prod(SHAPE))
    with (place / "examples.npy").open("rb") as file:
        digests = [xxhash.xxh3_128(file.read(BLOCK)).hexdigest()]
    zeros = xxhash.xxh3_128(bytes(BLOCK)).hexdigest()
    digests += [zeros] * (size // BLOCK - 1)
    if size % BLOCK:
        digests.append(xxhash.xxh3_128(bytes(size % BLOCK)).hexdigest())
    record = {"format": FORMAT, "identity": dict(encoded.identity), "skipped": [], "blocks": digests}
    (place / "cache.json").write_text(json.dumps(record), encoding="utf-8")
    return encoded


def resident(kind: str) -> float:
    """Return gigabytes of one kind of resident memory, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(kind))


def table(speeds: dict[str, float]) -> Iterator[str]:
    """Tabulate images per second, and how many times faster the cache is."""
    yield "| pipeline | images/s | the cache is |"
    yield "| --- | --- | --- |"
    cache = next(iter(speeds.values()))
    for name, value in speeds.items():
        yield f"| {name} | {value:.0f} | {cache / value:.1f}× |"


if __name__ == "__main__":
    tyro.cli(main)
