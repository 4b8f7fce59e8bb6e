"""Feed the command line, configs, data files, run folders and likelihoods with broken input; only one-line errors may come back.

    python -m benchmarks.fuzz --inputs 20000 --seed 0 --out benchmarks/results/fuzz.json

Every input is made from the seed and its number, so ``--only 1234`` repeats one. An input fails where a command raises anything
but one line of text, prints a warning, kills the process, or takes longer than ``--patience`` seconds.
"""

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
import yaml
from PIL import Image

from sigma_vae import models
from sigma_vae.cli import COMMANDS
from sigma_vae.cli import main as command_line
from sigma_vae.config import RunConfig, read
from sigma_vae.registry import register

TRAINING = ("'train'", "'resume'", "'replay'", "'rerun'", "'study'")
"""Commands that may take long for a good reason: broken input can ask for many steps."""
MEMORY = 12 * 2**30
"""Bytes of address space that a process may take beyond what it has."""

NUMBERS = (
    "0 -1 1 2 3 0.5 -0.0 1e-3 1e-400 1e308 -1e308 nan inf -inf 1000000000 99999999999999999999 0x10 1_000 1,5"
).split()  # fmt: skip
STRANGE = ["", " ", "é", "🦊", "/dev/null", "a b", "%s%n", "{}", "'", '"', "\\", "\n", "x" * 5000]
NAMES = (
    "None True false .. / ~ -- -h : a:b:c digits mlp conv residual hierarchical:tiny hierarchical:8x2 hierarchical: sequence gaussian"
    " gaussian/optimal gaussian/fixed:0 gaussian/fixed:nan gaussian/fixed:1e300 student-t/optimal bernoulli categorical bitwise beta"
    " logistic-mixture logistic-mixture:0 mixture:5 mixture:-1 flow standard cpu cuda:99 meta float16 bf16 auto"
).split()  # fmt: skip
WORDS = STRANGE + NAMES


class Outcome(NamedTuple):
    """How an input ended: ``done``, ``refused``, ``slow`` (a training) or ``failed``, and the last words."""

    number: int
    part: str
    kind: str
    about: str
    said: str


def main(
    out: Path, inputs: int = 20_000, seed: int = 0, processes: int = 2, patience: int = 60, only: int | None = None
) -> None:
    """Try so many inputs, write what came of them as JSON, and print each that failed."""
    with tempfile.TemporaryDirectory() as folder:
        seeds = Seeds(Path(folder))
        seeds.make()
        numbers = range(inputs) if only is None else [only]
        outcomes = list(attempts(seeds.folder, numbers, seed, processes, patience))
    failed = [outcome._asdict() for outcome in outcomes if outcome.kind == "failed"]
    counts = Counter(f"{outcome.part} {outcome.kind}" for outcome in outcomes)
    command = f"python -m benchmarks.fuzz --inputs {inputs} --seed {seed}"
    record = {"command": command, "inputs": len(outcomes), "counts": dict(sorted(counts.items())), "failed": failed}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"inputs": len(outcomes), **dict(sorted(counts.items()))}, indent=1))


def attempts(folder: Path, numbers: "range | list[int]", seed: int, processes: int, patience: int) -> Iterator[Outcome]:
    """Try the inputs in processes of their own; where one dies, the inputs that it had are tried one by one."""
    chunks = [list(numbers)[i : i + 50] for i in range(0, len(numbers), 50)]
    while chunks:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            pending = [(chunk, pool.submit(_chunk, folder, chunk, seed, patience)) for chunk in chunks]
            chunks = []
            for chunk, future in pending:
                try:
                    results = future.result()
                except Exception as error:
                    if len(chunk) == 1:
                        results = [
                            Outcome(chunk[0], PARTS[chunk[0] % len(PARTS)].__name__, "failed", "", f"the process died: {error}")
                        ]
                    else:
                        chunks += [[number] for number in chunk]
                        continue
                for outcome in results:
                    if outcome.kind == "failed":
                        print(outcome.number, outcome.part, outcome.about, outcome.said, sep="\n  ", flush=True)
                    yield outcome


def _chunk(folder: Path, numbers: list[int], seed: int, patience: int) -> list[Outcome]:
    torch.set_num_threads(1)
    for category in (UserWarning, RuntimeWarning):  # those that a user would see
        warnings.simplefilter("error", category)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, _too_long)
    return [attempt(Seeds(folder), number, seed, patience) for number in numbers]


