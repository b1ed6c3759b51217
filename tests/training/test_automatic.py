"""The settings that are chosen from what is annotated in the training cases."""
from __future__ import annotations

from dataclasses import replace

import pytest

from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED
from nnunet_confkd.errors import InputError
from nnunet_confkd.training.automatic import (
    AUTOMATIC,
    COMPLETE_AT,
    LABEL_AT,
    TOGETHER_AT,
    Annotations,
    choose,
    choose_network,
)
from nnunet_confkd.training.second_stage import completing_branch
from nnunet_confkd.training.settings import Settings

BASELINE = Settings(weight_teacher=0.0, weight_kl=0.0, weight_entropy=0.0)


def annotations(full=(1000,), partial=(), unlabelled: int = 1, background: int = 50, hidden=()) -> Annotations:
    """Cases with so many annotated voxels of the foreground; the annotations of unlabelled ones are seen by nobody."""
    cases = [*((FULL, n, 9 * n) for n in full), *((PARTIAL, n, background) for n in partial),
             *[(UNLABELLED, 70, 70)] * unlabelled]
    kinds, foreground, back = ({i: case[j] for i, case in enumerate(cases)} for j in range(3))
    others = {"not trained on": 10 ** 6}
    return Annotations(kinds, foreground | others, back | others, hidden)


SCRIBBLES = annotations(partial=[300] * 5)
ERODED = annotations(partial=[80] * 5, background=7000)
BLOBS = annotations(partial=[80] * 5, background=0)  # the foreground alone
POINTS = annotations(partial=[40] * 5, background=5)
NO_LABELS = annotations(unlabelled=5)


def chosen(data: Annotations, settings: Settings = Settings(), batch_size: int = 4, ignore_label: bool = True) -> dict:
    found = choose(settings, data, batch_size, ignore_label)
    assert replace(found, **{name: getattr(settings, name) for name in AUTOMATIC}) == settings, "no other is changed"
    return {name: getattr(found, name) for name in AUTOMATIC}


TEACHER, COMPLETES, ALONE = (1, 3, 0.01), (1, 0, 0.01), (0, 0, 0)


@pytest.mark.parametrize("data, with_teacher, without", [
    (SCRIBBLES, (*TEACHER, 0.5, True, False, 4, True, 0, 0, 0, 0.25), (0.25, True, 0)),
    (ERODED, (*COMPLETES, 0.5, True, True, 4, True, 0.25, 1, 0, 0.25), (0.25, True, 1)),
    (BLOBS, (*TEACHER, 0.5, True, True, 0, False, 0.5, 0, 0, 0.25), (0.25, False, 0)),
    (POINTS, (*ALONE, 0.75, False, False, 4, True, 0, 0, 0, 0), (0.75, False, 0)),
    (NO_LABELS, (*ALONE, 1, False, False, 0, False, 0.4, 0, 0.5, 0), (1, False, 0)),
    (annotations(unlabelled=0), (*TEACHER, 1, False, True, 0, False, 0, 0, 0, 0.25), (1, False, 0))],
    ids=("scribbles", "eroded", "blobs", "points", "no labels", "all full"))
def test_each_kind_of_labels_gets_its_settings(data, with_teacher, without):
    assert chosen(data) == dict(zip(AUTOMATIC, with_teacher))
    found = chosen(data, BASELINE)
    assert (found["full_share"], found["equal_kinds"], found["prior_correction"]) == without


@pytest.mark.parametrize("data", [SCRIBBLES, ERODED, BLOBS, POINTS], ids=("scribbles", "eroded", "blobs", "points"))
@pytest.mark.parametrize("values", [(1.0, 2.0, 0.1, 0.3, False, True, 2, True, 0.5, 0.5, 0.0, 0.2),
                                    (1.0, 0.0, 0.0, 0.4, True, False, 0, False, 0.0, 0.0, 0.0, 0.0)], ids=str)
def test_what_is_set_is_kept(data, values):
    block = dict(zip(AUTOMATIC, values))
    assert chosen(data, Settings(**block)) == block


