from __future__ import annotations

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import SimpleITK as sitk
from image_files import file_states, read_json, read_voxels, write_image

from nnunet_confkd import cli
from nnunet_confkd.data.mix import mix
from nnunet_confkd.data.raw_format import summary
from nnunet_confkd.errors import InputError

CLASSES = ["background", "organ", "tumour"]


@pytest.fixture
def folders(tmp_path):
    """Ten full, four partial (9: not annotated) and three unlabelled cases."""
    rng = np.random.default_rng(0)
    for kind, count in (("full", 10), ("partial", 4), ("unlabelled", 3)):
        for k in range(count):
            image = rng.normal(size=(4, 6, 5)).astype(np.float32)
            where = "" if kind == "unlabelled" else "images/"
            _write(tmp_path / kind / f"{where}{kind}{k}.nii.gz", image)
            label = rng.integers(0, 3, image.shape).astype(np.uint8)
            if kind == "partial":
                label[rng.random(image.shape) < 0.7] = 9
            if kind != "unlabelled":
                _write(tmp_path / kind / "labels" / f"{kind}{k}.nii.gz", label)
    return {kind: tmp_path / kind for kind in ("full", "partial", "unlabelled")}


_write = partial(write_image, spacing=(1.0, 2.0, 3.0))


def _mix(folders, **options):
    options = {"labels": CLASSES, "ignore_value": 9, "processes": 1} | options
    return mix(folders["full"], 7, **{"partial": folders["partial"], "unlabelled": folders["unlabelled"]} | options)


def _folds(nnunet_folders, name="Dataset007_Mixed"):
    return read_json(nnunet_folders / "preprocessed" / name / "splits_final.json")


# ---- what is written ------------------------------------------------------------------------------------------------

def test_three_folders_become_one_data_set(folders, nnunet_folders):
    before = {kind: file_states(folder) for kind, folder in folders.items()}
    target = _mix(folders)

    assert target == nnunet_folders / "raw" / "Dataset007_Mixed"
    for kind, folder in folders.items():
        for image in sorted((folder / "images" if kind != "unlabelled" else folder).glob("*.nii.gz")):
            case = image.name[:-7]
            assert (target / "imagesTr" / f"{case}_0000.nii.gz").read_bytes() == image.read_bytes()
            written = read_voxels(target / "labelsTr" / f"{case}.nii.gz")
            if kind == "unlabelled":
                assert (written == 3).all()
            else:
                label = read_voxels(folder / "labels" / image.name)
                assert np.array_equal(written, np.where(label == 9, 3, label))
            assert sitk.ReadImage(str(target / "labelsTr" / f"{case}.nii.gz")).GetSpacing() == (1, 2, 3)
    described = read_json(target / "dataset.json")
    assert described["labels"] == {"background": 0, "organ": 1, "tumour": 2, "ignore": 3}
    assert described["channel_names"] == {"0": "channel_0"} and described["numTraining"] == 17
    assert described["supervision"] == {
        **{f"full{k}": "full" for k in range(10)}, **{f"partial{k}": "partial" for k in range(4)},
        **{f"unlabelled{k}": "unlabelled" for k in range(3)}}
    assert {kind: file_states(folder) for kind, folder in folders.items()} == before


def test_each_full_case_validates_in_one_of_five_folds_and_all_others_train(folders, nnunet_folders):
    target = _mix(folders)
    folds, kinds = _folds(nnunet_folders), read_json(target / "dataset.json")["supervision"]
    assert [len(fold["val"]) for fold in folds] == [2] * 5
    assert sorted(case for fold in folds for case in fold["val"]) == [
        case for case in sorted(kinds) if case.startswith("full")
    ]
    assert all(sorted(fold["train"] + fold["val"]) == sorted(kinds) for fold in folds)


def test_nnunet_finds_nothing_wrong(folders, nnunet_folders, require_integrity):
    require_integrity(_mix(folders))


@pytest.mark.parametrize("left_out", [("partial",), ("unlabelled",)])
def test_partial_or_unlabelled_may_be_left_out(folders, nnunet_folders, left_out):
    target = _mix(folders, **dict.fromkeys(left_out))
    supervision = read_json(target / "dataset.json")["supervision"]
    assert set(supervision.values()) == {"full", "partial", "unlabelled"} - set(left_out)


def test_full_labels_alone_need_no_ignore_label(folders, nnunet_folders):
    target = _mix(folders, partial=None, unlabelled=None)
    assert "ignore" not in read_json(target / "dataset.json")["labels"]


