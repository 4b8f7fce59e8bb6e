"""The subcommand that looks at data before anything is trained on them."""

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

from sigma_vae import build
from sigma_vae.config import DataConfig
from sigma_vae.data import Splits
from sigma_vae.data.inspection import Inspection
from sigma_vae.data.inspection import inspect as inspect_data
from sigma_vae.evaluation.pictures import drawable, save_grid

__all__ = ["inspect"]

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
    splits = build.data(config)
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