@pytest.mark.parametrize("full, partial, share", [
    # few annotations: the share of the annotated foreground; there is no teacher, unless a KL is asked for
    ([100], [5] * 30, (0.4, 0.4, 0.5)), ([100] * 3, [5] * 30, (2 / 3, 2 / 3, 2 / 3)),
    ([100], [5] * 99, (0.25, 0.25, 0.5)), ([100], [5], (0.75, 0.75, 0.75)), ([90], [], (1, 1, 0.75)),
    ([0], [0, 0], (0.5, 0.5, 0.5)),
    # many: the share of the cases
    ([100], [10] * 30, (0.5, 0.25, 0.5)), ([100] * 20, [6] * 30, (0.5, 0.4, 0.5)),
    ([100] * 20, [6] * 10, (2 / 3, 2 / 3, 2 / 3)), ([100] * 20, [6], (0.75, 0.75, 0.75))])
def test_the_share_of_full_images_follows_from_what_is_annotated(full, partial, share):
    found = [chosen(annotations(full, partial), settings)["full_share"]
             for settings in (Settings(), BASELINE, Settings(weight_kl=3.0))]
    assert found == pytest.approx(share)


@pytest.mark.parametrize("full, partial, part", [([100], [30, 50], 0.4), ([0], [30, 50], 0), ([100], [0, 0], 0),
                                                 ([100], [], 0), ([100, 300], [5, 15], 0.05)])
def test_the_annotated_part_compares_partially_with_fully_annotated_cases(full, partial, part):
    assert annotations(full, partial).part == pytest.approx(part)
    fold = annotations([1000, *full], [900, *partial])
    whole = replace(fold, dataset={case: kind for case, kind in fold.kinds.items() if fold.foreground[case] < 900})
    assert whole.part == pytest.approx(part), "all folds count the same cases"


@pytest.mark.parametrize("foreground, background, sparser", [
    (10, 800, True), (10, 90, False), (10, 60, False), (10, 0, False), (0, 0, False)])
def test_eroded_masks_annotate_the_foreground_less_densely(foreground, background, sparser):
    data = annotations([100], [foreground], background=background)
    assert data.foreground_is_sparser is sparser
    assert chosen(data)["prior_correction"] == sparser
    assert chosen(data, ignore_label=False)["prior_correction"] == 0
    assert not annotations([], [foreground], background=background).foreground_is_sparser


def test_equal_weights_need_two_kinds_of_images_apart():
    wanted = Settings(equal_kinds=True)
    assert chosen(SCRIBBLES, wanted)["equal_kinds"] and not chosen(SCRIBBLES, wanted, batch_size=1)["equal_kinds"]
    assert not chosen(NO_LABELS, wanted)["equal_kinds"] and chosen(NO_LABELS, wanted)["cutmix"] == 0.5
    assert not chosen(SCRIBBLES, Settings(cutmix=0.5))["equal_kinds"]
    assert not chosen(BLOBS, Settings(kl_images="full"))["equal_kinds"], "the KL does not act on the others"


def test_cases_that_lack_classes_are_not_mixed_and_have_no_correction_of_their_own():
    data = replace(ERODED, hidden=[case for case, kind in ERODED.kinds.items() if kind == PARTIAL])
    assert (chosen(data)["equal_kinds"], chosen(data)["prior_correction"]) == (False, 0)
    assert chosen(data, Settings(prior_correction=1.0))["prior_correction"] == 0
    assert chosen(replace(NO_LABELS, hidden=[0]))["cutmix"] == 0, "the teacher learns from a case that lacks classes"
    assert chosen(NO_LABELS, Settings(kl_images="full", weight_kl=1.0))["cutmix"] == 0


def test_hints_reach_further_where_background_is_annotated():
    assert [chosen(data)["hint_reach"] for data in (SCRIBBLES, ERODED, BLOBS, NO_LABELS)] == [4, 4, 0, 0]
    for data, reach in ((BLOBS, 2), (ERODED, 0)):
        assert chosen(data, Settings(hint_reach=reach))["hint_reach"] == reach
    hidden = replace(ERODED, hidden=[case for case, kind in ERODED.kinds.items() if kind == PARTIAL])
    assert chosen(hidden)["hint_reach"] == 0, "a value of 0 need not be background"


