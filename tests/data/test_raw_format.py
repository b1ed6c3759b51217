from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from skimage import io as skio

from nnunet_confkd import processes
from nnunet_confkd.data import folders as dataset_folders
from nnunet_confkd.data import raw_format
from nnunet_confkd.data.folders import find_dataset, folder_name, new_dataset
from nnunet_confkd.data.images import Volume
from nnunet_confkd.data.patients import choose_patients, patients_of, split_full_cases
from nnunet_confkd.data.raw_format import Case, Dataset, with_ignore, write_dataset
from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED
from nnunet_confkd.errors import InputError
from nnunet_confkd.processes import terminable

SHAPE = (3, 4, 5)  # Z, Y, X
LABELS = {"background": 0, "one": 1, "two": 2}
MIXED = {**LABELS, "ignore": 3}
OBLIQUE = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has neither these signals nor these permissions")


@pytest.fixture
def nnunet(tmp_path, monkeypatch) -> Path:
    """A folder with nnU-Net's three, as its variables name them."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / "nnunet" / name).mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / "nnunet" / name))
    return tmp_path / "nnunet"


@pytest.fixture
def source(tmp_path) -> Path:
    """Five cases on an oblique grid, float images and uint8 labels of the values 0, 1 and 2."""
    folder = tmp_path / "source"
    rng = np.random.default_rng(0)
    for name in ("a1", "a2", "b1", "c1", "d1"):
        _save(folder / "images" / f"{name}.nii.gz", rng.normal(size=SHAPE).astype(np.float32))
        _save(folder / "labels" / f"{name}.nii.gz", rng.integers(0, 3, SHAPE).astype(np.uint8))
    return folder


def _save(file, voxels, spacing=(0.7, 0.9, 5.1), origin=(-3.5, 11.25, 2.0), direction=OBLIQUE):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    sitk.WriteImage(image, str(file))
    return file


def _change(file, **grid):
    """The same voxels on another grid."""
    image = sitk.ReadImage(str(file))
    grid = {"spacing": image.GetSpacing(), "origin": image.GetOrigin(), "direction": image.GetDirection()} | grid
    return _save(file, sitk.GetArrayFromImage(image), **grid)


def _case(source, name, kind=FULL, **more):
    label = Volume(source / "labels" / f"{name}.nii.gz") if kind != UNLABELLED else None
    return Case(name, (Volume(source / "images" / f"{name}.nii.gz"),), label, kind, **more)


def _dataset(source, **changed):
    """The five cases, all full; the patient is the letter, and d validates."""
    return Dataset(**{"name": "Test", "channel_names": ["T1"], "labels": LABELS, "file_ending": ".nii.gz",
                      "training": [_case(source, name) for name in ("a1", "a2", "b1", "c1", "d1")], "validation": ["d1"],
                      "patient_pattern": "([a-z])", "roots": (source,)} | changed)


def _tree(folder):
    """{relative path: content, None for a folder}, hidden ones too."""
    return {file.relative_to(folder).as_posix(): None if file.is_dir() else file.read_bytes()
            for file in sorted(folder.rglob("*"))}


def _state(folder):
    """What changes when somebody writes there: contents, times, links."""
    return {file.relative_to(folder).as_posix(): (hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None,
                                                  file.stat().st_mtime_ns, file.stat().st_ino)
            for file in [folder, *sorted(folder.rglob("*"))] if file.exists()}


def _voxels(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def _one(source, nnunet, case, **changed):
    """Write a data set of this case alone."""
    return write_dataset(_dataset(source, training=[case], validation=[], patient_pattern=None, **changed), 7, processes=1)


# ---- what is written ------------------------------------------------------------------------------------------------

def test_a_data_set_has_the_files_of_its_source_byte_for_byte(source, nnunet):
    before = _state(source)
    folder = write_dataset(_dataset(source, licence="CC0", reference="Nobody 2020", more={"extra": [1]}), 7, processes=1)
    assert folder == nnunet / "raw" / "Dataset007_Test"
    names = ("a1", "a2", "b1", "c1", "d1")
    expected = {"imagesTr": None, "labelsTr": None}
    for name in names:
        expected[f"imagesTr/{name}_0000.nii.gz"] = (source / "images" / f"{name}.nii.gz").read_bytes()
        expected[f"labelsTr/{name}.nii.gz"] = (source / "labels" / f"{name}.nii.gz").read_bytes()
    found = _tree(folder)
    described = json.loads(found.pop("dataset.json"))
    assert found == expected
    assert described == {
        "channel_names": {"0": "T1"}, "labels": LABELS, "numTraining": 5, "file_ending": ".nii.gz", "name": "Test",
        "licence": "CC0", "reference": "Nobody 2020", "supervision": dict.fromkeys(names, "full"),
        "patient_pattern": "([a-z])", "extra": [1]}
    preprocessed = _tree(nnunet / "preprocessed")
    assert json.loads(preprocessed.pop("Dataset007_Test/splits_final.json")) == [  # d1 is held back
        {"train": ["a1", "a2", "b1", "c1"], "val": ["d1"]}]
    assert preprocessed == {"Dataset007_Test": None}
    assert sorted(os.listdir(nnunet / "raw")) == ["Dataset007_Test"]  # nothing hidden
    assert _state(source) == before


def test_fully_annotated_patients_validate_in_turn_and_all_others_train_in_every_fold(source, nnunet):
    training = [_case(source, name, PARTIAL if name == "b1" else FULL) for name in ("a1", "a2", "b1", "c1", "d1")]
    folder = write_dataset(_dataset(source, training=training, labels=MIXED, validation=[]), 7, processes=1)
    folds = json.loads((nnunet / "preprocessed" / folder.name / "splits_final.json").read_text())
    assert [fold["val"] for fold in folds] == [["a1", "a2"], ["c1"], ["d1"]]
    assert all(sorted(fold["train"] + fold["val"]) == ["a1", "a2", "b1", "c1", "d1"] for fold in folds)
    assert raw_format.summary(folder).splitlines() == [
        f"{folder}: 5 training cases (4 full, 1 partial, 0 unlabelled)",
        "3 folds over 3 fully annotated patients: each trains on 2 of them and validates on 1; all other cases train in every fold",
        "next: confkd check -d 7, then confkd plan -d 7"]


def test_the_folds_are_those_that_the_trainer_and_plan_would_write(source, nnunet):
    kinds = dict.fromkeys(("a1", "a2", "b1", "c1", "d1"), FULL)
    folder = write_dataset(_dataset(source, validation=[]), 7, processes=1)
    assert json.loads((nnunet / "preprocessed" / folder.name / "splits_final.json").read_text()) == split_full_cases(
        kinds, patients_of(kinds, "([a-z])"))


def test_cases_that_are_held_back_are_divided_over_the_folds_and_never_train(source, nnunet):
    folder = write_dataset(_dataset(source, validation=["a1", "a2", "d1"]), 7, processes=1)
    folds = json.loads((nnunet / "preprocessed" / folder.name / "splits_final.json").read_text())
    assert sorted(folds, key=str) == [{"train": ["b1", "c1"], "val": ["a1", "a2"]}, {"train": ["b1", "c1"], "val": ["d1"]}]
    assert raw_format.summary(folder).splitlines()[1] == (
        "2 folds: each trains on the same 2 fully annotated patients and validates on 1 of 2 that are held back from training")
    folder = write_dataset(_dataset(source, name="One", validation=["a1", "a2", "d1"], folds=1), 8, processes=1)
    assert json.loads((nnunet / "preprocessed" / folder.name / "splits_final.json").read_text()) == [
        {"train": ["b1", "c1"], "val": ["a1", "a2", "d1"]}]
    assert raw_format.summary(folder).splitlines()[1] == (
        "one fold: fold 0 trains on 2 fully annotated patients and validates on 2, which are held back. There are no folds 1 to 4: "
        "give -f 0 to nnUNetv2_find_best_configuration and nnUNetv2_predict")


def test_with_one_fully_annotated_patient_there_is_no_split_and_the_summary_says_what_to_do(source, nnunet):
    training = [_case(source, "a1"), _case(source, "a2"), _case(source, "b1", PARTIAL), _case(source, "d1", UNLABELLED)]
    folder = write_dataset(_dataset(source, labels=MIXED, training=training, validation=[]), 7, processes=1)
    assert _tree(nnunet / "preprocessed") == {}
    assert raw_format.summary(folder).splitlines() == [
        f"{folder}: 4 training cases (2 full, 1 partial, 1 unlabelled)",
        "no split was written: it takes two fully annotated patients to spare one for validation. Train on fold 'all': "
        "confkd train 7 CONFIGURATION all",
        "next: confkd check -d 7, then confkd plan -d 7"]


def test_links_share_the_images_and_never_the_labels(source, nnunet):
    folder = write_dataset(_dataset(source), 7, processes=1, link=True)
    assert (folder / "imagesTr" / "a1_0000.nii.gz").stat().st_ino == (source / "images" / "a1.nii.gz").stat().st_ino
    assert (folder / "labelsTr" / "a1.nii.gz").stat().st_ino != (source / "labels" / "a1.nii.gz").stat().st_ino


@pytest.mark.parametrize("ending", [".mhd", ".mha", ".nrrd", ".nii", "nifti2.nii.gz", "CAPITALS.NII.GZ"])
@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint8])
def test_what_nnunet_does_not_read_is_converted_without_loss(source, nnunet, ending, dtype):
    voxels = (100 * np.random.default_rng(1).normal(size=SHAPE)).astype(dtype)
    file = source / "images" / f"x{ending}"
    if ending == "nifti2.nii.gz":
        twin = nibabel.load(_save(source / "twin.nii.gz", voxels))
        nibabel.Nifti2Image(voxels.T, twin.affine).to_filename(file)
    elif ending == "CAPITALS.NII.GZ":
        _save(source / "images" / "x.nii.gz", voxels).rename(file)
    else:
        _save(file, voxels)
    folder = _one(source, nnunet, Case("x", (Volume(file),), None, UNLABELLED), labels=MIXED)
    for image in ("imagesTr/x_0000.nii.gz", "labelsTr/x.nii.gz"):
        written = sitk.ReadImage(str(folder / image))  # its first reader, which takes neither NIfTI-2 nor .mhd
        np.testing.assert_allclose(written.GetSpacing(), (0.7, 0.9, 5.1), rtol=1e-6)
        np.testing.assert_allclose(written.GetOrigin(), (-3.5, 11.25, 2.0), rtol=1e-6)
        np.testing.assert_allclose(written.GetDirection(), OBLIQUE, atol=1e-6)
    found = _voxels(folder / "imagesTr" / "x_0000.nii.gz")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, voxels)


def test_a_header_with_its_voxels_in_another_file_is_not_copied(source, nnunet):
    voxels = np.arange(60, dtype=np.float32).reshape(SHAPE)
    voxels.tofile(source / "x.raw")
    (source / "x.nrrd").write_text("NRRD0004\ntype: float\ndimension: 3\nsizes: 5 4 3\nendian: little\nencoding: raw\n"
                                   "data file: x.raw\n\n")
    case = Case("x", (Volume(source / "x.nrrd"),), None, UNLABELLED)
    folder = _one(source, nnunet, case, labels=MIXED, file_ending=".nrrd")
    np.testing.assert_array_equal(_voxels(folder / "imagesTr" / "x_0000.nrrd"), voxels)


def _join(file, channels):
    sitk.WriteImage(sitk.JoinSeries([sitk.ReadImage(str(channel)) for channel in channels]), str(file))
    return file


def test_a_file_of_several_channels_is_copied_where_nnunet_reads_it_and_split_where_not(source, nnunet):
    images = [source / "images" / f"{name}.nii.gz" for name in ("a1", "b1")]
    for id_, ending, joined in ((1, ".nii.gz", ".nii.gz"), (2, ".nii", ".nii"), (3, ".nii.gz", ".nrrd")):
        file = _join(source / f"joined{joined}", images)
        case = Case("x", (Volume(file),), Volume(source / "labels" / "a1.nii.gz"))
        folder = write_dataset(_dataset(source, name="D", channel_names=["T1", "T2"], training=[case], validation=[],
                                        file_ending=ending), id_, processes=1)
        names = sorted(os.listdir(folder / "imagesTr"))
        if joined == ".nii.gz":
            assert names == ["x_0000.nii.gz"]
            assert (folder / "imagesTr" / names[0]).read_bytes() == file.read_bytes()
        else:
            assert names == [f"x_0000{ending}", f"x_0001{ending}"]
            for name, image in zip(names, images):
                np.testing.assert_array_equal(_voxels(folder / "imagesTr" / name), _voxels(image))
        np.testing.assert_array_equal(_voxels(folder / "labelsTr" / f"x{ending}"), _voxels(source / "labels" / "a1.nii.gz"))


def test_channels_are_taken_out_of_a_file_that_is_read_once(source, nnunet, monkeypatch):
    from nnunet_confkd.data import images as volumes
    images = [source / "images" / f"{name}.nii.gz" for name in ("a1", "b1", "c1")]
    file = _join(source / "joined.nii.gz", images)
    reads = []
    monkeypatch.setattr(volumes, "read", lambda f, read=volumes.read: reads.append(f) or read(f))
    case = Case("x", tuple(Volume(file, channel=i) for i in (2, 0)), None, UNLABELLED)
    folder = _one(source, nnunet, case, labels=MIXED, channel_names=["T1", "T2"])
    for written, image in (("x_0000", images[2]), ("x_0001", images[0])):
        np.testing.assert_array_equal(_voxels(folder / "imagesTr" / f"{written}.nii.gz"), _voxels(image))
    assert reads.count(file) == 1


def test_channels_whose_spacing_differs_a_little_come_to_one_grid(source, nnunet):
    """nnU-Net refuses channels that differ by more than 1e-5 of the spacing."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    _change(source / "images" / "b1.nii.gz", spacing=(0.7002, 0.9, 5.1))
    images = tuple(Volume(source / "images" / f"{name}.nii.gz") for name in ("a1", "b1"))
    folder = _one(source, nnunet, Case("x", images, Volume(source / "labels" / "a1.nii.gz")), channel_names=["T1", "T2"])
    files = [str(folder / "imagesTr" / f"x_000{i}.nii.gz") for i in (0, 1)]
    read, _ = SimpleITKIO().read_images(files)
    np.testing.assert_array_equal(read, np.stack([_voxels(volume.file) for volume in images]))
    assert Path(files[0]).read_bytes() == images[0].file.read_bytes()
    assert Path(files[1]).read_bytes() != images[1].file.read_bytes()


