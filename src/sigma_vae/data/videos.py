"""Videos, cut into clips of one length: video files, and folders with a picture for each frame."""

import hashlib
import math
import os
import re
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, final

import numpy as np

from sigma_vae.config import ClipConfig, DataConfig
from sigma_vae.data.archives import Folder
from sigma_vae.data.cache import file_stamp, remembered
from sigma_vae.data.pictures import (
    PICTURE_OPTIONS,
    PicturePlan,
    Probe,
    class_folder,
    class_labels,
    hidden_pictures,
    is_hidden,
    listed,
    pages,
    picture_endings,
    plan,
    to_read_heif,
)
from sigma_vae.data.splits import SPLIT_WORDS, Raw, SplitName, clip_lengths
from sigma_vae.data.stores import Array, Encoded, UnreadableError
from sigma_vae.registry import register

if TYPE_CHECKING:
    from av import VideoFrame


Frame = Callable[[PicturePlan], Array]
"""A frame that becomes an array only when it is called with a plan."""

_Result = TypeVar("_Result")

MARKS_APART = 256
"""Frames between two entry points of a video: decoding skips at most these and those up to the next key frame."""
_MISSING = 0.1
"""Share of a file's duration that may be missing at its end; with more, it counts as cut off."""


@dataclass(frozen=True)
class Survey:
    """Facts about a video that need a pass over all of it."""

    frames: int
    probes: list[Probe]
    """Width, height and mode of its frames, each once."""
    marks: list[tuple[int, int]]
    """Frames where decoding can begin (entry points): number and time stamp."""


class Video(ABC):
    """A sequence of frames."""

    @property
    @abstractmethod
    def files(self) -> Sequence[Path]:
        """The files that it is read from."""

    @abstractmethod
    def survey(self) -> Survey:
        """Go through all frames.

        Raises:
            UnreadableError: it is broken, or cut off.
        """

    @abstractmethod
    def frames(self, start: int, survey: Survey) -> Iterator[Frame]:
        """Yield the frames from number ``start`` on.

        Raises:
            UnreadableError: one is broken.
        """


@final
@dataclass(frozen=True)
class Frames(Video):
    """A folder with a picture for each frame."""

    pictures: tuple[Path, ...]

    @property
    def files(self) -> Sequence[Path]:
        """The pictures."""
        return self.pictures

    def survey(self) -> Survey:
        """Read the headers of all pictures."""
        return Survey(len(self.pictures), list(dict.fromkeys(_named_in_errors(path, _one_page) for path in self.pictures)), [])

    def frames(self, start: int, survey: Survey) -> Iterator[Frame]:
        """Yield the pictures from number ``start`` on."""
        for path in self.pictures[start:]:
            yield partial(_read, path)


@final
@dataclass(frozen=True)
class Film(Video):
    """A file with video streams; the first one is read."""

    path: Path

    @property
    def files(self) -> Sequence[Path]:
        """The one file."""
        return (self.path,)

    def survey(self) -> Survey:
        """Decode all frames: the count in the header is often wrong."""
        count, latest, probes, marks = 0, -math.inf, dict[Probe, None](), list[tuple[int, int]]()
        for frame in self._decoded(check=True):
            # A seek finds a mark by its time stamp: no earlier frame may have it.
            if frame.pts is not None and frame.pts > latest:
                latest = frame.pts
                if frame.key_frame and count - (marks[-1][0] if marks else -MARKS_APART) >= MARKS_APART:
                    marks.append((count, frame.pts))
            width, height = (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)
            probes[width, height, _mode(frame)] = None
            count += 1
        if not count:
            raise UnreadableError(f"{self.path} has no frames")
        return Survey(count, list(probes), marks)

    def frames(self, start: int, survey: Survey) -> Iterator[Frame]:
        """Yield the frames from number ``start`` on, decoding from the last mark before it."""
        before = bisect_right([number for number, _ in survey.marks], start)
        first, stamp = survey.marks[before - 1] if before else (0, None)
        decoded = self._decoded(stamp if first else None)
        if (head := next(decoded, None)) is None:  # some files cannot be entered in the middle
            first, decoded = 0, self._decoded()
        for number, frame in enumerate(chain([head] if head else [], decoded), first):
            if number >= start:
                yield partial(_converted, frame)

    def _decoded(self, stamp: int | None = None, check: bool = False) -> Iterator["VideoFrame"]:
        """Yield all frames, or those from the key frame with this time stamp on."""
        import av

        try:
            with av.open(self.path) as container:
                if not container.streams.video:
                    raise UnreadableError(f"{self.path} has no video stream")
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1  # parallel over files and parts of files instead
                if stamp is not None:
                    with suppress(av.FFmpegError):  # then decoding starts at the beginning
                        container.seek(stamp, stream=stream)
                yield from self._from_stamp(_intact(container, stream, self.path) if check else container.decode(stream), stamp)
        except (av.FFmpegError, OSError) as error:
            raise UnreadableError(f"{self.path} cannot be decoded: {error}") from error

    def _from_stamp(self, decoded: Iterator["VideoFrame"], stamp: int | None) -> Iterator["VideoFrame"]:
        """Skip the frames before the one with this time stamp; yield nothing if it does not come."""
        found = stamp is None
        for frame in decoded:
            found = found or frame.pts == stamp
            if not found and stamp is not None and frame.pts is not None and frame.pts > stamp:
                return
            if found and frame.is_corrupt:
                raise UnreadableError(f"{self.path} has damaged frames, the first at {frame.time} s")
            if found:
                yield frame


