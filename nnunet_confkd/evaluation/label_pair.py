"""Two label maps, compared in one pass over both, however many classes they have.

The maps are read a slab at a time. What is kept is a table of how often each label of one map meets each label of the
other, and the voxels on the border of a label. There are few of these, so the memory is that of the two maps.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its modules are loaded when they are used

SLAB = 2 ** 20  # how many voxels of each map are looked at at once
WIDEST = 2 ** 20  # the largest range of labels that a table translates
# A tree finds a near point in a microsecond, but looks at a whole shell of points around a place that is far from all.
# Beyond NEAR voxels it takes as long for a place as a distance transform for some hundred voxels. The transform takes
# 12 bytes a voxel, so it must save much: there is a distant place for every PER_DISTANT voxels of the box of all.
NEAR, PER_DISTANT = 8, 100


class _Codes:
    """Translates labels into codes: 0 is what no class holds, and 1, 2, ... are the labels of the classes."""

    def __init__(self, labels: Sequence[int]):
        self.labels = np.array(sorted(labels), np.int64)
        self.dtype = np.min_scalar_type(len(labels))
        self.holds_zero = 0 in labels
        self.first = int(self.labels[0]) if len(labels) else 0
        self.table = None
        if len(labels) and int(self.labels[-1]) - self.first < WIDEST:
            self.table = np.zeros(int(self.labels[-1]) - self.first + 1, self.dtype)
            self.table[self.labels - self.first] = np.arange(1, len(labels) + 1)
        self.of_bytes: np.ndarray | None = None  # a table of all bytes needs no test of the range

    def __call__(self, voxels: np.ndarray) -> np.ndarray:
        """Return the codes of labels of any type of numbers."""
        if voxels.dtype == bool:
            voxels = voxels.view(np.uint8)
        if voxels.dtype == np.uint8:
            if self.of_bytes is None:
                self.of_bytes = self._codes(np.arange(256))
            if self.dtype == np.uint8:  # the quickest way to look bytes up
                codes = bytearray(voxels).translate(self.of_bytes.tobytes())
                return np.frombuffer(codes, np.uint8).reshape(voxels.shape)
            return self.of_bytes[voxels]
        return self._codes(voxels)

    def _codes(self, voxels: np.ndarray) -> np.ndarray:
        whole = voxels.astype(np.int64, copy=False)
        if self.table is not None:
            shifted = whole - self.first
            codes = self.table[np.clip(shifted, 0, len(self.table) - 1)]
            known = (shifted >= 0) & (shifted < len(self.table))
        else:
            codes = np.searchsorted(self.labels, whole)
            known = self.labels[np.minimum(codes, len(self.labels) - 1)] == whole if len(self.labels) else False
            codes = codes.astype(self.dtype) + self.dtype.type(1)
        if voxels.dtype.kind == "f":
            known = known & (whole == voxels)
        return np.where(known, codes, self.dtype.type(0))


@dataclass
class _Borders:
    """The voxels of one map that have a face neighbour with another code, or none.

    Attributes:
        index: Their places in the flat map, sorted by code and then by place.
        start: Where each code begins in `index`, `(codes + 1,)`.
        neighbours: The codes of the face neighbours, `(2 * axes, voxels)`; None if no class has several labels.
    """
    index: np.ndarray
    start: np.ndarray
    neighbours: np.ndarray | None

    @classmethod
    def of(cls, parts: list[tuple], codes: int) -> _Borders:
        """Join the parts (places, codes, neighbours) of all slabs."""
        index, code = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        order = np.argsort(code, kind="stable")
        neighbours = None
        if parts[0][2] is not None:
            neighbours = np.concatenate([part[2] for part in parts], 1)[:, order]
        return cls(index[order], np.searchsorted(code[order], np.arange(1, codes + 2)), neighbours)

    def surface(self, codes: Sequence[int]) -> np.ndarray:
        """Return the places of the surface voxels of the union of some codes, sorted."""
        parts = [slice(self.start[code - 1], self.start[code]) for code in codes]
        if len(codes) == 1:
            return self.index[parts[0]]
        index = np.concatenate([self.index[part] for part in parts]) if parts else self.index[:0]
        member = np.zeros(len(self.start), bool)
        member[list(codes)] = True
        outer = [~member[self.neighbours[:, part]].all(0) for part in parts]
        return np.sort(index[np.concatenate(outer)]) if parts else index


class LabelPair:
    """The ground truth and a prediction of one image.

    Voxels with the ignore label in the ground truth belong to no class, in either map.

    Args:
        truth: Label map, `(Z, Y, X)` or `(Y, X)`, of any type of numbers.
        prediction: Label map of the same shape.
        classes: {name: labels}. Several labels (a region) mean their union.
        ignore_label: Label of the voxels of the ground truth that are not annotated, or None.

    Attributes:
        annotated: The number of voxels that do not have the ignore label.
        size: The number of all voxels.
    """

    def __init__(self, truth: np.ndarray, prediction: np.ndarray, classes: Mapping[str, Sequence[int]],
                 ignore_label: int | None = None):
        if truth.shape != prediction.shape:
            raise ValueError(f"the label maps have the shapes {truth.shape} and {prediction.shape}")
        labels = sorted({int(label) for values in classes.values() for label in values})
        number = {label: code for code, label in enumerate(labels, 1)}
        self.codes = {name: sorted({number[int(label)] for label in values}) for name, values in classes.items()}
        self.size = truth.size
        # an axis of a single voxel has no surface
        self.axes = [axis for axis, size in enumerate(truth.shape) if size > 1] or [0]
        self.shape = tuple(truth.shape[axis] for axis in self.axes)
        self._read(truth.reshape(self.shape), prediction.reshape(self.shape), _Codes(labels), ignore_label)

    def _read(self, truth: np.ndarray, prediction: np.ndarray, encode: _Codes, ignore_label: int | None) -> None:
        count, wide = len(encode.labels) + 1, any(len(codes) > 1 for codes in self.codes.values())
        table = np.zeros(count * count, np.int64)
        borders: tuple[list, list] = ([], [])
        self.annotated = self.size
        may_skip = not encode.holds_zero and ignore_label != 0
        rows = max(1, SLAB // math.prod(self.shape[1:]))
        for start in range(0, self.shape[0], rows):
            # with a neighbour on each side
            first, stop = max(start - 1, 0), min(start + rows + 1, self.shape[0])
            own = slice(start - first, start - first + min(rows, self.shape[0] - start))
            slabs = [voxels[first:stop] for voxels in (truth, prediction)]
            if may_skip and start and not any(slab.any() for slab in slabs):
                continue  # large parts of most images are background
            maps = [encode(slab) for slab in slabs]
            if ignore_label is not None:
                ignored = slabs[0] == ignore_label
                for codes in maps:
                    codes[ignored] = 0
                self.annotated -= int(np.count_nonzero(ignored[own]))
            occupied = np.flatnonzero(maps[0][own] | maps[1][own])
            if len(occupied):
                true, predicted = (codes[own].reshape(-1)[occupied].astype(np.int64) for codes in maps)
                table += np.bincount(true * count + predicted, minlength=len(table))
            for found, codes in zip(borders, maps):
                found.append(_border(codes, own, start, wide))
        table[0] = self.annotated - table.sum()
        self.table = table.reshape(count, count)
        self.borders = tuple(_Borders.of(found, count - 1) for found in borders)

    def counts(self, name: str) -> tuple[int, int, int]:
        """Return the numbers of voxels of a class: in both maps, in the ground truth, in the prediction."""
        codes = self.codes[name]
        rows = self.table[codes]
        return int(rows[:, codes].sum()), int(rows.sum()), int(self.table[:, codes].sum())

    def meetings(self) -> dict[tuple[str, str], int]:
        """Return how many voxels of each class of the ground truth have each other class in the prediction, if any."""
        found = {}
        for name, codes in self.codes.items():
            of_truth = self.table[codes].sum(0)
            for other, others in self.codes.items():
                if name != other and of_truth.any() and (voxels := int(of_truth[others].sum())):
                    found[name, other] = voxels
        return found

    def surface_distances(self, name: str, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Measure the distances between the two surfaces of a class, which is in both maps.

        The surface of a mask consists of its voxels that have a face neighbour outside of the mask, as points at the
        centres of the voxels. Everything outside of the image counts as outside of the mask. If an axis has a single
        slice, the mask has no surface along this axis, so the surface is the outline.

        Args:
            name: The class.
            spacing: Size of a voxel in mm, in the order of the axes.

        Returns:
            Distances in mm from each surface voxel of the prediction to the nearest one of the ground truth, and the
            other way round.
        """
        true, predicted = (borders.surface(self.codes[name]) for borders in self.borders)
        spacing = [spacing[axis] for axis in self.axes]
        return _distances(predicted, true, self.shape, spacing), _distances(true, predicted, self.shape, spacing)