def test_zero_may_mean_not_annotated(folders, nnunet_folders):
    # an annotator's file: 0 is untouched, 5 is background, 1 and 2 the classes
    for file in (folders["partial"] / "labels").iterdir():
        label = read_voxels(file)
        label[label == 0] = 5
        label[label == 9] = 0
        _write(file, label)
    before = {f.name: read_voxels(f) for f in (folders["partial"] / "labels").iterdir()}
    target = _mix(folders, ignore_value=0, background_value=5)
    for name, label in before.items():
        written = read_voxels(target / "labelsTr" / name)
        for value, expected in ((0, 3), (5, 0), (1, 1), (2, 2)):
            assert (label == value).any() and (written[label == value] == expected).all()
    full = folders["full"] / "labels" / "full0.nii.gz"
    assert np.array_equal(read_voxels(target / "labelsTr" / "full0.nii.gz"), read_voxels(full))  # there 0 is background


def test_values_of_ones_own_are_mapped_to_consecutive_ones(folders, nnunet_folders):
    for kind in ("full", "partial"):
        for file in (folders[kind] / "labels").iterdir():
            _write(file, np.array([0, 100, 250] + [0] * 6 + [77], np.uint8)[read_voxels(file)])
    target = _mix(folders, labels=["background=0", "organ=100", "tumour=250"], ignore_value=77)
    assert read_json(target / "dataset.json")["labels"] == {"background": 0, "organ": 1, "tumour": 2, "ignore": 3}
    for kind in ("full", "partial"):
        written, label = (
            read_voxels(target / "labelsTr" / f"{kind}0.nii.gz"),
            read_voxels(folders[kind] / "labels" / f"{kind}0.nii.gz"),
        )
        assert all((written[label == old] == new).all() for old, new in ((0, 0), (100, 1), (250, 2), (77, 3)))


@pytest.mark.parametrize("labels", [{"background": 0, "organ": 1, "tumour": 2, "ignore": 9},
                                    {"0": "background", "1": "organ", "2": "tumour"}])
def test_names_are_read_from_a_dataset_json(folders, nnunet_folders, labels):
    (folders["full"] / "dataset.json").write_text(json.dumps({"labels": labels, "channel_names": {"0": "CT"}}))
    target = _mix(folders, labels=None, ignore_value=None if "ignore" in labels else 9)
    described = read_json(target / "dataset.json")
    assert described["labels"] == {"background": 0, "organ": 1, "tumour": 2, "ignore": 3}
    assert described["channel_names"] == {"0": "CT"}
    assert (read_voxels(target / "labelsTr" / "partial0.nii.gz") == 3).any()


def test_regions_of_a_dataset_json_stay(folders, nnunet_folders):
    (folders["full"] / "dataset.json").write_text(
        json.dumps(
            {
                "labels": {"background": 0, "whole": [1, 2], "tumour": [2]},
                "regions_class_order": [1, 2],
                "channel_names": {"0": "T1"},
            }
        )
    )
    described = read_json(_mix(folders, labels=None) / "dataset.json")
    assert described["labels"] == {"background": 0, "whole": [1, 2], "tumour": [2], "ignore": 3}
    assert described["regions_class_order"] == [1, 2]


def test_several_channels_by_nnunets_names(folders, nnunet_folders):
    for folder in (folders["full"] / "images", folders["partial"] / "images", folders["unlabelled"]):
        for file in list(folder.glob("*.nii.gz")):
            for channel in range(2):
                shutil.copy(file, file.with_name(f"{file.name[:-7]}_{channel:04d}.nii.gz"))
            file.unlink()
    target = _mix(folders, channels=["T1", "T2"])
    assert len(list((target / "imagesTr").iterdir())) == 34 and len(list((target / "labelsTr").iterdir())) == 17
    assert read_json(target / "dataset.json")["channel_names"] == {"0": "T1", "1": "T2"}


