"""Calibrated at both ends: tuned and calibrated decoders on Fashion-MNIST, with N(0, I) and with every fitted prior.

    python -m benchmarks.classifier --out classifier.pt
    python -m benchmarks.priors --classifier classifier.pt --runs-in runs/priors-mlp --out benchmarks/results/priors-mlp.json

The runs are kept, and each result is written as it is measured: started again, only what is missing is done. Fréchet distances are those of
decoder means against all test images: 5 000 on the 64 features of the small classifier, 2 000 on EfficientNet-Lite0's.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import tyro
from torch import Tensor

from sigma_vae import models, runs
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from sigma_vae.data import Splits
from sigma_vae.evaluation import score
from sigma_vae.evaluation.bounds import oracle
from sigma_vae.evaluation.calibration import calibration
from sigma_vae.evaluation.features import Extractor, load_extractor
from sigma_vae.evaluation.information import information
from sigma_vae.evaluation.quality import frechet_distance
from sigma_vae.priors import MixturePrior
from sigma_vae.vae import VAE, keyed_noise

LIKELIHOODS = (
    "gaussian/fixed:1.0",
    "gaussian/fixed:0.3162",
    "gaussian/fixed:0.1",
    "gaussian/fixed:0.0316",
    "gaussian/shared",
    "gaussian/optimal",
    "gaussian/per-pixel",
)
PRIORS = ("standard", "gaussian", "mixture", "flow")
SAMPLES = {"classifier": 5_000, "efficientnet": 2_000}
BATCH = 500


def main(classifier: Path, runs_in: Path, out: Path, network: str = "mlp", width: int = 400, seeds: int = 3) -> None:
    """Measure every likelihood with every seed, write the results as JSON, print the tables.

    Args:
        classifier: TorchScript file of benchmarks.classifier.
        runs_in: Folder of the trained runs.
        out: JSON file of the results.
        network: mlp (300 000 images seen in batches of 64), or conv (128 000).
        width: Of the network.
        seeds: How many.
    """
    command = f"python -m benchmarks.priors --classifier classifier.pt --runs-in RUNS --network {network} --width {width} --seeds {seeds}"
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"results": {}}
    if record.get("command", command).split(" --seeds")[0] != command.split(" --seeds")[0]:
        raise SystemExit(f"{out} holds the results of {record['command']}; give another --out")
    record |= {"command": command, "samples": SAMPLES}
    out.parent.mkdir(parents=True, exist_ok=True)
    measures = {"classifier": load_extractor(classifier), "efficientnet": load_extractor("efficientnet")}
    for seed in range(seeds):
        for likelihood in LIKELIHOODS:
            rows = record["results"].setdefault(likelihood, [])
            if seed not in {row["seed"] for row in rows}:
                rows.append({"seed": seed, **one(likelihood, seed, network, width, runs_in, measures)})
                out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                print(likelihood, rows[-1], flush=True)
    print("\n".join(tables(record["results"])))


def one(
    likelihood: str, seed: int, network: str, width: int, runs_in: Path, measures: dict[str, Extractor]
) -> dict[str, float | None]:
    """Train where it was not, then measure."""
    out = runs_in / f"{likelihood.replace('/', '-').replace(':', '')}-{seed}"
    if not (out / "evaluation.json").exists():
        train(likelihood, seed, network, width, out)
    run = runs.open_run(out)
    report = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    test, training = run.data.batches("test", BATCH), run.data.batches("train", BATCH)
    found = information(run.vae, test, training)
    covered = calibration(run.vae, test)
    leak = oracle(run.vae, test)
    return {
        **{key: report[key]["mean"] for key in ("bits_per_dim_post_hoc", "elbo_post_hoc_nats", "rate_nats")},
        "mutual_information_at_most_nats": found.mutual_information_at_most_nats,
        "marginal_kl_at_least_nats": found.marginal_kl_at_least_nats,
        "coverage_90": covered.density.coverage["90"].mean,
        "leak_nats": leak.leak_nats.mean,
        "leak_formula_nats": leak.leak_formula_nats,
        **samples(run.vae, run.data, measures),
    }


def train(likelihood: str, seed: int, network: str, width: int, out: Path) -> None:
    """One run, with the budget of the earlier measurements."""
    steps, batch = (4688, 64) if network == "mlp" else (2000, 64)
    training = TrainingConfig(epochs=100, max_steps=steps, batch_size=batch, validate_every=steps // 4)
    runs.train(
        RunConfig(DataConfig("fashion-mnist"), ModelConfig(network, likelihood, width=width), training, seed),
        out,
        progress=False,
    )


@torch.no_grad()
def samples(vae: VAE, data: Splits, measures: dict[str, Extractor]) -> dict[str, float | None]:
    """Fréchet distances of reconstructions and, with each prior, of samples; the bound that each prior gives."""
    result: dict[str, float | None] = {}
    known = {name: features_of_test(measure, data) for name, measure in measures.items()}
    again = torch.cat(
        [vae.reconstruct(b.x, noise=keyed_noise(b.positions)) for b in data.batches("test", BATCH, limit=max(SAMPLES.values()))]
    )
    for name, measure in measures.items():
        result[f"frechet_{name}_reconstructions"] = frechet_distance(
            known[name], measure.of(again[: SAMPLES[name]].split(BATCH))
        )
    fit = float(score(vae, data.batches("test", BATCH)).log_likelihood_post_hoc.mean())  # of the same draws with every prior
    for name in PRIORS:
        prior = models.prior(name, vae.network.latents.sizes[0])
        if prior.needs_fit:
            vae.fit_prior(data.batches("train", BATCH), prior, data.batches("validation", BATCH))
        else:
            vae.network.replace_prior(prior)
        if isinstance(prior, MixturePrior):
            result["components"] = prior.components
        result[f"elbo_post_hoc_nats_{name}"] = fit - rate(vae, data)
        made = drawn(vae, max(SAMPLES.values()))
        for features, measure in measures.items():
            frechet = frechet_distance(known[features], measure.of(made[: SAMPLES[features]].split(BATCH)))
            result[f"frechet_{features}_{name}"] = frechet
    return result


def features_of_test(measure: Extractor, data: Splits) -> Tensor:
    """Of all real images: found once for all runs."""
    key = measure.name, data.record["fingerprint"]
    if key not in FOUND:
        FOUND[key] = measure.of(batch.x for batch in data.batches("test", BATCH))
    return FOUND[key]


FOUND: dict[tuple[str, str], Tensor] = {}


def rate(vae: VAE, data: Splits) -> float:
    """Mean KL from the prior at hand, of the draws that :func:`score` takes."""
    kl = [vae.network.infer(b.x, noise=keyed_noise(b.positions)).kl for b in data.batches("test", BATCH)]
    return float(torch.cat(kl).double().sum(-1).mean())


def drawn(vae: VAE, n: int) -> Tensor:
    """N decoder means."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([vae.sample(BATCH, generator=generator) for _ in range(n // BATCH)])


