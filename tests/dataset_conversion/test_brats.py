from __future__ import annotations

import os
import shutil
from functools import partial

import numpy as np
import pytest
import SimpleITK as sitk
from image_files import file_states, read_json, read_voxels, write_image
from nnunet_confkd.dataset_conversion import brats

from nnunet_confkd.cli import main

# the published values of the whole tumour, the tumour core and the enhancing tumour
PUBLISHED = {"2015": {"whole_tumour": (1, 2, 3, 4), "tumour_core": (1, 3, 4), "enhancing_tumour": (4,)},
             "2017": {"whole_tumour": (1, 2, 4), "tumour_core": (1, 4), "enhancing_tumour": (4,)},
             "2023": {"whole_tumour": (1, 2, 3), "tumour_core": (1, 3), "enhancing_tumour": (3,)}}
ENDS = {"2015": ["T1_", "T1c_", "T2_", "Flair_"], "2017": ["_t1", "_t1ce", "_t2", "_flair"],
        "2023": ["-t1n", "-t1c", "-t2w", "-t2f"]}  # T1, T1 with contrast, T2, FLAIR
SHAPE = (3, 5, 4)


_write = partial(write_image, origin=(0, -239, 0))  # as published


def _files(case, year):
    """{channel, or "label": file} of a case's folder."""
    if year == "2015":
        names = [f"{end}subtrMeanDivStd" for end in ENDS[year]] + ["OTMultiClass"]
    else:
        names = [case.name + end for end in (*ENDS[year], "-seg" if year == "2023" else "_seg")]
    return dict(zip(("T1", "T1c", "T2", "FLAIR", "label"), (case / f"{name}.nii.gz" for name in names)))


def _case(case, year, labelled=True):
    rng = np.random.default_rng(list(case.name.encode()))
    for part, file in _files(case, year).items():
        if part == "label":
            values = (0, *PUBLISHED[year]["whole_tumour"])
            label = rng.choice(values, SHAPE).astype(np.float32 if year == "2015" else np.uint8)
            label.flat[:len(values)] = values  # each of them, for sure
            if labelled:
                _write(file, label)
        else:
            _write(file, rng.normal(size=SHAPE).astype(np.float32) if year == "2015" else
                   rng.integers(0, 3000, SHAPE).astype(np.int16))
    (case / f"._{case.name}_seg.nii.gz").write_bytes(b"\0\5\26\7")
    (case / ".DS_Store").write_bytes(b"Bud1")
    if year == "2015":
        _write(case / "brainmask.nii.gz", np.ones(SHAPE, np.float32))
        (case / "License_CC_BY_NC_SA_3.0.txt").write_text("licence")


CASES = {
    "2015": [f"brats_2013_pat{k:04d}_1" for k in range(1, 6)],
    "2017": [*(f"HGG/Brats17_TCIA_{k}_1" for k in (105, 111, 113)), *(f"LGG/Brats17_2013_{k}_1" for k in (0, 1))],
    "2023": [f"BraTS-GLI-{k:05d}-{visit:03d}" for k in range(5) for visit in range(k % 3 + 1)],
}  # 1, 2, 3, 1, 2 visits


def _tree(folder, year):
    for case in CASES[year]:
        _case(folder / case, year)
    (folder / "survival_data.csv").write_text("Brats17ID,Age,Survival\n")
    (folder / "__MACOSX" / "HGG").mkdir(parents=True)
    (folder / "__MACOSX" / "HGG" / "._case_seg.nii.gz").write_bytes(b"\0\5\26\7")
    return folder


@pytest.fixture(params=["2015", "2017", "2023"])
def year(request):
    return request.param


@pytest.fixture
def source(tmp_path, year):
    return _tree(tmp_path / "brats", year)


@pytest.fixture
def source17(tmp_path):
    return _tree(tmp_path / "brats", "2017")


@pytest.fixture
def source23(tmp_path):
    return _tree(tmp_path / "brats", "2023")


@pytest.fixture
def refused(refusal):
    return partial(refusal, brats.convert)


def _assert_same_regions(published, year, written, labels):
    """The masks of the regions are the same in the published label and in the written one, by dataset.json's labels."""
    assert list(labels) == ["background", *PUBLISHED[year]] and labels["background"] == 0
    for region, values in PUBLISHED[year].items():
        mask = np.isin(published, values)
        assert mask.any() and np.array_equal(np.isin(written, labels[region]), mask)


# ---- what is written ------------------------------------------------------------------------------------------------

