"""The writer of nnU-Net's raw format: what it writes, converts and refuses."""
from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from skimage import io as skio

from nnunet_confkd.data import raw_format
from nnunet_confkd.data.images import Volume
from nnunet_confkd.data.patients import patients_of, split_full_cases
from nnunet_confkd.data.raw_format import Case, Dataset, require_no_problems, with_ignore, write_dataset
from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED
from nnunet_confkd.errors import InputError

SHAPE = (3, 4, 5)  # Z, Y, X
LABELS = {"background": 0, "one": 1, "two": 2}
MIXED = {**LABELS, "ignore": 3}
OBLIQUE = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)


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
    return Dataset(
        **{
            "name": "Test",
            "channel_names": ["T1"],
            "labels": LABELS,
            "file_ending": ".nii.gz",
            "training": [_case(source, name) for name in ("a1", "a2", "b1", "c1", "d1")],
            "validation": ["d1"],
            "patient_pattern": "([a-z])",
            "roots": (source,),
        }
        | changed
    )


def _tree(folder):
    """{relative path: content, None for a folder}, hidden ones too."""
    return {file.relative_to(folder).as_posix(): None if file.is_dir() else file.read_bytes()
            for file in sorted(folder.rglob("*"))}


def _state(folder):
    """What changes when somebody writes there: contents, times, links."""
    return {
        file.relative_to(folder).as_posix(): (
            hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None,
            file.stat().st_mtime_ns,
            file.stat().st_ino,
        )
        for file in [folder, *sorted(folder.rglob("*"))]
        if file.exists()
    }