WORTH = {
    "bits_per_dim_post_hoc": ("bits/dim, σ refitted", 3),
    "elbo_post_hoc_nats": ("ELBO, σ refitted", 1),
    "rate_nats": ("rate", 1),
    "mutual_information_at_most_nats": ("MI ≤", 1),
    "marginal_kl_at_least_nats": ("KL(q(z)‖p(z)) ≥", 2),
    "coverage_90": ("90 % interval covers", 3),
    "leak_nats": ("leak", 3),
    "leak_formula_nats": ("leak by formula", 3),
}
BOUNDS = {f"elbo_post_hoc_nats_{prior}": (f"ELBO, {prior}", 1) for prior in PRIORS}


def frechet(features: str) -> dict[str, tuple[str, int]]:
    """Columns of a table of Fréchet distances."""
    return {f"frechet_{features}_{what}": (what, 1) for what in ("reconstructions", *PRIORS)}


def tables(results: dict[str, list[dict[str, float | None]]]) -> Iterator[str]:
    """Mean ± standard deviation over seeds, as Markdown."""
    for title, columns in (
        ("What the numbers say", WORTH),
        ("Bounds with each prior, nats", BOUNDS),
        ("Fréchet distance, classifier", frechet("classifier")),
        ("Fréchet distance, EfficientNet", frechet("efficientnet")),
    ):
        yield f"\n{title}\n"
        yield "| likelihood | " + " | ".join(label for label, _ in columns.values()) + " |"
        yield "| --- |" + " --- |" * len(columns)
        for likelihood, rows in results.items():
            cells = [cell([row[key] for row in rows], digits) for key, (_, digits) in columns.items()]
            yield f"| `{likelihood}` | " + " | ".join(cells) + " |"


def cell(values: list[float | None], digits: int) -> str:
    """Mean ± standard deviation; empty where there is no such number (of the leak, no formula)."""
    return "" if None in values else spread(values, digits)


def spread(values: list[float | None], digits: int) -> str:
    """Mean ± standard deviation, or "never" where a seed did not get there."""
    if any(value is None for value in values):
        return "never"
    numbers = [value for value in values if value is not None]
    deviation = stdev(numbers) if len(numbers) > 1 else math.nan
    return f"{mean(numbers):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    tyro.cli(main)