def test_a_tiff_data_set_keeps_its_spacing(source, nnunet):
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
    stack = np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.uint8)
    for name in ("images/p_0001.tif", "labels/p_0001.tif", "images/q.tif"):
        (source / name).parent.mkdir(exist_ok=True)
        tifffile.imwrite(source / name, stack)
        (source / name).with_suffix(".json").write_text(json.dumps({"spacing": [5, 2, 1]}))
    training = [Case("p_0001", (Volume(source / "images/p_0001.tif"),), Volume(source / "labels/p_0001.tif")),
                Case("q", (Volume(source / "images/q.tif"),), None, UNLABELLED)]
    folder = write_dataset(_dataset(source, training=training, validation=[], file_ending=".tif", patient_pattern=None,
                                    labels=MIXED), 7, processes=1)
    assert sorted(os.listdir(folder / "imagesTr")) == ["p_0001.json", "p_0001_0000.tif", "q.json", "q_0000.tif"]
    for name in ("p_0001", "q"):
        assert Tiff3DIO().read_images([str(folder / "imagesTr" / f"{name}_0000.tif")])[1]["spacing"] == [5, 2, 1]
        assert Tiff3DIO().read_seg(str(folder / "labelsTr" / f"{name}.tif"))[1]["spacing"] == [5, 2, 1]


