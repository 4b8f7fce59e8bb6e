"""Images from the Hugging Face hub: any data set with a column of them."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigma_vae.conditions import split_name
from sigma_vae.config import DataConfig
from sigma_vae.data.cache import file_stamp
from sigma_vae.data.pictures import PICTURE_OPTIONS, PicturePlan, plan, probe
from sigma_vae.data.splits import SPLIT_WORDS, Raw, SplitName
from sigma_vae.data.stores import Array, Encoded, Part, UnreadableError
from sigma_vae.registry import Argument, register

if TYPE_CHECKING:
    from datasets import Dataset

_SOURCE = re.compile(r"hub:(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>.+))?")
_PLACE = Argument("OWNER/NAME[:CONFIG]", lambda text: {}, "ylecun/mnist", required=True)


class HubError(ValueError):
    """The hub cannot be reached, or does not have the data set."""


@dataclass(frozen=True)
class HubPlace:
    """The place of images on the hub: ``OWNER/NAME``, a configuration, and a column; None if there is only one.

    >>> str(HubPlace("ufldl-stanford/svhn", "cropped_digits"))
    'hub:ufldl-stanford/svhn:cropped_digits'
    """

    repository: str
    config: str | None = None
    column: str | None = None

    def __str__(self) -> str:
        """The place as users write it."""
        return f"hub:{self.repository}" + (f":{self.config}" if self.config else "")


@register.source("hub", argument=_PLACE, options=PICTURE_OPTIONS | {"columns"})
def read_hub(config: DataConfig) -> Raw:
    """Read the images of ``hub:OWNER/NAME`` or ``hub:OWNER/NAME:CONFIG``.

    The package ``datasets`` keeps their files. They are read one at a time, so that they are never all in memory; first
    their headers, to find one shape for all.

    Raises:
        ValueError: the hub does not have it; it has no column of images, or several; or the images have no common
            shape.
    """
    place = _place(config)
    try:
        tables = fetch(place)
    except HubError as error:
        remedy = "give the name and config that its page says, see to the network, or save the pictures in a folder"
        raise ValueError(f"{error}; {remedy}") from error
    chosen = plan((size for table in tables.values() for size in _headers(table)), config.images, config.source)
    raw = pictures_of(tables, place, chosen, chosen.read, skip_unreadable=config.images.unreadable == "skip")
    return replace(raw, labels=labels_of(place, config.condition))


def fetch(place: HubPlace) -> "dict[SplitName, Dataset]":
    """Fetch the splits of a data set, each a table with one column of undecoded images; downloaded once, then mapped.

    Raises:
        ValueError: as for :func:`read_hub`.
    """
    try:
        from datasets import load_dataset

        found = load_dataset(place.repository, place.config)
    except Exception as error:  # offline, the libraries raise many unrelated kinds
        reason = " ".join(str(error).split())  # some span several lines
        raise HubError(f"{place} cannot be loaded from the hub ({type(error).__name__}: {reason})") from error
    return {split: _undecoded(found[name], place) for split, name in _named_splits(list(found), place).items()}


def labels_of(place: HubPlace, wanted: Sequence[str]) -> "dict[SplitName, dict[str, list[Any]]]":
    """Columns of labels or covariates of each split, classes by their names.

    Raises:
        ValueError: there is no such column.
    """
    if not wanted:
        return {}
    from datasets import load_dataset

    found = load_dataset(place.repository, place.config)
    columns = [split_name(name)[0] for name in wanted]
    labels: dict[SplitName, dict[str, list[Any]]] = {}
    for split, name in _named_splits(list(found), place).items():
        if missing := [column for column in columns if column not in found[name].features]:
            raise ValueError(
                f"{place} ({name}) has no column {missing[0]} to condition on, only {', '.join(found[name].features)}"
            )
        labels[split] = {column: named_labels(found[name], column) for column in columns}
    return labels


def named_labels(table: "Dataset", column: str) -> list[Any]:
    """The values of a column, classes by their names."""
    values = list(table.select_columns([column])[column])
    names = getattr(table.features[column], "names", None)
    return values if names is None else [None if value is None or value < 0 else names[value] for value in values]


def pictures_of(
    tables: "Mapping[SplitName, Dataset]",
    place: HubPlace,
    chosen: PicturePlan,
    decode: Callable[[bytes], Array],
    *,
    skip_unreadable: bool = False,
) -> Raw:
    """Turn tables from :func:`fetch` into examples that are decoded once.

    ``decode`` turns the bytes of an image into an array, and raises :class:`~sigma_vae.data.stores.UnreadableError`.
    """
    from datasets import config

    parts, files = dict[SplitName, Part](), []
    for split, table in tables.items():
        origin = {"hub": str(place), "split": split, "column": _column(table)}
        files.append(origin | {"version": _version(table)})
        parts[split] = Encoded(
            names=[f"{split} {i}" for i in range(len(table))],
            shape=chosen.shape,
            dtype=chosen.dtype,
            decode=_decoder(table, decode),
            identity=origin | {"files": _stamps(table), "plan": asdict(chosen)},
            home=Path(config.HF_DATASETS_CACHE),
            skip_unreadable=skip_unreadable,
        )
    words = ["pictures from the hub", *chosen.words]
    return Raw(str(place), parts, files, words, 2 if chosen.levels == 2 else None)


def _place(config: DataConfig) -> HubPlace:
    match = _SOURCE.fullmatch(config.source)
    if match is None:
        raise ValueError(
            f"expected hub:OWNER/NAME or hub:OWNER/NAME:CONFIG, got {config.source!r}; copy the name from its page"
        )
    if len(config.columns) > 1:
        raise ValueError(f"{config.source} needs one column of pictures, got {', '.join(config.columns)}; choose one")
    return HubPlace(match["repository"], match["config"], *config.columns)


def _named_splits(names: list[str], place: HubPlace) -> dict[SplitName, str]:
    """Map our names of splits to the hub's; others are not read."""
    if len(names) == 1:
        return {"train": names[0]}
    known = [name for name in names if name in SPLIT_WORDS]
    splits = {SPLIT_WORDS[name]: name for name in known}
    if "train" not in splits or len(splits) < len(known):
        raise ValueError(
            f"{place} needs the split train, and at most one each of validation (valid, val) and test, got {', '.join(names)}; "
            "choose a config that has them (hub:OWNER/NAME:CONFIG), or save the pictures in folders"
        )
    return splits


