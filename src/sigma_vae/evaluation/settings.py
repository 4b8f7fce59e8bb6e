"""What is measured of a finished run beside its bounds, and how: it is written beside the numbers, so that they can be repeated."""

from dataclasses import dataclass
from typing import ClassVar, Literal

__all__ = ["EvaluationSettings", "Metric"]

Metric = Literal["iwae", "oracle", "information", "calibration", "quality"]


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and how."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    metrics: tuple[Metric, ...] | None = None
    """Beside the single-sample bounds: iwae (the importance-weighted bound), oracle (σ taken from the examples that it scores: no
    likelihood), information (mutual information, marginal KL, active units), calibration (coverage, PIT, σ against error, with a page of
    plots), quality (Fréchet and kernel distance, precision and recall of samples). Information and calibration where they apply unless
    given."""
    split: Literal["validation", "test"] = "test"
    """Which examples; the training's own never."""
    seed: int = 0
    """Of the noise, which belongs to each example: no number depends on the batch size."""
    draws: int = 64
    """Importance samples of iwae."""
    features: tuple[str, ...] = ("efficientnet",)
    """Of quality: efficientnet, inception, dinov2, or TorchScript files; each has its own section. Of clips also i3d:FILE."""
    samples: int = 10_000
    """Of quality: how many samples are compared with as many examples."""
    best_of: int | None = None
    """Of a video, also the PSNR and SSIM of the best of so many predictions of each clip (SVG: 100)."""
    batch_statistics: bool = False
    """Make these predictions with the batch's statistics in batch norm, as SVG's own evaluation does."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for name in ("draws", "samples", "best_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is a number from 0 to 2³² − 1, got {self.seed}")
        if not self.features:
            raise ValueError("features names at least one extractor, got none; efficientnet is one")
        if self.batch_statistics and self.best_of is None:
            raise ValueError("batch_statistics is about predictions: say of how many the best is taken (best_of, SVG: 100)")
