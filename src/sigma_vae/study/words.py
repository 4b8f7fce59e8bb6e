"""Values and places of a grid in words."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["as_column", "in_words", "told"]


def in_words(value: Any) -> str:
    """A value of an axis, as a spec writes it.

    >>> in_words(None), in_words({"size": 8}), in_words(0.5), in_words("gaussian/optimal")
    ('null', '{"size": 8}', '0.5', 'gaussian/optimal')
    """
    return json.dumps(value, ensure_ascii=False) if value is None or isinstance(value, dict | list) else str(value)


def told(place: Mapping[str, Any]) -> str:
    """A place in a grid.

    >>> told({"model.likelihood": "gaussian/optimal", "training.max_steps": None, "seed": 0})
    'likelihood gaussian/optimal, max_steps null, seed 0'
    """
    return ", ".join(f"{name.rpartition('.')[2]} {in_words(value)}" for name, value in place.items())


def as_column(values: Sequence[Any]) -> dict[str, Any]:
    """Of each value, by its words, what stands for it in a table's column, where all are numbers, or all are words.

    >>> as_column([16, 32]), as_column([None, 5]), as_column([{"size": 8}])
    ({'16': 16, '32': 32}, {'null': 'null', '5': '5'}, {'{"size": 8}': '{"size": 8}'})
    """
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return {in_words(value): value if numbers else in_words(value) for value in values}
