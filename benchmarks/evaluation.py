"""What an evaluation costs: minutes and peak memory of each metric, as the command line runs it, each in a process of its own.

    python -m benchmarks.evaluation runs/fashion --classifier classifier.pt --out benchmarks/results/evaluation.json

IWAE-64 of all test examples, and the sample quality of 10 000 samples, on all cores.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro


def main(
    run: Annotated[Path, tyro.conf.Positional], classifier: Path, out: Path, draws: int = 64, samples: int = 10_000
) -> None:
    """Time each metric of a finished run, write the results as JSON, print the table."""
    metrics = {
        "bounds": ("--metrics",),
        f"IWAE-{draws}": ("--metrics", "iwae", "--draws", str(draws)),
        "information": ("--metrics", "information"),
        "calibration": ("--metrics", "calibration"),
        f"quality of {samples} samples, classifier": quality(str(classifier), samples),
        f"quality of {samples} samples, EfficientNet": quality("efficientnet", samples),
    }
    results = {name: cost([sys.executable, "-m", "sigma_vae", "evaluate", str(run), *words]) for name, words in metrics.items()}
    command = f"python -m benchmarks.evaluation RUN --classifier classifier.pt --draws {draws} --samples {samples}"
    report = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    about = {name: report[name] for name in ("data", "network", "likelihood", "examples")}
    record = {"command": command, "run": about, "cores": os.cpu_count(), "results": results}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("| metric | minutes | peak memory (GB) |\n| --- | --- | --- |")
    for name, spent in results.items():
        print(f"| {name} | {spent['minutes']:.2f} | {spent['peak_gb']:.2f} |")


def quality(features: str, samples: int) -> tuple[str, ...]:
    """Arguments of the command."""
    return ("--metrics", "quality", "--features", features, "--samples", str(samples))


def cost(command: list[str]) -> dict[str, float]:
    """Wall clock, and the largest resident set of a process: the command's, as a child's child."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    start = time.monotonic()
    peak_kb = int(subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True).stdout)
    return {"minutes": (time.monotonic() - start) / 60, "peak_gb": peak_kb * resource_unit() / 1e9}


def resource_unit() -> int:
    """Bytes in a unit of ru_maxrss: kilobytes on Linux, bytes on macOS."""
    return 1 if sys.platform == "darwin" else 1024


if __name__ == "__main__":
    tyro.cli(main)
