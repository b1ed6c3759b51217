"""Structures that are one piece, of which a network that labels cases itself keeps the largest component alone.

Whether a structure is one piece is seen in the fully annotated training cases. A heart is. Two kidneys of one class are
not, and lesions are not where some case has several.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from scipy.ndimage import find_objects

ONE_PIECE = 0.95  # of the voxels of a structure, in its largest component: masks have a few loose voxels
ENOUGH = 3  # cases that must have the structure

Structure = int | tuple[int, ...]  # a class, or several classes together


def structures_of_one_piece(labels: Iterable[np.ndarray], classes: Sequence[int]) -> list[Structure]:
    """Find the structures whose largest component holds nearly all of their voxels in each label.

    Args:
        labels: Label maps of fully annotated cases, `(*spatial)`.
        classes: The values of the foreground.

    Returns:
        The whole foreground, as the tuple of its classes, if its largest component holds nearly all voxels of each
        class; and the classes that are one piece. Each has been seen in at least `ENOUGH` labels.
    """
    found: list[Structure] = [*([tuple(classes)] if len(classes) > 1 else []), *classes]
    seen = dict.fromkeys(found, 0)
    for label in labels:
        boxes = _boxes(label)
        shares = {structure: _share_of_largest(label, structure, boxes) for structure in found}
        for structure, share in shares.items():
            seen[structure] += share is not None
        found = [structure for structure in found if shares[structure] is None or shares[structure] >= ONE_PIECE]
    return [structure for structure in found if seen[structure] >= ENOUGH]


def _boxes(label: np.ndarray) -> dict[int, tuple[slice, ...]]:
    """The bounding box of each class."""
    boxes = find_objects(np.maximum(label, 0))
    return {number: box for number, box in enumerate(boxes, 1) if box is not None}


def _share_of_largest(label: np.ndarray, structure: Structure, boxes: dict[int, tuple[slice, ...]]) -> float | None:
    """The share of a structure's voxels that its largest component holds; None if it does not occur.

    Of several classes together it is the smallest share of a class: a small one that lies apart would be lost.
    """
    if isinstance(structure, int):
        if structure not in boxes:
            return None
        mask = label[boxes[structure]] == structure
        return float(_largest(mask).sum() / mask.sum())
    if not boxes:
        return None
    kept = _largest(np.isin(label, structure))
    return float(min((kept[box] & (label[box] == of)).sum() / (label[box] == of).sum() for of, box in boxes.items()
                     if of in structure))


def _largest(mask: np.ndarray) -> np.ndarray:
    return remove_all_but_largest_component_from_segmentation(mask.astype(np.uint8), [1]).astype(bool)


def largest_components(label: np.ndarray, structures: Sequence[Structure]) -> np.ndarray:
    """Turn all but the largest component of each structure into background, one structure after the other.

    Args:
        label: A label map, `(*spatial)`.
        structures: Those of :func:`structures_of_one_piece`.

    Returns:
        A new label map.
    """
    label, boxes = label.copy(), _boxes(label)
    for structure in structures:
        if isinstance(structure, tuple):
            label = remove_all_but_largest_component_from_segmentation(label, [structure])
        elif box := boxes.get(structure):
            label[box] = remove_all_but_largest_component_from_segmentation(label[box], [structure])
    return label