def _intact(container: Any, stream: Any, path: Path) -> Iterator["VideoFrame"]:
    """Yield all frames of a stream, and refuse a file that ends earlier than its header says."""
    import av

    if path.suffix.lower() == ".gif" and b";" not in path.read_bytes()[-4:]:  # some writers add a few bytes
        raise UnreadableError(f"{path} is cut off: it has no trailer")
    last = 0.0
    for packet in container.demux():
        if packet.pts is not None:
            last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index == stream.index:
            yield from packet.decode()
    promised = (container.duration or 0) / av.time_base
    if last - (container.start_time or 0) / av.time_base < (1 - _MISSING) * promised:
        raise UnreadableError(f"{path} is cut off: it ends after {last:.2f} s of {promised:.2f} s")


def _is_grey(frame: "VideoFrame") -> bool:
    return frame.format.name.startswith("gray")


def _bits(frame: "VideoFrame") -> int:
    return min(16, max(component.bits for component in frame.format.components))


def _mode(frame: "VideoFrame") -> str:
    """The mode as :func:`~sigma_vae.data.pictures.probe` names it: ``L``, ``RGB``, or ``I;16``, ``RGB;10`` and the like."""
    bits = _bits(frame)
    return ("L" if _is_grey(frame) else "RGB") if bits <= 8 else f"{'I' if _is_grey(frame) else 'RGB'};{bits}"


def _one_page(path: Path) -> Probe:
    found, _ = pages(path)
    if len(found) > 1:
        raise UnreadableError(
            f"it has {len(found)} pages, and a frame is one; save each page as a file, or leave --frames out to read them as pictures"
        )
    return found[0]


def _named_in_errors(path: Path, read: Callable[[Path], _Result]) -> _Result:
    """Call a reader of pictures, and add the file's name to its errors."""
    try:
        return read(path)
    except UnreadableError as error:
        raise UnreadableError(f"{path} cannot be decoded: {error}") from error


def _read(path: Path, plan: PicturePlan) -> Array:
    return _named_in_errors(path, plan.read)


def _converted(frame: "VideoFrame", plan: PicturePlan) -> Array:
    from PIL import Image

    if _is_grey(frame) and _bits(frame) > 8:
        deep = frame.to_ndarray(format="gray16le").astype(np.uint16)
        pixels: Array = deep >> (16 - _bits(frame))  # FFmpeg fills the bits below with those above
    else:
        pixels = frame.to_ndarray(format="gray" if _is_grey(frame) else "rgb24")
    return plan.decode(Image.fromarray(np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))))


