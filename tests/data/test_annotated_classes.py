"""The entry "annotated_classes" of dataset.json: what it means, what is wrong with it, and what a training needs."""
from __future__ import annotations

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_confkd.data.annotated_classes import (
    annotated_classes,
    heads_of,
    possible_values,
    require_annotated,
    teaching_cases,
)
from nnunet_confkd.data.json_files import changed_since_planning, malformed, planning_text
from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED, decide_kinds
from nnunet_confkd.errors import InputError

LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3, "ignore": 4}
REGIONS = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
COUNTS = {"a": {-1: 2, 0: 9, 1: 5, 2: 0, 3: 0, 4: 0}, "b": {-1: 0, 0: 9, 1: 1, 2: 2, 3: 3, 4: 7}}


def read(table, labels=None, counts=None):
    return annotated_classes({"labels": LABELS if labels is None else labels, "annotated_classes": table},
                             COUNTS if counts is None else counts)


# ---- what it means --------------------------------------------------------------------------------------------------

def test_classes_have_the_heads_of_nnunet():
    assert heads_of(LABELS) == {"liver": (1, {1}), "spleen": (2, {2}), "kidney": (3, {3})}
    assert heads_of(REGIONS) == {"whole": (0, {1, 2}), "core": (1, {2})}
    manager = LabelManager(REGIONS, [1, 2])
    assert [set(region) for region in manager.foreground_regions] == [values for _, values in
                                                                      heads_of(REGIONS).values()]


def test_a_case_lists_its_classes_and_the_background():
    assert read({"a": ["liver"]}) == {"a": (True, True, False, False)}
    assert read({"a": ["liver", "kidney"]}) == {"a": (True, True, False, True)}


def test_regions_have_no_background():
    counts = {"a": {0: 9, 1: 5, 2: 0, 3: 0}}
    assert read({"a": ["whole"]}, REGIONS, counts) == {"a": (True, False)}
    assert read({"a": ["core"]}, REGIONS, {"a": {0: 9, 2: 1}}) == {"a": (False, True)}


def test_a_case_that_lists_all_classes_is_as_one_without_an_entry():
    assert read({"b": ["kidney", "liver", "spleen"]}) == read({}) == annotated_classes({"labels": LABELS}, COUNTS) == {}


def test_a_case_with_hidden_classes_is_partially_annotated():
    with_ignore, without = LabelManager(LABELS, None), LabelManager({"background": 0, "liver": 1, "spleen": 2}, None)
    assert decide_kinds(COUNTS, with_ignore)["a"] == FULL
    assert decide_kinds(COUNTS, with_ignore, None, {"a"}) == {"a": PARTIAL, "b": PARTIAL}
    assert decide_kinds(COUNTS, with_ignore, {"a": UNLABELLED}, {"a"})["a"] == UNLABELLED
    counts = {"a": {0: 1, 1: 1, 2: 0}}
    assert decide_kinds(counts, without, {"a": PARTIAL}, {"a"}) == {"a": PARTIAL}
    with pytest.raises(InputError, match="a: declared unlabelled, but the labels in dataset.json have no \"ignore\""):
        decide_kinds(counts, without, {"a": UNLABELLED}, {"a"})


def test_a_case_with_hidden_classes_cannot_be_declared_full():
    with pytest.raises(InputError, match='a: declared full, but "annotated_classes" lacks some of its classes'):
        decide_kinds(COUNTS, LabelManager(LABELS, None), {"a": FULL}, {"a"})


def test_a_complete_label_agrees_with_the_listed_classes():
    assert possible_values(LABELS, (True, True, False, False)) == {0: (0, 2, 3), 2: (0, 2, 3), 3: (0, 2, 3)}
    assert possible_values(LABELS, (True, True, True, True)) == {}
    assert possible_values(REGIONS, (True, False)) == {1: (1, 2), 2: (1, 2)}
    assert possible_values(REGIONS, (False, True)) == {0: (0, 1), 1: (0, 1)}


# ---- what is wrong --------------------------------------------------------------------------------------------------

