"""Train, validation and test splits, raw and checked."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sigma_vae.conditions import Conditions
from sigma_vae.config import ClipConfig, DataConfig
from sigma_vae.data.batches import Batches, Scaling
from sigma_vae.data.stores import Labelled, Mapped, Part, Store

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

    @property
    def values_per_example(self) -> int:
        """Number of values in one training example: in all frames of a clip."""
        return math.prod(self.train.shape)

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


# -- examples that are held out ----------------------------------------------------------------------------------------

Numbers = npt.NDArray[np.int64]

ORDER: tuple[SplitName, ...] = ("test", "validation")
"""Test is held out first, so that the test examples do not depend on the size of validation."""


def hold_out(
    parts: dict[SplitName, Store], config: DataConfig, name: str, nouns: tuple[str, str] = ("clips", "video")
) -> tuple[dict[SplitName, Numbers], list[str]]:
    """Choose the missing splits among the training examples: first test, then validation.

    Clips are held out by whole videos, and examples of files with several by whole files, if there is at least one for
    each split. Return the rows of the training examples that each missing split, and training itself, gets, none where no
    split is missing; and the hold-out in words, with ``nouns`` for an example and its file.

    Raises:
        ValueError: there are too few examples, or a fraction or the seed is out of range.
    """
    labelled, examples = parts["train"], len(parts["train"])
    train = labelled.examples if isinstance(labelled, Labelled) else labelled
    missing = [split for split in ORDER if split not in parts]
    if examples <= len(missing):
        raise ValueError(
            f"{name} needs {len(missing) + 1} examples, one for each of train, {', '.join(missing)}, got {examples}; add some"
        )
    videos = train.videos.numpy() if isinstance(train, Mapped) and train.videos is not None else None
    number = 0 if videos is None else len(np.unique(videos))
    if videos is not None and number > len(missing):
        if config.stratify:
            raise ValueError(f"{name} is held out by whole {nouns[1]}s, which have no shares of classes; leave --stratify out")
        return _hold_out_videos(config, videos, missing, nouns)
    order = shuffled(examples, config.split_seed)
    rows, words = dict[SplitName, Numbers](), []
    label, strata = _strata(labelled, name) if config.stratify and missing else ("", None)
    for split in missing:
        count = count_of(split, len(order), config)
        if strata is not None:
            order = _spread(order, strata, count)
        rows[split], order = order[:count], order[count:]
        how = "at random" if strata is None else f"at random in proportion to {label}"
        words.append(f"{split}: {count} of {examples} examples {how} (seed {config.split_seed})")
    if missing and number:
        few = "is only one" if number == 1 else f"are only {number}"
        words.append(f"{nouns[0]} of one {nouns[1]} are in several splits, as there {few}")
    return (rows | {"train": order} if missing else rows), words


def _strata(train: Store, name: str) -> tuple[str, Numbers]:
    """The name of the class label, and the class of each example.

    Raises:
        ValueError: the examples have no single class label.
    """
    label = None if train.conditions is None else train.conditions.only_classes
    condition = train.condition(torch.arange(len(train)))
    if label is None or condition is None:
        raise ValueError(f"{name} is stratified by one class label; give it as --condition NAME, or leave --stratify out")
    return label.name, condition[:, 0].nan_to_num(-1).long().numpy()


def _spread(order: Numbers, strata: Numbers, count: int) -> Numbers:
    """The same examples, with first so many in which each class has its share, as near as whole examples can.

    >>> _spread(np.array([0, 1, 2, 3, 4, 5]), np.array([0, 0, 0, 0, 1, 1]), count=3).tolist()
    [0, 1, 4, 2, 3, 5]
    """
    classes, counts = np.unique(strata[order], return_counts=True)
    shares = counts * count / len(order)
    taken = np.floor(shares).astype(np.int64)
    short = count - int(taken.sum())
    taken[np.argsort(-(shares - taken), kind="stable")[:short]] += 1  # the largest remainders
    first = np.zeros(len(order), dtype=bool)
    for one, number in zip(classes, taken, strict=True):
        first[np.flatnonzero(strata[order] == one)[:number]] = True
    return np.concatenate([order[first], order[~first]])


def _hold_out_videos(
    config: DataConfig, videos: Numbers, missing: list[SplitName], nouns: tuple[str, str]
) -> tuple[dict[SplitName, Numbers], list[str]]:
    order = np.unique(videos)[shuffled(len(np.unique(videos)), config.split_seed)]
    rows, words = dict[SplitName, Numbers](), []

    def clips_of(chosen: Numbers) -> Numbers:
        return np.concatenate([np.flatnonzero(videos == video) for video in chosen])

    for later, split in zip(range(len(missing), 0, -1), missing, strict=True):  # leave a video for each later split
        count = min(max(1, round(_fraction(split, config) * len(order))), len(order) - later)
        rows[split], order = clips_of(order[:count]), order[count:]
        words.append(
            f"{split}: {len(rows[split])} {nouns[0]}, all from {count} {nouns[1]}{'s' * (count > 1)} at random"
            f" (seed {config.split_seed})"
        )
    return (rows | {"train": clips_of(order)} if missing else rows), words


def shuffled(count: int, seed: int) -> Numbers:
    """Return the numbers 0..count−1 in an order that depends only on the seed, in every version.

    >>> shuffled(5, seed=0)
    array([2, 0, 1, 3, 4])

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"split_seed is one of 0..2**32-1, got {seed}; give 0, say")
    # NumPy has frozen this generator's stream, so that a seed gives the same split in every version.
    return np.random.RandomState(seed).permutation(count)


def count_of(split: SplitName, available: int, config: DataConfig) -> int:
    """Return how many of the available examples go to validation or test.

    Raises:
        ValueError: the fraction leaves one side without examples.
    """
    fraction = _fraction(split, config)
    count = round(fraction * available)
    if not 0 < count < available:
        raise ValueError(
            f"{split}_fraction={fraction} holds out {count} of {available} examples, but {split} and train need one each; "
            f"give a share between {1 / available:.2g} and {1 - 1 / available:.2g}"
        )
    return count


def _fraction(split: SplitName, config: DataConfig) -> float:
    fraction = config.test_fraction if split == "test" else config.validation_fraction
    if not 0 < fraction < 1:
        raise ValueError(f"{split}_fraction is a share between 0 and 1, got {fraction}; give 0.1, say")
    return fraction
