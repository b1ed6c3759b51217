from __future__ import annotations

import json
import os
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunet_confkd.dataset_conversion import acdc

from nnunet_confkd.cli import main
from nnunet_confkd.data.patients import patients_of, split_full_cases
from nnunet_confkd.data.raw_format import folds_of
from nnunet_confkd.errors import InputError

PATIENTS = ("patient001", "patient002", "patient003", "patient004", "patient005", "patient090")
ES = {"patient001": 12, "patient002": 12, "patient003": 15, "patient004": 15, "patient005": 13, "patient090": 11}
LABELS = {"background": 0, "RV": 1, "myocardium": 2, "LV": 3}
REFERENCE = "Bernard et al., IEEE TMI 2018, doi 10.1109/TMI.2018.2837502"


def _voxels(file):
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # of the sform's unit scale
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def _header(file):
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    return reader


def _tree(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() if file.is_file() else None for file in folder.rglob("*")
    }


def _times(folder):
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in folder.rglob("*")}


def _nnunet(folder, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(folder / name))
    return folder


# ---- the real files -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def real(test_data, tmp_path_factory) -> Path:
    """All 200 frames with their scribbles, three patients full: the raw folder."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        nnunet_folders = _nnunet(tmp_path_factory.mktemp("acdc"), monkeypatch)
        before = _times(test_data / "acdc") | _times(test_data / "acdc_scribbles")
        folder = acdc.convert(test_data / "acdc", 27, scribbles=test_data / "acdc_scribbles", full=["3"], processes=1)
        assert _times(test_data / "acdc") | _times(test_data / "acdc_scribbles") == before
        assert folder == nnunet_folders / "raw" / "Dataset027_ACDC" and os.listdir(nnunet_folders / "raw") == [
            "Dataset027_ACDC"
        ]
        yield folder


@pytest.fixture(scope="module")
def described(real) -> dict:
    return json.loads((real / "dataset.json").read_text())


def _source(test_data, case):
    return test_data / "acdc" / "training" / case.split("_")[0]


def test_every_case_is_a_published_mask(real, test_data, described):
    published = {file.name[:-len("_gt.nii.gz")] for file in (test_data / "acdc" / "training").rglob("*_gt.nii.gz")}
    assert len(published) == 200 and {"patient090_frame04", "patient090_frame11"} <= published
    assert set(described["supervision"]) == published
    assert {file[:-len(".nii.gz")] for file in os.listdir(real / "labelsTr")} == published
    assert {file[:-len("_0000.nii.gz")] for file in os.listdir(real / "imagesTr")} == published
    assert sorted(os.listdir(real)) == ["dataset.json", "imagesTr", "labelsTr"]  # testing/ is not at hand


def test_three_patients_train_in_full_twenty_validate_and_all_others_are_scribbled(real, described):
    folds = json.loads((real.parents[1] / "preprocessed" / real.name / "splits_final.json").read_text())
    kinds = described["supervision"]
    held_back = [case for fold in folds for case in fold["val"]]
    assert len(held_back) == len(set(held_back)) == 40 and all(kinds[case] == "full" for case in held_back)
    assert [len({case.split("_")[0] for case in fold["val"]}) for fold in folds] == [4] * 5
    for fold in folds:  # all train on the same 80 patients, of whom three are full
        assert fold["train"] == sorted(set(kinds) - set(held_back)) and len(fold["train"]) == 160
    assert not {case.split("_")[0] for case in held_back} & {case.split("_")[0] for case in folds[0]["train"]}
    full = {case.split("_")[0] for case in folds[0]["train"] if kinds[case] == "full"}
    assert len(full) == 3
    assert all(kinds[case] == ("full" if case.split("_")[0] in full else "partial") for case in folds[0]["train"])


def test_two_patients_who_are_one_stay_on_one_side(test_data, monkeypatch):
    folder = test_data / "acdc" / "training"
    for frames in (("074_frame01", "076_frame01"), ("074_frame12", "076_frame12")):
        first, second = (_voxels(folder / f"patient{name[:3]}" / f"patient{name}.nii.gz") for name in frames)
        assert np.array_equal(first, second)
    written = []
    monkeypatch.setattr(acdc, "write_dataset", lambda dataset, *_: written.append(dataset))
    for seed in range(20):
        acdc.convert(test_data / "acdc", 27, scribbles=test_data / "acdc_scribbles", full=["3"], seed=seed)
    twins = [len({name[:10] for name in dataset.validation} & {"patient074", "patient076"}) for dataset in written]
    assert set(twins) <= {0, 2}
    assert {len({name[:10] for name in dataset.validation}) for dataset in written} <= {19, 20}
    assert any(len({name[:10] for name in dataset.validation}) == 19 for dataset in written)  # a seed had parted them

    acdc.convert(test_data / "acdc", 27)
    validating = [{case[:10] for case in fold["val"]} for fold in folds_of(written[-1])]
    assert {len({"patient074", "patient076"} & patients) for patients in validating} == {0, 2}
    parted = split_full_cases(
        {case.name: case.kind for case in written[-1].training}, {c.name: c.name[:10] for c in written[-1].training}
    )
    assert {len({"patient074", "patient076"} & {case[:10] for case in fold["val"]}) for fold in parted} == {
        0,
        1,
    }  # by names
    again = split_full_cases(kinds := {case.name: case.kind for case in written[-1].training},
                             patients_of(kinds, written[-1].patient_pattern))
    assert {len({"patient074", "patient076"} & {case[:10] for case in fold["val"]}) for fold in again} == {0, 2}, (
        "a split that is written anew keeps them together, too")
    assert len(set(patients_of(kinds, written[-1].patient_pattern).values())) == 99


def test_images_are_the_published_bytes_and_labels_the_published_voxels(real, test_data, described):
    for case, kind in described["supervision"].items():
        image, label = real / "imagesTr" / f"{case}_0000.nii.gz", real / "labelsTr" / f"{case}.nii.gz"
        assert image.read_bytes() == (_source(test_data, case) / f"{case}.nii.gz").read_bytes()
        published = (_source(test_data, case) / f"{case}_gt.nii.gz" if kind == "full" else
                     test_data / "acdc_scribbles" / f"{case}_scribble.nii.gz")
        voxels = _voxels(label)
        np.testing.assert_array_equal(voxels, _voxels(published))
        assert voxels.dtype.kind in "iu" and (4 in voxels) == (kind == "partial")


def test_the_geometry_is_pixdims_and_that_of_the_image(real, test_data, described):
    for case in described["supervision"]:
        image, label = _header(real / "imagesTr" / f"{case}_0000.nii.gz"), _header(real / "labelsTr" / f"{case}.nii.gz")
        pixdim = nibabel.load(_source(test_data, case) / f"{case}.nii.gz").header["pixdim"][1:4]
        assert image.GetSpacing() == tuple(float(p) for p in pixdim)
        assert image.GetSize() == label.GetSize()
        for get in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert np.allclose(getattr(image, get)(), getattr(label, get)())
        assert 0.70 < image.GetSpacing()[0] < 1.92 and 5 <= image.GetSpacing()[2] <= 10  # mm, as ACDC is described


def test_it_says_whose_data_they_are(described):
    assert described == {
        "channel_names": {"0": "cineMRI"},
        "labels": {**LABELS, "ignore": 4},
        "numTraining": 200,
        "file_ending": ".nii.gz",
        "name": "ACDC",
        "licence": "CC BY-NC-SA 4.0",
        "patient_pattern": r"(patient07(?=[46]_)|patient\d+)[46]?_frame\d+",
        "reference": f"{REFERENCE}; scribbles: Valvano et al., IEEE TMI 2021, doi 10.1109/TMI.2021.3069634",
        "supervision": described["supervision"],
    }


@pytest.mark.slow  # 200 cases
def test_nnunet_finds_nothing_wrong_in_the_real_files(real, require_integrity):
    require_integrity(real)


# ---- generated files ------------------------------------------------------------------------------------------------

def _save(file, voxels, spacing=(1.5, 1.5, 10)):
    """With ACDC's headers: the spacing in pixdim, an sform of unit scale."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels.T, None)
    image.header.set_sform(np.eye(4), code=1)
    image.header["qform_code"] = 0
    image.header["pixdim"][1:4] = spacing
    image.to_filename(file)
    return file


