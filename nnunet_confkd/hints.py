"""Hints: the annotated voxels of an image, shown to the teacher.

The KL of the papers acts on the fully labelled images, where the student has the labels themselves. On all others a teacher that
sees the image alone knows no more than the student. But these images have annotations, and with them as a second input the teacher
need only complete them, which it learns on the fully labelled images, from annotations simulated there. The student, which sees
the image alone, follows it (learning with privileged information: Vapnik, Vashist, Neural Networks 2009; as distillation:
Lopez-Paz, Bottou, Schölkopf, Vapnik, ICLR 2016, arXiv 1511.03643).
"""
from __future__ import annotations

import math
from collections import Counter, deque

import numpy as np
import torch
from torch import Tensor

from nnunet_confkd.losses import annotated_voxels

WITHOUT = 0.2  # share of the fully labelled images that get no hint: the teacher must predict without, too
KEPT = 16  # patterns of annotated voxels, of each class
PLACES = 8  # tried for a pattern
SAMPLE = 256  # voxels of a pattern by which places are compared


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


class ShownVoxels:
    """Which voxels are shown to the teacher: of images that are not fully labelled the annotated ones, of the others simulated ones.

    Called with the batches of a training, one after the other. What is annotated in an image, class by class, are its patterns; the last
    `KEPT` of each class are kept, for a batch may hold few images or one alone. On a fully labelled image, but for a share `WITHOUT` of
    them, a pattern of each class is shifted onto the class, as it is, and shown where it lies within it. A class is left out as
    often as it seems to be where a class is annotated at all: its share of the annotated images over its share of the fully
    labelled ones. So the teacher learns how much it tells that a class is *not* annotated.
    """

    def __init__(self, ignore_label: int | None, regions: bool = False):
        self.ignore_label, self.regions = ignore_label, regions
        self.patterns: dict[int, deque] = {}
        self.images = {"annotated": 0, "full": 0}
        self.with_class = {"annotated": Counter(), "full": Counter()}

    def __call__(self, batch: dict) -> dict:
        """The batch of the stratified loader with `shown`, see :meth:`draw`."""
        target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
        # random numbers apart from nnU-Net's, but decided by them: the images are those of a training without hints
        _, numbers, position, *_ = np.random.get_state()
        rng = np.random.default_rng([*numbers[:8], position])
        return {**batch, "shown": self.draw(target, batch["num_full"], rng)}

    def draw(self, target: Tensor, num_full: int, rng: np.random.Generator) -> Tensor:
        """What is shown of a batch, whose first `num_full` images are fully labelled: bool, `(B, 1, *spatial)`.

        target: a label map `(B, 1, *spatial)`, or nnU-Net's regions `(B, R + 1, *spatial)`.
        """
        shown = annotated_voxels(target, self.ignore_label, self.regions)
        shown[:num_full] = False
        labels = _one_label_a_voxel(target, self.regions).numpy()
        annotated = shown[:, 0].numpy()
        for image in range(num_full, len(target)):
            found = self._count("annotated", labels[image][annotated[image]])
            for label in found:
                pattern = annotated[image] & (labels[image] == label)
                self.patterns.setdefault(label, deque(maxlen=KEPT)).append(_packed(pattern))
        if not self.patterns:
            return shown
        for image in range(num_full):
            present = self._count("full", labels[image])
            if rng.random() < WITHOUT:
                continue
            for label in present:
                if label in self.patterns and rng.random() < self._share("annotated", label) / self._share("full", label):
                    pattern = self.patterns[label][rng.integers(len(self.patterns[label]))]
                    annotated[(image, *_shifted(_unpacked(pattern), labels[image] == label, rng))] = True
        return shown

    def _count(self, kind: str, labels: np.ndarray) -> list[int]:
        """The classes that occur; counted for `_share`. An image without any does not count."""
        found = np.flatnonzero(np.bincount(labels.ravel())).tolist()
        self.images[kind] += bool(found)
        self.with_class[kind].update(found)
        return found

    def _share(self, kind: str, label: int) -> float:
        return self.with_class[kind][label] / self.images[kind]


def _packed(pattern: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """A mask's bounding box, one bit a voxel: patterns of large patches are kept by the dozen."""
    box = pattern[tuple(slice(where.min(), where.max() + 1) for where in _voxels(pattern).T)]
    return box.shape, np.packbits(box)


def _unpacked(pattern: tuple[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """The voxels of a pattern, `(n, dimensions)`."""
    shape, bits = pattern
    return _voxels(np.unpackbits(bits, count=math.prod(shape)).view(bool).reshape(shape))


def _voxels(mask: np.ndarray) -> np.ndarray:
    """`np.argwhere`, several times as fast."""
    return np.stack(np.unravel_index(np.flatnonzero(mask), mask.shape), 1)


def _shifted(pattern: np.ndarray, within: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The pattern's voxels, `(n, dimensions)`, shifted from a random one of them onto a random voxel of the mask `within`, as far as they lie
    in it; of `PLACES` such shifts that which keeps most. Returns `(dimensions, m)`, an index."""
    places = np.flatnonzero(within)
    places = np.stack(np.unravel_index(places[rng.integers(len(places), size=PLACES)], within.shape), 1)
    shifts = places - pattern[rng.integers(len(pattern), size=PLACES)]
    sample = pattern[rng.integers(len(pattern), size=SAMPLE)] if len(pattern) > SAMPLE else pattern

    def kept(voxels):
        inside = ((voxels >= 0) & (voxels < within.shape)).all(-1)
        return inside & within[tuple(np.moveaxis(np.where(inside[..., None], voxels, 0), -1, 0))]

    moved = pattern + shifts[kept(sample + shifts[:, None]).sum(1).argmax()]
    return moved[kept(moved)].T


def _one_label_a_voxel(target: Tensor, regions: bool) -> Tensor:
    """`(B, *spatial)`; of overlapping regions a number for each combination."""
    if not regions:
        return target[:, 0]
    places = 2 ** torch.arange(target.shape[1] - 1).view(1, -1, *[1] * (target.ndim - 2))
    return ((target[:, :-1] != 0) * places).sum(1)
