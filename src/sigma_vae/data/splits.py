"""Train, validation and test splits, raw and checked."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sigma_vae.conditions import Conditions
from sigma_vae.config import ClipConfig
from sigma_vae.data.batches import Batches
from sigma_vae.data.scaling import Scaling
from sigma_vae.data.stores import Part, Store

__all__ = ["SPLITS", "SPLIT_WORDS", "Names", "Raw", "SplitName", "Splits", "clip_lengths", "counted", "few", "fingerprint"]


SplitName = Literal["train", "validation", "test"]
Names = npt.NDArray[Any]
"""Names of examples ``(examples,)``: words or numbers."""

SPLIT_WORDS: Mapping[str, SplitName] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
"""Names of keys, folders and files, and the split that each stands for."""
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@final
@dataclass(frozen=True, eq=False)
class Splits:
    """A data set in three splits that share no example.

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
    """Origin of the data: source, files, counts, preprocessing in words, fingerprint; plain values, for JSON."""
    clips: bool = False
    """Whether an example is a clip ``(T, C, *space)``; all clips of one split have one length."""
    names: Mapping[SplitName, Names] = field(default_factory=dict)
    """Names of a split's examples, in order: files, the index of a data frame, or numbers from 0 in the source."""
    _on_device: dict[tuple[SplitName, torch.device], Store] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        shapes = {name: (len(store), *store.shape) for name, store in self._parts.items()}
        if len({shape[2 if self.clips else 1 :] for shape in shapes.values()}) > 1:
            raise ValueError(f"{self.name}: examples of all splits need one shape, got {shapes}")
        if empty := [name for name, shape in shapes.items() if 0 in shape]:
            raise ValueError(f"{self.name}: every split needs an example, got none in {', '.join(empty)} ({shapes})")
        numbers = {name: np.arange(len(store)) for name, store in self._parts.items()}
        object.__setattr__(self, "names", numbers | dict(self.names))

    @property
    def _parts(self) -> dict[SplitName, Store]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def conditions(self) -> Conditions | None:
        """The variables of the examples' conditions; None where they have none."""
        return self.train.conditions

    @property
    def levels(self) -> int | None:
        """Number of values that a datum can take; None for real values."""
        return self.scaling.levels

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example, or of one frame of a clip: ``(C, *space)``."""
        return self.train.shape[1:] if self.clips else self.train.shape

    @property
    def frames(self) -> int | None:
        """Frames per training clip; None for still data."""
        return self.train.shape[0] if self.clips else None

    def store(self, split: SplitName) -> Store:
        """The examples of a split."""
        if split not in self._parts:
            raise ValueError(f"a split is one of {', '.join(self._parts)}, got {split!r}")
        return self._parts[split]

    def stored(self, split: SplitName) -> Tensor:
        """Return a whole split in its stored form: integer levels, or float32 values."""
        store = self.store(split)
        return store.take(torch.arange(len(store)))

    def values(self, split: SplitName) -> Tensor:
        """Return a whole split as a model reads it: in [0, 1], or standardised."""
        return self.scaling(self.stored(split))

    def sampled(self, split: SplitName, count: int, seed: int = 0) -> "Splits":
        """The same data with at most so many examples of a split: chosen at random, as files may be sorted; in their order.

        >>> from sigma_vae.data.stores import InMemory
        >>> part = InMemory(torch.arange(100)[:, None])
        >>> splits = Splits("numbers", part, part, part, Scaling(levels=100), record={}).sampled("test", 3)
        >>> splits.names["test"].tolist() == splits.stored("test")[:, 0].tolist(), len(splits.test), len(splits.train)
        (True, 3, 100)
        """
        store = self.store(split)
        if count >= len(store):
            return self
        chosen = torch.randperm(len(store), generator=torch.Generator().manual_seed(seed))[:count].sort().values
        parts: dict[str, Any] = {str(name): each for name, each in self._parts.items()} | {split: store.select(chosen)}
        return replace(self, **parts, names={**self.names, split: self.names[split][chosen.numpy()]})

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
        """Return a split, or its first ``limit`` examples, in batches as a model reads it; see :class:`Batches`.

        A split in memory moves to the device once; all batches of this split on this device share it.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit counts the examples to use and is at least 1, got {limit}")
        place = split, torch.device(device)
        if place not in self._on_device:
            self._on_device[place] = self.store(split).to(place[1])
        store = self._on_device[place]
        if limit is not None and limit < len(store):
            store = store.select(torch.arange(limit))
        return Batches(store, self.scaling, batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)


@dataclass(frozen=True, eq=False)
class Raw:
    """The output of a reader: the splits that the source has, at least train, with values as they are.

    Arrays are ``(N, C, *space)``, or ``(N, T, C, *space)`` for clips.
    """

    name: str
    parts: Mapping[SplitName, Part]
    files: list[dict[str, Any]] = field(default_factory=list)
    """Origin of the examples: plain values, for JSON."""
    preprocessing: list[str] = field(default_factory=list)
    """Everything that was done to the examples, in words."""
    levels: int | None = None
    """Number of levels that the source is known to have; None if the arrays' dtype decides."""
    clips: bool = False
    standardise: bool = False
    """Whether real values are standardised by default: yes for tables, whose columns have units of their own."""
    columns: tuple[str, ...] = ()
    """Names of a table's columns, in order."""
    names: Mapping[SplitName, Names] = field(default_factory=dict)
    """Names of the examples, where they have other ones than files and numbers."""
    labels: Mapping[SplitName, Mapping[str, Any]] = field(default_factory=dict)
    """Labels and covariates of the examples by name, a column for each, before any example is left out."""


def fingerprint(parts: dict[SplitName, Store]) -> str:
    """SHA-256 of the names and fingerprints of the splits.

    >>> from sigma_vae.data.stores import InMemory
    >>> store = InMemory(torch.zeros(1, 1))
    >>> fingerprint({"train": store})[:8] == fingerprint({"test": store})[:8]
    False
    """
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(f"{name} {part.fingerprint()}\n".encode())
    return digest.hexdigest()


def counted(number: int, thing: str) -> str:
    """A number with its noun.

    >>> counted(1, "row"), counted(2, "row")
    ('1 row', '2 rows')
    """
    return f"{number} {thing}{'s' * (number != 1)}"


def few(names: Sequence[str]) -> str:
    """The first ten of some names, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def clip_lengths(clips: ClipConfig, frames: int, test_frames: int) -> tuple[int, int]:
    """Return the frames per clip in training and in test: the user's, else the usual ones of the data.

    ``frames`` alone sets both.

    >>> clip_lengths(ClipConfig(), 12, 30), clip_lengths(ClipConfig(frames=16), 12, 30)
    ((12, 30), (16, 16))
    """
    if clips.frames is not None:
        return clips.frames, clips.test_frames or clips.frames
    return frames, clips.test_frames or test_frames
