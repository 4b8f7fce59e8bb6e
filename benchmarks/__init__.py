"""Measurements of the library, each a command that writes its results as JSON."""

import json
from pathlib import Path
from typing import Any

__all__ = ["keep", "kept"]


def kept(path: Path, part: str) -> dict[str, Any]:
    """Results of a part in a file of several; empty where there are none."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    part_of: dict[str, Any] = content.get(part, {})
    return part_of


def keep(path: Path, part: str, record: dict[str, Any]) -> None:
    """Write the results of a part into a file of several; the others stay."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {part: record}, indent=1) + "\n", encoding="utf-8")