def _border(codes: np.ndarray, own: slice, start: int, wide: bool) -> tuple:
    """Find the border voxels of a slab: their places in the whole map, their codes and, if `wide`, the neighbours'.

    `codes` may have a further slice before and after those that are its `own`; `start` is the first of its own.
    """
    padded = np.pad(codes, [(int(own.start == 0), int(own.stop == len(codes))), *[(1, 1)] * (codes.ndim - 1)])
    inner = tuple(slice(1, size - 1) for size in padded.shape)
    centre = padded[inner]
    on_border = np.zeros(centre.shape, bool)
    sides = [(*inner[:axis], slice(1 + step, padded.shape[axis] - 1 + step), *inner[axis + 1:])
             for axis in range(codes.ndim) for step in (-1, 1)]
    for side in sides:
        on_border |= padded[side] != centre
    on_border &= centre != 0
    index = np.flatnonzero(on_border)
    neighbours = np.stack([padded[side][on_border] for side in sides]) if wide else None
    return index + start * math.prod(codes.shape[1:]), centre[on_border], neighbours


def _distances(from_index: np.ndarray, to_index: np.ndarray, shape: tuple[int, ...],
               spacing: Sequence[float]) -> np.ndarray:
    """Measure the distance in mm from each place to the nearest one of others. Both are sorted places in a flat map."""
    found = np.zeros(len(from_index))
    apart = np.flatnonzero(~np.isin(from_index, to_index, assume_unique=True))  # all others are at distance 0
    if not len(apart):
        return found
    targets = _points(to_index, shape)
    tree = scipy.spatial.KDTree(targets * spacing, balanced_tree=False)  # quick to build, and as quick to ask
    for reach in (NEAR * max(spacing), math.inf):
        for part in _parts(apart):
            found[part] = tree.query(_points(from_index[part], shape) * spacing, distance_upper_bound=reach)[0]
        apart = apart[np.isinf(found[apart])]
        if not len(apart):
            break
        places = _points(from_index[apart], shape)
        low, high = np.minimum(places.min(0), targets.min(0)), np.maximum(places.max(0), targets.max(0)) + 1
        if len(apart) * PER_DISTANT > (high - low).prod():
            del tree
            found[apart] = _by_transform(places - low, targets - low, tuple(high - low), spacing)
            break
    return found


def _by_transform(places: np.ndarray, targets: np.ndarray, shape: tuple[int, ...],
                  spacing: Sequence[float]) -> np.ndarray:
    """Measure the distance in mm from each place to the nearest target, both `(n, dimensions)` in a box of this shape.

    The time depends on the box, and not on the number of places.
    """
    outside = np.ones(shape, bool)
    outside[tuple(targets.T)] = False
    nearest = scipy.ndimage.distance_transform_edt(outside, sampling=spacing, return_distances=False,
                                                   return_indices=True)
    return np.concatenate([np.linalg.norm((part - nearest[(slice(None), *part.T)].T) * spacing, axis=1)
                           for part in _parts(places)])


def _points(index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(np.unravel_index(index, shape), -1)


def _parts(places: np.ndarray) -> Iterator[np.ndarray]:
    return (places[start:start + SLAB] for start in range(0, len(places), SLAB))
