"""Hints: what is shown of full images looks like the annotations of others, and is true."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_confkd.hints import KEPT, SAMPLE, WITHOUT, ShownVoxels, as_channels

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


def shown_voxels(target: torch.Tensor, num_full: int, ignore: int | None, regions: bool, draws: np.random.Generator) -> torch.Tensor:
    """Of the first batch of a training."""
    return ShownVoxels(ignore, regions).draw(target, num_full, draws)


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
                assert len(found) in (0, 5) and max(extent) <= 4 and sum(x > 0 for x in extent) <= 1
                whole[label] += len(found) == 5
            assert not (image & (labels == 2)).any()  # annotated in no other image
    # of 120 images a share is shown nothing
    assert all(120 * (1 - WITHOUT) - 20 < count < 120 * (1 - WITHOUT) + 20 for count in whole.values())


def test_any_voxel_of_a_shape_may_come_to_lie_on_any_place():
    target = torch.full((2, 1, 12, 12), IGNORE, dtype=torch.int16)
    target[0] = 0
    target[0, 0, 4:7, 4:8] = 1
    target[1, 0, 0, 0:2] = 1  # a bar of 2
    draws = rng()
    seen = np.mean([shown_voxels(target, 1, IGNORE, False, draws)[0, 0].numpy() for _ in range(600)], 0)
    assert seen.sum() == pytest.approx(seen[4:7, 4:8].sum()) == pytest.approx(2 * (1 - WITHOUT), abs=0.1)  # never cut
    # nine places for the bar: at the ends lies one of them, further in lie two
    assert seen[4:7, [4, 7]] == pytest.approx((1 - WITHOUT) / 9 * np.ones((3, 2)), abs=0.06)
    assert seen[4:7, [5, 6]] == pytest.approx((1 - WITHOUT) * 2 / 9 * np.ones((3, 2)), abs=0.06)


@pytest.mark.parametrize("size", (2, 20), ids=("compared whole", "compared by a sample"))
def test_a_shape_is_put_where_most_of_it_lies_within_its_class(size):
    target = torch.full((2, 1, 64, 64), IGNORE, dtype=torch.int16)
    target[0] = 0
    target[0, 0, 10:10 + 2 * size, 10:10 + 2 * size] = 1
    target[1, 0, :size, :size] = 1
    assert (20 ** 2 > SAMPLE) and (2 ** 2 < SAMPLE)
    draws, counts = rng(), []
    for _ in range(200):
        shown = shown_voxels(target, 1, IGNORE, False, draws)[0, 0]
        assert not (shown & (target[0, 0] != 1)).any()
        counts += [int(shown.sum())] if shown.any() else []
    # one random place alone keeps some two thirds of the square
    assert np.mean(counts) > 0.9 * size ** 2 and max(counts) == size ** 2


def test_each_class_has_its_own_shape_cut_where_the_image_ends():
    target = torch.full((2, 1, 10, 10), IGNORE, dtype=torch.int16)
    target[0, 0, :, :3], target[0, 0, :, 3:] = 0, 2
    target[1, 0, 5, 2:6], target[1, 0, 3, 3], target[1, 0, 2:6, 8] = 0, 1, 2  # bars across and down, and a class that the full image lacks
    draws, lengths = rng(), {0: set(), 2: set()}
    for _ in range(300):
        shown = shown_voxels(target, 1, IGNORE, False, draws)[0, 0]
        across, down = torch.nonzero(shown[:, :3]), torch.nonzero(shown[:, 3:])
        assert len(set(across[:, 0].tolist())) <= 1 and len(set(down[:, 1].tolist())) <= 1
        lengths[0].add(len(across))
        lengths[2].add(len(down))
    assert lengths == {0: {0, 3}, 2: {0, 4}}  # four of a row do not find place in three


def test_a_class_is_left_out_as_often_as_annotated_images_lack_it():
    sparse, everywhere = torch.full((2, 1, 8, 8), IGNORE, dtype=torch.int16), torch.zeros(1, 1, 8, 8, dtype=torch.int16)
    sparse[0, 0, 1, 1], sparse[1, 0, 1, 1] = 0, 0
    sparse[1, 0, 6, 6] = 1  # every second annotated image has class 1, every full one
    everywhere[..., 4:, :] = 1
    nothing = torch.full_like(everywhere, IGNORE)
    shows, draws = ShownVoxels(IGNORE), rng()
    seen = [shows.draw(torch.cat((everywhere, sparse, nothing)), 1, draws)[0, 0] for _ in range(800)]
    assert np.mean([bool(shown[:4].any()) for shown in seen]) == pytest.approx(1 - WITHOUT, abs=0.05)
    assert np.mean([bool(shown[4:].any()) for shown in seen]) == pytest.approx((1 - WITHOUT) / 2, abs=0.06)
    # where the full images lack it as often, it is shown in all that have it
    shows = ShownVoxels(IGNORE)
    seen = [shows.draw(torch.cat((torch.zeros_like(everywhere), everywhere, sparse)), 2, draws)[1, 0] for _ in range(400)]
    assert np.mean([bool(shown[4:].any()) for shown in seen]) == pytest.approx(1 - WITHOUT, abs=0.06)


def test_a_share_of_the_full_images_is_shown_nothing():
    target, draws = batch()[:4], rng()
    nothing = [not image.any() for _ in range(400) for image in shown_voxels(target, 2, IGNORE, False, draws)[:2]]
    assert np.mean(nothing) == pytest.approx(WITHOUT, abs=0.05)


def test_shapes_are_kept_for_batches_without_any():
    """A batch of one image holds no other to learn from."""
    target, shows, draws = batch(), ShownVoxels(IGNORE), rng()
    assert not shows.draw(target[:1], 1, draws).any()
    for image in target[2:]:
        assert torch.equal(shows.draw(image[None], 0, draws)[0], image != IGNORE)
    seen = torch.cat([shows.draw(target[:1], 1, draws) for _ in range(50)])
    assert seen[:, :, :10].any() and seen[:, :, 10:].any()


def test_the_last_shapes_of_each_class_are_kept():
    shows, draws = ShownVoxels(IGNORE), rng()
    for length in range(1, 2 * KEPT + 1):
        target = torch.full((1, 1, 1, 64), IGNORE, dtype=torch.int16)
        target[..., :length] = 0
        shows.draw(target, 0, draws)
    target[..., -1] = 1
    shows.draw(target, 0, draws)
    full = torch.zeros(1, 1, 200, 64, dtype=torch.int16)
    full[:, :, 1:] = 1
    lengths = {int(shows.draw(full, 1, draws)[:, :, 0].sum()) for _ in range(600)}
    assert lengths == {0, *range(KEPT + 2, 2 * KEPT + 1)}


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
    shown = ShownVoxels(IGNORE, regions)({"target": [target, target[..., ::2, ::2]], "num_full": 2})["shown"]
    assert torch.equal(shown[2:], batch()[2:] != IGNORE)
    without_deep_supervision = ShownVoxels(IGNORE, regions)({"target": target, "num_full": 2})["shown"]
    assert torch.equal(without_deep_supervision, shown)


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
        drawn.append(ShownVoxels(IGNORE)({"target": [target, target[..., ::2, ::2]], "num_full": 2})["shown"])
        after = np.random.get_state()
        assert before[2] == after[2] and (before[1] == after[1]).all()
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    np.random.uniform()
    assert not torch.equal(drawn[2], ShownVoxels(IGNORE)({"target": target, "num_full": 2})["shown"])
