"""What is drawn for a batch, where its patches lie, and which label the padding gets."""
from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED
from nnunet_confkd.errors import InputError
from nnunet_confkd.training.batches import (
    LabelPadding,
    ListedClasses,
    StratifiedLoader,
    TrainingCases,
    class_probabilities,
    full_images_per_batch,
    label_padding,
    real_hints,
    rounding_text,
)

IGNORE = 3
WITH_IGNORE = LabelManager({"background": 0, "a": 1, "b": 2, "ignore": IGNORE}, None)
WITHOUT_IGNORE = LabelManager({"background": 0, "a": 1, "b": 2}, None)


class Cases:
    """Cases in memory: the image holds the case's number, so that a batch tells what is in it."""

    def __init__(self, kinds: dict[str, str], shape=(1, 12, 12)):
        self.kinds, self.shape, self.identifiers = kinds, shape, sorted(kinds)

    def load_case(self, case):
        data = np.full((1, *self.shape), self.identifiers.index(case), np.float32)
        seg = np.full((1, *self.shape), IGNORE, np.int16)
        if self.kinds[case] == FULL:
            seg[:] = 0
        if self.kinds[case] != UNLABELLED:
            seg[0, 0, 5, 6] = 1
        where = {label: np.argwhere(seg == label) for label in (1, 2)}
        where[(-1, 0, 1, 2)] = np.argwhere(seg != IGNORE)
        return data, seg, None, {"class_locations": where}


@pytest.mark.parametrize("full, padding", [(False, 3), (True, 0)])
@pytest.mark.parametrize("labels", ([-1, 0, 3, 1], [-1, 0, 2, 1], [-1, -1, -1, -1]))
def test_padding_is_ignored_in_images_that_are_not_full(labels, full, padding):
    """Also in a patch whose own voxels are all annotated: nobody annotated what lies around it."""
    before = torch.tensor([[labels], [[-1, 1, 2, 3]]], dtype=torch.int16)  # the second: a cascade's previous prediction
    step = LabelPadding(3)
    step.full = full
    after = step(segmentation=before.clone())["segmentation"]
    assert after.dtype == before.dtype
    assert after[0, 0].tolist() == [padding if label == -1 else label for label in labels]
    assert after[1, 0].tolist() == [0, 1, 2, 3]
    assert step.inside.tolist() == [[[label != -1 for label in labels]]]


def test_real_hints_of_a_whole_image_are_those_of_its_patches():
    label = np.array([[-1, 0, 3, 1], [2, -1, -1, 3]], np.int16)
    known, mask = real_hints(label, 3)
    step = LabelPadding(3)
    step.full = False
    patch = step(segmentation=torch.from_numpy(label)[None])["segmentation"][0]
    assert known.tolist() == patch.tolist() == [[3, 0, 3, 1], [2, 3, 3, 3]] and mask.tolist() == (known != 3).tolist()


def test_unknown_training_transforms_are_not_passed_over():
    for steps in ([], [RemoveLabelTransform(-1, 0)] * 2, [RemoveLabelTransform(4, 0)]):
        with pytest.raises(RuntimeError, match="^nnU-Net's training transforms .*: another version of nnU-Net\\?$"):
            label_padding(ComposeTransforms(steps), 3)


def test_where_nnunet_labels_the_padding_ours_takes_its_place():
    steps = [RemoveLabelTransform(1, 0), RemoveLabelTransform(-1, 0), RemoveLabelTransform(2, 0)]
    transforms = ComposeTransforms(list(steps))
    label_padding(transforms, 3)
    assert [transforms.transforms[0], transforms.transforms[2]] == [steps[0], steps[2]]
    assert isinstance(transforms.transforms[1], LabelPadding) and transforms.transforms[1].ignore_label == 3


KINDS = {f"f{i}": FULL for i in range(3)} | {f"p{i}": PARTIAL for i in range(9)} | {"u": UNLABELLED}


