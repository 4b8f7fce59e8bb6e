"""A soak: trains for hours in one process, with evaluations and checkpoints, and says whether memory stays flat.

    python -m benchmarks.soak --minutes 120 --out benchmarks/results/soak.json

What is watched is anonymous memory: mapped files come and go with what the system has to spare. The first tenth of the time is warm-up;
of the rest, the median of the last fifth is compared with that of the first: flat is within 2 %.
"""

import json
import os
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from sigma_vae import runs
from sigma_vae.config import DataConfig, EvaluationSettings, ModelConfig, RunConfig, TrainingConfig, write
from sigma_vae.training.checkpoints import step_of

WARM_UP = 0.1
FLAT = 0.02


def main(
    out: Path,
    minutes: float = 120,
    data: str = "digits",
    network: str = "residual",
    likelihood: str = "gaussian/optimal",
    stretch: Annotated[float, tyro.conf.arg(help="Minutes of training between two evaluations.")] = 3,
    every: Annotated[float, tyro.conf.arg(help="Seconds between two looks at the memory.")] = 5,
) -> None:
    """Train and evaluate in turns; write the results as JSON, print them."""
    start, seen, over = time.monotonic(), [], threading.Event()
    watch = threading.Thread(target=look, args=(start, seen, over, every), daemon=True)
    watch.start()
    with tempfile.TemporaryDirectory() as folder:
        done = soak(
            Path(folder) / "run", RunConfig(DataConfig(data), ModelConfig(network, likelihood)), minutes, stretch, start
        )
    over.set()
    watch.join()
    result = judged(seen, minutes)
    command = f"python -m benchmarks.soak --minutes {minutes:g} --data {data} --network {network} --likelihood {likelihood}"
    record = {"command": command, "cores": os.cpu_count(), **done, **result, "anonymous_mb": [[round(t), mb] for t, mb in seen]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in record.items() if name != "anonymous_mb"}, indent=1))


def soak(run: Path, config: RunConfig, minutes: float, stretch: float, start: float) -> dict[str, int]:
    """One training, in stretches that end by the clock, and an evaluation after each; a stretch goes on where the last one stopped."""
    training = TrainingConfig(epochs=10**6, validate_every=100, log_every=10, checkpoint_minutes=0.2)
    stretches, length = 0, min(stretch, minutes / 10)
    while (time.monotonic() - start) / 60 < minutes:
        stretches += 1
        longer = replace(config, training=replace(training, max_minutes=stretches * length))
        if stretches == 1:
            runs.train(longer, run, progress=False)
        else:
            write(run / "config.yaml", longer)
            runs.resume(run, progress=False)
        runs.evaluate_run(run, EvaluationSettings(metrics=("iwae", "calibration"), draws=8))
    return {"stretches": stretches, "steps": step_of(run / "checkpoints" / "last.ckpt")}


def look(start: float, seen: list[tuple[float, float]], over: threading.Event, every: float) -> None:
    while not over.wait(every):
        seen.append((time.monotonic() - start, anonymous_mb()))


def anonymous_mb() -> float:
    """Resident memory of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise OSError("the system does not tell anonymous memory (RssAnon in /proc/self/status); run this on Linux")


def judged(seen: list[tuple[float, float]], minutes: float) -> dict[str, float | bool]:
    """Whether memory is flat after the warm-up."""
    after = [mb for seconds, mb in seen if seconds >= WARM_UP * 60 * minutes]
    fifth = max(len(after) // 5, 1)
    first, last = statistics.median(after[:fifth]), statistics.median(after[-fifth:])
    growth = last / first - 1
    return {
        "first_mb": first,
        "last_mb": last,
        "largest_mb": max(after),
        "growth": growth,
        "flat": abs(growth) <= FLAT,
    }


if __name__ == "__main__":
    tyro.cli(main)
