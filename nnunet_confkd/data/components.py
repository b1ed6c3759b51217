"""Connected components of labels: which structures are in one piece, and which pieces of a prediction are astray.

nnU-Net's post-processing keeps the largest component of the whole foreground or of a class, if this helps on validation
cases (F. Isensee et al., "nnU-Net", Nature Methods 18, 2021). Here the true labels tell which structures have one
component, so no prediction is needed.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import scipy  # its modules are loaded when they are used

SHARE = 0.95  # of the voxels of a structure in one piece that its largest component has at least


def in_one_piece(label_maps: Iterable[np.ndarray], classes: Sequence[int]) -> list[tuple[int, ...]]:
    """Find the structures that have one component in each of some fully annotated images.

    A structure is the whole foreground or a class. It is in one piece if its largest component has `SHARE` of its
    voxels in each image that contains it, and an image contains it. Voxels that touch at a corner belong together, as
    in nnU-Net.

    Args:
        label_maps: Integers, `(*spatial)` each. Values below 1 are no foreground.
        classes: The labels of the foreground.

    Returns:
        The labels of each such structure, the whole foreground first, as :func:`without_stray_pieces` takes them.
    """
    structures = dict.fromkeys([tuple(classes), *((label,) for label in classes)], False)
    for label in label_maps:
        boxes = scipy.ndimage.find_objects(label)
        for structure in list(structures):
            _, sizes, _ = _components(label, structure, boxes)
            if len(sizes):
                structures[structure] = True
                if sizes.max() < SHARE * sizes.sum():
                    del structures[structure]
    return [structure for structure, seen in structures.items() if seen]


def without_stray_pieces(label: np.ndarray, annotated: np.ndarray, structures: Iterable[tuple[int, ...]]) -> np.ndarray:
    """Turn components that can be no part of a structure into background.

    The largest component of each structure stays, and so does each one that contains an annotated voxel of it.

    Args:
        label: Integers, `(*spatial)`.
        annotated: Bool, `(*spatial)`: which voxels are annotated.
        structures: Those of :func:`in_one_piece`. They are taken in turn.

    Returns:
        A new label map.
    """
    label, boxes = label.copy(), scipy.ndimage.find_objects(label)
    for structure in structures:
        numbers, sizes, box = _components(label, structure, boxes)
        if len(sizes) > 1:
            stays = np.zeros(len(sizes) + 1, bool)
            stays[[0, 1 + sizes.argmax(), *np.unique(numbers[annotated[box]])]] = True
            label[box][~stays[numbers]] = 0
    return label


def _components(label: np.ndarray, structure: tuple[int, ...], boxes: Sequence[tuple[slice, ...] | None]
                ) -> tuple[np.ndarray, np.ndarray, tuple[slice, ...]]:
    """The number of the component of each voxel in the box around a structure, 0 outside of it; the sizes of the
    components; and the box. `boxes`: of each label from 1, as of SciPy's find_objects."""
    found = [box for value in structure if value <= len(boxes) and (box := boxes[value - 1])]
    around = tuple(slice(min(of_axis.start for of_axis in sides), max(of_axis.stop for of_axis in sides))
                   for sides in zip(*found)) or (slice(0),) * label.ndim
    numbers, _ = scipy.ndimage.label(np.isin(label[around], structure), np.ones((3,) * label.ndim))
    return numbers, np.bincount(numbers.ravel())[1:], around
