"""Data sets that have a name: the paper's, and those that installed packages bring along."""

from collections.abc import Mapping

from sigma_vae.data.named.bair import read_bair
from sigma_vae.data.named.bundled import digits, mnist_5k
from sigma_vae.data.named.celeba import read_celeba
from sigma_vae.data.named.cifar10 import read_cifar10
from sigma_vae.data.named.matlab import read_frey_faces, read_svhn
from sigma_vae.data.named.mnist import read_fashion_mnist, read_mnist
from sigma_vae.data.named.moving_mnist import read_moving_mnist
from sigma_vae.data.raw import Source

__all__ = ["NAMED"]

NAMED: Mapping[str, Source] = {
    "digits": Source(digits),
    "mnist-5k": Source(mnist_5k),
    "mnist": Source(read_mnist, {"root", "cache"}),
    "fashion-mnist": Source(read_fashion_mnist, {"root", "cache"}),
    "cifar10": Source(read_cifar10, {"root", "cache"}),
    "svhn": Source(read_svhn, {"root", "cache", "size"}),
    "celeba": Source(read_celeba, {"root", "cache", "crop", "size"}),
    "frey-faces": Source(read_frey_faces, {"root"}),
    "moving-mnist": Source(read_moving_mnist, {"root", "size", "frames", "test_frames"}),
    "bair": Source(read_bair, {"root", "cache", "frames", "test_frames", "unreadable"}),
}
"""Name to reader, with the options that it reads."""
