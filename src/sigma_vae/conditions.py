r"""Conditions: what a model is told about an example beside its values, class labels and continuous covariates.

A condition is a row of numbers, one for each variable: the number of a class, or the value of a covariate. NaN stands
for a value that is missing or was dropped. ``Conditions`` says what the numbers mean; :class:`Embedding` turns them
into a vector that networks read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

__all__ = ["CLASS", "NUMBER", "WIDTH", "Conditions", "Embedding", "Given", "Variable", "split_name"]

CLASS = "class"
"""A variable with classes, as it is written after its name: ``year:class``."""
NUMBER = "number"
"""A variable with numbers: ``year:number``."""
MOST_CLASSES = 1000
FEW_CLASSES = 20
"""Integers with no more different values are classes."""
WIDTH = 32
"""Size of an embedding."""

Column = npt.NDArray[Any]
Given = Tensor | Mapping[str, Any]
"""A condition from a caller: rows ``(n, variables)``, one row, or values by name: ``{"label": 3}``."""


@final
@dataclass(frozen=True)
class Variable:
    """A class label, or a continuous covariate.

    Args:
        name: of its column.
        classes: names of the classes, in the order of their numbers; None for a covariate.
        frequencies: share of each class in the training data, before validation and test examples are held out.
        mean: mean of a covariate in the same data.
        std: its std.
    """

    name: str
    classes: tuple[str, ...] | None = None
    frequencies: tuple[float, ...] | None = None
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be embedded."""
        if self.classes is not None and (not self.classes or len(set(self.classes)) != len(self.classes)):
            raise ValueError(f"the classes of {self.name} are one or more different names, got {self.classes}")
        if self.frequencies is not None and len(self.frequencies) != len(self.classes or ()):
            raise ValueError(f"{self.name} has a frequency for each class, got {len(self.frequencies)}")
        if self.frequencies is not None and not all(0 <= share <= 1 for share in self.frequencies):
            raise ValueError(f"the frequencies of {self.name} are shares from 0 to 1, got {self.frequencies[:20]}")
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"{self.name} has a finite mean and a finite std above 0, got {self.mean} and {self.std}")

    @classmethod
    def of(cls, name: str, column: Column) -> "Variable":
        """Describe a column of training data; ``name`` may end in ``:class`` or ``:number``.

        Words and booleans are classes, and so are integers that are few, or that count from 0 or 1 without a gap. Other
        numbers are a covariate.

        Raises:
            ValueError: there are too many classes, or the values of a covariate are no numbers, or all the same.

        >>> Variable.of("label", np.array([0, 1, 1, 3]))
        Variable(name='label', classes=('0', '1', '3'), frequencies=(0.25, 0.5, 0.25), mean=0.0, std=1.0)
        >>> Variable.of("age:number", np.array([20, 40])).std
        10.0
        """
        plain, kind = split_name(name)
        known = column[~_missing(column)]
        if not len(known):
            raise ValueError(f"the condition {plain} has no value in the training data; leave it out")
        if kind == CLASS or (kind is None and _are_classes(known)):
            return cls._of_classes(plain, known)
        try:
            values = known.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the condition {plain} is no number: {error}; write {plain}:{CLASS} to read classes") from error
        if not (values.std() > 0 and np.isfinite(values).all()):
            raise ValueError(f"the condition {plain} has one value alone, {values[0]:g}, or infinite ones; leave it out")
        return cls(plain, mean=float(values.mean()), std=float(values.std()))

    @classmethod
    def _of_classes(cls, name: str, known: Column) -> "Variable":
        values, counts = np.unique(known if known.dtype.kind in "iub" else _words(known), return_counts=True)
        if len(values) > MOST_CLASSES:
            raise ValueError(
                f"the condition {name} has {len(values)} different values, and a class label at most {MOST_CLASSES};"
                f" write {name}:{NUMBER} to read a covariate, or leave it out"
            )
        return cls(name, tuple(_words(values).tolist()), tuple((counts / counts.sum()).tolist()))

    def encode(self, column: Column) -> Tensor:
        """Numbers of a column, ``(n,)``: classes by their place, covariates as they are, NaN where there is none.

        Raises:
            ValueError: a class is unknown, or a value is no number.
        """
        missing = _missing(column)
        found = np.full(len(column), np.nan, dtype=np.float32)
        if self.classes is None:
            try:
                found[~missing] = column[~missing].astype(np.float32)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self.name} is a covariate and needs numbers: {error}") from error
            return torch.from_numpy(found)
        place = {name: number for number, name in enumerate(self.classes)}
        words = _words(column[~missing])
        if unknown := sorted(set(words.tolist()) - place.keys()):
            raise ValueError(
                f"{self.name} has the classes {', '.join(self.classes[:20])}, got {unknown[0]!r}; give one of these"
            )
        found[~missing] = [place[word] for word in words.tolist()]
        return torch.from_numpy(found)