def test_coloured_pictures_have_three_channels(source, nnunet):
    colours = np.random.default_rng(0).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    skio.imsave(source / "p.png", colours, check_contrast=False)
    skio.imsave(source / "p_label.png", colours[..., 0] % 3, check_contrast=False)
    training = [Case("p", (Volume(source / "p.png"),), Volume(source / "p_label.png")),
                Case("q", (Volume(source / "p.png"),), None, UNLABELLED),
                Case("r", (Volume(source / "p.png"),), Volume(source / "p_label.png"), values={0: 0, 1: 2, 2: 1})]
    folder = write_dataset(_dataset(source, training=training, validation=[], file_ending=".png", patient_pattern=None,
                                    labels=MIXED, channel_names=["R", "G", "B"]), 7, processes=1)
    assert (folder / "imagesTr" / "q_0000.png").read_bytes() == (source / "p.png").read_bytes()
    assert (folder / "labelsTr" / "p.png").read_bytes() == (source / "p_label.png").read_bytes()
    np.testing.assert_array_equal(skio.imread(folder / "labelsTr" / "q.png"), np.full((6, 7), 3))
    np.testing.assert_array_equal(skio.imread(folder / "labelsTr" / "r.png"), np.array([0, 2, 1])[colours[..., 0] % 3])


# ---- labels ---------------------------------------------------------------------------------------------------------

def test_an_unlabelled_case_gets_a_label_of_nothing_but_ignore(source, nnunet):
    folder = _one(source, nnunet, _case(source, "a1", UNLABELLED), labels=MIXED)
    label, image = (sitk.ReadImage(str(folder / name)) for name in ("labelsTr/a1.nii.gz", "imagesTr/a1_0000.nii.gz"))
    assert (sitk.GetArrayFromImage(label) == 3).all() and label.GetSize() == image.GetSize()
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(label, get)(), getattr(image, get)())


@pytest.mark.parametrize("values", [{0: 0, 1: 1, 2: 2, 4: 3}, {0: 0, 1: 2, 2: 1, 4: 3}])
def test_values_are_mapped(source, nnunet, values):
    label = _voxels(source / "labels" / "a1.nii.gz")
    label[0] = 4
    _save(source / "labels" / "a1.nii.gz", label)
    folder = _one(source, nnunet, _case(source, "a1", PARTIAL, values=values), labels=MIXED)
    expected = np.array([values.get(value, 99) for value in range(5)])[label]
    np.testing.assert_array_equal(_voxels(folder / "labelsTr" / "a1.nii.gz"), expected)


def test_a_map_that_changes_nothing_leaves_the_bytes(source, nnunet):
    folder = _one(source, nnunet, _case(source, "a1", values={0: 0, 1: 1, 2: 2, 9: 0}))
    assert (folder / "labelsTr" / "a1.nii.gz").read_bytes() == (source / "labels" / "a1.nii.gz").read_bytes()


def test_a_label_of_floats_becomes_one_of_integers(source, nnunet):
    label = _voxels(source / "labels" / "a1.nii.gz")
    _save(source / "labels" / "a1.nii.gz", label.astype(np.float32))
    written = _voxels(_one(source, nnunet, _case(source, "a1")) / "labelsTr" / "a1.nii.gz")
    assert written.dtype == np.uint8
    np.testing.assert_array_equal(written, label)


def test_values_beyond_255_fit(source, nnunet):
    label = _voxels(source / "labels" / "a1.nii.gz").astype(np.int16)
    label[0, 0, 0] = 700
    _save(source / "labels" / "a1.nii.gz", label)
    values = {0: 0, 1: 1, 2: 2, 700: 300}
    folder = _one(source, nnunet, _case(source, "a1", values=values), labels={**LABELS, "far": 300})
    assert _voxels(folder / "labelsTr" / "a1.nii.gz")[0, 0, 0] == 300


@pytest.mark.parametrize("grid", [{"spacing": (0.7003, 0.9, 5.1)}, {"origin": (-3.45, 11.25, 2.2)},
                                  {"direction": (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)[:8] + (1.0,)}])
