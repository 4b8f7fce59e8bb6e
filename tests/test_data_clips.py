"""Moving MNIST bounces by SVG's rules, re-derived here from the frames, and is the same whoever makes it."""

import struct
import tarfile
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from google_crc32c import value as crc32c
from PIL import Image

from sigma_vae.config import ClipConfig, DataConfig, ImageConfig
from sigma_vae.data import load
from sigma_vae.data.named import clips
from sigma_vae.data.named.clips import BouncingDigits
from sigma_vae.data.named.images import mnist_5k

WHITE, GREY = (np.full((1, 28, 28), level, np.uint8) for level in (255, 100))
SIDES = (64, 32)


@pytest.fixture(autouse=True)
def _nothing_lies_around(monkeypatch):
    monkeypatch.delenv("SIGMA_VAE_DATA", raising=False)
    monkeypatch.setattr(clips, "mnist_5k", lambda config: five_thousand())


@cache
def five_thousand():
    """The package reads a text file, which takes seconds."""
    return mnist_5k(DataConfig("mnist-5k"))


class Recorded:
    """A generator whose draws are kept, with the ranges they were asked for."""

    def __init__(self, seed):
        self.draws, self.generator = [], np.random.default_rng(seed)

    def integers(self, *arguments):
        drawn = self.generator.integers(*arguments)
        self.draws += [(arguments[:2], value) for value in np.atleast_1d(drawn).tolist()]
        return drawn


def path(clip, digit_side):
    """Top left corner of one white digit in each frame, from the pixels."""
    corners = []
    for frame in clip[:, 0]:
        rows, columns = np.flatnonzero(frame.any(1)), np.flatnonzero(frame.any(0))
        assert len(rows) == len(columns) == digit_side
        corners.append((int(rows[0]), int(columns[0])))
    return corners