def split_name(text: str) -> tuple[str, str | None]:
    """Name and kind of a variable.

    >>> split_name("age:number"), split_name("label")
    (('age', 'number'), ('label', None))
    """
    name, colon, kind = text.rpartition(":")
    return (name, kind) if colon and kind in (CLASS, NUMBER) else (text, None)


@final
@dataclass(frozen=True)
class Conditions:
    """The variables of a condition, in their order.

    >>> conditions = Conditions.of({"label": np.array(["cat", "dog", "dog"]), "age": np.array([1.5, 2.5, 5.0])})
    >>> conditions.encode({"label": ["dog", None], "age": [2.5, 3.0]})
    tensor([[1.0000, 2.5000],
            [   nan, 3.0000]])
    >>> conditions.rows({"label": "cat"}, n=2)
    tensor([[0., nan],
            [0., nan]])
    """

    variables: tuple[Variable, ...]

    def __post_init__(self) -> None:
        """Refuse names that mean two variables."""
        names = [variable.name for variable in self.variables]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"conditions are one or more variables of different names, got {', '.join(names) or 'none'}")

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> "Conditions":
        """Describe columns of training data, by name: see :meth:`Variable.of`."""
        return cls(tuple(Variable.of(name, _array(column)) for name, column in columns.items()))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the variables."""
        return tuple(variable.name for variable in self.variables)

    def means_the_same(self, other: "Conditions | None") -> bool:
        """Whether rows mean the same: names and classes are equal."""
        theirs = None if other is None else [(each.name, each.classes) for each in other.variables]
        return theirs == [(each.name, each.classes) for each in self.variables]

    @property
    def only_classes(self) -> Variable | None:
        """The variable, where there is one alone and it has classes."""
        (first, *others) = self.variables
        return first if not others and first.classes is not None else None

    def encode(self, columns: Mapping[str, Any]) -> Tensor:
        """Rows ``(n, variables)`` of columns by name; more columns than needed are ignored.

        Raises:
            ValueError: a column is missing, or a value has no meaning.
        """
        columns = {split_name(name)[0]: column for name, column in columns.items()}
        for name in self.names:
            if name not in columns:
                raise ValueError(f"the condition {name} is not there, only {', '.join(columns) or 'none'}; give it")
        return torch.stack([each.encode(_array(columns[each.name])) for each in self.variables], 1)

    def rows(self, given: Given, n: int) -> Tensor:
        """N rows ``(n, variables)`` from rows, from one row for all, or from values by name, where others are missing.

        For a single variable, rows may be ``(n,)``.

        Raises:
            ValueError: the shape does not fit, or a name or a class is unknown.
        """
        if isinstance(given, Mapping):
            if unknown := [name for name in given if name not in self.names]:
                raise ValueError(f"there is no condition {unknown[0]!r}; known: {', '.join(self.names)}")
            given = torch.cat([each.encode(_array([given.get(each.name)])) for each in self.variables])
        values = given if given.is_floating_point() else given.float()
        width = len(self.variables)
        if values.dim() < 2:
            values = values.reshape(-1, width) if values.numel() in (width, n * width) else values[None]
        if values.dim() != 2 or values.shape[1] != width or len(values) not in (1, n):
            raise ValueError(
                f"a condition of {', '.join(self.names)} is a row of {width} for each of {n} examples, or one row for all; got"
                f" {tuple(given.shape)}"
            )
        return values.expand(n, -1)

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw rows ``(n, variables)``, each variable on its own: classes by their frequencies, covariates from a Gaussian."""
        return torch.stack([_drawn(each, n, generator) for each in self.variables], 1)

    def class_to_vary(self, given: Mapping[str, Any]) -> Variable:
        """The class label that is not given.

        Raises:
            ValueError: there is none, or more than one.
        """
        left = [each for each in self.variables if each.classes is not None and each.name not in given]
        if len(left) != 1:
            have = ", ".join(each.name for each in left) or "none"
            raise ValueError(f"samples of each class need one class label that is not given, got {have}; give the others")
        return left[0]

    @property
    def size(self) -> int:
        """Number of :meth:`features`."""
        return sum(1 if variable.classes is None else len(variable.classes) for variable in self.variables)

    def features(self, values: Tensor) -> Tensor:
        """Indicators of classes, and covariates in units of their std from their mean, ``(n, size)``; 0 where missing."""
        parts = []
        for variable, column in zip(self.variables, values.unsqueeze(-1).unbind(1), strict=True):
            if variable.classes is None:
                parts.append(((column - variable.mean) / variable.std).nan_to_num(0.0))
            else:
                parts.append((column == torch.arange(len(variable.classes), device=column.device)).to(values.dtype))
        return torch.cat(parts, 1)

    def check(self, values: Tensor) -> None:
        """Refuse numbers that are no class.

        Raises:
            ValueError: there are some; they are named.
        """
        for variable, column in zip(self.variables, values.unbind(-1), strict=True):
            if variable.classes is None:
                continue
            count = len(variable.classes)
            wrong = column.isfinite() & ((column != column.round()) | (column < 0) | (column >= count))
            if bool((wrong | column.isinf()).any()):
                raise ValueError(
                    f"{variable.name} has {count} classes, whose numbers are 0 to {count - 1} (NaN: missing), got"
                    f" {float(column[wrong | column.isinf()][0]):g}; Conditions.encode turns names into numbers"
                )

    def parse(self, texts: Sequence[str]) -> dict[str, str]:
        """Read ``name=value``, as options are written.

        Raises:
            ValueError: a text has no equals sign.

        >>> Conditions((Variable("label", ("3", "5")),)).parse(["label=3"])
        {'label': '3'}
        """
        pairs = [text.partition("=") for text in texts]
        for name, equals, value in pairs:
            if not equals or not value:
                raise ValueError(f"a condition is written NAME=VALUE, as in {self.names[0]}=3, got {name!r}")
        return {name.strip(): value.strip() for name, _, value in pairs}


