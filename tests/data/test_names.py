from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_confkd.data.names import (
    Named,
    cases_of,
    channel_problems,
    looks_like_label,
    matched,
    without_affixes,
)


def _named(*names, folder="images", **more):
    return [Named(Path(folder, f"{name}.nii.gz"), name, **more) for name in names]


def _pairs(images, labels):
    """{case: name of its label} and what is wrong."""
    images, labels = _named(*images), _named(*labels, folder="labels")
    fits, problems = matched(cases_of(images, labels), labels, "images")
    return {case: label.name for case, label in fits.items()}, problems


@pytest.mark.parametrize("image, label, case", [
    ("p01", "p01", "p01"), ("p01", "p01_seg", "p01"), ("p01", "p01-label", "p01"), ("p01", "p01.seg", "p01"),
    ("p01", "p01-mask", "p01"), ("p01", "p01_scribble", "p01"), ("p01", "p01_SEG", "p01"), ("p01", "mask_p01", "p01"),
    ("p01_0000", "p01", "p01"), ("p01_0000", "p01_0000.seg", "p01"), ("p01_0000", "p01_seg", "p01"),
    ("p01", "p01_seg-label", "p01"), ("img0001", "label0001", "img0001"), ("p01_image", "p01_mask", "p01_image"),
    ("p01", "Segmentation_p01", "p01"), ("masked_brain", "masked_brain", "masked_brain")])
def test_affixes_of_annotation_tools_are_taken_off(image, label, case):
    assert _pairs([image, "q7" + ("_0000" if image.endswith("0000") else "")], [label]) == ({case: label}, [])


def test_a_word_within_a_name_stays():
    assert without_affixes("unmasked_p01") == ["unmasked_p01"] and without_affixes("p01segment") == ["p01segment"]
    assert without_affixes("seg") == ["seg"] and not looks_like_label("p01") and looks_like_label("p01_seg")


def test_as_little_as_possible_is_taken_off():
    assert _pairs(["p01", "p01_seg"], ["p01_seg"]) == ({"p01_seg": "p01_seg"}, [])


def test_a_label_of_two_images_is_an_error_that_names_both():
    found, (problem,) = _pairs(["p01_img", "p01_image"], ["p01_seg"])
    assert found == {}
    assert problem.startswith("labels/p01_seg.nii.gz: belongs to images/p01_img.nii.gz or to images/p01_image.nii.gz")


def test_two_labels_of_an_image_are_an_error_that_names_both():
    _, (problem,) = _pairs(["p01", "p02"], ["p01_seg", "p01-label"])
    assert "images/p01.nii.gz: two labels belong to it" in problem
    assert "labels/p01_seg.nii.gz and labels/p01-label.nii.gz" in problem


def test_a_label_without_an_image_gets_the_advice_of_a_pattern():
    _, problems = _pairs(["p01", "p02"], ["p01_JD_v2", "p02_JD_v2", "x"])
    advice = ("has no image in images; a pattern tells what the name of the case is: --label-pattern "
              "'{case}_JD_v2.nii.gz'")
    assert problems == [f"labels/p01_JD_v2.nii.gz: {advice}", f"labels/p02_JD_v2.nii.gz: {advice}",
                        "labels/x.nii.gz: has no image in images"]


@pytest.mark.parametrize("option", ["--full-labels '", "--source 'X="])
def test_the_advised_pattern_is_for_these_labels_alone_where_there_are_others(option):
    labels = _named("p01_JD_v2", folder="labels")
    _, (problem,) = matched({"p01": [Path("p01.nii.gz")]}, labels, "images", option)
    assert problem.endswith(f"the name of the case is: {option}labels/{{case}}_JD_v2.nii.gz'")


def test_the_longest_case_in_a_name_is_taken():
    _, (problem,) = _pairs(["p1", "p11"], ["p11_JD"])
    assert problem.endswith("'{case}_JD.nii.gz'")


def test_names_that_a_pattern_found_are_exact():
    labels = _named("p01_seg", folder="labels", exact=True)
    fits, problems = matched({"p01": [Path("p01.nii.gz")]}, labels, "images")
    assert fits == {} and problems == ["labels/p01_seg.nii.gz: has no image in images"]


@pytest.mark.parametrize("images, labels, cases", [
    (["a_0000", "a_0001", "b_0000", "b_0001"], [], {"a": 2, "b": 2}),
    (["a_0000", "a_0001", "b_0000", "b_0001"], ["a_seg", "b"], {"a": 2, "b": 2}),
    (["a_0000", "b_0000"], ["a_0000.seg"], {"a": 1, "b": 1}),
    (["scan_0001", "scan_0002"], [], {"scan_0001": 1, "scan_0002": 1}),
    (["scan_0000", "scan_0001"], ["scan_0000_seg", "scan_0001_seg"], {"scan_0000": 1, "scan_0001": 1}),
    (["a_0000", "a_0001", "b"], ["a"], {"a": 2, "b": 1}),
    (["a", "b"], ["a"], {"a": 1, "b": 1})])
def test_channels_are_told_from_numbers_of_cases(images, labels, cases):
    found = cases_of(_named(*images), _named(*labels))
    assert {case: len(files) for case, files in found.items()} == cases


@pytest.mark.parametrize("images, problem", [
    (["a_0000", "a_0001", "b_0001", "b_0002"], "the case 'b' has no image b_0000"),
    (["a_0000", "b_0001"], "the case 'b' has no image b_0000"),
    (["a_0000", "a_0001", "b_0000", "b_0002"], "the case 'b' has no image b_0001"),
    (["a_0000", "a_0001", "b"], None), (["a", "b"], None), (["scan_0001", "scan_0002"], None)])
def test_a_case_without_its_first_channels_is_told(images, problem):
    named = _named(*images)
    found = channel_problems(cases_of(named, _named("a", "b")), named)
    assert [problem in text for text in found] == [True] * bool(problem)


def test_a_case_has_a_file_of_each_pattern_and_not_two_of_one():
    def problems(*files: tuple[str, int]) -> list[str]:
        named = [Named(Path(f"{case}/{number}.nii.gz"), case, True, channel)
                 for number, (case, channel) in enumerate(files)]
        return channel_problems(cases_of(named), named, ["{case}/T1.nii.gz", "{case}/T2.nii.gz"])

    assert problems(("a", 0), ("a", 1), ("b", 0), ("b", 1)) == []
    (text,) = problems(("a", 0), ("a", 1), ("b", 1))
    assert "the case 'b' has no image b/T2.nii.gz" not in text and "the case 'b' has no image b/T1.nii.gz" in text
    (text,) = problems(("a", 0), ("a", 0))
    assert "several files of one channel" in text and "give one pattern for each channel" in text


def test_several_patterns_are_the_channels_in_their_order():
    t2, t1 = _named("p01", folder="t2", exact=True, channel=1), _named("p01", folder="t1", exact=True, channel=0)
    assert cases_of([*t2, *t1]) == {"p01": [Path("t1/p01.nii.gz"), Path("t2/p01.nii.gz")]}