def loader(batch_size, share=0.5, kinds=KINDS, oversample=0.33, **options):
    return StratifiedLoader(Cases(kinds), batch_size, (8, 8), (8, 8), WITH_IGNORE, kinds=kinds, full_share=share,
                            oversample_foreground_percent=oversample, **options)


def test_full_images_come_first_in_the_set_number():
    for batch_size, share, expected in (
        (2, 0.5, 1),
        (4, 0.5, 2),
        (12, 0.25, 3),
        (6, 1 / 6, 1),
        (5, 0.9, 4),
        (2, 0.01, 1),
        (2, 0.99, 1),
        (16, 0.99, 15),
        (5, 0.5, 3),
    ):
        dl = loader(batch_size, share)
        for _ in range(20):
            batch = next(dl)
            kinds = [KINDS[key] for key in batch["keys"]]
            assert batch["num_full"] == expected == kinds.count(FULL)
            assert kinds[:expected] == [FULL] * expected
            # the images are those that the keys name
            assert [dl.indices[int(i)] for i in batch["data"].amax((1, 2, 3))] == list(batch["keys"])


def test_without_other_cases_all_images_are_full():
    assert full_images_per_batch(4, 0.5, others=False) == 4
    batch = next(loader(4, kinds={"f0": FULL, "f1": FULL}))
    assert batch["num_full"] == 4


def test_unlabelled_images_that_teach_nothing_are_not_drawn():
    """Also with a set share of full images, and if all other images are unlabelled."""
    kinds = {"f0": FULL, "f1": FULL, "u0": UNLABELLED, "u1": UNLABELLED}
    for more, numbers in (({}, [4]), ({"p": PARTIAL}, [2])):
        dl = loader(4, kinds=kinds | more, unlabelled_share=0)
        for _ in range(10):
            batch = next(dl)
            assert [batch["num_full"]] == numbers and not {"u0", "u1"} & set(batch["keys"])
    assert next(loader(4, kinds=kinds))["num_full"] == 2


@pytest.mark.parametrize("batch_size, share, cutmix, gpus, expected", [
    (4, 0.25, 0.5, False, ""), (2, 0.5, 0.5, True, ""), (1, 0.25, 0.0, False, ""), (2, 1.0, 0.5, False, ""),
    (2, 0.75, 0.0, False, "1 of 2 images of each batch is fully annotated (full_share 0.75, rounded)."),
    (3, 0.5, 0.0, True, "2 of 3 images of each batch on each GPU are fully annotated (full_share 0.5, rounded)."),
    (1, 0.5, 0.5, True, "There is no CutMix, because a batch on each GPU has one image.")])
def test_what_small_batches_make_of_shares_is_said(batch_size, share, cutmix, gpus, expected):
    assert rounding_text(batch_size, share, cutmix, gpus) == expected


def test_without_a_full_case_there_is_nothing_to_draw_from():
    with pytest.raises(InputError, match="^no fully annotated case to draw from$"):
        loader(4, kinds={"p": PARTIAL, "u": UNLABELLED})


def test_without_an_ignore_label_no_place_of_annotated_voxels_is_asked_for():
    class Stock(Cases):
        def load_case(self, case):
            data, seg, previous, properties = super().load_case(case)
            del properties["class_locations"][-1, 0, 1, 2]  # nnU-Net keeps them beside an ignore label only
            return data, seg, previous, properties

    kinds = {"f0": FULL, "f1": FULL}
    batch = next(
        StratifiedLoader(
            Stock(kinds),
            4,
            (8, 8),
            (8, 8),
            WITHOUT_IGNORE,
            kinds=kinds,
            full_share=0.5,
            oversample_foreground_percent=0.33,
        )
    )
    assert batch["num_full"] == 4


def test_a_batch_is_completed_when_all_else_is_in_it():
    batch = next(loader(4, complete=[lambda batch: {**batch, "seen": set(batch)}]))
    assert batch["seen"] == {"data", "target", "keys", "num_full"} and batch["num_full"] == 2


