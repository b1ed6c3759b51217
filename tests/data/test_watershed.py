"""Annotations that a watershed spreads over the image."""
from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from nnunet_confkd.data import watershed
from nnunet_confkd.data.watershed import coarse_steps, spread, spread_volume

SIZES = {2: (60, 70), 3: (30, 40, 44)}


def ball(ndim: int):
    """A noisy bright ball in the dark: its image, its mask, and a voxel of each class that is annotated."""
    sizes, rng = SIZES[ndim], np.random.default_rng(0)
    centre = np.ones(sizes, bool)
    centre[tuple(size // 2 for size in sizes)] = False
    truth = ndimage.distance_transform_edt(centre) < min(sizes) / 3
    image = (5 * truth + rng.normal(scale=0.2, size=sizes)).astype(np.float32)
    hints = ~centre
    hints[(*(size // 2 for size in sizes[:-1]), -2)] = True
    return image[None], truth, hints


@pytest.mark.parametrize("ndim", (2, 3))
@pytest.mark.parametrize("most", (watershed.MOST, 20_000), ids=("fine", "coarse"))
def test_two_voxels_are_enough_where_edges_are_strong(ndim, most, monkeypatch):
    monkeypatch.setattr(watershed, "MOST", most)
    image, truth, hints = ball(ndim)
    found = spread(image, truth.astype(int), hints)
    assert found.dtype == np.int16 and set(np.unique(found)) == {1, 2}
    dice = 2 * ((found == 2) & truth).sum() / ((found == 2).sum() + truth.sum())
    assert dice > (0.85 if ndim == 3 and most == 20_000 else 0.95)  # the border runs through coarse voxels


@pytest.mark.parametrize("most", (watershed.MOST, 500), ids=("fine", "coarse"))
def test_annotated_voxels_keep_their_labels(most, monkeypatch):
    """Also those of different classes in one voxel of the coarse grid, and of an axis that the grid does not divide."""
    monkeypatch.setattr(watershed, "MOST", most)
    rng = np.random.default_rng(1)
    shape = (7, 13, 19)
    labels, hints = rng.integers(0, 4, shape), rng.random(shape) < 0.2
    found = spread(rng.normal(size=(2, *shape)), labels, hints)
    assert found.shape == shape and np.array_equal(found[hints], labels[hints] + 1)
    assert found.min() > 0


def test_nothing_is_spread_where_nothing_is_annotated_and_outside_of_the_image():
    image, truth, hints = ball(2)
    assert not spread(image, truth.astype(int), hints & False).any()
    inside = np.zeros(truth.shape, bool)
    inside[:, :50] = True
    hints[3, 3] = True  # background
    found = spread(image, truth.astype(int), hints & inside, inside)
    assert (hints & inside).sum() == 2 and (found[inside] > 0).all() and not found[~inside].any()


@pytest.mark.parametrize("ndim", (2, 3))
def test_nothing_is_spread_without_annotated_background(ndim):
    """Else the foreground would fill the image. In a 2-D network's volume each slice counts for itself."""
    image, truth, hints = ball(ndim)
    only = hints & truth
    assert only.any() and not spread(image, truth.astype(int), only).any()
    both = np.stack((only, hints))
    found = spread_volume(np.stack((image, image), 1), np.stack((truth, truth)).astype(int), both,
                          np.ones(both.shape, bool), truth.shape) if ndim == 2 else None
    assert found is None or (not found[0].any() and (found[1] > 0).all())


def test_nothing_flows_round_the_image():
    """Two parts of an image that do not touch: the one without annotations stays empty."""
    inside = np.ones((4, 9), bool)
    inside[:, 4] = False
    hints = np.zeros((4, 9), bool)
    hints[2, 1] = True
    found = spread(np.zeros((1, 4, 9)), np.zeros((4, 9), int), hints, inside)
    assert (found[:, :4] == 1).all() and not found[:, 4:].any()


def test_a_channel_without_edges_changes_nothing():
    image, truth, hints = ball(2)
    both = np.concatenate((image, np.full_like(image, 3)))
    assert np.array_equal(spread(both, truth.astype(int), hints), spread(image, truth.astype(int), hints))


def test_a_volume_is_flooded_slice_by_slice_for_a_2d_network_and_on_the_grid_of_a_3d_one(monkeypatch):
    image, truth, hints = ball(3)
    labels, inside = truth.astype(int), np.ones(truth.shape, bool)
    inside[:, :, :3] = False
    hints &= inside
    slices = spread_volume(image, labels, hints, inside, (32, 32))
    annotated = hints.any((1, 2))
    assert np.array_equal(slices.any((1, 2)), annotated) and 0 < annotated.sum() < len(annotated)
    z = int(annotated.argmax())
    assert np.array_equal(slices[z], spread(image[:, z], labels[z], hints[z], inside[z]))

    whole = spread_volume(image, labels, hints, inside, SIZES[3])
    assert np.array_equal(whole, spread(image, labels, hints, inside)) and (whole[inside] > 0).all()
    monkeypatch.setattr(watershed, "MOST", 4000)
    assert coarse_steps((16, 16, 16)) == [2, 1, 1]
    coarse = spread_volume(image, labels, hints, inside, (16, 16, 16))
    assert np.array_equal(coarse, spread(image, labels, hints, inside, [2, 1, 1])) and (coarse != whole).any()


@pytest.mark.parametrize("size, steps", [((128, 128, 128), [2, 2, 2]), ((64, 64, 64), [1, 1, 1]),
                                         ((8, 320, 320), [1, 2, 2]), ((1024, 1024), [2, 2]), ((512, 512), [1, 1])])
def test_the_longest_axes_of_large_patches_are_halved(size, steps):
    assert coarse_steps(size) == steps
