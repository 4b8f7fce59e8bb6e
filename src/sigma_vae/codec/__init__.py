"""A lossless codec: a model's bound in bits becomes the size of a file."""

from sigma_vae.codec.lossless import Codec, DamagedError, Unpacked

__all__ = ["Codec", "DamagedError", "Unpacked"]