def test_every_case_of_a_stratum_is_drawn_as_often():
    np.random.seed(0)
    dl, drawn = loader(4), Counter()
    for _ in range(1500):
        drawn.update(dl.get_indices())
    # 3000 draws from 3 full cases and 3000 from 10 others: 1000 and 300 each; five standard deviations are 129 and 82
    assert all(abs(drawn[case] - (1000 if case[0] == "f" else 300)) < (130 if case[0] == "f" else 83) for case in KINDS)


@pytest.mark.parametrize(
    "batch_size, share, unlabelled, partial_cases, unlabelled_cases, expected",
    [
        (
            4,
            0.5,
            0.25,
            12,
            500,
            (2, 1.5, 0.5),
        ),  # few partial among many unlabelled: in every batch partial images nonetheless
        (4, 0.5, 0.25, 57, 3, (2, 1.9, 0.1)),  # few unlabelled: no more often than they occur
        (4, 0.5, 0.25, 9, 0, (2, 2, 0)),
        (4, 0.5, 0.25, 0, 9, (2, 0, 2)),
        (4, 0.5, 0.0, 9, 9, (2, 2, 0)),
        (4, 0.5, 1.0, 3, 9, (2, 0.5, 1.5)),
        (1, 0.5, 0.25, 12, 500, (0.5, 0.375, 0.125)),
        (2, 0.5, 0.25, 12, 500, (1, 0.75, 0.25)),
        (10, 0.2, 0.25, 12, 500, (2, 6, 2)),
    ],
)
def test_each_batch_holds_the_set_shares_of_the_three_strata(
    batch_size, share, unlabelled, partial_cases, unlabelled_cases, expected
):
    kinds = (
        {"f": FULL}
        | {f"p{i}": PARTIAL for i in range(partial_cases)}
        | {f"u{i}": UNLABELLED for i in range(unlabelled_cases)}
    )
    dl = loader(batch_size, share, kinds, unlabelled_share=unlabelled)
    drawn = Counter()
    for number in range(400):
        keys = dl.get_indices()
        of_batch = [kinds[key] for key in keys]
        assert of_batch == sorted(of_batch, key=(FULL, PARTIAL, UNLABELLED).index) and len(keys) == batch_size
        drawn.update(of_batch)
        # regularly: at no time is a stratum two images away from its share
        assert all(
            abs(drawn[kind] - (number + 1) * wanted) < 2 for kind, wanted in zip((FULL, PARTIAL, UNLABELLED), expected)
        )


def test_patches_of_partial_images_hold_an_annotated_voxel_anywhere_in_their_middle_half():
    """nnU-Net centres them on it: a real hint would always lie in the middle, and a simulated one anywhere."""
    kinds = {"f": FULL, "p": PARTIAL}
    cases = Cases(kinds, (1, 40, 40))
    dl = StratifiedLoader(cases, 2, (10, 10), (8, 8), WITH_IGNORE, kinds=kinds, full_share=0.5,
                          oversample_foreground_percent=0.33)
    np.random.seed(0)
    annotated = np.zeros((1, 40, 40), bool)
    annotated[0, 20, 17] = True
    load = cases.load_case

    def one_voxel(case):
        data, seg, previous, properties = load(case)
        if case == "p":
            seg[0] = np.where(annotated, 1, IGNORE)
            properties = {"class_locations": {1: np.argwhere(seg == 1), 2: [], (-1, 0, 1, 2): np.argwhere(seg == 1)}}
        return data, seg, previous, properties

    cases.load_case = one_voxel
    seen = np.zeros((10, 10), int)
    for _ in range(500):
        target = next(dl)["target"][1, 0]
        assert (target == 1).sum() == 1
        seen += (target == 1).numpy()
    # the network gets the middle 8 x 8. In its middle 4 x 4: 31 times each, five standard deviations are 27
    middle = seen[3:7, 3:7]
    assert middle.sum() == 500 and middle.min() > 4 and middle.max() < 59


