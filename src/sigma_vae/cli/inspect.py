"""Subcommands that look at data and at hand-tuned losses."""

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

from sigma_vae import models
from sigma_vae.config import DataConfig
from sigma_vae.data import Splits
from sigma_vae.data.inspect import Inspection
from sigma_vae.data.inspect import inspect as inspect_data
from sigma_vae.evaluation.plots import drawable, save_grid
from sigma_vae.likelihoods.translate import Reduction
from sigma_vae.likelihoods.translate import explain as explain_loss

__all__ = ["explain", "inspect"]

PICTURES = 64
ROWS = 12


def inspect(
    config: Annotated[DataConfig, tyro.conf.PositionalRequiredArgs], *, out: str | None = None, json: bool = False
) -> None:
    """Say what DATA are like: sizes, levels, ranges, constant values, duplicates, and the likelihood they suggest, and why.

    Args:
        config: The data.
        out: Where the picture of the first training examples goes; inspect-DATA.png unless given.
        json: Print JSON alone.
    """
    splits = models.data(config)
    found = inspect_data(splits)
    if json:
        print(json_module.dumps(asdict(found), ensure_ascii=False))
    else:
        _print(found)
    if drawable(splits.shape) and not splits.scaling.standardised:
        path = Path(out) if out is not None else Path(f"inspect-{Path(config.source.replace(':', '-')).stem}.png")
        save_grid(path, _first(splits))
        if not json:
            print(path)


def _first(data: Splits) -> Tensor:
    batch = next(iter(data.batches("train", PICTURES))).x
    return batch[:, 0] if data.clips else batch


def _clips(found: Inspection) -> str:
    if not found.frames:
        return ""
    train, test = found.frames["train"], found.frames["test"]
    return f", clips of {train} frames" + (f" (test: {test})" if test != train else "")


def _print(found: Inspection) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{escape(found.name)}[/bold]: {escape(found.preprocessing)}")
    counts = ", ".join(f"{split} {count}" for split, count in found.counts.items())
    console.print(f"examples: {counts}; shape {found.shape}{_clips(found)}")
    if found.levels is None:
        console.print("real values" + (", standardised for the model" if found.standardised else ""))
    else:
        ends = f"{found.share_at_least_level:.1%} at the least, {found.share_at_largest_level:.1%} at the largest"
        console.print(f"levels: {found.levels}, of which {found.levels_used} occur; {ends}")
    table = Table(
        "column" if found.columns else "channel",
        "mean",
        "deviation",
        "least",
        "largest",
        "excess kurtosis",
        title="training split",
    )
    names = found.columns or [str(i) for i in range(len(found.channels))]
    for name, channel in zip(names[:ROWS], found.channels, strict=False):
        table.add_row(escape(name), *(f"{value:.5g}" for value in asdict(channel).values()))
    console.print(table)
    if len(found.channels) > ROWS:
        console.print(f"... and {len(found.channels) - ROWS} more channels (--json has all)")
    console.print(f"values that never change: {found.constant_values}")
    for one in found.duplicates:
        where = "once more in itself" if one.split == one.among else f"in {one.among} as well"
        console.print(f"duplicates: {one.count} of {one.split} {where}")
    console.print(f"suggested likelihood: [bold]{found.likelihood}[/bold]")
    for reason in found.reasons:
        console.print(f"  - {reason}")


def explain(
    *,
    shape: str,
    beta: float = 1.0,
    reduction: Reduction = "mean",
    kl_reduction: Reduction = "batch-mean",
    half: bool = False,
    batch_size: int | None = None,
    latent_dim: int | None = None,
    value_range: float = 1.0,
    json: bool = False,
) -> None:
    """Say what a hand-tuned loss, reduction(squared error) + beta · kl_reduction(KL), means: its effective β, and the σ it implies.

    Args:
        shape: Of one example: 3,64,64.
        beta: Weight on the KL, as it stands in the code.
        reduction: Of the squared error: sum over all, batch-mean (a sum for each example, averaged), or mean over everything.
        kl_reduction: Of the KL, likewise.
        half: The squared error carries a factor ½.
        batch_size: Needed where exactly one of the terms is summed over the batch.
        latent_dim: Needed where the KL is a mean over latents.
        value_range: Largest less smallest value of the data: 1 for [0, 1], 2 for [-1, 1].
        json: Print JSON alone.
    """
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        raise ValueError(f"--shape takes sizes with commas between, as 3,64,64; got {shape!r}") from None
    result = explain_loss(
        sizes,
        beta,
        reduction,
        kl_reduction,
        half=half,
        batch_size=batch_size,
        latent_dim=latent_dim,
        value_range=value_range,
    )
    if json:
        print(json_module.dumps(asdict(result), ensure_ascii=False))
        return
    print(f"effective β   {result.effective_beta:.6g}   (of ‖x − x̂‖² + β·KL, summed over {result.dims} values)")
    print(f"implied σ     {result.implied_sigma:.6g}")
    print(result.advice)