def test_channels_are_named_by_number_whatever_the_order_in_the_description(folders, nnunet_folders):
    names = {str(number): f"T{number}" for number in range(11)}
    for folder in (folders["full"] / "images", folders["partial"] / "images", folders["unlabelled"]):
        for file in list(folder.glob("*.nii.gz")):
            for channel in range(11):
                shutil.copy(file, file.with_name(f"{file.name[:-7]}_{channel:04d}.nii.gz"))
            file.unlink()
    labels = {"background": 0, "organ": 1, "tumour": 2}
    description = folders["full"] / "dataset.json"
    description.write_text(json.dumps({"labels": labels, "channel_names": names}, sort_keys=True))
    assert read_json(_mix(folders, labels=None) / "dataset.json")["channel_names"] == names
    description.write_text(json.dumps({"labels": labels, "channel_names": {"T1": 0}}))
    with pytest.raises(InputError, match='"channel_names" must be the names of the channels by number'):
        mix(folders["full"], 8, partial=folders["partial"], ignore_value=9, processes=1)


def test_numbered_unlabelled_images_are_not_taken_for_channels(folders, nnunet_folders):
    for k, file in enumerate(sorted(folders["unlabelled"].glob("*.nii.gz"))):
        file.rename(file.with_name(f"scan_{k + 1:04d}.nii.gz"))
    target = _mix(folders)
    assert (target / "imagesTr" / "scan_0003_0000.nii.gz").is_file()


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii"])
def test_other_formats_are_taken_as_they_are(folders, nnunet_folders, ending):
    for folder in folders.values():
        for file in list(folder.rglob("*.nii.gz")):
            sitk.WriteImage(sitk.ReadImage(str(file)), str(file)[:-7] + ending)
            file.unlink()
    target = _mix(folders)
    assert read_json(target / "dataset.json")["file_ending"] == ending
    image = folders["full"] / "images" / f"full0{ending}"
    assert (target / "imagesTr" / f"full0_0000{ending}").read_bytes() == image.read_bytes()
    assert (read_voxels(target / "labelsTr" / f"unlabelled0{ending}") == 3).all()


def test_a_format_unlike_the_others_is_converted(folders, nnunet_folders):
    file = folders["unlabelled"] / "unlabelled0.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(file)), str(file)[:-7] + ".nrrd")
    expected = read_voxels(file)
    file.unlink()
    target = _mix(folders)
    assert np.array_equal(read_voxels(target / "imagesTr" / "unlabelled0_0000.nii.gz"), expected)


def test_flat_pictures_are_mixed(tmp_path, nnunet_folders, require_integrity):
    from skimage import io
    rng = np.random.default_rng(0)
    for kind in ("full", "partial"):
        for k in range(3):
            for sub in ("images", "labels"):
                (tmp_path / kind / sub).mkdir(parents=True, exist_ok=True)
            io.imsave(tmp_path / kind / "images" / f"{kind}{k}.png", rng.integers(0, 255, (8, 9, 3), dtype=np.uint8),
                      check_contrast=False)
            label = rng.integers(0, 2, (8, 9)).astype(np.uint8)
            if kind == "partial":
                label[:4] = 255
            io.imsave(tmp_path / kind / "labels" / f"{kind}{k}.png", label, check_contrast=False)
    target = mix(
        tmp_path / "full",
        7,
        partial=tmp_path / "partial",
        labels=["background", "vessel"],
        ignore_value=255,
        processes=1,
    )
    described = read_json(target / "dataset.json")
    assert described["channel_names"] == {"0": "channel_0", "1": "channel_1", "2": "channel_2"}  # red, green, blue
    weak, given = (
        io.imread(target / "labelsTr" / "partial0.png"),
        io.imread(tmp_path / "partial" / "labels" / "partial0.png"),
    )
    assert np.array_equal(weak, np.where(given == 255, 2, given))
    require_integrity(target)


def test_folders_may_have_nnunets_names(folders, nnunet_folders):
    for kind in ("full", "partial"):
        (folders[kind] / "images").rename(folders[kind] / "imagesTr")
        (folders[kind] / "labels").rename(folders[kind] / "labelsTr")
    assert read_json(_mix(folders) / "dataset.json")["numTraining"] == 17