def _voxels(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def _one(source, nnunet_folders, case, **changed):
    """Write a data set of this case alone."""
    return write_dataset(
        _dataset(source, training=[case], validation=[], patient_pattern=None, **changed), 7, processes=1
    )


# ---- what is written ------------------------------------------------------------------------------------------------

def test_a_data_set_has_the_files_of_its_source_byte_for_byte(source, nnunet_folders):
    before = _state(source)
    folder = write_dataset(
        _dataset(source, licence="CC0", reference="Nobody 2020", more={"extra": [1]}), 7, processes=1
    )
    assert folder == nnunet_folders / "raw" / "Dataset007_Test"
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
    preprocessed = _tree(nnunet_folders / "preprocessed")
    assert json.loads(preprocessed.pop("Dataset007_Test/splits_final.json")) == [  # d1 is held back
        {"train": ["a1", "a2", "b1", "c1"], "val": ["d1"]}]
    assert preprocessed == {"Dataset007_Test": None}
    assert sorted(os.listdir(nnunet_folders / "raw")) == ["Dataset007_Test"]  # nothing hidden
    assert _state(source) == before


def test_fully_annotated_patients_validate_in_turn_and_all_others_train_in_every_fold(source, nnunet_folders):
    training = [_case(source, name, PARTIAL if name == "b1" else FULL) for name in ("a1", "a2", "b1", "c1", "d1")]
    folder = write_dataset(_dataset(source, training=training, labels=MIXED, validation=[]), 7, processes=1)
    folds = json.loads((nnunet_folders / "preprocessed" / folder.name / "splits_final.json").read_text())
    assert [fold["val"] for fold in folds] == [["a1", "a2"], ["c1"], ["d1"]]
    assert all(sorted(fold["train"] + fold["val"]) == ["a1", "a2", "b1", "c1", "d1"] for fold in folds)
    assert raw_format.summary(folder).splitlines() == [
        f"{folder}: 5 training cases (4 full, 1 partial, 0 unlabelled)",
        "3 folds over 3 fully annotated patients: each trains on 2 of them and validates on 1; all other cases train "
        "in every fold",
        "next: confkd check -d 7, then confkd plan -d 7"]


def test_the_folds_are_those_that_the_trainer_and_plan_would_write(source, nnunet_folders):
    kinds = dict.fromkeys(("a1", "a2", "b1", "c1", "d1"), FULL)
    folder = write_dataset(_dataset(source, validation=[]), 7, processes=1)
    assert json.loads(
        (nnunet_folders / "preprocessed" / folder.name / "splits_final.json").read_text()
    ) == split_full_cases(kinds, patients_of(kinds, "([a-z])"))


def test_cases_that_are_held_back_are_divided_over_the_folds_and_never_train(source, nnunet_folders):
    folder = write_dataset(_dataset(source, validation=["a1", "a2", "d1"]), 7, processes=1)
    folds = json.loads((nnunet_folders / "preprocessed" / folder.name / "splits_final.json").read_text())
    assert sorted(folds, key=str) == [
        {"train": ["b1", "c1"], "val": ["a1", "a2"]},
        {"train": ["b1", "c1"], "val": ["d1"]},
    ]
    assert raw_format.summary(folder).splitlines()[1] == (
        "2 folds: each trains on the same 2 fully annotated patients and validates on 1 of 2 that are held back from "
        "training")
    folder = write_dataset(_dataset(source, name="One", validation=["a1", "a2", "d1"], folds=1), 8, processes=1)
    assert json.loads((nnunet_folders / "preprocessed" / folder.name / "splits_final.json").read_text()) == [
        {"train": ["b1", "c1"], "val": ["a1", "a2", "d1"]}]
    assert raw_format.summary(folder).splitlines()[1] == (
        "one fold: fold 0 trains on 2 fully annotated patients and validates on 2, which are held back. There are no "
        "folds 1 to 4: give -f 0 to nnUNetv2_find_best_configuration and nnUNetv2_predict")


def test_with_one_fully_annotated_patient_there_is_no_split_and_the_summary_says_what_to_do(source, nnunet_folders):
    training = [_case(source, "a1"), _case(source, "a2"), _case(source, "b1", PARTIAL), _case(source, "d1", UNLABELLED)]
    folder = write_dataset(_dataset(source, labels=MIXED, training=training, validation=[]), 7, processes=1)
    assert _tree(nnunet_folders / "preprocessed") == {}
    assert raw_format.summary(folder).splitlines() == [
        f"{folder}: 4 training cases (2 full, 1 partial, 1 unlabelled)",
        "no split was written: it takes two fully annotated patients to spare one for validation. Train on fold 'all': "
        "confkd train 7 CONFIGURATION all",
        "next: confkd check -d 7, then confkd plan -d 7"]


def test_links_share_the_images_and_never_the_labels(source, nnunet_folders):
    folder = write_dataset(_dataset(source), 7, processes=1, link=True)
    assert (folder / "imagesTr" / "a1_0000.nii.gz").stat().st_ino == (source / "images" / "a1.nii.gz").stat().st_ino
    assert (folder / "labelsTr" / "a1.nii.gz").stat().st_ino != (source / "labels" / "a1.nii.gz").stat().st_ino


@pytest.mark.parametrize("ending", [".mhd", ".mha", ".nrrd", ".nii", "nifti2.nii.gz", "CAPITALS.NII.GZ"])
@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint8])
def test_what_nnunet_does_not_read_is_converted_without_loss(source, nnunet_folders, ending, dtype):
    voxels = (100 * np.random.default_rng(1).normal(size=SHAPE)).astype(dtype)
    file = source / "images" / f"x{ending}"
    if ending == "nifti2.nii.gz":
        twin = nibabel.load(_save(source / "twin.nii.gz", voxels))
        nibabel.Nifti2Image(voxels.T, twin.affine).to_filename(file)
    elif ending == "CAPITALS.NII.GZ":
        _save(source / "images" / "x.nii.gz", voxels).rename(file)
    else:
        _save(file, voxels)
    folder = _one(source, nnunet_folders, Case("x", (Volume(file),), None, UNLABELLED), labels=MIXED)
    for image in ("imagesTr/x_0000.nii.gz", "labelsTr/x.nii.gz"):
        written = sitk.ReadImage(str(folder / image))  # its first reader, which takes neither NIfTI-2 nor .mhd
        np.testing.assert_allclose(written.GetSpacing(), (0.7, 0.9, 5.1), rtol=1e-6)
        np.testing.assert_allclose(written.GetOrigin(), (-3.5, 11.25, 2.0), rtol=1e-6)
        np.testing.assert_allclose(written.GetDirection(), OBLIQUE, atol=1e-6)
    found = _voxels(folder / "imagesTr" / "x_0000.nii.gz")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, voxels)


