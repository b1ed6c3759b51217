from __future__ import annotations

import hashlib
import json
from functools import partial

import numpy as np
import pytest
import SimpleITK as sitk
from image_files import read_json, read_voxels, write_image

from nnunet_confkd import cli
from nnunet_confkd.data.weak_labels import case_rng, weaken
from nnunet_confkd.data.weaken import weaken_dataset
from nnunet_confkd.errors import InputError

SOURCE = "Dataset001_Source"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path


@pytest.fixture
def source(folders):
    """Ten patients of two cases each, two channels, an oblique grid with thick slices; a test case; no split."""
    folder = folders / "raw" / SOURCE
    rng = np.random.default_rng(0)
    for patient in range(10):
        for visit in "ab":
            for channel in range(2):
                _write(folder / "imagesTr" / f"p{patient}_{visit}_{channel:04d}.nii.gz", rng.normal(size=(3, 12, 10)))
            label = np.zeros((3, 12, 10), np.uint8)
            top, left = rng.integers(1, 6), rng.integers(1, 3)
            label[:, top:top + 5, left:left + 4], label[:, top:top + 5, left + 4:left + 7] = 1, 2
            _write(folder / "labelsTr" / f"p{patient}_{visit}.nii.gz", label)
    for channel in range(2):
        _write(folder / "imagesTs" / f"t_{channel:04d}.nii.gz", rng.normal(size=(3, 12, 10)))
    _write(folder / "labelsTs" / "t.nii.gz", rng.integers(0, 3, (3, 12, 10)).astype(np.uint8))
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "one": 1, "two": 2}, "numTraining": 20,
        "file_ending": ".nii.gz", "licence": "none of ours", "patient_pattern": r"(p\d+)_\w", "release": "1.0"}))
    return folder


_write = partial(write_image, spacing=(0.75, 1.25, 5.0), origin=(-3.5, 11.25, 2), direction=(0.8, -0.6, 0, 0.6, 0.8,
                  0, 0, 0, 1))


def _weaken(**options):
    options = {"full": ["3"], "style": "points", "processes": 1, "dataset_id": 2} | options
    return weaken_dataset(options.pop("source", SOURCE), options.pop("dataset_id"), **options)


def test_a_data_set_that_is_not_fully_annotated_is_refused(source):
    described = json.loads((source / "dataset.json").read_text())
    described["supervision"] = {f"p{i}_{visit}": "partial" if i < 2 else "full" for i in range(10) for visit in "ab"}
    (source / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="dataset.json: 4 cases of 20 not fully annotated .p0_a, p0_b, p1_a and 1"):
        _weaken()


def _split(folders, name):
    """What every fold trains on, and what all of them together validate on."""
    folds = read_json(folders / "preprocessed" / name / "splits_final.json")
    assert all(fold["train"] == folds[0]["train"] and fold["val"] for fold in folds)
    validating = [case for fold in folds for case in fold["val"]]
    assert len(validating) == len(set(validating))
    return {"train": folds[0]["train"], "val": sorted(validating), "folds": len(folds)}


def _files(folder):
    return {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in folder.rglob("*")
        if f.is_file()
    }


def _patients(cases):
    return {case.split("_")[0] for case in cases}


# ---- what is written ------------------------------------------------------------------------------------------------

def test_each_kind_of_case_has_its_label(source, folders):
    target = _weaken(unlabelled=2, seed=3)
    assert target == folders / "raw" / "Dataset002_Source_points"
    described, split = read_json(target / "dataset.json"), _split(folders, target.name)
    kinds = described["supervision"]
    assert len(kinds) == 20 and described["numTraining"] == 20
    of = {kind: {case for case in kinds if kinds[case] == kind} for kind in ("full", "partial", "unlabelled")}
    # 3 and those that validate
    assert (
        len(_patients(split["val"])) == split["folds"] == 2 and len(_patients(of["full"])) == 5
    )
    assert (
        set(split["val"]) < of["full"] and len(_patients(of["unlabelled"])) == 2 and len(_patients(of["partial"])) == 3
    )
    # both cases of a patient alike
    assert (
        len(of["full"]) == 10 and len(of["partial"]) == 6 and len(of["unlabelled"]) == 4
    )
    for case, kind in kinds.items():
        full, weak = (read_voxels(folder / "labelsTr" / f"{case}.nii.gz") for folder in (source, target))
        expected = {"full": full, "unlabelled": np.full_like(full, 3),
                    "partial": weaken(full, "points", 3, case_rng(case, "points", 3), spacing=(5, 1.25, 0.75))}[kind]
        assert np.array_equal(weak, expected)


