"""Size and speed of the codec: beside the evaluation's bits/dim, and beside PNG, WebP, JPEG XL and xz.

    OMP_NUM_THREADS=1 python -m benchmarks.codec RUN ... --out benchmarks/results/codec.json
    python -m benchmarks.codec --out benchmarks/results/codec.json          # print the tables of that file

JPEG XL needs the package ``imagecodecs``; it is left out where that is missing. Seconds are those of one core's processor.
"""

import json
import lzma
import math
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.distributions import Normal

from sigma_vae import runs
from sigma_vae.codec import Codec
from sigma_vae.codec.bits_back import CELL, CELLS, Ints, Roundings, Stack
from sigma_vae.codec.lossless import _reproducible, read
from sigma_vae.data.batches import Batches
from sigma_vae.evaluation import score

SHEET = 256
"""Examples of a picture that holds several, one above the other."""

Coder = Callable[[np.ndarray], bytes]


def main(runs_: Annotated[tuple[Path, ...], tyro.conf.Positional] = (), *, out: Path, examples: int = 0) -> None:
    """Measure runs, or print what was measured.

    Args:
        runs_: finished runs on data with levels.
        out: JSON of all results; those of the same run are replaced.
        examples: only so many of the test split; 0: all.
    """
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    for run in runs_:
        results[run.name] = measured(run, examples)
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n".join([*sizes(results), "", *gaps(results), "", *speeds(results)]))


def measured(run: Path, count: int) -> dict[str, Any]:
    opened = runs.open_run(run, "cpu")
    store = opened.data.test
    count = min(count, len(store)) or len(store)
    levels = store.take(torch.arange(count)).numpy()
    record = ours(opened, levels)
    record["rivals"] = rivals(levels, opened.data.scaling.levels)
    return {
        "data": opened.data.name,
        "network": opened.config.model.network,
        "likelihood": opened.config.model.likelihood,
        "prior": type(opened.vae.network.prior).__name__ if opened.vae.network.has_prior else "learned",
        "examples": count,
        "of": len(store),
        "values": int(levels.size),
        **record,
    }


def ours(opened: runs.Run, levels: np.ndarray) -> dict[str, Any]:
    """Bits of the file and of its parts, and of the bound; seconds."""
    codec = Codec(opened.vae, levels.shape[1:], check=False)
    start = time.process_time()
    blob = codec.pack(list(levels))
    encoded = time.process_time()
    found = codec.unpack(blob).examples
    decoded = time.process_time()
    header = read(blob).header
    coded = 8 * sum(chunk.size - 4 * chunk.seeds for chunk in header.chunks)
    evaluated = score(opened.vae, Batches(opened.data.test.select(torch.arange(len(levels))), opened.data.scaling, 256), 0)
    assert evaluated.log_mass_post_hoc is not None
    return {
        "lossless": len(found) == len(levels) and all(map(np.array_equal, found, levels)),
        "file_bits": 8 * len(blob),
        "coded_bits": coded,
        "noted": sum(len(notes) for chunk in header.chunks for notes in chunk.noted),
        "initial_bits": 32 * sum(chunk.seeds for chunk in header.chunks),
        "header_bits": 8 * (len(blob) - sum(chunk.size for chunk in header.chunks)),
        "evaluated_bits": float((evaluated.rate - evaluated.log_mass_post_hoc).sum()) / math.log(2),
        "drawn_bits": drawn_bits(codec, levels),
        "encode_seconds": encoded - start,
        "decode_seconds": decoded - encoded,
    }


def drawn_bits(codec: Codec, levels: np.ndarray) -> float:
    """The bound with continuous latents, at the draws that the codec makes of them."""
    total = 0.0
    for start in range(0, len(levels), codec.chunk):
        stack = Stack()
        with _reproducible():
            for example in reversed(levels[start : start + codec.chunk]):
                cells = codec.bits_back.encode(stack, example.astype(np.int64), Roundings.knowing())
                total += -one_draw(codec, example, cells) / math.log(2)
    return total