def _patient(folder, es, rng, masks=True, ed=1):
    folder.mkdir(parents=True)
    (folder / "Info.cfg").write_text(f"ED: {ed}\nES: {es}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n")
    _save(folder / f"{folder.name}_4d.nii.gz", rng.normal(size=(2, 3, 8, 7)).astype(np.float32))
    for frame in (ed, es):
        _save(folder / f"{folder.name}_frame{frame:02d}.nii.gz", rng.normal(size=(3, 8, 7)).astype(np.float32))
        if masks:
            _save(folder / f"{folder.name}_frame{frame:02d}_gt.nii.gz", rng.integers(0, 4, (3, 8, 7)).astype(np.uint8))


@pytest.fixture
def source(tmp_path) -> Path:
    """Six training patients as published, and a file and a folder that are none."""
    rng = np.random.default_rng(0)
    for patient in PATIENTS:
        _patient(tmp_path / "acdc" / "training" / patient, ES[patient], rng, ed=4 if patient == "patient090" else 1)
    (tmp_path / "acdc" / "training" / "MANDATORY_CITATION.md").write_text("cite")
    (tmp_path / "acdc" / "training" / "notes").mkdir()
    return tmp_path / "acdc"


@pytest.fixture
def scribbles(source, tmp_path) -> Path:
    """For every frame, most voxels not annotated. The affine is correct, as published; the masks' has unit scale."""
    for mask in source.rglob("*_gt.nii.gz"):
        voxels = np.full((3, 8, 7), 4, np.uint8)
        voxels[:, 3] = _voxels(mask)[:, 3]
        image = sitk.GetImageFromArray(voxels)
        image.CopyInformation(sitk.ReadImage(str(mask)))
        (tmp_path / "scribbles").mkdir(exist_ok=True)
        sitk.WriteImage(image, str(tmp_path / "scribbles" / mask.name.replace("_gt", "_scribble")))
    return tmp_path / "scribbles"


