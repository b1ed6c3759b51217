"""Several processes (DDP): what a rank computes from the values of all ranks, and who waits for whom."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized()


def rank_factors(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Compute factors that turn the means of single ranks into means over all ranks.

    DDP averages the gradients of its W ranks. If each rank multiplies its mean over n_r values by `W n_r / sum_r n_r`,
    the average is the mean over all values. Every rank must call this at the same time.

    Args:
        counts: The numbers n_r of this rank, `(k,)`.

    Returns:
        The factors and the sums over the ranks, `(k,)` each.
    """
    totals = counts.clone()
    dist.all_reduce(totals)
    return dist.get_world_size() * counts / totals.clamp_min(1), totals


def gather(value) -> list:
    """Collect a value of every rank; without several ranks, this one alone."""
    if not several():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def patient_group() -> Any:
    """A process group that waits for days. nccl gives up every wait after 10 minutes. All ranks must call this."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Let the first rank run a block before the others, however long it takes."""
    if not several():
        yield
        return
    group = patient_group()
    if dist.get_rank() != 0:
        dist.barrier(group)
    yield
    if dist.get_rank() == 0:
        dist.barrier(group)
