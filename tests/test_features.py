"""Extractors: what each does to images before its network sees them, from where it is loaded, and what its record says."""

import hashlib
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sigma_vae.evaluation import features as backbones
from sigma_vae.evaluation.features import load_clip_extractor, load_extractor

GREY, COLOUR = (1, 28, 28), (3, 64, 48)


class Flat(nn.Module):
    """Features of a tiny network: a linear map of all there is."""

    def __init__(self, values: int, dim: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(values, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x.flatten(1))


class ClipLogits(nn.Module):
    """The signature of the I3D file that is in circulation."""

    def forward(
        self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> torch.Tensor:
        if rescale or resize or not return_features:
            raise RuntimeError("asked for something else")
        return torch.stack([x.amin((1, 2, 3, 4)), x.amax((1, 2, 3, 4)), x[:, 0, 0].mean((1, 2)), x[:, 0, -1].mean((1, 2))], 1)


def script(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(str(path))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- files and networks at hand --------------------------------------------------------------------------------------------


def test_a_torchscript_file_gets_images_as_they_are(tmp_path: Path) -> None:
    network = Flat(28 * 28)
    path = script(network, tmp_path / "tiny.pt")
    extractor = load_extractor(path)
    images = torch.rand(7, *GREY)
    torch.testing.assert_close(extractor(images), network(images).detach())
    torch.testing.assert_close(extractor.of(images.split(3)), extractor(images), rtol=1e-6, atol=1e-6)
    assert extractor.record(GREY, 5) == {
        "name": "tiny.pt",
        "sha256": sha256(path),
        "input": [1, 28, 28],
        "dim": 5,
        "preprocessing": "none",
    }


def test_values_are_clipped_as_in_a_picture() -> None:
    extractor = load_extractor(nn.Flatten())
    assert extractor(torch.tensor([[[[-3.0, 0.25, 7.0]]]])).tolist() == [[0.0, 0.25, 1.0]]


def test_a_network_at_hand_is_put_into_eval_mode_and_known_by_its_weights() -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Dropout(0.5), Flat(784)).train()
    extractor = load_extractor(network)
    images = torch.rand(4, *GREY)
    assert torch.equal(extractor(images), extractor(images))
    torch.testing.assert_close(extractor(images[:1]), extractor(images)[:1], rtol=1e-5, atol=1e-6)
    digests = [load_extractor(Flat(784)).record(GREY, 5)["sha256"] for _ in range(2)]
    other = Flat(784)
    with torch.no_grad():
        other.map.bias[0] += 1
    assert digests[0] == digests[1] != load_extractor(other).record(GREY, 5)["sha256"]


MISTAKES = {
    "name": (
        "resnet",
        r"features come from dinov2\[:PATH\], dinov2-b\[:PATH\], efficientnet, inception\[:FILE\], a TorchScript file",
    ),
    "missing file": ("nowhere/tiny.pt", "there is no such file"),
    "no TorchScript": ("TEXT", "is no TorchScript file"),
    "place": ("efficientnet:TEXT", "takes nothing after a colon"),
    "hub folder": ("dinov2:FOLDER", "a folder with its repository"),
    "hub file": ("dinov2:TEXT", "is no TorchScript file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_loaded_gets_a_sentence(mistake: str, tmp_path: Path) -> None:
    source, says = MISTAKES[mistake]
    (tmp_path / "text.pt").write_text("no network")
    source = source.replace("TEXT", str(tmp_path / "text.pt")).replace("FOLDER", str(tmp_path))
    with pytest.raises(ValueError, match=says):
        load_extractor(source)


@pytest.mark.parametrize("error", [EOFError("EOF when reading a line"), Exception("Untrusted repository.")])
def test_a_repository_that_nobody_trusts_gets_a_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(*arguments: object, **options: object) -> nn.Module:
        raise error

    monkeypatch.setattr(torch.hub, "load", asks)
    with pytest.raises(ValueError, match=r"trusted\)|Untrusted.*give a folder with its repository, dinov2:FOLDER"):
        load_extractor("dinov2")


@pytest.mark.parametrize("source", ["i3d:nowhere.pt", "i3d", "nowhere.pt"])
def test_a_missing_clip_extractor_gets_a_sentence(source: str) -> None:
    with pytest.raises(ValueError, match=r"is no file|no such file|takes a path \(FILE\)"):
        load_clip_extractor(source)


@pytest.mark.parametrize(
    ("network", "images", "says"),
    [
        (nn.Identity(), torch.rand(4, *GREY), r"should give features \(4, d\).*got \(4, 1, 28, 28\)"),
        (nn.LSTM(28, 3), torch.rand(4, 28, 28), "got tuple"),
        (Flat(784), torch.rand(4, *COLOUR), r"cannot read \(4, 3, 64, 48\)"),
        (Flat(784), torch.full((4, *GREY), torch.nan), "not finite"),
    ],
    ids=["shape", "tuple", "size", "nan"],
)
def test_a_network_that_does_not_fit_gets_a_sentence(network: nn.Module, images: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_extractor(network)(images)


def test_a_torchscript_file_that_reads_other_images_gets_a_sentence(tmp_path: Path) -> None:
    extractor = load_extractor(script(Flat(28 * 28), tmp_path / "tiny.pt"))
    with pytest.raises(ValueError, match=r"tiny.pt cannot read \(2, 3, 64, 48\)"):
        extractor(torch.rand(2, *COLOUR))


# -- EfficientNet ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra efficientnet is not installed")
    return load_extractor("efficientnet")


def test_efficientnet_sees_what_it_is_said_to_see(efficientnet) -> None:
    images = torch.rand(3, *GREY)
    network = efficientnet.backbone.network.network
    resized = nn.functional.interpolate(images, (32, 32), mode="bilinear").repeat(1, 3, 1, 1)
    with torch.no_grad():
        expected = network.extract_features(2 * resized - 1).mean((2, 3))
    torch.testing.assert_close(efficientnet(images), expected, rtol=1e-4, atol=1e-4)
    record = efficientnet.record(GREY, 1280)
    assert record["input"] == [3, 32, 32]
    assert record["sha256"].startswith("57934424")  # as the file of its weights is named
    assert (efficientnet(images) - efficientnet(torch.rand(3, *GREY))).abs().max() > 0.01


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 8, 8), (32, 32)),
        ((1, 28, 28), (32, 32)),
        ((3, 47, 48), (32, 64)),
        ((3, 64, 64), (64, 64)),
        ((3, 512, 300), (224, 224)),
    ],
)
def test_efficientnet_sees_a_multiple_of_32(shape: tuple[int, ...], size: tuple[int, int], efficientnet) -> None:
    assert efficientnet.record(shape, 1280)["input"] == [3, *size]


def test_efficientnet_knows_a_flower(efficientnet) -> None:
    """Other weights, or another range, would not."""
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        classes = efficientnet.backbone.network.network._fc(efficientnet(image)).softmax(1)[0]
    assert int(classes.argmax()) == 985  # daisy, of ImageNet's classes
    assert classes[985] > 0.1


# -- Inception -------------------------------------------------------------------------------------------------------------


class FakeInception(nn.Module):
    """What the extractor is given and asked for; the true network has this signature."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.map = nn.Linear(3, 2048)
        self.load_state_dict(torch.load(feature_extractor_weights_path))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return (self.map(x.float().mean((2, 3))),)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the format of the published one, taken for it; the package, where its file would be downloaded from."""
    path = tmp_path / "published" / "weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir()
    torch.save(nn.Linear(3, 2048).state_dict(), path)
    state = {f"map.{name}": value for name, value in torch.load(path).items()}
    torch.save(state, path)
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3, module.URL_INCEPTION_V3 = FakeInception, path.as_uri()
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backbones, "INCEPTION_SHA256", sha256(path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return path


@pytest.mark.parametrize("source", ["inception:PATH", "inception"])
def test_inception_sees_bytes(source: str, weights: Path) -> None:
    extractor = load_extractor(source.replace("PATH", str(weights)))
    levels = torch.randint(0, 256, (4, *GREY))
    state = torch.load(weights)
    expected = levels.float().mean((2, 3)).expand(-1, 3) @ state["map.weight"].T + state["map.bias"]
    torch.testing.assert_close(extractor(levels / 255), expected)
    assert extractor.record(GREY, 2048)["sha256"] == sha256(weights)
    assert extractor.record(GREY, 2048)["input"] == [3, 28, 28]


def test_a_download_is_kept(weights: Path) -> None:
    images = torch.rand(2, *GREY)
    first = load_extractor("inception")(images)
    weights.unlink()
    torch.testing.assert_close(load_extractor("inception")(images), first)


def test_without_a_network_the_weights_can_be_given(weights: Path) -> None:
    kept = weights.rename(weights.with_name("kept.pth"))
    with pytest.raises(ValueError, match="give the file, inception:FILE"):
        load_extractor("inception")
    assert load_extractor(f"inception:{kept}").name == "inception"


def test_other_weights_are_refused(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes() + b"\0")
    for source in (f"inception:{weights}", "inception"):
        with pytest.raises(ValueError, match="needs the SHA-256 of the published weights"):
            load_extractor(source)
    with pytest.raises(ValueError, match="cannot be read"):
        load_extractor(f"inception:{weights}x")


def test_inception_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"sigma-vae\[inception\]"):
        load_extractor("inception")


def test_efficientnet_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"sigma-vae\[efficientnet\]"):
        load_extractor("efficientnet")


