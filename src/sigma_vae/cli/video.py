"""The subcommand that goes on where clips stop, and what other subcommands make of clips."""

from pathlib import Path

import torch
import tyro
from torch import Tensor

from sigma_vae import runs
from sigma_vae.cli.files import Split, check_count, checked, write
from sigma_vae.networks.sequence import FRAMES
from sigma_vae.vae import Show

__all__ = ["predict"]


@torch.no_grad()
def predict(
    run: tyro.conf.Positional[str],
    *,
    split: Split = "test",
    n: int = 4,
    context: int | None = None,
    frames: int | None = None,
    samples: int = 3,
    show: Show = "mean",
    temperature: float = 1.0,
    batch_statistics: bool = False,
    seed: int = 0,
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Go on from the first frames of clips, several times each: each true clip, and the predictions of it.

    Args:
        run: Folder of the run.
        split: Where the clips come from.
        n: How many clips.
        context: How many frames are given; the network's own number unless said.
        frames: How many to predict; as many as the clips still have unless said.
        samples: How many predictions of each clip.
        show: Each frame is the mean of p(x|z), or a draw from it, and the next is predicted from that.
        temperature: Spread of the latents; 1 is the model's own.
        batch_statistics: Let batch norm use the statistics of the clips at hand, as SVG's own evaluation does.
        seed: Of the draws.
        out: A .png picture (a clip a row), a .gif or a .npz file (keys "originals", "predictions": samples, clips, frames, ...);
            RUN/predictions-SPLIT.png and .gif unless given.
        device: auto, cpu, cuda, cuda:1.
    """
    opened = runs.open_run(Path(run), device)
    default = Path(run) / f"predictions-{split}.png"
    paths = [checked(Path(out), (".png", ".gif", ".npz"))] if out is not None else [default, default.with_suffix(".gif")]
    check_count(n)
    past = opened.vae.video_network.context_frames if context is None else context
    where = next(opened.vae.parameters()).device
    clips = next(iter(opened.data.batches(split, n, device=where))).x
    if not 1 <= past <= clips.shape[1]:
        raise ValueError(f"--context is from 1 to the {clips.shape[1]} frames of a clip, got {past}")
    torch.manual_seed(seed)
    predicted = opened.vae.predict(
        clips[:, :past],
        (clips.shape[1] - past or FRAMES) if frames is None else frames,
        samples,
        show,
        generator=torch.Generator(where).manual_seed(seed),
        temperature=temperature,
        batch_statistics=batch_statistics,
    )
    for path in paths:
        write(path, _beside(clips, predicted, past), {"originals": clips, "predictions": predicted}, columns=1 + samples)


def _beside(clips: Tensor, predicted: Tensor, past: int) -> Tensor:
    """Each clip, then its samples with the frames that they go on from; white where a clip is shorter."""
    length = past + predicted.shape[2]
    missing = clips.new_ones(len(clips), max(0, length - clips.shape[1]), *clips.shape[2:])
    whole = torch.cat([clips, missing], 1)[:, :length]
    given = clips[:, :past].expand(len(predicted), *clips[:, :past].shape)
    return torch.cat([whole[None], torch.cat([given, predicted], 2)]).transpose(0, 1).flatten(0, 1)