def test_patients_with_a_partial_case_do_not_validate(folders, nnunet_folders):
    # patient A has all partial cases and two of the full ones, every other full case is its own patient
    names = {
        **{f"partial{k}": f"A_{k}" for k in range(4)},
        **{f"full{k}": f"A_{k + 4}" if k < 2 else f"P{k}_0" for k in range(10)},
        **{f"unlabelled{k}": f"U{k}_0" for k in range(3)},
    }
    for folder in folders.values():
        for file in list(folder.rglob("*.nii.gz")):
            file.rename(file.with_name(names[file.name[:-7]] + ".nii.gz"))
    target = _mix(folders, patient_pattern=r"(\w+)_\d")
    assert "5 folds over 8 fully annotated patients: each trains on 6 to 7 of them and validates on 1 to 2" in summary(
        target
    )
    validating = [case for fold in _folds(nnunet_folders) for case in fold["val"]]
    assert sorted(validating) == [f"P{k}_0" for k in range(2, 10)]
    for seed in range(5):
        mix(folders["full"], seed + 11, partial=folders["partial"], unlabelled=folders["unlabelled"], labels=CLASSES,
            ignore_value=9, patient_pattern=r"(\w+)_\d", validation=["2"], seed=seed, processes=1)
        (split,) = _folds(nnunet_folders, f"Dataset{seed + 11:03d}_Mixed")
        assert len(split["val"]) == 2 and not any(case.startswith("A_") for case in split["val"])


def test_who_validates_may_be_named_or_counted(folders, nnunet_folders):
    _mix(folders, validation=["full3", "full7"])
    (split,) = _folds(nnunet_folders)
    assert split["val"] == ["full3", "full7"] and len(split["train"]) == 15
    mix(folders["full"], 8, labels=CLASSES, validation=["5"], processes=1)
    (split,) = _folds(nnunet_folders, "Dataset008_Mixed")
    assert len(split["val"]) == len(split["train"]) == 5


def test_a_single_full_case_trains_and_no_split_is_written(folders, nnunet_folders, capsys):
    for sub in ("images", "labels"):
        for file in (folders["full"] / sub).iterdir():
            if not file.name.startswith("full0"):
                file.unlink()
    code = cli.main(["mix", "--full", str(folders["full"]), "--partial", str(folders["partial"]), "--labels", *CLASSES,
                     "--ignore-value", "9", "--id", "7", "--processes", "1"])
    out = capsys.readouterr().out
    assert code == 0 and "no split was written" in out and "confkd train 7 CONFIGURATION all" in out
    assert not (nnunet_folders / "preprocessed" / "Dataset007_Mixed").exists()


def test_the_command_says_what_it_wrote(folders, nnunet_folders, capsys):
    words = [word for kind, folder in folders.items() for word in (f"--{kind}", str(folder))]
    code = cli.main(["mix", *words, "--labels", *CLASSES, "--ignore-value", "9", "--id", "7", "--name", "Mine",
                     "--processes", "1", "--channels", "MRI"])
    out = capsys.readouterr().out
    assert code == 0 and "17 training cases (10 full, 4 partial, 3 unlabelled)\n5 folds over 10 fully" in out
    assert "Dataset007_Mine" in out and "confkd check -d 7" in out


def test_a_second_run_is_refused_unless_it_is_to_overwrite(folders, nnunet_folders, capsys):
    words = [word for kind, folder in folders.items() for word in (f"--{kind}", str(folder))]
    command = ["mix", *words, "--labels", *CLASSES, "--ignore-value", "9", "--id", "7", "--processes", "1"]
    assert cli.main(command) == 0
    before = file_states(nnunet_folders)
    assert cli.main(command) == 1 and file_states(nnunet_folders) == before
    assert "the id 7 is taken" in capsys.readouterr().err
    file = folders["full"] / "labels" / "full0.nii.gz"
    _write(file, np.ones_like(read_voxels(file)))
    file.with_name("full1.nii.gz").write_bytes(b"damaged")
    assert cli.main([*command, "--overwrite"]) == 1 and file_states(nnunet_folders) == before
    _write(file.with_name("full1.nii.gz"), read_voxels(file))
    assert cli.main([*command, "--overwrite"]) == 0
    assert (read_voxels(nnunet_folders / "raw" / "Dataset007_Mixed" / "labelsTr" / "full0.nii.gz") == 1).all()