def test_all_else_stays(source, folders):
    target = _weaken()
    before, after = _files(source), _files(target)
    assert before.keys() == after.keys()
    partial = {case for case, kind in read_json(target / "dataset.json")["supervision"].items() if kind == "partial"}
    assert {f for f in before if before[f] != after[f]} == {
        "dataset.json",
        *(f"labelsTr/{case}.nii.gz" for case in partial),
    }
    described = read_json(target / "dataset.json")
    assert described["labels"] == {"background": 0, "one": 1, "two": 2, "ignore": 3}
    assert described["licence"] == "none of ours" and described["release"] == "1.0"
    assert described["patient_pattern"] == r"(p\d+)_\w" and described["channel_names"] == {"0": "T1", "1": "T2"}
    assert described["weakened"]["source"] == SOURCE and described["weakened"]["style"] == "points"


def test_weak_labels_keep_the_geometry(source):
    target = _weaken(unlabelled=2)
    for file in (source / "labelsTr").iterdir():
        full, weak = sitk.ReadImage(str(file)), sitk.ReadImage(str(target / "labelsTr" / file.name))
        for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(weak, geometry)() == pytest.approx(getattr(full, geometry)(), abs=1e-6)


def test_slices_lie_across_the_largest_spacing_unless_told(source):
    def annotated(target):
        case = next(c for c, kind in read_json(target / "dataset.json")["supervision"].items() if kind == "partial")
        return read_voxels(target / "labelsTr" / f"{case}.nii.gz") != 3

    thick = annotated(_weaken(style="slices", fraction=0.3))
    assert sorted(thick.all(axis=(1, 2))) == [False, False, True] and thick.sum() == 120
    told = annotated(_weaken(style="slices", fraction=0.5, slice_axis=2, dataset_id=3, name="Other"))
    assert told.all(axis=(0, 1)).sum() == 5 and told.sum() == 5 * 36


@pytest.mark.parametrize("style", ["erosion", "points", "scribbles", "slices", "box"])
def test_every_style_writes_partial_labels_that_nnunet_accepts(source, style, require_integrity):
    target = _weaken(style=style)
    partial = [c for c, kind in read_json(target / "dataset.json")["supervision"].items() if kind == "partial"]
    for case in partial:
        full, weak = (read_voxels(folder / "labelsTr" / f"{case}.nii.gz") for folder in (source, target))
        assert (weak == 3).any() and (weak[weak != 3] == full[weak != 3]).all()
    require_integrity(target)


def test_the_style_none_leaves_all_others_without_labels(source):
    kinds = read_json(_weaken(style="none") / "dataset.json")["supervision"]
    assert sorted(kinds.values()) == ["full"] * 10 + ["unlabelled"] * 10


def test_any_number_of_processes_writes_the_same(source, folders):
    one = _files(_weaken(style="scribbles", processes=1))
    two = _files(_weaken(style="scribbles", processes=2, dataset_id=3, name="Source_scribbles"))
    assert one == two


def test_fewer_full_patients_lie_within_more_and_the_weak_labels_are_the_same(source, folders):
    targets = [_weaken(full=[str(n)], unlabelled=1, dataset_id=n + 1, name=f"F{n}") for n in (1, 3, 5)]
    splits = [_split(folders, target.name) for target in targets]
    assert splits[0] == splits[1] == splits[2]
    full = [{c for c, kind in read_json(t / "dataset.json")["supervision"].items() if kind == "full"} for t in targets]
    assert full[0] < full[1] < full[2] and [len(_patients(f)) for f in full] == [3, 5, 7]
    files = [_files(target) for target in targets]
    still_weak = [name for name in files[0] if name.startswith("labelsTr") and name[9:13] not in full[2]]
    assert len(still_weak) == 6 and all(files[0][name] == files[1][name] == files[2][name] for name in still_weak)


def test_seeds_differ_in_patients_and_scribbles(source, folders):
    first, second = _weaken(seed=0), _weaken(seed=1, dataset_id=3, name="Second")
    assert _split(folders, first.name) != _split(folders, second.name)
    both = [c for c, kind in read_json(first / "dataset.json")["supervision"].items()
            if kind == "partial" == read_json(second / "dataset.json")["supervision"][c]]
    assert both and all(
        not np.array_equal(*(read_voxels(folder / "labelsTr" / f"{c}.nii.gz") for folder in (first, second)))
        for c in both
    )


