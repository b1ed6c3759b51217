"""Find label maps that look like scribbles among those that are taken for complete masks.

This module does not import torch: `confkd check` runs it in every worker.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np
import scipy  # its modules are loaded when they are used

THIN = 0.2  # of the class's most solid mask: a mask below it is thin
SOLID = 0.5  # of the same: a mask above it is one to compare volumes with
SMALL = 0.5  # of the median volume of solid masks
FILLED = 0.2  # of its bounding box: a small object fills more than a scribble
FOREGROUND = 0.02  # of the image: scribbles cover less
SLAB = 2 ** 20  # how many voxels are looked at at once
SAMPLED = 2 ** 21  # how many voxels tell the centers of the classes
FLAT = 2.0  # slices that are so many times as thick as pixels are wide have been annotated one by one


@dataclass
class Shape:
    """What tells scribbles from masks in one label map.

    Attributes:
        size: Voxels of the image.
        volumes: {class: voxels} of the classes that it holds, without background.
        filled: {class: share of the class's bounding box that it fills}.
        inner: {axis: {class: share of its voxels that an erosion with a 3x3 square across this axis leaves}}.
        every_nth: Distance of the annotated slices, where no two of them are neighbours and they lie at equal
            distances.
        centers: {class: mean index of its voxels along each axis}. Of large labels a part of the voxels counts.
    """
    size: int
    volumes: dict[int, int]
    filled: dict[int, float]
    inner: dict[int, dict[int, float]]
    every_nth: int | None
    centers: dict[int, tuple[float, ...]]


def shape_of(label: np.ndarray, spacing: Iterable[float]) -> Shape:
    """Measure a label map.

    Args:
        label: Whole numbers from 0 on, of two or three dimensions; 0 is background.
        spacing: Of the array's axes, in mm.
    """
    size, dimensions, spacing = label.size, label.ndim, list(spacing)
    if not np.can_cast(label.dtype, np.int32):
        label = label.astype(np.int32)
    if label.ndim == 2:
        label, spacing = label[None], [np.inf, *spacing]
    boxes = scipy.ndimage.find_objects(label)
    found = {value: box for value, box in enumerate(boxes, 1) if box is not None}
    if not found:
        return Shape(size, {}, {}, {}, None, {})
    whole = tuple(slice(min(box[axis].start for box in found.values()), max(box[axis].stop for box in found.values()))
                  for axis in range(3))
    flat = max(spacing) >= FLAT * min(spacing)
    left = {axis: np.zeros(len(boxes) + 1, np.int64) for axis in ([int(np.argmax(spacing))] if flat else range(3))}
    histogram = np.zeros(len(boxes) + 1, np.int64)
    occupied = [np.zeros(side.stop - side.start, bool) for side in whole]
    for start, part in _slabs(label[whole]):
        own = part[1:-1, 1:-1, 1:-1]
        foreground = own > 0
        histogram += np.bincount(own[foreground], minlength=len(histogram))
        for axis, present in enumerate(occupied):
            of_part = foreground.any(axis=tuple({0, 1, 2} - {axis}))
            present[start if axis == 0 else slice(None)] |= of_part
        for axis, counts in left.items():
            counts += np.bincount(_inside(np.moveaxis(part if axis else part[1:-1], axis, 0)), minlength=len(counts))
    volumes = {value: int(histogram[value]) for value in found}
    filled = {value: volumes[value] / np.prod([side.stop - side.start for side in box]) for value, box in found.items()}
    inner = {axis: {value: counts[value] / volume for value, volume in volumes.items()}
             for axis, counts in left.items()}
    return Shape(size, volumes, filled, inner, _every_nth(occupied), _centers(label, found, dimensions))


def leaves_a_margin(label: np.ndarray, ignore: int) -> bool:
    """Whether the classes border on ignored voxels more than on background, as eroded masks do.

    Args:
        label: Of two or three dimensions; 0 is background.
        ignore: The value of voxels that are not annotated.
    """
    borders = {0: 0, ignore: 0}
    for axis in (-2, -1):
        along = np.moveaxis(label, axis, 0)
        for one, other in ((along[1:], along[:-1]), (along[:-1], along[1:])):
            foreground = (one != 0) & (one != ignore)
            for value in borders:
                borders[value] += int(np.count_nonzero(foreground & (other == value)))
    return borders[ignore] > borders[0]


def _centers(label: np.ndarray, boxes: Mapping[int, tuple[slice, ...]], dimensions: int) -> dict[int, tuple]:
    step = int(np.ceil((label.size / SAMPLED) ** (1 / 3)))
    sample = label[::step, ::step, ::step]
    places = np.nonzero(sample)
    values = sample[places]
    counts = np.bincount(values, minlength=max(boxes) + 1)
    sums = np.stack([np.bincount(values, indices, len(counts)) for indices in places])
    centers = {value: step * sums[:, value] / counts[value] if counts[value] else
               np.array([(side.start + side.stop - 1) / 2 for side in box]) for value, box in boxes.items()}
    return {value: tuple(center[-dimensions:].tolist()) for value, center in centers.items()}


def _slabs(label: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield parts of a few slices, each with a margin of one voxel on all sides: the neighbours, or 0 outside."""
    rows = max(1, SLAB // (label.shape[1] * label.shape[2]))
    for start in range(0, len(label), rows):
        stop = min(start + rows, len(label))
        part = label[max(start - 1, 0):stop + 1]
        if part.any():
            yield slice(start, stop), np.pad(part, ((start == 0, stop == len(label)), (1, 1), (1, 1)))


def _inside(label: np.ndarray) -> np.ndarray:
    """The labels of the voxels whose eight neighbours in the slice (the last two axes) have the same label."""
    across, down = label[:, :, 1:] == label[:, :, :-1], label[:, 1:] == label[:, :-1]
    row = across[:, :, 1:] & across[:, :, :-1]  # equal to the voxels to the left and to the right
    same = row[:, 1:-1] & row[:, :-2] & row[:, 2:] & down[:, 1:, 1:-1] & down[:, :-1, 1:-1]
    centre = label[:, 1:-1, 1:-1]
    return centre[same & (centre > 0)]


def _every_nth(occupied: list[np.ndarray]) -> int | None:
    for slices in occupied:
        distances = np.diff(np.flatnonzero(slices))
        if len(distances) > 1 and distances.min() > 1 and distances.max() - distances.min() <= 1:
            return round(float(distances.mean()))
    return None


def suspects(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Find the cases that look like scribbles.

    A case is suspect if every class that it holds is thin, and smaller than half of the class's usual volume. A mask is
    thin if an erosion with a 3x3 square in the slice leaves less than a fifth of the share that it leaves of the
    class's most solid mask. A single class must also fill less than a fifth of its bounding box, which small objects do
    not. A case is also suspect if only every n-th slice is annotated. If no mask of any class is solid, all cases are
    suspect that hold little foreground.

    Args:
        shapes: {case: its shape} of all fully annotated cases.

    Returns:
        {case: what is suspect, for a message}.
    """
    most: dict[tuple[int, int], float] = {}  # (axis, class): share that the erosion leaves of the most solid mask
    for shape in shapes.values():
        for axis, shares in shape.inner.items():
            for value, share in shares.items():
                most[axis, value] = max(share, most.get((axis, value), 0))
    usual: dict[int, float] = {}  # {class: median volume of its solid masks}
    for value in {value for _, value in most}:
        solid = [shape.volumes[value] for shape in shapes.values() if value in shape.volumes and all(
            shares[value] >= SOLID * most[axis, value] for axis, shares in shape.inner.items())]
        usual[value] = median(solid) if solid else 0
    found = {}
    nothing_solid = bool(most) and max(most.values()) < THIN / 4
    for case, shape in shapes.items():
        foreground = sum(shape.volumes.values())
        compared = [value for value in shape.volumes if any(most[axis, value] >= THIN for axis in shape.inner)]
        scribbles = [value for value in compared if shape.volumes[value] < SMALL * usual[value] and any(
            shares[value] < THIN * most[axis, value] for axis, shares in shape.inner.items())]
        if compared and scribbles == compared and (len(compared) > 1 or shape.filled[compared[0]] < FILLED):
            found[case] = (f"{foreground} foreground voxels in lines or dots; complete masks of these classes have "
                           f"{sum(usual[value] for value in compared):.0f}")
        elif shape.every_nth:
            found[case] = f"foreground in one slice of {shape.every_nth}"
        elif nothing_solid and shape.volumes and foreground < FOREGROUND * shape.size:
            found[case] = f"{foreground} foreground voxels in lines or dots, as in all other cases"
    return found
