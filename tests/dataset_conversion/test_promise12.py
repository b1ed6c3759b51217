from __future__ import annotations

import os
import re
from functools import partial

import numpy as np
import pytest
import SimpleITK as sitk
from image_files import file_states, read_json, read_voxels, write_image
from nnunet_confkd.dataset_conversion import promise12

from nnunet_confkd.cli import main

SHAPE = (3, 6, 5)
# none of them is a number of single precision
SPACING, ORIGIN = (0.6251, 0.6251, 3.6000001), (-77.400000123, -89.1, 12.3456789012)
ANGLE = 0.1  # radians, about the first axis
DIRECTION = (1, 0, 0, 0, np.cos(ANGLE), -np.sin(ANGLE), 0, np.sin(ANGLE), np.cos(ANGLE))
TRAINING = [f"Case{k:02d}" for k in range(10)]
# the folders as they were published first, in three parts, and as they are now
PARTS = {"parts": ["TrainingData_Part1"] * 4 + ["TrainingData_Part2"] * 3 + ["TrainingData_Part3"] * 3,
         "zenodo": ["training_data"] * 10, "flat": [""] * 10}
TESTS = {"parts": [("TestData", 0, False), ("TestData", 1, False), ("LiveChallengeTestData", 30, False)],
         "zenodo": [("test_data", 0, True), ("test_data", 1, True), ("livechallenge_test_data", 30, False)], "flat": []}


_write = partial(write_image, spacing=SPACING, origin=ORIGIN, direction=DIRECTION)


def _tree(source, layout):
    rng = np.random.default_rng(0)
    cases = [(part, number, True) for number, part in enumerate(PARTS[layout])] + TESTS[layout]
    for part, number, labelled in cases:
        _write(source / part / f"Case{number:02d}.mhd", rng.integers(0, 2000, SHAPE).astype(np.int16))
        if labelled:
            label = rng.integers(0, 2, SHAPE).astype(np.int8)
            label.flat[:2] = 0, 1  # each of them, for sure
            _write(source / part / f"Case{number:02d}_segmentation.mhd", label)
        (source / part / f"._Case{number:02d}.mhd").write_bytes(b"\0\5\26\7")
    (source / "LICENSE.TXT").write_text("licence")
    (source / ".DS_Store").write_bytes(b"Bud1")
    return source


@pytest.fixture(params=list(PARTS))
def layout(request):
    return request.param


@pytest.fixture
def source(tmp_path, layout):
    return _tree(tmp_path / "promise", layout)


@pytest.fixture
def parts(tmp_path):
    return _tree(tmp_path / "promise", "parts")


@pytest.fixture
def refused(refusal):
    return partial(refusal, promise12.convert)


def _assert_same(written, published):
    """Voxels, of the same type in an image, and geometry to the last bit."""
    one, other = sitk.ReadImage(str(written)), sitk.ReadImage(str(published))
    assert one.GetPixelID() == (other.GetPixelID() if written.parent.name.startswith("images") else sitk.sitkUInt8)
    assert np.array_equal(sitk.GetArrayFromImage(one), sitk.GetArrayFromImage(other))
    assert one.GetSpacing() == other.GetSpacing() == SPACING and one.GetOrigin() == other.GetOrigin() == ORIGIN
    assert one.GetDirection() == other.GetDirection() and np.allclose(one.GetDirection(), DIRECTION, rtol=0, atol=1e-15)


# ---- what is written ------------------------------------------------------------------------------------------------

def test_every_case_keeps_its_voxels_and_its_geometry_to_the_last_bit(source, layout, nnunet_folders):
    before = file_states(source)
    folder = promise12.convert(source, 41, processes=1)
    assert folder == nnunet_folders / "raw" / "Dataset041_PROMISE12" and file_states(source) == before
    assert sorted(os.listdir(folder / "imagesTr")) == [f"{name}_0000.mha" for name in TRAINING]
    assert sorted(os.listdir(folder / "labelsTr")) == [f"{name}.mha" for name in TRAINING]
    for name, part in zip(TRAINING, PARTS[layout]):
        _assert_same(folder / "imagesTr" / f"{name}_0000.mha", source / part / f"{name}.mhd")
        _assert_same(folder / "labelsTr" / f"{name}.mha", source / part / f"{name}_segmentation.mhd")
        assert set(np.unique(read_voxels(folder / "labelsTr" / f"{name}.mha"))) == {0, 1}


