from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
import SimpleITK as sitk
from image_files import file_states, read_json, read_voxels, write_image
from nnunet_confkd.dataset_conversion import mscmr

from nnunet_confkd.cli import main
from nnunet_confkd.errors import InputError

# the subjects' numbers; val is as published
SUBJECTS = {"train": (2, 4, 6, 7, 13, 14, 18), "val": (1, 8, 29, 36, 41), "TestSet": (3, 10)}
VAL = [f"subject{number}_DE" for number in SUBJECTS["val"]]
TRAIN = [f"subject{number}_DE" for number in SUBJECTS["train"]]
CHALLENGE = {0: 0, 1: 600, 2: 200, 3: 500}  # of RV, myocardium, LV: MS-CMRSeg 2019
SHAPE = (3, 6, 5)


_write = partial(write_image, spacing=(0.75, 0.75, 5), origin=(-12.5, 40, 7.25), direction=(0, 0, 1, 1, 0, 0, 0, -1, 0))


def _image(source, part, number):
    return source / part / "images" / f"subject{number}_DE.nii.gz"


def _label(source, part, number):
    return source / part / "labels" / f"subject{number}_DE_{'scribble' if part == 'train' else 'manual'}.nii.gz"


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    for part, numbers in SUBJECTS.items():
        for number in numbers:
            _write(_image(tmp_path / "mscmr", part, number), rng.integers(0, 900, SHAPE).astype(np.int16))
            values = range(5 if part == "train" else 4)
            label = rng.choice(list(values), SHAPE).astype(np.uint8)
            label.flat[:len(values)] = values  # each of them, for sure
            _write(_label(tmp_path / "mscmr", part, number), label)
        (tmp_path / "mscmr" / part / "images" / f"._subject{numbers[0]}_DE.nii.gz").write_bytes(b"\0\5\26\7")
        (tmp_path / "mscmr" / part / "labels" / ".DS_Store").write_bytes(b"Bud1")
    return tmp_path / "mscmr"


@pytest.fixture
def refused(refusal):
    return partial(refusal, mscmr.convert)


def _folds(nnunet_folders, dataset="Dataset031_MSCMR"):
    return read_json(nnunet_folders / "preprocessed" / dataset / "splits_final.json")


def _validating(folds):
    return sorted(case for fold in folds for case in fold["val"])


# ---- what is written ------------------------------------------------------------------------------------------------

def test_images_and_labels_are_the_published_bytes(source, nnunet_folders):
    before = file_states(source)
    folder = mscmr.convert(source, 31, processes=1)
    assert folder == nnunet_folders / "raw" / "Dataset031_MSCMR" and file_states(source) == before
    assert sorted(os.listdir(folder)) == ["dataset.json", "imagesTr", "imagesTs", "labelsTr", "labelsTs"]
    for kind, parts in (("Tr", ("train", "val")), ("Ts", ("TestSet",))):
        numbers = [(part, number) for part in parts for number in SUBJECTS[part]]
        assert sorted(os.listdir(folder / f"images{kind}")) == sorted(f"subject{n}_DE_0000.nii.gz" for _, n in numbers)
        assert sorted(os.listdir(folder / f"labels{kind}")) == sorted(f"subject{n}_DE.nii.gz" for _, n in numbers)
        for part, n in numbers:
            assert ((folder / f"images{kind}" / f"subject{n}_DE_0000.nii.gz").read_bytes()
                    == _image(source, part, n).read_bytes())
            assert (folder / f"labels{kind}" / f"subject{n}_DE.nii.gz").read_bytes() == _label(
                source, part, n
            ).read_bytes()