def test_nnunet_finds_nothing_wrong(source, scribbles, nnunet_folders, require_integrity):
    require_integrity(acdc.convert(source, 27, scribbles=scribbles, full=["2"], processes=1))


ALL = sorted(f"{patient}_frame{frame:02d}" for patient in PATIENTS
             for frame in (4 if patient == "patient090" else 1, ES[patient]))


def test_without_scribbles_all_masks_are_kept(source, nnunet_folders, crossvalidation):
    folder = acdc.convert(source, 27, name="Full", processes=1)
    described = json.loads((folder / "dataset.json").read_text())
    assert folder.name == "Dataset027_Full" and described["labels"] == LABELS and described["reference"] == REFERENCE
    assert described["supervision"] == dict.fromkeys(ALL, "full")
    assert sorted(os.listdir(folder / "imagesTr")) == [f"{case}_0000.nii.gz" for case in ALL]
    for fold in crossvalidation("Dataset027_Full"):  # six patients of two cases
        assert len(fold["val"]) == 2 * len({case.split("_")[0] for case in fold["val"]})


def test_the_chosen_patients_are_full_the_others_scribbled(source, scribbles, nnunet_folders):
    folder = acdc.convert(source, 27, scribbles=scribbles, full=["patient002", "patient090"], processes=1)
    kinds = json.loads((folder / "dataset.json").read_text())["supervision"]
    split, = json.loads((nnunet_folders / "preprocessed" / folder.name / "splits_final.json").read_text())
    assert {case.split("_")[0] for case in split["train"] if kinds[case] == "full"} == {"patient002", "patient090"}
    assert sorted(kinds) == ALL and sum(kind == "partial" for kind in kinds.values()) == 6
    for case, kind in kinds.items():
        published = (source / "training" / case.split("_")[0] / f"{case}_gt.nii.gz" if kind == "full" else
                     scribbles / f"{case}_scribble.nii.gz")
        np.testing.assert_array_equal(_voxels(folder / "labelsTr" / f"{case}.nii.gz"), _voxels(published))


