"""Clips as windows of videos, decoded in any order; in their own order without going back."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from sigma_vae.data.files.films import MARKS_APART, Frame, Survey, Video
from sigma_vae.data.files.pictures import PicturePlan
from sigma_vae.data.levels import Array
from sigma_vae.data.raw import UnreadableError

__all__ = ["Window", "Windows", "starts"]


def starts(video_frames: int, clip_frames: int, step: int) -> list[int]:
    """First frames of the windows that fit side by side into a video; a window takes every so manieth frame.

    >>> starts(video_frames=10, clip_frames=2, step=2)
    [0, 4]
    """
    taken = -(-video_frames // step)
    return [number * clip_frames * step for number in range(taken // clip_frames)]


@dataclass(frozen=True)
class Window:
    """Where a clip begins."""

    video: int
    start: int


class _Reel(threading.local):
    """What a thread has open: the next clip often goes on where the last one stopped."""

    video: int | None = None
    position: int = 0
    frames: Iterator[Frame] = iter(())


@final
class Windows:
    """Decodes windows.

    Args:
        videos: with what was found out of each.
        windows: first frames.
        frames: of a clip.
        step: every so manieth frame is taken.
        plan: from a frame to an array ``(C, H, W)``.

    Shapes:
        a clip ``(frames, C, H, W)``.
    """

    def __init__(
        self, videos: Sequence[tuple[Video, Survey]], windows: Sequence[Window], frames: int, step: int, plan: PicturePlan
    ) -> None:
        self.videos = videos
        self.windows = windows
        self.frames = frames
        self.step = step
        self.plan = plan
        self._reel = _Reel()

    def __call__(self, number: int) -> Array:
        """One clip.

        Raises:
            UnreadableError: a frame is broken, or missing.
        """
        window = self.windows[number]
        clip = np.empty((self.frames, *self.plan.shape), self.plan.dtype)
        try:
            for i in range(self.frames):
                clip[i] = self._frame(window.video, window.start + i * self.step)(self.plan)
        except UnreadableError:
            self._reel.video = None
            raise
        return clip

    def _frame(self, video: int, number: int) -> Frame:
        """That frame, by going on from the last one where that is shorter than to begin at a mark."""
        reel = self._reel
        if reel.video != video or not 0 <= number - reel.position <= MARKS_APART:
            source, survey = self.videos[video]
            reel.video, reel.position, reel.frames = video, number, source.frames(number, survey)
        for frame in reel.frames:
            reel.position += 1
            if reel.position > number:
                return frame
        raise UnreadableError(f"{self.videos[video][0].files[0]} ends before frame {number}, which it had")
