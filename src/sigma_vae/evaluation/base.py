"""Contract of a metric, typed results, and what metrics share: data, passes over a split, seeding."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, final

import numpy as np
import torch
from torch import Tensor, distributed

from sigma_vae.config import EvaluationSettings, parse
from sigma_vae.data import Batches, Splits
from sigma_vae.data.splits import SPLITS, SplitName
from sigma_vae.registry import register
from sigma_vae.types import Batch, Inference, Noise
from sigma_vae.vae import VAE, Scores

EVALUATION_BATCH = 256


@dataclass(frozen=True, eq=False)
class Record(Mapping[str, Any]):
    """A result with fields, read by attribute (``x.rate_nats.mean``) or by key (``x["rate_nats"]["mean"]``).

    A subclass is a dataclass; its fields are numbers, words, lists, dictionaries and other records. Their names are the
    keys of its JSON; a field with the default None is left out while it is None.
    """

    def __getitem__(self, key: str) -> Any:
        if key not in self._names():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def _names(self) -> list[str]:
        return [each.name for each in fields(self) if each.default is not None or getattr(self, each.name) is not None]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, words, lists and dictionaries."""
        return {name: plain(value) for name, value in self.items()}

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Read what :meth:`to_json` gave; keys of other versions are ignored.

        Raises:
            ValueError: a key is missing or has a value of another type.
        """
        return parse(content, cls, "this result")


def plain(value: Any) -> Any:
    """Turn records, at any depth, into dictionaries."""
    match value:
        case Mapping():
            return {name: plain(each) for name, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
    return value


Result = Record | Mapping[str, Record] | None
"""Result of a metric: a record, records by name, or None where the metric does not apply to the model."""


@dataclass(frozen=True, eq=False)
class Estimate(Record):
    """A mean over examples, and its standard error; None for a single example.

    >>> estimate = Estimate.of(torch.tensor([0.0, 0.0, 0.0, 4.0]))
    >>> estimate.mean, estimate["standard_error"]
    (1.0, 1.0)
    """

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Tensor) -> "Estimate":
        """Estimate the mean of values ``(examples,)``."""
        error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
        return Estimate(float(values.mean()), error)


class Row(NamedTuple):
    """A row of a table in the terminal, in words."""

    name: str
    value: str
    standard_error: str = ""


def estimate_rows(result: Mapping[str, Any], suffix: str = "") -> Iterator[Row]:
    """A row for each estimate of a result."""
    for name, value in result.items():
        if isinstance(value, Estimate):
            error = "" if value.standard_error is None else f"{value.standard_error:.4f}"
            yield Row(name + suffix, f"{value.mean:.4f}", error)


def number_rows(result: Mapping[str, Any], suffix: str = "") -> Iterator[Row]:
    """A row for each estimate, then one for each single real number."""
    yield from estimate_rows(result, suffix)
    for name, value in result.items():
        if isinstance(value, float):
            yield Row(name + suffix, f"{value:.4f}")


@dataclass(frozen=True)
class Column:
    """A column of a study's table.

    Args:
        path: dotted place of the number in ``evaluation.json``; ``*`` stands for any name, such as that of a feature
            extractor. The mean of an estimate has the path of the estimate.
        title: heading, in words; ``{}`` is replaced by the name that ``*`` stands for.
        digits: decimal places.

    >>> frechet = Column("quality.*.frames.frechet", "Fréchet distance of frames ({})", 2)
    >>> frechet.title_of("quality.i3d.pt.frames.frechet"), frechet.title_of("rate_nats")
    ('Fréchet distance of frames (i3d.pt)', None)
    """

    path: str
    title: str
    digits: int

    def title_of(self, path: str) -> str | None:
        """Heading for the number at this place; None if the column is not about it."""
        found = re.fullmatch("(.+)".join(map(re.escape, self.path.split("*"))), path)
        return None if found is None else self.title.format(*found.groups())


@dataclass(frozen=True)
class EvaluationData:
    """Data to measure a model on.

    Args:
        held_out: the examples to measure on; of several processes, each holds its share.
        training: examples that the model was trained on, for metrics that need them; None where they are not at hand.
        splits: the whole data set; None where single batches were given.
    """

    held_out: Batches
    training: Batches | None = None
    splits: Splits | None = None
    scores: Scores | None = None
    """Scores of the held-out examples with the settings' seed, where they are known: the metrics of an evaluation share them."""

    def on_one_process(self) -> "EvaluationData":
        """The same data, all of them on this process."""

        def whole(batches: Batches) -> Batches:
            return Batches(batches.store, batches.scaling, batches.batch_size)

        training = None if self.training is None else whole(self.training)
        return replace(self, held_out=whole(self.held_out), training=training)


