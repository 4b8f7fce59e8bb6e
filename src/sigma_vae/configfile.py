"""Configs from YAML and plain values, and back: nothing unknown is taken, nothing is guessed."""

import os
import reprlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["parse", "read", "read_text", "write", "write_whole"]

Config = TypeVar("Config")

CONFIG_BYTES = 2**20
PROBLEMS = 10
"""That are told of one file."""


def read(path: Path, kind: type[Config]) -> Config:
    """Read a config of this kind from YAML, refusing unknown keys and wrong types.

    Raises:
        ValueError: the file is missing, no YAML, or holds something else than the config's fields.
    """
    import yaml

    try:
        text = read_text(path, CONFIG_BYTES)
        _check_plain(text)
        content = yaml.safe_load(text)
    except Exception as error:  # on foreign bytes the reader raises nearly anything: YAMLError, KeyError, RecursionError, ...
        raise ValueError(f"{path} cannot be read as YAML ({type(error).__name__}): {error}") from error
    return parse(content, kind, str(path))


def _check_plain(text: str) -> None:
    """Refuse what lets a short text stand for a very long one, before anything is built of it."""
    import yaml

    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or (isinstance(event, yaml.NodeEvent) and event.anchor is not None):
            raise ValueError("it has an anchor or an alias (&name, *name), which no config needs; write its value out")
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.style is None:
            raise ValueError("it merges mappings (<<), which no config needs; write them out")


def read_text(path: Path, limit: int = 2**26) -> str:
    """The text of a file that is not absurdly large.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no text, or has more bytes than the limit.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit} bytes, which no run writes there")
    return content.decode("utf-8")


def parse(content: Any, kind: type[Config], where: str) -> Config:
    """Build a config of this kind from plain values.

    Raises:
        ValueError: a key is unknown or missing, or a value has the wrong type.
    """
    import pydantic

    try:
        return pydantic.TypeAdapter(kind).validate_python(content)
    except pydantic.ValidationError as error:
        # Short, for what is shown may be a file's own content: nested in itself, say.
        shown = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']} (got {_shown(e['input'])})" for e in error.errors()]
        problems = "; ".join(shown[:PROBLEMS])
        raise ValueError(f"{where} is not a {kind.__name__}: {problems}") from error


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # of a whole number with thousands of digits
        return f"a long {type(value).__name__}"


def write(path: Path, config: Any) -> None:
    """Write a config as YAML that :func:`read` takes back."""
    import yaml

    write_whole(path, yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file; one that is there stands until the new one is whole and on the disk, whatever happens on the way."""
    aside = path.with_name(path.name + ".new")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
