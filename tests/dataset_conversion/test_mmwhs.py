from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
import SimpleITK as sitk
from image_files import file_states, read_json, read_voxels, write_image
from nnunet_confkd.dataset_conversion import mmwhs

from nnunet_confkd.cli import main

# published value: (name, value to write), as the project asks for
STRUCTURES = {0: ("background", 0), 500: ("left_ventricle", 1), 600: ("right_ventricle", 2), 420: ("left_atrium", 3),
              550: ("right_atrium", 4), 205: ("myocardium", 5), 820: ("aorta", 6), 850: ("pulmonary_artery", 7)}
SHAPE = (4, 6, 5)
TRAINING, TEST = range(1001, 1011), (2001, 2002)


_write = partial(write_image, spacing=(0.5, 0.5, 0.625), origin=(-80.5, 92.25, -170), direction=(0, 0, 1, 1, 0, 0, 0,
                  -1, 0))


def _part(source, modality, flat=False):
    """Ten training cases, two test images without labels, and what macOS leaves behind."""
    rng = np.random.default_rng(0)
    for kind, numbers in (("train", TRAINING), ("test", TEST)):
        folder = source if flat else source / f"{modality}_{kind}"
        for number in numbers:
            image = (
                rng.integers(-1000, 2000, SHAPE).astype(np.int16) if modality == "ct" else rng.random(SHAPE, np.float32)
            )
            _write(folder / f"{modality}_{kind}_{number}_image.nii.gz", image)
            label = rng.choice(list(STRUCTURES), SHAPE).astype(np.int16)
            label.flat[:len(STRUCTURES)] = list(STRUCTURES)  # each of them, for sure
            if kind == "train":
                _write(folder / f"{modality}_{kind}_{number}_label.nii.gz", label)
        (folder / f"._{modality}_{kind}_{numbers[0]}_image.nii.gz").write_bytes(b"\0\5\26\7")
        (folder / ".DS_Store").write_bytes(b"Bud1")
    return source


@pytest.fixture
def ct(tmp_path):
    return _part(tmp_path / "mmwhs", "ct")


@pytest.fixture
def mr(tmp_path):
    """With a stray 421 in two labels, as published MR labels have it."""
    source = _part(tmp_path / "mmwhs", "mr")
    for number in (1003, 1007):
        file = source / "mr_train" / f"mr_train_{number}_label.nii.gz"
        label = read_voxels(file)
        label[-1, -1, -2:] = 421
        _write(file, label)
    return source


@pytest.fixture
def refused(refusal):
    return partial(refusal, mmwhs.convert)


# ---- what is written ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("modality, channel", [("ct", "CT"), ("mr", "MRI")])
def test_a_part_is_converted_from_one_folder_or_several(
    tmp_path, nnunet_folders, crossvalidation, modality, channel, flat
):
    source = _part(tmp_path / "mmwhs", modality, flat)
    before = file_states(source)
    folder = mmwhs.convert(source, 17, processes=1)
    assert folder == nnunet_folders / "raw" / f"Dataset017_MMWHS{modality.upper()}" and file_states(source) == before
    names = [f"{modality}_train_{number}" for number in TRAINING]
    assert sorted(os.listdir(folder)) == ["dataset.json", "imagesTr", "imagesTs", "labelsTr"]
    assert sorted(os.listdir(folder / "imagesTr")) == [f"{name}_0000.nii.gz" for name in names]
    assert sorted(os.listdir(folder / "imagesTs")) == [f"{modality}_test_{number}_0000.nii.gz" for number in TEST]
    for kind, split, numbers in (("train", "Tr", TRAINING), ("test", "Ts", TEST)):
        for name in (f"{modality}_{kind}_{number}" for number in numbers):
            image = (source if flat else source / f"{modality}_{kind}") / f"{name}_image.nii.gz"
            assert (folder / f"images{split}" / f"{name}_0000.nii.gz").read_bytes() == image.read_bytes()
    assert sorted(os.listdir(folder / "labelsTr")) == [f"{name}.nii.gz" for name in names]
    for name in names:
        file = (source if flat else source / f"{modality}_train") / f"{name}_label.nii.gz"
        published, written = sitk.ReadImage(str(file)), sitk.ReadImage(str(folder / "labelsTr" / f"{name}.nii.gz"))
        for value, (_, expected) in STRUCTURES.items():
            assert np.array_equal(
                sitk.GetArrayFromImage(written) == expected, sitk.GetArrayFromImage(published) == value
            )
        for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert np.allclose(getattr(written, get)(), getattr(published, get)())
    described = read_json(folder / "dataset.json")
    assert described.pop("reference").endswith("doi 10.1016/j.media.2016.02.006")
    assert described == {
        "channel_names": {"0": channel},
        "labels": dict(STRUCTURES.values()),
        "numTraining": 10,
        "file_ending": ".nii.gz",
        "name": f"MMWHS{modality.upper()}",
        "licence": "see the publisher's terms (MM-WHS 2017 challenge)",
        "supervision": dict.fromkeys(names, "full"),
    }
    assert [len(fold["val"]) for fold in crossvalidation(folder.name)] == [2] * 5