def test_a_header_with_its_voxels_in_another_file_is_not_copied(source, nnunet_folders):
    voxels = np.arange(60, dtype=np.float32).reshape(SHAPE)
    voxels.tofile(source / "x.raw")
    (source / "x.nrrd").write_text("NRRD0004\ntype: float\ndimension: 3\nsizes: 5 4 3\nendian: little\nencoding: raw\n"
                                   "data file: x.raw\n\n")
    case = Case("x", (Volume(source / "x.nrrd"),), None, UNLABELLED)
    folder = _one(source, nnunet_folders, case, labels=MIXED, file_ending=".nrrd")
    np.testing.assert_array_equal(_voxels(folder / "imagesTr" / "x_0000.nrrd"), voxels)


def _join(file, channels):
    sitk.WriteImage(sitk.JoinSeries([sitk.ReadImage(str(channel)) for channel in channels]), str(file))
    return file


def test_a_file_of_several_channels_is_split_because_nnunet_writes_no_predictions_of_it(source, nnunet_folders):
    nnunet = SimpleITKIO()
    images = [source / "images" / f"{name}.nii.gz" for name in ("a1", "b1")]
    for id_, ending, joined in ((1, ".nii.gz", ".nii.gz"), (2, ".nii", ".nii"), (3, ".nii.gz", ".nrrd")):
        file = _join(source / f"joined{joined}", images)
        case = Case("x", (Volume(file),), Volume(source / "labels" / "a1.nii.gz"))
        folder = write_dataset(_dataset(source, name="D", channel_names=["T1", "T2"], training=[case], validation=[],
                                        file_ending=ending), id_, processes=1)
        names = sorted(os.listdir(folder / "imagesTr"))
        assert names == [f"x_0000{ending}", f"x_0001{ending}"]
        for name, image in zip(names, images):
            np.testing.assert_array_equal(_voxels(folder / "imagesTr" / name), _voxels(image))
        voxels, properties = nnunet.read_images([str(folder / "imagesTr" / name) for name in names])
        nnunet.write_seg(voxels[0].astype(np.uint8), str(source / f"prediction{ending}"), properties)
        voxels, properties = nnunet.read_images([str(file)])
        with pytest.raises(AssertionError):
            nnunet.write_seg(voxels[0].astype(np.uint8), str(source / f"prediction{ending}"), properties)
        np.testing.assert_array_equal(
            _voxels(folder / "labelsTr" / f"x{ending}"), _voxels(source / "labels" / "a1.nii.gz")
        )


def test_channels_are_taken_out_of_a_file_that_is_read_once(source, nnunet_folders, monkeypatch):
    from nnunet_confkd.data import images as volumes
    images = [source / "images" / f"{name}.nii.gz" for name in ("a1", "b1", "c1")]
    file = _join(source / "joined.nii.gz", images)
    reads = []
    monkeypatch.setattr(volumes, "read", lambda f, read=volumes.read: reads.append(f) or read(f))
    case = Case("x", tuple(Volume(file, channel=i) for i in (2, 0)), None, UNLABELLED)
    folder = _one(source, nnunet_folders, case, labels=MIXED, channel_names=["T1", "T2"])
    for written, image in (("x_0000", images[2]), ("x_0001", images[0])):
        np.testing.assert_array_equal(_voxels(folder / "imagesTr" / f"{written}.nii.gz"), _voxels(image))
    assert reads.count(file) == 1