def test_the_digest_is_that_in_the_name_of_the_published_file() -> None:
    assert len(backbones.INCEPTION_SHA256) == 64
    assert backbones.INCEPTION_SHA256.startswith("6726825d")


# -- DINOv2 ----------------------------------------------------------------------------------------------------------------

HUBCONF = """
import torch
dependencies = ["torch"]

class Small(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        torch.manual_seed(dim)
        self.map = torch.nn.Linear(3 * 4 * 4, dim)
    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return self.map(torch.nn.functional.avg_pool2d(x, 56).flatten(1))

def dinov2_vitl14():
    return Small(1024)

def dinov2_vitb14():
    return Small(768)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "dinov2"
    folder.mkdir()
    (folder / "hubconf.py").write_text(HUBCONF)
    return folder


def as_dinov2_sees(images: torch.Tensor) -> torch.Tensor:
    """Pillow's bicubic resizing, ImageNet's numbers."""
    resized = [
        [np.asarray(Image.fromarray(channel.numpy()).resize((224, 224), Image.Resampling.BICUBIC)) for channel in image]
        for image in images
    ]
    x = torch.from_numpy(np.array(resized)).clamp(0, 1).expand(-1, 3, -1, -1)
    return (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@pytest.mark.parametrize("shape", [GREY, (3, 300, 260)], ids=["enlarged", "reduced"])
@pytest.mark.parametrize(("name", "dim"), [("dinov2", 1024), ("dinov2-b", 768)])
def test_dinov2_of_a_local_repository_sees_what_it_is_said_to_see(
    name: str, dim: int, shape: tuple[int, ...], repository: Path
) -> None:
    extractor = load_extractor(f"{name}:{repository}")
    images = torch.rand(2, *shape)
    features = extractor(images)
    assert features.shape == (2, dim)
    with torch.no_grad():
        expected = extractor.backbone.network(as_dinov2_sees(images))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert extractor.record(shape, dim)["input"] == [3, 224, 224]


def test_dinov2_of_a_file_is_prepared_for_alike(repository: Path, tmp_path: Path) -> None:
    hub = load_extractor(f"dinov2:{repository}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(hub.backbone.network, torch.rand(1, 3, 224, 224)).save(str(tmp_path / "traced.pt"))
    file = load_extractor(f"dinov2:{tmp_path / 'traced.pt'}")
    images = torch.rand(3, *GREY)
    torch.testing.assert_close(file(images), hub(images))
    assert file.record(GREY, 1024)["preprocessing"] == hub.record(GREY, 1024)["preprocessing"]


# -- clips -----------------------------------------------------------------------------------------------------------------


def test_clips_of_a_plain_file_come_as_they_are(tmp_path: Path) -> None:
    network = Flat(4 * 3 * 6 * 6)
    extractor = load_clip_extractor(script(network, tmp_path / "clips.pt"))
    clips = torch.rand(3, 4, 3, 6, 6)
    torch.testing.assert_close(extractor(clips), network(clips).detach())
    assert extractor.record((4, 3, 6, 6), 5)["input"] == [4, 3, 6, 6]


@pytest.mark.parametrize("channels", [1, 3])
def test_i3d_sees_what_it_is_said_to_see(channels: int, tmp_path: Path) -> None:
    path = script(ClipLogits(), tmp_path / "i3d.pt")
    extractor = load_clip_extractor(f"i3d:{path}")
    clips = torch.rand(2, 5, channels, 64, 64)
    clips[:, 0] = 0
    clips[:, -1] = 1
    torch.testing.assert_close(extractor(clips), torch.tensor([[-1.0, 1.0, -1.0, 1.0]]).expand(2, 4))
    record = extractor.record((5, channels, 64, 64), 4)
    assert record["input"] == [3, 5, 224, 224]
    assert record["sha256"] == sha256(path)


def test_another_file_given_as_i3d_gets_a_sentence(tmp_path: Path) -> None:
    extractor = load_clip_extractor(f"i3d:{script(Flat(4), tmp_path / 'other.pt')}")
    with pytest.raises(ValueError, match="i3d cannot read"):
        extractor(torch.rand(2, 5, 3, 8, 8))
