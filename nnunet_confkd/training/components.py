"""Structures that are one piece, of which a network that labels cases itself keeps the largest component alone.

Whether a structure is one piece is seen in the fully annotated training cases. A heart is, and lesions are not.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation

ONE_PIECE = 0.95  # of the voxels of a structure, in its largest component: masks have a few loose voxels

Structure = int | tuple[int, ...]  # a class, or several classes together


def structures_of_one_piece(labels: Iterable[np.ndarray], classes: Sequence[int]) -> list[Structure]:
    """Find the structures whose largest component holds nearly all of their voxels in each label.

    Args:
        labels: Label maps of fully annotated cases, `(*spatial)`.
        classes: The values of the foreground.

    Returns:
        The whole foreground, as the tuple of its classes, if it is one piece; and the classes that are. A class that
        does not occur is none of them.
    """
    found: list[Structure] = [tuple(classes), *classes]
    seen: set[Structure] = set()
    for label in labels:
        shares = {structure: share for structure in found if (share := _share_of_largest(label, structure)) is not None}
        seen |= set(shares)
        found = [structure for structure in found if shares.get(structure, 1.0) >= ONE_PIECE]
    return [structure for structure in found if structure in seen]


def _share_of_largest(label: np.ndarray, structure: Structure) -> float | None:
    """The share of a structure's voxels that its largest component holds; None if it does not occur."""
    mask = np.isin(label, structure)
    if not mask.any():
        return None
    return float(remove_all_but_largest_component_from_segmentation(mask.astype(np.uint8), [1]).sum() / mask.sum())


def largest_components(label: np.ndarray, structures: Sequence[Structure]) -> np.ndarray:
    """Turn all but the largest component of each structure into background, one structure after the other.

    Args:
        label: A label map, `(*spatial)`.
        structures: Those of :func:`structures_of_one_piece`.

    Returns:
        A new label map.
    """
    for structure in structures:
        label = remove_all_but_largest_component_from_segmentation(label, [structure])
    return label