def test_channels_whose_spacing_differs_a_little_come_to_one_grid(source, nnunet_folders):
    """nnU-Net refuses channels that differ by more than 1e-5 of the spacing."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    _change(source / "images" / "b1.nii.gz", spacing=(0.7002, 0.9, 5.1))
    images = tuple(Volume(source / "images" / f"{name}.nii.gz") for name in ("a1", "b1"))
    folder = _one(
        source, nnunet_folders, Case("x", images, Volume(source / "labels" / "a1.nii.gz")), channel_names=["T1", "T2"]
    )
    files = [str(folder / "imagesTr" / f"x_000{i}.nii.gz") for i in (0, 1)]
    read, _ = SimpleITKIO().read_images(files)
    np.testing.assert_array_equal(read, np.stack([_voxels(volume.file) for volume in images]))
    assert Path(files[0]).read_bytes() == images[0].file.read_bytes()
    assert Path(files[1]).read_bytes() != images[1].file.read_bytes()


def test_a_tiff_data_set_keeps_its_spacing(source, nnunet_folders):
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


def test_coloured_pictures_have_three_channels(source, nnunet_folders):
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

def test_an_unlabelled_case_gets_a_label_of_nothing_but_ignore(source, nnunet_folders):
    folder = _one(source, nnunet_folders, _case(source, "a1", UNLABELLED), labels=MIXED)
    label, image = (sitk.ReadImage(str(folder / name)) for name in ("labelsTr/a1.nii.gz", "imagesTr/a1_0000.nii.gz"))
    assert (sitk.GetArrayFromImage(label) == 3).all() and label.GetSize() == image.GetSize()
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(label, get)(), getattr(image, get)())


@pytest.mark.parametrize("values", [{0: 0, 1: 1, 2: 2, 4: 3}, {0: 0, 1: 2, 2: 1, 4: 3}])
def test_values_are_mapped(source, nnunet_folders, values):
    label = _voxels(source / "labels" / "a1.nii.gz")
    label[0] = 4
    _save(source / "labels" / "a1.nii.gz", label)
    folder = _one(source, nnunet_folders, _case(source, "a1", PARTIAL, values=values), labels=MIXED)
    expected = np.array([values.get(value, 99) for value in range(5)])[label]
    np.testing.assert_array_equal(_voxels(folder / "labelsTr" / "a1.nii.gz"), expected)


def test_a_map_that_changes_nothing_leaves_the_bytes(source, nnunet_folders):
    folder = _one(source, nnunet_folders, _case(source, "a1", values={0: 0, 1: 1, 2: 2, 9: 0}))
    assert (folder / "labelsTr" / "a1.nii.gz").read_bytes() == (source / "labels" / "a1.nii.gz").read_bytes()


def test_a_label_of_floats_becomes_one_of_integers(source, nnunet_folders):
    label = _voxels(source / "labels" / "a1.nii.gz")
    _save(source / "labels" / "a1.nii.gz", label.astype(np.float32))
    written = _voxels(_one(source, nnunet_folders, _case(source, "a1")) / "labelsTr" / "a1.nii.gz")
    assert written.dtype == np.uint8
    np.testing.assert_array_equal(written, label)


def test_values_beyond_255_fit(source, nnunet_folders):
    label = _voxels(source / "labels" / "a1.nii.gz").astype(np.int16)
    label[0, 0, 0] = 700
    _save(source / "labels" / "a1.nii.gz", label)
    values = {0: 0, 1: 1, 2: 2, 700: 300}
    folder = _one(source, nnunet_folders, _case(source, "a1", values=values), labels={**LABELS, "far": 300})
    assert _voxels(folder / "labelsTr" / "a1.nii.gz")[0, 0, 0] == 300


@pytest.mark.parametrize("grid", [{"spacing": (0.7003, 0.9, 5.1)}, {"origin": (-3.45, 11.25, 2.2)},
                                  {"direction": (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)[:8] + (1.0,)}])
def test_a_label_whose_grid_is_a_little_off_is_written_on_that_of_the_image(source, nnunet_folders, grid):
    if "direction" in grid:  # turned by 1/2000 about z
        turn = np.array([[np.cos(5e-4), -np.sin(5e-4), 0], [np.sin(5e-4), np.cos(5e-4), 0], [0, 0, 1]])
        grid = {"direction": (turn @ np.reshape(OBLIQUE, (3, 3))).ravel().tolist()}
    file = _change(source / "labels" / "a1.nii.gz", **grid)
    folder = _one(source, nnunet_folders, _case(source, "a1"))
    label, image = (sitk.ReadImage(str(folder / name)) for name in ("labelsTr/a1.nii.gz", "imagesTr/a1_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label), _voxels(file))
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(label, get)(), getattr(image, get)())
    assert (folder / "imagesTr" / "a1_0000.nii.gz").read_bytes() == (source / "images" / "a1.nii.gz").read_bytes()


def test_test_cases_may_have_labels_and_may_not(source, nnunet_folders):
    images = write_dataset(_dataset(source, name="A", test=[replace(_case(source, "a1"), name="t", label=None)]), 1, 1)
    assert os.listdir(images / "imagesTs") == ["t_0000.nii.gz"] and not (images / "labelsTs").exists()
    both = write_dataset(_dataset(source, name="B", test=[replace(_case(source, "a1"), name="t")]), 2, 1)
    assert (both / "labelsTs" / "t.nii.gz").read_bytes() == (source / "labels" / "a1.nii.gz").read_bytes()
    for folder in (images, both):
        described = json.loads((folder / "dataset.json").read_text())
        assert described["numTraining"] == 5 and "t" not in described["supervision"]


def test_regions_and_their_order_are_described(source, nnunet_folders):
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    folder = write_dataset(_dataset(source, labels=labels, regions_class_order=[1, 2], patient_pattern=None), 7, 1)
    described = json.loads((folder / "dataset.json").read_text())
    assert described["labels"] == labels and described["regions_class_order"] == [1, 2]
    assert "patient_pattern" not in described
    assert raw_format.label_values(labels) == {0, 1, 2, 3} == _dataset(source, labels=labels).values


def test_the_ignore_label_is_one_above_the_highest():
    assert with_ignore(LABELS) == MIXED == with_ignore(MIXED)
    assert with_ignore({"background": 0, "whole": [1, 2, 4]})["ignore"] == 5
    with pytest.raises(InputError, match="the ignore label is 255, but nnU-Net needs the highest other label plus one, "
                                         "3"):
        with_ignore({**LABELS, "ignore": 255})
    assert with_ignore({"background": 0, "organ": 32766})["ignore"] == 32767
    with pytest.raises(InputError, match="the labels go up to 32767, and nnU-Net keeps them in 16 bits"):
        with_ignore({"background": 0, "organ": 32767})


# ---- processes ------------------------------------------------------------------------------------------------------

def test_two_processes_write_the_bytes_of_one(source, nnunet_folders):
    training = [_case(source, "a1"), _case(source, "a2", PARTIAL, values={0: 0, 1: 2, 2: 3}),
                _case(source, "b1", UNLABELLED), _case(source, "d1")]
    one, two = (write_dataset(_dataset(source, name=f"Of{n}", labels=MIXED, training=training), n, n) for n in (1, 2))
    first, second = _tree(one), _tree(two)
    assert json.loads(first.pop("dataset.json")) | {"name": "Of2"} == json.loads(second.pop("dataset.json"))
    assert first == second and len(first) == 10
    assert _tree(nnunet_folders / "preprocessed" / one.name) == _tree(nnunet_folders / "preprocessed" / two.name)


def test_nnunet_finds_nothing_wrong(source, nnunet_folders, require_integrity):
    _change(source / "labels" / "a1.nii.gz", origin=(-3.45, 11.25, 2.0))
    _change(source / "images" / "c1.nii.gz", spacing=(0.7002, 0.9, 5.1))
    second = Volume(source / "images" / "c1.nii.gz")
    training = [_case(source, "a1"), _case(source, "a2", PARTIAL, values={0: 0, 1: 2, 2: 3}),
                _case(source, "b1", UNLABELLED), _case(source, "d1")]
    training = [replace(case, images=(*case.images, second)) for case in training]
    require_integrity(
        write_dataset(_dataset(source, labels=MIXED, training=training, channel_names=["T1", "T2"]), 7, 1)
    )


# ---- bad data -------------------------------------------------------------------------------------------------------

@pytest.fixture
def refused(source, nnunet_folders):
    """Write it, see that it is refused and that nothing has changed anywhere; return the text.

    It begins with `file`, if one is given, and contains the words.
    """
    def refuse(dataset, file=None, *words):
        before, there = _state(source), _tree(nnunet_folders)
        with pytest.raises(InputError) as error:
            write_dataset(dataset, 7, 1)
        assert _state(source) == before and _tree(nnunet_folders) == there
        text = str(error.value)
        assert file is None or text.startswith(f"{file}: ")
        for word in words:
            assert word in text
        return text
    return refuse


def _cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def _save_voxels(change):
    def apply(file):
        voxels = _voxels(file).astype(np.float32)
        voxels[1, 2, 3] = change
        _save(file, voxels)
    return apply


@pytest.mark.parametrize("damage, text", [
    (_cut, "cannot be read as an image"),
    (lambda file: file.write_text("<html>"), "cannot be read as an image"),
    (lambda file: file.unlink(), "there is no such file"),
    (_save_voxels(np.nan), "1 voxels are not finite"),
    (_save_voxels(np.inf), "1 voxels are not finite"),
    (lambda file: sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5, 3), np.uint8), isVector=True), str(file)),
     "holds 3 values a voxel (colours?)")])
def test_an_image_that_cannot_be_used_is_named(source, refused, damage, text):
    file = source / "images" / "b1.nii.gz"
    damage(file)
    refused(_dataset(source), file, text)


@pytest.mark.parametrize("damage, text", [
    (_cut, "cannot be read as an image"),
    (lambda file: file.write_text("<html>"), "cannot be read as an image"),
    (lambda file: file.unlink(), "there is no such file"),
    (_save_voxels(0.5), "holds values that are no integers: 0.5; correct the label"),
    (_save_voxels(np.nan), "holds values that are no integers: nan; correct the label"),
    (_save_voxels(-np.inf), "holds values that are no integers: -inf; correct the label"),
    (_save_voxels(5), "holds the values 5; a full label may hold 0, 1, 2"),
    (_save_voxels(-1), "holds the values -1; a full label may hold 0, 1, 2"),
    (lambda file: sitk.WriteImage(sitk.JoinSeries([sitk.ReadImage(str(file))] * 2), str(file)),
     "holds 2 channels; a label has one")])
def test_a_label_that_cannot_be_used_is_named(source, refused, damage, text):
    file = source / "labels" / "b1.nii.gz"
    damage(file)
    refused(_dataset(source), file, text)


@pytest.mark.parametrize("grid, text", [
    ({"spacing": (0.702, 0.9, 5.1)}, "spacing (0.702, 0.9, 5.1) and (0.7, 0.9, 5.1)"),
    ({"origin": (-3.5, 11.25, 2.6)}, "origin (-3.5, 11.25, 2.6) and (-3.5, 11.25, 2.0)"),
    ({"direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)},
     "direction (1.0, -0.0, -0.0, -0.0, 1.0, -0.0, 0.0, 0.0, 1.0) and (0.8, -0.6, -0.0, 0.6, 0.8, -0.0, 0.0, 0.0, "
     "1.0)")])
def test_a_label_on_another_grid_is_refused(source, refused, grid, text):
    file = _change(source / "labels" / "b1.nii.gz", **grid)
    refused(_dataset(source), file, f"is on another grid than {source / 'images' / 'b1.nii.gz'}: {text}; resample it")


def test_a_label_of_another_size_is_refused(source, refused):
    file = _save(source / "labels" / "b1.nii.gz", np.zeros((3, 4, 6), np.uint8))
    refused(_dataset(source), file, "is on another grid than", "b1.nii.gz: size (6, 4, 3) and (5, 4, 3); resample it")


def test_channels_on_different_grids_are_refused(source, refused):
    _change(source / "images" / "b1.nii.gz", spacing=(0.7, 0.9, 5.2))
    images = tuple(Volume(source / "images" / f"{name}.nii.gz") for name in ("a1", "b1"))
    case = Case("x", images, Volume(source / "labels" / "a1.nii.gz"))
    refused(_dataset(source, training=[case], validation=[], channel_names=["T1", "T2"]), images[1].file,
            f"is on another grid than {images[0].file}: spacing (0.7, 0.9, 5.2) and (0.7, 0.9, 5.1)")


@pytest.mark.parametrize("channel", [None, 5])
def test_a_wrong_number_of_channels_is_refused(source, refused, channel):
    file = source / "images" / "a1.nii.gz"
    case = Case("x", (Volume(file), Volume(file, channel)), None, UNLABELLED)
    names = ["T1"] if channel is None else ["T1", "T2"]
    refused(_dataset(source, training=[case], validation=[], labels=MIXED, channel_names=names), file,
            f"has {2 if channel is None else 1} channels; {len(names)} are expected ({', '.join(names)})")


def test_the_ignore_value_in_a_full_label_is_refused(source, refused):
    file = source / "labels" / "a1.nii.gz"
    _save_voxels(3)(file)
    training = [_case(source, "a1"), _case(source, "b1", PARTIAL)]
    refused(_dataset(source, labels=MIXED, training=training, validation=[]), file,
            "holds the values 3; a full label may hold 0, 1, 2")


def test_a_value_without_a_place_in_the_map_is_refused(source, refused):
    file = source / "labels" / "a1.nii.gz"
    refused(_dataset(source, training=[_case(source, "a1", values={0: 0, 1: 1})], validation=[]), file,
            "holds the values 2; a full label may hold 0, 1;")


@pytest.mark.parametrize("kind", [FULL, PARTIAL])
def test_an_image_without_a_label_is_refused(source, refused, kind):
    case = replace(_case(source, "a1", kind), label=None)
    refused(_dataset(source, labels=MIXED, training=[case], validation=[]), source / "images" / "a1.nii.gz",
            "has no label; add it, or leave the image out")


def test_the_problems_that_are_listed_are_counted():
    problems = [f"{number}.png: is empty" for number in range(6)] + ["data: has no labels"]
    with pytest.raises(InputError, match="^2 problems; nothing was written:\n  6 files: is empty"):
        require_no_problems(problems)


def test_what_the_converter_found_is_told_with_the_rest(source, refused):
    """All of it, in one error: of the converter, of the whole, and of several files."""
    _cut(source / "images" / "a1.nii.gz")
    _save_voxels(0.5)(source / "labels" / "a1.nii.gz")
    _save_voxels(np.nan)(source / "images" / "a2.nii.gz")
    _save_voxels(7)(source / "labels" / "a2.nii.gz")
    _change(source / "labels" / "b1.nii.gz", spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0))
    lines = refused(_dataset(source, problems=["patient e: is missing"], validation=["z1"])).splitlines()
    assert lines[0] == "8 problems; nothing was written:"
    expected = [("patient e", "is missing"), ("z1", "is to validate, but its label is not there"),
                ("images/a1.nii.gz", "cannot be read"), ("labels/a1.nii.gz", "holds values that are no integers: 0.5"),
                ("images/a2.nii.gz", "1 voxels are not finite"), ("labels/a2.nii.gz", "holds the values 7"),
                ("labels/b1.nii.gz", "is on another grid"), ("labels/b1.nii.gz", "is on another grid")]
    for line, (where, what) in zip(lines[1:], expected, strict=True):
        assert f"{where}: " in line and what in line
    assert "spacing" in lines[7] and "origin" in lines[8]


@pytest.mark.parametrize("name, reason", [
    *((name, "is empty, hidden, or begins or ends with a space") for name in ("", ".hidden", " a", "a\n", "../a")),
    *((name, 'holds a control character or one of / \\ : * ? " < > |') for name in (
        "a/b", "a\\b", "a:b", "a*", "a?", 'a"', "a\tb")),
    ("a_seg", "ends with _seg, by which nnU-Net tells labels from images")])
def test_names_that_nnunet_cannot_have_are_refused(source, refused, name, reason):
    training = [_case(source, "a1"), replace(_case(source, "b1"), name=name)]
    refused(_dataset(source, training=training, validation=[], patient_pattern=None),
            source / "images" / "b1.nii.gz", repr(name), reason, "rename it")


def test_ordinary_names_are_not_refused():
    for name in ("a", "patient001_frame01", "a.b", "a b", "Ä", "seg", "a_seg2", "a_0000"):
        assert raw_format.name_problem(name) is None


@pytest.mark.parametrize("name", ["a1", "A1"])
@pytest.mark.parametrize("where", ["training", "test"])
def test_one_name_for_two_cases_is_refused_also_in_capitals(source, refused, name, where):
    twin = replace(_case(source, "b1"), name=name)
    training = [_case(source, "a1")] + ([twin] if where == "training" else [])
    test = [twin] if where == "test" else []
    refused(_dataset(source, training=training, test=test, validation=[], patient_pattern=None),
            source / "images" / "b1.nii.gz", repr(name), f"is that of {source / 'images' / 'a1.nii.gz'}, too; rename "
                                                         f"one")


@pytest.mark.parametrize("changed, text", [
    ({"training": [], "validation": []}, "there is not one training case"),
    ({"patient_pattern": "(x)"}, "the patient pattern '(x)' does not match these cases; correct it: a1, a2, b1, c1, "
                                 "d1"),
    ({"patient_pattern": "(a"}, "the patient pattern '(a' is no regular expression"),
    ({"validation": ["a2"]}, "patient a: has cases for training and for validation")])
def test_what_is_wrong_with_the_whole_is_told(source, refused, changed, text):
    assert refused(_dataset(source, **changed)).startswith(text)


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
    training = [
        _case(source, "b1"),
        _case(source, "c1"),
        Case("d1", (Volume(up),), Volume(source / "labels" / "d1.nii.gz")),
    ]
    lines = refused(_dataset(source, training=training, validation=[])).splitlines()
    for line, file in zip(
        lines[1:], (source / "images" / "b1.nii.gz", source / "labels" / "c1.nii.gz", up), strict=True
    ):
        assert f"{file}: leads out of the source folder, to {outside}; give the folder that holds it" in line


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
        refused(_dataset(source, training=[case], validation=[], labels=MIXED, patient_pattern=None), source / part,
                f"leads out of the source folder, to {tmp_path / part}")


def test_links_within_the_given_folders_are_followed(source, nnunet_folders, tmp_path):
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
    refused(_dataset(source, training=[case], validation=[], labels=MIXED, file_ending=".nii"), file,
            "is two-dimensional", "compress all files to .nii.gz")


# ---- a full disk ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("limit", [0, 300], ids=("from the start", "within the first image"))
def test_a_full_disk_leaves_nothing(source, nnunet_folders, refused, limit):
    """No file may grow beyond the limit, in bytes; an image has about 400."""
    resource = pytest.importorskip("resource", reason="Windows has no limit of the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        text = refused(_dataset(source))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Dataset007_Test: cannot be written, nothing was kept; check the permissions and the space" in text
    assert "File too large" in text


def test_a_full_disk_is_noticed_when_an_image_is_converted_too(source, nnunet_folders, refused):
    """ITK does not say so."""
    resource = pytest.importorskip("resource", reason="Windows has no limit of the size of files")
    file = _save(source / "images" / "x.mha", np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    dataset = _dataset(source, training=[Case("x", (Volume(file),), None, UNLABELLED)], validation=[], labels=MIXED)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        text = refused(dataset)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "nothing was kept" in text and "is the disk full?" in text


def test_a_full_file_system_leaves_nothing(source, nnunet_folders, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted; the limit of file sizes above stands for it")
    try:
        monkeypatch.setenv("nnUNet_raw", str(small))
        voxels = np.random.default_rng(0).integers(0, 255, (20, 40, 50)).astype(np.uint8)  # 40 kB, however compressed
        for name in ("large.nii.gz", "other.mha"):  # copied; converted
            file = _save(source / "images" / name, voxels)
            cases = [Case(name, (Volume(file),), None, UNLABELLED) for name in "abc"]
            before = _state(source)
            with pytest.raises(InputError, match="cannot be written, nothing was kept; .*(No space left|is the disk "
                                                 "full)"):
                write_dataset(_dataset(source, training=cases, validation=[], labels=MIXED, patient_pattern=None), 7, 1)
            assert os.listdir(small) == os.listdir(nnunet_folders / "preprocessed") == [] and _state(source) == before
    finally:
        subprocess.run(["umount", small], check=True)
