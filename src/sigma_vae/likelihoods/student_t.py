r"""Student-t formulas, as pure functions: elementwise, stable in the far tails, in the precision of their input.

The degrees of freedom ``df`` are a number, or a tensor that broadcasts; they lie in [1, 1000].
torch has no incomplete beta function, so the distribution function is ours.
"""

import math

import torch
from torch import Tensor

from sigma_vae.likelihoods.densities import GAUSS_LEGENDRE, log1mexp

__all__ = ["student_t_entropy", "student_t_interval_log_prob", "student_t_log_cdf", "student_t_log_prob"]

Df = float | Tensor

CENTRAL = 3.0
"""Up to here the mass is integrated from the middle, beyond it the tail is a continued fraction."""
FRACTION_PAIRS = 15  # beyond 3 and for up to 1000 degrees of freedom: 1e-12
# Positive nodes and weights of the 12-point Gauss-Legendre rule on [-1, 1].
GAUSS_LEGENDRE_12 = (
    (0.1252334085114689, 0.2491470458134028),
    (0.3678314989981802, 0.2334925365383548),
    (0.5873179542866175, 0.2031674267230659),
    (0.7699026741943047, 0.1600783285433462),
    (0.9041172563704749, 0.1069393259953184),
    (0.9815606342467193, 0.0471753363865118),
)


def student_t_log_prob(z: Tensor, df: Df) -> Tensor:
    r"""Log-density of Student's t: :math:`\log C_\nu - \frac{\nu + 1}{2} \log(1 + z^2/\nu)`.

    >>> student_t_log_prob(torch.tensor([0.0, 1.0, 1e30]), 4.0)
    tensor([  -0.9808,   -1.5387, -342.9029])
    """
    return _log_normaliser(df) - 0.5 * (df + 1) * _log1p_square(z, df)


def student_t_entropy(df: Df) -> Df:
    r"""Differential entropy: :math:`\frac{\nu + 1}{2} (\psi(\frac{\nu + 1}{2}) - \psi(\frac\nu2)) - \log C_\nu`, in nats.

    >>> round(student_t_entropy(1.0), 4)  # log 4π
    2.531
    """
    if isinstance(df, Tensor):
        return 0.5 * (df + 1) * (torch.digamma(0.5 * (df + 1)) - torch.digamma(0.5 * df)) - _log_normaliser(df)
    return float(student_t_entropy(torch.tensor(df, dtype=torch.float64)))


def student_t_log_cdf(z: Tensor, df: Df) -> Tensor:
    r"""Log of the mass below z, differentiable (twice) in z alone.

    Below −3 it is the regularised incomplete beta function :math:`\tfrac12 I_x(\tfrac\nu2, \tfrac12)`, :math:`x = \nu/(\nu + z^2)`, by its
    continued fraction (`DLMF 8.17.22 <https://dlmf.nist.gov/8.17.v>`_); nearer to 0, half less the integral of the density.

    Raises:
        ValueError: on a backward pass that asks for the gradient in df.

    >>> student_t_log_cdf(torch.tensor([-1e30, -1.0, 0.0]), 4.0)
    tensor([-275.2116,   -1.6769,   -0.6931])
    """
    result: Tensor = _LogCdf.apply(z, df)  # type: ignore[no-untyped-call]
    return result


def student_t_interval_log_prob(center: Tensor, width: Tensor, df: Df) -> Tensor:
    """Log of the mass on [center − width/2, center + width/2].

    Narrow bins (on which the log-density changes by less than ½) by Gauss-Legendre quadrature of the density, where a difference of
    two nearly equal masses would cancel; wide ones by that difference.

    Shapes: center and width broadcast to the result.

    >>> student_t_interval_log_prob(torch.tensor([0.0, -1e4]), torch.tensor(2.0), 4.0).exp()
    tensor([6.2610e-01, 2.4000e-19])
    """
    center = center.abs() + torch.zeros_like(width)
    radius = _radius(center, df)
    rate = torch.maximum((df + 1) * (center / radius), torch.sqrt(1 + df + torch.zeros_like(center))) / radius
    narrow = width * rate < 0.5
    wide_center, wide_width = torch.where(narrow, 1, center), torch.where(narrow, 1, width)
    # The masses above the two edges, both at most half or so: that of the near edge, and their ratio.
    above, beyond = student_t_log_cdf(torch.stack([0.5 * wide_width, -0.5 * wide_width]) - wide_center, df)
    return torch.where(
        narrow,
        _narrow(torch.where(narrow, center, 0), torch.where(narrow, width, 0.25), df),
        above + log1mexp(above - beyond),
    )


def _narrow(center: Tensor, width: Tensor, df: Df) -> Tensor:
    radius = _radius(center, df)
    integral = torch.zeros_like(center)
    for node, weight in GAUSS_LEGENDRE:
        for t in (0.5 * width * node / radius, -0.5 * width * node / radius):
            # f(c + s)/f(c) from (ν + (c + s)²)/(ν + c²) = 1 + 2cs/(ν + c²) + s²/(ν + c²)
            integral = integral + weight * torch.exp(-0.5 * (df + 1) * torch.log1p(t * (2 * center / radius + t)))
    return student_t_log_prob(center, df) + torch.log(0.5 * width * integral)


