"""Commands to begin with: describe data and hand-tuned losses, write a configuration, complete words in the shell."""

import json as json_module
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from sigma_vae.cli import COMMANDS, PROGRAM
from sigma_vae.cli.options import CONFIG, rules
from sigma_vae.cli.options import completion as script_of
from sigma_vae.config import DataConfig, ModelConfig
from sigma_vae.likelihoods.translate import CONVENTIONS, Convention, Loss, Reduction
from sigma_vae.progress import bar

if TYPE_CHECKING:
    from rich.console import Console

    from sigma_vae.data.inspect import Inspection

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


# -- a configuration to begin with, and completion in the shell --------------------------------------------------------

QUESTIONS = {
    "data": "Data: a file, a folder, or the name of a data set (digits): ",
    "size": "If these are pictures: their side in pixels (empty: as they are): ",
    "minutes": "Minutes to train at most (empty: as long as it helps): ",
}


def new(
    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None,
    *,
    size: int | None = None,
    minutes: float | None = None,
    out: str = "config.yaml",
) -> None:
    """Write a commented config.yaml for DATA, and print the command that trains it.

    The data are read, and the network and the likelihood are chosen by them. Without DATA, questions are asked.

    Args:
        data: Name of a data set, or path of a file or folder.
        size: Side of the square that pictures are resized to, in pixels.
        minutes: Stop training after so many minutes.
        out: File to write, never overwritten.
    """
    from sigma_vae import models
    from sigma_vae.config import DataConfig, ImageConfig, ModelConfig, RunConfig, read, write_whole

    path = Path(out)
    if path.exists():
        raise ValueError(f"{path} already exists and is never overwritten; give another --out")
    if data is None:
        data, size, minutes = _asked()
    source = str(Path(data).resolve()) if Path(data).exists() else data
    fit: Literal["refuse", "crop"] = "refuse" if size is None else "crop"
    splits = models.data(DataConfig(source, images=ImageConfig(size=size, fit=fit)))
    model, _ = models.network_for(ModelConfig(), splits)
    likelihood, reason = models.likelihood_for(model, splits)
    model = replace(model, likelihood=likelihood)
    counts = ", ".join(f"{split} {count}" for split, count in splits.record.get("counts", {}).items())
    write_whole(path, _text(source, size, minutes, model, reason, f"{counts}; shape {splits.shape}", out))
    read(path, RunConfig)
    print(f"{path}\ntrain it: {_command(out)}")


def _asked() -> tuple[str, int | None, float | None]:
    if not sys.stdin.isatty():
        raise ValueError(f"{PROGRAM} new takes DATA, a name or path: {PROGRAM} new digits")
    data, size, minutes = (input(question).strip() for question in QUESTIONS.values())
    try:
        return data, int(size) if size else None, float(minutes) if minutes else None
    except ValueError as error:
        raise ValueError(f"pixels and minutes are numbers, or left empty: {error}") from error


def _command(out: str) -> str:
    return f"{PROGRAM} replay {out} --out runs/{Path(out).stem}"


def _text(source: str, size: int | None, minutes: float | None, model: ModelConfig, reason: str, about: str, out: str) -> str:
    import json

    from sigma_vae import models
    from sigma_vae.config import TrainingConfig

    length = models.training_for(model, TrainingConfig(max_minutes=minutes))
    images = (
        "" if size is None else f"  images:\n    size: {size}  # side in pixels\n    fit: crop  # the largest central square\n"
    )
    return f"""\
# A run of sigma-vae. Train it: {_command(out)}
data:
  source: {json.dumps(source, ensure_ascii=False)}  # {about}
{images}model:
  network: {model.network}  # residual, conv, mlp, hierarchical, spatial or sequence
  width: {"null" if model.width is None else model.width}  # channels of the first layer; null: the network's own
  likelihood: {model.likelihood}  # {reason}
  latent_dim: null  # size of the latents; null: 20
  prior: {model.prior}  # fitted to the latents after training; auto: the best on validation data
training:
  epochs: {"null" if length.epochs is None else length.epochs}  # passes over the training data; null: as many as their number suggests
  max_minutes: {"null" if minutes is None else minutes}  # stop after this time
  patience: 10  # stop when validation has not risen for so many validations
  batch_size: 128  # examples per step
  learning_rate: 0.001
seed: 0
device: auto  # a GPU if there is one
# Other keys: {PROGRAM} train --help-all lists them. There, latent_dim is written --latent-dim.
"""


def completion(shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional, tyro.conf.arg(metavar="{bash,zsh}")]) -> None:
    """Print a script that completes commands and options in your shell.

    For bash: sigma-vae completion bash > ~/.local/share/bash-completion/completions/sigma-vae. For zsh: add the output to
    ~/.zshrc.

    Args:
        shell: Your shell.
    """
    from sigma_vae.cli.options import parser

    found = {
        name: parser(command.load(), f"{PROGRAM} {name}", CONFIG, rules())
        for name, command in COMMANDS.items()
        if not command.commands
    }
    groups = {name: list(command.commands) for name, command in COMMANDS.items() if command.commands}
    print(script_of(shell, found, groups))
