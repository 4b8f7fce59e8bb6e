"""Files that subcommands write: what may be asked for, and in what form it is written."""

from pathlib import Path
from typing import Any, Literal

import torch

from sigma_vae.evaluation.pictures import drawable, save_clips, save_grid

__all__ = ["Split", "check_count", "checked", "output", "write"]

Split = Literal["train", "validation", "test"]


def check_count(n: int) -> None:
    """Refuse to write nothing."""
    if n < 1:
        raise ValueError(f"--n counts examples and is at least 1, got {n}")


def output(out: str | None, default: Path, shape: tuple[int, ...], *, moving: bool) -> Path:
    """Where to write: a picture unless told otherwise, where examples (of clips, frames) of this shape can be shown."""
    if out is None:
        return default.with_name(default.name + (".png" if drawable(shape) else ".npz"))
    return checked(Path(out), (".png", ".gif", ".npz") if moving else (".png", ".npz"))


def checked(path: Path, endings: tuple[str, ...]) -> Path:
    """A path that can be written, with one of these endings."""
    if path.suffix not in endings:
        raise ValueError(f"{path} should end in {' or '.join(endings)}, which says in what form it is written")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    return path


def write(path: Path, images: torch.Tensor, arrays: dict[str, torch.Tensor], columns: int | None = None) -> None:
    """Write clips or images as a picture, a moving one (.gif), or arrays; and say where.

    Args:
        path: what to write; its ending says how.
        images: ``(n, C, H, W)``, or clips ``(n, T, C, H, W)``.
        arrays: what a .npz file holds.
        columns: of a grid.
    """
    if path.suffix == ".gif" or (path.suffix == ".png" and images.dim() == 5):
        save_clips(path, images, columns)
    elif path.suffix == ".png":
        save_grid(path, images, columns)
    else:
        import numpy as np

        plain: dict[str, Any] = {name: values.float().cpu().numpy() for name, values in arrays.items()}
        np.savez_compressed(path, **plain)
    print(path)
