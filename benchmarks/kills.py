"""Kill trainings by SIGKILL at random moments, resume them, and compare every weight with a training that was left alone.

    python -m benchmarks.kills --kills 25 --out benchmarks/results/kills.json

Each network is trained once without a kill, then again and again: the process is killed after a random part of the time that the
first one took, and resumed until it ends. A kill that comes before the first checkpoint begins the training anew, which is counted apart.
"""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

NETWORKS = {
    "mlp": ["digits", "--network", "mlp", "--epochs", "12", "--likelihood", "gaussian/shared", "--ema-decay", "0.99"],
    "conv": ["digits", "--network", "conv", "--width", "4", "--epochs", "4"],
    "hierarchical": [
        "digits",
        "--network",
        "hierarchical:tiny",
        "--width",
        "16",
        "--epochs",
        "2",
        "--skip-gradient-norm",
        "1e6",
    ],
    "sequence": ["moving-mnist", "--network", "sequence", "--width", "8", "--size", "16", "--frames", "5", "--max-steps", "12"],
}
OFTEN = ["--checkpoint-minutes", "0.002", "--validate-every", "7", "--precision", "float32", "--threads", "1"]


def main(out: Path, kills: int = 25, seed: int = 0) -> None:
    """Kill each network's training so many times; write what came of it as JSON, and print it."""
    chance, record = random.Random(seed), {}
    for name, words in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            record[name] = attacked(Path(folder), words, kills, chance)
        print(name, record[name], flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.kills --kills {kills} --seed {seed}"
    out.write_text(json.dumps({"command": command, **record}, indent=1) + "\n", encoding="utf-8")


def attacked(folder: Path, words: list[str], kills: int, chance: random.Random) -> dict[str, object]:
    """Train whole once, then under kills until there were enough of them."""
    began = time.monotonic()
    finish(folder / "whole", words, None)
    whole, seconds = digest(folder / "whole"), time.monotonic() - began
    done, resumed, equal, trainings = 0, 0, 0, 0
    while done < kills:
        run, trainings = folder / f"attacked{trainings}", trainings + 1
        while done < kills or not (run / "evaluation.json").exists():
            after = chance.uniform(0.3, 1.0) * seconds if done < kills else None
            resumed += (run / "checkpoints" / "last.ckpt").exists()
            if finish(run, words, after):
                break
            done += 1
        equal += digest(run) == whole
        shutil.rmtree(run)
    return {"kills": done, "resumed": resumed, "trainings": trainings, "bit_identical": equal, "seconds": round(seconds, 1)}


def finish(run: Path, words: list[str], kill_after: float | None) -> bool:
    """Train or resume; whether it ended by itself before it was killed."""
    begun = (run / "config.yaml").exists() and (run / "checkpoints" / "last.ckpt").exists()
    if not begun:
        shutil.rmtree(run, ignore_errors=True)
    task = ["resume", str(run)] if begun else ["train", *words, *OFTEN, "--out", str(run)]
    process = subprocess.Popen([sys.executable, "-m", "sigma_vae", *task], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said, _ = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False
    if process.returncode:
        raise RuntimeError(f"{' '.join(task)} ended with {process.returncode}: {said.decode()[-2000:]}")
    return True


def digest(run: Path) -> str:
    """All weights and scales, as bytes."""
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    tyro.cli(main)