def _too_long(*_: object) -> None:
    raise TooLong("took too long")


class TooLong(BaseException):
    """Not an Exception, so that no handler takes it for an error of the input."""


def attempt(seeds: "Seeds", number: int, seed: int, patience: int) -> Outcome:
    """Try one input, in a folder of its own."""
    part = PARTS[number % len(PARTS)]
    chance = random.Random(f"{seed}-{number}")
    about: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        before = Path.cwd()
        os.chdir(place)
        signal.alarm(patience)
        try:
            kind, said = part(seeds, chance, about)
        except TooLong:
            kind, said = ("slow" if any(word in about for word in TRAINING) else "failed"), "took too long"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind, said = "failed", f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
        finally:
            signal.alarm(0)
            os.chdir(before)
    return Outcome(number, part.__name__, kind, " ".join(about)[:500], said)


def run(words: list[str], about: list[str]) -> tuple[str, str]:
    """Run a command in this process; an error must be one line and an exit code of 1 or 2."""
    about += ["sigma-vae", *(repr(word) for word in words)]
    said, printed = io.StringIO(), io.StringIO()
    with redirect_stderr(said), redirect_stdout(printed):
        try:
            code = command_line(words)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 2
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    if code == 0:
        return ("done", "")
    if code == 2 and lines and "For full helptext" in lines[-1] + lines[-2]:
        return "refused", "usage"  # tyro's box about a wrong option
    if code in (1, 2) and lines and not any(line.startswith(("Traceback", "  File")) for line in lines) and len(lines) <= 1:
        return "refused", lines[-1][:300]
    return "failed", f"exit code {code}, {len(lines)} lines: {' | '.join(lines)[-600:]}"


