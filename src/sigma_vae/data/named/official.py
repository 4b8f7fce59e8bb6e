"""Search for the files of a published data set, and check that they are the published ones."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sigma_vae.config import DataConfig, ImageConfig
from sigma_vae.data.hub import HubError, HubPlace, fetch, labels_of, pictures_of
from sigma_vae.data.levels import Array
from sigma_vae.data.pictures import PicturePlan, Probe, plan, probe
from sigma_vae.data.splits import Raw, SplitName
from sigma_vae.data.stores import Encoded, Part, UnreadableError

__all__ = ["VARIABLE", "Official", "check_counts", "find", "find_splits", "folders", "read_official"]

VARIABLE = "SIGMA_VAE_DATA"


def folders(name: str, root: str | None) -> list[Path]:
    """List the folders to search: ``root`` if given, else the folder of SIGMA_VAE_DATA, its subfolder ``name`` first."""
    if root:
        return [Path(root).expanduser()]
    if not (named := os.environ.get(VARIABLE)):
        return []
    return [Path(named).expanduser() / name, Path(named).expanduser()]


@dataclass(frozen=True)
class Official:
    """A published data set, with the number of examples of each split, and maybe a copy on the hub."""

    name: str
    files: str
    """The expected files, in words."""
    counts: Mapping[SplitName, int]
    picture: Probe
    hub: HubPlace | None = None
    system: tuple[Path, ...] = ()
    """Further folders that may have the files."""

    def places(self, root: str | None) -> list[Path]:
        """List the folders to search, in order.

        >>> [str(place) for place in Official("two", "two.npy", {"train": 2}, (1, 1, "L")).places("data")]
        ['data']
        """
        return folders(self.name, root) + ([] if root else list(self.system))

    def plan(self, images: ImageConfig) -> PicturePlan:
        """Plan how its pictures are cropped and resized."""
        return plan([self.picture], images, self.name)

    def decode(self, chosen: PicturePlan, content: bytes) -> Array:
        """Decode the file of a picture.

        Raises:
            UnreadableError: it is broken, or differs from the published size and mode.
        """
        if (found := probe(content)) != self.picture:
            raise UnreadableError(f"{self.name} has pictures {self.picture} (width, height, mode), got {found}")
        return chosen.read(content)


def read_official(official: Official, config: DataConfig, in_folder: Callable[[Path], Raw | None]) -> Raw:
    """Read the data set from the first place that has it.

    If ``root`` is given, only that folder is searched; otherwise the folder of the data set's name in the folder of
    SIGMA_VAE_DATA, that folder itself, those of installed packages, and the hub. ``in_folder`` reads the published
    files in a folder, and returns None if it has none of them.

    Raises:
        ValueError: no place has the data set, or the files are damaged or not the published ones.
    """
    places = official.places(config.root)
    for place in places:
        if (raw := in_folder(place)) is not None:
            check_counts(official, {name: _count(part) for name, part in raw.parts.items()}, str(place))
            return raw
    if official.hub is not None and not config.root:
        return _from_hub(official, official.hub, config, places)
    raise ValueError(f"{_needs(official, places)}; {_remedy(official)}")


def check_counts(official: Official, counts: Mapping[SplitName, int], where: str) -> None:
    """Check that every split has the published number of examples.

    Raises:
        ValueError: a split has more or fewer, or is missing.

    >>> check_counts(Official("two", "two.npy", {"train": 2}, (1, 1, "L")), {"train": 1}, "two.npy")
    Traceback (most recent call last):
    ...
    ValueError: two.npy needs the published examples of two, 2 train, got 1 train; take the official files, whole
    """
    if dict(counts) != dict(official.counts):
        raise ValueError(
            f"{where} needs the published examples of {official.name}, {_words(official.counts)}, got {_words(counts)}; "
            "take the official files, whole"
        )


def find(folder: Path, *names: str) -> Path | None:
    """Return the first of these files or folders that exists.

    Raises:
        ValueError: it is a dangling link.
    """
    for path in (folder / name for name in names):
        if path.exists():
            return path
        if path.is_symlink():
            raise ValueError(
                f"{path} needs to lead to a file or folder, got a link to {path.readlink()}, which is missing; mend it"
            )
    return None


def find_splits(folder: Path, files: Mapping[SplitName, str], name: str) -> dict[SplitName, Path]:
    """Find the file of each split of the data set ``name``; an ending in brackets is optional. Empty if there is none.

    Raises:
        ValueError: only one of the files is there.
    """
    found = {split: find(folder, file.removesuffix("[.gz]"), file.replace("[.gz]", ".gz")) for split, file in files.items()}
    present = {split: path for split, path in found.items() if path is not None}
    if present and (missing := [file for split, file in files.items() if split not in present]):
        raise ValueError(f"{name} needs {' and '.join(files.values())} in {folder}, got no {missing[0]}; put both files there")
    return present


def _from_hub(official: Official, place: HubPlace, config: DataConfig, places: list[Path]) -> Raw:
    try:
        tables = fetch(place)
    except HubError as error:
        raise ValueError(f"{_needs(official, places)}, and {error}; {_remedy(official)}") from error
    check_counts(official, {name: len(table) for name, table in tables.items()}, str(place))
    chosen = official.plan(config.images)
    raw = pictures_of(tables, place, chosen, partial(official.decode, chosen))
    return replace(raw, labels=labels_of(place, config.condition))


def _count(part: Part) -> int:
    return len(part.names) if isinstance(part, Encoded) else len(part)


def _needs(official: Official, places: list[Path]) -> str:
    where = ", ".join(str(place) for place in places)
    return f"{official.name} needs {official.files}, found no such file" + (f" in {where}" if where else "")


def _remedy(official: Official) -> str:
    return f"put the files in a folder and give it as --root, or in the folder that {VARIABLE} names"


def _words(counts: Mapping[SplitName, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
