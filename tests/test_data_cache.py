"""The cache of decoded examples: whole or absent, checked on opening, built by one process alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sigma_vae.data.cache import BLOCK, cached
from sigma_vae.data.stores import Encoded, UnreadableError

COUNT, SHAPE = 200, (3, 5, 4)


def example(i: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.RandomState(i).randint(0, np.iinfo(dtype).max + 1, SHAPE).astype(dtype)


def encoded(home: Path, decode=example, dtype: str = "uint8", skip: bool = False, **identity) -> Encoded:
    names = [f"{i}.png" for i in range(COUNT)]
    return Encoded(names, SHAPE, dtype, decode, {"source": "test", **identity}, home, skip)


def all_of(store) -> np.ndarray:
    return store.take(torch.arange(len(store))).numpy()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_what_is_decoded_is_what_comes_out(tmp_path, dtype):
    store, skipped = cached(encoded(tmp_path, lambda i: example(i, dtype), dtype))
    assert skipped == []
    assert np.array_equal(all_of(store), np.stack([example(i, dtype) for i in range(COUNT)]))
    rows = torch.tensor([7, 199, 0])
    assert np.array_equal(store.select(rows).take(torch.tensor([1])).numpy()[0], example(199, dtype))
    assert store.select(rows).fingerprint() != store.fingerprint()


def test_a_second_opening_decodes_nothing_and_another_identity_everything(tmp_path):
    calls = []

    def counted(i):
        calls.append(i)
        return example(i)

    first, _ = cached(encoded(tmp_path, counted))
    again, _ = cached(encoded(tmp_path, counted))
    assert sorted(calls) == list(range(COUNT))
    assert first.fingerprint() == again.fingerprint()
    other, _ = cached(encoded(tmp_path, lambda i: example(i + 1), size=4))
    assert other.fingerprint() != first.fingerprint()
    cached(encoded(tmp_path, counted), tmp_path / "elsewhere")
    assert len(calls) == 2 * COUNT


def broken(i):
    if i in (3, 64, 199):
        raise UnreadableError("truncated")
    return example(i)


def test_unreadable_examples_are_refused_or_left_out_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"3 of 200 examples cannot be decoded \(3.png, 64.png, 199.png\)"):
        cached(encoded(tmp_path, broken))
    assert not [path for path in (tmp_path / ".sigma-vae").iterdir() if path.suffix != ".lock"]
    store, skipped = cached(encoded(tmp_path, broken, skip=True))
    assert skipped == ["3.png", "64.png", "199.png"]
    assert np.array_equal(all_of(store), np.stack([example(i) for i in range(COUNT) if i not in (3, 64, 199)]))
    assert cached(encoded(tmp_path, broken, skip=True))[1] == skipped
    with pytest.raises(ValueError, match=r"3 of 200 examples cannot be decoded \(3.png, .*--unreadable skip"):
        cached(encoded(tmp_path, broken))


def nothing(i):
    raise UnreadableError("no picture")


def test_nothing_readable_is_an_error_even_where_examples_may_be_skipped(tmp_path):
    with pytest.raises(ValueError, match="200 of 200 examples cannot be decoded"):
        cached(encoded(tmp_path, nothing, skip=True))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": (lambda place: flip(place / "examples.npy"), "1 of 1 blocks have changed"),
    "a truncated file": (lambda place: os.truncate(place / "examples.npy", 500), "blocks have changed"),
    "an empty file": (lambda place: (place / "examples.npy").write_bytes(b""), "blocks have changed"),
    "no examples": (lambda place: (place / "examples.npy").unlink(), "cannot be read"),
    "no record": (lambda place: (place / "cache.json").unlink(), "cannot be read"),
    "half a record": (lambda place: os.truncate(place / "cache.json", 9), "cannot be read"),
    "another record": (lambda place: (place / "cache.json").write_text("[]"), "cannot be read"),
    "a newer one": (lambda place: renumber(place / "cache.json"), "format 99"),
}


def renumber(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_cache_is_found_and_made_anew_once_deleted(tmp_path, kind):
    damage, says = DAMAGES[kind]
    cached(encoded(tmp_path))
    (place,) = (path for path in (tmp_path / ".sigma-vae").iterdir() if path.is_dir())
    damage(place)
    with pytest.raises(ValueError, match=f"{says}.*delete the folder"):
        cached(encoded(tmp_path))
    shutil.rmtree(place)
    assert len(cached(encoded(tmp_path))[0]) == COUNT


BUILDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_data_cache as t
def slow(i):
    with open(sys.argv[1] + "/calls", "a") as file:
        file.write("x")
    time.sleep(0.005)
    return t.example(i)
t.cached(t.encoded(Path(sys.argv[1]), slow))
"""


