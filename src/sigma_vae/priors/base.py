"""Base class of priors that are fitted to latents."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from sigma_vae.types import Prior

__all__ = ["FittedPrior", "fitted"]


class FittedPrior(Prior):
    r"""A density fitted to latents, draws z ~ q(z|x) of many examples. Their distribution is the aggregate posterior.

    .. math:: q(z) = \tfrac1N \sum_n q(z|x_n), \qquad E_x KL(q(z|x) \| p(z)) = I_q(x; z) + KL(q(z) \| p(z))

    The prior with the highest mean log-density of the latents has the smallest KL(q(z)‖p(z)). This term separates the
    ELBO from the best bound that encoder and decoder allow (Hoffman and Johnson 2016, "ELBO surgery"). With the fitted
    prior the ELBO is still a bound.

    A subclass keeps its fit in buffers (NaN before) and in parameters without gradients, so that it is saved with the
    model. Loading them makes the prior a fitted one.

    Args:
        latent_dim: size of z.
        least_latents: smallest number of latents that it can be fitted to.

    Raises:
        ValueError: latent_dim is below 1.
    """

    needs_fit = True

    def __init__(self, latent_dim: int, least_latents: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim is the size of z, at least 1; got {latent_dim}")
        self.latent_dim = latent_dim
        self.least_latents = least_latents
        self.fitted = False
        self.register_load_state_dict_post_hook(_see_whether_fitted)  # type: ignore[no-untyped-call]

    @abstractmethod
    def fit(self, latents: Tensor, held_out: Tensor | None = None, seed: int = 0) -> None:
        """Fit as :meth:`Prior.fit` says: in float64 on the CPU, stored in this module's dtype and device."""

    def checked(self, latents: Tensor, least: int | None = None) -> Tensor:
        """Check shape and number of the latents, and convert them to float64 on the CPU."""
        least = self.least_latents if least is None else least
        if latents.dim() != 2 or latents.shape[1] != self.latent_dim:
            raise ValueError(f"latents are (n, {self.latent_dim}), one row per example; got {tuple(latents.shape)}")
        if len(latents) < least:
            raise ValueError(
                f"{type(self).__name__} over {self.latent_dim} latents needs at least {least} examples, got {len(latents)};"
                " give more examples or take fewer latents"
            )
        if not bool(latents.isfinite().all()):
            raise ValueError("latents are finite numbers, got NaN or infinity; the encoder has diverged")
        return latents.detach().double().cpu()

    def require_fitted(self) -> None:
        """Refuse to be used before the fit."""
        if not self.fitted:
            raise ValueError(f"this {type(self).__name__} is not fitted yet; fit it to latents: vae.fit_prior(loader, prior)")


def fitted(
    prior: Prior,
    latents: Tensor,
    held_out: Tensor | None,
    seed: int,
    condition: Tensor | None = None,
    held_condition: Tensor | None = None,
) -> None:
    """Fit a prior to latents, and to their conditions, in place.

    Raises:
        ValueError: it cannot be fitted to them, or not in the numbers that it is kept in.
    """
    try:
        prior.fit_given(latents, condition, held_out, held_condition, seed)
    except RuntimeError as error:  # of a decomposition
        raise ValueError(
            f"{type(prior).__name__} cannot be fitted to these latents, they are too large or lie in a plane"
        ) from error
    broken = [name for name, value in prior.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"{type(prior).__name__} fitted to latents up to {float(latents.abs().max()):.3g} is not finite ({broken[0]}); train the model"
            " again with a lower learning rate"
        )


def _see_whether_fitted(module: nn.Module, incompatible_keys: object) -> None:
    """Update ``fitted`` after loading: an unfitted prior holds NaN or nothing."""
    assert isinstance(module, FittedPrior)
    module.fitted = all(buffer.numel() > 0 and bool(torch.isfinite(buffer).all()) for buffer in module.buffers())
