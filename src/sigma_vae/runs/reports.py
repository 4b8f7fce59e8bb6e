"""Reports as JSON files."""

import json
from pathlib import Path
from typing import Any

from sigma_vae.configfile import read_text, write_whole

__all__ = ["read_json", "write_json"]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a report; one that is there stands until the new one is whole."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a report.

    Raises:
        ValueError: it is missing or broken.
    """
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or broken: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold what a run writes there, but {type(content).__name__}")
    return content
