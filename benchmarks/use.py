"""What a user waits for: processor seconds, wall, memory and first output of each command on seven data sets.

    python -m benchmarks.use --folder /tmp/use

Data that are not there are made in the folder: 30 000 small JPEGs, a table of a million rows and 50 columns, and a mapped array of
6 GB. Each command runs in a process of its own, in a terminal of its own. Memory is the largest anonymous resident set, without pages
of files, which the kernel takes back at will. A cell above its budget is marked, and the exit code is 1.
"""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import tyro

SHORT = 3
"""Steps of the shortest training."""
LONGER = 30
"""Steps of the training whose run the other commands are given."""
PATIENCE = 1.1
"""A command is ended after so many times its processor seconds."""
PICTURES, PICTURE_SIDE = 30_000, 64
ROWS, COLUMNS = 1_000_000, 50
IMAGES, IMAGE_SHAPE = 500_000, (3, 64, 64)
NOISY = 1000
"""Every so many-th image of the mapped array is noise; the others are zeros, which take no room on the disk."""

ONCE = {
    "import torch": ["-c", "import torch"],
    "import sigma_vae": ["-c", "import sigma_vae"],
    "--help": ["-m", "sigma_vae", "--help"],
    "train --help": ["-m", "sigma_vae", "train", "--help"],
}
COMMANDS = {
    "inspect": "inspect DATA",
    f"train, {SHORT} steps": f"train DATA --max-steps {SHORT} --out RUN-short",
    f"train, {LONGER} steps": f"train DATA --max-steps {LONGER} --out RUN",
    "evaluate": "evaluate RUN",
    "calibrate": "calibrate RUN",
    "sample": "sample RUN",
    "reconstruct": "reconstruct RUN",
    "encode": "encode RUN",
    "score": "score RUN",
    "report": "report RUN",
}
DATA = ("digits", "mnist-5k", "fashion-mnist", "pictures", "table.csv", "moving-mnist", "images.npy")
FIGURES = {
    "cpu_seconds": "s of the processor",
    "wall_seconds": "s",
    "megabytes": "MB",
    "first_output_seconds": "s to the first output",
}

SMALL = ("digits", "mnist-5k")
BUDGETS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "import torch": ((4, 250), (4, 250)),
    "import sigma_vae": ((0.3, 50), (0.3, 50)),
    "--help": ((0.3, 50), (0.3, 50)),
    "train --help": ((5, 250), (5, 250)),
    "inspect": ((8, 500), (30, 1500)),
    f"train, {SHORT} steps": ((16, 700), (60, 2000)),
    f"train, {LONGER} steps": ((24, 700), (120, 2000)),
    "evaluate": ((16, 700), (90, 2000)),
    "calibrate": ((16, 700), (90, 2000)),
    "sample": ((8, 450), (30, 1500)),
    "reconstruct": ((10, 600), (30, 1500)),
    "encode": ((12, 600), (60, 1500)),
    "score": ((12, 600), (60, 1500)),
    "report": ((12, 600), (45, 1500)),
}
"""Processor seconds and megabytes of a command: on small data, and on all others."""

Measured = dict[str, Any]


def main(
    out: Path = Path("benchmarks/results/use.json"),
    folder: Path = Path("use"),
    data: tuple[str, ...] = DATA,
    commands: tuple[str, ...] = tuple(COMMANDS),
    at_once: int = 2,
) -> None:
    """Measure, write the results as JSON, print the table.

    Args:
        out: file of the results; cells that are not measured now are kept.
        folder: of the data that are made, and of the runs, which are removed first.
        data: the columns to measure.
        commands: the rows to measure.
        at_once: columns that are measured at the same time, each on a core.
    """
    folder, out = folder.resolve(), out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Measured]] = json.loads(out.read_text())["results"] if out.exists() else {}
    for name, arguments in ONCE.items():
        results.setdefault(name, {})[""] = shown(name, "", waited_for(arguments, folder, budget(name, "")[0]))
    record = {"command": f"python -m benchmarks.use --data {' '.join(data)}", "cores": os.cpu_count(), "results": results}
    with ThreadPoolExecutor(at_once) as pool:
        order = data[::-1]  # the long ones first
        for source, measured in zip(order, pool.map(partial(column, folder=folder, commands=commands), order), strict=True):
            for name, found in measured.items():
                results.setdefault(name, {})[source] = found
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(results)))
    sys.exit(bool(list(over(results))))


def column(source: str, folder: Path, commands: tuple[str, ...]) -> dict[str, Measured]:
    """Measure commands on some data, one after the other."""
    path, run = made(source, folder), folder / f"run-{source}"
    measured: dict[str, Measured] = {}
    for name in commands:
        words = {"DATA": path, "RUN": str(run), "RUN-short": f"{run}-short"}
        arguments = [words.get(word, word) for word in COMMANDS[name].split()]
        if arguments[0] == "train":
            shutil.rmtree(arguments[-1], ignore_errors=True)
        seconds, _ = budget(name, source)
        measured[name] = shown(name, source, waited_for(["-m", "sigma_vae", *arguments], folder, seconds))
    return measured


