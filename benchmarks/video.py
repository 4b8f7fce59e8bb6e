"""SVG on stochastic Moving MNIST with the σ that its own loss implies, with a learned and with an optimal one.

    OMP_NUM_THREADS=1 python -m benchmarks.video --out benchmarks/results/video.json --pictures docs/pictures

Clips of 32×32: 5 frames given, 5 predicted in training, 10 in test. ELBO a predicted frame; PSNR and SSIM of the best of 100
predictions of 64 clips, beside those of a copy of the last frame that is given. Each run is written as it ends; started again with the
same file, only what is missing is run.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from benchmarks.priors import spread
from sigma_vae import cli, models, runs
from sigma_vae.config import ClipConfig, DataConfig, ImageConfig, ModelConfig, RunConfig, TrainingConfig
from sigma_vae.evaluation.quality import predictions, psnr, ssim

GIVEN, FRAMES, TEST_FRAMES = 5, 10, 15
DATA = DataConfig("moving-mnist", images=ImageConfig(size=32), clips=ClipConfig(FRAMES, TEST_FRAMES))
LIKELIHOODS = ("gaussian/fixed:0.23", "gaussian/shared", "gaussian/optimal")
"""0.23 is √(βD/2) for SVG's β = 10⁻⁴ and D = 32·32 values a frame, over which its loss averages."""


def main(
    out: Path,
    seeds: int = 3,
    steps: int = 1500,
    width: int = 16,
    samples: int = 100,
    clips: int = 64,
    pictures: Path | None = None,
) -> None:
    """Run every likelihood with every seed, keep the results as JSON, print the table; seed 0 also draws its predictions."""
    about = {"steps": steps, "width": width, "samples": samples, "clips": clips}
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {**about, "results": {}}
    record["command"] = (
        f"python -m benchmarks.video --seeds {seeds} --steps {steps} --width {width} --samples {samples} --clips {clips}"
    )
    if {key: record.get(key) for key in about} != about:
        raise SystemExit(f"{out} holds other runs; give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    record["copy_of_the_last_frame"] = copied(clips)
    for seed in range(seeds):
        for likelihood in LIKELIHOODS:
            rows = record["results"].setdefault(likelihood, [])
            if seed not in {row["seed"] for row in rows}:
                rows.append(one(likelihood, seed, steps, width, samples, clips, pictures if seed == 0 else None))
                out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                print(likelihood, rows[-1], flush=True)
    print("\n".join(table(record["results"])))
    print("copy of the last frame:", record["copy_of_the_last_frame"])


def copied(clips: int) -> dict[str, float]:
    """PSNR and SSIM of no prediction at all, on the same clips."""
    x = next(iter(models.data(DATA).batches("test", clips))).x
    still = x[:, GIVEN - 1 : GIVEN].expand_as(x[:, GIVEN:])
    return {"psnr_db": float(psnr(still, x[:, GIVEN:]).mean()), "ssim": float(ssim(still, x[:, GIVEN:]).mean())}


def one(
    likelihood: str, seed: int, steps: int, width: int, samples: int, clips: int, pictures: Path | None
) -> dict[str, float | None]:
    """Train, evaluate, predict."""
    model = ModelConfig("sequence", likelihood, width=width, context_frames=GIVEN)
    training = TrainingConfig(epochs=10_000, max_steps=steps, batch_size=32, validate_every=steps // 2)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        report = runs.train(RunConfig(DATA, model, training, seed=seed), run, progress=False)
        opened = runs.open_run(run)
        best = predictions(opened.vae, opened.data.batches("test", 16, limit=clips), samples)
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            name = likelihood.replace("/", "-").replace(":", "-")
            for ending in ("gif", "png"):
                picture = str(pictures / f"moving-mnist-{name}.{ending}")
                assert cli.main(["predict", str(run), "--n", "3", "--samples", "2", "--out", picture]) == 0
    frames = TEST_FRAMES - GIVEN
    return {
        "seed": seed,
        "elbo_nats_a_frame": report["elbo_nats"]["mean"] / frames,
        "elbo_post_hoc_nats_a_frame": report["elbo_post_hoc_nats"]["mean"] / frames,
        "rate_nats_a_frame": report["rate_nats"]["mean"] / frames,
        "sigma_post_hoc": report["sigma_post_hoc_density"],
        "psnr_db": best["psnr_db"]["mean"],
        "ssim": best["ssim"]["mean"],
    }


COLUMNS = {
    "elbo_nats_a_frame": 1,
    "elbo_post_hoc_nats_a_frame": 1,
    "rate_nats_a_frame": 2,
    "sigma_post_hoc": 4,
    "psnr_db": 2,
    "ssim": 3,
}


def table(results: dict[str, list[dict[str, float | None]]]) -> Iterator[str]:
    """Mean ± standard deviation over seeds, as Markdown."""
    yield "| likelihood | ELBO a frame, own σ (nats) | ELBO a frame, refitted | rate a frame | σ refitted | PSNR, best (dB) | SSIM, best |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, rows in results.items():
        yield (
            f"| `{name}` | " + " | ".join(spread([row[key] for row in rows], digits) for key, digits in COLUMNS.items()) + " |"
        )


if __name__ == "__main__":
    tyro.cli(main)