def test_a_watershed_needs_annotated_background_and_hints_that_are_labels():
    found = [chosen(data)["hint_watershed"] for data in (SCRIBBLES, ERODED, BLOBS, NO_LABELS)]
    assert found == [True, True, False, False]
    assert chosen(BLOBS, Settings(hint_watershed=True))["hint_watershed"]
    of_one = replace(BLOBS, background=BLOBS.background | {1: 1})
    assert chosen(of_one)["hint_reach"] == 4 and not chosen(of_one)["hint_watershed"], "one case alone has background"
    assert not choose_network(Settings(), SCRIBBLES, regions=True).hint_watershed
    one_lacks_classes = replace(SCRIBBLES, hidden=[1])
    assert chosen(one_lacks_classes)["hint_reach"] == 4 and not chosen(one_lacks_classes)["hint_watershed"]
    for data, regions, reason in ((SCRIBBLES, True, "regions"), (one_lacks_classes, False, "not annotated for all")):
        with pytest.raises(InputError, match=rf'hint_watershed is true, but .*{reason}.*set "hint_watershed": false'):
            choose(Settings(hint_watershed=True), data, batch_size=4, ignore_label=True, regions=regions)


def test_a_teacher_that_completes_labels_needs_no_kl_and_trains_the_encoder():
    for data in (SCRIBBLES, ERODED, POINTS):
        found = chosen(data, Settings(complete_at=0.25))
        assert (found["weight_teacher"], found["weight_kl"], found["teacher_trains_encoder"]) == (1, 0, True)
        assert chosen(data, Settings(complete_at=0.25, weight_kl=2.0))["weight_kl"] == 2, "in the first stage"


def test_the_teacher_completes_eroded_masks_unless_a_setting_is_against_it():
    assert chosen(ERODED)["complete_at"] == COMPLETE_AT
    denser = {density: annotations(partial=[100] * 5, background=density * 900) for density in (1, 3, 4)}
    assert [data.background_density for data in denser.values()] == pytest.approx([1, 3, 4])
    assert [chosen(data)["complete_at"] for data in denser.values()] == [0, 0, COMPLETE_AT]
    for name, value in (("weight_kl", 0.0), ("weight_kl", 1.0), ("weight_student", 0.0), ("weight_teacher", 0.0),
                        ("teacher_hints", False), ("complete_at", 0.0), ("kl_images", "full"), ("cutmix", 0.5)):
        assert chosen(ERODED, Settings(**{name: value}))["complete_at"] == 0, name
    assert chosen(ERODED, Settings(complete_at=0.0))["weight_kl"] == 3
    assert chosen(ERODED, Settings(hint_watershed=False))["complete_at"] == COMPLETE_AT
    assert not choose_network(Settings(), ERODED, two_stages=False).complete_at
    assert not choose_network(Settings(), ERODED, regions=True).complete_at
    four_of_five = replace(ERODED, background=ERODED.background | {1: 0})
    assert four_of_five.background_density > 4 and not chosen(four_of_five)["complete_at"]
    assert not chosen(replace(ERODED, hidden=[1]))["complete_at"]
    few = annotations(partial=[30] * 5, background=7000)
    assert (few.part < 0.055, chosen(few)["complete_at"]) == (True, 0)


def test_both_branches_complete_blobs_in_long_trainings_unless_a_setting_is_against_it():
    found = choose_network(Settings(), BLOBS)
    assert (found.complete_at, found.weight_kl, completing_branch(found)) == (TOGETHER_AT, 3, "mean")
    for reason in ("long", "two_stages", "regions"):
        found = choose_network(Settings(), BLOBS, **{reason: reason == "regions"})
        assert (found.complete_at, found.weight_kl) == (0, 3), reason
    for name, value in (("weight_kl", 0.0), ("weight_kl", 1.0), ("weight_student", 0.0), ("weight_teacher", 0.0),
                        ("teacher_hints", False), ("complete_at", 0.0), ("kl_images", "full"), ("cutmix", 0.5)):
        assert chosen(BLOBS, Settings(**{name: value}))["complete_at"] == 0, name
    assert not chosen(replace(BLOBS, hidden=[1]))["complete_at"]
    assert not chosen(replace(BLOBS, background=BLOBS.background | {1: 1}))["complete_at"], "one case has background"
    assert not chosen(annotations(partial=[40] * 5, background=0))["complete_at"], "too few annotations"
    asked = choose_network(Settings(complete_at=0.3), BLOBS, long=False)
    assert (asked.complete_at, asked.weight_kl) == (0.3, 3)
    with pytest.raises(InputError, match=r"never act, because complete_at \(0.2\) is not above kl_ramp_start"):
        choose_network(Settings(complete_at=0.2), BLOBS)
    teacher = choose_network(Settings(), ERODED)
    assert (completing_branch(teacher), completing_branch(choose_network(Settings(), NO_LABELS))) == (
        "teacher", "student")


