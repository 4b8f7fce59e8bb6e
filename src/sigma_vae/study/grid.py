"""A grid of runs as data: what is the same in all of them, and what is varied."""

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from sigma_vae.config import RunConfig
from sigma_vae.configfile import parse, read
from sigma_vae.evaluation.settings import EvaluationSettings
from sigma_vae.study.words import told

__all__ = ["SHIPPED", "Cell", "StudySpec", "cells", "read_spec"]

SHIPPED = tuple(sorted(path.name.removesuffix(".yaml") for path in resources.files(__package__).joinpath("specs").iterdir()))
"""Names of the specs that come with the library."""

TAKEN = re.compile(
    "key|status|error|prior|split|observes|training_seconds|core_seconds|arm|seeds"
    "|examples|dims|levels|noise_seed|latent_dim|active_units|bits_per_dim.*|.*_nats|(sigma|factor)_post_hoc_.*"
)
"""Columns of a study's table, which no axis can be called."""
SEED, STANDARD = "seed", "standard"

Values = list[Any] | dict[str, dict[str, Any]]
"""Of an axis: values of one setting, or settings that go together, by a label."""


@dataclass(frozen=True)
class StudySpec:
    """A study: every combination of the axes' values is a cell, trained once and evaluated with every prior."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    title: str
    """What it is called."""
    base: dict[str, Any]
    """What all runs have in common: any part of a run's config."""
    axes: dict[str, Values]
    """What is varied. The name of a setting, as ``model.likelihood``, ``training.kl_weight`` or ``seed``, with its values; or a name of
    your own, but of no column of the table, with, for each label, settings that go together: ``{mlp: {model.network: mlp, model.width:
    400}}``."""
    about: str = ""
    """What it is to show."""
    priors: tuple[str, ...] = ("standard",)
    """Fitted after the training, one after the other, to the same weights."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """What is measured of each on the test split, with further priors the samples and bounds alone; on the validation split the bounds."""
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Other sizes of the same study by name: what of ``base``, ``axes``, ``priors`` and ``evaluation`` they replace."""
    published: dict[str, Any] = field(default_factory=dict)
    """The paper's numbers, to stand beside ours."""

    def __post_init__(self) -> None:
        """Refuse a grid without cells, and axes that would be taken for something else."""
        for name, values in self.axes.items():
            if not values:
                raise ValueError(f"the axis {name} has no values; give it some, or leave it out")
            if TAKEN.fullmatch(name):
                raise ValueError(f"the axis {name} has the name of a column of the study's table; call it something else")
            if name == SEED and not isinstance(values, list):
                raise ValueError(
                    f"the axis seed pairs runs, and is a list of numbers, got the labels {', '.join(values)}; give"
                    " seed: [0, 1, 2], and call the labels' axis something else"
                )
        if not self.priors:
            raise ValueError("priors names at least one: standard")


class Cell(NamedTuple):
    """One run of a study."""

    place: dict[str, Any]
    """Its value, or label, on each axis."""
    config: RunConfig
    priors: tuple[str, ...]
    evaluation: EvaluationSettings

    @property
    def key(self) -> str:
        """Names the cell by what it is made of: the same in every study that has it, and where a later version has more settings."""
        made_of = {"config": _given(self.config), "priors": self.priors, "evaluation": _given(self.evaluation)}
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def read_spec(name: str, size: str | None = None) -> StudySpec:
    """A study by its name or from a YAML file, in one of its sizes.

    Raises:
        ValueError: there is no such study or size, or the file holds something else.
    """
    path = Path(name)
    if name in SHIPPED:
        path = Path(str(resources.files(__package__).joinpath("specs", f"{name}.yaml")))
    elif not path.is_file():
        raise ValueError(f"there is no study {name!r}; known: {', '.join(SHIPPED)}, or the path of a YAML file")
    spec = read(path, StudySpec)
    if size is None:
        return spec
    if size not in spec.sizes:
        raise ValueError(f"{name} has no size {size!r}; it has: {', '.join(spec.sizes) or 'its own alone'}")
    whole = {key: value for key, value in asdict(spec).items() if key != "sizes"}
    return parse(_merged(whole, spec.sizes[size]), StudySpec, f"{name}, size {size}")


def cells(spec: StudySpec) -> list[Cell]:
    """Every combination of the axes' values, the last axis first.

    Raises:
        ValueError: a setting does not exist, or has no such value; a run is given a prior, which the study would fit anew; or two places
            in the grid are the same run.

    >>> axes = {"model.likelihood": ["gaussian/optimal", "gaussian/fixed:1.0"], "seed": [0, 1]}
    >>> [cell.place["seed"] for cell in cells(StudySpec("two", {"data": {"source": "digits"}}, axes))]
    [0, 1, 0, 1]
    """
    labelled = [[(name, label, settings) for label, settings in _settings(name, values)] for name, values in spec.axes.items()]
    found: dict[str, Cell] = {}
    for chosen in itertools.product(*labelled):
        cell = _cell(spec, {name: label for name, label, _ in chosen}, [settings for _, _, settings in chosen])
        if (same := found.setdefault(cell.key, cell)) is not cell:
            raise ValueError(
                f"{spec.title} has the same run twice: {told(same.place)}, and {told(cell.place)}; leave one of them out,"
                " or let them differ in a setting"
            )
    return list(found.values())


def _cell(spec: StudySpec, place: dict[str, Any], chosen: Sequence[Mapping[str, Any]]) -> Cell:
    """The settings of a place over those that all have in common."""
    content = copy.deepcopy(spec.base)
    for settings in chosen:
        for path, value in settings.items():
            _put(content, path, value)
    config = parse(content, RunConfig, f"{spec.title}, cell {place}")
    if config.model.prior != STANDARD:
        raise ValueError(
            f"{spec.title}, cell {place}, is given the prior {config.model.prior}, and runs of a study are trained with N(0, I) and"
            f" then given each of the study's priors; leave model.prior out, and write priors: [standard, {config.model.prior}]"
        )
    return Cell(place, config, spec.priors, spec.evaluation)


def _given(config: Any) -> dict[str, Any]:
    """What differs from the defaults, part by part."""
    found: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        usual = each.default if each.default_factory is MISSING else each.default_factory()
        if is_dataclass(value):
            value, usual = _given(value), {}
        if value != usual:
            found[each.name] = value
    return found


def _settings(name: str, values: Values) -> list[tuple[Any, Mapping[str, Any]]]:
    """Label and settings of each value."""
    if isinstance(values, dict):
        return list(values.items())
    return [(value, {name: value}) for value in values]


def _put(content: dict[str, Any], path: str, value: Any) -> None:
    """Set ``a.b.c``."""
    *parents, last = path.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise ValueError(f"{path} is no setting of a run: {parent} has a value, {content!r}, and no parts")
    content[last] = value


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Theirs over ours; dictionaries part by part, but axes as a whole."""
    merged = dict(ours)
    for key, value in theirs.items():
        whole = key == "axes" or not (isinstance(value, dict) and isinstance(ours.get(key), dict))
        merged[key] = value if whole else _merged(ours[key], value)
    return merged
