from __future__ import annotations

import pytest

from nnunet_confkd.data.listing import listed
from nnunet_confkd.errors import InputError


@pytest.fixture
def folder(tmp_path):
    for name in ("p01/T1.nii.gz", "p01/T2.nii.gz", "p01/seg.nii.gz", "p02/T1.nii.gz", "p02/T2.nii.gz", "[x]/T1.nii.gz",
                 "p03/p03_T1.nii.gz", "p04/p05_T1.nii.gz", "flat/a.nii.gz", "flat/b.NRRD", "flat/.hidden.nii.gz",
                 "flat/notes.txt", "flat/a_seg.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def _names(*args, **options):
    return [named.name for named in listed(*args, **options)]


def test_files_of_a_folder(folder):
    assert _names([folder / "flat"]) == ["a", "a_seg", "b"]


def test_single_files_and_patterns_of_a_shell(folder):
    assert _names([folder / "flat" / "b.NRRD", f"{folder}/flat/*_seg.nii.gz"]) == ["b", "a_seg"]


def test_a_pattern_finds_cases_and_channels(folder):
    found = listed([folder], ["{case}/T1.nii.gz", "{case}/T2.nii.gz"])
    assert [(named.name, named.channel, named.exact) for named in found] == [
        ("[x]", 0, True), ("p01", 0, True), ("p02", 0, True), ("p01", 1, True), ("p02", 1, True)]
    assert _names([f"{folder}/{{case}}/seg.nii.gz"]) == ["p01"]


def test_a_case_that_is_named_twice_is_the_same_one(folder):
    assert _names([folder], ["{case}/{case}_T1.nii.gz"]) == ["p03"]
    assert _names([folder], ["p0*/{case}_T1.nii.gz"]) == ["p03", "p05"]


def test_a_folder_whose_name_looks_like_a_pattern(folder):
    assert _names([folder / "[x]"]) == ["T1"] and _names([folder / "[x]"], ["{case}.nii.gz"]) == ["T1"]


def test_folders_with_a_file_for_each_class_are_labels(folder):
    assert _names([folder], labels=True) == ["[x]", "flat", "p01", "p02", "p03", "p04"] and _names([folder]) == []


@pytest.mark.parametrize("place, patterns, text", [
    ("nothing", None, "there is no such folder or file"), ("*.png", None, "there is no such folder or file"),
    (".", ["T1.nii.gz"], "a pattern needs {case}"), (".", ["{case}/FLAIR.nii.gz"], "nothing in it fits the pattern"),
    ("none/{case}.nii.gz", None, "none: there is no such folder")])
def test_what_is_not_there(folder, place, patterns, text):
    with pytest.raises(InputError) as error:
        listed([f"{folder}/{place}"], patterns)
    assert text in str(error.value)


def test_patterns_that_find_the_same_cases_are_channels_and_others_are_not(tmp_path):
    for file in ("p1/T1.nii.gz", "p1/T2.nii.gz", "p2/T1.nii.gz", "p2/T2.nii.gz", "p3/t1.nii.gz"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    both = [f"{tmp_path}/{{case}}/T1.nii.gz", f"{tmp_path}/{{case}}/T2.nii.gz"]
    assert [(named.name, named.channel) for named in listed(both)] == [("p1", 0), ("p2", 0), ("p1", 1), ("p2", 1)]
    other = [both[0], f"{tmp_path}/{{case}}/t1.nii.gz"]
    assert [(named.name, named.channel) for named in listed(other)] == [("p1", 0), ("p2", 0), ("p3", 0)]


def test_two_kinds_of_labels_or_of_images_in_one_folder_are_refused(folder):
    (folder / "mixed" / "c2").mkdir(parents=True)
    for name in ("c0.nii.gz", "c1.nii.gz", "c2/liver.nii.gz"):
        (folder / "mixed" / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"mixed: holds label files, and folders of label files \(c2\).*mixed/\*\.nii"):
        listed([folder / "mixed"], labels=True)
    assert _names([f"{folder}/mixed/*.nii.gz"], labels=True) == ["c0", "c1"]
    assert _names([folder / "mixed"]) == ["c0", "c1"], "images do not lie in folders of their own"
    (folder / "mixed" / "localizer").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(InputError, match=r"mixed: holds images and DICOM files \(localizer\); move"):
        listed([folder / "mixed"])


def test_what_macos_writes_beside_files_is_no_case(folder):
    (folder / "flat" / "._a.nii.gz").write_bytes(b"")
    assert _names([f"{folder}/flat/{{case}}.nii.gz"]) == _names([folder / "flat" / "a.nii.gz"]) + ["a_seg"]
