"""Formulas that torch lacks, as pure functions: elementwise, stable in the far tails, in the precision of their input."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["at_least_float32", "log1mexp", "log_ndtr", "normal_interval_log_prob", "normal_log_prob", "soft_clip"]

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

# Positive nodes and weights of the 6-point Gauss-Legendre rule on [-1, 1]; the negative ones mirror them.
GAUSS_LEGENDRE = (
    (0.2386191860831969, 0.4679139345726910),
    (0.6612093864662645, 0.3607615730481386),
    (0.9324695142031521, 0.1713244923791704),
)


def at_least_float32(h: Tensor) -> Tensor:
    """Half-precision features in float32, others as they are: log-probabilities in half precision mean nothing.

    >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype, at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return h.float() if h.dtype in (torch.float16, torch.bfloat16) else h


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


class _LogNdtr(torch.autograd.Function):
    """``torch.special.log_ndtr`` with a gradient that holds in the tail: its own is 955 at −1e3 in float32, 0 at −1e6."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        result: Tensor = torch.special.log_ndtr(x)
        return result

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        (grad,) = grads
        # φ(x)/Φ(x), the inverse Mills ratio: erfcx neither under- nor overflows where the quotient matters. Where it would
        # overflow, the ratio is 0 all the same, but its own derivative (the solver's curvature) would be 0·∞.
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
    # Of 256 levels nearly every bin is: where an evaluation may look, it is spared what it would not take. A GPU would have to be
    # waited for, and a gradient needs no branch.
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or narrow.is_cuda) and narrow.all():
        return _narrow(center, width)
    return torch.where(
        narrow,
        _narrow(torch.where(narrow, center, 0), torch.where(narrow, width, 0.5)),
        _wide(torch.where(narrow, -1, center), torch.where(narrow, 1, width)),
    )


def _narrow(center: Tensor, width: Tensor) -> Tensor:
    integral = torch.zeros_like(center)
    for node, weight in GAUSS_LEGENDRE:
        t = 0.5 * width * node
        integral = integral + weight * torch.exp(-0.5 * t.square()) * torch.cosh(center * t)
    return normal_log_prob(center) + torch.log(width * integral)


def _wide(center: Tensor, width: Tensor) -> Tensor:
    upper, lower = center + 0.5 * width, center - 0.5 * width
    tail = upper < 0
    # In the tail Φ(l)/Φ(u) = exp(center·width)·erfcx(−l/√2)/erfcx(−u/√2): the large squares have been cancelled by hand.
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