@pytest.mark.parametrize("masks", [True, False])
def test_testing_is_written_with_and_without_masks(source, nnunet_folders, masks):
    _patient(source / "testing" / "patient101", 14, np.random.default_rng(1), masks)
    folder = acdc.convert(source, 27, processes=1, link=True)
    names = ["patient101_frame01", "patient101_frame14"]
    assert sorted(os.listdir(folder / "imagesTs")) == [f"{name}_0000.nii.gz" for name in names]
    assert (folder / "labelsTs").exists() == masks
    for name in names:
        image = source / "testing" / "patient101" / f"{name}.nii.gz"
        assert (folder / "imagesTs" / f"{name}_0000.nii.gz").stat().st_ino == image.stat().st_ino
        if masks:
            mask = source / "testing" / "patient101" / f"{name}_gt.nii.gz"
            assert (folder / "labelsTs" / f"{name}.nii.gz").read_bytes() == mask.read_bytes()
    described = json.loads((folder / "dataset.json").read_text())
    assert described["numTraining"] == 12 and not any("patient101" in case for case in described["supervision"])


def test_the_command_converts(source, scribbles, nnunet_folders, capsys):
    assert (
        main(
            [
                "convert", "acdc", "--source", str(source), "--scribbles", str(scribbles), "--full", "2", "--seed", "5",
                "--id", "27", "--processes", "1",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == (
        f"{nnunet_folders / 'raw' / 'Dataset027_ACDC'}: 12 training cases (6 full, 6 partial, 0 unlabelled)\none fold: "
        "fold 0 trains on 2 fully annotated patients and validates on 1, which are held back. There are no folds 1 to "
        "4: give -f 0 to nnUNetv2_find_best_configuration and nnUNetv2_predict\nnext: confkd check -d 27, then confkd "
        "plan -d 27\n")


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.fixture
def refused(source, tmp_path, nnunet_folders):
    """Convert it, see that it is refused, in these lines, and that nothing has changed anywhere."""
    def refuse(*lines, folder=source, **options):
        before = _tree(tmp_path), _times(tmp_path)
        with pytest.raises(InputError) as error:
            acdc.convert(folder, 27, processes=1, **options)
        assert re.sub(r"^\d+ problems; nothing was written:\n  ", "", str(error.value)).split("\n  ") == list(lines)
        times = {file: time for file, time in _times(tmp_path).items() if file.is_file()}
        assert _tree(tmp_path) == before[0] and times == {file: before[1][file] for file in times}
    return refuse


def test_a_source_that_is_not_there_or_not_acdc_is_refused(refused, tmp_path):
    (tmp_path / "empty" / "training").mkdir(parents=True)
    for folder in (tmp_path / "none", tmp_path):
        refused(f"{folder}: has no folder \"training\"; give the folder that holds ACDC's training/patient001 and so "
                f"on",
                folder=folder)
    refused(f"{tmp_path / 'empty' / 'training'}: holds no folders patient001, patient002 and so on",
            folder=tmp_path / "empty")


def test_scribbles_and_full_go_together(refused, scribbles):
    text = ("--scribbles and --full belong together: which training patients keep their masks, and where are the "
            "scribbles of the others? To make weak labels from full ones, see confkd weaken")
    refused(text, full=["3"])
    refused(text, scribbles=scribbles)


def test_a_folder_of_scribbles_that_is_not_there_is_named(refused, tmp_path):
    refused(f"{tmp_path / 'none'}: there is no such folder; give the one that holds patient001_frame01_scribble.nii.gz "
            f"and so on", scribbles=tmp_path / "none", full=["2"])


def test_more_full_patients_than_there_are_and_unknown_ones_are_refused(refused, scribbles):
    refused("6 full patients are asked for; besides the 1 that validate there are 5 to choose from",
            scribbles=scribbles, full=["6"])
    refused(f"no such patients: patient007; there are {', '.join(PATIENTS)}",
            scribbles=scribbles, full=["patient001", "patient007"])
    refused("6 of 6 patients are to be full; name fewer, 1 are needed to "
            "validate", scribbles=scribbles, full=list(PATIENTS))


def test_missing_scribbles_are_all_named(refused, scribbles):
    for name in ("patient002_frame01", "patient003_frame15"):
        (scribbles / f"{name}_scribble.nii.gz").unlink()
    refused(f"{scribbles / 'patient002_frame01_scribble.nii.gz'}: is missing; add it, or name patient002 as --full",
            f"{scribbles / 'patient003_frame15_scribble.nii.gz'}: is missing; add it, or name patient003 as --full",
            scribbles=scribbles, full=["patient001"])


NO_INFO = "is missing; it tells which frames are end-diastole and end-systole"


def test_what_is_wrong_with_info_cfg_is_told_of_all_patients(source, refused):
    info = [source / "training" / patient / "Info.cfg" for patient in PATIENTS]
    info[0].unlink()
    info[1].write_text("ED: 1\n")
    info[2].write_text("ED:\nES: 15\n")
    info[3].write_bytes(bytes(range(256)))
    info[4].write_text("ED: 1\nES: 1\n")
    number = "has no line \"{}: NUMBER\", the number of the frame; add it"
    expected = [f"{info[0]}: {NO_INFO}",
                f"{info[1]}: {number.format('ES')}",
                f"{info[2]}: {number.format('ED')}",
                f"{info[3]}: {number.format('ED')}", f"{info[3]}: {number.format('ES')}",
                f"{info[4]}: names one frame, 1, for both end-diastole and end-systole; correct it"]
    refused(*expected)


def test_what_is_missing_is_told_where_it_leaves_too_few_patients_to_be_full(source, refused, scribbles):
    for patient in PATIENTS[1:]:
        (source / "training" / patient / "Info.cfg").unlink()
    refused(*(f"{source / 'training' / patient / 'Info.cfg'}: {NO_INFO}" for patient in PATIENTS[1:]),
            "3 full patients are asked for; besides the 0 that validate there are 1 to choose from",
            scribbles=scribbles, full=["3"])


def test_missing_images_and_masks_are_told_of_all_patients(source, refused):
    _patient(source / "testing" / "patient101", 14, np.random.default_rng(1))
    _patient(source / "testing" / "patient102", 14, np.random.default_rng(1), masks=False)
    missing = [source / "training" / "patient001" / "patient001_frame12_gt.nii.gz",
               source / "training" / "patient003" / "patient003_frame01.nii.gz"]
    for file in missing:
        file.unlink()
    refused(
        *(
            f"{file}: is missing; Info.cfg names this frame"
            for file in (
                *missing,
                *(source / "testing" / "patient102" / f"patient102_frame{frame}_gt.nii.gz" for frame in ("01", "14")),
            )
        )
    )


def test_what_is_wrong_with_files_is_told_with_the_rest(source, refused, scribbles):
    folder = source / "training" / "patient001"
    image, mask = folder / "patient001_frame01.nii.gz", folder / "patient001_frame12_gt.nii.gz"
    image.write_bytes(image.read_bytes()[:-30])
    _save(mask, np.full((3, 8, 7), 5, np.uint8))
    scribble = scribbles / "patient002_frame01_scribble.nii.gz"
    _save(scribble, _voxels(scribble), spacing=(1.5, 1.5, 5))
    (source / "training" / "patient003" / "Info.cfg").unlink()
    refused(f"{source / 'training' / 'patient003' / 'Info.cfg'}: {NO_INFO}",
            f"{image}: cannot be read as an image; is it cut short, damaged, or of another format? Fetch or write it "
            f"anew (the compressed data end too early)",
            f"{mask}: holds the values 5; a full label may hold 0, 1, 2, 3; correct the label, or name and map these "
            f"values",
            f"{scribble}: is on another grid than {source}/training/patient002/patient002_frame01.nii.gz: spacing "
            f"(1.5, 1.5, 5.0) and (1.5, 1.5, 10.0); resample it, or correct its header",
            scribbles=scribbles, full=["patient001"], seed=1)


def test_a_patient_who_is_a_link_to_elsewhere_is_refused(source, refused, tmp_path):
    (source / "training" / "patient001").rename(tmp_path / "patient001")
    (source / "training" / "patient001").symlink_to(tmp_path / "patient001")
    refused(*(f"{source / 'training' / 'patient001' / file}: leads out of the source folder, to "
              f"{tmp_path / 'patient001' / file}; give the folder that holds it, or copy what links lead to: cp -rL "
              "FOLDER COPY" for file in (
                  "patient001_frame01.nii.gz", "patient001_frame01_gt.nii.gz", "patient001_frame12.nii.gz",
                  "patient001_frame12_gt.nii.gz")))