def test_images_are_the_published_bytes_and_labels_the_published_regions(source, year, nnunet_folders):
    before = file_states(source)
    folder = brats.convert(source, 21, processes=1)
    assert folder == nnunet_folders / "raw" / "Dataset021_BraTS" and file_states(source) == before
    assert sorted(os.listdir(folder)) == ["dataset.json", "imagesTr", "labelsTr"]
    labels = read_json(folder / "dataset.json")["labels"]
    names = [case.split("/")[-1] for case in CASES[year]]
    assert sorted(os.listdir(folder / "imagesTr")) == sorted(
        f"{name}_000{k}.nii.gz" for name in names for k in range(4)
    )
    assert sorted(os.listdir(folder / "labelsTr")) == sorted(f"{name}.nii.gz" for name in names)
    for case, name in zip(CASES[year], names):
        files = _files(source / case, year)
        for k, channel in enumerate(("T1", "T1c", "T2", "FLAIR")):
            assert (folder / "imagesTr" / f"{name}_000{k}.nii.gz").read_bytes() == files[channel].read_bytes()
        published, written = read_voxels(files["label"]), read_voxels(folder / "labelsTr" / f"{name}.nii.gz")
        assert written.dtype == np.uint8 and written.max() == {"2015": 4, "2017": 3, "2023": 3}[year]
        # the classes themselves are kept apart, too: oedema is 2 everywhere, and written as 1; necrosis the reverse
        assert np.array_equal(written == 1, published == 2) and np.array_equal(written == 2, published == 1)
        _assert_same_regions(published, year, written, labels)
        image = sitk.ReadImage(str(folder / "labelsTr" / f"{name}.nii.gz"))
        assert image.GetOrigin() == (0, -239, 0) and image.GetSpacing() == (1, 1, 1)


def test_dataset_json_tells_channels_convention_and_origin(source, year, nnunet_folders):
    described = read_json(brats.convert(source, 21, name="Tumours", processes=1) / "dataset.json")
    assert described["channel_names"] == {"0": "T1", "1": "T1c", "2": "T2", "3": "FLAIR"}
    assert described["convention"] == year and described["file_ending"] == ".nii.gz" and described["name"] == "Tumours"
    assert described["numTraining"] == len(CASES[year])
    assert described["supervision"] == dict.fromkeys((case.split("/")[-1] for case in CASES[year]), "full")
    assert described["licence"] == ("CC BY-NC-SA 3.0" if year == "2015" else "see the publisher's terms (synapse.org)")
    assert "10.1109/TMI.2014.2377694" in described["reference"] and "2107.02314" in described["reference"]


def test_nnunet_makes_a_label_map_of_the_same_regions_out_of_perfect_predictions(source, year, nnunet_folders):
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    folder = brats.convert(source, 21, processes=1)
    described = read_json(folder / "dataset.json")
    manager = LabelManager(described["labels"], described["regions_class_order"])
    assert manager.has_regions and manager.num_segmentation_heads == 3
    for case in CASES[year]:
        published = read_voxels(_files(source / case, year)["label"])
        masks = np.stack([np.isin(published, values) for values in PUBLISHED[year].values()])
        predicted = manager.convert_logits_to_segmentation(np.where(masks, 9, -9).astype(np.float32))
        _assert_same_regions(published, year, predicted, described["labels"])
        assert set(np.unique(predicted)) <= {0, *manager.all_labels}


def test_nnunet_finds_nothing_wrong(source, nnunet_folders, require_integrity):
    require_integrity(brats.convert(source, 21, processes=1))


def test_each_patient_validates_in_one_of_five_folds(source, year, nnunet_folders, crossvalidation):
    brats.convert(source, 21, processes=1)
    for fold in crossvalidation("Dataset021_BraTS"):
        # of five patients one; 2023 has 1 to 3 visits of each
        assert len(fold["val"]) == 1 or year == "2023" and len({case[:15] for case in fold["val"]}) == 1


def test_the_visits_of_a_patient_stay_together(source23, nnunet_folders, crossvalidation):
    _case(source23 / "another_name", "2023")  # does not make the others' patients unknown
    described = read_json(brats.convert(source23, 21, processes=1) / "dataset.json")
    for fold in crossvalidation("Dataset021_BraTS"):
        assert not {case[:15] for case in fold["train"]} & {case[:15] for case in fold["val"]}
    from nnunet_confkd.data.patients import patients_of
    assert patients_of(described["supervision"], described["patient_pattern"]) == {
        case: case[:15] if case.startswith("BraTS-GLI") else case for case in described["supervision"]}


