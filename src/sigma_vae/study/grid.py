"""A grid of runs as data: shared settings and varied ones."""

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from sigma_vae import models
from sigma_vae.config import EvaluationSettings, ModelConfig, RunConfig, TrainingConfig, parse, read
from sigma_vae.data import names
from sigma_vae.registry import register
from sigma_vae.types import Likelihood


def in_words(value: Any) -> str:
    """Format a value of an axis as a spec writes it.

    >>> in_words(None), in_words({"size": 8}), in_words(0.5), in_words("gaussian/optimal")
    ('null', '{"size": 8}', '0.5', 'gaussian/optimal')
    """
    return json.dumps(value, ensure_ascii=False) if value is None or isinstance(value, dict | list) else str(value)


def format_place(place: Mapping[str, Any]) -> str:
    """Format a place in a grid.

    >>> format_place({"model.likelihood": "gaussian/optimal", "training.max_steps": None, "seed": 0})
    'likelihood gaussian/optimal, max_steps null, seed 0'
    """
    return ", ".join(f"{name.rpartition('.')[2]} {in_words(value)}" for name, value in place.items())


def as_column(values: Sequence[Any]) -> dict[str, Any]:
    """Map the words of each value to its entry in a table's column: numbers where all are numbers, else words.

    >>> as_column([16, 32]), as_column([None, 5]), as_column([{"size": 8}])
    ({'16': 16, '32': 32}, {'null': 'null', '5': '5'}, {'{"size": 8}': '{"size": 8}'})
    """
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return {in_words(value): value if numbers else in_words(value) for value in values}


SHIPPED = tuple(sorted(path.name.removesuffix(".yaml") for path in resources.files(__package__).joinpath("specs").iterdir()))
"""Names of the specs that come with the library."""

TAKEN = re.compile(
    "key|status|error|failures|curve|prior|split|observes|training_seconds|core_seconds|arm|seeds"
    "|examples|dims|levels|noise_seed|latent_dim|active_units|bits_per_dim.*|.*_nats|(sigma|factor)_post_hoc_.*"
)
"""Names of columns of a study's table; no axis can have them."""
SEED, STANDARD = "seed", "standard"

Values = list[Any] | dict[str, dict[str, Any]]
"""An axis: values of one setting, or labels with settings that go together."""


@dataclass(frozen=True)
class StudySpec:
    """A study: every combination of the axes' values is a cell, trained once and evaluated with every prior."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    title: str
    """Title of the report."""
    base: dict[str, Any]
    """Settings of all runs: any part of a run's config."""
    axes: dict[str, Values]
    """Varied settings. Either the name of a setting (``model.likelihood``, ``training.kl_weight``, ``seed``) with its
    values, or a name of your own with settings for each label: ``{mlp: {model.network: mlp, model.width: 400}}``. It
    cannot be the name of a column."""
    about: str = ""
    """The question that the study answers."""
    priors: tuple[str, ...] = ("standard",)
    """Priors to fit after training, one after the other, to the same weights."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """Metrics on the test split; further priors get samples and bounds only, and the validation split bounds only."""
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Other sizes of the study by name, with the parts of ``base``, ``axes``, ``priors`` and ``evaluation`` that they
    replace."""
    published: dict[str, Any] = field(default_factory=dict)
    """The paper's numbers, to print beside ours."""

    def __post_init__(self) -> None:
        """Refuse a grid without cells, and axes with names that mean something else."""
        for name, values in self.axes.items():
            if not values:
                raise ValueError(f"the axis {name} has no values; give it some, or leave it out")
            if TAKEN.fullmatch(name):
                raise ValueError(f"the axis {name} has the name of a column of the study's table; call it something else")
            if name == SEED and not isinstance(values, list):
                raise ValueError(
                    f"the axis seed is a list of numbers, as it pairs runs; got the labels {', '.join(map(str, values))}; give"
                    " seed: [0, 1, 2], and call the labels' axis something else"
                )
        if not self.priors:
            raise ValueError("priors is empty; name at least one: standard")


