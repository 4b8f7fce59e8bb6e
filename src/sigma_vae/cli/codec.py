"""Commands that compress data by a model's probabilities, and restore them."""

import json as json_module
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from sigma_vae import runs
from sigma_vae.cli.options import RunFolder, to_read
from sigma_vae.cli.outputs import Split, checked
from sigma_vae.codec import Codec, Unpacked
from sigma_vae.codec.lossless import CHUNK, Array, Damaged, DamagedError, read
from sigma_vae.config import replacing, write_whole
from sigma_vae.data.pictures import picture_endings
from sigma_vae.data.stores import Store
from sigma_vae.models import Saved
from sigma_vae.progress import bar

MODES = ("1", "L", "LA", "RGB", "RGBA", "I;16")
"""Pillow's modes whose values are kept."""
MOST_CHANNELS = 4
CHUNK_OF_STORE = 256

Sources = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[FILES|DATA ...]")]
File = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
YesNo = Literal["yes", "no"]


def compress(
    run: RunFolder,
    sources: Sources = (),
    *,
    out: str,
    split: Split = "test",
    raw: YesNo = "no",
    check: YesNo = "yes",
    chunk: int = CHUNK,
    json: bool = False,
) -> None:
    """Compress pictures or DATA without loss, to the size that the model's bound says.

    The file is decoded and compared before it is written. ``decompress`` needs the run, and a machine that computes the same
    numbers to within a margin far above the last digits.

    Args:
        run: Folder of the run.
        sources: Pictures and folders of pictures, whose values are kept, not their metadata; or one data set or array file;
            the run's own data unless given.
        out: File to write, ending in .sv.
        split: Split to compress, of data that have splits.
        raw: Store pictures that the model cannot represent (of another size, or with values off its levels) as they are;
            otherwise they are refused.
        check: Decode the file before it is written; no takes half of the time.
        chunk: Number of examples coded in one chain. Shorter ones lose less to a damaged byte, longer ones share the initial
            bits among more examples.
        json: Print JSON only.
    """
    path = checked(Path(out), (".sv",))
    saved = runs.open_model(to_read(run), "cpu")
    examples, about = _examples(to_read(run), saved, sources, split)
    if not examples:
        raise ValueError("there is nothing to compress: no example was given")
    with bar("compressing", len(examples) * (1 + (check == "yes"))) as advance:
        codec = Codec(saved.vae, saved.shape, chunk=chunk, check=check == "yes", on_example=advance)
        blob = codec.pack(examples, raw=raw == "yes", about=about)
    write_whole(path, blob)
    found = _account(blob, examples)
    print(json_module.dumps(found) if json else _sentence(path, found))


