"""What is found out about data is what was put into them."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy import stats

from sigma_vae.cli import main
from sigma_vae.config import DataConfig
from sigma_vae.data import Scaling, Splits, load, scaling
from sigma_vae.data.inspect import inspect
from sigma_vae.data.stores import InMemory

STATE = np.random.RandomState(0)


def splits(train, validation=None, test=None, scaling=Scaling(levels=256), clips=False):  # noqa: B008 (frozen)
    others = [train[:5] ^ 1 if part is None else part for part in (validation, test)]
    parts = [InMemory(torch.from_numpy(np.ascontiguousarray(part))) for part in (train, *others)]
    return Splits("made", *parts, scaling, {"preprocessing": "made"}, clips)


def noise(n, *shape):
    return STATE.randint(0, 256, (n, *shape)).astype(np.uint8)


@pytest.fixture
def taken(monkeypatch):
    """How many values are looked at together, where that is at most 1000."""
    monkeypatch.setattr(scaling, "CHUNK", 1000)
    sizes, take = [], InMemory.take

    def counted(store, positions, epoch=0):
        result = take(store, positions, epoch)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(InMemory, "take", counted)
    return sizes


def test_statistics_are_numpys_and_scipys(taken):
    train = noise(177, 3, 6, 5)
    train[:, 1] //= 4
    found = inspect(splits(train))
    values = (train / 255).transpose(1, 0, 2, 3).reshape(3, -1)
    for channel, row in zip(found.channels, values, strict=True):
        assert channel.mean == pytest.approx(row.mean(), rel=1e-12)
        assert channel.deviation == pytest.approx(row.std(), rel=1e-12)
        assert (channel.least, channel.largest) == (row.min(), row.max())
        assert channel.excess_kurtosis == pytest.approx(stats.kurtosis(row), rel=1e-9)
    assert found.levels_used == 256
    assert found.share_at_least_level == pytest.approx((train == 0).mean())
    assert found.share_at_largest_level == pytest.approx((train == 255).mean())
    assert found.shape == (3, 6, 5)
    assert max(taken) == 990


@pytest.mark.parametrize("constant", [0, 4, 30])
def test_constant_values_are_counted(constant, taken):
    train = noise(99, 1, 6, 5)
    train.reshape(len(train), -1)[:, :constant] = 7
    found = inspect(splits(train))
    assert found.constant_values == constant
    assert any("never change" in reason for reason in found.reasons) == (constant > 0)


def test_duplicates_are_counted_by_where_they_are():
    train, validation, test = noise(60, 1, 4, 4), noise(20, 1, 4, 4), noise(20, 1, 4, 4)
    train[1] = train[0]
    validation[:3] = train[5:8]
    test[:4] = train[10:14]
    test[19] = validation[19]
    found = {(one.split, one.among): one.count for one in inspect(splits(train, validation, test)).duplicates}
    expected = {("train", "train"): 1, ("validation", "train"): 3, ("test", "train"): 4, ("test", "validation"): 1}
    assert found == expected


def test_clips_of_other_lengths_are_duplicates_by_their_first_frames():
    train, test = noise(9, 3, 1, 4, 4), noise(4, 5, 1, 4, 4)
    test[1, :3] = train[7]
    found = inspect(splits(train, train[:2] ^ 1, test, clips=True)).duplicates
    assert [(one.split, one.among, one.count) for one in found] == [("test", "train", 1)]


def real(values):
    parts = [values[:-20], values[-20:-10], values[-10:]]
    return Splits("made", *(InMemory(torch.from_numpy(p)) for p in parts), Scaling(), {"preprocessing": ""})


SUGGESTIONS = {
    "two levels": (lambda: splits(noise(50, 1, 4, 4) % 2, scaling=Scaling(levels=2)), "bernoulli"),
    "few levels, many examples": (lambda: splits(noise(4000, 1, 2, 2) % 4, scaling=Scaling(levels=4)), "categorical"),
    "few levels, few examples": (lambda: splits(noise(100, 1, 2, 2) % 4, scaling=Scaling(levels=4)), "gaussian/optimal"),
    "8 bits": (lambda: splits(noise(100, 3, 8, 8)), "gaussian/optimal"),
    "outliers": (lambda: real(STATE.standard_t(2.5, (5000, 1, 4))), "student-t/optimal"),
    "a table": (lambda: real(STATE.normal(size=(500, 6))), "gaussian/optimal-channel"),
    "a series": (lambda: real(STATE.normal(size=(500, 2, 30))), "gaussian/optimal"),
}


@pytest.mark.parametrize("kind", SUGGESTIONS)
def test_the_data_suggest_their_likelihood(kind):
    make, expected = SUGGESTIONS[kind]
    found = inspect(make())
    assert found.likelihood == expected
    assert found.reasons
    assert json.loads(json.dumps(asdict(found)))["likelihood"] == expected


def test_clips_are_looked_at_frame_by_frame():
    clips = noise(30, 4, 1, 3, 3)
    found = inspect(splits(clips, clips=True))
    assert found.shape == (1, 3, 3)
    assert found.frames == {"train": 4, "validation": 4, "test": 4}
    assert found.channels[0].mean == pytest.approx((clips / 255).mean())


def test_the_command_prints_it_and_draws_the_first_examples(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "digits"]) == 0
    said = capsys.readouterr().out
    assert "train 1455" in said
    assert "suggested likelihood: gaussian/optimal" in said
    assert "inspect-digits.png" in said
    pixels = np.asarray(Image.open(tmp_path / "inspect-digits.png"))
    first = load(DataConfig("digits")).values("train")[0, 0]
    zoom = pixels.shape[0] // (8 * 9 + 1)
    corner = pixels[zoom : 9 * zoom : zoom, zoom : 9 * zoom : zoom]
    np.testing.assert_array_equal(corner, (first * 255).round().byte().numpy())
    assert main(["inspect", "digits", "--json", "--out", str(tmp_path / "a.png")]) == 0
    assert json.loads(capsys.readouterr().out)["levels"] == 17
    assert main(["inspect", "nothing-there"]) == 1


def test_the_command_names_columns_and_counts_frames(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("height,[mass]\n" + "".join(f"{i},{i * i}\n" for i in range(20)))
    assert main(["inspect", "table.csv"]) == 0
    said = capsys.readouterr().out
    assert "columns height, [mass]" in said
    assert "│ height " in said
    assert "│ [mass] " in said
    np.savez("clips.npz", train=noise(4, 3, 1, 6, 6), validation=noise(2, 3, 1, 6, 6), test=noise(2, 5, 1, 6, 6))
    assert main(["inspect", "clips.npz"]) == 0
    assert "clips of 3 frames (test: 5)" in " ".join(capsys.readouterr().out.split())


def test_json_stands_alone_while_pictures_are_decoded(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i, pixels in enumerate(noise(12, 4, 4)):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    assert main(["inspect", "pictures", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("{")
    assert json.loads(out)["counts"] == {"train": 10, "validation": 1, "test": 1}