def test_a_label_whose_grid_is_a_little_off_is_written_on_that_of_the_image(source, nnunet, grid):
    if "direction" in grid:  # turned by 1/2000 about z
        turn = np.array([[np.cos(5e-4), -np.sin(5e-4), 0], [np.sin(5e-4), np.cos(5e-4), 0], [0, 0, 1]])
        grid = {"direction": (turn @ np.reshape(OBLIQUE, (3, 3))).ravel().tolist()}
    file = _change(source / "labels" / "a1.nii.gz", **grid)
    folder = _one(source, nnunet, _case(source, "a1"))
    label, image = (sitk.ReadImage(str(folder / name)) for name in ("labelsTr/a1.nii.gz", "imagesTr/a1_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label), _voxels(file))
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(label, get)(), getattr(image, get)())
    assert (folder / "imagesTr" / "a1_0000.nii.gz").read_bytes() == (source / "images" / "a1.nii.gz").read_bytes()


def test_test_cases_may_have_labels_and_may_not(source, nnunet):
    images = write_dataset(_dataset(source, name="A", test=[replace(_case(source, "a1"), name="t", label=None)]), 1, 1)
    assert os.listdir(images / "imagesTs") == ["t_0000.nii.gz"] and not (images / "labelsTs").exists()
    both = write_dataset(_dataset(source, name="B", test=[replace(_case(source, "a1"), name="t")]), 2, 1)
    assert (both / "labelsTs" / "t.nii.gz").read_bytes() == (source / "labels" / "a1.nii.gz").read_bytes()
    for folder in (images, both):
        described = json.loads((folder / "dataset.json").read_text())
        assert described["numTraining"] == 5 and "t" not in described["supervision"]


def test_regions_and_their_order_are_described(source, nnunet):
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    folder = write_dataset(_dataset(source, labels=labels, regions_class_order=[1, 2], patient_pattern=None), 7, 1)
    described = json.loads((folder / "dataset.json").read_text())
    assert described["labels"] == labels and described["regions_class_order"] == [1, 2]
    assert "patient_pattern" not in described
    assert raw_format.label_values(labels) == {0, 1, 2, 3} == _dataset(source, labels=labels).values


def test_the_ignore_label_is_one_above_the_highest():
    assert with_ignore(LABELS) == MIXED == with_ignore(MIXED)
    assert with_ignore({"background": 0, "whole": [1, 2, 4]})["ignore"] == 5
    with pytest.raises(InputError, match="the ignore label is 255, but nnU-Net needs the highest other label plus one, 3"):
        with_ignore({**LABELS, "ignore": 255})
    assert with_ignore({"background": 0, "organ": 32766})["ignore"] == 32767
    with pytest.raises(InputError, match="the labels go up to 32767, and nnU-Net keeps them in 16 bits"):
        with_ignore({"background": 0, "organ": 32767})


# ---- processes ------------------------------------------------------------------------------------------------------

def test_two_processes_write_the_bytes_of_one(source, nnunet):
    training = [_case(source, "a1"), _case(source, "a2", PARTIAL, values={0: 0, 1: 2, 2: 3}),
                _case(source, "b1", UNLABELLED), _case(source, "d1")]
    one, two = (write_dataset(_dataset(source, name=f"Of{n}", labels=MIXED, training=training), n, n) for n in (1, 2))
    first, second = _tree(one), _tree(two)
    assert json.loads(first.pop("dataset.json")) | {"name": "Of2"} == json.loads(second.pop("dataset.json"))
    assert first == second and len(first) == 10
    assert _tree(nnunet / "preprocessed" / one.name) == _tree(nnunet / "preprocessed" / two.name)


def test_progress_is_shown_on_a_terminal_and_nowhere_else(source, nnunet, capsys, monkeypatch):
    write_dataset(_dataset(source, name="Quiet"), 1, 1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    write_dataset(_dataset(source), 2, 1)
    assert "writing Test: 100%" in capsys.readouterr().err


def test_nnunet_finds_nothing_wrong(source, nnunet, capfd):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
    _change(source / "labels" / "a1.nii.gz", origin=(-3.45, 11.25, 2.0))
    _change(source / "images" / "c1.nii.gz", spacing=(0.7002, 0.9, 5.1))
    second = Volume(source / "images" / "c1.nii.gz")
    training = [_case(source, "a1"), _case(source, "a2", PARTIAL, values={0: 0, 1: 2, 2: 3}),
                _case(source, "b1", UNLABELLED), _case(source, "d1")]
    training = [replace(case, images=(*case.images, second)) for case in training]
    folder = write_dataset(_dataset(source, labels=MIXED, training=training, channel_names=["T1", "T2"]), 7, 1)
    verify_dataset_integrity(str(folder), num_processes=1)
    out = capfd.readouterr().out
    assert "verify_dataset_integrity Done" in out
    assert not any(word in out.lower() for word in ("warning", "error:", "mismatch"))


# ---- patients -------------------------------------------------------------------------------------------------------

def test_the_patient_is_the_first_group_of_the_pattern_or_all_that_it_matches():
    cases = ["p01_x", "p01_y", "p02_x"]
    assert patients_of(cases, None) == {case: case for case in cases}
    assert patients_of(cases, r"(p\d+)_") == patients_of(cases, r"p\d+") == {"p01_x": "p01", "p01_y": "p01", "p02_x": "p02"}


def test_cases_that_the_pattern_does_not_match_are_named():
    for pattern in (r"(p\d+)_", r"(p\d+)?.*", r"(p?)"):  # no match, a group without one, a group of nothing
        with pytest.raises(InputError) as error:
            patients_of(["p1_x", "q1_x", "r1_x"], pattern)
        assert str(error.value) == f"the patient pattern {pattern!r} does not match these cases; correct it: q1_x, r1_x"
    with pytest.raises(InputError) as error:
        patients_of([f"c{i}" for i in range(12)], "x")
    assert str(error.value).endswith("correct it: c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 and 2 more")
    with pytest.raises(InputError) as error:
        patients_of(["p1"], "(p")
    assert str(error.value).startswith("the patient pattern '(p' is no regular expression: ")


PATIENTS = [f"patient{i:03d}" for i in range(1, 101)]


def _of_role(roles, role):
    return {patient for patient, found in roles.items() if found == role}


def test_a_fifth_of_the_patients_validates_and_more_full_ones_hold_fewer():
    previous = set()
    for number in (1, 3, 5, 10, 80):
        roles = choose_patients(PATIENTS, 0, [str(number)])
        full = _of_role(roles, "full")
        assert len(full) == number and previous < full
        assert len(_of_role(roles, "validation")) == 20 and len(_of_role(roles, "other")) == 80 - number
        assert _of_role(roles, "validation") == _of_role(choose_patients(PATIENTS[::-1] * 2, 0, ["7"]), "validation")
        previous = full
    assert _of_role(choose_patients(PATIENTS, 1, ["3"]), "full") != _of_role(choose_patients(PATIENTS, 0, ["3"]), "full")


def test_of_few_patients_one_validates_and_of_one_none():
    assert sorted(choose_patients(["a", "b"], 0, ["1"]).values()) == ["full", "validation"]
    assert choose_patients(["a"], 0, ["1"]) == {"a": "full"}


def test_patients_can_be_named_and_then_do_not_validate():
    default = choose_patients(PATIENTS, 0, ["1"])
    named = sorted(_of_role(default, "validation"))[:2]
    roles = choose_patients(PATIENTS, 0, named)
    assert _of_role(roles, "full") == set(named) and len(_of_role(roles, "validation")) == 20
    roles = choose_patients(PATIENTS, 0, ["3"], validation=["patient001"])
    assert _of_role(roles, "validation") == {"patient001"} and len(_of_role(roles, "full")) == 3


@pytest.mark.parametrize("full, validation, message", [
    (["patient001", "nobody", "x"], None, f"no such patients: nobody, x; there are {', '.join(PATIENTS[:10])} and 90 more"),
    (["81"], None, "81 full patients are asked for; besides the 20 that validate there are 80 to choose from"),
    (["0"], None, "0 full patients are asked for; besides the 20 that validate there are 80 to choose from"),
    (PATIENTS[:81], None, "81 of 100 patients are to be full; name fewer, 20 are needed to validate"),
    (["patient002", "patient001"], ["patient001"], "these patients validate and cannot be among the full ones: patient001")])
def test_patients_that_cannot_be_full_are_refused(full, validation, message):
    with pytest.raises(InputError) as error:
        choose_patients(PATIENTS, 0, full, validation)
    assert str(error.value) == message


# ---- bad data -------------------------------------------------------------------------------------------------------

@pytest.fixture
def refused(source, nnunet):
    """Write it, see that it is refused and that nothing has changed anywhere; returns the text."""
    def refuse(dataset, dataset_id=7, processes=1):
        before, there = _state(source), _tree(nnunet)
        with pytest.raises(InputError) as error:
            write_dataset(dataset, dataset_id, processes)
        assert _state(source) == before and _tree(nnunet) == there
        return str(error.value)
    return refuse


CORRECT = "correct the label, or name and map these values"
RESAMPLE = "resample it, or correct its header"
COPY = "copy it there, or give the folder that holds it"
UNREADABLE = "cannot be read as an image; is it cut short, damaged, or of another format? Fetch or write it anew ("


def _cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def _save_voxels(change):
    def apply(file):
        voxels = _voxels(file).astype(np.float32)
        voxels[1, 2, 3] = change
        _save(file, voxels)
    return apply


@pytest.mark.parametrize("damage, text", [
    (_cut, UNREADABLE + "Compressed file ended before the end-of-stream marker was reached)"),
    (lambda file: file.write_text("<html>"), UNREADABLE + "Not a gzipped file (b'<h'))"),
    (lambda file: file.unlink(), "there is no such file"),
    (_save_voxels(np.nan), "1 voxels are not finite (NaN or infinite); replace them"),
    (_save_voxels(np.inf), "1 voxels are not finite (NaN or infinite); replace them"),
    (lambda file: sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5, 3), np.uint8), isVector=True), str(file)),
     "holds 3 values a voxel (colours?); nnU-Net needs a file a channel")])
def test_an_image_that_cannot_be_used_is_named(source, refused, damage, text):
    file = source / "images" / "b1.nii.gz"
    damage(file)
    assert refused(_dataset(source)) == f"{file}: {text}"


