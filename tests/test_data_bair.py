"""BAIR's files in their original format, written here independently, come back pixel for pixel; damaged ones are refused."""

import struct
import tarfile

import numpy as np
import pytest
import torch
from google_crc32c import value as crc32c

from sigma_vae.config import ClipConfig, DataConfig, ImageConfig
from sigma_vae.data import load
from sigma_vae.data.named import clips

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
