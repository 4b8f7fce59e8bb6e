"""Elementwise formulas that torch lacks, stable in the far tails, in the precision of their input."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

# Positive nodes and weights of Gauss-Legendre rules on [-1, 1]; the negative ones mirror them.
GAUSS_LEGENDRE_4 = ((0.3399810435848563, 0.6521451548625461), (0.8611363115940526, 0.3478548451374538))
GAUSS_LEGENDRE_6 = (
    (0.2386191860831969, 0.4679139345726910),
    (0.6612093864662645, 0.3607615730481386),
    (0.9324695142031521, 0.1713244923791704),
)

FAR_TAIL = {torch.float16: -5.0, torch.bfloat16: -12.5, torch.float32: -12.5, torch.float64: -37.0}
"""Where Φ comes near the smallest number; below, an asymptotic series is exact to rounding."""


def normal_log_prob(z: Tensor) -> Tensor:
    """Log-density of the standard normal.

    >>> normal_log_prob(torch.zeros(1))
    tensor([-0.9189])
    """
    result: Tensor = -0.5 * z.square() - HALF_LOG_2PI
    return result


def log1mexp(t: Tensor) -> Tensor:
    """log(1 − e⁻ᵗ) for t > 0, without cancellation (Mächler 2012).

    >>> log1mexp(torch.tensor([1e-3, 50.0]))
    tensor([-6.9083e+00, -1.9287e-22])
    """
    # A log(expm1) of large t would be inf in the branch not taken, and NaN in its gradient.
    small, large = t.clamp(max=math.log(2)), t.clamp(min=math.log(2))
    return torch.where(t < math.log(2), torch.log(-torch.expm1(-small)), torch.log1p(-torch.exp(-large)))


def _log_ndtr_far(x: Tensor) -> Tensor:
    r"""The asymptotic series :math:`\log(\varphi(x) / |x|) - 1/x^2 + 5/(2 x^4) - 37/(3 x^6) + 353/(4 x^8)`."""
    square = x.square()
    u = square.reciprocal()
    return ((((353 / 4 * u - 37 / 3) * u + 5 / 2) * u - 1) * u) - 0.5 * (square + square.log()) - HALF_LOG_2PI


class _LogNdtr(torch.autograd.Function):
    """``torch.special.log_ndtr`` with a right gradient in the tail: its own is 955 at −1e3 in float32, 0 at −1e6."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        # Vectorised and without branches: on a CPU it takes a third of the time of torch's own.
        edge = FAR_TAIL[x.dtype]
        half = 0.5 * torch.special.erfc(x.abs().clamp(max=-edge) * math.sqrt(0.5))
        near = torch.lerp(torch.log1p(-half), half.log(), (-x.sign()).clamp(min=0))
        return near + (_log_ndtr_far(x.clamp(max=edge)) - _log_ndtr_far(x.new_full((), edge)))

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        (grad,) = grads
        # The inverse Mills ratio φ(x)/Φ(x). Where erfcx would overflow the ratio is 0 all the same, but its own derivative
        # (the solver's curvature) would be 0·∞.
        x = x.clamp(max=13 if x.dtype == torch.float32 else 37)
        return grad * math.sqrt(2 / math.pi) / _erfcx_root(x)


def log_ndtr(x: Tensor) -> Tensor:
    """Log of the standard normal's cumulative distribution, with a gradient that is right in the far tail.

    >>> x = torch.tensor([-1e6, -1e3, 0.0], requires_grad=True)
    >>> log_ndtr(x).sum().backward()
    >>> x.grad
    tensor([1.0000e+06, 1.0000e+03, 7.9788e-01])
    """
    result: Tensor = _LogNdtr.apply(x)  # type: ignore[no-untyped-call]
    return result


