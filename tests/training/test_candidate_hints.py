"""Hints as sets of candidate classes: their channels, and how they are simulated by hiding classes."""
from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_confkd.training.candidate_hints import CandidateHints
from nnunet_confkd.training.hint_patterns import KEPT
from nnunet_confkd.training.hints import NO_HINTS, hint_channels, image_hints

HEADS, IGNORE = 3, 3
ONE, TWO, ALL = (True, True, False), (True, False, True), (True, True, True)


def halves(*labels: int) -> torch.Tensor:
    """Images of 20 x 20, `(B, 1, 20, 20)`, of value 0 with a square of 1 and one of 2, or of what stands for them."""
    target = torch.zeros(len(labels), 1, 20, 20, dtype=torch.int16)
    for image, label in zip(target[:, 0], labels):
        if label in (1, -1):
            image[2:8, 2:8] = 1
        if label in (2, -1):
            image[12:18, 12:18] = 2
    return target


def batch_of(target: torch.Tensor, num_full: int, lists: list[tuple], regions: bool = False) -> dict:
    if regions:
        target = torch.cat([*(target == c for c in (1, 2)), target == IGNORE], 1)
    shape = (len(target), 1, *target.shape[2:])
    return {"data": torch.zeros(shape), "target": target, "num_full": num_full, "listed": torch.tensor(lists),
            "inside": torch.ones(shape, dtype=torch.bool)}


# ---- channels -------------------------------------------------------------------------------------------------------

def test_a_hint_of_merged_background_is_all_its_candidates():
    target = torch.tensor([[[[0, 1, 2, 1]]], [[[0, 1, 2, 0]]]], dtype=torch.int16)
    mask = torch.tensor([[[[1, 1, 1, 0]]], [[[1, 1, 1, 1]]]], dtype=torch.bool)
    hints = hint_channels(target, mask, HEADS, listed=torch.tensor([ONE, ALL]))
    # image 0 lists class 1: values 0 and 2 are background or class 2
    assert hints[0, :, 0].tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]]
    assert hints[1, :, 0].tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]]


def test_a_region_that_is_not_listed_is_undecided():
    target = torch.tensor([[[[1, 1, 0, 1]], [[0, 1, 0, 0]], [[0, 0, 0, 1]]]], dtype=torch.bool)
    mask = torch.tensor([[[[1, 1, 1, 0]]]], dtype=torch.bool)
    hints = hint_channels(target, mask, 2, True, torch.tensor([[True, False]]))
    assert hints[0, :, 0].tolist() == [[1, 1, 0, 0], [0.5, 0.5, 0.5, 0], [1, 1, 1, 0]]


@pytest.mark.parametrize("regions", (False, True))
def test_where_all_classes_are_listed_the_channels_are_those_without_lists(regions):
    batch = batch_of(halves(-1, 1), 0, [ALL, ALL], regions)
    heads = 2 if regions else HEADS
    expected = hint_channels(batch["target"], batch["inside"], heads, regions)
    assert torch.equal(hint_channels(batch["target"], batch["inside"], heads, regions,
                                     torch.ones(2, heads, dtype=torch.bool)), expected)
    mixed = hint_channels(batch["target"], batch["inside"], heads, regions, torch.tensor([ALL, ONE])[:, -heads:])
    assert torch.equal(mixed[0], expected[0]) and not torch.equal(mixed[1], expected[1])


def test_hints_of_a_whole_image_are_those_of_batches():
    label, mask = halves(1)[0], torch.ones(1, 20, 20, dtype=torch.bool)
    manager = LabelManager({"background": 0, "a": 1, "b": 2, "ignore": IGNORE}, None)
    listed = torch.tensor([ONE])
    expected = hint_channels(label[None], mask[None], HEADS, listed=listed)[0]
    assert torch.equal(image_hints(label, mask, manager, listed), expected)


# ---- simulation -----------------------------------------------------------------------------------------------------

def simulated(sampler: CandidateHints, batch: dict, times: int = 200) -> list[tuple]:
    """Draw often: (the list, the share of voxels that are hints) of the first image."""
    np.random.seed(0)
    found = []
    for _ in range(times):
        np.random.random()
        drawn = sampler(batch)
        found.append((tuple(drawn["hint_listed"][0].tolist()), float(drawn["hint_mask"][0].float().mean())))
    return found


@pytest.mark.parametrize("regions", (False, True))
def test_full_images_show_what_the_others_have(regions):
    """One lists class 1 and two list class 2, completely: so do a third and two thirds of the simulated ones."""
    lists = [ALL, ONE, TWO, TWO]
    batch = batch_of(halves(-1, 1, 2, 2), 1, [row[1:] for row in lists] if regions else lists, regions)
    found = simulated(CandidateHints(IGNORE, regions), batch, 400)
    cut = slice(1 if regions else 0, None)
    assert {what for what, _ in found} == {ONE[cut], TWO[cut]}
    # five standard deviations of 400 draws are 0.12 and 0.1
    assert np.mean([what == TWO[cut] for what, _ in found]) == pytest.approx(2 / 3, abs=0.12)
    assert {share for _, share in found} == {0.0, 1.0}
    assert np.mean([share == 0 for _, share in found]) == pytest.approx(NO_HINTS, abs=0.1)


