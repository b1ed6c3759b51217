from __future__ import annotations

import os
import shutil
import sys
from functools import partial

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
from image_files import file_states, read_json, read_voxels, write_image
from nnunet_confkd.dataset_conversion import la2018

from nnunet_confkd.cli import main

SHAPE = (3, 6, 5)  # Z, Y, X
# of the form of the published names; one begins as a folder of test cases would
TRAINING = ["07Z9ZQYIQLNSHQR9V0WP", "1D7CUD1955YZPGK8XHJX", "3C2QTUNI0852XV7ZH4Q1", "4CTHFZ0QH6NS7EYS9TUR",
            "5RFQUV7IYGFMRYTVBLQW", "6LCE4ZV9VRD0AJN2SR92", "7A1V6XXLZGGO3TZCTHUK", "8A8GLMW6G3C5ZTQY1C5B",
            "9DCM2IB45HK6YKQNYUQY", "TESTZ7QYIQLNSHQR9V0W"]
TEST = ["A1DS53MYD7HAQHU4ZJ9V", "B7BG6BDXNZ8C0QXFE2ZM"]
SPACING = (0.625, 0.75, 1.25)  # x, y, z


_write = partial(write_image, spacing=SPACING, origin=(-12.5, 40.1, 7.25), direction=(0, 0, 1, 1, 0, 0, 0, -1, 0),
                  compress=True)


def _pack(file, **arrays):
    """arrays: (X, Y, Z)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as content:
        for key, array in arrays.items():
            content.create_dataset(key, data=array, compression="gzip")
    return file


def _unpack(file, key):
    with h5py.File(file) as content:
        return content[key][()]


def _mask(name, highest):
    mask = np.random.default_rng(list(name.encode())).integers(0, 2, SHAPE).astype(np.uint8) * np.uint8(highest)
    mask.flat[:2] = 0, highest  # both of them, for sure
    return mask


@pytest.fixture
def source(tmp_path):
    """As published: 0 and 255, the test cases with labels, too; and the walls, which nobody asks for."""
    rng = np.random.default_rng(0)
    for part, names in (("Training Set", TRAINING), ("Testing Set", TEST)):
        for name in names:
            case = tmp_path / "la" / part / name
            _write(case / "lgemri.nrrd", rng.integers(0, 256, SHAPE).astype(np.uint8))
            _write(case / "laendo.nrrd", _mask(name, 255))
            _write(case / "lawall.nrrd", np.full(SHAPE, 255, np.uint8))
            (case / "._lgemri.nrrd").write_bytes(b"\0\5\26\7")
        (tmp_path / "la" / part / ".DS_Store").write_bytes(b"Bud1")
    return tmp_path / "la"


@pytest.fixture
def packed(tmp_path):
    """The HDF5 form, whose cases are of different sizes; test cases are not told from others by their folder."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(TRAINING):
        shape = (5 + k, 6, 3)  # X, Y, Z
        _pack(tmp_path / "la" / "2018LA_Seg_Training Set" / name / "mri_norm2.h5",
              image=rng.normal(size=shape).astype(np.float32), label=rng.integers(0, 2, shape).astype(np.uint8))
    for file in ("train.list", "test.list"):
        (tmp_path / "la" / file).write_text("\n".join(TRAINING))
    return tmp_path / "la"


@pytest.fixture
def refused(refusal):
    return partial(refusal, la2018.convert)


# ---- what is written ------------------------------------------------------------------------------------------------

