"""The working tree beside a commit, in five minutes: ratios with their spread.

    python -m benchmarks.quick --against main

The commit is checked out aside. Both trees are measured by this file, in turns, each time in a process of its own with one thread;
numbers are the processor's, and ratios (this tree by the commit) are taken within a round. A ratio above 1 is slower.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

import tyro

COMMANDS = {
    "import sigma_vae.runs, s": ["-c", "import sigma_vae.runs"],
    "train --help, s": ["-m", "sigma_vae", "train", "--help"],
    "inspect digits, s": ["-m", "sigma_vae", "inspect", "digits"],
}
TINY_STEPS, CONV_STEPS, LOSS_STEPS = 600, 8, 60
WARMUP = 3
"""One part in so many of a case's steps is not timed."""


def main(
    against: str = "HEAD",
    minutes: float = 5.0,
    rounds: int = 20,
    only: tuple[str, ...] = (),
    case: str = "",
    out: Path | None = None,
) -> None:
    """Compare.

    Args:
        against: the commit.
        minutes: after these no new round is begun; there are always two.
        rounds: at most so many.
        only: rows of the table; all unless given.
        case: one of the cases inside a process, which is what this runs itself.
        out: file for the figures, as JSON.
    """
    if case:
        print(CASES[case]())
        return
    here, begin = Path(__file__).resolve().parents[1], time.monotonic()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in only or (*COMMANDS, *CASES)}
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "commit"
        git = ["git", "-C", str(here), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(there), against], check=True)
        try:
            for number in range(rounds):
                if number >= 2 and time.monotonic() - begin > 60 * minutes:
                    break
                for name, pairs in found.items():
                    trees = (here, there) if number % 2 else (there, here)
                    values = {tree: measured(name, tree, folder) for tree in trees}
                    pairs.append((values[here], values[there]))
        finally:
            subprocess.run([*git, "remove", "--force", str(there)], check=True)
    print("\n".join(table(found)))
    if out is not None:
        out.write_text(json.dumps({"against": against, "this tree, the commit": found}, indent=1) + "\n", encoding="utf-8")


def measured(name: str, tree: Path, folder: str) -> float:
    """One number of one tree."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    arguments = COMMANDS.get(name, ["-P", __file__, "--case", name])
    before = used()
    done = subprocess.run(
        [sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    return used() - before if name in COMMANDS else float(done.stdout.splitlines()[-1])


def used() -> float:
    """Processor seconds of all processes that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def tiny() -> float:
    """Milliseconds a step of the smallest network, 784-32-20-32-784."""
    from torch import nn

    from sigma_vae.networks import FlatNetwork

    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 40))
    decoder = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 784), nn.Unflatten(1, (1, 28, 28)))
    return 1000 * seconds_of_steps(FlatNetwork(encoder, decoder, 20), TINY_STEPS)


def conv() -> float:
    """Milliseconds an image of the paper's network."""
    from sigma_vae import models

    return 1000 / 128 * seconds_of_steps(models.network("conv", (1, 28, 28), 1), CONV_STEPS)


def seconds_of_steps(network: object, steps: int) -> float:
    """Processor seconds of a step of ``fit``, 128 images of noise each."""
    import torch

    from sigma_vae import VAE, Gaussian
    from sigma_vae.config import TrainingConfig
    from sigma_vae.training import Callback, Context, fit

    class Watch(Callback):
        def on_step(self, context: Context) -> None:
            starts.append(time.process_time())

    starts: list[float] = []
    torch.manual_seed(0)
    images = torch.randint(0, 256, (5000, 1, 28, 28), dtype=torch.uint8)
    config = TrainingConfig(max_steps=steps, start="random")
    fit(VAE(network, Gaussian(1)), images, config, progress=False, callbacks=[Watch()], save=False)  # type: ignore[arg-type]
    first = steps // WARMUP
    return (starts[-1] - starts[first]) / (steps - 1 - first)


def loss() -> float:
    """Milliseconds of the loss alone on 128×3×64×64, forward and backward."""
    import torch

    from sigma_vae import Gaussian

    likelihood, x = Gaussian(3), torch.rand(128, 3, 64, 64)
    h = torch.randn(128, 3, 64, 64, requires_grad=True)
    starts = []
    for _ in range(LOSS_STEPS):
        starts.append(time.process_time())
        likelihood(h, x).log_prob(x).sum().backward()
    return 1000 * median(after - before for before, after in pairwise(starts))


CASES: dict[str, Callable[[], float]] = {"tiny mlp, ms a step": tiny, "conv, ms an image": conv, "gaussian loss, ms": loss}


def table(found: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    """Markdown."""
    rounds = len(next(iter(found.values())))
    yield f"| median of {rounds} rounds | this tree | the commit | ratio [least, largest] |"
    yield "| --- | --- | --- | --- |"
    for name, pairs in found.items():
        ratios = [ours / theirs for ours, theirs in pairs]
        ours, theirs = (median(column) for column in zip(*pairs, strict=True))
        yield f"| {name} | {ours:.3g} | {theirs:.3g} | {median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}] |"


if __name__ == "__main__":
    tyro.cli(main)