def test_other_images_show_their_own_classes_and_voxels():
    target = halves(-1, 1, 2, -1)
    target[3, :, 10:] = IGNORE
    drawn = CandidateHints(IGNORE)(batch_of(target, 1, [ALL, ONE, TWO, ALL]))
    assert drawn["hint_listed"][1:].tolist() == [list(ONE), list(TWO), list(ALL)]
    assert torch.equal(drawn["hint_mask"][1:], target[1:] != IGNORE)


def test_the_teacher_is_not_shown_the_classes_that_are_hidden():
    batch = batch_of(halves(-1, 1), 1, [ALL, ONE])
    sampler = CandidateHints(IGNORE, no_hints=0)
    drawn = sampler(batch)
    hints = hint_channels(batch["target"], drawn["hint_mask"], HEADS, listed=drawn["hint_listed"])
    full, other = hints
    assert torch.equal(full, other)  # the images differ in class 2 alone


def test_scribbles_of_some_classes_are_simulated_inside_the_listed_classes_and_the_merged_background():
    """The background scribble of an image that lists class 1 may lie in class 2 of the full image."""
    target = halves(-1, 1)
    label = target[1].clone()
    target[1] = IGNORE
    target[1, 0, 3:6, 4] = label[0, 3:6, 4]  # in class 1
    target[1, 0, 12:17, 14] = 0  # where the full image has class 2
    batch = batch_of(target, 1, [ALL, ONE])
    sampler, touched = CandidateHints(IGNORE, no_hints=0), 0
    np.random.seed(0)
    for _ in range(100):
        np.random.random()
        drawn = sampler(batch)
        mask = drawn["hint_mask"][0]
        assert tuple(drawn["hint_listed"][0].tolist()) == ONE and mask.sum() in (5, 8)
        assert (mask & (target[0] == 1)).sum() in (0, 3)
        touched += int((mask & (target[0] == 2)).any())
    assert touched > 5


def test_patterns_of_each_list_of_classes_are_kept_apart():
    """Class 1 has a scribble in each image that lists it, and in each full image that simulates this list."""
    target = halves(-1, 1, 2)
    target[1:, :, 0] = IGNORE  # not all voxels are annotated
    batch = batch_of(target, 1, [ALL, ONE, TWO])
    sampler = CandidateHints(IGNORE, no_hints=0)
    sampler(batch)
    assert set(sampler.samplers) == {ONE, TWO}
    assert set(sampler.samplers[ONE].patterns) <= {0, 1} and set(sampler.samplers[TWO].patterns) <= {0, 2}


def test_an_image_that_lacks_classes_simulates_parts_of_its_own_list():
    heads = 4
    lists = [(True, True, True, False), (True, True, False, False), (True, False, False, True)]
    batch = batch_of(halves(-1, 1, 0), 1, lists)
    assert batch["listed"].shape == (3, heads)
    assert {what for what, _ in simulated(CandidateHints(4), batch, 50)} == {lists[1]}


def test_without_annotated_images_there_are_no_hints():
    target = halves(-1, 0)
    target[1] = IGNORE
    drawn = CandidateHints(IGNORE)(batch_of(target, 1, [ALL, ALL]))
    assert not drawn["hint_mask"].any() and drawn["hint_listed"].all()


def test_hints_never_lie_in_the_padding():
    batch = batch_of(halves(-1, 1), 1, [ALL, ONE])
    batch["inside"][:, :, :5] = False
    sampler = CandidateHints(IGNORE, no_hints=0)
    for _ in range(2):
        assert torch.equal(sampler(batch)["hint_mask"], batch["inside"])


def test_a_whole_volume_has_the_hints_of_one_image_that_was_seen():
    sampler = CandidateHints(IGNORE, no_hints=0)
    volume, image = halves(-1)[:, :, None].expand(1, 1, 3, 20, 20), np.zeros((1, 3, 20, 20), np.float32)
    inside = np.ones((3, 20, 20), bool)
    nothing, lists = sampler.draw_volume(image, volume, inside, (20, 20), np.random.default_rng(0))
    assert not nothing.any() and lists is None
    sampler(batch_of(halves(-1, 2), 1, [ALL, TWO]))
    mask, lists = sampler.draw_volume(image, volume, inside, (20, 20), np.random.default_rng(0))
    assert mask.shape == (1, 1, 3, 20, 20) and mask.all() and lists.tolist() == [list(TWO)]


def test_batches_are_observed_until_each_list_has_been_seen_often_enough():
    sampler, drawn = CandidateHints(IGNORE), 0

    def loader():
        nonlocal drawn
        while True:
            drawn += 1
            yield batch_of(halves(-1, 1, 2), 1, [ALL, ONE, TWO])

    sampler.observe_batches(loader())
    assert sum(sampler.seen.values()) == 2 * KEPT and drawn == KEPT


def test_it_can_be_sent_to_a_worker():
    sampler = CandidateHints(IGNORE)
    sampler(batch_of(halves(-1, 1), 1, [ALL, ONE]))
    assert pickle.loads(pickle.dumps(sampler)).seen == sampler.seen
