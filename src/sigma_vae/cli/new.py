"""Commands that help to begin: a commented configuration, and completion in the shell."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from sigma_vae.cli import COMMANDS, PROGRAM
from sigma_vae.cli.help import completion as script_of
from sigma_vae.cli.options import CONFIG, rules

if TYPE_CHECKING:
    from sigma_vae.config import ModelConfig

__all__ = ["completion", "new"]

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


def _text(source: str, size: int | None, minutes: float | None, model: "ModelConfig", reason: str, about: str, out: str) -> str:
    import json

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
  epochs: null  # passes over the training data; null: as many as their number suggests
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
    from sigma_vae.cli.help import parser

    found = {
        name: parser(command.load(), f"{PROGRAM} {name}", CONFIG, rules())
        for name, command in COMMANDS.items()
        if not command.commands
    }
    groups = {name: list(command.commands) for name, command in COMMANDS.items() if command.commands}
    print(script_of(shell, found, groups))