@pytest.mark.parametrize("damage, text", [
    (_cut, UNREADABLE + "Compressed file ended before the end-of-stream marker was reached)"),
    (lambda file: file.write_text("<html>"), UNREADABLE + "Not a gzipped file (b'<h'))"),
    (lambda file: file.unlink(), "there is no such file"),
    (_save_voxels(0.5), "holds values that are no integers: 0.5; correct the label"),
    (_save_voxels(np.nan), "holds values that are no integers: nan; correct the label"),
    (_save_voxels(-np.inf), "holds values that are no integers: -inf; correct the label"),
    (_save_voxels(5), f"holds the values 5; a full label may hold 0, 1, 2; {CORRECT}"),
    (_save_voxels(-1), f"holds the values -1; a full label may hold 0, 1, 2; {CORRECT}"),
    (lambda file: sitk.WriteImage(sitk.JoinSeries([sitk.ReadImage(str(file))] * 2), str(file)),
     "holds 2 channels; a label has one")])
def test_a_label_that_cannot_be_used_is_named(source, refused, damage, text):
    file = source / "labels" / "b1.nii.gz"
    damage(file)
    assert refused(_dataset(source)) == f"{file}: {text}"


@pytest.mark.parametrize("grid, text", [
    ({"spacing": (0.702, 0.9, 5.1)}, "spacing (0.702, 0.9, 5.1) and (0.7, 0.9, 5.1)"),
    ({"origin": (-3.5, 11.25, 2.6)}, "origin (-3.5, 11.25, 2.6) and (-3.5, 11.25, 2.0)"),
    ({"direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)},
     "direction (1.0, -0.0, -0.0, -0.0, 1.0, -0.0, 0.0, 0.0, 1.0) and (0.8, -0.6, -0.0, 0.6, 0.8, -0.0, 0.0, 0.0, 1.0)")])
def test_a_label_on_another_grid_is_refused(source, refused, grid, text):
    file = _change(source / "labels" / "b1.nii.gz", **grid)
    assert refused(_dataset(source)) == (
        f"{file}: is on another grid than {source / 'images' / 'b1.nii.gz'}: {text}; {RESAMPLE}")


def test_a_label_of_another_size_is_refused(source, refused):
    file = _save(source / "labels" / "b1.nii.gz", np.zeros((3, 4, 6), np.uint8))
    assert refused(_dataset(source)) == (
        f"{file}: is on another grid than {source / 'images' / 'b1.nii.gz'}: size (6, 4, 3) and (5, 4, 3); {RESAMPLE}")


def test_channels_on_different_grids_are_refused(source, refused):
    _change(source / "images" / "b1.nii.gz", spacing=(0.7, 0.9, 5.2))
    images = tuple(Volume(source / "images" / f"{name}.nii.gz") for name in ("a1", "b1"))
    case = Case("x", images, Volume(source / "labels" / "a1.nii.gz"))
    assert refused(_dataset(source, training=[case], validation=[], channel_names=["T1", "T2"])) == (
        f"{images[1].file}: is on another grid than {images[0].file}: spacing (0.7, 0.9, 5.2) and (0.7, 0.9, 5.1); "
        f"{RESAMPLE}")


@pytest.mark.parametrize("channel", [None, 5])
def test_a_wrong_number_of_channels_is_refused(source, refused, channel):
    file = source / "images" / "a1.nii.gz"
    case = Case("x", (Volume(file), Volume(file, channel)), None, UNLABELLED)
    names = ["T1"] if channel is None else ["T1", "T2"]
    assert refused(_dataset(source, training=[case], validation=[], labels=MIXED, channel_names=names)) == (
        f"{file}: the case has {2 if channel is None else 1} channels; {len(names)} are expected ({', '.join(names)})")


def test_the_ignore_value_in_a_full_label_is_refused(source, refused):
    file = source / "labels" / "a1.nii.gz"
    _save_voxels(3)(file)
    training = [_case(source, "a1"), _case(source, "b1", PARTIAL)]
    assert refused(_dataset(source, labels=MIXED, training=training, validation=[])) == (
        f"{file}: holds the values 3; a full label may hold 0, 1, 2; {CORRECT}")


def test_a_value_without_a_place_in_the_map_is_refused(source, refused):
    file = source / "labels" / "a1.nii.gz"
    assert refused(_dataset(source, training=[_case(source, "a1", values={0: 0, 1: 1})], validation=[])) == (
        f"{file}: holds the values 2; a full label may hold 0, 1; {CORRECT}")


@pytest.mark.parametrize("kind", [FULL, PARTIAL])
def test_an_image_without_a_label_is_refused(source, refused, kind):
    case = replace(_case(source, "a1", kind), label=None)
    assert refused(_dataset(source, labels=MIXED, training=[case], validation=[])) == (
        f"{source / 'images' / 'a1.nii.gz'}: has no label; add it, or leave the image out")


def test_what_the_converter_found_is_told_with_the_rest(source, refused):
    """All of it, in one error: of the converter, of the whole, and of several files."""
    _cut(source / "images" / "a1.nii.gz")
    _save_voxels(0.5)(source / "labels" / "a1.nii.gz")
    _save_voxels(np.nan)(source / "images" / "a2.nii.gz")
    _save_voxels(7)(source / "labels" / "a2.nii.gz")
    _change(source / "labels" / "b1.nii.gz", spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0))
    grid = f"{source / 'labels' / 'b1.nii.gz'}: is on another grid than {source / 'images' / 'b1.nii.gz'}"
    lines = refused(_dataset(source, problems=["patient e: is missing"], validation=["z1"])).splitlines()
    assert lines[0] == "8 problems; nothing was written:"
    assert [line[2:] for line in lines[1:]] == [
        "patient e: is missing",
        "z1: is to validate, but its label is not there",
        f"{source / 'images' / 'a1.nii.gz'}: {UNREADABLE}Compressed file ended before the end-of-stream marker was reached)",
        f"{source / 'labels' / 'a1.nii.gz'}: holds values that are no integers: 0.5; correct the label",
        f"{source / 'images' / 'a2.nii.gz'}: 1 voxels are not finite (NaN or infinite); replace them",
        f"{source / 'labels' / 'a2.nii.gz'}: holds the values 7; a full label may hold 0, 1, 2; {CORRECT}",
        f"{grid}: spacing (1.0, 1.0, 1.0) and (0.7, 0.9, 5.1); {RESAMPLE}",
        f"{grid}: origin (0.0, 0.0, 0.0) and (-3.5, 11.25, 2.0); {RESAMPLE}"]


@pytest.mark.parametrize("name, reason", [
    *((name, "is empty, hidden, or begins or ends with a space") for name in ("", ".hidden", " a", "a\n", "../a")),
    *((name, 'holds a control character or one of / \\ : * ? " < > |') for name in (
        "a/b", "a\\b", "a:b", "a*", "a?", 'a"', "a\tb")),
    ("a_seg", "ends with _seg, by which nnU-Net tells labels from images")])
def test_names_that_nnunet_cannot_have_are_refused(source, refused, name, reason):
    training = [_case(source, "a1"), replace(_case(source, "b1"), name=name)]
    assert refused(_dataset(source, training=training, validation=[], patient_pattern=None)) == (
        f"{source / 'images' / 'b1.nii.gz'}: the name of the case, {name!r}, {reason}; rename it")


def test_ordinary_names_are_not_refused():
    for name in ("a", "patient001_frame01", "a.b", "a b", "Ä", "seg", "a_seg2", "a_0000"):
        assert raw_format.name_problem(name) is None