def test_nnunet_finds_nothing_wrong(ct, nnunet_folders, require_integrity):
    require_integrity(mmwhs.convert(ct, 17, processes=1))


@pytest.mark.parametrize("published, expected", [(420, 3), (0, 0)])
def test_a_stray_value_can_be_mapped(mr, nnunet_folders, published, expected):
    folder = mmwhs.convert(mr, 17, mapped=[(421, published)], processes=1)
    for number in TRAINING:
        label = read_voxels(mr / "mr_train" / f"mr_train_{number}_label.nii.gz")
        written = read_voxels(folder / "labelsTr" / f"mr_train_{number}.nii.gz")
        assert (label == 421).any() == (number in (1003, 1007))
        for value, target in [*((value, target) for value, (_, target) in STRUCTURES.items()), (421, expected)]:
            assert (written[label == value] == target).all()


def test_of_both_modalities_one_is_chosen(ct, nnunet_folders):
    _part(ct, "mr")
    folder = mmwhs.convert(ct, 17, modality="mr", name="Own", processes=1)
    assert folder.name == "Dataset017_Own"
    assert sorted(read_json(folder / "dataset.json")["supervision"]) == [f"mr_train_{number}" for number in TRAINING]
    assert all(name.startswith("mr") for name in os.listdir(folder / "imagesTs"))


def test_test_images_may_have_labels(ct, nnunet_folders):
    label = np.full(SHAPE, 820, np.int16)
    _write(ct / "ct_test" / "ct_test_2002_label.nii.gz", label)
    folder = mmwhs.convert(ct, 17, processes=1)
    assert os.listdir(folder / "labelsTs") == ["ct_test_2002.nii.gz"]
    assert (read_voxels(folder / "labelsTs" / "ct_test_2002.nii.gz") == 6).all()
    assert "ct_test_2002" not in read_json(folder / "dataset.json")["supervision"]


def test_the_command_converts_and_names_stray_values(mr, nnunet_folders, capsys):
    command = ["convert", "mmwhs", "--source", str(mr), "--id", "17", "--processes", "1"]
    assert main(command) == 1
    assert "mr_train_1003_label.nii.gz: holds the values 421;" in capsys.readouterr().err
    assert main([*command, "--modality", "mr", "--map", "421=420"]) == 0
    assert (
        "Dataset017_MMWHSMR: 10 training cases (10 full, 0 partial, 0 unlabelled)\n5 folds" in capsys.readouterr().out
    )


# ---- bad input ------------------------------------------------------------------------------------------------------