@final
class Embedding(nn.Module):
    r"""A vector for each condition, the sum of its variables' parts.

    .. math:: e(c) = b + \sum_v W_v \phi_v(c_v)

    with φ the indicators of the classes, or a covariate in units of its std from its mean. A missing value has an
    indicator of its own: an embedding that is learned where values are missing or dropped.

    Args:
        conditions: the variables.
        size: of the vector.

    Shapes:
        condition ``(batch, variables)``, result ``(batch, size)``.

    >>> embedding = Embedding(Conditions((Variable("label", ("cat", "dog")),)))
    >>> embedding(torch.tensor([[0.0], [1.0], [math.nan]])).shape
    torch.Size([3, 32])
    """

    def __init__(self, conditions: Conditions, size: int = WIDTH) -> None:
        super().__init__()
        self.conditions = conditions
        self.size = size
        self.linear = nn.Linear(conditions.size, size)
        self.missing = nn.Parameter(0.02 * torch.randn(len(conditions.variables), size))

    def forward(self, condition: Tensor | None) -> Tensor:
        """Embed rows.

        Raises:
            ValueError: there is no condition, or one with a number that is no class.
        """
        if condition is None:
            raise ValueError(
                f"this network reads the condition {', '.join(self.conditions.names)}, and none is given; give condition="
                " (NaN where it is unknown)"
            )
        if not torch.compiler.is_compiling() and (condition.device.type == "cpu" or not self.training):
            self.conditions.check(condition)
        condition = condition.to(self.missing.device)
        embedded: Tensor = self.linear(self.conditions.features(condition).to(self.missing.dtype))
        return embedded + condition.isnan().to(embedded.dtype) @ self.missing.to(embedded.dtype)


def _drawn(variable: Variable, n: int, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    if variable.classes is None:
        return variable.mean + variable.std * torch.randn(n, generator=generator, device=device)
    count = len(variable.classes)
    weights = torch.tensor(variable.frequencies or (1 / count,) * count, device=device)
    return torch.multinomial(weights, n, replacement=True, generator=generator).float()


def _array(column: Any) -> Column:
    """A column as an array; words, and columns with missing words, as objects."""
    if isinstance(column, Tensor):
        return np.asarray(column.detach().cpu().numpy())
    array = np.asarray(column)
    return np.asarray(column, dtype=object) if array.dtype.kind in "OUS" or array.dtype.kind not in "iufb" else array


def _missing(column: Column) -> npt.NDArray[np.bool_]:
    if column.dtype.kind == "f":
        return np.isnan(column)
    if column.dtype.kind in "iub":
        return np.zeros(len(column), dtype=bool)
    return np.array([value is None or value != value or value == "" for value in column.tolist()], dtype=bool)


def _are_classes(known: Column) -> bool:
    if known.dtype.kind == "f":
        return False
    if known.dtype.kind not in "iu":
        return True
    values = np.unique(known)
    counted = values[0] in (0, 1) and len(values) == values[-1] - values[0] + 1 and len(values) <= MOST_CLASSES
    return len(values) <= FEW_CLASSES or bool(counted)


def _words(column: Column) -> Column:
    """Names of classes: whole numbers without a point."""
    return np.array([_word(value) for value in column.tolist()], dtype=object)


def _word(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