@pytest.mark.parametrize("name", ["a1", "A1"])
@pytest.mark.parametrize("where", ["training", "test"])
def test_one_name_for_two_cases_is_refused_also_in_capitals(source, refused, name, where):
    twin = replace(_case(source, "b1"), name=name)
    training = [_case(source, "a1")] + ([twin] if where == "training" else [])
    test = [twin] if where == "test" else []
    assert refused(_dataset(source, training=training, test=test, validation=[], patient_pattern=None)) == (
        f"{source}/images/b1.nii.gz: the name of the case, {name!r}, is that of {source}/images/a1.nii.gz, too; rename one")


@pytest.mark.parametrize("changed, text", [
    ({"training": [], "validation": []}, "there is not one training case"),
    ({"patient_pattern": "(x)"}, "the patient pattern '(x)' does not match these cases; correct it: a1, a2, b1, c1, d1"),
    ({"patient_pattern": "(a"}, "the patient pattern '(a' is no regular expression: missing ), unterminated subpattern at "
                                "position 0"),
    ({"validation": ["a2"]}, "patient a: has cases for training and for validation")])
def test_what_is_wrong_with_the_whole_is_told(source, refused, changed, text):
    assert refused(_dataset(source, **changed)) == text


def test_partial_cases_need_an_ignore_label_and_do_not_validate(source, refused):
    training = [_case(source, "a1"), _case(source, "d1", PARTIAL)]
    assert refused(_dataset(source, training=training)).splitlines()[1:] == [
        "  there are partial or unlabelled cases, but the labels have no \"ignore\"",
        "  d1: is to validate, but its label is partial"]


def test_files_outside_of_the_source_are_refused(source, refused, tmp_path):
    outside = _save(tmp_path / "outside" / "a1.nii.gz", np.zeros(SHAPE, np.float32))
    (source / "images" / "b1.nii.gz").unlink()
    (source / "images" / "b1.nii.gz").symlink_to(outside)
    (source / "labels" / "c1.nii.gz").unlink()
    (source / "labels" / "c1.nii.gz").symlink_to("../../outside/a1.nii.gz")
    up = source / ".." / "outside" / "a1.nii.gz"
    training = [_case(source, "b1"), _case(source, "c1"), Case("d1", (Volume(up),), Volume(source / "labels" / "d1.nii.gz"))]
    lines = refused(_dataset(source, training=training, validation=[])).splitlines()
    assert lines[1:] == [f"  {file}: leads out of the source folder, to {outside}; {COPY}" for file in (
        source / "images" / "b1.nii.gz", source / "labels" / "c1.nii.gz", up)]


def test_what_belongs_to_a_file_may_not_lie_outside_of_the_source_either(source, refused, tmp_path):
    voxels = np.arange(60, dtype=np.float32).reshape(SHAPE)
    _save(source / "x.mhd", voxels)
    (source / "x.raw").rename(tmp_path / "x.raw")
    (source / "x.raw").symlink_to(tmp_path / "x.raw")
    tifffile.imwrite(source / "y.tif", np.zeros((5, 6, 7), np.uint8))
    (tmp_path / "y.json").write_text('{"spacing": [1, 1, 1]}')
    (source / "y.json").symlink_to(tmp_path / "y.json")
    for file, part in (("x.mhd", "x.raw"), ("y.tif", "y.json")):
        case = Case("x", (Volume(source / file),), None, UNLABELLED)
        assert refused(_dataset(source, training=[case], validation=[], labels=MIXED, patient_pattern=None)) == (
            f"{source / part}: leads out of the source folder, to {tmp_path / part}; {COPY}")


def test_links_within_the_given_folders_are_followed(source, nnunet, tmp_path):
    (tmp_path / "shortcut").symlink_to(source)
    (source / "images" / "x.nii.gz").symlink_to("a1.nii.gz")
    case = Case("x", (Volume(tmp_path / "shortcut" / "images" / "x.nii.gz"),), Volume(source / "labels" / "a1.nii.gz"))
    folder = write_dataset(_dataset(source, training=[case], validation=[], roots=(tmp_path / "shortcut",),
                                    patient_pattern=None), 7, 1, link=True)
    written = folder / "imagesTr" / "x_0000.nii.gz"
    assert not written.is_symlink() and written.stat().st_ino == (source / "images" / "a1.nii.gz").stat().st_ino


def test_two_dimensional_nii_is_refused_because_nnunet_does_not_read_it(source, refused):
    file = source / "flat.nii"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5), np.float32)), str(file))
    case = Case("x", (Volume(file),), None, UNLABELLED)
    assert refused(_dataset(source, training=[case], validation=[], labels=MIXED, file_ending=".nii")) == (
        f"{file}: is two-dimensional, which nnU-Net does not read from .nii; compress all files to .nii.gz")


# ---- ids, names and folders -----------------------------------------------------------------------------------------

def _not_kept(raw, preprocessed, name="Test"):
    return (f"{raw}/Dataset007_{name}: cannot be written, nothing was kept; check the permissions and the space of {raw} "
            f"and {preprocessed} ")


@pytest.mark.parametrize("dataset_id", [0, -1, 1000])
def test_ids_out_of_range_are_refused(source, refused, dataset_id):
    assert refused(_dataset(source), dataset_id) == f"the id of a data set is a number from 1 to 999, not {dataset_id}"


@pytest.mark.parametrize("name", ["", "a b", "../a", "a/b", "_a", "ä", "a\n"])
def test_bad_names_of_data_sets_are_refused(source, refused, name):
    assert refused(_dataset(source, name=name)) == (
        f"the name of a data set has letters, digits, _ and - only, not {name!r}")
    assert folder_name(7, "A_b-2") == "Dataset007_A_b-2"


@pytest.mark.parametrize("where", ["raw", "preprocessed", "results"])
def test_a_taken_id_is_refused_under_any_name(source, nnunet, refused, where):
    (nnunet / where / "Dataset007_Other").mkdir()
    (nnunet / where / "Dataset007_Other" / "file").write_text("mine")
    assert refused(_dataset(source)) == (
        f"the id 7 is taken by {nnunet / where / 'Dataset007_Other'}; choose another --id, or remove that folder")


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_a_variable_that_is_not_set_is_named(source, refused, monkeypatch, variable):
    for value in (None, ""):
        monkeypatch.delenv(variable, raising=False) if value is None else monkeypatch.setenv(variable, value)
        assert refused(_dataset(source)) == (
            f"the environment variable {variable} is not set; nnU-Net's data sets lie in the folder that it names: export "
            f"{variable}=/path/to/{variable}")


def test_the_folder_of_results_need_not_be_known(source, nnunet, monkeypatch):
    monkeypatch.delenv("nnUNet_results")
    assert write_dataset(_dataset(source), 7, 1).is_dir()


def test_folders_that_do_not_exist_yet_are_made(source, nnunet, monkeypatch):
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(nnunet / "new" / name))
    assert write_dataset(_dataset(source), 7, 1) == nnunet / "new" / "raw" / "Dataset007_Test"
    assert (nnunet / "new" / "preprocessed" / "Dataset007_Test" / "splits_final.json").is_file()


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_a_folder_below_a_file_is_refused(source, nnunet, refused, monkeypatch, variable):
    (nnunet / "file").write_text("")
    for value in (nnunet / "file", nnunet / "file" / "below"):
        monkeypatch.setenv(variable, str(value))
        text = refused(_dataset(source))
        raw, preprocessed = (os.environ[f"nnUNet_{name}"] for name in ("raw", "preprocessed"))
        assert text.startswith(_not_kept(raw, preprocessed) + "([Errno ") and f"'{nnunet / 'file'}" in text