class Cell(NamedTuple):
    """One run of a study."""

    place: dict[str, Any]
    """Its value or label on each axis."""
    config: RunConfig
    priors: tuple[str, ...]
    evaluation: EvaluationSettings

    @property
    def key(self) -> str:
        """Digest of the cell's settings: equal in every study with this cell, and in later versions."""
        made_of = {"config": _given(self.config), "priors": self.priors, "evaluation": _given(self.evaluation)}
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def read_spec(name: str, size: str | None = None) -> StudySpec:
    """Read a study by its name, from a YAML file or from the table of a kept study, in one of its sizes.

    Raises:
        ValueError: there is no such study or size, or the file holds something else.
    """
    path = Path(name)
    if name in SHIPPED:
        path = Path(str(resources.files(__package__).joinpath("specs", f"{name}.yaml")))
    elif not path.is_file():
        raise ValueError(f"there is no study {name!r}; known: {', '.join(SHIPPED)}, or the path of a YAML file")
    spec = kept_spec(path) if path.suffix == ".parquet" else read(path, StudySpec)
    if size is None:
        return spec
    if size not in spec.sizes:
        raise ValueError(f"{name} has no size {size!r}; known: {', '.join(spec.sizes) or 'none'}")
    whole = {key: value for key, value in asdict(spec).items() if key != "sizes"}
    return parse(_merged(whole, spec.sizes[size]), StudySpec, f"{name}, size {size}")


def cells(spec: StudySpec) -> list[Cell]:
    """List every combination of the axes' values; the last axis varies fastest.

    Raises:
        ValueError: a setting does not exist, or has no such value; a run is given a prior, which the study would fit
            anew; or two places in the grid are the same run.

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
                f"{spec.title} has the same run twice: {format_place(same.place)}, and {format_place(cell.place)}; leave one out, or"
                " change a setting of one"
            )
    return list(found.values())


def _cell(spec: StudySpec, place: dict[str, Any], chosen: Sequence[Mapping[str, Any]]) -> Cell:
    """Make the cell at a place: its own settings over the shared ones."""
    content = copy.deepcopy(spec.base)
    for settings in chosen:
        for path, value in settings.items():
            _put(content, path, value)
    content.setdefault("model", {})  # a study says its likelihoods: none is chosen by the data
    config = parse(content, RunConfig, f"{spec.title}, cell {place}")
    if config.model.prior == "auto":
        config = replace(config, model=replace(config.model, prior=STANDARD))
    if config.model.prior != STANDARD:
        raise ValueError(
            f"{spec.title}, cell {place}, sets the prior {config.model.prior}, but runs of a study are trained with N(0, I) and"
            f" then get each of the study's priors; leave model.prior out, and write priors: [standard, {config.model.prior}]"
        )
    return Cell(place, config, spec.priors, spec.evaluation)


FIRST_DEFAULTS = {
    "model.prior": STANDARD,
    "training.start": "random",
    "training.epochs": 20,
    "training.batch_size": 128,
    "training.ema_decay": None,
    "training.patience": None,
    "training.sigma_from": "batch",
}
"""Defaults that have changed since the first studies: keys of cells are made by the old ones, so that theirs stay.

A kept study says what it was run with; where its grid lacks one of these, it is older than the change.
"""

GRID = "study"
"""Name of the grid among the attributes of a kept study's table."""


def pinned(spec: StudySpec, *, first: bool = False) -> StudySpec:
    """Say in the spec what it leaves to defaults that have changed: today's, or the first ones.

    >>> spec = StudySpec("one", {"training": {"epochs": 3}}, {"seed": [0]})
    >>> pinned(spec, first=True).base["training"]["epochs"], pinned(spec, first=True).base["training"]["start"]
    (3, 'random')
    """
    now = {"model": asdict(ModelConfig()), "training": asdict(TrainingConfig())}
    base = copy.deepcopy(spec.base)
    for path, old in FIRST_DEFAULTS.items():
        part, name = path.split(".")
        base.setdefault(part, {}).setdefault(name, old if first else now[part][name])
    return replace(spec, base=base)


def kept_spec(table: Path) -> StudySpec:
    """Read the grid of a kept study from its table; defaults that have changed since are the first ones.

    Raises:
        ValueError: the file cannot be read, or holds no grid.
    """
    import pandas as pd

    try:
        content = pd.read_parquet(table, columns=["key"]).attrs.get(GRID)
    except Exception as error:  # on foreign bytes the reader raises nearly anything
        raise ValueError(f"{table} cannot be read as the table of a study ({type(error).__name__}: {error})") from error
    if content is None:
        raise ValueError(f"{table} holds no grid of a study; the file study.yaml of its folder has it")
    return pinned(parse(content, StudySpec, str(table)), first=True)


