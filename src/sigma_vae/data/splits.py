"""Train, validation and test splits."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from sigma_vae.config import ClipConfig
from sigma_vae.data.batches import Batches
from sigma_vae.data.scaling import Scaling
from sigma_vae.data.stores import Store

__all__ = ["SPLIT_WORDS", "SplitName", "Splits", "clip_lengths", "fingerprint"]


def clip_lengths(clips: ClipConfig, frames: int, test_frames: int) -> tuple[int, int]:
    """Frames of a clip in training and in test: what the user says, else what is usual for the data.

    Who gives the one alone has it for both.

    >>> clip_lengths(ClipConfig(), 12, 30), clip_lengths(ClipConfig(frames=16), 12, 30)
    ((12, 30), (16, 16))
    """
    if clips.frames is not None:
        return clips.frames, clips.test_frames or clips.frames
    return frames, clips.test_frames or test_frames


SplitName = Literal["train", "validation", "test"]

SPLIT_WORDS: Mapping[str, SplitName] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
"""What keys, folders and files of a split are called."""


@final
@dataclass(frozen=True, eq=False)
class Splits:
    """A data set in three parts that share no example.

    >>> from sigma_vae.data.stores import InMemory
    >>> part = InMemory(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    >>> splits = Splits("two pixels", part, part, part, Scaling(levels=256), record={})
    >>> splits.shape
    (1, 1, 2)
    >>> splits.values("test")
    tensor([[[[0., 1.]]]])
    """

    name: str
    train: Store
    validation: Store
    test: Store
    scaling: Scaling
    record: dict[str, Any]
    """Where the data come from: source, files, counts, preprocessing in words, fingerprint; plain values, for JSON."""
    clips: bool = False
    """Whether an example is a clip ``(T, C, *space)``; the clips of one split are of one length."""
    _on_device: dict[tuple[SplitName, torch.device], Store] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        shapes = {name: (len(store), *store.shape) for name, store in self._parts.items()}
        if len({shape[2 if self.clips else 1 :] for shape in shapes.values()}) > 1:
            raise ValueError(f"{self.name}: examples of all splits need one shape, got {shapes}")
        if empty := [name for name, shape in shapes.items() if 0 in shape]:
            raise ValueError(f"{self.name}: every split needs an example, got none in {', '.join(empty)} ({shapes})")

    @property
    def _parts(self) -> dict[SplitName, Store]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def levels(self) -> int | None:
        """How many values a datum can take; None for real values."""
        return self.scaling.levels

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example, or of one frame of a clip: ``(C, *space)``."""
        return self.train.shape[1:] if self.clips else self.train.shape

    @property
    def frames(self) -> int | None:
        """How many frames a training clip has; None for still data."""
        return self.train.shape[0] if self.clips else None

    def store(self, split: SplitName) -> Store:
        """Where a split lies."""
        if split not in self._parts:
            raise ValueError(f"a split is one of {', '.join(self._parts)}, got {split!r}")
        return self._parts[split]

    def stored(self, split: SplitName) -> Tensor:
        """All of a split as it is stored: levels as integers, or float32 values."""
        store = self.store(split)
        return store.take(torch.arange(len(store)))

    def values(self, split: SplitName) -> Tensor:
        """All of a split as a model reads it: in [0, 1], or standardised."""
        return self.scaling(self.stored(split))

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
        """A split in batches, as a model reads it; see :class:`Batches`. Of its examples the first ``limit``, if that is given.

        What lies in memory is moved to the device once; all batches of this split on this device share it.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit counts the examples that are used and is at least 1, got {limit}")
        store = self._moved(split, torch.device(device))
        if limit is not None and limit < len(store):
            store = store.select(torch.arange(limit))
        return Batches(store, self.scaling, batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)

    def _moved(self, split: SplitName, device: torch.device) -> Store:
        if (split, device) not in self._on_device:
            self._on_device[split, device] = self.store(split).to(device)
        return self._on_device[split, device]


def fingerprint(parts: dict[SplitName, Store]) -> str:
    """SHA-256 over the names and fingerprints of the splits.

    >>> from sigma_vae.data.stores import InMemory
    >>> store = InMemory(torch.zeros(1, 1))
    >>> fingerprint({"train": store})[:8] == fingerprint({"test": store})[:8]
    False
    """
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(f"{name} {part.fingerprint()}\n".encode())
    return digest.hexdigest()
