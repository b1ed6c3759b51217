"""Gradients that are computed together with the values, so that a loss keeps nothing else until the backward pass.

Autograd keeps what each operation needs for its gradient: for a loss over C classes several tensors of the size of the
logits, `(B, C, *spatial)`, and for a sum of losses those of all of them at once. With 117 classes this is most of the
memory of a training. A loss is a scalar, so its gradient can be computed at once and multiplied later by the gradient
that arrives from behind. Then a loss keeps one tensor of the size of the logits, whatever its terms are.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PART = 2 ** 20  # number of logits that are looked at at a time


def sum_term_by_term(terms: Callable[..., Iterator[Tensor]], *logits: Tensor) -> Tensor:
    """Sum the terms of a loss; what a term needs for its gradient is freed before the next term is computed.

    Args:
        terms: Called with the logits, cut from their graph and in full precision. Yields scalars.
        logits: What the terms are computed of.

    Returns:
        A scalar, with a gradient for the logits that any term depends on. It has no second derivative.
    """
    return _SumTermByTerm.apply(terms, *logits)


def mean_in_parts(per_voxel: Callable[..., Tensor], *logits: Tensor) -> Tensor:
    """Average a quantity of each voxel, part by part of the image, so that no temporary has the size of the logits.

    Args:
        per_voxel: Turns logits `(B, C, *spatial)` into values `(B, *spatial)`.
        logits: Its arguments, all of the same shape.

    Returns:
        A scalar, with a gradient for all logits that require one; zero if there is no image. It has no second
        derivative.

    Raises:
        ValueError: The shapes differ.
    """
    shapes = [tuple(x.shape) for x in logits]
    if len(set(shapes)) > 1:
        raise ValueError(f"logits differ in shape: {', '.join(map(str, shapes))}")
    return _MeanInParts.apply(per_voxel, *logits)


def full_precision(logits: Tensor) -> Tensor:
    """Convert half precision (autocast) to float32; float32 and float64 stay."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class _KeptGradient(torch.autograd.Function):
    """A scalar whose gradient is computed in `forward`: in full precision, because half would lose small values."""

    @staticmethod
    @once_differentiable
    def backward(ctx, arriving: Tensor):
        return None, *(None if gradient is None else (arriving * gradient).to(dtype)
                       for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes))


class _SumTermByTerm(_KeptGradient):
    @staticmethod
    def forward(ctx, terms, *logits):
        leaves = [full_precision(x.detach()).requires_grad_(needed)
                  for x, needed in zip(logits, ctx.needs_input_grad[1:])]
        total = leaves[0].new_zeros(())
        with torch.enable_grad():
            for term in terms(*leaves):
                if term.requires_grad:
                    term.backward()
                total = total + term.detach()
        ctx.dtypes = [x.dtype for x in logits]
        ctx.save_for_backward(*(leaf.grad for leaf in leaves))
        return total


class _MeanInParts(_KeptGradient):
    @staticmethod
    def forward(ctx, per_voxel, *logits):
        total = full_precision(logits[0][:0]).new_zeros(())
        gradients = [total.new_zeros(x.shape) if needed else None
                     for x, needed in zip(logits, ctx.needs_input_grad[1:])]
        number = max(1, logits[0].numel() // logits[0].shape[1])
        for part in _parts(logits[0].shape):
            pieces = [full_precision(x.detach()[part]).requires_grad_(needed)
                      for x, needed in zip(logits, ctx.needs_input_grad[1:])]
            with torch.enable_grad():
                value = per_voxel(*pieces).sum() / number
            total += value.detach()
            if value.requires_grad:
                value.backward()
                for gradient, piece in zip(gradients, pieces):
                    if piece.grad is not None:
                        gradient[part] = piece.grad
        ctx.dtypes = [x.dtype for x in logits]
        ctx.save_for_backward(*gradients)
        return total


def _parts(shape: torch.Size) -> list[tuple[slice, ...]]:
    """Indices that divide `(B, C, *spatial)` into parts of about `PART` elements: images, or slabs of one image."""
    images, channels, first, *others = shape
    slab = channels * prod(others)
    if slab * first <= PART:
        step = PART // max(1, slab * first)
        return [(slice(i, i + step),) for i in range(0, images, step)]
    step = max(1, PART // slab)
    return [(slice(i, i + 1), slice(None), slice(j, j + step)) for i in range(images) for j in range(0, first, step)]
