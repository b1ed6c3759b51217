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

# Number of logits that are looked at at a time: few, so that they stay in the cache of a processor; but each part costs
# a GPU some launches of kernels.
PART, PART_OF_GPU = 2 ** 18, 2 ** 22


def sum_term_by_term(terms: Callable[..., Iterator[Tensor]], *logits: Tensor) -> Tensor:
    """Sum the terms of a loss; what a term needs for its gradient is freed before the next term is computed.

    Args:
        terms: Called with the logits, cut from their graph and in full precision. Yields scalars. A term may also add
            its gradient to the `grad` of the logits itself, and yield its value without a graph.
        logits: What the terms are computed of.

    Returns:
        A scalar, with a gradient for the logits that any term depends on. It has no second derivative.
    """
    return _SumTermByTerm.apply(terms, *logits)


def full_precision(logits: Tensor) -> Tensor:
    """Convert half precision (autocast) to float32; float32 and float64 stay."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class _SumTermByTerm(torch.autograd.Function):
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

    @staticmethod
    @once_differentiable
    def backward(ctx, arriving: Tensor):
        # In full precision, because half would lose small values.
        return None, *(None if gradient is None else (arriving * gradient).to(dtype)
                       for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes))


def parts_of(logits: Tensor) -> list[tuple[slice, ...]]:
    """Divide logits into parts, so that what is computed of each of them has not the size of the logits.

    Args:
        logits: `(B, C, *spatial)`.

    Returns:
        Indices of parts of about `PART` elements: images, or slabs of one image.
    """
    images, channels, first, *others = logits.shape
    limit = PART if logits.device.type == "cpu" else PART_OF_GPU
    slab = channels * prod(others)
    if slab * first <= limit:
        step = limit // max(1, slab * first)
        return [(slice(i, i + step),) for i in range(0, images, step)]
    step = max(1, limit // slab)
    return [(slice(i, i + 1), slice(None), slice(j, j + step)) for i in range(images) for j in range(0, first, step)]