def test_test_cases_bear_the_name_of_their_folder_and_may_have_labels(source, layout, nnunet_folders):
    folder = promise12.convert(source, 41, processes=1)
    names = [f"{part}_Case{number:02d}" for part, number, _ in TESTS[layout]]
    labelled = [name for name, (_, _, with_label) in zip(names, TESTS[layout]) if with_label]
    assert len(labelled) == {"parts": 0, "zenodo": 2, "flat": 0}[layout]
    assert (folder / "imagesTs").is_dir() == bool(names) and (folder / "labelsTs").is_dir() == bool(labelled)
    if names:
        assert sorted(os.listdir(folder / "imagesTs")) == sorted(f"{name}_0000.mha" for name in names)
    if labelled:
        assert sorted(os.listdir(folder / "labelsTs")) == sorted(f"{name}.mha" for name in labelled)
    for name, (part, number, _) in zip(names, TESTS[layout]):
        _assert_same(folder / "imagesTs" / f"{name}_0000.mha", source / part / f"Case{number:02d}.mhd")
        if name in labelled:
            _assert_same(folder / "labelsTs" / f"{name}.mha", source / part / f"Case{number:02d}_segmentation.mhd")


def test_dataset_json_and_the_split(source, nnunet_folders, crossvalidation):
    folder = promise12.convert(source, 41, name="Prostate", processes=1)
    assert read_json(folder / "dataset.json") == {
        "channel_names": {"0": "T2"},
        "labels": {"background": 0, "prostate": 1},
        "numTraining": 10,
        "file_ending": ".mha",
        "name": "Prostate",
        "licence": "see the publisher's terms (PROMISE12 challenge)",
        "reference": "Litjens et al., Medical Image Analysis 2014, doi 10.1016/j.media.2013.12.002",
        "supervision": dict.fromkeys(TRAINING, "full"),
    }
    assert [len(fold["val"]) for fold in crossvalidation(folder.name)] == [2] * 5


def test_nnunet_finds_nothing_wrong(parts, nnunet_folders, require_integrity):
    require_integrity(promise12.convert(parts, 41, processes=1))


def test_compressed_voxels_and_voxels_within_the_header_are_read(parts, nnunet_folders):
    for name, own in (("Case00", False), ("Case01", True)):
        file = parts / "TrainingData_Part1" / f"{name}.mhd"
        image = sitk.ReadImage(str(file))
        file.with_suffix(".raw").unlink()
        if own:  # as an .mha is
            sitk.WriteImage(image, str(file.with_suffix(".mha")))
            file.with_suffix(".mha").rename(file)
        else:
            sitk.WriteImage(image, str(file), True)
            assert file.with_suffix(".zraw").is_file()
    folder = promise12.convert(parts, 41, processes=1)
    for name in ("Case00", "Case01"):
        _assert_same(folder / "imagesTr" / f"{name}_0000.mha", parts / "TrainingData_Part1" / f"{name}.mhd")


def test_the_command_converts(parts, nnunet_folders, capsys):
    assert main(["convert", "promise12", "--source", str(parts), "--id", "41", "--processes", "1"]) == 0
    assert (
        "Dataset041_PROMISE12: 10 training cases (10 full, 0 partial, 0 unlabelled)\n5 folds" in capsys.readouterr().out
    )


# ---- bad input ------------------------------------------------------------------------------------------------------

