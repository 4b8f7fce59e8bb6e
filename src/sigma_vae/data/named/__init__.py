"""Data sets that have a name: the paper's, and those that installed packages bring along."""

from collections.abc import Mapping

from sigma_vae.data.named.bair import read_bair
from sigma_vae.data.named.bundled import digits, mnist_5k
from sigma_vae.data.named.fashion_mnist import read_fashion_mnist
from sigma_vae.data.named.moving_mnist import read_moving_mnist
from sigma_vae.data.raw import Source

__all__ = ["NAMED"]

NAMED: Mapping[str, Source] = {
    "digits": Source(digits),
    "mnist-5k": Source(mnist_5k),
    "fashion-mnist": Source(read_fashion_mnist, {"root"}),
    "moving-mnist": Source(read_moving_mnist, {"root", "size", "frames", "test_frames"}),
    "bair": Source(read_bair, {"root", "cache", "frames", "test_frames", "unreadable"}),
}
"""Name to reader, with the options that it reads."""