@posix
@pytest.mark.parametrize("variable", ["raw", "preprocessed"])
def test_a_folder_without_the_right_to_write_is_refused(monkeypatch, variable):
    """In a place that another user can reach, which the folders of the other tests are not."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        image, label = (_save(place / f"{name}.nii.gz", np.zeros(SHAPE, np.uint8)) for name in ("image", "label"))
        for name in ("raw", "preprocessed"):
            (place / name).mkdir()
            (place / name).chmod(0o555 if name == variable else 0o777)
            monkeypatch.setenv(f"nnUNet_{name}", str(place / name))
        monkeypatch.delenv("nnUNet_results", raising=False)
        place.chmod(0o755)
        dataset = Dataset("Test", ["T1"], LABELS, ".nii.gz", [Case("a", (Volume(image),), Volume(label))])
        root = os.geteuid() == 0
        if root:  # who may write everywhere
            os.seteuid(65534)
        try:
            with pytest.raises(InputError) as error:
                write_dataset(dataset, 7, 1)
        finally:
            if root:
                os.seteuid(0)
        assert str(error.value) == _not_kept(place / "raw", place / "preprocessed") + (
            f"([Errno 13] Permission denied: '{place}/{variable}/.Dataset007.unfinished')")
        assert os.listdir(place / "raw") == os.listdir(place / "preprocessed") == []


def test_data_sets_are_found_by_id_and_by_name(nnunet):
    for name in ("Dataset027_ACDC", "Dataset028_A", "Dataset028_B"):
        (nnunet / "raw" / name).mkdir()
    assert {find_dataset(wanted) for wanted in (27, "27", "027", "Dataset027_ACDC")} == {"Dataset027_ACDC"}
    for wanted, text in ((28, "has several data sets of the id 28: Dataset028_A, Dataset028_B"),
                         ("Dataset001_X", "has no data set Dataset001_X; set nnUNet_raw to the folder that holds it"),
                         (5, "has no data set 5; set nnUNet_raw to the folder that holds it")):
        with pytest.raises(InputError) as error:
            find_dataset(wanted)
        assert str(error.value) == f"{nnunet / 'raw'}: {text}"


# ---- a full disk ----------------------------------------------------------------------------------------------------

RUN = """
import json, os, signal, sys, time
from pathlib import Path
from nnunet_confkd.data.images import Volume, read
from nnunet_confkd.data.raw_format import Case, Dataset, write_dataset
from nnunet_confkd.errors import InputError

source, pause = Path(sys.argv[1]), float(sys.argv[3])

def slow(file):
    (source.parent / "workers" / str(os.getpid())).touch()
    time.sleep(pause)
    return read(file)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    (source.parent / "workers").mkdir(exist_ok=True)
    image, label = (Volume(source / name / "a1.nii.gz", reader=slow) for name in ("images", "labels"))
    cases = [Case(f"case{i:03d}", (image,), label) for i in range(int(sys.argv[4]))]
    try:
        write_dataset(Dataset("Run", ["T1"], {"background": 0, "one": 1, "two": 2}, ".nii.gz", cases, ["case000"]), 7,
                      int(sys.argv[2]))
    except InputError as error:
        sys.exit(str(error))
"""


@pytest.fixture
def start(source, tmp_path):
    """Start a conversion in a process of its own, of `cases` that take twice `pause` seconds each: minutes."""
    if os.name == "nt":
        pytest.skip("what ends the conversion are POSIX's signals and limits")
    (tmp_path / "run.py").write_text(RUN)
    started = []

    def run(processes, pause=0.1, cases=2000, **options):
        command = [sys.executable, str(tmp_path / "run.py"), *map(str, (source, processes, pause, cases))]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, **options))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def _written(nnunet):
    return list((nnunet / "raw").glob(".Dataset007.unfinished/*/labelsTr/*.nii.gz"))


def _runs(process):
    """A zombie, which nobody waits for, does not."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("only Linux tells which processes are zombies")
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _workers(tmp_path):
    return [int(name) for name in os.listdir(tmp_path / "workers")]


def _wait_until_both_write(nnunet, tmp_path):
    _wait_for(lambda: len(_written(nnunet)) > 2 and len(_workers(tmp_path)) == 2)


def test_a_full_disk_leaves_nothing(source, nnunet, start):
    """No file may grow beyond 300 bytes; an image has about 400."""
    resource = pytest.importorskip("resource", reason="Windows has no limit of the size of files")
    before = _state(source)
    process = start(2, 0, 4, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)))
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1
    assert text.startswith(_not_kept(nnunet / "raw", nnunet / "preprocessed", "Run"))
    assert f"{nnunet}/raw/.Dataset007.unfinished/" in text and "is the disk full?" in text
    assert _tree(nnunet) == {"raw": None, "preprocessed": None, "results": None} and _state(source) == before


