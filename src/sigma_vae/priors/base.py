"""Base class of priors that are fitted to latents."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from sigma_vae.types import Prior

__all__ = ["FittedPrior"]


class FittedPrior(Prior):
    r"""A density fitted to codes: draws z ~ q(z|x) of many examples, whose distribution is the aggregate posterior.

    .. math:: q(z) = \tfrac1N \sum_n q(z|x_n), \qquad E_x KL(q(z|x) \| p(z)) = I_q(x; z) + KL(q(z) \| p(z))

    The prior with the highest expected log-density of the codes has the smallest KL(q(z)‖p(z)), which is what stands between the ELBO
    and the best bound that encoder and decoder admit (Hoffman and Johnson 2016, "ELBO surgery"). With it the ELBO is a bound as before.

    A subclass keeps what it fitted in buffers (NaN till then) and parameters without gradients, so that they are saved with the model;
    loading them makes the prior a fitted one.

    Args:
        latent_dim: size of z.
        least_latents: how many it needs to be fitted.

    Raises:
        ValueError: latent_dim is below 1.
    """

    needs_fit = True

    def __init__(self, latent_dim: int, least_latents: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim is the size of the codes, at least 1; got {latent_dim}")
        self.latent_dim = latent_dim
        self.least_latents = least_latents
        self.fitted = False
        self.register_load_state_dict_post_hook(_see_whether_fitted)  # type: ignore[no-untyped-call]

    @abstractmethod
    def fit(self, codes: Tensor, held_out: Tensor | None = None, seed: int = 0) -> None:
        """Fit the density in float64 on the CPU, and store it in the dtype and on the device that this module has.

        Args:
            codes: posterior draws ``(n, latent_dim)``, ``least_latents`` or more.
            held_out: others ``(m, latent_dim)``, by whose density something is chosen; where nothing is, they are not looked at.
            seed: of all that is random in it.

        Raises:
            ValueError: the codes are too few, not finite, or of another size.
        """

    def checked(self, codes: Tensor, least: int | None = None) -> Tensor:
        """The codes in float64 on the CPU, after a look at their shape and their number, at least ``least_latents`` unless given."""
        least = self.least_latents if least is None else least
        if codes.dim() != 2 or codes.shape[1] != self.latent_dim:
            raise ValueError(f"codes are (n, {self.latent_dim}), one row an example; got {tuple(codes.shape)}")
        if len(codes) < least:
            raise ValueError(
                f"{type(self).__name__} over {self.latent_dim} latents needs at least {least} codes, got {len(codes)};"
                " give more examples or take fewer latents"
            )
        if not bool(codes.isfinite().all()):
            raise ValueError("codes are finite numbers, got NaN or infinity; the encoder has diverged")
        return codes.detach().double().cpu()

    def require_fitted(self) -> None:
        """Refuse to be used before there is anything to use."""
        if not self.fitted:
            raise ValueError(f"this {type(self).__name__} is not fitted yet; fit it on codes: vae.fit_prior(loader, prior)")


def _see_whether_fitted(module: nn.Module, incompatible_keys: object) -> None:
    """What an unfitted prior holds is NaN or nothing; after a load that may have changed."""
    assert isinstance(module, FittedPrior)
    module.fitted = all(buffer.numel() > 0 and bool(torch.isfinite(buffer).all()) for buffer in module.buffers())