def test_the_sources_validation_cases_stay_full_and_validate(source, folders):
    (folders / "preprocessed" / SOURCE).mkdir()
    validation = [f"p{p}_{v}" for p in (0, 7) for v in "ab"]
    split = {
        "train": [f.name[:4] for f in (source / "labelsTr").iterdir() if f.name[:4] not in validation],
        "val": validation,
    }
    (folders / "preprocessed" / SOURCE / "splits_final.json").write_text(json.dumps([split, {"train": [], "val": []}]))
    for seed in range(3):
        target = _weaken(seed=seed, full=["1"], dataset_id=seed + 2, name=f"S{seed}")
        assert _split(folders, target.name) == {"train": sorted(split["train"]), "val": sorted(validation), "folds": 2}
        kinds = read_json(target / "dataset.json")["supervision"]
        assert all(kinds[case] == "full" for case in validation)


def test_patients_that_are_held_back_are_divided_over_five_folds_or_fewer_each_of_which_trains_on_the_same(
    source, folders
):
    described = read_json(source / "dataset.json") | {"patient_pattern": None}  # 20 patients, of whom 4 are held back
    (source / "dataset.json").write_text(json.dumps(described))
    for dataset_id, number, sizes in ((2, 5, [1] * 4), (3, 2, [2, 2]), (4, 1, [4])):
        target = _weaken(dataset_id=dataset_id, name=f"F{number}", folds=number)
        folds = read_json(folders / "preprocessed" / target.name / "splits_final.json")
        assert [len(fold["val"]) for fold in folds] == sizes
        kinds = read_json(target / "dataset.json")["supervision"]
        held_back = {case for fold in folds for case in fold["val"]}
        for fold in folds:
            assert set(fold["train"]) == set(kinds) - held_back
            assert sum(kinds[case] == "full" for case in fold["train"]) == 3  # as many as --full says


def test_the_full_patients_may_be_named(source):
    kinds = read_json(_weaken(full=["p2", "p5"]) / "dataset.json")["supervision"]
    assert all(kinds[f"{p}_{v}"] == "full" for p in ("p2", "p5") for v in "ab")
    assert sum(kind == "full" for kind in kinds.values()) == 8  # two patients and two that validate, two cases each


def test_without_a_pattern_every_case_is_its_own_patient(source, folders):
    described = read_json(source / "dataset.json")
    del described["patient_pattern"]
    (source / "dataset.json").write_text(json.dumps(described))
    target = _weaken()
    assert len(_split(folders, target.name)["val"]) == 4
    assert sum(kind == "full" for kind in read_json(target / "dataset.json")["supervision"].values()) == 7


def test_regions_are_weakened_by_their_values(source):
    described = read_json(source / "dataset.json") | {"labels": {"background": 0, "whole": [1, 2], "two": [2]},
                                                  "regions_class_order": [1, 2]}
    (source / "dataset.json").write_text(json.dumps(described))
    described = read_json(_weaken() / "dataset.json")
    assert described["labels"] == {"background": 0, "whole": [1, 2], "two": [2], "ignore": 3}
    assert described["regions_class_order"] == [1, 2]


def test_a_data_set_that_lists_its_files_is_weakened(source, folders):
    cases = sorted(f.name[:-7] for f in (source / "labelsTr").iterdir())
    (source / "imagesTr").rename(folders / "elsewhere")
    described = read_json(source / "dataset.json") | {"dataset": {
        case: {"images": [str(folders / "elsewhere" / f"{case}_{c:04d}.nii.gz") for c in range(2)],
               "label": f"labelsTr/{case}.nii.gz"} for case in cases}}
    (source / "dataset.json").write_text(json.dumps(described))
    target = _weaken()
    assert len(list((target / "imagesTr").iterdir())) == 40 and "dataset" not in read_json(target / "dataset.json")


def test_images_are_linked_where_asked_for(source):
    copied, linked = _weaken(), _weaken(link=True, dataset_id=3, name="Linked")
    name = "imagesTr/p0_a_0000.nii.gz"
    assert (linked / name).samefile(source / name) and not (copied / name).samefile(source / name)
    assert not any((linked / "labelsTr" / f.name).samefile(f) for f in (source / "labelsTr").iterdir())


def test_the_command(source, folders, capsys):
    code = cli.main(["weaken", "--source", "1", "--id", "9", "--full", "2", "--style", "erosion", "--fraction", "0.5",
                     "--unlabelled", "1", "--seed", "4", "--processes", "1", "--no-background", "--name", "Weak"])
    out = capsys.readouterr().out
    assert (
        code == 0 and "20 training cases (8 full, 10 partial, 2 unlabelled)\n2 folds: each trains on the same 2 " in out
    )
    target = folders / "raw" / "Dataset009_Weak"
    case = next(c for c, kind in read_json(target / "dataset.json")["supervision"].items() if kind == "partial")
    weak = read_voxels(target / "labelsTr" / f"{case}.nii.gz")
    assert (weak != 0).all() and (weak == 3).all(axis=(1, 2)).sum() == 1  # of three slices round(1.5) = 2 are annotated


