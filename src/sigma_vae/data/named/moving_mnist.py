"""Stochastic Moving MNIST: digits that bounce off the walls in random directions, generated anew in each epoch.

The rules are those of SVG (Denton and Fergus 2018, https://arxiv.org/abs/1802.07687; data/moving_mnist.py of
https://github.com/edenton/svg). It is not the fixed, deterministic file mnist_test_seq.npy of Srivastava et al. (2015).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from sigma_vae.config import DataConfig
from sigma_vae.data.arrays import read_images
from sigma_vae.data.cache import file_record
from sigma_vae.data.named.mnist import FILES, mnist_5k, whose
from sigma_vae.data.named.official import find_splits, folders
from sigma_vae.data.splits import ORDER, Raw, SplitName, clip_lengths, count_of, shuffled
from sigma_vae.data.stores import Generated
from sigma_vae.registry import register

__all__ = ["BouncingDigits", "read_moving_mnist"]

Images = npt.NDArray[np.uint8]

_CLIPS: dict[SplitName, int] = {"train": 10_000, "validation": 1_000, "test": 1_000}
_FRAMES, _TEST_FRAMES = 15, 30
_SIDE = 64


@final
@dataclass(frozen=True, eq=False)
class BouncingDigits:
    """Generate clips of two digits that move over a black square.

    On a canvas of 64×64, digits are 32×32, start at 0 to 31 from the top and the left, and move by −4 to 4 pixels per
    frame in each direction, all uniform. A digit that would leave is put at that edge (0 or 31); its velocity across
    the edge is drawn again from 1 to 4 inwards, and the one along it from −4 to 4. Top and bottom are checked before
    left and right. Levels of overlapping digits add up, to 255 at most. On canvases of other sides, all of these
    numbers are scaled in proportion.

    Args:
        images: images of digits ``(N, H, W)``, resized to half the side (Pillow, bilinear with antialiasing).
        frames: frames per clip.
        side: side of the canvas, a multiple of 16.

    Shapes:
        a clip ``(frames, 1, side, side)``, uint8.

    >>> white = BouncingDigits(np.full((1, 28, 28), 255, np.uint8), frames=5, side=64)
    >>> clip = white(np.random.default_rng(0))
    >>> clip.shape, int(clip.max())
    ((5, 1, 64, 64), 255)
    """

    images: Images
    frames: int
    side: int

    def __call__(self, generator: np.random.Generator) -> Images:
        """Generate one clip."""
        canvas = np.zeros((self.frames, self.side, self.side), np.uint16)
        digit_side = self.side // 2
        for _ in range(2):
            digit = self._resized(self.images[generator.integers(len(self.images))])
            for frame, (y, x) in zip(canvas, self._path(generator), strict=False):
                frame[y : y + digit_side, x : x + digit_side] += digit
        return np.minimum(canvas, 255).astype(np.uint8)[:, np.newaxis]

    def _resized(self, image: Images) -> Images:
        from PIL import Image

        return np.asarray(Image.fromarray(image).resize((self.side // 2, self.side // 2), Image.Resampling.BILINEAR))

    def _path(self, generator: np.random.Generator) -> Iterator[tuple[int, int]]:
        """Yield the digit's position in each frame, endlessly."""
        limit, fastest = self.side // 2 - 1, self.side // 16
        x, y = generator.integers(0, limit + 1, 2).tolist()
        dx, dy = generator.integers(-fastest, fastest + 1, 2).tolist()
        while True:
            if not 0 <= y <= limit:
                y, dy, dx = _bounce(y, limit, fastest, generator)
            if not 0 <= x <= limit:
                x, dx, dy = _bounce(x, limit, fastest, generator)
            yield y, x
            x, y = x + dx, y + dy


def _bounce(position: int, limit: int, fastest: int, generator: np.random.Generator) -> tuple[int, int, int]:
    """Return the position at the crossed edge, and new velocities across and along it."""
    inward = int(generator.integers(1, fastest + 1))
    along = int(generator.integers(-fastest, fastest + 1))
    return (0, inward, along) if position < 0 else (limit, -inward, along)


@register.source("moving-mnist", options={"root", "size", "frames", "test_frames"})
def read_moving_mnist(config: DataConfig) -> Raw:
    """Generate 10 000 new training clips per epoch (15 frames), and 1 000 fixed ones for validation (15) and test (30).

    The three splits use different images of digits. If MNIST's official files are in ``root``, or in the folder of
    SIGMA_VAE_DATA or its subfolder mnist, test uses the test images, and validation a share of the training images.
    Otherwise all use shares of the 5 000 images of ``mnist-5k``. Files of the same kind, such as Fashion-MNIST's, work
    as well.

    Raises:
        ValueError: a file is missing in ``root``, or damaged; or a size or fraction is out of range.
    """
    side = config.images.size or _SIDE
    if side % 16:
        raise ValueError(f"moving-mnist needs a canvas whose side is a multiple of 16, got size {side}; give 64 or 32, say")
    frames, test_frames = clip_lengths(config.clips, _FRAMES, _TEST_FRAMES)
    images, source, files = _digits(config)
    split, fastest = _without_overlap(images, config), side // 16
    parts = {
        name: _clips(name, split[name], test_frames if name == "test" else frames, side, config.split_seed) for name in _CLIPS
    }
    words = [
        f"two digits of {source} at {side // 2}×{side // 2} (Pillow, bilinear with antialiasing), bouncing stochastically as in SVG,"
        f" velocities -{fastest} to {fastest}",
        f"clips of {frames} frames (test: {test_frames}), generated anew in each training epoch from {len(split['train'])} images;"
        f" validation and test fixed, from {len(split['validation'])} and {len(split['test'])} others",
    ]
    return Raw("moving-mnist", parts, files, words, levels=256, clips=True)


def _clips(name: SplitName, images: Images, frames: int, side: int, seed: int) -> Generated:
    digest = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    # Each split has its own stream: with the seed itself, validation would repeat the paths of the first epoch.
    own = int(np.random.SeedSequence((seed, list(_CLIPS).index(name))).generate_state(1)[0])
    identity = f"moving-mnist-1 {digest} {frames} {side}"
    return Generated(BouncingDigits(images, frames, side), _CLIPS[name], own, identity, fresh=name == "train")


def _digits(config: DataConfig) -> tuple[dict[SplitName, Images], str, list[dict[str, Any]]]:
    """Return train images, and test images if there are any; their name; their files."""
    places = folders("mnist", config.root)
    for folder in places:
        if files := find_splits(folder, FILES, "moving-mnist"):
            images = {name: read_images(path) for name, path in files.items()}
            return images, whose(images["train"]) or f"the files in {folder}", [file_record(path) for path in files.values()]
    if config.root:
        raise ValueError(
            f"moving-mnist needs {' and '.join(FILES.values())} in {places[0]}, got no such file; give the folder, or none for"
            " mnist-5k"
        )
    raw = mnist_5k(config)
    train = raw.parts["train"]
    assert isinstance(train, np.ndarray), "the package has an array"
    return {"train": train[:, 0].astype(np.uint8)}, "mnist-5k", raw.files


def _without_overlap(images: dict[SplitName, Images], config: DataConfig) -> dict[SplitName, Images]:
    """Hold out images for each split, with the fractions and the seed that hold out examples elsewhere."""
    order = shuffled(len(images["train"]), config.split_seed)
    result = dict(images)
    for name in (split for split in ORDER if split not in images):
        count = count_of(name, len(order), config)
        result[name], order = images["train"][np.sort(order[:count])], order[count:]
    return result | {"train": images["train"][np.sort(order)]}
