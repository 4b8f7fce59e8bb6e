"""The user's own arrays: .npy and .npz files, with their axes brought into order."""

import zipfile
from pathlib import Path

import numpy as np

from sigma_vae.config import DataConfig, Layout
from sigma_vae.data.levels import Array
from sigma_vae.data.raw import Raw, file_record
from sigma_vae.data.splits import SplitName

__all__ = ["channels_first", "path_of", "read_arrays"]

_AXES = {"n-h-w": 3, "n-h-w-c": 4, "n-c-h-w": 4, "n-c-t": 3, "n-c": 2}
_CHANNEL_COUNTS = (1, 3, 4)
_KEYS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val"),
    "test": ("test",),
}


def path_of(config: DataConfig) -> Path:
    """The file or folder that a config names, inside its root where it has one."""
    return Path(config.root or ".").expanduser() / Path(config.source).expanduser()


def read_arrays(config: DataConfig) -> Raw:
    """The arrays of a .npy or .npz file, channels first.

    Raises:
        ValueError: the file is missing or unreadable, holds pickled objects, or its arrays do not fit together.
    """
    path = path_of(config)
    if not path.is_file():
        raise ValueError(f"expected a .npy or .npz file at {path}, got no such file; check the path")
    parts, ignored = _parts(_read(path), path)
    dtypes = {name: str(part.dtype) for name, part in parts.items()}
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"{path} needs one dtype for all splits, got {dtypes}; save them alike")
    used = _layout(parts["train"], config.layout, str(path))
    ordered = {name: channels_first(part, used, f"{path} ({name})") for name, part in parts.items()}
    words = [f"axes read as {used}", *([f"ignored the arrays {', '.join(ignored)}"] if ignored else [])]
    return Raw(str(path), ordered, files=[file_record(path)], preprocessing=words)


def _read(path: Path) -> dict[str, Array]:
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"train": content}
        with content:
            return {key: content[key] for key in content.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read as .npy or .npz of plain numbers: {error}; save it anew with numpy.save or "
            "numpy.savez (pickled objects are refused, as loading them runs code)"
        ) from error


def _parts(content: dict[str, Array], path: Path) -> tuple[dict[SplitName, Array], list[str]]:
    known = {key: name for name, keys in _KEYS.items() for key in keys}
    found: list[tuple[SplitName, Array]] = [(known[key], array) for key, array in content.items() if key in known]
    parts = dict(found)
    if len(parts) < len(found):
        raise ValueError(
            f"{path} needs one array for each split, got the keys {', '.join(content)}; drop all but one name of each"
        )
    if not found and len(content) == 1:
        return {"train": next(iter(content.values()))}, []
    if "train" not in parts:
        raise ValueError(
            f"{path} needs the key train (with validation and test, or split at random), or one array alone, got the keys "
            f"{', '.join(content) or 'of an empty archive'}; rename them"
        )
    return {name: parts[name] for name in _KEYS if name in parts}, [key for key in content if key not in known]


def channels_first(array: Array, layout: Layout, name: str) -> Array:
    """Bring an array into the order ``(N, C, *space)``.

    >>> channels_first(np.zeros((5, 8, 8, 3)), "n-h-w-c", "rgb").shape
    (5, 3, 8, 8)
    """
    if array.ndim != _AXES[layout]:
        raise ValueError(
            f"{name} needs {_AXES[layout]} axes for layout {layout}, got shape {array.shape}; give the right --layout"
        )
    if array.size == 0:
        raise ValueError(f"{name} needs at least one example with at least one value, got shape {array.shape}")
    if layout == "n-h-w":
        return array[:, np.newaxis]
    return np.moveaxis(array, -1, 1) if layout == "n-h-w-c" else array


def _layout(array: Array, layout: Layout, name: str) -> Layout:
    if layout != "auto":
        return layout
    if array.ndim in (2, 3):
        return "n-c" if array.ndim == 2 else "n-h-w"
    if array.ndim != 4:
        raise ValueError(
            f"{name} needs 2 to 4 axes, examples first, got shape {array.shape}; reshape it to one of {', '.join(_AXES)}"
        )
    first, last = array.shape[1] in _CHANNEL_COUNTS, array.shape[-1] in _CHANNEL_COUNTS
    if first == last:
        raise ValueError(
            f"{name} needs either a second or a last axis of 1, 3 or 4 channels to tell the order of the axes, "
            f"got shape {array.shape}; give --layout n-c-h-w or --layout n-h-w-c"
        )
    return "n-c-h-w" if first else "n-h-w-c"
