"""Run the commands of docs/gallery.md, and join the picture that each of them writes: docs/pictures/gallery.png.

python -m benchmarks.gallery
"""

import os
import re
import shlex
import tempfile
from contextlib import chdir
from itertools import pairwise
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from PIL import Image

from sigma_vae.cli import main as sigma_vae

PAGE = Path("docs/gallery.md")
COLUMNS, TILE_INCHES, DPI = 2, 4.2, 80
SECTION = re.compile(r"^## (.+?)\n(.*?)^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections(page: Path) -> list[tuple[str, list[list[str]]]]:
    """Headings of the page, and the commands below each, without the program's name."""
    found = SECTION.findall(page.read_text(encoding="utf-8"))
    return [(title, [shlex.split(line)[1:] for line in block.splitlines()]) for title, _, block in found]


def picture_of(commands: list[list[str]]) -> Path:
    """The file that the last command was told to write."""
    return Path(commands[-1][commands[-1].index("--out") + 1])


def shorter(words: list[str], steps: int | None) -> list[str]:
    """The command with another number of steps, if it trains."""
    return [str(steps) if steps is not None and before == "--max-steps" else word for before, word in pairwise(["", *words])]


def main(out: Path = Path("docs/pictures/gallery.png"), steps: int | None = None) -> None:
    """Make the picture; with `steps`, trainings are as short."""
    out, found = out.resolve(), sections(PAGE)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same numbers on every machine of a kind
    rows = -(-len(found) // COLUMNS)
    figure = Figure((COLUMNS * TILE_INCHES, rows * TILE_INCHES), dpi=DPI, layout="constrained")
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for number, (title, commands) in enumerate(found, 1):
            for words in commands:
                if sigma_vae(shorter(words, steps)):
                    raise SystemExit(f"this command of {PAGE} failed: sigma-vae {shlex.join(words)}")
            axes = figure.add_subplot(rows, COLUMNS, number)
            with Image.open(picture_of(commands)) as picture:
                axes.imshow(picture.convert("RGB"))
            axes.set_title(title, fontsize=11)
            axes.axis("off")
    figure.savefig(out)
    with Image.open(out) as whole:
        small = whole.convert("RGB").quantize(32)
    small.save(out, optimize=True)


if __name__ == "__main__":
    tyro.cli(main)
