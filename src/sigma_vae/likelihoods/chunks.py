"""Sums over many features a datum, part by part: memory for one part at a time, whatever the batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Formula", "Gradient", "in_chunks"]

Formula = Callable[[Tensor, Tensor], Tensor]
"""(features ``(rows, ...)``, data ``(rows, ...)``) to log-probabilities ``(rows,)``: each row by itself, differentiable."""

Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(features, data, out): what the formula returns, with its gradient to the features written into ``out``."""

CPU_FEATURES = 2**17
"""Features a part: its temporaries stay in the second-level cache, and are recycled instead of given back to the kernel."""
OTHER_FEATURES = 2**24
"""Of a GPU, which needs larger pieces to be busy."""


def in_chunks(formula: Formula, h: Tensor, x: Tensor, gradient: Gradient | None = None, features: int | None = None) -> Tensor:
    """``formula(h, x)``, for as many rows at a time as hold so many features; the gradient to h is computed part by part, too.

    Plain autograd keeps every temporary of a formula until the backward pass: tens of times the features. Here nothing is kept
    but h and x, and the formula is evaluated again for its gradient. Where a family knows its gradient by hand, the forward
    pass writes it next to the values, and the backward pass only scales it: no second evaluation, for one more tensor kept.

    The formula is called as it is for a single part without such a gradient, under ``torch.compile`` and ``torch.export``, and where
    a graph of the gradient is asked for (``create_graph=True``).

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