def test_train_is_scribbled_and_val_is_full_and_validates(source, nnunet_folders):
    described = read_json(mscmr.convert(source, 31, processes=1) / "dataset.json")
    assert described.pop("reference") == ("Zhuang, IEEE TPAMI 2019, doi 10.1109/TPAMI.2018.2869576; scribbles: Zhang "
                                          "and Zhuang, CVPR 2022, arXiv 2203.01475")
    assert described == {
        "channel_names": {"0": "LGE"}, "labels": {"background": 0, "RV": 1, "myocardium": 2, "LV": 3, "ignore": 4},
        "numTraining": 12, "file_ending": ".nii.gz", "name": "MSCMR",
        "licence": "see the publisher's terms (MS-CMRSeg 2019 challenge)",
        "supervision": dict.fromkeys(TRAIN, "partial") | dict.fromkeys(VAL, "full")}
    folds = _folds(nnunet_folders)
    assert len(folds) == 5 and _validating(folds) == sorted(VAL)
    assert all(fold["train"] == sorted(TRAIN) for fold in folds)


def test_another_seed_makes_another_split_and_the_same_seed_the_same(source, monkeypatch):
    written = []
    monkeypatch.setattr(mscmr, "write_dataset", lambda dataset, *_: written.append(sorted(dataset.validation)))
    for seed in (*range(8), *range(8)):
        mscmr.convert(source, 1, seed=seed, full=["2"])
    assert written[:8] == written[8:] and len(set(map(tuple, written))) > 1


def test_nnunet_finds_nothing_wrong(source, nnunet_folders, require_integrity):
    require_integrity(mscmr.convert(source, 31, full=["2"], processes=1))


def test_masks_in_the_challenges_values_become_the_same(source, nnunet_folders):
    plain = mscmr.convert(source, 31, name="Plain", processes=1)
    for part in ("val", "TestSet"):
        for number in SUBJECTS[part]:
            label = read_voxels(_label(source, part, number))
            coded = np.vectorize(CHALLENGE.get)(label).astype(np.int16)
            if number == 1:  # an empty mask tells nothing of the others
                coded[:] = 0
            _write(_label(source, part, number), coded)
    folder = mscmr.convert(source, 32, processes=1)
    for kind, part in (("Tr", "train"), ("Tr", "val"), ("Ts", "TestSet")):
        for number in SUBJECTS[part]:
            name = f"labels{kind}/subject{number}_DE.nii.gz"
            image, other = sitk.ReadImage(str(folder / name)), sitk.ReadImage(str(plain / name))
            expected = sitk.GetArrayFromImage(other) * (number != 1)
            assert np.array_equal(sitk.GetArrayFromImage(image), expected)
            for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
                assert np.allclose(getattr(image, get)(), getattr(other, get)())


def test_a_label_in_floats_is_read_and_one_may_have_its_images_name(source, nnunet_folders):
    label = _label(source, "val", 8)
    voxels = read_voxels(label)
    label.unlink()
    _write(label.with_name("subject8_DE.nii.gz"), voxels.astype(np.float32))
    folder = mscmr.convert(source, 31, processes=1)
    written = read_voxels(folder / "labelsTr" / "subject8_DE.nii.gz")
    assert written.dtype == np.uint8 and np.array_equal(written, voxels)


