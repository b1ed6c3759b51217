"""Hints: the annotated voxels of an image, shown to the teacher.

The KL of the papers acts on the fully labelled images, where the student has the labels themselves. On all others a teacher that
sees the image alone knows no more than the student. But these images have annotations, and with them as a second input the teacher
need only complete them, which it learns on the fully labelled images, from annotations simulated there. The student, which sees
the image alone, follows it (learning with privileged information: Vapnik, Vashist, Neural Networks 2009; as distillation:
Lopez-Paz, Bottou, Schölkopf, Vapnik, ICLR 2016, arXiv 1511.03643).
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nnunet_confkd.losses import annotated_voxels

WITHOUT = 0.2  # share of the fully labelled images that get no hint: the teacher must predict without, too


def as_channels(target: Tensor, shown: Tensor, num_heads: int, regions: bool = False) -> Tensor:
    """The network's hints: per class (regions: per region) where a shown voxel belongs to it, and where a voxel is shown.

    target: a label map `(B, 1, *spatial)`, or nnU-Net's regions `(B, R + 1, *spatial)`. shown: bool, `(B, 1, *spatial)`.
    Returns `(B, num_heads + 1, *spatial)`, float32, zero wherever nothing is shown.
    """
    if regions:
        labels = target[:, :num_heads] != 0
    else:
        labels = target == torch.arange(num_heads, device=target.device).view(1, -1, *[1] * (target.ndim - 2))
    return torch.cat((labels & shown, shown), 1).float()


def add_shown(batch: dict, ignore_label: int | None, regions: bool) -> dict:
    """A batch of the stratified loader with `shown`, its :func:`shown_voxels`."""
    target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
    # random numbers apart from nnU-Net's, but decided by them: the images are those of a training without hints
    _, numbers, position, *_ = np.random.get_state()
    rng = np.random.default_rng([*numbers[:8], position])
    return {**batch, "shown": shown_voxels(target, batch["num_full"], ignore_label, regions, rng)}


def shown_voxels(target: Tensor, num_full: int, ignore_label: int | None, regions: bool, rng: np.random.Generator) -> Tensor:
    """Which voxels are shown to the teacher: of images that are not fully labelled the annotated ones, of the `num_full`
    fully labelled ones, which come first, as many as another image of the batch has annotated. bool, `(B, 1, *spatial)`.

    For each class the annotated voxels of that image are shifted, as they are, from a random one of them onto a random voxel of the class,
    and shown where they lie within it. A share `WITHOUT` of the fully labelled images, and all where there is no other, are shown nothing.
    """
    shown = annotated_voxels(target, ignore_label, regions)
    shown[:num_full] = False
    if num_full == len(target):
        return shown
    labels = _one_label_a_voxel(target, regions).numpy()
    annotated = shown[:, 0].numpy()
    for image in range(num_full):
        if rng.random() < WITHOUT:
            continue
        other = int(rng.integers(num_full, len(target)))
        for label in np.unique(labels[other][annotated[other]]):
            places = np.flatnonzero(labels[image] == label)
            if not len(places):
                continue
            place = np.unravel_index(rng.choice(places), annotated.shape[1:])
            pattern = np.argwhere(annotated[other] & (labels[other] == label))
            moved = pattern + place - rng.choice(pattern)
            moved = moved[((moved >= 0) & (moved < annotated.shape[1:])).all(1)].T
            moved = moved[:, labels[image][tuple(moved)] == label]
            annotated[(image, *moved)] = True
    return shown


def _one_label_a_voxel(target: Tensor, regions: bool) -> Tensor:
    """`(B, *spatial)`; of overlapping regions a number for each combination."""
    if not regions:
        return target[:, 0]
    places = 2 ** torch.arange(target.shape[1] - 1).view(1, -1, *[1] * (target.ndim - 2))
    return ((target[:, :-1] != 0) * places).sum(1)