def one_draw(codec: Codec, example: np.ndarray, cells: Sequence[Ints]) -> float:
    """Log p(x|z) + log p(z) − log q(z|x), in nats."""
    inside, likelihood = codec.bits_back.latents, codec.bits_back.likelihood
    x = torch.from_numpy(example.astype(np.int64)).double()[None] / codec.bits_back.top
    units = iter([torch.from_numpy((each - CELLS // 2 + 0.5) * CELL) for each in cells])
    network = inside.network
    ratios = []

    def choose(prior: Normal, posterior: Normal | None) -> Tensor:
        assert posterior is not None
        z = prior.loc.double() + prior.scale.double() * next(units).reshape(prior.loc.shape)
        ratios.append(float((log_normal(z, prior) - log_normal(z, posterior)).sum()))
        return z

    if network.has_descent:
        h = network.descend(choose, x)
    else:
        z = (torch.from_numpy(inside.mean) + torch.from_numpy(inside.std) * next(units))[None]
        ratios.append(float(network.prior.log_prob(z) - log_normal(z, network.posterior(x)).sum()))
        h = network.decode(z)
    return sum(ratios) + float(likelihood.log_mass(h.double(), x.double(), refitted=codec.bits_back.refitted))


def log_normal(z: Tensor, p: Normal) -> Tensor:
    mean, std = p.loc.double(), p.scale.double()
    return -0.5 * ((z - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def rivals(levels: np.ndarray, number: int) -> dict[str, Any]:
    """Bits and seconds of each rival: of each picture alone, and of sheets of them."""
    pictures = [picture(example) for example in levels.astype(np.uint8)]
    sheets = [np.concatenate(pictures[i : i + SHEET]) for i in range(0, len(pictures), SHEET)]
    coders: dict[str, Coder] = {
        "PNG": lambda array: saved(array, "PNG", optimize=True),
        "WebP": lambda array: saved(array, "WEBP", lossless=True, quality=100, method=6, exact=True),
    }
    try:
        from imagecodecs import jpegxl_encode

        coders["JPEG XL"] = lambda array: jpegxl_encode(array, lossless=True, effort=9)
    except ImportError:
        pass
    found = {}
    for name, coder in coders.items():
        for word, arrays in (("each alone", pictures), (f"sheets of {SHEET}", sheets)):
            found[f"{name}, {word}"] = timed(coder, arrays)
    found["xz -9, all bytes"] = timed(lambda array: lzma.compress(array.tobytes(), preset=9), [levels])
    return found


def picture(example: np.ndarray) -> np.ndarray:
    """Pixels ``(H, W)`` or ``(H, W, C)``."""
    return np.ascontiguousarray(example[0] if len(example) == 1 else np.moveaxis(example, 0, -1))


def saved(array: np.ndarray, form: str, **options: Any) -> bytes:
    file = BytesIO()
    Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


def timed(coder: Coder, arrays: Sequence[np.ndarray]) -> dict[str, float]:
    start = time.process_time()
    size = sum(len(coder(array)) for array in arrays)
    return {"bits": 8 * size, "seconds": time.process_time() - start}


def sizes(results: dict[str, Any]) -> list[str]:
    """Bits per value of ours and of every rival, as Markdown."""
    names = list(dict.fromkeys(name for result in results.values() for name in result["rivals"]))
    lines = [f"| run | test examples | ours | {' | '.join(names)} |", "| --- " * (len(names) + 3) + "|"]
    for run, result in results.items():
        rivals_ = [result["rivals"].get(name) for name in names]
        each = " | ".join("" if rival is None else f"{rival['bits'] / result['values']:.3f}" for rival in rivals_)
        lines.append(f"| `{run}` | {result['examples']} | {result['file_bits'] / result['values']:.3f} | {each} |")
    return lines


def gaps(results: dict[str, Any]) -> list[str]:
    """Where the bits of a file come from, per value, as Markdown."""
    lines = [
        "| run | evaluation | + the codec's own draws | + quantisation | + initial bits | + header | = file | coded / evaluation |",
        "| --- " * 8 + "|",
    ]
    for run, result in results.items():
        n, bound, drawn, coded = (result[key] for key in ("values", "evaluated_bits", "drawn_bits", "coded_bits"))
        parts = (drawn - bound, coded - drawn, result["initial_bits"], result["header_bits"])
        words = " | ".join(f"{part / n:+.4f}" for part in parts)
        lines.append(f"| `{run}` | {bound / n:.4f} | {words} | {result['file_bits'] / n:.4f} | {coded / bound - 1:+.2%} |")
    return lines


def speeds(results: dict[str, Any]) -> list[str]:
    """Seconds of ours, and kilobytes of data (a byte a value) per second of everybody's encoder, as Markdown."""
    names = [name for name in dict.fromkeys(n for result in results.values() for n in result["rivals"]) if "alone" not in name]
    lines = [
        f"| run | encode, s | decode, s | kB/s | {' | '.join(f'{n}, kB/s' for n in names)} |",
        "| --- " * (len(names) + 4) + "|",
    ]
    for run, result in results.items():
        rivals_ = [result["rivals"].get(name) for name in names]
        seconds = [result["encode_seconds"], *(None if rival is None else rival["seconds"] for rival in rivals_)]
        rates = ("" if each is None else f"{result['values'] / each / 1e3:,.0f}" for each in seconds)
        lines.append(f"| `{run}` | {result['encode_seconds']:.1f} | {result['decode_seconds']:.1f} | {' | '.join(rates)} |")
    return lines


if __name__ == "__main__":
    tyro.cli(main)