def test_stray_values_are_an_error_that_lists_them_all(refused, mr):
    file = mr / "mr_train" / "mr_train_1007_label.nii.gz"
    label = read_voxels(file)
    label[0, 0, 0] = 7
    _write(file, label)
    allowed = (
        "a full label may hold 0, 205, 420, 500, 550, 600, 820, 850; correct the label, or name and map these values"
    )
    assert refused(mr).split("\n  ") == [
        "2 problems; nothing was written:",
        f"{mr / 'mr_train' / 'mr_train_1003_label.nii.gz'}: holds the values 421; {allowed}",
        f"{file}: holds the values 7, 421; {allowed}"]
    # mapping one of them leaves the other
    assert f"{file}: holds the values 7; a full label may hold 0, 205, 420, 421, 500" in refused(mr, mapped=[(421, 0)])


@pytest.mark.parametrize("mapped, text", [
    ((421, 3), "--map 421=3: 3 is none of the published values [0, 205, 420, 500, 550, 600, 820, 850]"),
    ((420, 500), "--map 420=500: 420 is a published value itself; map stray ones only")])
def test_maps_to_what_is_not_published_or_of_what_is_are_refused(refused, mr, mapped, text):
    assert refused(mr, mapped=[mapped]) == text


@pytest.mark.parametrize("text", ["421", "421:420", "a=420", "421=", "-1=0"])
def test_a_map_that_is_none_is_refused_by_the_command(mr, nnunet_folders, capsys, text):
    with pytest.raises(SystemExit):
        main(["convert", "mmwhs", "--source", str(mr), "--id", "17", f"--map={text}"])
    assert f"'{text}': give it as STRAY=PUBLISHED, e.g. 421=420" in capsys.readouterr().err


def test_both_modalities_without_a_choice_and_one_that_is_not_there_are_refused(refused, ct):
    assert refused(ct, modality="mr") == f"{ct}: holds no files mr_train_10NN_image.nii.gz"
    _part(ct, "mr")
    assert refused(ct) == f"{ct}: holds both ct and mr; choose one --modality"


def test_folders_that_are_not_there_or_hold_no_training_case_are_refused(refused, ct, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'}: there is no such folder"
    assert refused(tmp_path / "empty") == f"{tmp_path / 'empty'}: holds no files ct_train_10NN_image.nii.gz"
    assert refused(ct / "ct_test") == f"{ct / 'ct_test'}: holds no training case (ct_train_10NN_image.nii.gz)"


def test_images_without_labels_labels_without_images_and_doubles_are_all_named(refused, ct):
    folder = ct / "ct_train"
    (folder / "ct_train_1001_label.nii.gz").unlink()
    (folder / "ct_train_1002_image.nii.gz").unlink()
    _write(ct / "ct_test" / "ct_test_2009_label.nii.gz", np.zeros(SHAPE, np.int16))
    double = _write(ct / "more" / "ct_train_1003_image.nii.gz", np.zeros(SHAPE, np.int16))
    assert sorted(refused(ct).split("\n  ")) == sorted([
        "4 problems; nothing was written:",
        f"{folder / 'ct_train_1001_image.nii.gz'}: has no label", f"{folder / 'ct_train_1002_label.nii.gz'}: has no "
                                                                  f"image",
        f"{ct / 'ct_test' / 'ct_test_2009_label.nii.gz'}: has no image",
        f"{double}: is there twice, also as {folder / 'ct_train_1003_image.nii.gz'}"])


def test_a_label_on_another_grid_is_refused(refused, ct):
    file = ct / "ct_train" / "ct_train_1004_label.nii.gz"
    _write(file, read_voxels(file), spacing=(0.5, 0.5, 1))
    image = ct / "ct_train" / "ct_train_1004_image.nii.gz"
    assert refused(ct).startswith(f"{file}: is on another grid than {image}: spacing")


def test_a_folder_that_is_a_link_to_elsewhere_is_refused(refused, ct, tmp_path):
    (ct / "ct_test").rename(tmp_path / "elsewhere")
    (ct / "ct_test").symlink_to(tmp_path / "elsewhere")
    text = refused(ct)
    assert text.count("leads out of the source folder") == len(TEST)
    assert f"{ct / 'ct_test' / 'ct_test_2001_image.nii.gz'}: leads out of the source folder" in text
