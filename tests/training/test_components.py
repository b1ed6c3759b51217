"""Structures that are one piece, and their largest components."""
from __future__ import annotations

import numpy as np
import pytest

from nnunet_confkd.training.components import ENOUGH, largest_components, structures_of_one_piece

HEART = np.zeros((2, 8, 8), np.int16)
HEART[:, 1:5, 1:4], HEART[:, 1:5, 4:6] = 1, 2
ORGAN_AND_GLAND = np.zeros((2, 32, 32), np.int16)
ORGAN_AND_GLAND[:, :24], ORGAN_AND_GLAND[:, 28:30, 28:30] = 1, 2


def with_voxels(label: int, *places: tuple[int, int, int]) -> np.ndarray:
    changed = HEART.copy()
    for place in places:
        changed[place] = label
    return changed


@pytest.mark.parametrize("label, expected", [
    (HEART, [(1, 2, 3), 1, 2]),  # the class 3 does not occur
    (with_voxels(1, (0, 7, 7)), [(1, 2, 3), 1, 2]),  # a loose voxel of 25
    (with_voxels(1, (0, 7, 7), (0, 7, 0)), [2]),  # two of 26
    (with_voxels(3, (0, 7, 7), (0, 7, 0), (1, 7, 0)), [1, 2]),  # lesions elsewhere
    (with_voxels(3, (0, 0, 1), (0, 0, 2), (0, 7, 7)), [1, 2]),  # a third of a class would be lost
    (ORGAN_AND_GLAND, [1, 2])])  # together they are not one piece, however small the gland is
def test_a_structure_is_one_piece_if_it_is_in_all_labels(label, expected):
    assert structures_of_one_piece([HEART] * ENOUGH + [label] * ENOUGH, (1, 2, 3)) == expected
    for structure in structures_of_one_piece([label] * ENOUGH, (1, 2, 3)):
        kept = largest_components(label, [structure])
        for number in np.unique(label)[1:]:
            assert (kept == number).sum() >= 0.95 * (label == number).sum()


def test_a_structure_of_few_cases_is_not_judged():
    labels = [HEART] * (ENOUGH - 1)
    assert structures_of_one_piece(labels, (1, 2)) == []
    lesion = with_voxels(3, (0, 0, 1), (0, 0, 2))
    assert structures_of_one_piece([HEART, *labels, lesion], (1, 2, 3)) == [(1, 2, 3), 1, 2]
    assert structures_of_one_piece([np.minimum(HEART, 1)] * ENOUGH, (1,)) == [1]


def test_islands_of_structures_that_are_one_piece_become_background():
    islands = [(0, 7, 0), (0, 7, 7), (1, 7, 7)]
    label = with_voxels(2, *islands)
    assert np.array_equal(largest_components(label, [2]), HEART)
    assert np.array_equal(largest_components(label, [(1, 2)]), HEART)
    assert np.array_equal(largest_components(label, [1]), label) and np.array_equal(label, with_voxels(2, *islands))
    assert np.array_equal(largest_components(np.zeros_like(HEART), [1, (1, 2)]), np.zeros_like(HEART))