def test_hippocampus_keeps_points_in_three_planes(test_data, folders):
    folder = folders / "raw" / SOURCE
    for file in sorted((test_data / "hippocampus" / "labelsTr").glob("*.nii.gz"))[:5]:
        image = test_data / "hippocampus" / "imagesTr" / file.name
        for sub, name, original in (
            ("labelsTr", file.name, file),
            ("imagesTr", file.name.replace(".nii", "_0000.nii"), image),
        ):
            (folder / sub).mkdir(parents=True, exist_ok=True)
            (folder / sub / name).write_bytes(original.read_bytes())
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "MRI"}, "labels": {"background": 0, "anterior": 1, "posterior": 2}, "numTraining": 5,
        "file_ending": ".nii.gz"}))
    target = _weaken(full=["1"], slice_axis=1)
    for case, kind in read_json(target / "dataset.json")["supervision"].items():
        if kind == "partial":
            full, weak = (read_voxels(place / "labelsTr" / f"{case}.nii.gz") for place in (folder, target))
            for k in range(full.shape[1]):
                assert set(np.unique(weak[:, k])) - {3} == set(np.unique(full[:, k]))


# ---- hidden classes -------------------------------------------------------------------------------------------------

def test_hidden_classes_are_background_and_all_else_stays_annotated(source, folders):
    target = _weaken(style=None, hide_classes=1, full=["2"], unlabelled=1)
    assert target.name == "Dataset002_Source_hidden"
    described = read_json(target / "dataset.json")
    partial = {case for case, kind in described["supervision"].items() if kind == "partial"}
    assert set(described["annotated_classes"]) == partial and described["weakened"]["hide_classes"] == 1
    values = {"one": 1, "two": 2}
    for case, listed in described["annotated_classes"].items():
        full, weak = (read_voxels(folder / "labelsTr" / f"{case}.nii.gz") for folder in (source, target))
        (name,) = listed
        assert np.array_equal(weak, np.where(full == values[name], full, 0)) and (weak == values[name]).any()
    # both cases of a patient alike, and the patients take turns
    of = {case[:2]: tuple(listed) for case, listed in described["annotated_classes"].items()}
    assert len(of) == 5 and sorted(map(list(of.values()).count, set(of.values()))) == [2, 3]
    assert all(described["annotated_classes"][f"{patient}_b"] == list(listed) for patient, listed in of.items())


def test_scribbles_of_some_classes_are_drawn_on_the_merged_background(source):
    target = _weaken(style="scribbles", hide_classes=1, seed=3)
    described = read_json(target / "dataset.json")
    assert target.name == "Dataset002_Source_scribbles_hidden" and described["annotated_classes"]
    for case, (name,) in described["annotated_classes"].items():
        full, weak = (read_voxels(folder / "labelsTr" / f"{case}.nii.gz") for folder in (source, target))
        merged = np.where(full == {"one": 1, "two": 2}[name], full, 0).astype(np.uint8)
        expected = weaken(merged, "scribbles", 3, case_rng(case, "scribbles", 3), spacing=(5, 1.25, 0.75))
        assert np.array_equal(weak, expected) and not np.array_equal(merged, full)


def test_there_may_be_no_full_case_if_classes_are_hidden(source, folders):
    target = _weaken(style=None, hide_classes=1, full=["0"])
    described, split = read_json(target / "dataset.json"), _split(folders, target.name)
    assert {described["supervision"][case] for case in split["train"]} == {"partial"}
    assert {name for listed in described["annotated_classes"].values() for name in listed} == {"one", "two"}


def test_hidden_regions_lose_the_values_that_are_in_no_other_region(source):
    described = read_json(source / "dataset.json") | {"labels": {"background": 0, "whole": [1, 2], "two": [2]},
                                                  "regions_class_order": [1, 2]}
    (source / "dataset.json").write_text(json.dumps(described))
    target = _weaken(style=None, hide_classes=1)
    lists = read_json(target / "dataset.json")["annotated_classes"]
    assert {listed[0] for listed in lists.values()} == {"whole", "two"}
    for case, (name,) in lists.items():
        full, weak = (read_voxels(folder / "labelsTr" / f"{case}.nii.gz") for folder in (source, target))
        assert np.array_equal(weak, np.where(full == 2, 2, 0) if name == "two" else full)


