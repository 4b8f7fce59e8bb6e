"""What can be known of a study's cells without their data, before the first of them is trained."""

from collections.abc import Sequence
from pathlib import Path

from sigma_vae import build
from sigma_vae.config import ModelConfig
from sigma_vae.data import NAMES
from sigma_vae.evaluation import features
from sigma_vae.evaluation.settings import EvaluationSettings
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.priors import FittedPrior
from sigma_vae.study.grid import Cell
from sigma_vae.study.words import told
from sigma_vae.types import Likelihood

__all__ = ["check"]

LEVELS = 256
"""Of pictures, where a data set that has a name is not given another number; two levels would make an objective a likelihood."""


def check(cells: Sequence[Cell]) -> None:
    """Refuse cells that would fail after minutes or hours.

    Raises:
        ValueError: there is no such likelihood, network, prior or file of features, the prior is not for the network, or a metric does
            not apply to the likelihood or the network; it says of which cell.
    """
    for cell in cells:
        try:
            _check(cell)
        except ValueError as error:
            raise ValueError(f"the cell {told(cell.place)} cannot be done: {error}" if cell.place else str(error)) from error


def _check(cell: Cell) -> None:
    model, data = cell.config.model, cell.config.data
    made = build.likelihood(model.likelihood, channels=3, levels=data.levels or LEVELS, observes=model.observes)
    if model.network != "auto":
        build.check_network(model.network)
    for name in cell.priors:
        if isinstance(build.prior(name, latent_dim=2), FittedPrior) and model.network.startswith(("hierarchical", "sequence")):
            raise ValueError(
                f"the prior {name} is fitted to a single layer of flat latents, which {model.network} does not have; take"
                " priors: [standard]"
            )
    asked = cell.evaluation.metrics or ()
    for metric in asked:
        if obstacle := _obstacle(metric, model, made, known=data.levels is not None or data.source in NAMES):
            raise ValueError(f"{metric} cannot be measured of it: {obstacle}; leave it out of the metrics")
    if "quality" in asked:
        _check_features(cell.evaluation)
    if cell.evaluation.best_of is not None and not model.network.startswith(("sequence", "auto")):
        raise ValueError(f"best_of is about predictions of video, which {model.network} does not make; leave it out")


def _obstacle(metric: str, model: ModelConfig, likelihood: Likelihood, *, known: bool) -> str | None:
    """Why a metric does not apply; ``known`` says whether the number of levels is."""
    match metric:
        case "iwae" | "calibration" if known and not likelihood.normalised:
            return f"{model.likelihood} is an objective of such data, and gives no probabilities"
        case "oracle" if not isinstance(likelihood, LocationScale):
            return f"{model.likelihood} has no σ"
        case "information" if model.network.startswith("sequence"):
            return f"the latents of {model.network} are neither flat nor a ladder"
    return None


def _check_features(settings: EvaluationSettings) -> None:
    for source in settings.features:
        name, _, place = source.partition(":")
        file = place if name in (*features.NAMES, "i3d") else source
        if (file or name == "i3d") and not Path(file).expanduser().exists():
            raise ValueError(
                f"features come from {', '.join(features.NAMES)}, i3d:FILE or a TorchScript file; got {source!r}, and there is no"
                " such file"
            )
