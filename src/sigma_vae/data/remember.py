"""What was found out of large files, kept beside them: where records begin, how many frames there are."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sigma_vae.data.cache import FOLDER, key_of

__all__ = ["remembered"]


def remembered(home: Path, cache: str | None, identity: Mapping[str, Any], find: Callable[[], Any]) -> Any:
    """What ``find`` says, without asking it again as long as the files are the same.

    Args:
        home: folder of the files.
        cache: where the user wants what is kept; a folder inside ``home`` unless given.
        identity: everything that decides the answer, as plain values: files with :func:`~sigma_vae.data.raw.file_stamp`.
        find: goes through the files; gives plain values, for JSON.

    >>> import tempfile
    >>> home = Path(tempfile.mkdtemp())
    >>> remembered(home, None, {"file": "a"}, lambda: [1, 2]), remembered(home, None, {"file": "a"}, lambda: 1 / 0)
    ([1, 2], [1, 2])
    """
    key = key_of(identity, home if cache else None)
    folder = Path(cache).expanduser() if cache else home / FOLDER
    path = folder / f"{key}.json"
    with suppress(OSError, ValueError):  # not there, or not whole
        return json.loads(path.read_text(encoding="utf-8"))
    found = find()
    # Nothing is lost but time where it cannot be kept; that decoded examples cannot be kept either is said when they are.
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"{key}.{os.getpid()}.part"
        aside.write_text(json.dumps(found), encoding="utf-8")
        aside.replace(path)
    return found
