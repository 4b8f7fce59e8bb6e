"""Speed on Fashion-MNIST: images a second beside other trainers, and seconds to a test ELBO; one part at a time.

    python -m benchmarks.speed --part plain      # 40 minutes: what the usual loop reaches in 10 epochs
    python -m benchmarks.speed --part images     # images a second, the paper's network; levers one by one
    python -m benchmarks.speed --part tiny       # milliseconds a step of the smallest network
    python -m benchmarks.speed --part compile    # what compilation wins, and what it costs
    python -m benchmarks.speed --part elbo       # test ELBO after equal training
    python -m benchmarks.speed --part precision  # whether bfloat16 does harm
    python -m benchmarks.speed --part steps      # milliseconds a step of several networks, by precision and memory format
    python -m benchmarks.speed --part sooner     # seconds to what others reach in 10 epochs

Each writes its part of ``OUT/speed.json`` measurement by measurement, and goes on where it was stopped. Seconds are the processor's, of one
thread; the trainers take turns, each measurement in a process of its own. pythae has to be installed: see :mod:`benchmarks.trainers`.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Literal

import torch
import tyro

from benchmarks import keep, kept
from benchmarks.plain import BATCH, PlainLoop, images_of, judged_elbo, plain, usual
from benchmarks.trainers import WITH_LINEAR_PATH, network_named, ours, pythae, train_one
from sigma_vae import Gaussian, models
from sigma_vae.config import DataConfig, HardwareConfig, TrainingConfig
from sigma_vae.data import Splits
from sigma_vae.networks import FlatNetwork

RESULTS, FASHION = Path("benchmarks/results"), "fashion-mnist"
Part = Literal["plain", "images", "tiny", "steps", "compile", "elbo", "precision", "sooner"]
Measured = dict[str, Any]

LEVERS = ("retaining allocator", "fused optimiser", "bfloat16", "bfloat16, channels last")
IMAGES = ("pythae", "plain loop", "ours, nothing chosen", *(f"ours, {lever}" for lever in LEVERS), "ours, float32", "ours, all")
TINY = (
    "pythae",
    "plain loop",
    "ours, nothing chosen",
    "ours, one step a call",
    "ours, fused optimiser",
    "ours, bfloat16",
    "ours, compiled",
    "ours",
    WITH_LINEAR_PATH,
)
COMPILED_STEPS = {
    "tiny, float32": 400,
    "mlp 100, bfloat16": 400,
    "mlp 200, bfloat16": 200,
    "mlp, bfloat16": 100,
    "residual, bfloat16": 40,
    "conv, bfloat16": 16,
}
FORMATS = ("float32", "float32, channels-last", "bfloat16", "bfloat16, channels-last")
STEPS = [
    *(f"{network}, {form}" for network in ("conv", "usual conv", "residual", "hierarchical:tiny") for form in FORMATS),
    *(f"mlp {width}, {form}" for width in (32, 64, 100, 150, 200, 300, 400) for form in ("float32", "bfloat16")),
]
"""Networks, with the width where it is not the usual one, and what a step computes in."""
COUNTED_STEPS = {"conv": 12, "usual conv": 12, "hierarchical:tiny": 20, "residual": 60}
EQUAL = ("pythae", "plain loop", "ours, all")
EQUAL_STEPS = 200
PRECISION_STEPS = {"conv": 422, "residual": 1266, "mlp": 4220, "hierarchical:tiny": 422, "sequence": 60}
"""Of ``sequence`` on clips: ``--data moving-mnist``."""
TRAINERS: dict[str, dict[str, float] | None] = {"pythae": None, "the plain loop": {}, "the paper's code": {"soft_clip": -6.0}}
"""Others; the arguments of a :class:`PlainLoop` that solves σ."""
RIVALS = {f"{network} by {trainer}": (network, trainer) for network in ("mlp", "conv") for trainer in TRAINERS}
"""What they train for 10 epochs."""
RIVAL_EPOCHS = 10
FROM_ITS_START = "from the best linear VAE"
SOONER = {
    f"{network}, batches of {batch}, {images} images": (network, batch, images)
    for network, batch, budgets in (
        ("mlp", 128, (1_280, 6_400, 27_000, 54_000)),
        ("mlp", 64, (64_000, 128_000)),
        ("conv", 32, (90_000, 180_000)),
        ("residual", 64, (480_000,)),
        ("hierarchical:tiny", 64, (15_000, 40_000)),
    )
    for images in budgets
} | {
    f"hierarchical:tiny, {FROM_ITS_START}, batches of 64, {images} images": ("hierarchical:tiny", 64, images)
    for images in (2_560, 40_000)
}
"""A cosine to 0 over so many images; the network, and what is due to the trainer, are told apart."""
SOONER_RATE = {"mlp": 1e-3, "conv": 1e-3, "residual": 1e-3, "hierarchical:tiny": 3e-3}


def main(
    part: Part,
    out: Path = RESULTS,
    rounds: int = 3,
    epochs: int = 10,
    only: tuple[str, ...] = (),
    case: str = "",
    data: str = FASHION,
) -> None:
    """Measure one part.

    Args:
        part: which.
        out: folder of the results.
        rounds: rounds or seeds.
        epochs: of the plain loop.
        only: cases to measure; all of them unless given.
        case: one measurement, as JSON: what this runs in processes of its own.
        data: name of the data set.
    """
    path = out / "speed.json"
    if case:
        print(json.dumps(measured(part, *case.rsplit("|", 1), data=data)))
    elif part == "plain":
        if len(kept(path, "plain").get("rows", [])) < epochs:
            plain(path, models.data(DataConfig(data)), epochs, seed=0)
    else:
        results = each(part, path, rounds, data, only or tuple(cases(part)))
        loop = kept(path, "plain").get("rows", []) if data == FASHION else []
        print("\n".join(table(part, results, loop)))


def each(part: Part, path: Path, rounds: int, data: str, chosen: tuple[str, ...]) -> dict[str, list[Measured]]:
    """Every chosen case in every round, unless it is there already."""
    place = part if data == FASHION else f"{part}, {Path(data).stem}"
    results: dict[str, list[Measured]] = kept(path, place).get("results", {})
    for number in range(rounds):
        for case in chosen:
            rows = results.setdefault(case, [])
            if len(rows) <= number:
                rows.append(in_fresh_process(part, f"{case}|{number}", data))
                print(case, rows[-1], flush=True)
                command = f"python -m benchmarks.speed --part {part} --rounds {rounds} --only {shlex.join(chosen)}"
                keep(path, place, {"command": command, "results": results})
    return results


def cases(part: Part) -> list[str]:
    """What a part compares."""
    if part == "precision":
        return [
            f"{network}, {precision}"
            for network in PRECISION_STEPS
            if network != "sequence"
            for precision in ("float32", "bfloat16")
        ]
    return {
        "steps": STEPS,
        "compile": [f"{case}, {how}" for case in COMPILED_STEPS for how in ("eager", "compiled")],
        "images": [*IMAGES],
        "tiny": [*TINY],
        "elbo": [*EQUAL],
        "sooner": [*RIVALS, *SOONER],
    }[part]


def in_fresh_process(part: Part, case: str, data: str) -> Measured:
    """Where no other case has left its heap."""
    command = [sys.executable, "-m", "benchmarks.speed", "--part", part, "--case", case, "--data", data]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: Measured = json.loads(done.stdout.splitlines()[-1])
    return result


def measured(part: Part, case: str, number: str, data: str) -> Measured:
    """One measurement; its number is its seed."""
    splits, seed = models.data(DataConfig(data)), int(number)
    if part == "images":
        timed = train_one(case, "conv", slice_of(splits, 20 * BATCH), 14, seed)
        return {"images_per_second": 1000 * BATCH / timed.milliseconds(warmup=4)}
    if part == "tiny":
        per_epoch = -(-len(splits.train) // BATCH)
        timed = train_one(case, "tiny", splits, 4 * per_epoch, seed)
        return {"milliseconds_a_step": timed.milliseconds(warmup=per_epoch)}
    if part == "compile":
        return compiled(*case.rsplit(", ", 1), splits, seed)
    if part == "steps":
        return stepped(*case.split(", ", 1), splits, seed)
    if part == "elbo":
        timed = train_one(case, "conv", slice_of(splits, EQUAL_STEPS * BATCH), EQUAL_STEPS, seed)
        return {"test_elbo_nats": judged_elbo(timed.network, splits)}
    if part == "precision":
        network, precision = case.split(", ")
        config = TrainingConfig(
            epochs=100,
            max_steps=PRECISION_STEPS[network],
            schedule="cosine",
            hardware=HardwareConfig(precision=precision),  # type: ignore[arg-type]
        )
        return trained(network, splits, config, seed)
    if case in RIVALS:
        return rival(case, splits, seed)
    network, batch, images = SOONER[case]
    rate = SOONER_RATE[network]
    config = TrainingConfig(
        epochs=100,
        max_steps=images // batch,
        batch_size=batch,
        learning_rate=rate,
        schedule="cosine",
        start="principal" if FROM_ITS_START in case else "auto",
        hardware=HardwareConfig(precision="bfloat16"),
    )
    return trained(network, splits, config, seed)


def slice_of(splits: Splits, examples: int) -> Splits:
    """Less to train on: an epoch for the trainer that knows no half ones, and a short calibration afterwards."""
    parts = splits.train.select(torch.arange(examples)), splits.validation.select(torch.arange(512))
    return replace(splits, train=parts[0], validation=parts[1])


def trained(network: str, splits: Splits, config: TrainingConfig, seed: int) -> Measured:
    """Seconds of a whole training of ``gaussian/optimal`` up to its last step, its start included, and what it is worth."""
    torch.set_num_threads(1)
    made, began = network_named(network, splits, seed), time.process_time()
    timed = ours(made, splits, config, Gaussian(splits.shape[0], mean="unit"))
    return {
        "seconds": timed.starts[-1] - began,
        "all_seconds": timed.end - began,
        "test_elbo_nats": judged_elbo(timed.network, splits),
    }


def stepped(network: str, form: str, splits: Splits, seed: int) -> Measured:
    """Milliseconds of a step of ``gaussian/optimal`` in a precision and a memory format."""
    torch.set_num_threads(1)
    (precision, _, layout), steps = form.partition(", "), COUNTED_STEPS.get(network, 200)
    hardware = HardwareConfig(precision=precision, memory_format=layout or "contiguous")  # type: ignore[arg-type]
    config = TrainingConfig(max_steps=steps, batch_size=BATCH, start="random", hardware=hardware)
    timed = ours(network_named(network, splits, seed), splits, config, Gaussian(splits.shape[0], mean="unit"))
    return {"milliseconds_a_step": timed.milliseconds(warmup=4)}


def compiled(case: str, how: str, splits: Splits, seed: int) -> Measured:
    """Milliseconds of later steps, and seconds of the first two, with those of the compilers that they start."""
    torch.set_num_threads(1)
    (network, precision), steps = case.split(", "), COMPILED_STEPS[case]
    hardware = HardwareConfig(precision=precision, compile="yes" if how == "compiled" else "no")  # type: ignore[arg-type]
    config = TrainingConfig(max_steps=steps, batch_size=BATCH, hardware=hardware)
    timed = ours(network_named(network, splits, seed), splits, config, Gaussian(splits.shape[0], mean="unit"))
    others = os.times()
    first = timed.starts[2] - timed.starts[0] + others.children_user + others.children_system
    return {"milliseconds_a_step": timed.milliseconds(warmup=4), "seconds_of_two_steps": first}


def rival(case: str, splits: Splits, seed: int) -> Measured:
    """The same of another trainer."""
    torch.set_num_threads(1)
    network, trainer = RIVALS[case]
    made = usual(network_named(network, splits, seed))
    assert isinstance(made, FlatNetwork)
    began, steps, arguments = time.process_time(), RIVAL_EPOCHS * -(-len(splits.train) // BATCH), TRAINERS[trainer]
    if arguments is None:
        pythae(made, splits, steps)
    else:
        loop = PlainLoop(made.encoder, made.decoder, **arguments)
        for x in islice((x for epoch in repeat(images_of(splits)) for x in epoch), steps):
            loop.step(x)
    seconds = time.process_time() - began
    return {"seconds": seconds, "all_seconds": seconds, "test_elbo_nats": judged_elbo(made, splits)}


def table(part: Part, results: dict[str, list[Measured]], loop: list[Measured]) -> Iterator[str]:
    """Markdown: medians and ranges; ratios are taken within a round."""
    keys = list(next(iter(results.values()))[0])
    reference = next(iter(results))
    yield f"| | {' | '.join(key.replace('_', ' ') for key in keys)} | of {reference} |"
    yield "| --- |" + " --- |" * (len(keys) + 1)
    for case, rows in results.items():
        ratios = [row[keys[0]] / base[keys[0]] for row, base in zip(rows, results[reference], strict=False)]
        yield f"| {case} | {' | '.join(spread([row[key] for row in rows], nats='nats' in key) for key in keys)} | {spread(ratios)} |"
    if part == "sooner":
        yield ""
        yield from sooner({case: means(rows) for case, rows in results.items()}, loop)


def means(rows: list[Measured]) -> tuple[float, float]:
    """Seconds and nats."""
    return mean(row["seconds"] for row in rows), mean(row["test_elbo_nats"] for row in rows)


def sooner(found: dict[str, tuple[float, float]], loop: list[Measured]) -> Iterator[str]:
    """How many times as long each of the others took to a bound that ours surpasses; the plain loop counts when it is first there."""
    others = {case: found[case] for case in RIVALS if case in found}
    if loop and "conv by the plain loop" not in others:
        reached = loop[-1]["test_elbo_nats"]
        others["conv by the plain loop"] = next(row["seconds"] for row in loop if row["test_elbo_nats"] >= reached), reached
    yield f"| | {' | '.join(f'{case}: {nats:.1f} nats, {seconds:.0f} s' for case, (seconds, nats) in others.items())} |"
    yield "| --- |" + " --- |" * len(others)
    for case in SOONER:
        if case in found:
            ours_seconds, ours_nats = found[case]
            cells = [
                f"{seconds / ours_seconds:.1f}×" if ours_nats >= nats else "not there" for seconds, nats in others.values()
            ]
            yield f"| {case}: {ours_nats:.1f} nats, {ours_seconds:.0f} s | {' | '.join(cells)} |"


def spread(values: list[float], *, nats: bool = False) -> str:
    """Median and range; of nats, mean and standard deviation over seeds."""
    if len(values) == 1:
        return f"{values[0]:.4g}"
    if nats:
        return f"{mean(values):.2f} ± {stdev(values):.2f}"
    return f"{median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


if __name__ == "__main__":
    tyro.cli(main)