def test_a_disk_that_is_full_from_the_start_leaves_nothing(source, nnunet, refused):
    resource = pytest.importorskip("resource", reason="Windows has no limit of the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        text = refused(_dataset(source))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert text == _not_kept(nnunet / "raw", nnunet / "preprocessed") + "([Errno 27] File too large)"


def test_a_full_file_system_leaves_nothing(source, nnunet, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted; the limit of file sizes above stands for it")
    try:
        monkeypatch.setenv("nnUNet_raw", str(small))
        voxels = np.random.default_rng(0).integers(0, 255, (20, 40, 50)).astype(np.uint8)  # 40 kB, however compressed
        image = _save(source / "images" / "large.nii.gz", voxels)
        _save(source / "images" / "other.mha", voxels)
        before = _state(source)
        for file in (image, source / "images" / "other.mha"):  # copied; converted
            cases = [Case(name, (Volume(file),), None, UNLABELLED) for name in "abc"]
            with pytest.raises(InputError) as error:
                write_dataset(_dataset(source, training=cases, validation=[], labels=MIXED, patient_pattern=None), 7, 1)
            assert str(error.value).startswith(_not_kept(small, nnunet / "preprocessed"))
            assert os.listdir(small) == os.listdir(nnunet / "preprocessed") == []
        assert "No space left on device" in str(error.value) or "is the disk full?" in str(error.value)
        assert _state(source) == before
    finally:
        subprocess.run(["umount", small], check=True)


# ---- interruption and company ---------------------------------------------------------------------------------------

@posix
def test_ctrl_c_leaves_nothing_and_another_process_has_to_wait(source, nnunet, tmp_path, start, refused):
    process = start(2)
    _wait_until_both_write(nnunet, tmp_path)
    with pytest.raises(InputError) as error:  # this process wants the id, too
        write_dataset(_dataset(source), 7, 1)
    assert str(error.value) == (
        f"{nnunet}/raw/.Dataset007.unfinished: another process (number {process.pid} on {socket.gethostname()}) is "
        f"writing a data set of this id. Wait for it; if there is none any more, remove the folder")
    assert len(_written(nnunet)) > 2 and process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does it: to all of them
    _, text = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert text.count("Traceback") == 1  # of the process that was asked to convert, and of no worker
    assert _tree(nnunet) == {"raw": None, "preprocessed": None, "results": None}
    _wait_for(lambda: not any(_runs(worker) for worker in _workers(tmp_path)))


def _slowly_touch(file: Path) -> None:
    time.sleep(0.05)
    file.touch()


def test_ctrl_c_while_cases_are_handed_out_does_not_wait_for_them(tmp_path, monkeypatch):
    submit, submitted = processes.ProcessPoolExecutor.submit, []

    def interrupted(*args):
        if len(submitted) == 100:
            raise KeyboardInterrupt
        submitted.append(submit(*args))
        return submitted[-1]
    monkeypatch.setattr(processes.ProcessPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        processes.parallel(_slowly_touch, [(tmp_path / str(i),) for i in range(200)], 2, "touch")
    assert len(list(tmp_path.iterdir())) < 100


@pytest.fixture
def ctrl_c():
    """Ctrl-C is heard, where the tests run in the background of a shell, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@posix
@pytest.mark.parametrize("number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_does_not_break_into_the_pool(tmp_path, monkeypatch, ctrl_c, number, raised):
    """In the middle of its code it would leave locks held, and the pool would hang."""
    submit, whole = processes.ProcessPoolExecutor.submit, []

    def signalled(*args):
        future = submit(*args)
        if len(whole) == 5:
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # Python handles signals between two instructions
        whole.append(future)
        return future
    monkeypatch.setattr(processes.ProcessPoolExecutor, "submit", signalled)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(raised), terminable():
        processes.parallel(_slowly_touch, [(tmp_path / str(i),) for i in range(200)], 2, "touch")
    assert len(whole) == 6 and all(future.done() for future in whole)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@posix
def test_ctrl_c_while_cases_finish_without_a_pause_is_noticed(monkeypatch, ctrl_c):
    class Finished(Future):
        def result(self, timeout=None):
            asked.append(self)
            if len(asked) == 10:
                os.kill(os.getpid(), signal.SIGINT)
            return super().result(timeout)

    def submit(*_):
        future = Finished()
        future.set_result(None)
        return future
    asked = []
    monkeypatch.setattr(processes.ProcessPoolExecutor, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        processes.parallel(divmod, [(7, 2)] * 150, 2, "dividing")
    assert len(asked) < 20


def test_workers_are_used_from_a_thread_too():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(processes.parallel, divmod, [(7, 2), (9, 4)], 2, "dividing").result() == [(3, 1), (2, 1)]


@posix
@pytest.mark.parametrize("to", ["kill", "killpg"], ids=("one", "group"))
def test_sigterm_leaves_nothing(source, nnunet, tmp_path, start, to):
    process = start(2)
    _wait_until_both_write(nnunet, tmp_path)
    getattr(os, to)(process.pid, signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in text
    assert _tree(nnunet) == {"raw": None, "preprocessed": None, "results": None}
    _wait_for(lambda: not any(_runs(worker) for worker in _workers(tmp_path)))


@posix
def test_a_killed_run_leaves_no_data_set_and_the_next_one_takes_its_place(source, nnunet, tmp_path, start):
    process = start(2)
    _wait_until_both_write(nnunet, tmp_path)
    process.kill()
    process.wait()
    assert os.listdir(nnunet / "raw") == os.listdir(nnunet / "preprocessed") == [".Dataset007.unfinished"]
    _wait_for(lambda: not any(_runs(worker) for worker in _workers(tmp_path)))  # they would write on, and then wait forever
    folder = write_dataset(_dataset(source), 7, 1)
    assert os.listdir(nnunet / "raw") == os.listdir(nnunet / "preprocessed") == [folder.name]
    assert len(os.listdir(folder / "imagesTr")) == 5


def test_what_a_killed_run_left_is_removed_before_anything_is_written(nnunet):
    """It could fill the disk."""
    left = nnunet / "raw" / ".Dataset007.unfinished"
    (left / "by-1" / "imagesTr").mkdir(parents=True)
    (left / "owner.json").write_text(json.dumps({"host": socket.gethostname(), "process": 2 ** 22 + 1}))
    with new_dataset(7, "Test") as (raw, _):
        assert raw.parent == left and not (left / "by-1").exists()
        assert json.loads((left / "owner.json").read_text())["process"] == os.getpid()
    assert os.listdir(nnunet / "raw") == ["Dataset007_Test"]


def test_of_two_that_want_to_take_over_the_slower_gives_way(source, nnunet, monkeypatch):
    """Both have seen that the owner is dead; the other has begun to take over, or is done, before this one begins."""
    left = nnunet / "raw" / ".Dataset007.unfinished"
    left.mkdir()
    dead, other = ({"host": socket.gethostname(), "process": process} for process in (2 ** 22 + 1, 2 ** 22 + 2))
    (left / "owner.json").write_text(json.dumps(dead))

    def other_is_faster(process):
        (left / "by-other").mkdir()
        if begun:
            (left / f"left-by-{process}").mkdir()
        else:
            (left / "owner.json").write_text(json.dumps(other))
        return False

    monkeypatch.setattr(dataset_folders, "_is_running", other_is_faster)
    for begun in (True, False):
        with pytest.raises(InputError, match="another process .* is writing a data set of this id"):
            write_dataset(_dataset(source), 7, 1)
        assert (left / "by-other").is_dir() and json.loads((left / "owner.json").read_text()) == (dead if begun else other)
        (left / "by-other").rmdir()
        (left / f"left-by-{dead['process']}").rmdir()


@pytest.mark.parametrize("owner", [None, "", "[]", '{"host": "elsewhere", "process": 1}'])
def test_what_another_machine_or_nobody_known_left_is_not_touched(source, nnunet, refused, owner):
    left = nnunet / "raw" / ".Dataset007.unfinished"
    left.mkdir()
    if owner is not None:
        (left / "owner.json").write_text(owner)
    who = "number 1 on elsewhere" if owner and "elsewhere" in owner else "number unknown on an unknown machine"
    assert refused(_dataset(source)) == (
        f"{left}: another process ({who}) is writing a data set of this id. Wait for it; if there is none any more, remove "
        f"the folder")


def test_an_id_that_is_taken_while_a_run_lasts_is_not_taken_twice(source, nnunet):
    with pytest.raises(InputError, match="the id 7 is taken by .*Dataset007_Other; choose another --id"):
        with new_dataset(7, "Test") as (raw, preprocessed):
            (raw / "file").write_text("")
            (nnunet / "raw" / "Dataset007_Other").mkdir()
    assert _tree(nnunet) == {"raw": None, "raw/Dataset007_Other": None, "preprocessed": None, "results": None}


def test_the_split_does_not_stay_where_the_data_set_cannot_be_moved(source, nnunet, monkeypatch):
    def fail(self, target, rename=Path.rename):
        if self.parent.name == ".Dataset007.unfinished":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(InputError, match=r"Dataset007_Test: cannot be written, nothing was kept; .*Input/output error"):
        write_dataset(_dataset(source), 7, 1)
    assert _tree(nnunet) == {"raw": None, "preprocessed": None, "results": None}


def test_sigterm_does_afterwards_what_it_did_before(source, nnunet):
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with new_dataset(1, "A"):
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # somebody else's
    try:
        with new_dataset(2, "B"):
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_conversion_may_run_in_a_thread(source, nnunet):
    folders = []
    thread = threading.Thread(target=lambda: folders.append(write_dataset(_dataset(source), 7, 1)))
    thread.start()
    thread.join()
    assert folders and folders[0].is_dir()


def test_ctrl_c_is_left_to_the_main_process():
    """Else every worker that waits would print a traceback."""
    tasks = [(signal.SIGINT,), (signal.SIGTERM,)]
    assert processes.parallel(signal.getsignal, tasks, 2, "asking") == [signal.SIG_IGN, signal.SIG_DFL]


def test_a_worker_that_was_killed_is_told():
    with pytest.raises(InputError) as error:
        processes.parallel(os._exit, [(9,), (9,)], 2, "reading")
    assert str(error.value) == "reading: a process was killed; did the memory run out? Try --processes 1"