def test_images_are_the_published_bytes_and_255_becomes_1(source, nnunet_folders):
    before = file_states(source)
    folder = la2018.convert(source, 51, processes=1)
    assert folder == nnunet_folders / "raw" / "Dataset051_LA2018" and file_states(source) == before
    for part, split, names in (("Training Set", "Tr", TRAINING), ("Testing Set", "Ts", TEST)):
        assert sorted(os.listdir(folder / f"images{split}")) == [f"{name}_0000.nrrd" for name in names]
        assert sorted(os.listdir(folder / f"labels{split}")) == [f"{name}.nrrd" for name in names]
        for name in names:
            image, label = (source / part / name / f"{file}.nrrd" for file in ("lgemri", "laendo"))
            assert (folder / f"images{split}" / f"{name}_0000.nrrd").read_bytes() == image.read_bytes()
            one, other = sitk.ReadImage(str(folder / f"labels{split}" / f"{name}.nrrd")), sitk.ReadImage(str(label))
            assert np.array_equal(sitk.GetArrayFromImage(one), sitk.GetArrayFromImage(other) // 255)
            for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
                assert np.allclose(getattr(one, get)(), getattr(other, get)())


def test_labels_of_0_and_1_are_the_published_bytes(source, nnunet_folders):
    label = source / "Training Set" / TRAINING[3] / "laendo.nrrd"
    _write(label, _mask(TRAINING[3], 1))
    folder = la2018.convert(source, 51, processes=1)
    assert (folder / "labelsTr" / f"{TRAINING[3]}.nrrd").read_bytes() == label.read_bytes()


def test_dataset_json_and_the_split(source, nnunet_folders, crossvalidation):
    folder = la2018.convert(source, 51, processes=1)
    assert read_json(folder / "dataset.json") == {
        "channel_names": {"0": "LGE"}, "labels": {"background": 0, "left_atrium": 1}, "numTraining": 10,
        "file_ending": ".nrrd", "name": "LA2018", "supervision": dict.fromkeys(TRAINING, "full"),
        "licence": "see the publisher's terms (2018 Left Atrium Segmentation Challenge)",
        "reference": "Xiong et al., Medical Image Analysis 2021, doi 10.1016/j.media.2020.101832"}
    assert [len(fold["val"]) for fold in crossvalidation("Dataset051_LA2018")] == [2] * 5


def test_cases_of_one_mask_stay_on_one_side(source, nnunet_folders, crossvalidation):
    la2018.convert(source, 51, processes=1)
    validating = {case: k for k, fold in enumerate(crossvalidation("Dataset051_LA2018")) for case in fold["val"]}
    first, second = TRAINING[1], next(case for case in TRAINING if validating[case] != validating[TRAINING[1]])
    shutil.copy(source / "Training Set" / first / "laendo.nrrd", source / "Training Set" / second / "laendo.nrrd")
    la2018.convert(source, 52, name="Again", processes=1)
    assert {len({first, second} & set(fold["val"])) for fold in crossvalidation("Dataset052_Again")} == {0, 2}


@pytest.mark.parametrize("form", ["nrrd", "h5"])
def test_nnunet_finds_nothing_wrong(request, nnunet_folders, require_integrity, form):
    source = request.getfixturevalue("source" if form == "nrrd" else "packed")
    folder = la2018.convert(source, 51, spacing=None if form == "nrrd" else SPACING, processes=1)
    require_integrity(folder)


def test_the_hdf5_form_keeps_its_voxels_and_gets_the_spacing(packed, nnunet_folders, crossvalidation):
    before = file_states(packed)
    folder = la2018.convert(packed, 51, spacing=SPACING, processes=1)
    assert file_states(packed) == before and sorted(os.listdir(folder)) == ["dataset.json", "imagesTr", "labelsTr"]
    for name in TRAINING:
        file = packed / "2018LA_Seg_Training Set" / name / "mri_norm2.h5"
        for key, written, dtype in (("image", f"imagesTr/{name}_0000.nrrd", np.float32),
                                    ("label", f"labelsTr/{name}.nrrd", np.uint8)):
            image, array = sitk.ReadImage(str(folder / written)), _unpack(file, key)
            assert image.GetSize() == array.shape and image.GetSpacing() == SPACING  # both x, y, z
            assert image.GetOrigin() == (0, 0, 0) and image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
            voxels = sitk.GetArrayFromImage(image)
            assert voxels.dtype == dtype and np.array_equal(voxels.transpose(2, 1, 0), array)
    crossvalidation("Dataset051_LA2018")


def test_where_both_forms_lie_side_by_side_the_spacing_chooses(source, nnunet_folders):
    for part, names in (("Training Set", TRAINING), ("Testing Set", TEST)):
        for name in names:  # as UA-MT's script leaves them
            _pack(source / part / name / "mri_norm2.h5", image=np.zeros((4, 4, 4), np.float32),
                  label=np.zeros((4, 4, 4), np.uint8))
    name = f"imagesTr/{TRAINING[0]}_0000.nrrd"
    assert read_voxels(la2018.convert(source, 51, processes=1) / name).shape == SHAPE
    folder = la2018.convert(source, 52, spacing=SPACING, processes=1)
    assert read_voxels(folder / name).shape == (4, 4, 4)
    assert sorted(os.listdir(folder / "labelsTs")) == [f"{name}.nrrd" for name in TEST]


def test_test_cases_may_lack_a_label_and_cases_may_lie_in_the_folder_itself(source, nnunet_folders):
    (source / "Testing Set" / TEST[0] / "laendo.nrrd").unlink()
    for name in TRAINING:
        (source / "Training Set" / name).rename(source / name)
    shutil.rmtree(source / "Training Set")
    folder = la2018.convert(source, 51, processes=1)
    assert sorted(os.listdir(folder / "imagesTs")) == [f"{name}_0000.nrrd" for name in TEST]
    assert os.listdir(folder / "labelsTs") == [f"{TEST[1]}.nrrd"]
    assert sorted(read_json(folder / "dataset.json")["supervision"]) == TRAINING


def test_the_command_converts_and_asks_for_the_spacing(packed, nnunet_folders, capsys):
    command = ["convert", "la2018", "--source", str(packed), "--id", "51", "--processes", "1"]
    assert main(command) == 1
    assert (
        "mri_norm2.h5: stores no spacing; give that of your files as --spacing X Y Z in mm" in capsys.readouterr().err
    )
    assert main([*command, "--spacing", "0.625", "0.75", "1.25"]) == 0
    assert "Dataset051_LA2018: 10 training cases (10 full, 0 partial, 0 unlabelled)\n5 folds" in capsys.readouterr().out
    image = sitk.ReadImage(str(nnunet_folders / "raw" / "Dataset051_LA2018" / "imagesTr" / f"{TRAINING[0]}_0000.nrrd"))
    assert image.GetSpacing() == SPACING


# ---- bad input ------------------------------------------------------------------------------------------------------

def test_folders_that_are_not_there_or_hold_no_training_case_are_refused(refused, source, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'}: there is no such folder"
    assert refused(tmp_path / "empty") == (f"{tmp_path / 'empty'}: holds no folders of cases, with lgemri.nrrd and "
                                           f"laendo.nrrd, or with mri_norm2.h5")
    shutil.rmtree(source / "Training Set")
    assert refused(source) == (f"{source}: holds no training case, only test cases (in folders whose names begin with "
                               f"\"Test\")")


def test_missing_images_and_labels_are_all_named(refused, source):
    folder = source / "Training Set"
    (folder / TRAINING[0] / "laendo.nrrd").unlink()
    (folder / TRAINING[1] / "lgemri.nrrd").unlink()
    (source / "Testing Set" / TEST[0] / "lgemri.nrrd").unlink()
    assert refused(source).split("\n  ") == [
        "3 problems; nothing was written:",
        f"{folder / TRAINING[0] / 'lgemri.nrrd'}: has no laendo.nrrd beside it",
        f"{source / 'Testing Set' / TEST[0] / 'laendo.nrrd'}: has no lgemri.nrrd beside it",
        f"{folder / TRAINING[1] / 'laendo.nrrd'}: has no lgemri.nrrd beside it"]


def test_other_values_another_grid_and_a_damaged_file_are_all_named(refused, source):
    files = [source / "Training Set" / name / "laendo.nrrd" for name in TRAINING[:3]]
    _write(files[0], _mask("a", 128))
    _write(files[1], _mask("b", 255), spacing=(0.625, 0.75, 1))
    files[2].write_bytes(files[2].read_bytes()[:-9])
    text = refused(source).split("\n  ")[1:]
    assert text[0].startswith(f"{files[0]}: holds the values 128; a full label may hold 0, 1, 255;")
    assert text[1].startswith(f"{files[1]}: is on another grid than {files[1].with_name('lgemri.nrrd')}: spacing")
    assert text[2].startswith(f"{files[2]}: cannot be read as an image") and len(text) == 3


def test_the_spacing_is_asked_for_where_it_is_missing_and_refused_where_it_is_known(refused, packed, tmp_path):
    file = packed / "2018LA_Seg_Training Set" / TRAINING[0] / "mri_norm2.h5"
    assert refused(packed).startswith(f"{file}: stores no spacing; give that of your files as --spacing X Y Z in mm")
    other = tmp_path / "nrrd"
    _write(other / "case" / "lgemri.nrrd", np.zeros(SHAPE, np.uint8))
    assert refused(other, spacing=SPACING) == (f"{other}: holds no mri_norm2.h5, and lgemri.nrrd has a spacing of its "
                                               f"own; leave out --spacing")


@pytest.mark.parametrize(
    "spacing, text",
    [
        ((0, 1, 1), "0 1 1"),
        ((1, 1, -0.5), "1 1 -0.5"),
        ((1, float("nan"), 1), "1 nan 1"),
        ((float("inf"), 1, 1), "inf 1 1"),
    ],
)
def test_a_spacing_that_is_none_is_refused(refused, packed, spacing, text):
    assert refused(packed, spacing=spacing) == f"--spacing {text}: these are the edges of a voxel in mm, above 0"


def test_hdf5_files_without_image_or_label_of_other_shapes_or_damaged_are_all_named(refused, packed):
    files = [packed / "2018LA_Seg_Training Set" / name / "mri_norm2.h5" for name in TRAINING]
    image, label = np.zeros((5, 6, 3), np.float32), np.zeros((5, 6, 3), np.uint8)
    _pack(files[0], image=image)
    _pack(files[1], image=image[0], label=label)
    _pack(files[2], image=image, label=label[1:])
    _pack(files[3], image=image, label=label + np.uint8(2))
    _pack(files[4], image=image + np.float32(np.nan), label=label)
    _pack(files[5], image=np.full((5, 6, 3), b"text"), label=label)
    files[6].write_bytes(files[6].read_bytes()[:-99])
    files[7].write_text("no HDF5")
    text = refused(packed, spacing=SPACING).split("\n  ")
    assert text[0] == "10 problems; nothing was written:"
    expected = [
        f"{files[0]}: cannot be read, or has no array \"label\" (this file holds none of that name)",
        f"{files[1]}: the array \"image\" has the shape (6, 3), of float32; numbers in three dimensions are expected",
        f"{files[2]}: is on another grid than {files[2]}: size (4, 6, 3) and (5, 6, 3)",
        f"{files[3]}: holds the values 2; a full label may hold 0, 1, 255",
        f"{files[4]}: 90 voxels are not finite",
        f"{files[5]}: the array \"image\" has the shape (5, 6, 3), of |S4; numbers in three dimensions are expected",
        f"{files[6]}: cannot be read, or has no array \"image\"", f"{files[6]}: cannot be read, or has no array "
                                                                  f"\"label\"",
        f"{files[7]}: cannot be read, or has no array \"image\"", f"{files[7]}: cannot be read, or has no array "
                                                                  f"\"label\""]
    assert len(text) - 1 == len(expected)
    assert all(line.startswith(start) for line, start in zip(text[1:], expected))


def test_hdf5_files_that_take_voxels_from_other_files_are_refused(refused, packed, tmp_path):
    secret = _pack(tmp_path / "secret.h5", label=np.zeros((5, 6, 3), np.uint8))
    (tmp_path / "secret.raw").write_bytes(bytes(90))
    files = [packed / "2018LA_Seg_Training Set" / name / "mri_norm2.h5" for name in TRAINING[:3]]
    for file in files:
        _pack(file, image=np.zeros((5, 6, 3), np.float32))
    with h5py.File(files[0], "a") as content:
        content["label"] = h5py.ExternalLink(secret, "label")
    with h5py.File(files[1], "a") as content:
        content.create_dataset("label", (5, 6, 3), np.uint8, external=[(tmp_path / "secret.raw", 0, 90)])
    with h5py.File(files[2], "a") as content:
        layout = h5py.VirtualLayout((5, 6, 3), np.uint8)
        layout[:] = h5py.VirtualSource(secret, "label", (5, 6, 3))
        content.create_virtual_dataset("label", layout)
    assert all(_unpack(file, "label").shape == (5, 6, 3) for file in files)  # h5py follows them
    assert refused(packed, spacing=SPACING).split("\n  ")[1:] == [
        f"{file}: cannot be read, or has no array \"label\" (this file holds none of that name)" for file in files]


def test_without_h5py_its_installation_is_named(refused, packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert refused(packed, spacing=SPACING) == "the HDF5 form of LA 2018 needs the package h5py: pip install h5py"


def test_one_name_in_two_folders_is_refused(refused, source):
    shutil.copytree(source / "Training Set" / TRAINING[0], source / "Testing Set" / TRAINING[0])
    assert refused(source).startswith(f"{source / 'Testing Set' / TRAINING[0] / 'lgemri.nrrd'}: the name of the case, "
                                      f"'{TRAINING[0]}', is that of {source / 'Training Set' / TRAINING[0]}")


def test_a_case_that_is_a_link_to_elsewhere_is_refused(refused, source, tmp_path):
    case = source / "Training Set" / TRAINING[4]
    case.rename(tmp_path / "elsewhere")
    case.symlink_to(tmp_path / "elsewhere")
    text = refused(source)
    assert text.count("leads out of the source folder") == 2
    assert (
        f"{case / 'lgemri.nrrd'}: leads out of the source folder, to {tmp_path / 'elsewhere' / 'lgemri.nrrd'}" in text
    )
