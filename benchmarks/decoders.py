"""Every decoder on the same network, budget and seeds: the measured part of "which decoder should I use".

    python -m benchmarks.decoders fashion-mnist --out benchmarks/results/decoders-fashion-mnist.json
    python -m benchmarks.decoders cifar10_slice.npz --steps 300 --out benchmarks/results/decoders-cifar10-slice.json

Each result is written as its run ends. Started again with the same file and options, it does the missing runs.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import tyro

from benchmarks.priors import spread
from sigma_vae import runs
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from sigma_vae.types import Observes

BATCH = 128
VALIDATIONS = 2


@dataclass(frozen=True)
class Decoder:
    likelihood: str
    observes: Observes = "density"

    @property
    def name(self) -> str:
        return self.likelihood + (", levels" if self.observes == "level" else "")


DECODERS = (
    Decoder("gaussian/optimal"),
    Decoder("gaussian/optimal", "level"),
    Decoder("gaussian/shared"),
    Decoder("gaussian/per-image"),
    Decoder("gaussian/per-pixel"),
    Decoder("gaussian/fixed:1.0"),
    Decoder("laplace/optimal"),
    Decoder("student-t/optimal"),
    Decoder("logistic/optimal", "level"),
    Decoder("logistic/per-pixel", "level"),
    Decoder("continuous-bernoulli"),
    Decoder("bitwise-categorical"),
    Decoder("logistic-mixture:10"),
    Decoder("categorical"),
)


def main(
    data: Annotated[str, tyro.conf.arg(name="data"), tyro.conf.Positional],
    out: Path,
    seeds: int = 3,
    steps: int = 500,
    width: int = 8,
    latent_dim: int = 20,
) -> None:
    """Run every decoder with every seed, keep the results as JSON, print the table.

    Args:
        data: Name or path of the data.
        out: JSON file of the results.
        seeds: Number of seeds.
        steps: Number of training steps, of 128 images each.
        width: Width of the conv network.
        latent_dim: Size of z.
    """
    about = {"data": Path(data).stem, "steps": steps, "width": width, "latent_dim": latent_dim}
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {**about, "results": {}}
    record["command"] = (
        f"python -m benchmarks.decoders {about['data']} --seeds {seeds} --steps {steps} --width {width} --latent-dim {latent_dim}"
    )
    if {key: record.get(key) for key in about} != about:
        raise SystemExit(f"{out} holds another study ({record}); give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        for decoder in DECODERS:
            rows = record["results"].setdefault(decoder.name, [])
            if seed not in {row["seed"] for row in rows}:
                rows.append(one(decoder, data, seed, steps, width, latent_dim))
                out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(record["results"])))


def one(decoder: Decoder, data: str, seed: int, steps: int, width: int, latent_dim: int) -> dict[str, float | None]:
    """Train and evaluate one model."""
    model = ModelConfig("conv", decoder.likelihood, latent_dim, width, decoder.observes)
    training = TrainingConfig(epochs=10_000, max_steps=steps, batch_size=BATCH, validate_every=steps // VALIDATIONS)
    with tempfile.TemporaryDirectory() as folder:
        report = runs.train(RunConfig(DataConfig(data), model, training, seed=seed), Path(folder) / "run", progress=False)
    result = {key: report[key]["mean"] for key in COLUMNS}
    print(decoder.name, seed, result, flush=True)
    return {"seed": seed, **result}


COLUMNS = {"bits_per_dim_post_hoc": 3, "bits_per_dim": 3, "rate_nats": 1}


def table(results: dict[str, list[dict[str, float | None]]]) -> Iterator[str]:
    """Mean ± standard deviation over seeds, as Markdown, best first."""
    yield "| likelihood | bits/dim, σ refitted | bits/dim, own σ | rate (nats) |"
    yield "| --- | --- | --- | --- |"
    best_first = sorted(results.items(), key=lambda item: mean(float(row["bits_per_dim_post_hoc"] or 0) for row in item[1]))
    for name, rows in best_first:
        yield (
            f"| `{name}` | " + " | ".join(spread([row[key] for row in rows], digits) for key, digits in COLUMNS.items()) + " |"
        )


if __name__ == "__main__":
    tyro.cli(main)