def test_patches_at_the_end_of_an_image_stay_as_far_inside_as_nnunets():
    kinds = {"f": FULL, "p": PARTIAL}
    dl = loader(2, kinds=kinds)
    dl.get_indices()
    dl.get_do_oversample(1)
    where = {1: np.array([[0, 0, 0, 0]]), (-1, 0, 1, 2): np.array([[0, 0, 0, 0]])}
    low, high = dl.get_bbox((1, 12, 12), True, where)
    assert low == [0, 0, 0] and high == [1, 8, 8]
    low, high = dl.get_bbox((1, 5, 12), False, where)  # smaller than a patch: in its middle
    assert low == [0, -2, 0] and high == [1, 6, 8]


def test_transforms_are_told_which_images_are_full_and_tell_where_the_image_is():
    transforms = ComposeTransforms([RemoveLabelTransform(-1, 0)])
    label_padding(transforms, IGNORE)
    kinds = {"f": FULL, "p": PARTIAL}
    dl = StratifiedLoader(Cases(kinds, (1, 8, 8)), 2, (10, 10), (10, 10), WITH_IGNORE, kinds=kinds, full_share=0.5,
                          oversample_foreground_percent=0.33, transforms=transforms)
    batch = next(dl)
    image = torch.zeros(10, 10, dtype=torch.bool)
    image[1:9, 1:9] = True
    inside, target = batch["inside"], batch["target"]
    assert inside.dtype == torch.bool and inside.shape == (2, 1, 10, 10) and torch.equal(inside[1, 0], image)
    assert 0 < inside[0].sum() < 100  # nnU-Net's patch of a full image may reach beyond its end
    assert (target[0][~inside[0]] == 0).all() and (target[1][~inside[1]] == IGNORE).all()


@pytest.mark.parametrize("share", [0.5, 0.25, 1 / 3])
def test_batches_of_one_alternate_in_the_set_proportion(share):
    dl = loader(1, share)
    full = [next(dl)["num_full"] for _ in range(120)]
    assert sum(full) == pytest.approx(120 * share)
    period = round(1 / share)
    assert all(sum(full[i:i + period]) == 1 for i in range(0, 120, period))


def test_batches_of_one_are_offset_by_worker_and_rank():
    first = [loader(1) for _ in range(3)]
    first[1].set_thread_id(1)
    first[2].offset = 1
    full = [[next(dl)["num_full"] for _ in range(4)] for dl in first]
    assert full[0] != full[1] == full[2] and np.add(full[0], full[1]).tolist() == [1] * 4


@pytest.mark.parametrize("batch_size, share", [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25), (12, 0.5), (7, 0.3)])
@pytest.mark.parametrize("oversample", [0.33, 0.0, 1.0])
def test_each_stratum_is_forced_to_the_foreground_as_often_as_stock_batches(batch_size, share, oversample):
    np.random.seed(1)
    dl = loader(batch_size, share, oversample=oversample)
    stock = nnUNetDataLoader(
        Cases(KINDS), batch_size, (8, 8), (8, 8), WITH_IGNORE, oversample_foreground_percent=oversample
    )
    wanted = np.mean([stock.get_do_oversample(i) for i in range(batch_size)])
    forced = {True: [], False: []}
    for _ in range(4000):
        keys = dl.get_indices()
        for i, key in enumerate(keys):
            forced[KINDS[key] == FULL].append(dl.get_do_oversample(i))
    for flags in forced.values():
        # at least 2000 draws each: five standard deviations of a coin are 0.056
        assert abs(np.mean(flags) - wanted) <= (0.056 if 0 < wanted < 1 else 0)


def test_probabilistic_oversampling_stays_nnunets():
    np.random.seed(0)
    dl = loader(4, probabilistic_oversampling=True, oversample=0.25)
    forced = [dl.get_do_oversample(0) for _ in range(2000)]
    assert np.mean(forced) == pytest.approx(0.25, abs=0.05)  # five standard deviations