def _undecoded(table: "Dataset", place: HubPlace) -> "Dataset":
    from datasets import Image

    pictures = [name for name, feature in table.features.items() if isinstance(feature, Image)]
    wanted = [place.column] if place.column else pictures
    if len(wanted) != 1 or wanted[0] not in pictures:
        raise ValueError(
            f"{place} needs one column of pictures" + (f" named {place.column}" if place.column else "") + ", got "
            f"{', '.join(pictures) or 'none'} (of the columns {', '.join(table.features)}); choose one with --columns"
        )
    return table.select_columns(wanted).cast_column(wanted[0], Image(decode=False))


def _decoder(table: "Dataset", decode: Callable[[bytes], Array]) -> Callable[[int], Array]:
    column = _column(table)
    return lambda i: decode(_content(table[i][column]))


def _column(table: "Dataset") -> str:
    (name,) = table.column_names
    return str(name)


def _content(picture: Mapping[str, Any] | None) -> bytes:
    """Read the file of an image, inside the table or beside it."""
    if picture is None or picture["bytes"] is picture["path"] is None:
        raise UnreadableError("its row is empty")
    if picture["bytes"] is not None:
        return bytes(picture["bytes"])
    try:
        return Path(picture["path"]).read_bytes()
    except OSError as error:
        raise UnreadableError(f"{type(error).__name__}: {error}") from error


def _headers(table: "Dataset") -> Iterator[tuple[int, int, str]]:
    """Yield width, height and mode of each image with a readable header; ``map`` caches them."""
    from datasets import Features, Value

    column = [_column(table)]
    features = Features({"width": Value("int32"), "height": Value("int32"), "mode": Value("string")})
    headers = table.map(_header, input_columns=column, remove_columns=column, features=features, desc="reading headers, once")
    for first in range(0, len(headers), 4096):
        rows = headers[first : first + 4096]
        seen = zip(rows["width"], rows["height"], rows["mode"], strict=True)
        yield from ((width, height, mode) for width, height, mode in seen if mode)


def _header(picture: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        width, height, mode = probe(_content(picture))
    except UnreadableError:
        width, height, mode = 0, 0, ""
    return {"width": width, "height": height, "mode": mode}


def _stamps(table: "Dataset") -> list[Any]:
    return [[_version(table), *file_stamp(Path(file["filename"]))] for file in table.cache_files]


def _version(table: "Dataset") -> str:
    """Return the commit on the hub (for a local copy: a digest): ``datasets`` names the table's folder after it."""
    return Path(table.cache_files[0]["filename"]).parent.name