@pytest.mark.parametrize("side", SIDES)
def test_paths_follow_the_rules(side):
    """Each frame of one digit alone is what the frames before it allow."""
    limit, fastest, starts, bounces = side // 2 - 1, side // 16, Counter(), Counter()
    digits = BouncingDigits(np.concatenate([WHITE, 0 * WHITE]), 40, side)
    for seed in range(150):
        recorded = Recorded(seed)
        clip = digits(recorded)
        if [value for asked, value in recorded.draws if asked == (2,)] not in ([0, 1], [1, 0]):
            continue  # two white digits cannot be told apart
        corners = path(clip, side // 2)
        starts.update(corners[0])
        velocity, inward = None, None  # both unknown until a step shows them
        for before, after in pairwise(corners):
            step = np.subtract(after, before).tolist()
            if velocity is None:
                assert max(map(abs, step)) <= fastest
                assert inward is None or 1 <= step[inward[0]] * inward[1] <= fastest
                # At an edge the digit may have been held back: what its velocity was, this step does not say.
                velocity, inward = (None if {0, limit} & set(after) else step), None
                continue
            unbounded = np.add(before, velocity).tolist()
            assert np.clip(unbounded, 0, limit).tolist() == list(after)
            crossed = [(axis, 1 if unbounded[axis] < 0 else -1) for axis in (0, 1) if not 0 <= unbounded[axis] <= limit]
            if crossed:  # drawn anew; in a corner, left and right draw last and may send it up or down out again
                bounces.update(crossed)
                velocity, inward = None, crossed[-1]
    assert set(starts) == set(range(limit + 1))
    assert set(bounces) == {(axis, sign) for axis in (0, 1) for sign in (1, -1)}


@pytest.mark.parametrize("side", SIDES)
def test_clips_equal_a_simulation_from_the_same_draws(side):
    """What was drawn, in the order in which SVG draws it, gives every pixel."""
    images = np.random.RandomState(0).randint(0, 256, (5, 28, 28)).astype(np.uint8)
    limit, fastest, half = side // 2 - 1, side // 16, side // 2
    for seed in range(25):
        recorded = Recorded(seed)
        clip = BouncingDigits(images, 30, side)(recorded)
        draws = iter(recorded.draws)

        def draw(low, high, draws=draws):
            asked, value = next(draws)
            assert asked == (low, high)
            return value

        total = np.zeros((30, side, side))
        for _ in range(2):
            asked, number = next(draws)
            assert asked == (5,)
            digit = np.asarray(Image.fromarray(images[number]).resize((half, half), Image.Resampling.BILINEAR)) / 255
            sx, sy = draw(0, limit + 1), draw(0, limit + 1)
            dx, dy = draw(-fastest, fastest + 1), draw(-fastest, fastest + 1)
            for t in range(30):
                if sy < 0 or sy > limit:
                    down = sy < 0
                    sy = 0 if down else limit
                    dy = draw(1, fastest + 1) * (1 if down else -1)
                    dx = draw(-fastest, fastest + 1)
                if sx < 0 or sx > limit:
                    right = sx < 0
                    sx = 0 if right else limit
                    dx = draw(1, fastest + 1) * (1 if right else -1)
                    dy = draw(-fastest, fastest + 1)
                total[t, sy : sy + half, sx : sx + half] += digit
                sx, sy = sx + dx, sy + dy
        assert next(draws, None) is None
        assert np.array_equal(clip[:, 0], np.rint(np.minimum(total, 1) * 255).astype(np.uint8))


def test_overlaps_add_up_to_white():
    for images, values in ((GREY, {0, 100, 200}), (WHITE, {0, 255})):
        clips = [BouncingDigits(images, 15, 64)(np.random.default_rng(seed)) for seed in range(20)]
        assert set(np.unique(clips).tolist()) == values


def test_clips_do_not_depend_on_who_makes_them():
    splits, again = load(DataConfig("moving-mnist")), load(DataConfig("moving-mnist"))
    assert splits.record["fingerprint"] == again.record["fingerprint"]
    assert splits.record["counts"] == {"train": 10_000, "validation": 1_000, "test": 1_000}
    positions = torch.tensor([5, 9_999, 0])
    whole = splits.train.take(positions, epoch=3)
    assert torch.equal(again.train.take(positions.flip(0), epoch=3), whole.flip(0))
    assert not torch.equal(splits.train.take(positions, epoch=4), whole)
    for name in ("validation", "test"):
        assert torch.equal(splits.store(name).take(positions[[0, 2]], epoch=3), splits.store(name).take(positions[[0, 2]]))
    other = load(DataConfig("moving-mnist", split_seed=1))
    assert other.record["fingerprint"] != splits.record["fingerprint"]
    assert not torch.equal(other.test.take(positions[:1]), splits.test.take(positions[:1]))


def test_processes_share_out_one_sequence_of_batches():
    splits = load(DataConfig("moving-mnist", clips=ClipConfig(frames=3)))

    def two_epochs(rank, world_size):
        batches = splits.batches("train", 8, shuffle=True, seed=1, limit=20, rank=rank, world_size=world_size)
        return [(batch.x, batch.positions) for _ in range(2) for batch in batches]

    shards = zip(*(two_epochs(rank, 3) for rank in range(3)), strict=True)
    for one, parts in zip(two_epochs(0, 1), shards, strict=True):
        for whole, shared in zip(one, zip(*parts, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(shared))


def test_splits_have_paths_and_lengths_of_their_own():
    splits = load(DataConfig("moving-mnist"))
    assert splits.clips
    assert (splits.shape, splits.levels) == ((1, 64, 64), 256)
    assert [splits.store(name).shape[0] for name in ("train", "validation", "test")] == [15, 15, 30]
    first = {name: splits.store(name).take(torch.tensor([0])) for name in ("train", "validation", "test")}
    assert not torch.equal(first["train"], first["validation"])
    assert len({store.seed for store in (splits.train, splits.validation, splits.test)}) == 3
    small = load(DataConfig("moving-mnist", clips=ClipConfig(4, 6), images=ImageConfig(size=32)))
    assert (small.train.shape, small.test.shape) == ((4, 1, 32, 32), (6, 1, 32, 32))


def digits_of(splits, name):
    """The images that a split can show."""
    return set(map(bytes, splits.store(name).make.images))


def test_no_digit_is_in_two_splits(monkeypatch, tmp_path):
    bundled = load(DataConfig("moving-mnist", test_fraction=0.2))
    images = [digits_of(bundled, name) for name in ("train", "validation", "test")]
    assert [len(part) for part in images] == [3600, 400, 1000]
    assert len(set.union(*images)) == 5000
    official = {
        stem: np.random.RandomState(count).randint(0, 256, (count, 28, 28)).astype(np.uint8)
        for stem, count in (("train", 50), ("t10k", 10))
    }
    for stem, part in official.items():
        header = struct.pack(">IIII", 0x803, *part.shape)
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(header + part.tobytes())
    monkeypatch.setenv("SIGMA_VAE_DATA", str(tmp_path))
    for root in (str(tmp_path), None):
        splits = load(DataConfig("moving-mnist", root=root))
        assert digits_of(splits, "test") == set(map(bytes, official["t10k"]))
        assert digits_of(splits, "train") | digits_of(splits, "validation") == set(map(bytes, official["train"]))
        assert not digits_of(splits, "train") & digits_of(splits, "validation")
        assert len(splits.record["files"]) == 2
        assert f"two digits of the files in {tmp_path} at 32×32" in splits.record["preprocessing"]
    greys = np.repeat(np.uint8([73] * 47 + [72] * 3), 784)  # mean 72.94
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 50, 28, 28) + greys.tobytes())
    assert "two digits of fashion-mnist" in load(DataConfig("moving-mnist")).record["preprocessing"]
    (tmp_path / "train-images-idx3-ubyte").unlink()
    with pytest.raises(ValueError, match=r"got no train-images-idx3-ubyte.*put both files there"):
        load(DataConfig("moving-mnist"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": ImageConfig(size=40)}, "a multiple of 16, got size 40; give 64 or 32, say"),
        ({"split_seed": -1}, "split_seed is one of 0"),
        ({"validation_fraction": 0.00001}, "validation_fraction=1e-05 holds out 0 of 4500"),
        ({"root": "."}, "got no such file; give the folder, or none for mnist-5k"),
        ({"levels": 2}, "moving-mnist has 256 levels"),
        ({"clips": ClipConfig(frame_step=2)}, "frame_step says nothing about moving-mnist"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load(DataConfig("moving-mnist", **options))


def test_defaults_are_svgs():
    assert (clips._FRAMES, clips._TEST_FRAMES, clips._SIDE) == (5 + 10, 30, 64)


# -- BAIR's files in their original format, written here independently, come back pixel for pixel; damaged ones are refused

COUNTS = {"train": 12, "test": 3}
SEQUENCES = {
    split: np.random.RandomState(len(split)).randint(0, 256, (count, 30, 64, 64, 3)).astype(np.uint8)
    for split, count in COUNTS.items()
}


def slow_crc32c(data):
    """Bit by bit, as the definition says."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def masked(checksum):
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) % 2**32


def framed(message):
    """One TFRecord."""
    length = struct.pack("<Q", len(message))
    # Bit by bit, a message of a megabyte takes seconds: the fast checksum is compared with the slow one in a test of its own.
    return length + struct.pack("<I", masked(slow_crc32c(length))) + message + struct.pack("<I", masked(crc32c(message)))


def varint(number):
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number, payload):
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def example(features):
    """A ``tf.train.Example``: bytes and lists of floats by name."""
    entries = b""
    for name, value in features.items():
        kind, value = (1, value) if isinstance(value, bytes) else (2, struct.pack(f"<{len(value)}f", *value))
        entries += field(1, field(1, name.encode()) + field(2, field(kind, field(1, value))))
    return field(1, entries)


def sequence(frames):
    features = {"scene": b"", "an unknown feature": [1.0]}
    for i, frame in enumerate(frames):
        features |= {f"{i}/action": [0.0] * 4, f"{i}/image_main/encoded": bytes(12), f"{i}/image_aux1/encoded": frame.tobytes()}
    return features


def write(folder, sequences=SEQUENCES, change=lambda features: features):
    """Two files a split, as the official ones hold several sequences each."""
    for split, part in sequences.items():
        (folder / split).mkdir(parents=True)
        for first in range(0, len(part), 8):
            records = [framed(example(change(sequence(frames)))) for frames in part[first : first + 8]]
            (folder / split / f"traj_{first}_to_{first + 7}.tfrecords").write_bytes(b"".join(records))
    return folder


@pytest.fixture(autouse=True)
def _small_bair(monkeypatch):
    monkeypatch.setattr(clips, "_BAIR_COUNTS", COUNTS)
    monkeypatch.delenv("SIGMA_VAE_DATA", raising=False)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bair") / "softmotion30_44k")


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 8, 9, 255, 4091, 4092, 4093, 5000, 10001])
def test_checksum_is_that_of_its_definition(size):
    data = np.random.RandomState(size).bytes(size)
    assert crc32c(data) == slow_crc32c(data)


def test_checksum_of_the_standard():
    """RFC 3720, appendix B.4."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def rows(part):
    return sorted(map(bytes, part.reshape(len(part), -1).contiguous().numpy()))


@pytest.mark.parametrize("place", ["root", "folder itself", "variable", "below variable", "archive"])
def test_bair_pixel_for_pixel(official, monkeypatch, tmp_path, place):
    root = official.parent
    if place == "archive":
        root = tmp_path
        with tarfile.open(root / "bair_robot_pushing_dataset_v0.tar", "w") as tar:
            tar.add(official, "softmotion30_44k")
    if "variable" in place:
        (tmp_path / "bair").symlink_to(root)
        monkeypatch.setenv("SIGMA_VAE_DATA", str(root if place == "variable" else tmp_path))
        root = None
    elif place == "folder itself":
        root = official
    splits = load(DataConfig("bair", root=root and str(root), cache=str(tmp_path / "cache")))
    assert splits.clips
    assert splits.shape == (3, 64, 64)
    assert splits.levels == 256
    assert splits.record["counts"] == {"train": 11, "validation": 1, "test": 3}
    expected = {split: part.transpose(0, 1, 4, 2, 3) for split, part in SEQUENCES.items()}
    assert np.array_equal(splits.stored("test").numpy(), expected["test"])
    held_in = torch.cat([splits.stored("train"), splits.stored("validation")])
    assert rows(held_in) == rows(torch.from_numpy(expected["train"][:, :12].copy()))


def test_lengths_of_clips(official, tmp_path):
    config = DataConfig("bair", root=str(official), cache=str(tmp_path), clips=ClipConfig(frames=4, test_frames=7))
    splits = load(config)
    assert splits.train.shape == (4, 3, 64, 64)
    assert splits.test.shape == (7, 3, 64, 64)
    with pytest.raises(ValueError, match="sequences of 30 frames, got clips of 31; ask for fewer"):
        load(DataConfig("bair", root=str(official), clips=ClipConfig(frames=31)))


def spoilt(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def removed(features):
    return {name: value for name, value in features.items() if name != "3/image_aux1/encoded"}


RECORD = len(framed(example(sequence(SEQUENCES["test"][0]))))
DAMAGED = {
    "header": (lambda content: spoilt(content, RECORD + 2), f"TFRecord header at byte {RECORD} with checksum"),
    "content": (lambda content: spoilt(content, RECORD + 4000), "1 of 3 examples .* has a wrong checksum"),
    "cut in a record": (lambda content: content[:-1], f"cut off within the record at byte {2 * RECORD}"),
    "cut in a header": (lambda content: content[: RECORD + 5], f"cut off within the record at byte {RECORD}"),
    "cut between records": (lambda content: content[: 2 * RECORD], "published 3 sequences of test, got 2 in 1 files"),
    "empty": (lambda content: b"", "published 3 sequences of test, got 0 in 1 files"),
    "no messages": (lambda content: 3 * framed(b"\x0b" * 100), "3 of 3 .* tf.train.Example, got 100 bytes of another kind"),
    "cut message": (lambda content: 3 * framed(content[12:2012]), "3 of 3 .* another kind .a field of .* bytes has 1"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused(official, tmp_path, kind):
    change, message = DAMAGED[kind]
    (tmp_path / "train").symlink_to(official / "train")
    (tmp_path / "test").mkdir()
    path = next((official / "test").iterdir())
    (tmp_path / "test" / path.name).write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load(DataConfig("bair", root=str(tmp_path), clips=ClipConfig(frames=1, test_frames=5)))


WRONG = {
    "missing": (removed, "3/image_aux1/encoded needs 12288 bytes, got none"),
    "of floats": (lambda f: f | {"2/image_aux1/encoded": [1.0]}, "2/image_aux1/encoded needs 12288 bytes, got none"),
    "other size": (lambda f: f | {"0/image_aux1/encoded": bytes(99)}, "0/image_aux1/encoded needs 12288 bytes, got 99 bytes"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_frames_are_refused(tmp_path, kind):
    change, message = WRONG[kind]
    write(tmp_path, {split: part[:, :5] for split, part in SEQUENCES.items()}, change)
    with pytest.raises(ValueError, match=message):
        load(DataConfig("bair", root=str(tmp_path), clips=ClipConfig(frames=5)))


def test_unreadable_sequences_can_be_left_out(official, tmp_path):
    (tmp_path / "train").symlink_to(official / "train")
    (tmp_path / "test").mkdir()
    path = next((official / "test").iterdir())
    (tmp_path / "test" / path.name).write_bytes(spoilt(path.read_bytes(), RECORD + 4000))
    splits = load(DataConfig("bair", root=str(tmp_path), images=ImageConfig(unreadable="skip")))
    kept = SEQUENCES["test"][[0, 2]].transpose(0, 1, 4, 2, 3)
    assert np.array_equal(splits.stored("test").numpy(), kept)
    words = f"test: left out 1 of 3 as unreadable (traj_0_to_7.tfrecords at byte {RECORD + 12})"
    assert words in splits.record["preprocessing"]


def test_bair_nowhere_or_half(official, tmp_path):
    with pytest.raises(ValueError, match=r"found neither in any place, as none is given; give the folder"):
        load(DataConfig("bair"))
    with pytest.raises(ValueError, match=f"found neither in {tmp_path}; give the folder"):
        load(DataConfig("bair", root=str(tmp_path)))
    (tmp_path / "train").symlink_to(official / "train")
    with pytest.raises(ValueError, match="got none of test; put them there"):
        load(DataConfig("bair", root=str(tmp_path)))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.tfrecords").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"a\.tfrecords cannot be read"):
        load(DataConfig("bair", root=str(tmp_path)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "bair_robot_pushing_dataset_v0.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match=r"cannot be read as a \.tar"):
        load(DataConfig("bair", root=str(tmp_path / "other")))
