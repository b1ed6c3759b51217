"""Structures that are one piece, and their largest components."""
from __future__ import annotations

import numpy as np
import pytest

from nnunet_confkd.training.components import largest_components, structures_of_one_piece

HEART = np.zeros((2, 8, 8), np.int16)
HEART[:, 1:5, 1:4], HEART[:, 1:5, 4:6] = 1, 2


def with_voxels(label: int, *places: tuple[int, int, int]) -> np.ndarray:
    changed = HEART.copy()
    for place in places:
        changed[place] = label
    return changed


@pytest.mark.parametrize("labels, expected", [
    ([HEART], [(1, 2, 3), 1, 2]),  # the class 3 does not occur
    ([HEART, with_voxels(1, (0, 7, 7))], [(1, 2, 3), 1, 2]),  # a loose voxel of 25
    ([HEART, with_voxels(1, (0, 7, 7), (0, 7, 0))], [(1, 2, 3), 2]),  # two of 26
    ([HEART, with_voxels(3, (0, 7, 7), (0, 7, 0), (1, 7, 0))], [1, 2]),  # lesions elsewhere
    ([with_voxels(3, (0, 0, 1), (0, 0, 2), (0, 7, 7)), HEART], [1, 2, (1, 2, 3)])])
def test_a_structure_is_one_piece_if_it_is_in_all_labels(labels, expected):
    assert set(structures_of_one_piece(labels, (1, 2, 3))) == set(expected)


def test_islands_of_structures_that_are_one_piece_become_background():
    islands = [(0, 7, 0), (0, 7, 7), (1, 7, 7)]
    label = with_voxels(2, *islands)
    assert np.array_equal(largest_components(label, [2]), HEART)
    assert np.array_equal(largest_components(label, [(1, 2)]), HEART)
    assert np.array_equal(largest_components(label, [1]), label) and np.array_equal(label, with_voxels(2, *islands))
    assert np.array_equal(largest_components(np.zeros_like(HEART), [1, (1, 2)]), np.zeros_like(HEART))
