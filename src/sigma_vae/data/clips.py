"""How long clips are."""

from sigma_vae.config import ClipConfig

__all__ = ["clip_lengths"]


def clip_lengths(clips: ClipConfig, frames: int, test_frames: int) -> tuple[int, int]:
    """Frames of a clip in training and in test: what the user says, else what is usual for the data.

    Who gives the one alone has it for both.

    >>> clip_lengths(ClipConfig(), 12, 30), clip_lengths(ClipConfig(frames=16), 12, 30)
    ((12, 30), (16, 16))
    """
    if clips.frames is not None:
        return clips.frames, clips.test_frames or clips.frames
    return frames, clips.test_frames or test_frames