def normal_interval_log_prob(center: Tensor, width: Tensor) -> Tensor:
    r"""Log of the standard normal's mass on [center − width/2, center + width/2].

    Two exact forms, each used where it loses no digits, after mirroring to center ≤ 0:

    * narrow (width·max(1, |center|) < 1): :math:`\varphi(c) \int e^{-ct - t^2/2} dt` by Gauss-Legendre quadrature,
      where a difference of two nearly equal Φ would cancel;
    * wide: Φ(u)·(1 − Φ(l)/Φ(u)), with the quotient from scaled complementary error functions, which do not underflow.

    Shapes: center and width broadcast to the result.

    >>> normal_interval_log_prob(torch.tensor([0.0, -1e4]), torch.tensor(2.0)).exp()
    tensor([0.6827, 0.0000])
    """
    center = -center.abs()
    narrow = width * center.abs().clamp_min(1) < 1
    # Of 256 levels nearly every bin is narrow: evaluation on a CPU looks, and skips the other form.
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or narrow.is_cuda) and narrow.all():
        return _narrow(center, width)
    return torch.where(
        narrow,
        _narrow(torch.where(narrow, center, 0), torch.where(narrow, width, 0.5)),
        _wide(torch.where(narrow, -1, center), torch.where(narrow, 1, width)),
    )


def _rule(values: Tensor) -> tuple[tuple[float, float], ...]:
    """The rule that is exact to rounding for a narrow bin."""
    return GAUSS_LEGENDRE_6 if values.dtype == torch.float64 else GAUSS_LEGENDRE_4


def _narrow(center: Tensor, width: Tensor) -> Tensor:
    integral = torch.zeros_like(center)
    for node, weight in _rule(center):
        t = 0.5 * width * node
        integral = integral + weight * torch.exp(-0.5 * t.square()) * torch.cosh(center * t)
    return normal_log_prob(center) + torch.log(width * integral)


def _wide(center: Tensor, width: Tensor) -> Tensor:
    upper, lower = center + 0.5 * width, center - 0.5 * width
    tail = upper < 0
    # In the tail Φ(l)/Φ(u) = exp(center·width)·erfcx(−l/√2)/erfcx(−u/√2): the large squares are cancelled by hand.
    upper_tail = torch.where(tail, upper, 0)
    ratio = torch.exp(center * width) * (_erfcx_root(lower) / _erfcx_root(upper_tail))
    in_tail = log_ndtr(upper_tail) + torch.log1p(-torch.where(tail, ratio, 0.5))
    across = torch.log(torch.special.ndtr(upper.clamp_min(0)) - torch.special.ndtr(lower))
    return torch.where(tail, in_tail, across)


def _erfcx_root(x: Tensor) -> Tensor:
    result: Tensor = torch.special.erfcx(x * -math.sqrt(0.5))
    return result


def soft_clip(x: Tensor, lower: float, upper: float) -> Tensor:
    """Bound x smoothly to (lower, upper), with a gradient everywhere (Chua et al. 2018).

    >>> soft_clip(torch.tensor([-100.0, -6.0, 1.0, 100.0]), -6.0, 6.0)
    tensor([-6.0000, -5.3069,  0.9942,  6.0000])
    """
    x = upper - softplus(upper - x)
    return lower + softplus(x - lower)


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
    r"""Entropy in nats, :math:`\frac{\nu + 1}{2} (\psi(\frac{\nu + 1}{2}) - \psi(\frac\nu2)) - \log C_\nu`.

    >>> round(student_t_entropy(1.0), 4)  # log 4π
    2.531
    """
    if isinstance(df, Tensor):
        return 0.5 * (df + 1) * (torch.digamma(0.5 * (df + 1)) - torch.digamma(0.5 * df)) - _log_normaliser(df)
    return float(student_t_entropy(torch.tensor(df, dtype=torch.float64)))


def student_t_log_cdf(z: Tensor, df: Df) -> Tensor:
    r"""Log of the mass below z, differentiable (twice) in z alone.

    Below −3 it is the regularised incomplete beta function :math:`\tfrac12 I_x(\tfrac\nu2, \tfrac12)`, :math:`x =
    \nu/(\nu + z^2)`, by its continued fraction (`DLMF 8.17.22 <https://dlmf.nist.gov/8.17.v>`_); nearer to 0, half less
    the integral of the density.

    Raises:
        ValueError: on a backward pass that asks for the gradient in df.

    >>> student_t_log_cdf(torch.tensor([-1e30, -1.0, 0.0]), 4.0)
    tensor([-275.2116,   -1.6769,   -0.6931])
    """
    result: Tensor = _LogCdf.apply(z, df)  # type: ignore[no-untyped-call]
    return result


