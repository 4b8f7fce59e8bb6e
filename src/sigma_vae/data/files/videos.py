"""The user's own videos: a file, a folder of files, or folders with a picture for each frame; cut into clips of one length."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from sigma_vae.config import ClipConfig, DataConfig
from sigma_vae.data.clips import clip_lengths
from sigma_vae.data.files.arrays import path_of
from sigma_vae.data.files.containers import Folder
from sigma_vae.data.files.films import Film, Frames, Survey, Video
from sigma_vae.data.files.pictures import PicturePlan, plan
from sigma_vae.data.files.windows import Window, Windows, starts
from sigma_vae.data.raw import Encoded, Raw, UnreadableError, file_stamp
from sigma_vae.data.remember import remembered
from sigma_vae.data.splits import SPLIT_WORDS, SplitName

__all__ = ["ENDINGS", "OPTIONS", "holds_videos", "read_videos"]

ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
OPTIONS = frozenset({"cache", "crop", "size", "fit", "colour", "unreadable", "frames", "test_frames", "frame_step"})
"""What :func:`read_videos` reads of the config."""

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_FRAMES = 16


@dataclass(frozen=True)
class _Found:
    """A video, by its name within the folder, and what was found out of it."""

    name: str
    video: Video
    survey: Survey


def holds_videos(path: Path, clips: ClipConfig) -> bool:
    """Whether a folder is one of videos: it has a video file; or clips are asked for, and it has a GIF or pictures, taken as frames."""
    return next(_videos(path, clips), None) is not None


def read_videos(config: DataConfig) -> Raw:
    """Clips of 16 frames (or as the config says) that lie side by side in each video; what is left at its end is left out.

    Folders train, validation (valid, val) and test are splits; else whole videos are held out. Frames in a folder of pictures are in
    the order of the numbers in their names.

    Raises:
        ValueError: there are no videos; one is broken or too short; or their sizes differ, and the config does not say what to do.
    """
    path, step = path_of(config), config.clips.frame_step
    if not path.exists():
        raise ValueError(f"expected a video, or a folder of videos, at {path}, got no such file; check the path")
    lengths = _lengths(path, config)
    found, broken = _surveyed(path, config)
    listed = list(chain.from_iterable(found.values()))
    shared = plan([each for item in listed for each in item.survey.probes], config.images, str(path))
    parts = {split: _encoded(items, lengths[split], shared, path, config) for split, items in found.items()}
    files = [{"path": str(path.resolve()), "videos": len(listed), "bytes": _size(listed)}]
    every = f", every {step}. frame" if step > 1 else ""
    test = f" (test: {lengths['test']})" if lengths["test"] != lengths["train"] else ""
    left = sum(item.survey.frames - _used(item, lengths[split], step) for split, items in found.items() for item in items)
    words = [f"clips of {lengths['train']} frames{test}{every}, side by side; {left} frames at ends of videos left out"]
    words += [f"left out {len(broken)} unreadable videos ({', '.join(broken[:5])})"] if broken else []
    words += _ignored(path, config.clips)
    return Raw(str(path), parts, files, [*words, *shared.words], levels=shared.levels, clips=True)


def _lengths(path: Path, config: DataConfig) -> dict[SplitName, int]:
    frames, test_frames = clip_lengths(config.clips, _FRAMES, _FRAMES)
    if frames != test_frames and "test" not in dict(_splits(path)):
        raise ValueError(
            f"{path} needs a folder test for clips of another length than in training, got frames {frames} and test_frames"
            f" {test_frames}; put test videos there, or leave test_frames out"
        )
    return {"train": frames, "validation": frames, "test": test_frames}


def _check_inside(path: Path, folders: list[Path], clips: ClipConfig) -> None:
    """Where there are folders of splits, a video elsewhere is in none."""
    outside = (place for place, _ in _videos(path, clips) if not any(place.is_relative_to(folder) for folder in folders))
    if (stray := next(outside, None)) is not None:
        raise ValueError(
            f"{path} needs its videos in {', '.join(folder.name for folder in folders)}, got {stray.relative_to(path)}; move it, or"
            " rename these folders"
        )


def _surveyed(path: Path, config: DataConfig) -> tuple[dict[SplitName, list[_Found]], list[str]]:
    """The videos of each split, and the names of those that are broken."""
    splits = _splits(path)
    _check_inside(path, [folder for _, folder in splits], config.clips)
    videos = [(split, str(name), video) for split, folder in splits for name, video in _named(folder, path, config.clips)]
    stamps = {name: _stamp(video) for _, name, video in videos}
    identity = {"videos": stamps, "reader": "videos-1", "of": "surveys"}
    told = remembered(_home(path), config.cache, identity, lambda: _survey([video for *_, video in videos]))
    broken = {name: error for (_, name, _), (_, error) in zip(videos, told, strict=True) if error}
    if broken and config.images.unreadable == "refuse":
        raise ValueError(
            f"{len(broken)} of {len(videos)} videos cannot be read: {'; '.join(list(broken.values())[:5])};"
            " repair or remove them, or leave them out: --unreadable skip"
        )
    found: dict[SplitName, list[_Found]] = {}
    for (split, name, video), (survey, error) in zip(videos, told, strict=True):
        if not error:
            found.setdefault(split, []).append(_Found(name, video, _parsed(survey)))
    if "train" not in found:
        raise ValueError(
            f"{path} needs videos to train on ({', '.join(ENDINGS)}, or folders of pictures), got none that can be read"
        )
    return found, list(broken)


def _survey(videos: Sequence[Video]) -> list[tuple[dict[str, Any], str]]:
    """What each video is like, or why it is unreadable."""
    from rich.console import Console
    from rich.progress import track

    def one(video: Video) -> tuple[dict[str, Any], str]:
        try:
            return asdict(video.survey()), ""
        except UnreadableError as error:
            return {}, str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        console = Console(stderr=True)
        return list(track(pool.map(one, videos), "counting frames, once", len(videos), console=console, transient=True))


def _parsed(survey: Mapping[str, Any]) -> Survey:
    probes = [(int(width), int(height), str(mode)) for width, height, mode in survey["probes"]]
    return Survey(int(survey["frames"]), probes, [(int(number), int(stamp)) for number, stamp in survey["marks"]])


def _encoded(found: list[_Found], frames: int, shared: PicturePlan, path: Path, config: DataConfig) -> Encoded:
    step = config.clips.frame_step
    if short := [f"{item.name} ({item.survey.frames})" for item in found if not starts(item.survey.frames, frames, step)]:
        least = min(-(-item.survey.frames // step) for item in found)
        raise ValueError(
            f"{path}: clips of {frames} frames, every {step}., need videos of {(frames - 1) * step + 1} frames, got "
            f"{', '.join(short[:5])}; ask for shorter clips (--frames {least}), or remove short videos"
        )
    windows = [Window(number, start) for number, item in enumerate(found) for start in starts(item.survey.frames, frames, step)]
    videos = {item.name: _stamp(item.video) for item in found}
    return Encoded(
        names=[f"{found[window.video].name} from frame {window.start}" for window in windows],
        shape=(frames, *shared.shape),
        dtype=shared.dtype,
        decode=Windows([(item.video, item.survey) for item in found], windows, frames, step, shared),
        identity={"videos": videos, "reader": "videos-1", "plan": asdict(shared), "frames": frames, "step": step},
        home=_home(path),
        skip_unreadable=config.images.unreadable == "skip",
        videos=[window.video for window in windows],
    )


def _used(item: _Found, frames: int, step: int) -> int:
    """Frames that windows span, those between two that are taken included."""
    return min(len(starts(item.survey.frames, frames, step)) * frames * step, item.survey.frames)


def _home(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _ignored(path: Path, clips: ClipConfig) -> list[str]:
    """In words what else lies in a folder: its pictures, where clips are not asked for."""
    read = {*ENDINGS, *_PICTURES} if clips.frames is not None else {*ENDINGS} - {".gif"}
    names = Folder(path).names if path.is_dir() else []
    others = Counter(suffix for name in names if (suffix := PurePath(name).suffix.lower()) not in read)
    listed = ", ".join(f"{suffix or 'without ending'} ({count})" for suffix, count in others.most_common(5))
    return [f"files that are no videos ignored: {listed}"] if others else []


def _size(found: Sequence[_Found]) -> int:
    return sum(file.stat().st_size for item in found for file in item.video.files)


def _stamp(video: Video) -> str:
    try:
        return hashlib.sha256(repr([file_stamp(file) for file in video.files]).encode()).hexdigest()
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}); mend or remove this file or link") from error


def _splits(path: Path) -> list[tuple[SplitName, Path]]:
    """The folders of the splits; all is for training where there are none."""
    inner = sorted(path.iterdir()) if path.is_dir() else []
    folders = [
        (split, each) for word, split in SPLIT_WORDS.items() for each in inner if each.name.lower() == word and each.is_dir()
    ]
    present = [split for split, _ in folders]
    if not present:
        return [("train", path)]
    if "train" not in present or len(set(present)) < len(present):
        raise ValueError(
            f"{path} needs a folder train, and at most one each for validation and test, got"
            f" {', '.join(folder.name for _, folder in folders)}; rename them"
        )
    return folders


def _named(folder: Path, path: Path, clips: ClipConfig) -> Iterator[tuple[Path, Video]]:
    if folder.is_file():
        return iter([(Path(folder.name), Film(folder))])
    return ((place.relative_to(path), video) for place, video in _videos(folder, clips))


def _videos(folder: Path, clips: ClipConfig) -> Iterator[tuple[Path, Video]]:
    """Video files in a folder and below, in order; where clips are asked for, GIFs and folders of pictures as well."""
    asked, seen = clips.frames is not None, set[str]()
    for place, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        new = (name for name in folders if not name.startswith(".") and os.path.realpath(Path(place, name)) not in seen)
        folders[:] = sorted(new, key=_by_numbers)
        visible = [Path(place, name) for name in sorted(files, key=_by_numbers) if not name.startswith(".")]
        for file in visible:
            if file.suffix.lower() in ENDINGS and (asked or file.suffix.lower() != ".gif"):
                yield file, Film(file)
        pictures = tuple(file for file in visible if file.suffix.lower() in _PICTURES)
        if asked and pictures:
            yield Path(place), Frames(pictures)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """For sorting: frame 10 comes after frame 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]