@pytest.mark.parametrize("settings, expected", [
    ({}, LABEL_AT), ({"complete_at": 0.2}, 0.2), ({"complete_at": 0.0}, 0), ({"cutmix": 0.0}, LABEL_AT),
    ({"full_share": 0.5}, LABEL_AT), ({"weight_teacher": 0.0}, 0), ({"weight_kl": 3.0}, 0), ({"weight_kl": 0.0}, 0),
    ({"weight_entropy": 0.1}, 0), ({"unlabelled_share": 0.0}, 0), ({"weight_student": 0.0}, 0)])
def test_the_network_labels_unlabelled_cases_unless_a_setting_is_against_it(settings, expected):
    found = chosen(NO_LABELS, Settings(**settings))
    assert found["complete_at"] == expected
    if expected:
        assert found["weight_teacher"] == found["weight_kl"] == 0
        assert found["full_share"] == settings.get("full_share", 1)
    assert settings or not chosen(replace(NO_LABELS, hidden=[1]))["complete_at"]
    assert not choose_network(Settings(), NO_LABELS, two_stages=False).complete_at


def test_an_encoder_that_only_the_teacher_could_train_is_trained_by_it():
    assert chosen(SCRIBBLES, Settings(weight_student=0.0))["teacher_trains_encoder"]
    assert chosen(POINTS, Settings(weight_student=0.0))["teacher_trains_encoder"]
    assert (chosen(NO_LABELS, Settings(weight_kl=1.0))["cutmix"], chosen(
        NO_LABELS, Settings(weight_kl=1.0, weight_student=0.0))["cutmix"]) == (0.5, 0), "it would learn from no label"


def test_with_few_annotations_or_none_there_is_a_teacher_only_if_a_kl_is_asked_for():
    for data in (POINTS, NO_LABELS):
        asked, unset = chosen(data, Settings(weight_kl=1.0)), chosen(data)
        assert [asked[name] for name in AUTOMATIC[:3]] == [1, 1, 0.01] and asked["teacher_trains_encoder"]
        assert (asked["full_share"], asked["unlabelled_share"]) == (0.75, 0.25)
        assert [unset[name] for name in AUTOMATIC[:3]] == [0, 0, 0]
        itself = {"complete_at": LABEL_AT} if data is NO_LABELS else {}
        assert unset == chosen(data, BASELINE) | itself, "it is the trainer without a teacher"
        assert chosen(data, Settings(weight_kl=0.0))["weight_teacher"] == 1, "an ablation of the KL has two decoders"
        assert chosen(data, Settings(weight_student=0.0))["weight_teacher"] == 1, "somebody must learn"
        assert chosen(data, Settings(weight_teacher=2.0))["weight_kl"] == 3
    assert chosen(annotations(partial=[40], unlabelled=50))["weight_teacher"] == 0, "other cases are unlabelled"
    assert chosen(annotations(unlabelled=0))["weight_kl"] == 3
    assert chosen(SCRIBBLES, Settings(weight_teacher=0.0))["weight_kl"] == 0, "there is no teacher"
    small_organ = replace(POINTS, hidden=[case for case, kind in POINTS.kinds.items() if kind == PARTIAL])
    assert chosen(small_organ)["weight_kl"] == 3, "all of a small organ may be annotated"
    assert {**chosen(SCRIBBLES, Settings(weight_kl=0.0)), "weight_kl": 3} == chosen(SCRIBBLES), "nothing else differs"


def test_unlabelled_images_are_drawn_only_if_they_have_something_to_teach():
    both = annotations(partial=[300] * 5, unlabelled=5)
    assert chosen(both)["unlabelled_share"] == 0.25 and chosen(both, BASELINE)["unlabelled_share"] == 0
    assert chosen(both, replace(BASELINE, weight_entropy=0.01))["unlabelled_share"] == 0.25
    for settings, shares in ((Settings(weight_kl=1.0, kl_images="full"), (0.75, 0.25)),  # by the entropy
                             (Settings(weight_kl=1.0, kl_images="full", weight_entropy=0.0), (1, 0)),
                             (Settings(weight_kl=1.0, weight_entropy=0.0), (0.75, 0.25))):
        found = chosen(NO_LABELS, settings)
        assert (found["full_share"], found["unlabelled_share"]) == shares
