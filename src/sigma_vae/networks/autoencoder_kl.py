"""Diffusers' ``AutoencoderKL`` as a network, and our networks as an ``AutoencoderKL``."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from sigma_vae.networks.spatial import SpatialNetwork, check_size
from sigma_vae.registry import Argument, register

CLASS = "AutoencoderKL"
CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
CONFIG_BYTES = 2**20
MOST_LEVELS, MOST_LAYERS, MOST_CHANNELS = 10, 32, 2**16
"""Largest sizes that a config may have: a file should not ask for more than a machine has."""


def _argument(text: str) -> dict[str, str]:
    if not text:
        raise ValueError("it takes a config.json of diffusers, or a folder with one")
    return {"config": text}


@register.network(
    "autoencoder-kl",
    argument=Argument("CONFIG", _argument, "vae/config.json", required=True),
    latents="maps",
    reads_clips=False,
    has_prior=True,
    mean="identity",
    reads_path=True,
)
def autoencoder_kl(shape: Sequence[int], out_channels: int, config: str | Path | Mapping[str, Any]) -> SpatialNetwork:
    """Diffusers' own ``AutoencoderKL``, from a config.json or from a folder with or without weights.

    Weights are read from safetensors; pickled weights are never opened. Data in [0, 1] are mapped to [−1, 1] before the
    encoder, and the decoder's output back.

    Args:
        shape: of one example, ``(C, H, W)``. Other sizes can be read afterwards.
        out_channels: ``likelihood.in_channels``, which has to be the config's ``out_channels``.
        config: path of a ``config.json``, which gives random weights; of a folder with one, whose weights are taken where
            it has some; or the configuration itself.

    Raises:
        ValueError: the config is of another class, or does not fit the data or the likelihood; the weights do not fit, or
            are there as pickles only.
        ModuleNotFoundError: diffusers is not installed.

    >>> config = {"block_out_channels": [32, 64], "down_block_types": ["DownEncoderBlock2D"] * 2,
    ...           "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4}
    >>> network = autoencoder_kl((3, 16, 16), 3, config)
    >>> network.posterior(torch.zeros(1, 3, 24, 40)).loc.shape
    torch.Size([1, 4, 12, 20])
    """
    known = config_of(config)
    _check_data(known, shape, out_channels)
    model = _made(known, config)
    stride = 2 ** (len(model.config["block_out_channels"]) - 1)
    check_size(shape[1:], stride)
    network = SpatialNetwork(
        _Encoding(model),
        _Decoding(model),
        int(model.config["latent_channels"]),
        [size // stride for size in shape[1:]],
        stride,
        picture_channels=int(shape[0]),
    )
    network.diffusers_config = _plain(model.config)
    network.keeps_layers = True
    network.portable_name = f"autoencoder-kl:{json.dumps(network.diffusers_config)}"
    return network


def config_of(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read and check a configuration: a mapping, JSON, or the path of a ``config.json`` or of a folder with one.

    Raises:
        ValueError: there is none, or it is of another class.

    >>> config_of('{"_class_name": "AutoencoderTiny"}')
    Traceback (most recent call last):
    ...
    ValueError: the config is of the class AutoencoderTiny, and AutoencoderKL alone can be read
    """
    known = dict(source) if isinstance(source, Mapping) else _read_config(str(source))
    if (found := known.get("_class_name", CLASS)) != CLASS:
        raise ValueError(f"the config is of the class {found}, and {CLASS} alone can be read")
    _check_sizes(known)
    return known


def _read_config(source: str) -> dict[str, Any]:
    text = source if source.startswith("{") else _config_text(Path(source).expanduser())
    try:
        known = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source[:200]} is no JSON: {error}") from error
    if not isinstance(known, dict):
        raise ValueError(f"{source[:200]} holds no configuration, but {type(known).__name__}")
    return known


def _config_text(path: Path) -> str:
    path = folder_of(path) / CONFIG if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no {path}; give a config.json of diffusers, or the folder that save_pretrained wrote")
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(CONFIG_BYTES)


def folder_of(path: Path) -> Path:
    """The folder with ``config.json``: itself, or the ``vae`` of a pipeline's folder."""
    return path / "vae" if not (path / CONFIG).is_file() and (path / "vae" / CONFIG).is_file() else path