def test_unlabelled_cases_give_random_crops_and_no_warning():
    kinds = {"f": FULL, "u": UNLABELLED}
    dl = StratifiedLoader(Cases(kinds, (1, 40, 40)), 2, (8, 8), (8, 8), WITH_IGNORE, kinds=kinds, full_share=0.5,
                          oversample_foreground_percent=0.33)
    corners = set()
    get_bbox = dl.get_bbox

    def remember(shape, force, where, *args):
        low, high = get_bbox(shape, force, where, *args)
        if not len(where[(-1, 0, 1, 2)]):
            corners.add(tuple(int(c) for c in low))
        return low, high

    dl.get_bbox = remember
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            next(dl)
    assert len(corners) > 20


def test_hidden_labels_are_ignored_everywhere():
    data = TrainingCases(Cases({"f": FULL, "p": PARTIAL}), ["p"], IGNORE)
    _, seg, _, properties = data.load_case("p")
    assert data.identifiers == data.dataset.identifiers != []
    assert (
        seg.dtype == np.int16
        and (seg == IGNORE).all()
        and not any(len(where) for where in properties["class_locations"].values())
    )
    _, seg, _, properties = data.load_case("f")
    assert (seg != IGNORE).all() and len(properties["class_locations"][1]) == 1


# ---- classes that are annotated in some cases and not in others ------------------------------------------------------

A, B = (True, True, False), (True, False, True)


def test_batches_tell_for_which_heads_each_image_is_annotated():
    batch = next(loader(4, complete=[ListedClasses({f"p{i}": A for i in range(9)}, 3)]))
    assert batch["listed"].dtype == torch.bool and batch["listed"].shape == (4, 3)
    assert [tuple(row.tolist()) for row in batch["listed"]] == [A if key[0] == "p" else (True,) * 3
                                                                for key in batch["keys"]]


def test_cases_of_a_rare_class_are_drawn_as_often_as_the_rule_says():
    """95 of class A and 5 of class B: of the draws by class a half is of B, of the others one in 20."""
    kinds = {f"p{i}": PARTIAL for i in range(100)} | {"f": FULL}
    hidden = {f"p{i}": A if i < 95 else B for i in range(100)}
    rare = [f"p{i}" for i in range(95, 100)]
    for share, expected in ((0.0, 0.05), (0.5, 0.275), (1.0, 0.5)):
        found = class_probabilities(kinds, hidden, share)
        assert set(found) == set(hidden) and sum(found.values()) == pytest.approx(1)
        assert sum(found[case] for case in rare) == pytest.approx(expected)
    np.random.seed(0)
    dl = loader(4, kinds=kinds, probabilities=class_probabilities(kinds, hidden, 0.5))
    drawn = [case for _ in range(1000) for case in dl.get_indices() if case != "f"]
    assert len(drawn) == 2000
    assert np.mean([case in rare for case in drawn]) == pytest.approx(0.275, abs=0.05)  # five standard deviations


def test_a_case_that_lists_a_common_class_alone_is_drawn_too():
    found = class_probabilities({"a": PARTIAL, "b": PARTIAL}, {"a": A}, 1.0)
    assert found == {"a": pytest.approx(0.25), "b": pytest.approx(0.75)}
    regions = class_probabilities({"a": PARTIAL, "b": PARTIAL}, {"a": (True, False)}, 1.0, regions=True)
    assert regions == found


def test_where_all_cases_are_annotated_for_all_classes_the_draws_stay_as_they_are():
    assert class_probabilities(KINDS, {}, 1.0) == {}
    assert set(class_probabilities(KINDS | {"q": PARTIAL}, {"q": A}, 1.0)) == {f"p{i}" for i in range(9)} | {"q"}


def test_without_full_cases_all_images_are_of_the_other_strata():
    kinds = {f"p{i}": PARTIAL for i in range(3)} | {"u": UNLABELLED}
    dl = loader(4, 0, kinds)
    for _ in range(5):
        batch = next(dl)
        assert batch["num_full"] == 0 and len(batch["keys"]) == 4
    assert full_images_per_batch(4, 0, others=True) == 0