def test_the_visits_of_2015_stay_together(tmp_path, nnunet_folders, crossvalidation):
    for visit in ("149_1", "198_1", "198_283", "222_1", "222_35", "222_250"):
        _case(tmp_path / "brats" / f"brats_tcia_pat{visit}", "2015")
    brats.convert(tmp_path / "brats", 21, processes=1)
    folds = crossvalidation("Dataset021_BraTS", 3)
    assert [{case.split("_")[2] for case in fold["val"]} for fold in folds] == [{"pat149"}, {"pat198"}, {"pat222"}]


def test_of_2017_to_2021_every_case_is_a_patient(tmp_path, nnunet_folders, crossvalidation):
    for k in range(5):
        _case(tmp_path / "brats" / f"BraTS2021_{k:05d}", "2017")
    assert "patient_pattern" not in read_json(brats.convert(tmp_path / "brats", 21, processes=1) / "dataset.json")
    assert [len(fold["val"]) for fold in crossvalidation("Dataset021_BraTS")] == [1] * 5


def test_test_cases_may_lack_a_label(source, year, tmp_path, nnunet_folders):
    names = ["BraTS-GLI-00900-000", "BraTS-GLI-00901-000"]
    for name in names:
        _case(tmp_path / "validation" / name, year, labelled=name == names[0])
    folder = brats.convert(source, 21, test=tmp_path / "validation", processes=1)
    assert sorted(os.listdir(folder / "imagesTs")) == [f"{name}_000{k}.nii.gz" for name in names for k in range(4)]
    assert os.listdir(folder / "labelsTs") == [f"{names[0]}.nii.gz"]
    files = _files(tmp_path / "validation" / names[0], year)
    assert (folder / "imagesTs" / f"{names[0]}_0003.nii.gz").read_bytes() == files["FLAIR"].read_bytes()
    _assert_same_regions(read_voxels(files["label"]), year, read_voxels(folder / "labelsTs" / f"{names[0]}.nii.gz"),
                         read_json(folder / "dataset.json")["labels"])
    described = read_json(folder / "dataset.json")
    assert described["numTraining"] == len(CASES[year]) and not set(names) & set(described["supervision"])


def test_uncompressed_files_and_the_odd_label_of_2020_are_converted(source17, nnunet_folders):
    odd = source17 / "BraTS20_Training_355"
    _case(odd, "2017")
    files = _files(odd, "2017")
    voxels = {part: read_voxels(file) for part, file in files.items()}
    for part, file in files.items():
        _write(odd / ("W39_1998.09.19_Segm.nii" if part == "label" else file.name.removesuffix(".gz")), voxels[part])
        file.unlink()
    folder = brats.convert(source17, 21, processes=1)
    assert np.array_equal(read_voxels(folder / "imagesTr" / f"{odd.name}_0001.nii.gz"), voxels["T1c"])
    _assert_same_regions(voxels["label"], "2017", read_voxels(folder / "labelsTr" / f"{odd.name}.nii.gz"),
                         read_json(folder / "dataset.json")["labels"])


def test_the_command_converts(source17, tmp_path, nnunet_folders, capsys):
    _case(tmp_path / "validation" / "Brats17_CBICA_AAM_1", "2017", labelled=False)
    assert (
        main(
            [
                "convert", "brats", "--source", str(source17), "--id", "21", "--processes", "1", "--convention", "2017",
                "--test", str(tmp_path / "validation"), "--name", "BraTS2017",
            ]
        )
        == 0
    )
    assert (
        "Dataset021_BraTS2017: 5 training cases (5 full, 0 partial, 0 unlabelled)\n5 folds" in capsys.readouterr().out
    )
    assert len(os.listdir(nnunet_folders / "raw" / "Dataset021_BraTS2017" / "imagesTs")) == 4


# ---- the real files -------------------------------------------------------------------------------------------------

def test_the_real_cases_of_2015(test_data, nnunet_folders, crossvalidation):
    source = test_data / "brats2015"
    before = {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in source.rglob("*")}
    folder = brats.convert(source, 21, processes=1)
    assert {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in source.rglob("*")} == before
    described = read_json(folder / "dataset.json")
    assert described["channel_names"] == {"0": "T1c", "1": "FLAIR"} and described["convention"] == "2015"
    assert sorted(described["supervision"]) == [f"brats_2013_pat000{k}_1" for k in (1, 2, 5)]
    crossvalidation("Dataset021_BraTS", 3)
    for case in described["supervision"]:
        for k, name in enumerate(("T1c", "Flair")):
            assert ((folder / "imagesTr" / f"{case}_000{k}.nii.gz").read_bytes()
                    == (source / case / f"{name}_subtrMeanDivStd.nii.gz").read_bytes())
        published = read_voxels(source / case / "OTMultiClass.nii.gz")
        written = read_voxels(folder / "labelsTr" / f"{case}.nii.gz")
        assert published.dtype == np.float32 and written.dtype == np.uint8
        _assert_same_regions(published, "2015", written, described["labels"])