def student_t_interval_log_prob(center: Tensor, width: Tensor, df: Df) -> Tensor:
    """Log of the mass on [center − width/2, center + width/2].

    Narrow bins (on which the log-density changes by less than ½) by Gauss-Legendre quadrature of the density, where a
    difference of two nearly equal masses would cancel; wide ones by that difference.

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
        _narrow_student_t(torch.where(narrow, center, 0), torch.where(narrow, width, 0.25), df),
        above + log1mexp(above - beyond),
    )


def _narrow_student_t(center: Tensor, width: Tensor, df: Df) -> Tensor:
    radius = _radius(center, df)
    integral = torch.zeros_like(center)
    for node, weight in _rule(center):
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

    Its steps d are taken two by two: with 1 + d·x as (1 + d) − d·y nothing cancels where x is near 1, at many degrees
    of freedom.
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

    Two large log-gammas would leave nothing in float32: for a tensor their difference is its asymptotic series, eight
    steps up.
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


Formula = Callable[[Tensor, Tensor], Tensor]
"""From features and data ``(rows, ...)`` to log-probabilities ``(rows,)``, each row by itself; differentiable."""

Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(features, data, out): what the formula returns, with its gradient to the features written into ``out``."""

CPU_FEATURES = 2**17
"""Features in a part, whose temporaries then stay in the second-level cache."""
OTHER_FEATURES = 2**24
"""The same for a GPU, which needs larger parts to be busy."""


def in_chunks(formula: Formula, h: Tensor, x: Tensor, gradient: Gradient | None = None, features: int | None = None) -> Tensor:
    """``formula(h, x)`` and its gradient to h, for as many rows at a time as hold so many features.

    Plain autograd keeps every temporary of a formula: tens of times the features. Here only h and x are kept, and the
    formula is evaluated again for its gradient. A ``gradient`` by hand is written in the forward pass, and only scaled
    in the backward pass. The formula is called as it is for a single part without one, in compiled graphs, and for
    ``create_graph=True``.

    Shapes:
        h ``(rows, ...)``, x ``(rows, ...)``, result ``(rows,)``.

    >>> h = torch.randn(8, 4, requires_grad=True)
    >>> total = in_chunks(lambda h, x: (h * x).sum(-1), h, torch.ones(8, 4), features=8).sum()
    >>> torch.autograd.grad(total, h)[0].unique()
    tensor([1.])
    """
    if torch.compiler.is_compiling() or x.requires_grad:
        return formula(h, x)
    size = max(h.numel() // max(len(h), 1), 1)
    rows = max((features or (CPU_FEATURES if h.device.type == "cpu" else OTHER_FEATURES)) // size, 1)
    if rows >= len(h) and gradient is None:
        return formula(h, x)
    wanted = gradient if h.requires_grad and torch.is_grad_enabled() else None
    result: Tensor = _InChunks.apply(h, x, formula, wanted, rows)  # type: ignore[no-untyped-call]
    return result


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, formula: Formula, gradient: Gradient | None, rows: int) -> Tensor:
        ctx.save_for_backward(h, x)
        ctx.formula, ctx.rows, ctx.gradient = formula, rows, None
        parts = torch.split(h, rows), torch.split(x, rows)
        if gradient is None:
            return torch.cat([formula(*part) for part in zip(*parts, strict=True)])
        ctx.gradient = torch.empty_like(h)
        return torch.cat([gradient(*part) for part in zip(*parts, torch.split(ctx.gradient, rows), strict=True)])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        h, x = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradient is wanted
            return torch.autograd.grad(ctx.formula(h, x), h, upstream, create_graph=True)[0], None, None, None, None
        if ctx.gradient is not None:
            out, ctx.gradient = ctx.gradient, None  # scaled in place: a second backward pass computes it anew
            return out.mul_(upstream.reshape(-1, *[1] * (h.dim() - 1))), None, None, None, None
        out = torch.empty_like(h)
        for h_part, x_part, weights, out_part in zip(*(torch.split(t, ctx.rows) for t in (h, x, upstream, out)), strict=True):
            with torch.enable_grad():
                variable = h_part.detach().requires_grad_()
                values = ctx.formula(variable, x_part)
            out_part.copy_(torch.autograd.grad(values, variable, weights)[0])
        return out, None, None, None, None
