"""What is annotated in an image: the patterns that :class:`nnunet_confkd.training.hints.HintSampler` keeps.

They are the annotated voxels of each class, how deep inside the class and how far from its border they seem to lie,
and whether whole slices are annotated.
"""
from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import numpy as np
from scipy import ndimage

KEPT = 16  # number of patterns kept for each class, and of slice profiles
SAMPLE = 128  # number of voxels of a pattern that are compared with a place
MANY = 20_000  # voxels; a larger pattern is not split into its connected components
PARTS = 64  # a pattern of more connected components is split into so many groups of neighbouring ones


# ---- patterns -------------------------------------------------------------------------------------------------------

class Voxels:
    """Some voxels of an image, as a mask in their bounding box. Lists of the voxels of a large class take much longer.

    Args:
        mask: Bool.
        corner: Where the box begins, `(dimensions,)`.

    Attributes:
        of_mask: Their numbers in the mask, in ascending order.
        size: How many there are.
    """

    def __init__(self, mask: np.ndarray, corner: Sequence[int] | np.ndarray):
        self.mask, self.corner = mask, np.asarray(corner)
        self.of_mask = np.flatnonzero(mask)
        self.size = len(self.of_mask)

    @classmethod
    def of(cls, voxels: np.ndarray) -> Voxels:
        """Put a list of voxels, `(n, dimensions)`, into a box."""
        low = voxels.min(0)
        mask = np.zeros(voxels.max(0) + 1 - low, bool)
        mask[tuple((voxels - low).T)] = True
        return cls(mask, low)

    def voxels(self, chosen: np.ndarray | slice = slice(None)) -> np.ndarray:
        """List some of the voxels by their numbers, `(n, dimensions)`."""
        return np.stack(np.unravel_index(self.of_mask[chosen], self.mask.shape), 1) + self.corner

    def sample(self) -> np.ndarray:
        """List at most `SAMPLE` of the voxels, evenly spread over their order, `(n, dimensions)`."""
        return self.voxels(evenly(self.size))

    def moved(self, shift: np.ndarray) -> Voxels:
        """The same voxels elsewhere."""
        found = copy(self)
        found.corner = self.corner + shift
        return found

    def components(self) -> list[Voxels]:
        """The connected components, diagonal neighbours included; at most `PARTS` groups of neighbouring ones."""
        if self.size > MANY:
            return [self]
        numbered, number = ndimage.label(self.mask, np.ones([3] * self.mask.ndim))
        parts = min(number, PARTS)
        of_voxel = (numbered.ravel()[self.of_mask].astype(int) - 1) * parts // number
        voxels = self.voxels()
        return [Voxels.of(voxels[of_voxel == part]) for part in range(parts)]


class Cloud(NamedTuple):
    """Where voxels lie, roughly."""

    centre: np.ndarray  # their mean place, `(dimensions,)`
    spread: float  # the root of their mean squared distance from it, in voxels; at least 1

    @classmethod
    def of(cls, mask: np.ndarray) -> Cloud | None:
        """Describe the voxels of a mask; None if there are none."""
        if not mask.any():
            return None
        centre, variance = [], 0.0
        for axis in range(mask.ndim):  # a list of the voxels of many organs would take longer
            weights = np.count_nonzero(mask, axis=tuple(i for i in range(mask.ndim) if i != axis))
            places = np.arange(len(weights))
            centre.append(np.average(places, weights=weights))
            variance += np.average((places - centre[-1]) ** 2, weights=weights)
        return cls(np.array(centre), max(1.0, float(np.sqrt(variance))))


class Pattern(NamedTuple):
    """The annotated voxels of one class in one image."""

    corner: np.ndarray  # of their bounding box, `(dimensions,)`
    shape: tuple[int, ...]  # of their bounding box
    bits: np.ndarray  # the voxels in it, packed, because dozens of patterns of large patches are kept
    foreground: Cloud | None  # the image's annotations of other classes, if the background is annotated

    @classmethod
    def of(cls, voxels: Voxels, foreground: Cloud | None = None) -> Pattern:
        """Pack voxels."""
        return cls(voxels.corner, voxels.mask.shape, np.packbits(voxels.mask), foreground)

    def voxels(self) -> Voxels:
        """Unpack the voxels."""
        mask = np.unpackbits(self.bits, count=int(np.prod(self.shape))).view(bool).reshape(self.shape)
        return Voxels(mask, self.corner)


class Depth:
    """Estimates how far the annotations of a class stay inside it: from 0, anywhere, to 1, as far as possible.

    No label of a partially annotated image tells where a class ends, but the image does: edges are strong at borders.
    The mean strength of the edges under real annotations is compared with that at random places of simulated ones and
    with that at their innermost places.
    """

    ENOUGH = 20  # patterns, before the comparison counts

    def __init__(self):
        self.edges = {where: [0.0, 0] for where in ("real", "anywhere", "innermost")}  # sum and number

    def add(self, where: str, edge: float) -> None:
        """Add the mean strength of the edges under one pattern."""
        total, number = self.edges[where]
        self.edges[where] = [total + edge, number + 1]

    def value(self) -> float:
        """The estimate; 0 while there are too few patterns."""
        if any(number < self.ENOUGH for _, number in self.edges.values()):
            return 0.0
        real, anywhere, innermost = (total / number for total, number in self.edges.values())
        if innermost >= anywhere:  # the edges say nothing about depth
            return 0.0
        return min(1.0, max(0.0, (anywhere - real) / (anywhere - innermost)))


