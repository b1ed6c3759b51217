"""Hints: what is shown of full images looks like the annotations of others, and is true."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_confkd.hints import WITHOUT, add_shown, as_channels, shown_voxels

IGNORE = 3


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def batch(ndim: int = 2) -> torch.Tensor:
    """Two full images, halved between 0 and 1 and with a cube of 2; two with a bar of each of 0 and 1 annotated, 5 voxels long; one unlabelled."""
    target = torch.full((5, 1, *ndim * [20]), IGNORE, dtype=torch.int16)
    target[:2] = 0
    target[:2, :, 10:] = 1
    target[(slice(0, 2), 0, *ndim * [slice(13, 17)])] = 2
    target[(slice(2, 4), 0, 0, slice(5, 10), *(ndim - 2) * [3])] = 0
    target[(slice(2, 4), 0, 15, slice(5, 10), *(ndim - 2) * [3])] = 1
    return target


@pytest.mark.parametrize("ndim", (2, 3))
def test_of_images_that_are_not_full_the_annotated_voxels_are_shown(ndim):
    target = batch(ndim)
    shown = shown_voxels(target, 2, IGNORE, False, rng())
    assert shown.dtype == torch.bool and shown.shape == target.shape
    assert torch.equal(shown[2:], target[2:] != IGNORE)


@pytest.mark.parametrize("ndim", (2, 3))
def test_of_full_images_shapes_as_in_others_are_shown_within_each_class(ndim):
    target = batch(ndim)
    whole = {0: 0, 1: 0}
    for seed in range(60):
        shown = shown_voxels(target, 2, IGNORE, False, rng(seed))
        for image, labels in zip(shown[:2, 0], target[:2, 0]):
            for label in (0, 1):
                found = torch.nonzero(image & (labels == label))
                extent = (found.amax(0) - found.amin(0)).tolist() if len(found) else [0]
                assert len(found) <= 5 and max(extent) <= 4 and sum(x > 0 for x in extent) <= 1
                whole[label] += len(found) == 5
            assert not (image & (labels == 2)).any()  # annotated in no other image
    # cut where the bar leaves image or class, and at times there is no bar or an unlabelled image to copy
    assert all(20 < count < 100 for count in whole.values())


def test_any_voxel_of_a_shape_may_come_to_lie_on_the_place_drawn():
    target, draws = batch()[:4], rng()
    target[:2] = 0
    target[:2, :, 3, 8:12] = 1  # a bar of 4: a shape of 5 put on it by its first voxel would seldom reach its first
    seen = np.mean([shown_voxels(target, 2, IGNORE, False, draws)[:2, 0, 3, 8:12].numpy() for _ in range(200)], (0, 1))
    # of 4 places and 5 voxels to put on them 14 pairs show the first, 14 the last
    assert seen[[0, -1]] == pytest.approx(2 * [14 / 20 * (1 - WITHOUT)], abs=0.08)


def test_each_class_has_its_own_shape_cut_where_the_image_ends():
    target = torch.full((2, 1, 10, 10), IGNORE, dtype=torch.int16)
    target[0, 0, :, :5], target[0, 0, :, 5:] = 0, 2
    target[1, 0, 5, 2:6], target[1, 0, 3, 3], target[1, 0, 2:6, 8] = 0, 1, 2  # bars across and down, and a class that the full image lacks
    seen, lengths, draws = torch.zeros(10, 10, dtype=torch.bool), set(), rng()
    for _ in range(300):
        shown = shown_voxels(target, 1, IGNORE, False, draws)[0, 0]
        across, down = torch.nonzero(shown[:, :5]), torch.nonzero(shown[:, 5:])
        assert len(set(across[:, 0].tolist())) <= 1 and len(set(down[:, 1].tolist())) <= 1
        lengths.add(len(down))
        seen |= shown
    assert seen.all() and lengths == {0, 1, 2, 3, 4}


def test_a_share_of_the_full_images_is_shown_nothing():
    target, draws = batch()[:4], rng()
    nothing = [not image.any() for _ in range(400) for image in shown_voxels(target, 2, IGNORE, False, draws)[:2]]
    assert np.mean(nothing) == pytest.approx(WITHOUT, abs=0.05)


@pytest.mark.parametrize("ignore", (None, IGNORE))
def test_where_every_image_is_full_nothing_is_shown(ignore):
    assert not shown_voxels(batch()[:2], 2, ignore, False, rng()).any()


def test_without_full_images_there_is_nothing_to_simulate():
    target = batch()[2:]
    assert torch.equal(shown_voxels(target, 0, IGNORE, False, rng()), target != IGNORE)


def test_unlabelled_images_show_nothing_and_give_no_shape():
    target = batch()[[0, 1, 4]]
    assert not shown_voxels(target, 2, IGNORE, False, rng()).any()


def regions_of(target: torch.Tensor, first: tuple[int, ...] = (1, 2)) -> torch.Tensor:
    """Region 0: the labels `first`; region 1: label 2; last the ignore mask, as nnU-Net has them."""
    return torch.cat((torch.isin(target, torch.tensor(first)), target == 2, target == IGNORE), 1)


@pytest.mark.parametrize("first", ((1, 2), (1,)), ids=("overlapping", "disjoint"))
def test_regions_are_shown_as_labels_are(first):
    target, some = batch(), 0
    target[3, 0, 12, 5:10] = 2
    for seed in range(5):
        labels, regions = (shown_voxels(t, 2, IGNORE, r, rng(seed)) for t, r in ((target, False), (regions_of(target, first), True)))
        assert torch.equal(labels, regions)
        some += int(labels[:2].any())
    assert some > 2


@pytest.mark.parametrize("regions", (False, True))
def test_shown_are_voxels_of_the_highest_resolution(regions):
    target = regions_of(batch()) if regions else batch()
    shown = add_shown({"target": [target, target[..., ::2, ::2]], "num_full": 2}, IGNORE, regions)["shown"]
    assert torch.equal(shown[2:], batch()[2:] != IGNORE)


def test_channels_tell_class_and_place_of_what_is_shown():
    target = torch.tensor([[[[0, 1, 2, IGNORE]]]])
    shown = torch.tensor([[[[True, False, True, False]]]])
    expected = torch.tensor([[[[1, 0, 0, 0]], [[0, 0, 0, 0]], [[0, 0, 1, 0]], [[1, 0, 1, 0]]]]).float()
    assert torch.equal(as_channels(target, shown, 3), expected)
    expected = torch.tensor([[[[0, 0, 1, 0]], [[0, 0, 1, 0]], [[1, 0, 1, 0]]]]).float()
    assert torch.equal(as_channels(regions_of(target), shown, 2, regions=True), expected)


def test_what_is_shown_follows_nnunets_random_numbers_and_leaves_them_alone():
    target = batch()
    drawn = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        before = np.random.get_state()
        drawn.append(add_shown({"target": [target, target[..., ::2, ::2]], "num_full": 2}, IGNORE, False)["shown"])
        after = np.random.get_state()
        assert before[2] == after[2] and (before[1] == after[1]).all()
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    np.random.uniform()
    assert not torch.equal(drawn[2], add_shown({"target": target, "num_full": 2}, IGNORE, False)["shown"])