def decompress(run: RunFolder, file: File, *, out: str, damaged: Damaged = "refuse") -> None:
    """Restore what ``compress`` wrote.

    Pictures come back as PNG files with their names, other data as examples.npy, the levels in their order.

    Args:
        run: Folder of the run that compressed the file.
        file: File to read.
        out: Folder to write, new or empty.
        damaged: Refuse a damaged file, or skip the examples that are lost.
    """
    folder = Path(out)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder; give a new one")
    saved = runs.open_model(to_read(run), "cpu")
    blob = Path(file).read_bytes()
    try:
        with bar("decompressing", read(blob).header.examples) as advance:
            found = Codec(saved.vae, saved.shape, on_example=advance).unpack(blob, damaged)
    except DamagedError as error:
        remedy = "; --damaged skip restores those that are whole" if error.whole else ""
        raise ValueError(f"{file}: {error}{remedy}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    _restore(folder, found, saved)


def _examples(run: Path, saved: Saved, sources: Sequence[str], split: Split) -> tuple[list[Array], dict[str, Any]]:
    """Examples as levels (pictures off the levels as floats), and what the file keeps about them."""
    if pictures := _pictures(sources):
        return [_pixels(path, saved.scaling.levels) for path in pictures.values()], {"names": list(pictures)}
    if len(sources) > 1:
        raise ValueError(f"expected pictures, folders of pictures, or one data set or file, got {' '.join(sources)}")
    if sources:
        return _levels(runs.new_data(run, saved, sources[0], split).batches.store), {"source": sources[0], "split": split}
    data = runs.open_run(run, "cpu").data
    return _levels(data.store(split)), {"source": data.name, "split": split}


def _levels(store: Store) -> list[Array]:
    parts = torch.split(torch.arange(len(store)), CHUNK_OF_STORE)
    return [example for positions in parts for example in store.take(positions).numpy()]


def _pictures(sources: Sequence[str]) -> dict[str, Path]:
    """Picture files by their names, relative to the folder that was given; empty if a source is something else."""
    found: dict[str, Path] = {}
    places: dict[PurePosixPath, str] = {}
    for source in map(Path, sources):
        inside = sorted(source.rglob("*")) if source.is_dir() else [source]
        files = [path for path in inside if path.is_file() and path.suffix.lower() in picture_endings()]
        if not files:
            return {}
        for path in files:
            name = (path.relative_to(source) if source.is_dir() else Path(path.name)).as_posix()
            if (place := _inside(name)) in places:
                raise ValueError(f"{path} and {found[places[place]]} would be restored as {place}; compress them apart")
            places[place] = name
            found[name] = path
    return found


def _pixels(path: Path, levels: int | None) -> Array:
    """A picture's levels ``(C, H, W)``; its values, as floats, where they are off the levels."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            whole = image.convert("RGBA" if "transparency" in image.info else "RGB") if image.mode == "P" else image
            if (image.format, image.mode) == ("PNG", "I"):  # 16-bit grey, as old versions of Pillow call it
                whole = image.convert("I;16")
            if whole.mode not in MODES or getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"it has the mode {image.mode} and {getattr(image, 'n_frames', 1)} frames")
            values = np.asarray(whole.convert("L") if whole.mode == "1" else whole)
    except (OSError, SyntaxError, Image.DecompressionBombError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be kept without loss: {error}; convert it to a PNG of grey levels or colours"
        ) from error
    channels_first = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    step = _step(levels)
    off = step is None or values.dtype != _dtype(levels) or bool((channels_first % step).any())
    return channels_first.astype(np.float32) if off else channels_first // step


def _dtype(levels: int | None) -> np.dtype[Any]:
    """Type of the values of pictures with so many levels."""
    return np.dtype(np.uint16 if levels is not None and levels > 256 else np.uint8)


def _step(levels: int | None) -> int | None:
    """Distance of two levels in a picture; None if a picture cannot have such levels."""
    top = int(np.iinfo(_dtype(levels)).max)
    return None if levels is None or top % (levels - 1) else top // (levels - 1)


def _restore(folder: Path, found: Unpacked, saved: Saved) -> None:
    names = found.about.get("names")
    if names is None:
        path = folder / "examples.npy"
        with replacing(path) as aside:
            np.save(aside, np.stack(found.examples))
        print(f"{path}: {len(found.examples)} examples, as levels")
        return
    if not isinstance(names, list) or len(names) <= max(found.positions, default=-1):
        raise ValueError("the file does not have a name for each of its pictures")
    for position, example in zip(found.positions, found.examples, strict=True):
        _write_picture(folder / _inside(names[position]), example, saved.scaling.levels)
    print(f"{folder}: {len(found.examples)} pictures")


def _inside(name: object) -> PurePosixPath:
    """Where a picture is restored: a name, perhaps from a hostile file, inside of the folder, with .png added to others."""
    path = PurePosixPath(name if isinstance(name, str) else "")
    if path.is_absolute() or not path.name or ".." in path.parts or any(c in path.as_posix() for c in "\\:\0"):
        raise ValueError(f"a picture is named {name!r}, which is no name inside of a folder that it could be restored to")
    return path if path.suffix == ".png" else path.with_name(path.name + ".png")


def _write_picture(path: Path, example: Array, levels: int | None) -> None:
    from PIL import Image

    raw = example.dtype.kind == "f"
    values = example if raw else example.astype(np.int64) * (_step(levels) or 1)
    dtype = np.dtype(np.uint16 if example.max() > 255 else np.uint8) if raw else _dtype(levels)
    if not 1 <= len(values) <= MOST_CHANNELS:
        raise ValueError(f"{path.name} would have {len(values)} channels, which no picture has")
    image = Image.fromarray((values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)).astype(dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        image.save(aside, "PNG")


def _account(blob: bytes, examples: Sequence[Array]) -> dict[str, Any]:
    """Bytes of the file and of its parts."""
    header = read(blob).header
    values = sum(example.size for example in examples)
    coded = sum(chunk.size for chunk in header.chunks)
    raw = header.raw.size if header.raw else 0
    return {
        "examples": len(examples),
        "raw_examples": len(header.raw_positions),
        "values": values,
        "bytes": len(blob),
        "bits_per_value": 8 * len(blob) / values,
        "initial_bytes": 4 * sum(chunk.seeds for chunk in header.chunks),
        "raw_bytes": raw,
        "noted": sum(len(notes) for chunk in header.chunks for notes in chunk.noted),
        "header_bytes": len(blob) - coded - raw,
        "model": header.model,
    }


def _sentence(path: Path, found: dict[str, Any]) -> str:
    raw = f", {found['raw_examples']} of them stored as they are" if found["raw_examples"] else ""
    return (
        f"{path}: {found['bytes']} bytes for {found['examples']} examples{raw}; {found['bits_per_value']:.3f} bits a value, of which"
        f" the initial bits are {8 * found['initial_bytes'] / found['values']:.3f} and the header"
        f" {8 * found['header_bytes'] / found['values']:.3f}"
    )
