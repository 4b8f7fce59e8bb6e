"""Commands that describe data and hand-tuned losses."""

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sigma_vae.config import DataConfig
from sigma_vae.likelihoods.translate import CONVENTIONS, Convention, Loss, Reduction
from sigma_vae.progress import bar

if TYPE_CHECKING:
    from rich.console import Console

    from sigma_vae.data.inspect import Inspection

__all__ = ["explain", "inspect"]

PICTURES = 64
ROWS = 12


def inspect(
    config: Annotated[DataConfig, tyro.conf.PositionalRequiredArgs], *, out: str | None = None, json: bool = False
) -> None:
    """Describe DATA: sizes, levels, ranges, duplicates, and a likelihood that suits them.

    Where examples can be drawn, the first training examples are written as a picture.

    Args:
        config: The data.
        out: Picture to write; inspect-DATA.png unless given.
        json: Print JSON only.
    """
    from sigma_vae import models
    from sigma_vae.data.inspect import inspect as inspect_data
    from sigma_vae.evaluation.plots import drawable, save_grid

    with bar("reading the data"):
        splits = models.data(config)
        found = inspect_data(splits)
    if json:
        print(json_module.dumps(asdict(found)))
    else:
        _print(found)
    if not drawable(splits.shape) or splits.scaling.standardised or splits.scaling.counts:
        return
    path = Path(out) if out is not None else Path(f"inspect-{Path(config.source.replace(':', '-')).stem}.png")
    batch = next(iter(splits.batches("train", PICTURES))).x
    save_grid(path, batch[:, 0] if splits.clips else batch)
    if not json:
        print(path)


def _print(found: "Inspection") -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    console.print(f"{found.name}: {found.preprocessing}")
    counts = ", ".join(f"{split} {count}" for split, count in found.counts.items())
    console.print(f"examples: {counts}; shape {found.shape}{_clips(found)}")
    if found.levels is None:
        kind = "counts" if "kept as counts" in found.preprocessing else "real values"
        console.print(kind + (", standardised for the model" if found.standardised else ""))
    else:
        ends = f"{found.share_at_least_level:.1%} of values at the lowest, {found.share_at_largest_level:.1%} at the highest"
        console.print(f"levels: {found.levels}, of which {found.levels_used} occur; {ends}")
    _print_channels(found, console)
    console.print(f"values that never change: {found.constant_values}")
    for one in found.duplicates:
        where = "occur twice in it" if one.split == one.among else f"are in {one.among} as well"
        console.print(f"duplicates: {one.count} of {one.split} {where}")
    console.print(f"suggested likelihood: {found.likelihood}")
    for reason in found.reasons:
        console.print(f"  - {reason}")


def _clips(found: "Inspection") -> str:
    if not found.frames:
        return ""
    train, test = found.frames["train"], found.frames["test"]
    return f", clips of {train} frames" + (f" (test: {test})" if test != train else "")


def _print_channels(found: "Inspection", console: "Console") -> None:
    from rich.table import Table

    columns = ("column" if found.columns else "channel", "mean", "std", "lowest", "highest", "excess kurtosis")
    table = Table(*columns, title="training split")
    names = found.columns or [str(i) for i in range(len(found.channels))]
    for name, channel in zip(names[:ROWS], found.channels, strict=False):
        table.add_row(name, *(f"{value:.5g}" for value in asdict(channel).values()))
    console.print(table)
    if len(found.channels) > ROWS:
        console.print(f"... and {len(found.channels) - ROWS} more channels (--json prints all)")


def explain(
    *,
    shape: str,
    beta: float = 1.0,
    convention: Convention | None = None,
    loss: Loss = "squared",
    reduction: Reduction = "mean",
    kl_reduction: Reduction = "batch-mean",
    half: bool = False,
    perceptual_weight: float = 0.0,
    batch_size: int | None = None,
    latent_dim: int | None = None,
    value_range: float = 1.0,
    json: bool = False,
) -> None:
    """Compute the effective β and the implied σ of a hand-tuned loss.

    The loss is reduction(error) + beta · kl_reduction(KL), as it stands in the code.

    Args:
        shape: Shape of one example: 3,64,64.
        beta: Weight of the KL.
        convention: Take loss, reductions, range and perceptual weight of a known code base: compvis (L1 and LPIPS summed over pixels and
            divided by the batch), diffusers (mean squared error); both on [−1, 1], with the KL summed over each example.
        loss: Error of a value: squared, absolute (L1), or bce (binary cross-entropy).
        reduction: Reduction of the error: sum over everything, batch-mean (summed over each example, then
            averaged), or mean over everything.
        kl_reduction: Reduction of the KL, likewise.
        half: The error has a factor ½.
        perceptual_weight: Weight of a perceptual distance (LPIPS) that is added to the error of every value.
        batch_size: Batch size; needed where exactly one of the two terms is summed over the batch.
        latent_dim: Size of the latents; needed where the KL is a mean over them.
        value_range: Range of the data's values: 1 for [0, 1], 2 for [-1, 1].
        json: Print JSON only.
    """
    from sigma_vae.likelihoods.translate import explain as explain_loss

    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        raise ValueError(f"--shape takes sizes with commas between, as 3,64,64; got {shape!r}") from None
    if convention is not None:
        loss, reduction, value_range, perceptual_weight = CONVENTIONS[convention]
    result = explain_loss(
        sizes,
        beta,
        reduction,
        kl_reduction,
        half=half,
        batch_size=batch_size,
        latent_dim=latent_dim,
        value_range=value_range,
        loss=loss,
        perceptual_weight=perceptual_weight,
    )
    if json:
        print(json_module.dumps(asdict(result)))
        return
    term, scale = {"squared": ("‖x − x̂‖²", "σ"), "absolute": ("‖x − x̂‖₁", "b"), "bce": ("BCE(x, x̂)", "σ")}[loss]
    print(f"effective β   {result.effective_beta:.6g}   (of {term} + β·KL, summed over {result.dims} values)")
    print(f"implied {scale}     {result.implied_sigma:.6g}")
    print(result.advice)