class _LogCdf(torch.autograd.Function):
    """The gradient of the distribution function is the density: no derivative of a continued fraction is taken."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, df: Df) -> Tensor:
        size = z.abs()
        near = size < CENTRAL
        central = 0.5 - _central(torch.where(near, size, 0), df)
        log_above = torch.where(near, torch.log(central), _log_tail(torch.where(near, CENTRAL, size), df))
        return torch.where(z <= 0, log_above, torch.log1p(-torch.exp(log_above)))

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Df], output: Tensor) -> None:
        z, df = inputs
        ctx.df = None if isinstance(df, Tensor) else df  # type: ignore[attr-defined]
        ctx.save_for_backward(z, output, *((df,) if isinstance(df, Tensor) else ()))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        z, log_cdf, *df = ctx.saved_tensors  # type: ignore[attr-defined]
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            raise ValueError(
                "the Student-t distribution function has no gradient in its degrees of freedom; train on the density"
                ' (observes="density"), or evaluate level masses under torch.no_grad()'
            )
        ratio = torch.exp(student_t_log_prob(z, df[0] if df else ctx.df) - log_cdf)  # type: ignore[attr-defined]
        return grads[0] * ratio, None


def _central(z: Tensor, df: Df) -> Tensor:
    """Mass on [0, z] for 0 ≤ z ≤ 3: with z = √ν sinh u the density becomes a power of cosh u, far from any pole."""
    half = 0.5 * torch.asinh(z / _root(df))
    total = torch.zeros_like(half)
    for node, weight in GAUSS_LEGENDRE_12:
        for u in (half * (1 + node), half * (1 - node)):
            total = total + weight * torch.exp(-0.5 * df * torch.log1p(torch.sinh(u).square()))
    return _exp(_log_normaliser(df)) * _root(df) * half * total


def _log_tail(z: Tensor, df: Df) -> Tensor:
    """Log of the mass above z ≥ 3: log f(z) + log(z/ν), less the log of a continued fraction.

    Its steps d are taken two by two: with 1 + d·x as (1 + d) − d·y nothing cancels where x is near 1, at many degrees of freedom.
    """
    a, b = 0.5 * df, 0.5
    radius = _radius(z, df)
    x, y = (_root(df) / radius).square(), (z / radius).square()
    fraction = torch.ones_like(x)
    for m in reversed(range(FRACTION_PAIRS)):
        even = (m + 1) * (b - m - 1) / ((a + 2 * m + 1) * (a + 2 * m + 2))
        step = even * x / fraction
        scale = 1 / ((a + 2 * m) * (a + 2 * m + 1))
        odd = scale * (a * (2 * m + 1 - b) + m * (3 * m + 2 - b)) + scale * (a + m) * (a + b + m) * y
        fraction = (odd + step) / (1 + step)
    return student_t_log_prob(z, df) + torch.log(z / df) - torch.log(fraction)


def _log_normaliser(df: Df) -> Df:
    r""":math:`\log C_\nu = \log\Gamma(\tfrac{\nu + 1}2) - \log\Gamma(\tfrac\nu2) - \tfrac12 \log \nu\pi`.

    Two large log-gammas would leave nothing in float32: for a tensor their difference is its asymptotic series, eight steps up.
    """
    if not isinstance(df, Tensor):
        return math.lgamma(0.5 * (df + 1)) - math.lgamma(0.5 * df) - 0.5 * math.log(df * math.pi)
    a, product = 0.5 * df, torch.ones_like(df)
    for k in range(8):
        product = product * ((a + k) / (a + k + 0.5))
    up = 1 / (a + 8)
    square = up.square()
    series = up * (-1 / 8 + square * (1 / 192 + square * (-1 / 640 + square * (17 / 14336 - square * 31 / 18432))))
    return series + torch.log(product) + 0.5 * torch.log1p(8 / a) - 0.5 * math.log(2 * math.pi)


def _log1p_square(z: Tensor, df: Df) -> Tensor:
    """log(1 + z²/ν), also where z² overflows."""
    t = z.abs() / _root(df)
    small, large = t.clamp(max=1), t.clamp(min=1)
    return torch.where(t < 1, torch.log1p(small.square()), 2 * torch.log(large) + torch.log1p(1 / large.square()))


def _radius(z: Tensor, df: Df) -> Tensor:
    """√(z² + ν), also where z² overflows."""
    t = z.abs() / _root(df)
    small, large = t.clamp(max=1), t.clamp(min=1)
    return _root(df) * torch.where(t < 1, torch.sqrt(1 + small.square()), large * torch.sqrt(1 + 1 / large.square()))


def _root(df: Df) -> Df:
    return df.sqrt() if isinstance(df, Tensor) else math.sqrt(df)


def _exp(x: Df) -> Df:
    return x.exp() if isinstance(x, Tensor) else math.exp(x)