# ---- bad input ------------------------------------------------------------------------------------------------------

def test_folders_that_are_not_there_or_hold_no_cases_are_refused(refused, source17, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'}: there is no such folder"
    assert refused(source17, test=tmp_path / "none") == f"{tmp_path / 'none'}: there is no such folder"
    assert refused(tmp_path / "empty") == (f"{tmp_path / 'empty'}: holds no labels (OTMultiClass, CASE_seg or "
                                           f"CASE-seg, .nii.gz) in folders of cases")
    for options in (
        {"source": tmp_path / "empty", "convention": "2017"},
        {"source": source17, "test": tmp_path / "empty"},
    ):
        assert refused(**options).startswith(f"{tmp_path / 'empty'}: holds no folders of cases")


def test_names_of_two_conventions_are_refused_unless_one_is_chosen(refused, source17):
    _case(source17 / "BraTS-GLI-00001-000", "2023")
    assert refused(source17) == f"{source17}: holds labels named as in 2017 and 2023; give one --convention"
    assert refused(source17, convention="2017") == (f"{source17 / 'BraTS-GLI-00001-000'}: has no label; give the "
                                                    f"folder of unlabelled cases as --test")


def test_missing_channels_and_labels_are_all_named(refused, source17):
    cases = [source17 / case for case in CASES["2017"]]
    _files(cases[0], "2017")["T2"].unlink()
    for channel in ("T1", "FLAIR"):
        _files(cases[1], "2017")[channel].unlink()
    _files(cases[2], "2017")["label"].unlink()
    for channel in ("T1", "T1c", "T2", "FLAIR"):
        _files(cases[3], "2017")[channel].unlink()
    assert sorted(refused(source17).split("\n  ")) == sorted([
        "4 problems; nothing was written:",
        f"{cases[2]}: has no label; give the folder of unlabelled cases as --test",
        f"{cases[0]}: has no T2, which other cases have", f"{cases[1]}: has no T1, FLAIR, which other cases have",
        f"{cases[3]}: has no T1, T1c, T2, FLAIR, which other cases have"])


def test_a_missing_channel_of_a_test_case_is_named(refused, source17, tmp_path):
    case = tmp_path / "validation" / "Brats17_CBICA_AAM_1"
    _case(case, "2017", labelled=False)
    _files(case, "2017")["T1c"].unlink()
    assert refused(source17, test=tmp_path / "validation") == f"{case}: has no T1c, which other cases have"


def test_one_channel_is_not_enough(refused, source17):
    for case in CASES["2017"]:
        for channel in ("T1", "T1c", "T2"):
            _files(source17 / case, "2017")[channel].unlink()
    assert refused(source17) == f"{source17}: two to four channels are expected; found: FLAIR"
    for case in CASES["2017"]:
        _files(source17 / case, "2017")["FLAIR"].unlink()
    assert refused(source17) == f"{source17}: two to four channels are expected; found: none"


def test_two_files_of_one_channel_are_refused(refused, source17):
    file = _files(source17 / CASES["2017"][0], "2017")["T1"]
    again = _write(file.with_suffix(""), read_voxels(file))
    assert refused(source17) == f"{file.parent}: has 2 files for T1: {again.name}, {file.name}"


@pytest.mark.parametrize("year, value", [("2015", 5), ("2017", 3), ("2023", 4)])
def test_a_value_of_another_convention_is_refused(refused, source, year, value):
    file = _files(source / CASES[year][0], year)["label"]
    label = read_voxels(file)
    label[0, 0, 0] = value
    _write(file, label)
    allowed = ", ".join(map(str, (0, *PUBLISHED[year]["whole_tumour"])))
    assert refused(source) == (f"{file}: holds the values {value}; a full label may hold {allowed}; correct the label, "
                               f"or name and map these values")


def test_one_name_in_two_folders_is_refused(refused, source17):
    shutil.copytree(source17 / CASES["2017"][0], source17 / "LGG" / "Brats17_TCIA_105_1")
    assert f"the name of the case, 'Brats17_TCIA_105_1', is that of {source17 / 'HGG'}" in refused(source17)


def test_a_case_that_is_a_link_to_elsewhere_is_refused(refused, source17, tmp_path):
    case = source17 / CASES["2017"][0]
    case.rename(tmp_path / case.name)
    case.symlink_to(tmp_path / case.name)
    text = refused(source17)
    assert text.count("leads out of the source folder") == 5
    assert f"{case / case.name}_t1ce.nii.gz: leads out of the source folder, to {tmp_path / case.name}" in text