def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(InputError) as error:
        read({"a": ["livre"], "b": ["liver"], "c": ["liver"]})
    assert str(error.value).split("\n  ") == [
        'dataset.json, "annotated_classes":',
        "a: 'livre' is no class in \"labels\" (did you mean 'liver'?); list some of liver, spleen, kidney",
        "b: its label has 2 voxels of value 2 (spleen), which it does not list. Add the class to the list, or set "
        "these voxels to 0 in the label and preprocess again",
        "b: its label has 3 voxels of value 3 (kidney), which it does not list. Add the class to the list, or set "
        "these voxels to 0 in the label and preprocess again",
        "c: there is no such case"]


@pytest.mark.parametrize("table, text", [
    ([], r'"annotated_classes" must be an object \{case: \[class, ...\]\}, got \[\]'),
    ({"a": "liver"}, 'a: must be a list of classes, got "liver"'),
    ({"a": [1]}, r"a: must be a list of classes, got \["),
    ({"a": []}, "a: lists no class. List at least one"), ({"a": ["background"]}, "a: 'background' is no class"),
    ({"a": ["ignore"]}, "a: 'ignore' is no class")])
def test_an_entry_of_another_form_is_refused(table, text):
    with pytest.raises(InputError, match=text):
        read(table)


def test_a_value_of_regions_must_belong_to_a_listed_one():
    assert read({"a": ["core"]}, REGIONS, {"a": {0: 9, 1: 0, 2: 5}})
    with pytest.raises(InputError, match=r"a: its label has 5 voxels of value 1 \(whole\), which it does not list"):
        read({"a": ["core"]}, REGIONS, {"a": {0: 9, 1: 5, 2: 5}})


def test_the_form_of_the_entry_is_checked_in_dataset_json():
    described = {"labels": LABELS, "channel_names": {"0": "CT"}, "numTraining": 2, "file_ending": ".nii.gz"}
    assert not malformed(described | {"annotated_classes": {"a": ["liver"]}})
    for wrong in ([], {"a": "liver"}, {"a": [3]}):
        assert list(malformed(described | {"annotated_classes": wrong})) == ["annotated_classes"]


def test_an_edit_after_planning_is_noticed_and_needs_no_preprocessing():
    keys = changed_since_planning({"annotated_classes": {"a": ["liver"]}}, {})
    assert keys == ["annotated_classes"]
    assert "Copy the first file over the second" in planning_text("raw", "planned", keys, 7)


# ---- what a training needs ------------------------------------------------------------------------------------------

def bits(text: str) -> tuple[bool, ...]:
    return tuple(letter == "1" for letter in text)


def test_full_cases_teach_if_there_are_any():
    kinds = {"f": FULL, "p": PARTIAL, "u": UNLABELLED, "q": PARTIAL}
    assert teaching_cases(kinds, {"p": bits("110"), "q": bits("111")}, ["f", "p", "q"]) == {"f"}


@pytest.mark.parametrize("lists, complete, chosen", [
    ({"a": "1100", "b": "1110", "c": "1001"}, "abc", set()),  # b could teach, but not the third class
    ({"a": "1100", "b": "1101", "c": "1010", "d": "1011"}, "abcd", {"b", "d"}),
    ({"a": "1100", "b": "1101", "c": "1010", "d": "1011"}, "acd", set()),  # b has ignored voxels
    ({"a": "1110", "b": "1101", "c": "1011"}, "abc", set()),  # no list is a part of another
    ({"a": "1100", "b": "1100"}, "ab", set())])
def test_without_full_cases_those_teach_on_which_others_can_be_simulated(lists, complete, chosen):
    hidden = {case: bits(text) for case, text in lists.items()}
    assert teaching_cases(dict.fromkeys(lists, PARTIAL), hidden, complete) == chosen


def test_every_class_must_be_annotated_in_some_training_case():
    hidden = {"a": bits("1100"), "b": bits("1010")}
    kinds = {"a": PARTIAL, "b": PARTIAL}
    with pytest.raises(InputError, match="no training case is annotated for kidney"):
        require_annotated(kinds, hidden, LABELS, teachers=True)
    with pytest.raises(InputError, match="no training case is annotated for kidney"):
        require_annotated(kinds | {"u": UNLABELLED}, hidden, LABELS, teachers=True)
    require_annotated(kinds | {"c": PARTIAL}, hidden, LABELS, teachers=True)
    with pytest.raises(InputError, match="there is no teacher. Train without one .-tr ConfKDTrainer_partialOnly."):
        require_annotated(kinds | {"c": PARTIAL}, hidden, LABELS, teachers=False)
