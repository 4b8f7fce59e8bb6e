"""Hold-out for data without splits: at random, by a seed whose meaning never changes."""

import numpy as np
import numpy.typing as npt
import torch

from sigma_vae.config import DataConfig
from sigma_vae.data.splits import SplitName
from sigma_vae.data.stores import Labelled, Mapped, Store

__all__ = ["count_of", "hold_out", "shuffled"]

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