class Watcher(Protocol):
    """Sees what the network infers from each batch of held-out examples."""

    def rows(self, inference: Inference, noise: Noise) -> Tensor:
        """Numbers of each example, ``(batch, columns)``; ``noise`` goes on where the posterior's draws ended."""

    def result(self, vae: VAE, batches: Batches, rows: Tensor) -> Result:
        """The result, from the numbers of all examples ``(examples, columns)``, in the order of the split."""


class Metric(ABC):
    """A measurement of a model on held-out data.

    To add one, write a subclass in a file of its own and register it. Its result is then a section of
    ``evaluation.json``; the ``--metrics`` option, the terminal, ``compare`` and studies find it by its name::

        @register.metric("brightness")
        class Brightness(Metric):
            result = Estimate
            columns = (Column("brightness", "brightness of samples", 3),)

            def measure(self, vae, data, settings):
                return Estimate.of(vae.sample(100).flatten(1).mean(1))

            def rows(self, result):
                yield Row("brightness of samples", f"{result.mean:.3f}")

    An installed package registers its metrics by entry points in the group ``sigma_vae.metrics``. The registry makes
    the metric, with the name that it is registered under.
    """

    result: ClassVar[Any]
    """Type of the result: a :class:`Record`, or ``dict[str, SomeRecord]``."""
    measured: ClassVar[Literal["always", "by default", "when asked for"]] = "when asked for"
    """Whether every evaluation has it, or those that name no metrics, or only those that name it."""
    on_one_process: ClassVar[bool] = False
    """Whether, of several processes, the first one measures it, while the others wait."""
    draws_page: ClassVar[bool] = False
    """Whether :meth:`draw_page` draws a picture of the result."""
    columns: ClassVar[tuple[Column, ...]] = ()
    """Columns of a study's table."""

    @final
    def __init__(self, name: str) -> None:
        self.name = name

    def obstacle(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> str | None:
        """Say why the metric cannot be measured, in words that follow "cannot be measured: "; None if it can."""
        return None

    def is_asked_for(self, settings: EvaluationSettings) -> bool:
        """Whether the settings name it."""
        return self.name in (settings.metrics or ())

    def watcher(self, vae: VAE, settings: EvaluationSettings) -> "Watcher | None":
        """Measure in the pass over the examples that the bounds take; None: :meth:`measure` takes passes of its own."""
        return None

    @abstractmethod
    def measure(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> Result:
        """Measure a model, which is in eval mode."""

    @abstractmethod
    def rows(self, result: Any) -> Iterable[Row]:
        """Rows of the table in the terminal."""

    def notes(self, result: Any, report: Mapping[str, Any]) -> Iterable[str]:
        """Lines below the table; ``report`` is the whole evaluation."""
        return ()

    def compared(self, results: Sequence[Any]) -> list[dict[str, Any]]:
        """For each run the numbers to compare, by name: by default those of the metric's columns.

        A result is None where the run has none.
        """
        places = [column.path.removeprefix(self.name).removeprefix(".") for column in self.columns if "*" not in column.path]
        known = [place for place in places if any(_at(result, place) is not None for result in results)]
        return [{f"{self.name} {place}".rstrip(): _at(result, place) for place in known} for result in results]

    def draw_page(self, result: Any, path: Path, title: str) -> None:
        """Write a picture of the result."""
        raise NotImplementedError(f"{self.name} has no page")


def _at(result: Any, place: str) -> Any:
    """The value at a dotted place, the whole result at none; None where there is no value."""
    for name in filter(None, place.split(".")):
        result = result.get(name) if isinstance(result, Mapping) else None
    return result


def metrics() -> dict[str, Metric]:
    """All registered metrics by name; those of every evaluation first."""
    made = [entry.object(entry.name) for entry in register.metric]
    return {metric.name: metric for metric in sorted(made, key=lambda metric: metric.measured != "always")}


Rows = Callable[[Batch], Tensor]
"""Numbers of each example of a batch: ``(batch, columns)``, or ``(batch,)``."""


@torch.no_grad()
def each_example(vae: VAE, batches: Batches, rows: Rows) -> Tensor:
    """Compute numbers of every example, in the order of the split, on the CPU in float64.

    Batches are moved to the model's device. Where they are one process's share (``world_size`` above 1), the shares of
    all processes of the default group are gathered: each must call this, and each gets everything.

    Shapes:
        result ``(examples, columns)``, or ``(examples,)``.

    Raises:
        ValueError: the batches are a share, and there is no group of as many processes.
    """
    _check_group(batches)
    found = [(batch.positions, rows(batch).cpu().double()) for batch in _on(vae.device, batches)]
    positions, values = torch.cat([p for p, _ in found]), torch.cat([v for _, v in found])
    if batches.world_size > 1:
        both = _all_rows(torch.cat([positions[:, None].double(), values.reshape(len(values), -1)], 1), vae.device)
        positions, values = both[:, 0].long(), both[:, 1:].reshape(-1, *values.shape[1:])
    return values[positions.argsort()]


@torch.no_grad()
def sum_over_examples(vae: VAE, batches: Batches, rows: Rows) -> Tensor:
    """Sum numbers over all examples, ``(columns,)``: :func:`each_example` for more numbers than memory holds."""
    _check_group(batches)
    sums = (rows(batch).cpu().double().sum(0) for batch in _on(vae.device, batches))
    total = sum(sums, torch.zeros((), dtype=torch.float64))
    assert isinstance(total, Tensor)
    add_up(vae, batches, [total])
    return total


def add_up(vae: VAE, batches: Batches, sums: Iterable[Tensor]) -> None:
    """Replace each process's sums, on the CPU, by the sums over all processes, in place."""
    if batches.world_size == 1:
        return
    for mine in sums:
        total = mine.to(vae.device)
        distributed.all_reduce(total)
        mine.copy_(total)


def _on(device: torch.device, batches: Batches) -> Iterator[Batch]:
    return (batch.to(device) for batch in batches)


def _check_group(batches: Batches) -> None:
    known = distributed.is_available() and distributed.is_initialized()
    processes = distributed.get_world_size() if known else 1
    if batches.world_size not in (1, processes):
        raise ValueError(
            f"these batches are the share of one of {batches.world_size} processes, but there are {processes}, so the others' examples"
            " would be missing; initialise torch.distributed in each process, or give all examples (world_size=1)"
        )


def _all_rows(mine: Tensor, device: torch.device) -> Tensor:
    """Gather the rows of all processes, whose numbers may differ."""
    count = torch.tensor([len(mine)], device=device)
    counts = [torch.empty_like(count) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, count)
    most = max(int(n) for n in counts)
    padded = torch.zeros(most, mine.shape[1], dtype=mine.dtype, device=device)
    padded[: len(mine)] = mine.to(device)
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)]).cpu()


