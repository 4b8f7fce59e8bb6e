"""Data sets of the hub, from local copies in the hub's own layout; no network is touched."""

from pathlib import Path

import numpy as np
import pytest
from official import encoded, write_parquet, write_repository

from sigma_vae.config import DataConfig, ImageConfig
from sigma_vae.data import load

datasets = pytest.importorskip("datasets", reason="the hub needs the package datasets")

SPLITS = ("train", "validation", "test")
STATE = np.random.RandomState(0)
RGB = STATE.randint(0, 256, (24, 9, 7, 3)).astype(np.uint8)
GREY = RGB[..., 0]
DEEP = (GREY.astype(np.uint16) << 8) + 77
SQUARES = [STATE.randint(0, 256, (side, side, 3)).astype(np.uint8) for side in (8, 9, 10) * 8]


@pytest.fixture(autouse=True)
def local_hub(monkeypatch, tmp_path):
    """A folder OWNER/NAME where the process runs stands in for the hub's; anything else would be the network."""

    def refuse(*args):
        raise AssertionError(f"the network was touched: {args}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def thirds(pictures, names=SPLITS):
    return {name: [encoded(pictures[i]) for i in part] for name, part in zip(names, np.split(np.arange(24), 3), strict=True)}


def write(splits, config="default", column="image", **options):
    return write_repository(Path("someone/pictures"), config, column, splits, **options)


def hub(suffix="", columns=(), cache=None, **images):
    return DataConfig(f"hub:someone/pictures{suffix}", columns=columns, cache=cache, images=ImageConfig(**images))


def in_order(splits):
    return np.concatenate([splits.stored(name).numpy() for name in SPLITS])


@pytest.mark.parametrize("names", [SPLITS, ("train", "valid", "test"), ("train", "val", "test")])
def test_splits_are_kept_in_order(names):
    write(thirds(RGB, names))
    splits = load(hub())
    assert np.array_equal(in_order(splits), RGB.transpose(0, 3, 1, 2))
    assert (splits.shape, splits.levels) == ((3, 9, 7), 256)
    assert splits.record["counts"] == dict.fromkeys(SPLITS, 8)
    assert [file["split"] for file in splits.record["files"]] == list(SPLITS)


KINDS = {
    "grey": (GREY, 256, lambda out: out[:, 0], GREY),
    "16 bits": (DEEP, 65536, lambda out: out[:, 0], DEEP),
    "black and white": (GREY > 99, 2, lambda out: out[:, 0], GREY > 99),
}


@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_those_of_the_pictures(kind):
    pictures, levels, shown, wanted = KINDS[kind]
    write(thirds(pictures))
    splits = load(hub())
    assert splits.levels == levels
    assert np.array_equal(shown(in_order(splits)), wanted)


def test_one_split_of_any_name_is_split_at_random():
    write({"full": [encoded(image) for image in GREY]})
    splits = load(hub())
    assert sum(splits.record["counts"].values()) == 24
    assert sorted(map(bytes, in_order(splits))) == sorted(map(bytes, GREY))
    assert "at random" in splits.record["preprocessing"]


def test_splits_of_no_known_name_are_not_read():
    write(thirds(GREY, ("train", "test", "extra")))
    splits = load(hub(cache="mine"))
    assert splits.record["counts"] == {"train": 7, "validation": 1, "test": 8}
    assert len(list(Path("mine").glob("*/examples.npy"))) == 2


def test_a_config_of_several_is_chosen():
    folder = write(thirds(GREY), "plain")
    card = (folder / "README.md").read_text().removesuffix("---\n")
    write(thirds(255 - GREY), "inverse")
    lines = (folder / "README.md").read_text().removeprefix("---\nconfigs:\n")
    (folder / "README.md").write_text(card + lines)
    assert np.array_equal(in_order(load(hub(":plain")))[:, 0], GREY)
    assert np.array_equal(in_order(load(hub(":inverse")))[:, 0], 255 - GREY)
    with pytest.raises(ValueError, match=r"hub:someone/pictures cannot be loaded .*plain"):
        load(hub())


def test_a_column_of_several_is_chosen():
    for split, pictures in thirds(GREY).items():
        path = Path(f"someone/pictures/data/{split}-00000-of-00001.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, "left", pictures, ["label"])
        table = datasets.Dataset.from_parquet(str(path), cache_dir="scratch")
        inverted = [{"bytes": encoded(255 - image), "path": None} for image in GREY[:8]]
        table.add_column("right", inverted, feature=datasets.Image(decode=False)).cast_column(
            "right", datasets.Image()
        ).to_parquet(str(path))
    assert np.array_equal(in_order(load(hub(columns=("left",))))[:, 0], GREY)
    assert np.array_equal(load(hub(columns=("right",))).stored("train")[:, 0].numpy(), 255 - GREY[:8])
    with pytest.raises(ValueError, match=r"one column of pictures, got left, right \(of the columns left, label, right\)"):
        load(hub())
    with pytest.raises(ValueError, match=r"one column of pictures named label, got left, right .* --columns"):
        load(hub(columns=("label",)))
    with pytest.raises(ValueError, match="needs one column of pictures, got left, right; choose one"):
        load(hub(columns=("left", "right")))


def test_pictures_are_cut_and_resized():
    from PIL import Image

    write(thirds(SQUARES))
    with pytest.raises(ValueError, match=r"pictures need one size, got 3: .*--size 8"):
        load(hub())
    wanted = [np.asarray(Image.fromarray(image).resize((6, 6), Image.Resampling.BILINEAR)) for image in SQUARES]
    splits = load(hub(size=6))
    assert np.array_equal(in_order(splits), np.stack(wanted).transpose(0, 3, 1, 2))
    assert "6×6" in splits.record["preprocessing"]
    grey = [np.asarray(Image.fromarray(image).convert("L")) for image in SQUARES]
    centres = [image[(len(image) - 8) // 2 :][:8, (len(image) - 8) // 2 :][:, :8] for image in grey]
    assert np.array_equal(in_order(load(hub(crop=8, colour="grey")))[:, 0], np.stack(centres))


def test_options_do_not_share_a_decoded_copy():
    write(thirds(SQUARES))
    prints = {load(hub(size=size, cache="mine")).record["fingerprint"] for size in (5, 6, 5)}
    assert len(prints) == 2
    assert len(list(Path("mine").glob("*/examples.npy"))) == 6


BROKEN = {
    "no picture": lambda content: b"?" * 50,
    "empty": lambda content: b"",
    "none": lambda content: None,
    "half": lambda content: content[: len(content) // 2],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures_are_refused_or_left_out(kind):
    splits = thirds(RGB)
    splits["train"][3] = BROKEN[kind](splits["train"][3])
    write(splits)
    with pytest.raises(ValueError, match=r"1 of 8 examples cannot be decoded \(train 3\); .* --unreadable skip"):
        load(hub())
    kept = load(hub(unreadable="skip"))
    assert np.array_equal(kept.stored("train").numpy(), np.delete(RGB[:8], 3, axis=0).transpose(0, 3, 1, 2))
    assert "train: left out 1 of 8 as unreadable (train 3)" in kept.record["preprocessing"]


def test_a_repository_of_plain_files():
    """Pictures lie beside the table, which holds their paths."""
    for split, pictures in thirds(RGB).items():
        folder = Path("someone/pictures") / split
        folder.mkdir(parents=True)
        for i, content in enumerate(pictures):
            (folder / f"{i}.png").write_bytes(content)
    before = load(hub())
    assert np.array_equal(in_order(before), RGB.transpose(0, 3, 1, 2))
    Path("someone/pictures/train/3.png").write_bytes(encoded(255 - RGB[3]))
    after = load(hub())
    assert np.array_equal(after.stored("train")[3].numpy(), 255 - RGB[3].transpose(2, 0, 1))
    assert after.record["fingerprint"] != before.record["fingerprint"]


def test_headers_are_read_once(monkeypatch):
    write(thirds(SQUARES))
    first = load(hub(size=6))
    monkeypatch.setattr("sigma_vae.data.pictures.probe", None)
    monkeypatch.setattr("sigma_vae.data.hub.probe", None)
    assert load(hub(size=6)).record == first.record


def test_pictures_are_decoded_one_at_a_time(monkeypatch):
    """Rows are asked for by their number: never a whole column, which would hold all pictures in memory."""
    write(thirds(RGB))
    asked = []
    real = datasets.Dataset.__getitem__
    monkeypatch.setattr(
        datasets.Dataset, "__getitem__", lambda self, key: asked.append((self.column_names, key)) or real(self, key)
    )
    load(hub())
    pictures = [key for columns, key in asked if columns == ["image"]]
    assert sorted(pictures) == sorted([*range(8)] * 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig("hub:mnist"), "expected hub:OWNER/NAME or hub:OWNER/NAME:CONFIG, got 'hub:mnist'; copy the name"),
        (DataConfig("hub:a/b/c"), "expected hub:OWNER/NAME"),
        (DataConfig("hub:"), "expected hub:OWNER/NAME"),
        (DataConfig("hub:someone/absent"), "hub:someone/absent cannot be loaded from the hub .*; give the name .* network"),
        (DataConfig("hub:someone/absent", root="x"), "root says nothing about hub:someone/absent"),
        (DataConfig("hub:someone/absent", layout="n-c"), "layout says nothing about hub:someone/absent"),
    ],
)
def test_bad_names_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        load(config)


@pytest.mark.parametrize("names", [("test", "extra", "more"), ("val", "test", "more"), ("train", "val", "valid")])
def test_splits_that_do_not_fit_are_refused(names):
    write(thirds(GREY, names))
    with pytest.raises(
        ValueError, match=f"needs the split train, and at most one each .* got {', '.join(names)}; choose a config"
    ):
        load(hub())


def test_a_data_set_without_pictures_is_refused():
    Path("someone/pictures").mkdir(parents=True)
    Path("someone/pictures/train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"one column of pictures, got none \(of the columns a, b\)"):
        load(hub())