def test_subject_1_does_not_take_the_label_of_subject_10(source, nnunet_folders):
    label = {}
    for number in (1, 10):  # shorter names than published
        _write(source / "TestSet" / "images" / f"subject{number}.nii.gz", np.zeros(SHAPE, np.int16))
        label[number] = _write(source / "TestSet" / "labels" / f"subject{number}_manual.nii.gz",
                               np.full(SHAPE, number // 5, np.uint8))
    _image(source, "TestSet", 10).unlink()
    _label(source, "TestSet", 10).unlink()
    folder = mscmr.convert(source, 31, processes=1)
    for number in (1, 10):
        assert (folder / "labelsTs" / f"subject{number}.nii.gz").read_bytes() == label[number].read_bytes()


def test_the_test_set_may_be_absent(source, nnunet_folders):
    (source / "TestSet").rename(source.with_name("elsewhere"))
    assert sorted(os.listdir(mscmr.convert(source, 31, processes=1))) == ["dataset.json", "imagesTr", "labelsTr"]


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_number_of_subjects_of_val_trains_in_full(source, nnunet_folders, number, capsys):
    described = read_json(mscmr.convert(source, 31, full=[str(number)], processes=1) / "dataset.json")
    folds = _folds(nnunet_folders)
    held_back = _validating(folds)
    assert len(folds) == len(held_back) == 5 - number and set(held_back) < set(VAL)
    for fold in folds:  # each trains on the same full subjects, and on none that is held back
        assert sorted(fold["train"] + held_back) == sorted(TRAIN + VAL) and len(fold["val"]) == 1
        assert {case for case in fold["train"] if described["supervision"][case] == "full"} == set(VAL) - set(held_back)
    assert "note" not in capsys.readouterr().out


def test_named_subjects_of_val_train_in_full_and_of_a_number_fewer_lie_within_more(source, nnunet_folders):
    mscmr.convert(source, 31, full=["subject29_DE", "subject1_DE"], folds=1, processes=1)
    split, = _folds(nnunet_folders)
    assert split["val"] == ["subject36_DE", "subject41_DE", "subject8_DE"]
    validation = []
    for dataset_id, number in ((32, "1"), (33, "3")):
        mscmr.convert(source, dataset_id, full=[number], seed=5, processes=1)
        validation.append(set(_validating(_folds(nnunet_folders, f"Dataset{dataset_id:03d}_MSCMR"))))
    assert validation[1] < validation[0]


def test_without_a_full_training_case_a_note_tells_what_the_trainer_will(source, nnunet_folders, capsys):
    from nnunet_confkd.data.supervision import require_full
    described = read_json(mscmr.convert(source, 31, processes=1) / "dataset.json")
    assert "note: no training case is fully annotated, and ConfKDTrainer needs one; --full N" in capsys.readouterr().out
    with pytest.raises(InputError, match="none of the 7 training cases is fully annotated"):
        require_full({case: described["supervision"][case] for case in _folds(nnunet_folders)[0]["train"]})


def test_the_command_converts(source, nnunet_folders, capsys):
    assert main(["convert", "mscmr", "--source", str(source), "--id", "31", "--processes", "1", "--full", "2"]) == 0
    assert ("Dataset031_MSCMR: 12 training cases (5 full, 7 partial, 0 unlabelled)\n3 folds: each trains on the same 2 "
            "fully annotated cases and validates on 1 of 3 that are held back from "
            "training\n") in capsys.readouterr().out


# ---- bad input ------------------------------------------------------------------------------------------------------

def test_folders_that_are_not_there_or_empty_are_refused(refused, source, tmp_path):
    rest = "; give the folder that holds train, val and TestSet, each with images and labels"
    assert refused(tmp_path / "none") == (f"{tmp_path / 'none'}: has no folder train/images, train/labels, val/images, "
                                          f"val/labels{rest}")
    (source / "val" / "labels").rename(source / "val" / "masks")
    assert refused(source) == f"{source}: has no folder val/labels{rest}"
    (source / "val" / "masks").rename(source / "val" / "labels")
    for number in SUBJECTS["TestSet"]:
        _image(source, "TestSet", number).unlink()
        _label(source, "TestSet", number).unlink()
    assert refused(source) == f"{source / 'TestSet' / 'images'}: holds no images (.nii.gz)"


def test_missing_and_ambiguous_labels_and_images_are_all_named(refused, source):
    _label(source, "train", 4).unlink()
    _image(source, "val", 29).unlink()
    double = _write(source / "TestSet" / "labels" / "subject3_DE_again.nii.gz", np.zeros(SHAPE, np.uint8))
    short = _write(source / "train" / "images" / "subject6.nii.gz", np.zeros(SHAPE, np.int16))
    assert sorted(refused(source).split("\n  ")) == sorted([
        "4 problems; nothing was written:",
        f"{_image(source, 'train', 4)}: has no label in {source / 'train' / 'labels'}; it needs one",
        f"{_label(source, 'val', 29)}: has no image in {source / 'val' / 'images'}; it needs one",
        f"{_image(source, 'TestSet', 3)}: has several labels ({double.name}, subject3_DE_manual.nii.gz) in "
        f"{double.parent}; it needs one",
        f"{_label(source, 'train', 6)}: has several images ({short.name}, subject6_DE.nii.gz) in {short.parent}; it "
        f"needs one"])


def test_a_scribble_of_other_values_and_a_mask_with_scribbles_are_refused(refused, source):
    for part, number, value in (("train", 7, 5), ("val", 8, 4)):
        label = read_voxels(_label(source, part, number))
        label[1, 1, 1] = value
        _write(_label(source, part, number), label)
    rest = "; correct the label, or name and map these values"
    assert refused(source).split("\n  ")[1:] == [
        f"{_label(source, 'train', 7)}: holds the values 5; a partial label may hold 0, 1, 2, 3, 4{rest}",
        f"{_label(source, 'val', 8)}: holds the values 4; a full label may hold 0, 1, 2, 3{rest}"]


def test_a_folder_of_masks_in_both_codings_is_refused(refused, source):
    label = read_voxels(_label(source, "val", 36))
    _write(_label(source, "val", 36), np.vectorize(CHALLENGE.get)(label).astype(np.int16))
    assert refused(source).startswith(f"{_label(source, 'val', 36)}: holds the values 200, 500, 600; a full label may "
                                      f"hold 0, 1, 2, 3;")


def test_a_mask_that_mixes_both_codings_is_refused(refused, source):
    for number in SUBJECTS["TestSet"]:
        label = np.vectorize(CHALLENGE.get)(read_voxels(_label(source, "TestSet", number))).astype(np.int16)
        label[0, 0, 0] = number == 10
        _write(_label(source, "TestSet", number), label)
    assert refused(source).startswith(f"{_label(source, 'TestSet', 10)}: holds the values 1; a full label may hold 0, "
                                      f"200, 500, 600;")


@pytest.mark.parametrize("full, text", [
    (["5"], "5 full patients are asked for; besides the 1 that validate there are 4 to choose from"),
    (["subject2_DE"], "no such patients: subject2_DE; there are " + ", ".join(sorted(VAL))),
    (VAL, "5 of 5 patients are to be full; name fewer, 1 are needed to validate")])
def test_more_full_subjects_than_val_can_spare_are_refused(refused, source, full, text):
    assert refused(source, full=full) == text


def test_a_single_subject_of_val_validates(refused, source):
    for number in SUBJECTS["val"][1:]:
        _image(source, "val", number).unlink()
        _label(source, "val", number).unlink()
    assert (
        refused(source, full=["1"])
        == f"{source / 'val'}: has one subject, which is needed to validate; leave out --full"
    )


def test_a_subject_whose_label_is_missing_is_named_beside_a_choice_that_it_spoils(refused, source):
    _label(source, "val", 1).unlink()
    assert refused(source, full=["subject1_DE"]).split("\n  ") == [
        f"{_image(source, 'val', 1)}: has no label in {source / 'val' / 'labels'}; it needs one",
        "no such patients: subject1_DE; there are " + ", ".join(sorted(VAL[1:]))]


def test_a_subject_in_train_and_val_is_refused(refused, source):
    _write(_image(source, "val", 2), np.zeros(SHAPE, np.int16))
    _write(_label(source, "val", 2), np.zeros(SHAPE, np.uint8))
    assert f"the name of the case, 'subject2_DE', is that of {_image(source, 'train', 2)}" in refused(source)


def test_a_damaged_mask_and_one_on_another_grid_are_both_named(refused, source):
    damaged = _label(source, "val", 1)  # the first, whose values are looked at
    damaged.write_bytes(damaged.read_bytes()[:-9])
    moved = _label(source, "val", 41)
    _write(moved, read_voxels(moved), spacing=(0.75, 0.75, 6))
    text = refused(source).split("\n  ")[1:]
    assert text[0].startswith(f"{damaged}: cannot be read as an image")
    assert text[1].startswith(f"{moved}: is on another grid than {_image(source, 'val', 41)}: spacing")


def test_a_label_that_is_a_link_to_elsewhere_is_refused(refused, source, tmp_path):
    label = _label(source, "train", 2)
    label.rename(tmp_path / "elsewhere.nii.gz")
    label.symlink_to(tmp_path / "elsewhere.nii.gz")
    assert refused(source).startswith(f"{label}: leads out of the source folder, to {tmp_path / 'elsewhere.nii.gz'};")
