"""Videos as sequences of frames that can be entered anywhere: files that FFmpeg decodes, and folders of pictures."""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

import numpy as np

from sigma_vae.data.files.picture_rules import Probe
from sigma_vae.data.files.pictures import PicturePlan, probe
from sigma_vae.data.levels import Array
from sigma_vae.data.raw import UnreadableError

if TYPE_CHECKING:
    from av import VideoFrame

__all__ = ["Film", "Frame", "Frames", "Survey", "Video"]

Frame = Callable[[PicturePlan], Array]
"""One frame, which becomes an array only if it is asked for by a plan."""

_Result = TypeVar("_Result")

MARKS_APART = 256
"""Frames between two places where decoding can begin: at most so many, and those to the next key frame, are decoded in vain."""
_MISSING = 0.1
"""Share of the duration after which nothing may follow before a file counts as cut off."""


@dataclass(frozen=True)
class Survey:
    """What going through a whole video says of it."""

    frames: int
    probes: list[Probe]
    """Width, height and mode of its frames, each once."""
    marks: list[tuple[int, int]]
    """Frames where decoding can begin: their number and their time stamp."""


class Video(ABC):
    """Frames in order."""

    @property
    @abstractmethod
    def files(self) -> Sequence[Path]:
        """What it is read from."""

    @abstractmethod
    def survey(self) -> Survey:
        """Go through all frames.

        Raises:
            UnreadableError: it is broken, or cut off.
        """

    @abstractmethod
    def frames(self, start: int, survey: Survey) -> Iterator[Frame]:
        """The frames from this one on.

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
        return Survey(len(self.pictures), list(dict.fromkeys(_told(path, probe) for path in self.pictures)), [])

    def frames(self, start: int, survey: Survey) -> Iterator[Frame]:
        """The pictures from this one on."""
        for path in self.pictures[start:]:
            yield partial(_read, path)


@final
@dataclass(frozen=True)
class Film(Video):
    """A file with a video stream, of which the first is taken."""

    path: Path

    @property
    def files(self) -> Sequence[Path]:
        """The one file."""
        return (self.path,)

    def survey(self) -> Survey:
        """Decode all frames: what a header says of their number is often wrong."""
        count, latest, probes, marks = 0, -math.inf, dict[Probe, None](), list[tuple[int, int]]()
        for frame in self._decoded(check=True):
            if frame.pts is not None and frame.pts > latest:  # a mark is found again by its time stamp: none came earlier
                latest = frame.pts
                if frame.key_frame and count - (marks[-1][0] if marks else -MARKS_APART) >= MARKS_APART:
                    marks.append((count, frame.pts))
            width, height = (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)
            probes[width, height, "L" if _is_grey(frame) else "RGB"] = None
            count += 1
        if not count:
            raise UnreadableError(f"{self.path} has no frames")
        return Survey(count, list(probes), marks)

    def frames(self, start: int, survey: Survey) -> Iterator[Frame]:
        """Frames from this one on, decoded from the last mark before it."""
        before = bisect_right([number for number, _ in survey.marks], start)
        first, stamp = survey.marks[before - 1] if before else (0, None)
        decoded = self._decoded(stamp if first else None)
        if (head := next(decoded, None)) is None:  # some files cannot be entered in the middle
            first, decoded = 0, self._decoded()
        for number, frame in enumerate(chain([head] if head else [], decoded), first):
            if number >= start:
                yield partial(_converted, frame)

    def _decoded(self, stamp: int | None = None, check: bool = False) -> Iterator["VideoFrame"]:
        """All frames, or those from the key frame with that time stamp on."""
        import av

        try:
            with av.open(self.path) as container:
                if not container.streams.video:
                    raise UnreadableError(f"{self.path} has no video stream")
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1  # as many files or parts are decoded at once as there are cores
                if stamp is not None:
                    with suppress(av.FFmpegError):  # then it is looked for from the beginning
                        container.seek(stamp, stream=stream)
                yield from self._from_stamp(_intact(container, stream, self.path) if check else container.decode(stream), stamp)
        except (av.FFmpegError, OSError) as error:
            raise UnreadableError(f"{self.path} cannot be decoded: {error}") from error

    def _from_stamp(self, decoded: Iterator["VideoFrame"], stamp: int | None) -> Iterator["VideoFrame"]:
        """Pass over what a seek gives before the frame that is looked for; nothing where that does not come."""
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
    """All frames of a stream, if the file goes on as long as it says; players show what there is of others."""
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


def _told(path: Path, read: Callable[[Path], _Result]) -> _Result:
    """What a reader of pictures says, with the name of the file in its errors."""
    try:
        return read(path)
    except UnreadableError as error:
        raise UnreadableError(f"{path} cannot be decoded: {error}") from error


def _read(path: Path, plan: PicturePlan) -> Array:
    return _told(path, plan.read)


def _converted(frame: "VideoFrame", plan: PicturePlan) -> Array:
    from PIL import Image

    pixels = frame.to_ndarray(format="gray" if _is_grey(frame) else "rgb24")
    return plan.decode(Image.fromarray(np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))))
