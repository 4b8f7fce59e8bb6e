"""The part of :mod:`benchmarks.speed` for a GPU: the paper's network and batch, data on the device, beside the plain loop.

The limit: a step of 128 images is 128 × 0.28 GFLOP = 36 GFLOP of convolutions (forward and backward), and reads and writes each
activation a few times. What share of the card's peak that is follows from two measurements on the same card: a large product of
matrices in bfloat16 (its FLOP/s) and a large copy (its bytes/s). Not yet run on a card.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.plain import BATCH, PlainLoop, images_of
from sigma_vae import VAE, Fixed, Gaussian
from sigma_vae.data import Splits
from sigma_vae.networks import FlatNetwork, conv

GFLOP_AN_IMAGE = 0.28
WARMUP, STEPS = 20, 400


def on_gpu(case: str, data: Splits, seed: int) -> dict[str, float]:
    """Images a second, and what share of the card's arithmetic the convolutions take."""
    torch.manual_seed(seed)
    network = conv(data.shape, data.shape[0]).cuda()
    rate = BATCH / seconds(steps_of(case, network, data))
    return {
        "images_per_second": rate,
        "share_of_matmul_peak": rate * GFLOP_AN_IMAGE * 1e9 / matmul_flops(),
        "copied_gigabytes_per_second": copy_bytes() / 1e9,
    }


def steps_of(case: str, network: FlatNetwork, data: Splits) -> Callable[[], Any]:
    """One step of a trainer."""
    if case == "ours":
        return our_step(network, data)
    batches = iter(images_of(data))
    loop = PlainLoop(network.encoder, network.decoder, sigma=1.0)
    if case == "plain loop":
        return lambda: loop.step(next(batches).cuda())
    raise ValueError(f"case is ours or plain loop, got {case!r}")


def our_step(network: FlatNetwork, data: Splits) -> Callable[[], Any]:
    """Data on the device, bfloat16, channels last, a compiled step."""
    vae = VAE(network.to(memory_format=torch.channels_last), Gaussian(data.shape[0], Fixed(1.0), mean="unit").cuda())  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, fused=True)
    elbo_of = torch.compile(vae.elbo)
    batches = iter(data.batches("train", BATCH, shuffle=True, device="cuda"))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            elbo = elbo_of(next(batches).x)
        (-elbo.total.mean()).backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], Any]) -> float:
    """Of a step, after those that compile and choose kernels; fewer steps than an epoch has."""
    for _ in range(WARMUP):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS


def matmul_flops() -> float:
    """Of a product of 8192² matrices in bfloat16."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / seconds(lambda: a @ a)


def copy_bytes() -> float:
    """Read and written by a copy of 1 GB."""
    a = torch.empty(2**28, device="cuda")
    b = torch.empty_like(a)
    return 2 * 2**30 / seconds(lambda: b.copy_(a))