def evaluation_batch(data: Splits) -> int:
    """Examples per batch where nothing is trained; fewer for clips, by the frames of the longest."""
    frames = max(data.store(split).shape[0] for split in SPLITS) if data.clips else 1
    return max(1, EVALUATION_BATCH // frames)


def part(batches: Batches, chosen: Tensor) -> Batches:
    """The examples at these positions of a split; of several processes, each keeps a share of every batch."""
    n, world = len(chosen), batches.world_size
    sizes = range(min(batches.batch_size, n), n + 1)
    size = next(size for size in sizes if n % size == 0 or n % size >= world)
    return Batches(batches.store.select(chosen), batches.scaling, size, rank=batches.rank, world_size=world)


def spaced(n: int, most: int) -> Tensor:
    """At most so many of n positions, evenly spaced, as data sets may be sorted."""
    return torch.arange(n) if n <= most else torch.arange(most) * n // most


def subset(data: Splits, split: SplitName, n: int, batch: int, seed: int, device: torch.device) -> Batches:
    """N examples of a split in their order, chosen at random as files may be sorted; all if there are no more."""
    return Batches(data.sampled(split, n, seed).store(split).to(device), data.scaling, batch)


def about(data: Splits) -> dict[str, Any]:
    """The part of a record that says which data were used, and how they were cut and resized."""
    return {
        "name": data.name,
        "shape": list(data.shape),
        "preprocessing": data.record.get("preprocessing"),
        "fingerprint": data.record.get("fingerprint"),
    }


@contextmanager
def seeded(seed: int, number: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for a block, and restore them afterwards.

    >>> first, again = [], []
    >>> for numbers in (first, again):
    ...     with seeded(0, 5, torch.device("cpu")):
    ...         numbers.append(torch.rand(1))
    >>> first == again
    True
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]))
        yield
