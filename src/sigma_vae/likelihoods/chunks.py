"""Sums over many features a datum, part by part: memory for one part at a time, whatever the batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["Formula", "Gradient", "in_chunks"]

Formula = Callable[[Tensor, Tensor], Tensor]
"""(features ``(rows, ...)``, data ``(rows, ...)``) to log-probabilities ``(rows,)``: each row by itself, differentiable."""

Gradient = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""(features, data, weights ``(rows,)``, out): writes the gradient of the weighted sum of a formula to its features into ``out``."""

CPU_FEATURES = 2**17
"""Features a part: its temporaries stay in the second-level cache, and are recycled instead of given back to the kernel."""
OTHER_FEATURES = 2**24
"""Of a GPU, which needs larger pieces to be busy."""


def in_chunks(formula: Formula, h: Tensor, x: Tensor, gradient: Gradient | None = None, features: int | None = None) -> Tensor:
    """``formula(h, x)``, for as many rows at a time as hold so many features; the gradient to h is computed part by part, too.

    Plain autograd keeps every temporary of a formula until the backward pass: tens of times the features. Here nothing is kept
    but h and x. The price is a second evaluation of the formula, or of ``gradient``, where a family knows it by hand. The formula
    is called as it is for a single part without such a gradient, under ``torch.compile`` and ``torch.export``, and where a graph of
    the gradient is asked for (``create_graph=True``).

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
    result: Tensor = _InChunks.apply(h, x, formula, gradient, rows)  # type: ignore[no-untyped-call]
    return result


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, formula: Formula, gradient: Gradient | None, rows: int) -> Tensor:
        ctx.save_for_backward(h, x)
        ctx.formula, ctx.gradient, ctx.rows = formula, gradient or partial(_differentiate, formula), rows
        return torch.cat([formula(*part) for part in zip(torch.split(h, rows), torch.split(x, rows), strict=True)])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        h, x = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradient is wanted
            return torch.autograd.grad(ctx.formula(h, x), h, upstream, create_graph=True)[0], None, None, None, None
        out = torch.empty_like(h)
        for part in zip(*(torch.split(t, ctx.rows) for t in (h, x, upstream, out)), strict=True):
            ctx.gradient(*part)
        return out, None, None, None, None


def _differentiate(formula: Formula, h: Tensor, x: Tensor, weights: Tensor, out: Tensor) -> None:
    with torch.enable_grad():
        variable = h.detach().requires_grad_()
        values = formula(variable, x)
    out.copy_(torch.autograd.grad(values, variable, weights)[0])
