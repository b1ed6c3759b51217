"""The pseudo-Dice of validation batches: hard counts of the annotated voxels, and Dice from their sums."""
from __future__ import annotations

import numpy as np
import torch
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from torch import Tensor

from nnunet_confkd.training.losses import annotated_voxels, hide_unlisted

COUNTS = ("tp_hard", "fp_hard", "fn_hard")  # nnU-Net's names


def hard_counts(logits: Tensor, target: Tensor, ignore_label: int | None, regions: bool,
                listed: Tensor | None = None) -> dict[str, np.ndarray]:
    """Count true positives, false positives and false negatives as nnU-Net does for its pseudo-Dice.

    Args:
        logits: `(B, C, *spatial)`.
        target: A label map `(B, 1, *spatial)`, or regions `(B, C + 1, *spatial)`; without ignore label `(B, C, ...)`.
        ignore_label: The data set's ignore label, or None. Ignored voxels do not count.
        regions: Whether the channels are sigmoid heads.
        listed: Bool, `(B, C)`: for which heads each image is annotated. The others do not count. None: all.

    Returns:
        The counts by name, one for each region or each label except the background.
    """
    mask = None
    if ignore_label is not None:
        mask = annotated_voxels(target, ignore_label, regions)
        target = target[:, :-1] if regions else torch.where(mask, target, 0)
    if regions:
        predicted = logits > 0  # sigmoid > 0.5
    else:
        predicted = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.argmax(1, keepdim=True), True)
    if listed is not None:
        predicted = predicted & listed.to(predicted.device).view(*listed.shape, *[1] * (logits.ndim - 2))
        target = hide_unlisted(target, listed, regions)
    axes = [0, *range(2, logits.ndim)]
    counts = get_tp_fp_fn_tn(predicted.float(), target, axes, None if mask is None else mask.float())
    first = 0 if regions else 1  # without the background
    return {name: count.cpu().numpy()[first:] for name, count in zip(COUNTS, counts)}


def dice(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> list[float]:
    """Dice of each class from its counts; NaN (with NumPy's warning) if the class is in no voxel."""
    return [float(value) for value in 2 * tp / (2 * tp + fp + fn)]