def _given(config: Any, within: str = "") -> dict[str, Any]:
    """The settings that differ from the first defaults, part by part."""
    found: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        usual = each.default if each.default_factory is MISSING else each.default_factory()
        usual = FIRST_DEFAULTS.get(within + each.name, usual)
        if is_dataclass(value):
            value, usual = _given(value, f"{within}{each.name}."), {}
        if value != usual:
            found[each.name] = value
    return found


def _settings(name: str, values: Values) -> list[tuple[Any, Mapping[str, Any]]]:
    """List the label and settings of each value."""
    if isinstance(values, dict):
        return list(values.items())
    return [(value, {name: value}) for value in values]


def _put(content: dict[str, Any], path: str, value: Any) -> None:
    """Set ``a.b.c``."""
    *parents, last = path.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise ValueError(f"{path} is no setting of a run: {parent} is a value ({content!r}) without parts")
    content[last] = value


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Put theirs over ours: dictionaries part by part, but axes as a whole."""
    merged = dict(ours)
    for key, value in theirs.items():
        whole = key == "axes" or not (isinstance(value, dict) and isinstance(ours.get(key), dict))
        merged[key] = value if whole else _merged(ours[key], value)
    return merged


LEVELS = 256
"""Levels of pictures in a named data set, unless the config says otherwise."""


def check(cells: Sequence[Cell]) -> None:
    """Refuse cells that would fail after minutes or hours.

    Raises:
        ValueError: a likelihood, network, prior or file of features does not exist, the network takes no such prior, or
            a metric does not apply to the likelihood or the network. The message names the cell.
    """
    for cell in cells:
        try:
            _check(cell)
        except ValueError as error:
            raise ValueError(
                f"the cell {format_place(cell.place)} cannot be run: {error}" if cell.place else str(error)
            ) from error


def _check(cell: Cell) -> None:
    model, data = cell.config.model, cell.config.data
    made = models.likelihood(model.likelihood, channels=3, levels=data.levels or LEVELS, observes=model.observes)
    if model.network != "auto":
        models.check_network(model.network)
    for name in cell.priors:
        if name == models.AUTO or (data.condition and register.prior.entry(name).facts.get("reads_condition", False)):
            continue
        if models.prior(name, latent_dim=2).needs_fit and not register.network.fact(model.network, "has_prior", True):
            raise ValueError(
                f"the prior {name} has to be fitted, and {model.network} has no prior that can be replaced; take priors: [standard]"
            )
    asked = cell.evaluation.metrics or ()
    for metric in asked:
        register.metric.entry(metric)
        if obstacle := _obstacle(metric, model, made, known=data.levels is not None or data.source in names()):
            raise ValueError(f"{metric} cannot be measured: {obstacle}; leave it out of the metrics")
    if "quality" in asked:
        _check_features(cell.evaluation)
    if cell.evaluation.best_of is not None and not register.network.fact(model.network, "reads_clips", True):
        raise ValueError(f"best_of counts predictions of video, and {model.network} reads no clips; leave it out")


def _obstacle(metric: str, model: ModelConfig, likelihood: Likelihood, *, known: bool) -> str | None:
    """Why a metric does not apply; ``known``: whether the number of levels is known before the data are read."""
    match metric:
        case "iwae" | "calibration" if known and not likelihood.normalised:
            return f"{model.likelihood} is only an objective on such data, and gives no probabilities"
        case "oracle" if not likelihood.has_scale:
            return f"{model.likelihood} has no σ"
        case "information" if register.network.fact(model.network, "latents") == "frames":
            return f"{model.network} has latents for each frame, and information is about flat or hierarchical latents"
    return None


def _check_features(settings: EvaluationSettings) -> None:
    for source in settings.features:
        known = source in register.features
        file = source.partition(":")[2] if known else source
        if known:
            register.features.make(source)  # refuses a missing file name
        if file and not Path(file).expanduser().exists():
            names = ", ".join(entry.pattern for entry in register.features)
            raise ValueError(f"features come from {names} or a TorchScript file; got {source!r}, and there is no such file")