def builder(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(folder), str(Path(__file__).parent)])


def calls(folder: Path) -> int:
    return len((folder / "calls").read_bytes()) if (folder / "calls").exists() else 0


def test_a_builder_that_is_killed_leaves_nothing_that_is_used(tmp_path):
    process = builder(tmp_path)
    while calls(tmp_path) < 20:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert calls(tmp_path) < COUNT
    store, _ = cached(encoded(tmp_path))
    assert np.array_equal(all_of(store), np.stack([example(i) for i in range(COUNT)]))
    assert not list(tmp_path.glob(".sigma-vae/*.part"))


def test_two_processes_that_want_one_cache_build_it_once(tmp_path):
    processes = [builder(tmp_path) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert calls(tmp_path) == COUNT
    assert len(cached(encoded(tmp_path))[0]) == COUNT


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_data_cache as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    t.cached(t.encoded(Path(sys.argv[1])))
except OSError as error:
    assert "--cache FOLDER" in str(error), error
    sys.exit(7)
"""


@pytest.mark.parametrize("room", [4096, 128 + COUNT * 60 - 1])  # the system fills it and says how much it wrote, then fails
def test_a_disk_that_fills_up_leaves_nothing_and_says_what_to_do(tmp_path, room):
    command = [sys.executable, "-c", FULL, str(tmp_path), str(Path(__file__).parent), str(room)]
    assert subprocess.run(command, check=False).returncode == 7
    assert not [path for path in (tmp_path / ".sigma-vae").iterdir() if path.suffix != ".lock"]
    assert len(cached(encoded(tmp_path))[0]) == COUNT


def test_too_little_room_is_said_before_anything_is_decoded(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(OSError, match=r"0 MB are free.*--cache FOLDER"):
        cached(encoded(tmp_path, nothing))


def test_who_waits_for_another_builder_needs_no_room(tmp_path, monkeypatch):
    process = builder(tmp_path)
    while calls(tmp_path) < 20:
        time.sleep(0.01)
        assert process.poll() is None
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert len(cached(encoded(tmp_path, nothing))[0]) == COUNT
    assert process.wait() == 0


def test_data_sets_alike_in_all_but_their_place_may_share_a_folder(tmp_path):
    shared = tmp_path / "shared"
    first, second = (
        cached(encoded(tmp_path / name, lambda i, k=k: example(i + k)), shared)[0] for k, name in enumerate(("a", "b"))
    )
    assert np.array_equal(all_of(second)[:-1], all_of(first)[1:])


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot be kept in .*--cache FOLDER"):
        cached(encoded(tmp_path / "file"))
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "away")
    with pytest.raises(OSError, match="cannot be kept in"):
        cached(encoded(tmp_path), tmp_path / "link")


def test_blocks_cover_files_of_every_length(tmp_path):
    """A changed byte is found wherever it lies, beyond the first block too."""
    big = Encoded(["0", "1"], (BLOCK,), "uint8", lambda i: np.full(BLOCK, i, np.uint8), {"big": 1}, tmp_path)
    cached(big)
    (path,) = tmp_path.glob(".sigma-vae/*/examples.npy")
    for position in (200, BLOCK + 3, path.stat().st_size - 1):
        with path.open("r+b") as file:
            file.seek(position)
            before = file.read(1)
            file.seek(position)
            file.write(bytes([before[0] ^ 255]))
        with pytest.raises(ValueError, match="1 of 3 blocks have changed"):
            cached(big)
        with path.open("r+b") as file:
            file.seek(position)
            file.write(before)
    cached(big)
