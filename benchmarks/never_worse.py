"""One run with a solved σ against the best of nine β that has the same remedies, on many sets and networks.

    python -m benchmarks.never_worse --cifar cifar10_slice.npz --out benchmarks/results/never-worse.json

All arms have the defaults of ``train`` (principal start, averaged weights, weights chosen by validation, σ of validation data in what
is reported) and one budget; only the likelihood differs. The nine β are tried with the first seed; the two best on validation data
get all seeds, and so does the solved σ. The rival is the one of the two with the better mean on validation data. Test data are
looked at afterwards. A run that was stopped goes on with the same command. ``patches`` are squares of scikit-learn's photographs,
and of scikit-image's where it is installed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro

from benchmarks.photographs import bundled_photographs
from sigma_vae import models
from sigma_vae.config import EvaluationSettings, ModelConfig, TrainingConfig
from sigma_vae.data import Splits, as_splits
from sigma_vae.evaluation import evaluate
from sigma_vae.runs.evaluate import take_prior
from sigma_vae.study.claims import signed
from sigma_vae.study.comparisons import mean_difference
from sigma_vae.training import fit

BETAS = (0.003, 0.006, 0.01, 0.02, 0.03, 0.06, 0.1, 0.3, 1.0)
SOLVED = "gaussian/optimal"
FITTED = "fitted_prior_test_nats"
BLOCK = 64
"""Side of the squares into which photographs are cut before they are split, in pixels."""


class Case(NamedTuple):
    """A set of data with a network and a budget of steps of 64 examples."""

    data: str
    network: str
    steps: int
    latent_dim: int = 20
    width: int | None = None


CASES = (
    Case("digits", "mlp", 2000),
    Case("breast-cancer", "mlp", 2000, 5),
    Case("mnist-5k", "mlp", 2000),
    Case("cifar", "conv", 500, 64, 8),
    Case("cifar", "residual", 500, 64),
    Case("cifar", "mlp", 1000),
    Case("fashion-mnist", "mlp", 2000),
    Case("mnist-5k", "residual", 1000),
    Case("fashion-mnist", "residual", 1000),
    Case("fashion-mnist", "conv", 1000, 20, 8),
    Case("patches", "mlp", 1000),
    Case("patches", "conv", 500, 64, 8),
)


def main(out: Path, cifar: Path | None = None, seeds: int = 5, only: tuple[str, ...] = ()) -> None:
    """Run all cases, write each result at once, and print the table.

    Args:
        out: JSON of all runs.
        cifar: npz file with pictures of CIFAR-10; its cases are left out without it.
        seeds: of the solved σ and the two best β.
        only: data sets, if not all.
    """
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["results"] if out.exists() else []
    for case in CASES:
        if (case.data == "cifar" and cifar is None) or (only and case.data not in only):
            continue
        splits = data_of(case.data, cifar)

        def run(likelihood: str, seed: int, case: Case = case, splits: Splits = splits) -> dict[str, Any]:
            place = {**case._asdict(), "likelihood": likelihood, "seed": seed}
            known = [row for row in rows if place.items() <= row.items()]
            if not known:
                rows.append(place | trained(splits, case, likelihood, seed))
                print(rows[-1], flush=True)
                out.write_text(json.dumps({"results": rows}, indent=1) + "\n", encoding="utf-8")
            return (known or rows[-1:])[0]

        grid(run, seeds)
    print("\n".join(table(rows)))


def grid(run: Callable[[str, int], dict[str, Any]], seeds: int) -> None:
    """All β once, then the solved σ and the two best β on validation data with every seed."""
    first = {name: run(name, 0)["validation_nats"] for name in (f"gaussian/beta:{beta}" for beta in BETAS)}
    for seed in range(seeds):
        for likelihood in (SOLVED, *sorted(first, key=first.__getitem__, reverse=True)[:2]):
            run(likelihood, seed)


def trained(splits: Splits, case: Case, likelihood: str, seed: int) -> dict[str, Any]:
    """Train one model; bounds in nats with σ of validation data, from N(0, I) and with the prior that is fitted afterwards."""
    torch.manual_seed(seed)
    per = "-channel" if case.data == "breast-cancer" and likelihood == SOLVED else ""
    model = ModelConfig(case.network, likelihood + per, case.latent_dim, case.width)
    vae = models.vae(model, splits.shape, splits.scaling)
    config = TrainingConfig(max_steps=case.steps, batch_size=64)
    fit(vae, splits, config, seed=seed, progress=False)

    def bound(split: str, *metrics: str) -> Any:
        return evaluate(vae, splits, settings=EvaluationSettings(metrics=metrics, split=split))

    found = {"validation_nats": float(bound("validation").elbo_post_hoc_nats.mean)}
    test = bound("test", *(("ppca",) if likelihood == SOLVED and seed == 0 else ()))
    found |= {"test_nats": float(test.elbo_post_hoc_nats.mean), "dims": test["dims"]}
    if "ppca" in test:
        found["ppca_nats"] = test["ppca"].log_likelihood_nats.mean
    take_prior("auto", vae, splits, seed)
    return found | {FITTED: float(bound("test").elbo_post_hoc_nats.mean)}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Means ± standard deviations over seeds, and paired 95 % intervals, as Markdown."""
    lines = [
        "| data, network, steps | pPCA | solved σ | best β of nine (its β) | difference | a dimension | with fitted priors |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        of_case = [row for row in rows if case._asdict().items() <= row.items()]
        lines += [line_of(case, of_case)] if any(row["seed"] for row in of_case) else []
    return lines


def line_of(case: Case, rows: list[dict[str, Any]]) -> str:
    """One row of the table."""
    seeds = {row["seed"] for row in rows if row["seed"]} | {0}

    def values(likelihood: str, name: str) -> list[float]:
        return [row[name] for seed in sorted(seeds) for row in rows if (row["likelihood"], row["seed"]) == (likelihood, seed)]

    tried = {row["likelihood"] for row in rows if row["seed"]} - {SOLVED}
    rival = max(tried, key=lambda name: mean(values(name, "validation_nats")))
    ours, theirs = values(SOLVED, "test_nats"), values(rival, "test_nats")
    found = mean_difference([a - b for a, b in zip(ours, theirs, strict=True)])
    fitted = mean_difference([a - b for a, b in zip(*(values(name, FITTED) for name in (SOLVED, rival)), strict=True)])
    linear = next((row["ppca_nats"] for row in rows if "ppca_nats" in row), None)
    return (
        f"| {case.data}, {case.network}, {case.steps} | {linear if linear is None else format(linear, '.1f')} "
        f"| {shown(ours)} | {shown(theirs)} ({rival.partition(':')[2]}) | {signed(found)} "
        f"| {found.mean / rows[0]['dims']:+.4f} | {signed(fitted)} |"
    )


def shown(values: list[float]) -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def data_of(name: str, cifar: Path | None) -> Splits:
    """The data of a case."""
    if name == "cifar":
        return models.data(str(cifar))
    if name == "breast-cancer":
        from sklearn.datasets import load_breast_cancer

        return models.data(load_breast_cancer(as_frame=True).data)
    return as_splits(patches(), name=name) if name == "patches" else models.data(name)


def patches(side: int = 32, examples: int = 20_000) -> dict[str, np.ndarray]:
    """Squares of the photographs that packages bundle, each within one of their blocks; a tenth of the blocks is held out twice.

    The splits share no pixel, and are alike; strips of two photographs were not.
    """
    random = np.random.default_rng(0)
    photographs = [np.asarray(photograph) for photograph in bundled_photographs()]
    blocks = np.concatenate([_blocks(photograph) for photograph in photographs])
    random.shuffle(blocks)
    held_out = len(blocks) // 10
    parts = {"validation": blocks[:held_out], "test": blocks[held_out : 2 * held_out], "train": blocks[2 * held_out :]}

    def square(block: np.ndarray) -> np.ndarray:
        row, column = random.integers(BLOCK - side + 1, size=2)
        return block[row : row + side, column : column + side]

    number = {"train": examples, "validation": examples // 10, "test": examples // 10}
    return {
        split: np.stack([square(block) for block in parts[split][random.integers(len(parts[split]), size=count)]])
        for split, count in number.items()
    }


def _blocks(photograph: np.ndarray) -> np.ndarray:
    """The photograph cut into squares, ``(number, BLOCK, BLOCK, 3)``; what is left over at its edges is not used."""
    rows, columns = (length // BLOCK for length in photograph.shape[:2])
    whole = photograph[: rows * BLOCK, : columns * BLOCK]
    return whole.reshape(rows, BLOCK, columns, BLOCK, 3).swapaxes(1, 2).reshape(-1, BLOCK, BLOCK, 3)


if __name__ == "__main__":
    tyro.cli(main)
