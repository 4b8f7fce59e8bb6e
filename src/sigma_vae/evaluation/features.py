"""Features of images and clips, by the name of what extracts them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from sigma_vae.evaluation import backbones
from sigma_vae.evaluation.backbones import Backbone

__all__ = ["NAMES", "Extractor", "load_clip_extractor", "load_extractor"]

Place = Path | None

NAMES: Mapping[str, Callable[[Place], Backbone]] = {
    "efficientnet": backbones.efficientnet,
    "inception": backbones.inception,
    "dinov2": partial(backbones.dinov2, "dinov2_vitl14"),
    "dinov2-b": partial(backbones.dinov2, "dinov2_vitb14"),
}
"""What :func:`load_extractor` knows by name; all but the first take ``name:PATH``."""


@final
@dataclass(frozen=True, eq=False)
class Extractor:
    """Gives features of images, or of clips: a network, how it wants its input, and a record of both.

    Shapes:
        images ``(n, C, H, W)`` or clips ``(n, T, C, H, W)``, clipped to [0, 1] as pictures are; features ``(n, d)`` in float32 on the CPU.

    >>> corners = load_extractor(nn.Flatten())
    >>> corners(torch.tensor([[[[0.0, 2.0], [0.5, -1.0]]]]))
    tensor([[0.0000, 1.0000, 0.5000, 0.0000]])
    """

    name: str
    backbone: Backbone = field(repr=False)
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of a batch.

        Raises:
            ValueError: the network cannot read such images, or gives no features ``(n, d)``, or some that are not finite.
        """
        x = self.backbone.prepare(images.to(self.device).float().clamp(0, 1))
        try:
            features = self.backbone.network(x)
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError,
            TypeError,
        ) as error:  # what a TorchScript file says of a shape, or of arguments, that it does not take
            raise ValueError(f"{self.name} cannot read {tuple(x.shape)}, made of {tuple(images.shape)}: {error}") from error
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(images):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"{self.name} should give features ({len(images)}, d) of {len(images)} examples, got {got}; flatten or pool them"
            )
        if not features.isfinite().all():
            raise ValueError(f"{self.name} gives features that are not finite; look for NaN in the examples, or in its weights")
        return features.float().cpu()

    def of(self, batches: Iterable[Tensor]) -> Tensor:
        """Features of all batches: nothing else is kept of them."""
        return torch.cat([self(batch) for batch in batches])

    def record(self, shape: tuple[int, ...], dim: int) -> dict[str, Any]:
        """What has to be the same where two numbers are compared.

        Args:
            shape: of one example.
            dim: how many features it has.

        >>> load_extractor(nn.Flatten()).record((1, 8, 8), 64)["input"]
        [1, 8, 8]
        """
        return {
            "name": self.name,
            "sha256": self.backbone.sha256,
            "input": list(self.backbone.prepare(torch.zeros(1, *shape)).shape[1:]),
            "dim": dim,
            "preprocessing": self.backbone.preprocessing,
        }


def load_extractor(source: str | Path | nn.Module, device: str | torch.device = "cpu") -> Extractor:
    """An extractor for images.

    Args:
        source: ``"efficientnet"``; ``"inception"`` or ``"inception:WEIGHTS"``; ``"dinov2"`` (ViT-L/14) or ``"dinov2-b"`` (ViT-B/14), from
            torch's hub, or with ``":PATH"`` from a folder with its repository or a TorchScript file; the path of a TorchScript file
            that reads images in [0, 1]; or a network that does. TorchScript files and repositories are programs: load those you trust.
        device: where it runs; a network that is given is moved there and put into eval mode.

    Raises:
        ValueError: there is no such extractor, or it cannot be loaded.

    >>> load_extractor(nn.Flatten()).name
    'Flatten'
    """
    if isinstance(source, nn.Module):
        return _extractor(type(source).__name__, backbones.given(source), device)
    name, _, place = str(source).partition(":")
    if name in NAMES:
        return _extractor(name, NAMES[name](Path(place).expanduser() if place else None), device)
    return _of_a_file(source, ", ".join(NAMES), device)


def load_clip_extractor(source: str | Path | nn.Module, device: str | torch.device = "cpu") -> Extractor:
    """An extractor for clips.

    Args:
        source: ``"i3d:PATH"``, the TorchScript file of the FVD; or a TorchScript file, or a network, that reads clips
            ``(n, T, C, H, W)`` in [0, 1] as they are.
        device: where it runs; a network that is given is moved there and put into eval mode.

    Raises:
        ValueError: it cannot be loaded.

    >>> load_clip_extractor(nn.Flatten())(torch.rand(2, 5, 1, 8, 8)).shape
    torch.Size([2, 320])
    """
    if isinstance(source, nn.Module):
        return _extractor(type(source).__name__, backbones.given(source), device)
    name, _, place = str(source).partition(":")
    if name == "i3d":
        return _extractor(name, backbones.i3d(Path(place).expanduser()), device)
    return _of_a_file(source, "i3d:PATH", device)


def _of_a_file(source: str | Path, names: str, device: str | torch.device) -> Extractor:
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(
            f"features come from {names}, a TorchScript file or an nn.Module; got {str(source)!r}, and there is no such file"
        )
    return _extractor(path.name, backbones.torchscript(path), device)


def _extractor(name: str, backbone: Backbone, device: str | torch.device) -> Extractor:
    backbone.network.to(device).eval()
    return Extractor(name, backbone, torch.device(device))