def _check_sizes(known: Mapping[str, Any]) -> None:
    blocks = known.get("block_out_channels", (64,))
    levels = blocks if isinstance(blocks, list | tuple) else ()
    limits = {"in_channels": MOST_CHANNELS, "out_channels": MOST_CHANNELS, "latent_channels": MOST_CHANNELS}
    limits |= {"layers_per_block": MOST_LAYERS, "norm_num_groups": MOST_CHANNELS}
    wrong = [name for name, most in limits.items() if name in known and not _is_count(known[name], most)]
    if not 1 <= len(levels) <= MOST_LEVELS or not all(_is_count(width, MOST_CHANNELS) for width in levels):
        wrong.append("block_out_channels")
    if wrong:
        raise ValueError(f"the config's {wrong[0]} is no possible size, got {str(known.get(wrong[0]))[:100]}")


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _check_data(known: Mapping[str, Any], shape: Sequence[int], out_channels: int) -> None:
    reads, gives = known.get("in_channels", 3), known.get("out_channels", 3)
    if len(shape) != 3:
        raise ValueError(f"{CLASS} reads images (C, H, W), got an example of shape {tuple(shape)}")
    if reads != shape[0] or gives != reads:
        raise ValueError(
            f"this {CLASS} reads {reads} channels and gives {gives}, the examples have {shape[0]}; for pictures, --data.images.colour"
            " grey, rgb or rgba sets their channels"
        )
    if gives != out_channels:
        raise ValueError(
            f"this {CLASS} gives {gives} feature channels, and the likelihood reads {out_channels}; take one that reads the mean alone,"
            " such as gaussian/optimal or laplace/optimal"
        )


def _diffusers_class() -> Any:
    import safetensors.torch  # noqa: F401  # diffusers 0.32 uses it without importing it
    from diffusers import AutoencoderKL

    return AutoencoderKL


def _made(known: dict[str, Any], source: str | Path | Mapping[str, Any]) -> Any:
    """The model, with the weights of its folder where there are some."""
    AutoencoderKL = _diffusers_class()
    on_meta = torch.empty(0).device.type == "meta"  # sizes alone are wanted
    is_folder = not isinstance(source, Mapping) and not str(source).startswith("{") and Path(source).expanduser().is_dir()
    folder = folder_of(Path(str(source)).expanduser()) if is_folder and not on_meta else None
    if folder is None or not has_weights(folder):
        return _explained(lambda: AutoencoderKL.from_config(known), "the config describes no model")
    what = f"the weights of {folder} do not fit its config"
    model, info = _explained(
        lambda: AutoencoderKL.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False
        ),
        what,
    )
    if problems := [f"{kind.replace('_', ' ')}: {next(iter(info[kind]))}" for kind in info if info[kind]]:
        raise ValueError(f"{what}: {'; '.join(problems)}")
    return model.float()


def has_weights(folder: Path) -> bool:
    """Whether the folder has weights as safetensors.

    Raises:
        ValueError: it has pickles alone.
    """
    if any((folder / name).is_file() for name in WEIGHTS):
        return True
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise ValueError(
            f"{folder} has pickled weights alone ({pickles[0]}), which can run code and are never opened; where they come from a source"
            " that you trust, write them anew: AutoencoderKL.from_pretrained(FOLDER).save_pretrained(OUT)"
        )
    return False


def _explained(make: Callable[[], Any], what: str) -> Any:
    try:
        return make()
    except Exception as error:  # diffusers and torch report what does not fit in many ways
        reason = " ".join(str(error).split())
        raise ValueError(f"{what}: {reason[:300]}") from error


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's own keys, as JSON has them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items() if key[:1] != "_"}


@final
class _Encoding(nn.Module):
    """From x in [−1, 1] to moments."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.quant_conv = model.quant_conv

    def forward(self, x: Tensor) -> Tensor:
        moments: Tensor = self.encoder(x)
        return moments if self.quant_conv is None else self.quant_conv(moments)


@final
class _Decoding(nn.Module):
    """From z to x in [−1, 1]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.post_quant_conv = model.post_quant_conv
        self.decoder = model.decoder

    def forward(self, z: Tensor) -> Tensor:
        features: Tensor = self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
        return features


def as_autoencoder_kl(network: SpatialNetwork, numbers: Mapping[str, Any]) -> Any:
    """Make an ``AutoencoderKL`` of diffusers with a network's weights, in eval mode.

    Feature channels beyond the mean's (a predicted σ) are left out.

    Args:
        network: whose ``diffusers_config`` is known.
        numbers: entries of the configuration to set, such as ``scaling_factor``.

    Raises:
        ValueError: the network has a linear path from its start.
    """
    if network.linear is not None:
        raise ValueError(
            "training started at the best linear VAE of patches, and diffusers' AutoencoderKL has no layers for that path; train"
            " with --start random to export"
        )
    model = _diffusers_class().from_config({**(network.diffusers_config or {}), **numbers})
    weights = {_name(name): value for name, value in network.state_dict().items() if name.startswith(("encoder.", "decoder."))}
    for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
        weights[name] = weights[name][: network.picture_channels]
    model.load_state_dict(weights)
    return model.eval()


def _name(name: str) -> str:
    """Diffusers' name of a weight; where its own halves are ours, they are one level deeper."""
    _, _, rest = name.partition(".")
    return rest if rest.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")) else name