class Margin:
    """Estimates how far from the border of a class its annotations stay, in voxels: 1 is next to it.

    No label of a partially annotated image tells where a class ends. But where most of an image is annotated, as in
    eroded masks with background, what is not annotated lies along the borders. Both sides are taken to be as far from
    the border, so that each has half of the gap between the annotations of two classes.
    """

    ENOUGH = KEPT  # images, because to find the gaps takes time

    def __init__(self):
        self.total, self.number = 0, 0

    def add(self, gap: int) -> None:
        """Add the smallest distance, in one image, from an annotated voxel of the class to one of another class."""
        self.total, self.number = self.total + gap, self.number + 1

    def value(self) -> int:
        """The estimate; 1 without images."""
        return max(1, round((self.total / self.number + 1) / 2)) if self.number else 1


# ---- what an image tells --------------------------------------------------------------------------------------------

def boxes_of(labels: np.ndarray, inside: np.ndarray) -> dict[int, tuple[slice, ...]]:
    """The values that occur `inside` a part of the image, from 0, in their order, and the bounding box of each."""
    if not (labels.size and inside.any()):
        return {}
    # Runs of equal voxels within a row: there are far fewer of them than voxels.
    flat, within = labels.ravel(), inside.ravel()
    changes = (flat[1:] != flat[:-1]) | (within[1:] != within[:-1])
    changes[labels.shape[-1] - 1::labels.shape[-1]] = True
    first = np.concatenate(([0], np.flatnonzero(changes) + 1))
    last = np.append(first[1:], labels.size) - 1
    chosen = np.flatnonzero(within[first])
    chosen = chosen[np.argsort(flat[first[chosen]], kind="stable")]
    values, begin = np.unique(flat[first[chosen]], return_index=True)
    low, high = (np.stack(np.unravel_index(ends[chosen], labels.shape)) for ends in (first, last))
    starts, stops = np.minimum.reduceat(low, begin, 1), np.maximum.reduceat(high, begin, 1) + 1
    return {value: tuple(map(slice, *ends)) for value, *ends in zip(values.tolist(), starts.T.tolist(),
                                                                    stops.T.tolist())}


def corner_of(box: tuple[slice, ...]) -> np.ndarray:
    return np.array([side.start for side in box])


def evenly(number: int) -> np.ndarray | slice:
    """The numbers of at most `SAMPLE` things, evenly spread over their order."""
    return slice(None) if number <= SAMPLE else np.linspace(0, number - 1, SAMPLE).astype(int)


def edge_strength(data: np.ndarray, voxels: np.ndarray) -> float:
    """Mean absolute central difference of an image `(channels, *spatial)` at voxels `(n, dims)`, summed over axes."""
    steps, last = np.eye(voxels.shape[-1], dtype=int)[:, None], np.array(data.shape[1:]) - 1
    before, after = (data[(slice(None), *np.moveaxis(np.clip(voxels + sign * steps, 0, last), -1, 0))]
                     for sign in (-1, 1))
    return float(np.abs(after - before).mean((0, 2)).sum())


def gaps_of(labels: np.ndarray, annotated: np.ndarray) -> dict[int, int]:
    """The smallest distance from an annotated voxel of each class to one of another class, {class: voxels}.

    Classes without another one are left out. Diagonal neighbours have the distance 1. Each voxel between the
    annotations belongs to the nearest one, and where voxels of two classes meet, their distances add up.
    """
    distance, nearest = ndimage.distance_transform_cdt(~annotated, "chessboard", return_indices=True)
    owner = labels[tuple(nearest)]
    found: dict[int, int] = {}
    for axis in range(labels.ndim):
        a, b = (tuple(slice(start, stop) if i == axis else slice(None) for i in range(labels.ndim))
                for start, stop in ((None, -1), (1, None)))
        meet = owner[a] != owner[b]
        gap = distance[a][meet] + distance[b][meet] + 1
        for of_side in (owner[a][meet], owner[b][meet]):
            for label in np.unique(of_side).tolist():
                smallest = int(gap[of_side == label].min())
                found[label] = min(found.get(label, smallest), smallest)
    return found


def is_by_slices(labels: np.ndarray, annotated: np.ndarray, inside: np.ndarray) -> bool:
    """Whether whole slices of an image are annotated, up to the borders between classes.

    Then, along at least two axes, few annotated voxels have a neighbour in the image that is not annotated.
    """
    within = 0
    for axis in range(labels.ndim):
        a, b = (tuple(slice(start, stop) if i == axis else slice(None) for i in range(labels.ndim))
                for start, stop in ((None, -1), (1, None)))
        both = annotated[a] & annotated[b]
        closed = np.count_nonzero(both & (labels[a] != labels[b]))
        opened = np.count_nonzero((annotated[a] ^ annotated[b]) & inside[a] & inside[b])
        within += int(closed >= opened)
    return within >= 2


def slice_profile(annotated: np.ndarray, inside: np.ndarray) -> tuple[int, np.ndarray] | None:
    """The axis across the annotated slices, and which slices are annotated; None if the slices are tilted."""
    for axis in range(annotated.ndim):
        others = tuple(i for i in range(annotated.ndim) if i != axis)
        known = inside.sum(others)
        share = annotated.sum(others)[known > 0] / known[known > 0]
        if ((share < 0.1) | (share > 0.9)).all():
            return axis, share > 0.5
    return None