def test_folders_that_are_not_there_or_hold_no_training_case_are_refused(refused, parts, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tests").mkdir()
    (parts / "TestData").rename(tmp_path / "tests" / "TestData")
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'}: there is no such folder"
    assert refused(tmp_path / "empty") == (f"{tmp_path / 'empty'}: holds no files Case00.mhd, Case00_segmentation.mhd "
                                           f"and so on")
    assert refused(tmp_path / "tests") == (f"{tmp_path / 'tests'}: holds no training case (Case00.mhd and "
                                           f"Case00_segmentation.mhd)")


def test_missing_segmentations_images_and_raw_files_are_all_named(refused, parts):
    first, second = parts / "TrainingData_Part1", parts / "TrainingData_Part2"
    (first / "Case00_segmentation.mhd").unlink()
    (first / "Case01.mhd").unlink()
    (first / "Case02.raw").unlink()
    (first / "Case03_segmentation.raw").unlink()
    (second / "Case04.raw").unlink()
    (second / "Case04_segmentation.raw").unlink()
    (parts / "TestData" / "Case00.raw").unlink()
    assert sorted(refused(parts).split("\n  ")) == sorted([
        "7 problems; nothing was written:",
        f"{first / 'Case00.mhd'}: has no Case00_segmentation.mhd beside it; test cases lie in a folder TestData",
        f"{first / 'Case01_segmentation.mhd'}: has no Case01.mhd beside it",
        f"{first / 'Case02.raw'}: is missing; Case02.mhd takes its voxels from it",
        f"{first / 'Case03_segmentation.raw'}: is missing; Case03_segmentation.mhd takes its voxels from it",
        f"{second / 'Case04.raw'}: is missing; Case04.mhd takes its voxels from it",
        f"{second / 'Case04_segmentation.raw'}: is missing; Case04_segmentation.mhd takes its voxels from it",
        f"{parts / 'TestData' / 'Case00.raw'}: is missing; Case00.mhd takes its voxels from it"])


@pytest.mark.parametrize("elsewhere", ["../TestData/Case00.raw", "{folder}/secret.raw", "LIST", "Case%02d.raw 0 2 1"])
def test_voxels_that_lie_elsewhere_are_never_read(refused, parts, tmp_path, elsewhere):
    elsewhere = elsewhere.format(folder=tmp_path)
    (tmp_path / "secret.raw").write_bytes(bytes(2 * 3 * 6 * 5))
    file = parts / "TrainingData_Part1" / "Case00.mhd"
    file.write_text(re.sub("ElementDataFile = .*", f"ElementDataFile = {elsewhere}", file.read_text()))
    assert refused(parts) == (f"{file}: names {elsewhere!r} for its voxels, which is not one file beside it; write the "
                              f"image anew, to one file")


def test_voxels_that_are_a_link_to_elsewhere_are_never_read(refused, parts, tmp_path):
    file = parts / "TrainingData_Part1" / "Case00.raw"
    file.rename(tmp_path / "secret.raw")
    file.symlink_to(tmp_path / "secret.raw")
    assert refused(parts).startswith(f"{file}: leads out of the source folder, to {tmp_path / 'secret.raw'};")


def test_a_raw_file_that_is_cut_short_and_a_header_that_is_none_are_both_named(refused, parts):
    first = parts / "TrainingData_Part1"
    (first / "Case00.raw").write_bytes((first / "Case00.raw").read_bytes()[:-1])
    (first / "Case01_segmentation.mhd").write_text("no header")
    text = refused(parts).split("\n  ")[1:]
    assert len(text) == 2
    for name, line in zip(("Case00.mhd", "Case01_segmentation.mhd"), text):
        assert line.startswith(f"{first / name}: cannot be read as an image; is it cut short, damaged")


def test_a_value_other_than_0_and_1_and_another_grid_are_both_named(refused, parts):
    first = parts / "TrainingData_Part1"
    _write(first / "Case00_segmentation.mhd", np.full(SHAPE, 2, np.int8))
    _write(first / "Case01_segmentation.mhd", np.ones(SHAPE, np.int8), spacing=(0.6251, 0.6251, 3))
    text = refused(parts).split("\n  ")[1:]
    assert text[0].startswith(f"{first / 'Case00_segmentation.mhd'}: holds the values 2; a full label may hold 0, 1;")
    assert text[1].startswith(f"{first / 'Case01_segmentation.mhd'}: is on another grid than {first / 'Case01.mhd'}: ")


def test_one_case_in_two_parts_is_refused(refused, parts):
    for name in ("Case00.mhd", "Case00_segmentation.mhd"):
        _write(parts / "TrainingData_Part3" / name, np.zeros(SHAPE, np.int8))
    assert refused(parts) == (f"{parts / 'TrainingData_Part3' / 'Case00.mhd'}: the name of the case, 'Case00', is that "
                              f"of {parts / 'TrainingData_Part1' / 'Case00.mhd'}, too; rename one")


def test_a_folder_that_is_a_link_to_elsewhere_is_refused(refused, parts, tmp_path):
    (parts / "TrainingData_Part3").rename(tmp_path / "elsewhere")
    (parts / "TrainingData_Part3").symlink_to(tmp_path / "elsewhere")
    text = refused(parts)
    assert text.count("leads out of the source folder") == 2 * 3  # images and labels of three cases
    assert f"{parts / 'TrainingData_Part3' / 'Case07.mhd'}: leads out of the source folder" in text
