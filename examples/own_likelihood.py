"""A likelihood of your own: Kumaraswamy's distribution of shares between 0 and 1. It trains, evaluates and samples like ours.

python -m examples.own_likelihood
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sigma_vae import VAE, mlp
from sigma_vae.config import TrainingConfig
from sigma_vae.evaluation import evaluate
from sigma_vae.training import fit
from sigma_vae.types import DataDistribution, Likelihood, Observes


class Shares(DataDistribution):
    """Independent values with F(x) = 1 − (1 − xᵃ)ᵇ (Kumaraswamy 1980)."""

    arg_constraints = {}  # noqa: RUF012 (as torch has it)

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__(a.shape[:-1], a.shape[-1:], validate_args=False)
        self.a, self.b = a, b

    @property
    def mean(self) -> Tensor:
        """E x = b B(1 + 1/a, b)."""
        one = 1 + 1 / self.a
        return (self.b.log() + one.lgamma() + self.b.lgamma() - (one + self.b).lgamma()).exp()

    def log_prob(self, value: Tensor) -> Tensor:
        """Summed over the values of an example."""
        a, b = self.a, self.b
        powers = (a * value.log()).exp()
        return (a.log() + b.log() + (a - 1) * value.log() + (b - 1) * torch.log1p(-powers)).sum(-1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """By the inverse of F."""
        u = torch.rand(*sample_shape, *self.a.shape)
        return (1 - (1 - u) ** (1 / self.b)) ** (1 / self.a)

    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """F below and at each value: the same, as it has no jumps."""
        at = 1 - (1 - value**self.a) ** self.b
        return at, at


class Kumaraswamy(Likelihood):
    """Two features for each value give its a and b."""

    unit_interval = True

    def __init__(self, channels: int) -> None:
        super().__init__(channels, spatial_dims=0, levels=None)

    @property
    def in_channels(self) -> int:
        """Two for each value."""
        return 2 * self.channels

    def distribution(
        self, h: Tensor, x: Tensor | None = None, *, observes: Observes | None = None, refitted: bool = False
    ) -> Shares:
        """The distribution of examples with these features."""
        self.check_observes(observes)
        a, b = softplus(h + 1).clamp(0.05, 100).chunk(2, dim=-1)
        return Shares(a, b)


def main(steps: int = 1000) -> float:
    """Train on shares that have two causes, and return the bound on held-out data, in nats."""
    torch.manual_seed(0)
    causes = torch.randn(2000, 2) @ torch.randn(2, 6) + 0.3 * torch.randn(2000, 6)
    shares = causes.sigmoid().clamp(1e-3, 1 - 1e-3)
    likelihood = Kumaraswamy(channels=6)
    vae = VAE(mlp((6,), likelihood.in_channels, latent_dim=2, width=64), likelihood)
    fit(vae, shares[:1800], TrainingConfig(max_steps=steps), progress=False)
    report = evaluate(vae, shares[1800:])
    print(f"bound: {report.elbo_nats.mean:.2f} nats; rate {report.rate_nats.mean:.2f} nats")
    return float(report.elbo_nats.mean)


if __name__ == "__main__":
    main()