def test_patients_hide_the_same_classes_however_many_are_full(source):
    first, second = (read_json(_weaken(style=None, hide_classes=1, full=[number], dataset_id=i, name=f"F{i}")
                               / "dataset.json")["annotated_classes"] for i, number in ((2, "2"), (3, "3")))
    assert len(second) < len(first) and all(first[case] == listed for case, listed in second.items())


def test_a_source_with_hidden_classes_is_refused(source):
    described = read_json(source / "dataset.json") | {"annotated_classes": {"p0_a": ["one"]}}
    (source / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match='dataset.json: has "annotated_classes", so its cases are not fully annotated'):
        _weaken()


def test_the_command_hides_classes(source, folders, capsys):
    assert cli.main(["weaken", "--source", "1", "--id", "9", "--full", "0", "--hide-classes", "1"]) == 0
    assert "20 training cases (4 full, 16 partial, 0 unlabelled)" in capsys.readouterr().out
    assert len(read_json(folders / "raw" / "Dataset009_Source_hidden" / "dataset.json")["annotated_classes"]) == 16


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, pattern", [
    ({"source": "5"}, "no data set 5"),
    ({"source": "Dataset001_Sauce"}, "no data set Dataset001_Sauce"),
    ({"dataset_id": 1}, r"the id 1 is taken by .*Dataset001_Source"),
    ({"dataset_id": 1000}, "from 1 to 999"),
    ({"name": "a b"}, "letters, digits"),
    ({"full": ["9"]}, "9 full patients are asked for; besides the 2 that validate there are 8"),
    ({"full": ["0"]}, "0 full patients"),
    ({"full": ["p1", "p11", "q"]}, "no such patients: p11, q"),
    ({"unlabelled": 6}, "6 unlabelled patients are asked for; 5 are neither"),
    ({"unlabelled": -1}, "-1 unlabelled"),
    ({"style": "scrawl"}, "no style 'scrawl'"),
    ({"style": "slices", "fraction": 2.0}, "fraction must be above 0 and at most 1, got 2.0"),
    ({"style": "scribbles", "dimension": "3d"}, "scribbles are made slice by slice"),
    ({"style": None}, "give a style .--style., or a number of classes to hide .--hide-classes."),
    ({"hide_classes": 2}, "2 classes are to be hidden in each case; there are 2 .one, two., of which at least one"),
    ({"hide_classes": -1}, "-1 classes are to be hidden"),
    ({"style": "none", "hide_classes": 1}, "with the style none nothing is annotated"),
    ({"patient_pattern": r"q(\d)"}, "does not match these cases"),
    ({"patient_pattern": "p["}, "is no regular expression"),
])
def test_wrong_options_write_nothing(source, folders, options, pattern):
    before = _files(folders)
    with pytest.raises(InputError, match=pattern) as caught:
        _weaken(**options)
    assert "problems; nothing" not in str(caught.value)  # said once, not for every case
    assert _files(folders) == before


def test_wrong_labels_are_listed_together_and_nothing_is_written(source, folders):
    kinds = read_json(_weaken() / "dataset.json")["supervision"]
    a, b, *_ = [case for case, kind in kinds.items() if kind == "partial"]
    for case, value in ((a, 3), (b, 7)):
        label = read_voxels(source / "labelsTr" / f"{case}.nii.gz")
        label[0, 0, 0] = value
        _write(source / "labelsTr" / f"{case}.nii.gz", label)
    before = _files(folders)
    with pytest.raises(InputError, match="2 problems; nothing was written") as caught:
        _weaken(dataset_id=4, name="Other")
    for case, value in ((a, 3), (b, 7)):
        assert f"{source / 'labelsTr' / case}.nii.gz: holds the values {value}; a full label may hold 0, 1, 2" in str(
            caught.value
        )
    assert _files(folders) == before


@pytest.mark.parametrize("content, pattern", [("{", "is no list of folds"), ("[]", "is no list of folds"),
                                              ('[{"train": [], "val": ["x"]}]', "names cases that Dataset001_Source "
                                                                                "does not have: x")])
def test_a_broken_split_is_refused(source, folders, content, pattern):
    (folders / "preprocessed" / SOURCE).mkdir()
    (folders / "preprocessed" / SOURCE / "splits_final.json").write_text(content)
    with pytest.raises(InputError, match=pattern):
        _weaken()


def test_a_folder_that_is_no_data_set_is_refused(source):
    (source / "dataset.json").unlink()
    with pytest.raises(InputError, match="is no data set in nnU-Net's raw format"):
        _weaken()


def test_a_missing_label_is_named(source):
    (source / "labelsTr" / "p3_a.nii.gz").unlink()
    with pytest.raises(InputError, match=r"p3_a\.nii\.gz: there is no such file"):
        _weaken(full=["p3"])
