"""Configs from YAML and plain values, and back: nothing unknown is taken, nothing is guessed."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["parse", "read", "write", "write_whole"]

Config = TypeVar("Config")


def read(path: Path, kind: type[Config]) -> Config:
    """Read a config of this kind from YAML, refusing unknown keys and wrong types.

    Raises:
        ValueError: the file is missing, no YAML, or holds something else than the config's fields.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    return parse(content, kind, str(path))


def parse(content: Any, kind: type[Config], where: str) -> Config:
    """Build a config of this kind from plain values.

    Raises:
        ValueError: a key is unknown or missing, or a value has the wrong type.
    """
    import pydantic

    try:
        return pydantic.TypeAdapter(kind).validate_python(content)
    except pydantic.ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']} (got {e['input']!r})" for e in error.errors()
        )
        raise ValueError(f"{where} is not a {kind.__name__}: {problems}") from error


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