class Seeds:
    """Whole files and runs, from which broken ones are made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self) -> None:
        """Make them: one file of each format, and two runs."""
        files, chance = self.folder / "files", np.random.default_rng(0)
        files.mkdir()
        pictures = chance.integers(0, 256, (30, 8, 8), dtype=np.uint8)
        rows = chance.normal(size=(40, 3))
        np.save(files / "pictures.npy", pictures)
        np.save(files / "rows.npy", rows)
        np.savez_compressed(files / "both.npz", train=pictures[:20], test=pictures[20:], y=np.arange(30))
        text = "\n".join(["a,b,kind", *(f"{a:.3f},{b:.3f},{'xyz'[i % 3]}" for i, (a, b, _) in enumerate(rows))])
        (files / "rows.csv").write_text(text)
        (files / "rows.tsv").write_text(text.replace(",", "\t"))
        import h5py
        import pandas as pd

        with h5py.File(files / "data.h5", "w") as file:
            file["train/x"], file["y"] = pictures, np.arange(30)
        pd.DataFrame(rows, columns=list("abc")).to_parquet(files / "rows.parquet")
        with zipfile.ZipFile(files / "pictures.zip", "w") as archive:
            for i, picture in enumerate(pictures):
                file = io.BytesIO()
                Image.fromarray(picture).save(file, "png")
                archive.writestr(f"{i}.png", file.getvalue())
        pages = [Image.fromarray(picture) for picture in pictures]
        pages[0].save(files / "clip.gif", save_all=True, append_images=pages[1:])
        for ending in ("png", "tif", "jpg", "webp", "bmp"):
            (files / f"folder-{ending}").mkdir()
            for i in range(8):
                pages[i].save(files / f"folder-{ending}" / f"{i}.{ending}")
        small = ["--network", "mlp", "--width", "8", "--latent-dim", "2", "--max-steps", "2", "--batch-size", "10"]
        for name, data in (("images", str(files / "pictures.npy")), ("table", str(files / "rows.csv"))):
            with redirect_stdout(io.StringIO()):
                assert command_line(["train", data, *small, "--out", str(self.folder / name)]) == 0

    def files(self) -> list[Path]:
        """The files and folders of data."""
        return sorted(path for path in (self.folder / "files").iterdir() if not path.name.startswith("."))

    def runs(self) -> list[Path]:
        """The runs."""
        return [self.folder / "images", self.folder / "table"]


@cache
def options(command: str) -> list[tuple[str, list[str]]]:
    """The options of a command and the words that its help offers for each."""
    text = io.StringIO()
    with redirect_stdout(text):
        try:
            command_line([*command.split(), "--help"])
        except SystemExit:
            pass
    found = re.findall(r"(--[a-z][a-z0-9-]+)(?: \{([^}]*)\})?", text.getvalue())
    return [(name, re.split(r"[,\s│]+", choices) if choices else []) for name, choices in found if name != "--help"]


def words(seeds: Seeds, chance: random.Random, about: list[str]) -> tuple[str, str]:
    """A command with options and values from anywhere."""
    command = chance.choice(
        [name for name, made in COMMANDS.items() if not made.commands] + ["study run", "study table", "study report"]
    )
    source = chance.choice(seeds.files() + seeds.runs() * 4 + [Path("digits"), Path("nothing"), Path("/dev/null")])
    given = command.split()
    if chance.random() < 0.95:
        given.append(str(copied(source)))
    if command in ("train", "replay", "resume", "study run"):
        given += ["--max-steps", "1", "--network", "mlp", "--width", "4"] if command == "train" else []
    known = options(command)
    for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
        name, choices = chance.choice(known) if known and chance.random() < 0.95 else ("--" + chance.choice(WORDS)[:30], [])
        given.append(name)
        for _ in range(chance.choice([0, 1, 1, 1, 1, 1, 2])):
            pool = choices if choices and chance.random() < 0.4 else chance.choice([NUMBERS, WORDS])
            given.append(chance.choice(pool))
    return run(given, about)


def copied(source: Path) -> Path:
    """A copy of a file or folder in this folder, which a command may change; a name of data stays as it is."""
    target = Path(source.name)
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.is_file():
        shutil.copy(source, target)
    return target if target.exists() else source


def configs(seeds: Seeds, chance: random.Random, about: list[str]) -> tuple[str, str]:
    """A config.yaml with values exchanged, or its text broken; read, and sometimes trained."""
    whole = (chance.choice(seeds.runs()) / "config.yaml").read_bytes()
    path = Path("config.yaml")
    if chance.random() < 0.7:
        tree = yaml.safe_load(whole)
        for _ in range(chance.choice([1, 1, 2])):
            exchange(tree, chance, about)
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    else:
        path.write_bytes(broken(whole, chance, about))
    try:
        read(path, RunConfig)
    except ValueError as error:
        return one_line(str(error))
    return run(["replay", "config.yaml", "--out", "new"], about) if chance.random() < 0.2 else ("done", "")


def exchange(tree: dict[str, object], chance: random.Random, about: list[str]) -> None:
    """Exchange one value, wherever it is."""
    place: object = tree
    while isinstance(place, dict) and place:
        key = chance.choice(sorted(place, key=str))
        if not isinstance(place[key], dict) or chance.random() < 0.1:
            values: list[object] = [
                None,
                True,
                [],
                {},
                [1],
                {"a": 1},
                "",
                -1,
                0,
                1,
                10**9,
                10**30,
                1e308,
                float("nan"),
                float("inf"),
                -0.5,
            ]
            place[key] = chance.choice([*values, *WORDS])
            about.append(f"{key}={place[key]!r:.60}")
            return
        place = place[key]


def broken(content: bytes, chance: random.Random, about: list[str]) -> bytes:
    """Bytes with some cut, turned, doubled, or replaced."""
    content = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        way = chance.choice(["cut", "flip", "flip", "flip", "insert", "remove", "double", "number", "zeros", "text"])
        at = chance.randrange(len(content) + 1) if chance.random() < 0.6 else min(len(content), chance.randrange(200))
        about.append(f"{way}@{at}")
        span = chance.choice([1, 2, 4, 16, 100])
        if way == "cut":
            del content[at:]
        elif way == "flip" and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif way == "insert":
            content[at:at] = chance.randbytes(span)
        elif way == "remove":
            del content[at : at + span]
        elif way == "double":
            content[at:at] = content[at : at + span]
        elif way == "number":
            content[at : at + 4] = struct.pack("<I", chance.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))
        elif way == "zeros":
            content[at : at + span] = bytes(span)
        else:
            content[at:at] = chance.choice([*NUMBERS, *WORDS]).encode()[:50]
    return bytes(content)


def data_files(seeds: Seeds, chance: random.Random, about: list[str]) -> tuple[str, str]:
    """A broken data file, or a folder with one; inspected, and sometimes trained on."""
    target = copied(chance.choice(seeds.files()))
    about.append(target.name)
    files = sorted(target.iterdir()) if target.is_dir() else [target]
    for path in chance.sample(files, chance.choice([1, 1, len(files)])):
        path.write_bytes(broken(path.read_bytes(), chance, about))
    if chance.random() < 0.8:
        return run(["inspect", str(target)], about)
    return run(["train", str(target), "--network", "mlp", "--width", "4", "--max-steps", "1", "--out", "run"], about)


RUN_COMMANDS = ("evaluate", "sample", "reconstruct", "encode", "score", "calibrate", "fit-prior", "resume", "rerun", "compare")


def run_folders(seeds: Seeds, chance: random.Random, about: list[str]) -> tuple[str, str]:
    """A run with broken files, and a command on it."""
    source = chance.choice(seeds.runs())
    shutil.copytree(source, "run")
    files = sorted(path for path in Path("run").rglob("*") if path.is_file())
    for path in chance.sample(files, chance.choice([1, 1, 1, 2, len(files)])):
        about.append(path.name)
        way = chance.random()
        if way < 0.1:
            path.unlink()
        elif way < 0.4 and path.suffix == ".json":
            tree = json.loads(path.read_text(encoding="utf-8"))
            exchange(tree, chance, about)
            path.write_text(json.dumps(tree), encoding="utf-8")
        else:
            path.write_bytes(broken(path.read_bytes(), chance, about))
    command = chance.choice(RUN_COMMANDS)
    return run([command, "run", *([str(source)] if command == "compare" else [])], about)


DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64]


def likelihoods(seeds: Seeds, chance: random.Random, about: list[str]) -> tuple[str, str]:
    """A likelihood from Python, with tensors that have mostly one thing wrong."""
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    channels, space = chance.choice([1, 1, 2, 3, 3]), chance.choice([(), (4,), (4, 4), (4, 4), (2, 2, 2), (0, 4)])
    family = chance.choice(sorted(register.likelihood.names()))
    scale = chance.choice(["/" + name for name in register.scale.names()] + ["/fixed:0.1", "/beta:0.5", "/fixed:-1", ""])
    name = family + (scale if family in LOCATION_SCALE or chance.random() < 0.05 else "")
    levels = chance.choice([None, 2, 16, 256, 256, 65536])
    about += [name, str(channels), str(space), str(levels)]
    try:
        likelihood = models.likelihood(name, channels, spatial_dims=len(space), levels=levels).train(chance.random() < 0.5)
        batch = chance.choice([0, 1, 2])
        wrong = chance.choice(["nothing", "h", "x", "both"])
        h = _tensor([batch, likelihood.in_channels, *space], wrong in ("h", "both"), None, chance, generator, about)
        x = _tensor([batch, channels, *space], wrong in ("x", "both"), levels, chance, generator, about)
        distribution = likelihood.distribution(h, x)
        results = [distribution.log_prob(x), distribution.sample(), likelihood.log_mass(h, x) if levels else x]
    except (ValueError, TypeError) as error:
        return one_line(str(error))
    del results
    return "done", ""


LOCATION_SCALE = ("gaussian", "laplace", "logistic", "student-t")


def _tensor(
    shape: list[int], wrong: bool, levels: int | None, chance: random.Random, generator: torch.Generator, about: list[str]
) -> torch.Tensor:
    way = chance.choice(["shape", "value", "type"]) if wrong else ""
    if way == "shape":
        shape = chance.choice([[], [1], shape[1:], [*shape, 1], [7, *shape[1:]], shape[:1], [0] * len(shape)])
    values = torch.rand(shape, generator=generator, dtype=torch.float64)
    if levels and chance.random() < 0.9:
        values = (values * (levels - 1)).round() / (levels - 1)
    if way == "value":
        values = values * chance.choice([0.0, -1.0, 255.0, 1e30, -1e30, 1e-30, 1e300, float("nan"), float("inf")])
    dtype = chance.choice(DTYPES) if way == "type" else torch.float32
    about.append(f"{tuple(shape)}:{dtype}:{way}")
    return values.to(dtype)


def one_line(text: str) -> tuple[str, str]:
    """An error's text, which must be a line."""
    return (
        ("refused", text[:300])
        if text.strip() and len(text.strip().splitlines()) == 1
        else ("failed", f"not one line: {text[:300]}")
    )


PARTS: list[Callable[[Seeds, random.Random, list[str]], tuple[str, str]]] = [
    words,
    configs,
    data_files,
    run_folders,
    likelihoods,
]
"""The kinds of input, in turn."""

if __name__ == "__main__":
    tyro.cli(partial(main))
