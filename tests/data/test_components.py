"""Connected components of labels."""
from __future__ import annotations

import numpy as np

from nnunet_confkd.data.components import SHARE, in_one_piece, without_stray_pieces


def volume(*boxes) -> np.ndarray:
    """A label map of 4 x 10 x 40 voxels with boxes (label, first column, last column)."""
    label = np.zeros((4, 10, 40), np.int16)
    for value, first, last in boxes:
        label[:, 2:5, first:last] = value
    return label


def test_a_structure_is_in_one_piece_if_it_is_in_all_images_that_contain_it():
    one = volume((1, 0, 10), (2, 10, 20))
    assert in_one_piece([one], [1, 2, 3]) == [(1, 2, 3), (1,), (2,)], "no image contains class 3"
    apart = volume((1, 0, 5), (2, 5, 20), (1, 20, 25))
    assert in_one_piece([one, apart], [1, 2]) == [(1, 2), (2,)]
    assert in_one_piece([one, volume((1, 0, 5), (2, 10, 15))], [1, 2]) == [(1,), (2,)]
    assert in_one_piece([one], [1]) == [(1,)], "the whole foreground is one class"
    assert in_one_piece([], [1, 2]) == []


def test_a_few_stray_voxels_do_not_make_a_second_piece():
    label = volume((1, 0, 20))
    size = (label == 1).sum()
    for number, expected in ((int(size / SHARE - size), [(1,)]), (int(size / SHARE - size) + 1, [])):
        stray = label.copy()
        stray[0, 9, 10:10 + number] = 1
        assert in_one_piece([stray], [1]) == expected


def test_corners_connect_and_padding_is_no_structure():
    label = np.full((1, 4, 4), -1, np.int16)
    label[0, 0, 0] = label[0, 1, 1] = 1
    assert in_one_piece([label], [1]) == [(1,)]
    assert np.array_equal(without_stray_pieces(label, label == 1, [(1,)]), label)


def test_the_largest_piece_and_annotated_ones_stay():
    label = volume((1, 0, 10), (1, 12, 15), (1, 20, 22), (2, 30, 33))
    annotated = np.zeros(label.shape, bool)
    annotated[1, 3, 13] = annotated[0, 9, 21] = True  # the second is background, beside the third piece
    found = without_stray_pieces(label, annotated, [(1,)])
    assert np.array_equal(found, volume((1, 0, 10), (1, 12, 15), (2, 30, 33)))
    assert label[0, 3, 20] == 1, "the argument stays as it is"
    whole = without_stray_pieces(label, annotated, [(1, 2)])
    assert np.array_equal(whole, volume((1, 0, 10), (1, 12, 15)))


def test_structures_are_taken_in_turn():
    """A class loses its largest piece if this lies apart from the foreground that stays, as in nnU-Net."""
    label = volume((1, 0, 5), (2, 5, 15), (1, 20, 28))
    nothing = np.zeros(label.shape, bool)
    assert np.array_equal(without_stray_pieces(label, nothing, [(1, 2), (1,)]), volume((1, 0, 5), (2, 5, 15)))
