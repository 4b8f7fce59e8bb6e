"""Windows of a long series, and scores of windows put back on the time axis."""

import numpy as np
import numpy.typing as npt

__all__ = ["on_time_axis", "segments", "windows"]


def windows(series: npt.NDArray[np.floating], window: int, stride: int = 1) -> npt.NDArray[np.floating]:
    """Windows ``(n, C, window)`` of a series ``(T, C)``, each a stride after the one before.

    Raises:
        ValueError: the series is shorter than a window.

    >>> windows(np.arange(5.0)[:, None], window=3, stride=2)[:, 0]
    array([[0., 1., 2.],
           [2., 3., 4.]])
    """
    if window < 1 or stride < 1:
        raise ValueError(f"window and stride are at least 1, got {window} and {stride}")
    if len(series) < window:
        raise ValueError(f"a window of {window} needs a series as long, got {len(series)} times; take a shorter window")
    return np.lib.stride_tricks.sliding_window_view(series, window, axis=0)[::stride]


def on_time_axis(
    scores: npt.NDArray[np.float64], starts: npt.NDArray[np.int64], window: int, length: int
) -> npt.NDArray[np.float64]:
    """Mean score of the windows that hold each time, ``(length,)``; NaN where none does.

    Args:
        scores: of windows ``(n,)``.
        starts: the first time of each.
        window: their length.
        length: of the series.

    >>> on_time_axis(np.array([1.0, 3.0]), np.array([0, 2]), window=3, length=5)
    array([1., 1., 2., 3., 3.])
    """
    total, count = np.zeros(length + 1), np.zeros(length + 1)
    for sums, values in ((total, scores), (count, np.ones(len(scores)))):
        np.add.at(sums, starts, values)
        np.add.at(sums, np.minimum(starts + window, length), -values)
    held = np.round(count.cumsum()[:-1])
    found: npt.NDArray[np.float64] = np.full(length, np.nan)
    np.divide(total.cumsum()[:-1], held, out=found, where=held > 0)
    return found


def segments(length: int, window: int, validation_fraction: float, test_fraction: float) -> tuple[slice, slice, slice]:
    """Times for training, validation and test, one after the other, so that no window is in two of them.

    Raises:
        ValueError: one is shorter than a window.

    >>> segments(100, 5, 0.1, 0.2)
    (slice(0, 72, None), slice(72, 80, None), slice(80, 100, None))
    """
    test = length - round(test_fraction * length)
    validation = test - round(validation_fraction * test)
    parts = slice(0, validation), slice(validation, test), slice(test, length)
    if short := [part for part in parts if part.stop - part.start < window]:
        raise ValueError(
            f"a series of {length} times is cut into training, validation and test, and one of {short[0].stop - short[0].start} times has"
            f" no window of {window}; take a shorter window, or larger fractions"
        )
    return parts
