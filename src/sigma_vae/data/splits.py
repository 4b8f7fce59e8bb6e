"""Train, validation and test, stored as levels."""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from sigma_vae.data.batches import Batches, scale

__all__ = ["SplitName", "Splits", "fingerprint"]

SplitName = Literal["train", "validation", "test"]


@final
@dataclass(frozen=True, eq=False)
class Splits:
    """A data set in three parts that share no example.

    Shapes:
        train, validation, test ``(N, C, *space)``, of clips ``(N, T, C, *space)``: levels 0..levels−1 as integers (uint8 up to 256
        levels), or float32 values in [0, 1] where ``levels`` is None.

    >>> part = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    >>> splits = Splits("two pixels", part, part, part, levels=256, record={})
    >>> splits.shape
    (1, 1, 2)
    >>> splits.values("test")
    tensor([[[[0., 1.]]]])
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    levels: int | None
    record: dict[str, Any]
    """Where the data come from: source, files, counts, preprocessing in words, fingerprint; plain values, for JSON."""
    frames: int | None = None
    """How many frames a training clip has; None for still data. Clips of the other splits may have more or fewer."""
    _on_device: dict[tuple[SplitName, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        shapes = {name: tuple(self.stored(name).shape) for name in ("train", "validation", "test")}
        if len({shape[1 if self.frames is None else 2 :] for shape in shapes.values()}) > 1:
            raise ValueError(f"{self.name}: examples of all splits need one shape, got {shapes}")
        if empty := [name for name, shape in shapes.items() if 0 in shape]:
            raise ValueError(f"{self.name}: every split needs an example, got none in {', '.join(empty)} ({shapes})")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example, or of one frame of a clip: ``(C, *space)``."""
        return tuple(self.train.shape[1 if self.frames is None else 2 :])

    def stored(self, split: SplitName) -> Tensor:
        """A split as it is kept: levels, or float32 values."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        if split not in parts:
            raise ValueError(f"a split is one of {', '.join(parts)}, got {split!r}")
        return parts[split]

    def values(self, part: SplitName | Tensor) -> Tensor:
        """Float32 values in [0, 1] of a split, or of any part of what :meth:`stored` gives: level k is k/(levels − 1)."""
        return scale(part if isinstance(part, Tensor) else self.stored(part), self.levels)

    def batches(
        self,
        split: SplitName,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
    ) -> Batches:
        """A split in batches, scaled to [0, 1]; see :class:`Batches`. Of its examples the first ``limit``, if that is given.

        The split is moved to the device once; all batches of this split on this device share it.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit counts the examples that are used and is at least 1, got {limit}")
        stored = self._moved(split, torch.device(device))[:limit]
        return Batches(stored, self.levels, batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)

    def _moved(self, split: SplitName, device: torch.device) -> Tensor:
        if (split, device) not in self._on_device:
            self._on_device[split, device] = self.stored(split).to(device)
        return self._on_device[split, device]


def fingerprint(parts: dict[SplitName, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and content of the stored tensors.

    >>> fingerprint({"train": torch.zeros(1, 1)})[:8] == fingerprint({"test": torch.zeros(1, 1)})[:8]
    False
    """
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(f"{name} {part.dtype} {tuple(part.shape)}\n".encode())
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()
