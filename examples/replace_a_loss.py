"""The usual VAE in plain PyTorch, with the one line of its loss replaced: no KL weight, σ solved, samples from a fitted prior.

python -m examples.replace_a_loss
"""

import torch
from torch import Tensor, nn

from sigma_vae import Gaussian, explain
from sigma_vae.priors import MixturePrior

SIDE, LATENTS = 8, 8


class VAE(nn.Module):
    """Encoder and decoder of fully connected layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 128), nn.ReLU(), nn.Linear(128, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, 128), nn.ReLU(), nn.Linear(128, SIDE**2), nn.Sigmoid())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        """Pictures with values in [0, 1]."""
        return self.decoder(z).unflatten(1, (1, SIDE, SIDE))


def drawn(mean: Tensor, log_variance: Tensor) -> Tensor:
    """A draw of the latents."""
    return mean + (log_variance / 2).exp() * torch.randn_like(mean)


def digits() -> Tensor:
    """Handwritten digits, in [0, 1]."""
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images / 16, dtype=torch.float32)[:, None]


def main(epochs: int = 60) -> Tensor:
    """Train, solve σ on held-out data, fit a prior, and return samples."""
    torch.manual_seed(0)
    data = digits()[torch.randperm(1797)]
    train, held_out = data[:1500], data[1500:]
    vae, likelihood = VAE(), Gaussian(channels=1, levels=17)
    optimiser = torch.optim.Adam([*vae.parameters(), *likelihood.parameters()], lr=1e-3)
    for _ in range(epochs):
        for x in train[torch.randperm(len(train))].split(100):
            mean, log_variance = vae.encode(x)
            x_hat = vae.decode(drawn(mean, log_variance))
            kl_nats = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
            # was: loss = F.mse_loss(x_hat, x) + 0.005 * kl_nats.mean()
            loss = (kl_nats - likelihood(x_hat, x).log_prob(x)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        likelihood.calibrate([(vae.decode(drawn(*vae.encode(held_out))), held_out)])
        latents = drawn(*vae.encode(train))
        prior = MixturePrior(LATENTS, components=10)
        prior.fit(latents)
        samples = vae.decode(prior.sample(16))
    print(f"σ of held-out data: {float(likelihood.sigma()):.4f}; last loss: {float(loss.detach()):.1f} nats")
    print("the weight before:", explain((1, SIDE, SIDE), beta=0.005).advice)
    return samples


if __name__ == "__main__":
    main()