def made(source: str, folder: Path) -> str:
    """Name or path of the data; a process of its own makes them, whose memory is then no one's."""
    makers = {"pictures": "pictures", "table.csv": "numbers", "images.npy": "images"}
    if source not in makers:
        return source
    path = folder / source
    if not path.exists():
        code = f"from pathlib import Path; from benchmarks.use import {makers[source]} as make; make(Path({str(path)!r}))"
        subprocess.run([sys.executable, "-c", code], check=True)
    return str(path)


def pictures(path: Path) -> None:
    """JPEGs cut from two photographs."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs, random = load_sample_images().images, np.random.default_rng(0)
    path.mkdir()
    for number in range(PICTURES):
        photograph = photographs[number % 2]
        top, left = (int(random.integers(size - PICTURE_SIDE)) for size in photograph.shape[:2])
        Image.fromarray(photograph[top : top + PICTURE_SIDE, left : left + PICTURE_SIDE]).save(
            path / f"{number:06d}.jpg", quality=90
        )


def numbers(path: Path) -> None:
    """Columns that share ten factors, with four digits after the point."""
    import numpy as np
    import pandas as pd

    random = np.random.default_rng(0)
    values = random.normal(size=(ROWS, 10)) @ random.normal(size=(10, COLUMNS)) + random.normal(size=(ROWS, COLUMNS))
    pd.DataFrame(values, columns=[f"c{number}" for number in range(COLUMNS)]).to_csv(path, index=False, float_format="%.4f")


def images(path: Path) -> None:
    """Bytes in a sparse file."""
    import numpy as np

    random = np.random.default_rng(0)
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (IMAGES, *IMAGE_SHAPE))
    for number in range(0, IMAGES, NOISY):
        array[number] = random.integers(256, size=IMAGE_SHAPE, dtype=np.uint8)


def waited_for(arguments: list[str], folder: Path, seconds: float) -> Measured:
    """Run Python in a terminal and this folder, and measure it until it ends or these processor seconds are used up."""
    ours, theirs = pty.openpty()
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, cwd=folder)
    os.close(theirs)
    first, peak, said = None, 0.0, b""
    while (text := read(ours)) is not None:
        first = first or (time.perf_counter() - begin if text else None)
        said = (said + text)[-2000:]
        peak = max(peak, anonymous_megabytes(process.pid))
        if seconds_of(process.pid) > PATIENCE * seconds:
            process.send_signal(signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    os.close(ours)
    found = {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": time.perf_counter() - begin,
        "megabytes": peak,
        "first_output_seconds": first,
    }
    if process.returncode:
        found["ended"] = "over the limit" if process.returncode < 0 else said.decode(errors="replace").strip().splitlines()[-1]
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in found.items()}


def read(terminal: int) -> bytes | None:
    """The next output, nothing after a twentieth of a second without any, or None once it is closed."""
    if not select.select([terminal], [], [], 0.05)[0]:
        return b""
    try:
        return os.read(terminal, 65536) or None
    except OSError:  # Linux says so where the last process at the other end has gone
        return None


def anonymous_megabytes(pid: int) -> float:
    """Resident memory that is not a file's."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def seconds_of(pid: int) -> float:
    """Processor seconds so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def shown(name: str, source: str, found: Measured) -> Measured:
    print(name, source, found, flush=True)
    return found


def budget(name: str, source: str) -> tuple[float, float]:
    """Processor seconds and megabytes that a cell may take."""
    small, large = BUDGETS[name]
    return small if source in ("", *SMALL) else large


def over(results: dict[str, dict[str, Measured]]) -> Iterator[tuple[str, str]]:
    """The cells above their budgets."""
    for name, row in results.items():
        for source, found in row.items():
            seconds, megabytes = budget(name, source)
            if found["cpu_seconds"] > seconds or found["megabytes"] > megabytes:
                yield name, source


def table(results: dict[str, dict[str, Measured]]) -> Iterator[str]:
    """Markdown: each cell's processor seconds and megabytes of its budget, and when its first output came, of its whole time."""
    yield "| | s of the processor | s | MB | s to the first output |"
    yield "| --- | --- | --- | --- | --- |"
    for name in ONCE:
        yield f"| `{name}` | " + " | ".join(f"{results[name][''][key] or 0:.2g}" for key in FIGURES) + " |"
    sources = [source for source in DATA if any(source in row for row in results.values())]
    yield ""
    yield f"| | {' | '.join(sources)} |"
    yield "| --- |" + " --- |" * len(sources)
    beyond = set(over(results))
    for name in COMMANDS:
        cells = [cell(name, source, results.get(name, {}).get(source), (name, source) in beyond) for source in sources]
        yield f"| {name} | {' | '.join(cells)} |"


def cell(name: str, source: str, found: Measured | None, beyond: bool) -> str:
    """One cell."""
    if found is None:
        return ""
    if "ended" in found and found["ended"] != "over the limit":
        return "refused"
    seconds, megabytes = budget(name, source)
    first = f"first {found['first_output_seconds'] or 0:.1f} s of {found['wall_seconds']:.1f}"
    return f"{'**over** ' * beyond}{found['cpu_seconds']:.1f} of {seconds:g} s, {found['megabytes']:.0f} of {megabytes:g} MB, {first}"


if __name__ == "__main__":
    tyro.cli(main)