def starts(video_frames: int, clip_frames: int, step: int) -> list[int]:
    """List the first frames of windows that fit side by side into a video; a window keeps every ``step``-th frame.

    >>> starts(video_frames=10, clip_frames=2, step=2)
    [0, 4]
    """
    taken = -(-video_frames // step)
    return [number * clip_frames * step for number in range(taken // clip_frames)]


class Window(NamedTuple):
    """The start of a clip: number of the video, and of the first frame."""

    video: int
    start: int


class _Reel(threading.local):
    """A thread's open video: the next clip often starts where the last one stopped."""

    video: int | None = None
    position: int = 0
    frames: Iterator[Frame] = iter(())


@final
@dataclass(frozen=True, eq=False)
class Windows:
    """Decode windows of videos into clips ``(frames, C, H, W)``.

    Args:
        videos: the videos and their surveys.
        windows: the starts of the clips.
        frames: frames per clip.
        step: keep every ``step``-th frame.
        plan: turns a frame into an array ``(C, H, W)``.
    """

    videos: Sequence[tuple[Video, Survey]]
    windows: Sequence[Window]
    frames: int
    step: int
    plan: PicturePlan
    _reel: _Reel = field(default_factory=_Reel, init=False, repr=False)

    def __call__(self, number: int) -> Array:
        """Decode one clip.

        Raises:
            UnreadableError: a frame is broken, or missing.
        """
        video, start = self.windows[number]
        clip = np.empty((self.frames, *self.plan.shape), self.plan.dtype)
        try:
            for i in range(self.frames):
                clip[i] = self._frame(video, start + i * self.step)(self.plan)
        except UnreadableError:
            self._reel.video = None
            raise
        return clip

    def _frame(self, video: int, number: int) -> Frame:
        """Return a frame, going on from the last one if that is shorter than entering at a mark."""
        reel = self._reel
        if reel.video != video or not 0 <= number - reel.position <= MARKS_APART:
            source, survey = self.videos[video]
            reel.video, reel.position, reel.frames = video, number, source.frames(number, survey)
        for frame in reel.frames:
            reel.position += 1
            if reel.position > number:
                return frame
        raise UnreadableError(f"{self.videos[video][0].files[0]} ends before frame {number}, which it had")


ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
OPTIONS = PICTURE_OPTIONS | {"frames", "test_frames", "frame_step"}
_FRAMES = 16


def _pictures() -> frozenset[str]:
    return picture_endings() - {".gif", ".pbm"}


@dataclass(frozen=True)
class _Found:
    """A video, its name within the folder, and its survey."""

    name: str
    video: Video
    survey: Survey
    split: bool
    """Whether the folder of a split is the first part of its name."""


def holds_videos(path: Path, config: DataConfig) -> bool:
    """Whether a path is a folder with a video file; if clips are asked for, GIFs and folders of frames count as well."""
    return path.is_dir() and next(_videos(path, config.clips), None) is not None


@register.source("videos", options=OPTIONS, endings=ENDINGS, reads=holds_videos, rank=2)
def read_videos(config: DataConfig) -> Raw:
    """Cut videos into clips side by side, 16 frames each by default; the rest of a video is dropped.

    Folders train, validation (valid, val) and test are the splits; otherwise whole videos are held out. Frames in a
    folder of pictures are sorted by the numbers in their names.

    Raises:
        ValueError: there are no videos; one is broken or too short; or their sizes differ and no option resolves it.
    """
    path, step = config.path, config.clips.frame_step
    if not path.exists():
        raise ValueError(f"expected a video, or a folder of videos, at {path}, got no such file; check the path")
    lengths = _lengths(path, config)
    found, broken = _surveyed(path, config)
    everything = list(chain.from_iterable(found.values()))
    shared = plan([each for item in everything for each in item.survey.probes], config.images, str(path))
    parts = {split: _encoded(items, lengths[split], shared, path, config) for split, items in found.items()}
    size = sum(file.stat().st_size for item in everything for file in item.video.files)
    files = [{"path": str(path.resolve()), "videos": len(everything), "bytes": size}]
    every = f", keeping every {step}-th frame" if step > 1 else ""
    test = f" (test: {lengths['test']})" if lengths["test"] != lengths["train"] else ""
    left = sum(item.survey.frames - _used(item, lengths[split], step) for split, items in found.items() for item in items)
    words = [f"clips of {lengths['train']} frames{test}{every}, side by side; {left} frames at the ends of videos dropped"]
    words += [f"left out {len(broken)} unreadable videos ({', '.join(broken[:5])})"] if broken else []
    words += _ignored(path, config.clips)
    return Raw(
        str(path),
        parts,
        files,
        [*words, *shared.words],
        levels=shared.levels if shared.bits < 16 else None,
        clips=True,
        labels=class_labels({split: _classes(found[split], parts[split]) for split in parts}),
    )


def _classes(found: list[_Found], clips: Encoded) -> list[str | None]:
    """The subfolder of each clip's video; None in that of a split, or in none."""
    classes = [class_folder(item.name, item.name.split("/")[0] if item.split else "") for item in found]
    return [classes[video] for video in clips.videos or ()]


def _lengths(path: Path, config: DataConfig) -> dict[SplitName, int]:
    frames, test_frames = clip_lengths(config.clips, _FRAMES, _FRAMES)
    if frames != test_frames and "test" not in dict(_splits(path)):
        raise ValueError(
            f"{path} needs a folder test for clips of another length than in training, got frames {frames} and test_frames"
            f" {test_frames}; put test videos there, or leave test_frames out"
        )
    return {"train": frames, "validation": frames, "test": test_frames}


def _check_inside(path: Path, folders: list[Path], clips: ClipConfig) -> None:
    """Refuse videos outside the folders of the splits, if there are such folders."""
    outside = (place for place, _ in _videos(path, clips) if not any(place.is_relative_to(folder) for folder in folders))
    if (stray := next(outside, None)) is not None:
        raise ValueError(
            f"{path} needs its videos in {', '.join(folder.name for folder in folders)}, got {stray.relative_to(path)}; move it, or"
            " rename these folders"
        )


def _surveyed(path: Path, config: DataConfig) -> tuple[dict[SplitName, list[_Found]], list[str]]:
    """Survey the videos of each split, and list the broken ones."""
    splits = _splits(path)
    _check_inside(path, [folder for _, folder in splits], config.clips)
    videos = [(split, name.as_posix(), video) for split, folder in splits for name, video in _named(folder, path, config.clips)]
    stamps = {name: _stamp(video) for _, name, video in videos}
    identity = {"videos": stamps, "reader": "videos-2", "of": "surveys"}
    surveys = remembered(_home(path), config.cache, identity, lambda: _survey([video for *_, video in videos]))
    broken = {name: error for (_, name, _), (_, error) in zip(videos, surveys, strict=True) if error}
    if broken and config.images.unreadable == "refuse":
        raise ValueError(
            f"{len(broken)} of {len(videos)} videos cannot be read: {'; '.join(list(broken.values())[:5])};"
            " repair or remove them, or leave them out: --unreadable skip"
        )
    found: dict[SplitName, list[_Found]] = {}
    for (split, name, video), (survey, error) in zip(videos, surveys, strict=True):
        if not error:
            found.setdefault(split, []).append(_Found(name, video, _parsed(survey), [folder for _, folder in splits] != [path]))
    if "train" not in found:
        raise ValueError(
            f"{path} needs videos to train on ({', '.join(ENDINGS)}, or folders of pictures), got none that can be read"
        )
    return found, list(broken)


def _survey(videos: Sequence[Video]) -> list[tuple[dict[str, Any], str]]:
    """Survey each video, or say why it is unreadable."""
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
            f"{path}: clips of {frames} frames with frame_step {step} need videos of {(frames - 1) * step + 1} frames, got "
            f"{', '.join(short[:5])}; ask for shorter clips (--frames {least}), or remove short videos"
        )
    windows = [Window(number, start) for number, item in enumerate(found) for start in starts(item.survey.frames, frames, step)]
    videos = {item.name: _stamp(item.video) for item in found}
    return Encoded(
        names=[f"{found[video].name} from frame {start}" for video, start in windows],
        shape=(frames, *shared.shape),
        dtype=shared.dtype,
        decode=Windows([(item.video, item.survey) for item in found], windows, frames, step, shared),
        identity={"videos": videos, "reader": "videos-1", "plan": asdict(shared), "frames": frames, "step": step},
        home=_home(path),
        skip_unreadable=config.images.unreadable == "skip",
        videos=[video for video, _ in windows],
    )


def _used(item: _Found, frames: int, step: int) -> int:
    """Count the frames that windows span, skipped ones included."""
    return min(len(starts(item.survey.frames, frames, step)) * frames * step, item.survey.frames)


def _home(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _ignored(path: Path, clips: ClipConfig) -> list[str]:
    """Describe the ignored files of a folder, among them pictures if clips are not asked for."""
    read = {*ENDINGS, *_pictures()} if clips.frames is not None else {*ENDINGS} - {".gif"}
    names = Folder(path).names if path.is_dir() else []
    others = Counter(suffix for name in names if (suffix := PurePath(name).suffix.lower()) not in read)
    hidden = hidden_pictures(Folder(path)) if path.is_dir() and clips.frames is not None else Counter[str]()
    endings = ", ".join(f"{suffix or 'without ending'} ({count})" for suffix, count in others.most_common(5))
    return [
        *([f"ignored files that are not videos: {endings}"] if others else []),
        *([heif] if clips.frames is not None and (heif := to_read_heif(others)) else []),
        *([f"left out pictures in folders of thumbnails: {listed(hidden)}"] if hidden else []),
    ]


def _stamp(video: Video) -> str:
    try:
        return hashlib.sha256(repr([file_stamp(file) for file in video.files]).encode()).hexdigest()
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}); mend or remove this file or link") from error


def _splits(path: Path) -> list[tuple[SplitName, Path]]:
    """Find the folders of the splits; without any, everything is for training."""
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
    """Yield the video files below a folder, in order; if clips are asked for, GIFs and folders of pictures as well."""
    asked, seen = clips.frames is not None, set[str]()
    for place, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        new = (name for name in folders if not is_hidden(name) and os.path.realpath(Path(place, name)) not in seen)
        folders[:] = sorted(new, key=by_numbers)
        visible = [Path(place, name) for name in sorted(files, key=by_numbers) if not name.startswith(".")]
        for file in visible:
            if file.suffix.lower() in ENDINGS and (asked or file.suffix.lower() != ".gif"):
                yield file, Film(file)
        pictures = tuple(file for file in visible if file.suffix.lower() in _pictures())
        if asked and pictures:
            yield Path(place), Frames(pictures)


def by_numbers(name: str) -> list[tuple[int, str]]:
    """Sort key that puts frame 10 after frame 9.

    >>> sorted(["frame10", "frame9"], key=by_numbers)
    ['frame9', 'frame10']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]