def test_what_no_file_can_change_is_told_first(folders, nnunet_folders, capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    assert cli.main(["mix", "--full", "nowhere", "--id", "7"]) == 1
    assert "nnUNet_raw is not set" in capsys.readouterr().err


# ---- bad input ------------------------------------------------------------------------------------------------------

def _fails(folders, nnunet_folders, pattern, **options):
    """The error's text; nothing was written and nothing of the source changed."""
    before = {kind: file_states(folder) for kind, folder in folders.items() if folder.is_dir()}
    with pytest.raises(InputError, match=pattern) as caught:
        _mix(folders, **options)
    written = [f for name in ("raw", "preprocessed") for f in (nnunet_folders / name).rglob("*")]
    assert written == []
    assert {kind: file_states(folder) for kind, folder in folders.items() if folder.is_dir()} == before
    return str(caught.value)


@pytest.mark.parametrize("kind", ["full", "partial", "unlabelled"])
def test_a_missing_folder(folders, nnunet_folders, kind):
    shutil.rmtree(folders[kind])
    _fails(folders, nnunet_folders, f"{re.escape(str(folders[kind]))}: there is no such folder")


@pytest.mark.parametrize("kind", ["full", "partial", "unlabelled"])
def test_an_empty_folder(folders, nnunet_folders, kind):
    shutil.rmtree(folders[kind])
    folders[kind].mkdir()
    (folders[kind] / "images").mkdir()
    (folders[kind] / "labels").mkdir()
    _fails(folders, nnunet_folders, f"{re.escape(str(folders[kind]))}/images: holds no images")


def test_no_labels_folder(folders, nnunet_folders):
    shutil.rmtree(folders["partial"] / "labels")
    _fails(folders, nnunet_folders, 'partial: needs two folders, "images" and "labels"')


def test_images_without_labels_and_labels_without_images_are_listed_together(folders, nnunet_folders):
    (folders["full"] / "labels" / "full3.nii.gz").unlink()
    (folders["partial"] / "images" / "partial1.nii.gz").unlink()
    text = _fails(folders, nnunet_folders, "2 problems; nothing was written")
    assert re.search(r"images/full3\.nii\.gz: has no label in .*full/labels", text)
    assert re.search(r"labels/partial1\.nii\.gz: has no image in .*partial/images", text)


def test_the_ignore_value_is_missing(folders, nnunet_folders):
    _fails(folders, nnunet_folders, "--ignore-value is missing", ignore_value=None)


def test_an_ignore_value_that_no_label_holds(folders, nnunet_folders):
    text = _fails(folders, nnunet_folders, "no label holds the value 8", ignore_value=8)
    assert re.search(
        r"The labels hold 0: \d+\.\d %, 1: [\d.]+ %, 2: [\d.]+ %, 9: \d+\.\d %; correct --ignore-value: if 9 is "
        r"\*not annotated\*: --ignore-value 9$",
        text,
    )
    assert "--full" not in text


def test_where_most_voxels_have_the_value_of_background_the_right_options_are_named(folders, nnunet_folders):
    # an annotator's file: 0 is untouched, 5 is background, 1 and 2 the classes
    for file in (folders["partial"] / "labels").iterdir():
        label = read_voxels(file)
        label[label == 0] = 5
        label[label == 9] = 0
        _write(file, label)
    text = _fails(folders, nnunet_folders, "no label holds the value 255", ignore_value=255)
    assert text.endswith("if 0 is *not annotated*: --ignore-value 0 --background-value 5, where 5 marks the scribbles "
                         "in the background")
    _mix(folders, ignore_value=0, background_value=5)


@pytest.mark.parametrize("options, pattern", [
    ({"ignore_value": 1}, "--ignore-value 1 is the value of a class"),
    ({"ignore_value": 0, "background_value": 2}, "--background-value 2 is the value of a class"),
    ({"ignore_value": 9, "background_value": 9}, "are both 9"),
    ({"labels": None}, "dataset.json: there is no such file; give the names of the labels"),
    ({"labels": ["background,organ,tumour"]}, "separated by spaces, not by commas; give background organ tumour"),
    ({"labels": ["background,", "organ"]}, "separated by spaces, not by commas; give background organ"),
    ({"labels": ["background=0,organ=1"]}, "separated by spaces, not by commas; give background=0 organ=1"),
    ({"labels": ["background", "organ", "organ"]}, "'organ'; give names, each once"),
    ({"labels": ["background=x", "organ"]}, "'background=x'"),
    ({"labels": ["background"]}, "at least two labels"),
    ({"labels": ["background=0", "organ=1", "tumour=1"]}, "the same value"),
    ({"validation": ["full3", "nobody"]}, "no patients all of whose cases are full: nobody"),
    ({"validation": ["10"]}, "10 of 10 fully annotated patients would leave none to train on"),
    ({"validation": ["0"]}, "0 of 10 fully annotated patients would leave none to validate on"),
    ({"patient_pattern": r"patient(\d+)"}, "does not match these cases"),
    ({"patient_pattern": "("}, "is no regular expression"),
])
def test_options_that_contradict(folders, nnunet_folders, options, pattern):
    _fails(folders, nnunet_folders, pattern, **options)


def test_an_ignored_voxel_in_a_full_label(folders, nnunet_folders):
    file = folders["full"] / "labels" / "full2.nii.gz"
    label = read_voxels(file)
    label[0, 0, 0] = 9
    _write(file, label)
    _fails(folders, nnunet_folders, r"full2\.nii\.gz: holds the value 9; a full label may hold 0, 1, 2")


def test_the_background_is_0_wherever_it_is_named(folders, nnunet_folders):
    labels = {"tumour": 2, "organ": 1, "background": 0}  # as a program may have sorted them
    (folders["full"] / "dataset.json").write_text(json.dumps({"labels": labels}))
    target = _mix(folders, labels=None)
    assert read_json(target / "dataset.json")["labels"] == {"background": 0, "tumour": 1, "organ": 2, "ignore": 3}
    label = read_voxels(folders["full"] / "labels" / "full0.nii.gz")
    assert np.array_equal(read_voxels(target / "labelsTr" / "full0.nii.gz"), np.array([0, 2, 1])[label])


def test_a_name_of_digits_is_the_name_of_a_patient(folders, nnunet_folders):
    for number in range(10):
        for file in (folders["full"]).glob(f"*/full{number}.nii.gz"):
            file.rename(file.with_name(f"{number:03d}.nii.gz"))
    _mix(folders, validation=["003"])
    assert [fold["val"] for fold in _folds(nnunet_folders)] == [["003"]]


def test_a_tiff_label_without_a_spacing_has_that_of_its_image(tmp_path, nnunet_folders):
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
    label = np.zeros((6, 8, 10), np.uint8)
    label[1:4, 2:5, 2:5], label[4, 6, 6] = 1, 2
    for case in ("a", "b"):
        for folder, voxels in (("images", label * 3), ("labels", label)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Tiff3DIO().write_seg(voxels, str(tmp_path / folder / f"{case}.tif"), {"spacing": (3.0, 0.5, 0.5)})
        (tmp_path / "labels" / f"{case}.json").unlink()
    target = mix(tmp_path, 7, labels=CLASSES, processes=1)
    assert np.array_equal(Tiff3DIO().read_seg(str(target / "labelsTr" / "a.tif"))[0][0], label)


def test_an_unlabelled_image_of_other_channels(folders, nnunet_folders):
    file = folders["unlabelled"] / "unlabelled1.nii.gz"
    for other in folders["unlabelled"].glob("*.nii.gz"):
        shutil.copy(other, other.with_name(other.name[:-7] + "_0000.nii.gz"))
        other.unlink()
    shutil.copy(folders["unlabelled"] / "unlabelled1_0000.nii.gz", file.with_name("unlabelled1_0001.nii.gz"))
    _fails(folders, nnunet_folders, r"unlabelled1_0000\.nii\.gz: the case has 2 channels; 1 are expected")


def test_the_same_name_in_two_folders(folders, nnunet_folders):
    (folders["unlabelled"] / "unlabelled0.nii.gz").rename(folders["unlabelled"] / "full0.nii.gz")
    _fails(
        folders,
        nnunet_folders,
        r"unlabelled/full0\.nii\.gz: the name of the case, 'full0', is that of .*full/images/full0",
    )


def test_a_dataset_json_that_is_none(folders, nnunet_folders):
    (folders["full"] / "dataset.json").write_text("{")
    _fails(folders, nnunet_folders, r"dataset\.json: cannot be read as JSON", labels=None)


def test_a_link_that_leaves_the_folder(folders, nnunet_folders, tmp_path):
    outside = tmp_path / "outside.nii.gz"
    (folders["unlabelled"] / "unlabelled0.nii.gz").rename(outside)
    (folders["unlabelled"] / "unlabelled0.nii.gz").symlink_to(outside)
    _fails(folders, nnunet_folders, r"unlabelled0\.nii\.gz: leads out of the source folder, to .*outside\.nii\.gz")


def test_formats_that_cannot_be_one(folders, nnunet_folders):
    from skimage import io
    io.imsave(folders["unlabelled"] / "photo.png", np.arange(72, dtype=np.uint8).reshape(8, 9), check_contrast=False)
    _fails(folders, nnunet_folders, r"photo\.png: cannot be converted to \.nii\.gz")
