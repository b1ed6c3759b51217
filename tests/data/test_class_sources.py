"""Sources that annotate different classes with values of their own: `confkd mix --source NAME=FOLDER --classes ...`."""
from __future__ import annotations

import json
import re
from functools import partial

import numpy as np
import pytest
from image_files import file_states, read_json, read_voxels, write_image

from nnunet_confkd import cli
from nnunet_confkd.data.annotated_classes import annotated_classes
from nnunet_confkd.data.class_sources import labels_of_sources
from nnunet_confkd.data.mix import mix
from nnunet_confkd.data.patients import patients_of
from nnunet_confkd.data.sources import NamedFolder, Source, prefix_pattern
from nnunet_confkd.errors import InputError

_write = partial(write_image, spacing=(1.0, 2.0, 3.0))


def make_source(folder, names, values, seed=0):
    """Write a case for each name, whose label holds these values. Return the folder."""
    rng = np.random.default_rng(seed)
    for name in names:
        image = rng.normal(size=(3, 5, 4)).astype(np.float32)
        _write(folder / "images" / f"{name}.nii.gz", image)
        _write(folder / "labels" / f"{name}.nii.gz", rng.choice(values, image.shape).astype(np.uint8))
    return folder


@pytest.fixture
def folders(tmp_path):
    """A set in which 1 is the liver, and one in which 1 is the kidney and 2 the spleen."""
    return {"abdomen": make_source(tmp_path / "A", ["a1", "a2", "a3"], [0, 1]),
            "renal": make_source(tmp_path / "R", ["r1", "r2"], [0, 1, 2], seed=1)}


CLASSES = {"abdomen": ["liver=1"], "renal": ["kidney", "spleen"]}


def mixed(folders, classes=None, **options):
    classes = CLASSES | (classes or {})
    return mix(None, 7, named=[NamedFolder(name, folder, classes.get(name)) for name, folder in folders.items()],
               processes=1, **options)


def arguments(folders, *more):
    texts = [["--source", f"{name}={folder}", "--classes", *CLASSES[name]] for name, folder in folders.items()]
    return ["mix", *sum(texts, []), "--id", "7", "--processes", "1", *more]


# ---- what is written ------------------------------------------------------------------------------------------------

def test_the_union_of_the_classes_is_numbered_and_each_case_lists_its_own(folders, nnunet_folders, require_integrity):
    before = {name: file_states(folder) for name, folder in folders.items()}
    target = mixed(folders)
    described = read_json(target / "dataset.json")
    assert described["labels"] == {"background": 0, "liver": 1, "kidney": 2, "spleen": 3}, "no ignore label is needed"
    assert described["annotated_classes"] == {**dict.fromkeys(["a1", "a2", "a3"], ["liver"]),
                                              **dict.fromkeys(["r1", "r2"], ["kidney", "spleen"])}
    assert set(described["supervision"].values()) == {"partial"}
    for folder, numbers in ((folders["abdomen"], [0, 1]), (folders["renal"], [0, 2, 3])):
        for file in (folder / "labels").iterdir():
            assert np.array_equal(read_voxels(target / "labelsTr" / file.name), np.array(numbers)[read_voxels(file)])
    counts = {case: dict(zip(*np.unique(read_voxels(target / "labelsTr" / f"{case}.nii.gz"), return_counts=True)))
              for case in described["annotated_classes"]}
    assert annotated_classes(described, counts)["r1"] == (True, False, True, True), "the trainer reads it"
    assert {name: file_states(folder) for name, folder in folders.items()} == before
    require_integrity(target)


def test_a_source_of_all_classes_is_fully_annotated(folders, nnunet_folders, tmp_path):
    folders["all"] = make_source(tmp_path / "F", ["f1", "f2"], [0, 1, 2, 3])
    described = read_json(mixed(folders, {"all": ["spleen=1", "liver=2", "kidney=3"]}) / "dataset.json")
    assert described["supervision"]["f1"] == "full" and "f1" not in described["annotated_classes"]


def test_values_without_a_name_of_their_own_can_be_background_and_several_can_be_one_class(folders, nnunet_folders):
    target = mixed(folders, {"renal": ["kidney=2", "background=0,1"], "abdomen": ["liver=0,1", "background=7"]})
    label = read_voxels(folders["renal"] / "labels" / "r1.nii.gz")
    assert np.array_equal(read_voxels(target / "labelsTr" / "r1.nii.gz"), np.where(label == 2, 2, 0))
    assert (read_voxels(target / "labelsTr" / "a1.nii.gz") == 1).all()


def test_scribbles_of_some_classes(folders, nnunet_folders, tmp_path):
    """0 is not annotated, 9 is background: the case lists its classes, and has ignored voxels as well."""
    folders["scribbles"] = make_source(tmp_path / "S", ["s1"], [0, 1, 9])
    target = mixed(folders, {"scribbles": ["kidney=1", "background=9", "ignore=0"]})
    described = read_json(target / "dataset.json")
    assert described["labels"]["ignore"] == 4 and described["annotated_classes"]["s1"] == ["kidney"]
    label = read_voxels(folders["scribbles"] / "labels" / "s1.nii.gz")
    assert np.array_equal(read_voxels(target / "labelsTr" / "s1.nii.gz"), np.select([label == 0, label == 1], [4, 2]))
    assert not (read_voxels(target / "labelsTr" / "a1.nii.gz") == 4).any(), "0 stays background elsewhere"


def test_labels_of_a_source_without_ignored_voxels_are_complete(nnunet_folders, tmp_path):
    """Some labels of each source have ignored voxels. The folds validate on the others, each for its own class."""
    folders = {}
    for name in ("A", "B"):
        folders[name] = make_source(tmp_path / name, [f"{name}{i}" for i in range(3)], [1, 9])
        make_source(tmp_path / name, [f"{name}3"], [0, 1, 9])
    target = mixed(folders, {name: [f"{organ}=1", "background=9", "ignore=0"]
                             for name, organ in (("A", "liver"), ("B", "kidney"))})
    folds = read_json(next(target.parents[1].rglob("splits_final.json")))
    assert sorted(sum((fold["val"] for fold in folds), [])) == ["A0", "A1", "A2", "B0", "B1", "B2"]
    assert all({"A3", "B3"} <= set(fold["train"]) for fold in folds)


def test_labels_of_all_classes_are_full_where_nothing_is_ignored(nnunet_folders, tmp_path):
    """The dataset.json of a source has a value for what is not annotated, which some of its labels use, or none."""
    described = {"labels": {"background": 0, "liver": 1, "ignore": 2}}
    for source in ("A", "B"):
        folder = make_source(tmp_path / source, [f"{source}{i}" for i in range(3)], [0, 1])
        (folder / "dataset.json").write_text(json.dumps(described))
    make_source(tmp_path / "A", ["A3"], [0, 1, 2])
    kinds = read_json(mixed({name: tmp_path / name for name in ("A", "B")}, dict.fromkeys(("A", "B"))) / "dataset.json")
    assert kinds["labels"] == {"background": 0, "liver": 1, "ignore": 2}
    assert kinds["supervision"] == {**dict.fromkeys(["A0", "A1", "A2", "B0", "B1", "B2"], "full"), "A3": "partial"}


def test_a_wrong_value_for_what_is_not_annotated_is_noticed(folders, nnunet_folders):
    with pytest.raises(InputError, match="no label holds the value 7, which is said to mark what is not annotated"):
        mixed(folders, {"abdomen": ["liver=1", "ignore=7"]})


def test_unlabelled_images_go_with_sources(folders, nnunet_folders, tmp_path):
    image = read_voxels(folders["abdomen"] / "images" / "a1.nii.gz")
    _write(tmp_path / "U" / "u1.nii.gz", image + 1)
    (tmp_path / "U" / "a1.nii.gz").write_bytes((folders["abdomen"] / "images" / "a1.nii.gz").read_bytes())
    target = mixed(folders, unlabelled=tmp_path / "U")
    described = read_json(target / "dataset.json")
    assert described["supervision"]["u1"] == "unlabelled" and len(described["supervision"]) == 6
    assert (read_voxels(target / "labelsTr" / "u1.nii.gz") == described["labels"]["ignore"]).all()


def test_names_of_classes_and_the_licence_come_from_each_dataset_json(folders, nnunet_folders):
    for folder, labels, licence in ((folders["abdomen"], {"background": 0, "liver": 1}, "A"),
                                    (folders["renal"], {"0": "background", "1": "kidney", "2": "liver"}, "B")):
        (folder / "dataset.json").write_text(str({"labels": labels, "licence": licence}).replace("'", '"'))
    described = read_json(mixed(folders, dict.fromkeys(folders)) / "dataset.json")
    assert described["labels"] == {"background": 0, "liver": 1, "kidney": 2} and described["licence"] == "A; B"
    assert "r1" not in described["annotated_classes"] and described["annotated_classes"]["a1"] == ["liver"]


def test_segments_are_read_by_name(folders, nnunet_folders, tmp_path):
    for name in ("Liver", "Gallbladder"):
        mask = read_voxels(folders["abdomen"] / "labels" / "a1.nii.gz")
        _write(tmp_path / "T" / "labels" / "t1" / f"{name}.nii.gz", mask if name == "Liver" else 1 - mask)
    _write(tmp_path / "T" / "images" / "t1.nii.gz", mask.astype(np.float32))
    folders["segments"] = tmp_path / "T"
    target = mixed(folders, {"segments": ["liver"]})
    assert np.array_equal(read_voxels(target / "labelsTr" / "t1.nii.gz"), mask)
    assert read_json(target / "dataset.json")["annotated_classes"]["t1"] == ["liver"]


# ---- regions --------------------------------------------------------------------------------------------------------

def region_source(folder, names, values=(0, 1, 2, 3)):
    """Write cases with three regions, each in the one before; edema is 2, the rest of the core 1, what enhances 3."""
    make_source(folder, names, list(values))
    (folder / "dataset.json").write_text('{"labels": {"background": 0, "whole": [1, 2, 3], "core": [1, 3], "act": 3}, '
                                         '"regions_class_order": [2, 1, 3]}')
    return folder


def test_regions_are_those_of_one_source_and_others_are_annotated_for_some(tmp_path, nnunet_folders, require_integrity):
    folders = {"whole": make_source(tmp_path / "W", ["w1", "w2"], [0, 1]),
               "nested": make_source(tmp_path / "N", ["n1"], [0, 1, 5]),
               "core": make_source(tmp_path / "C", ["c1"], [0, 7]),
               "full": region_source(tmp_path / "F", ["f1", "f2"])}
    target = mixed(folders, {"whole": ["whole"], "nested": ["whole=1,5", "act=5"], "core": ["core=7"], "full": None})
    described = read_json(target / "dataset.json")
    assert described["labels"] == {"background": 0, "whole": [1, 2, 3], "core": [1, 3], "act": 3}
    assert described["regions_class_order"] == [2, 1, 3]
    assert described["annotated_classes"] == {"w1": ["whole"], "w2": ["whole"], "n1": ["whole", "act"], "c1": ["core"]}
    assert {case for case, kind in described["supervision"].items() if kind == "full"} == {"f1", "f2"}
    written = {"w1": {0: 0, 1: 2}, "n1": {0: 0, 1: 2, 5: 3}, "c1": {0: 0, 7: 1}, "f1": {0: 0, 1: 1, 2: 2, 3: 3}}
    for (case, values), name in zip(written.items(), folders):
        label = read_voxels(folders[name] / "labels" / f"{case}.nii.gz")
        written_label = read_voxels(target / "labelsTr" / f"{case}.nii.gz")
        assert np.array_equal(written_label, np.vectorize(values.get)(label)), case
    counts = {case: dict(zip(*np.unique(read_voxels(target / "labelsTr" / f"{case}.nii.gz"), return_counts=True)))
              for case in described["supervision"]}
    assert annotated_classes(described, counts)["c1"] == (False, True, False), "the trainer reads it"


def test_values_of_a_region_source_that_is_not_the_first_are_those_of_the_same_regions(tmp_path):
    """In the other, which lacks a region, 1 and 2 stand for what 2 and 1 are in the first."""
    full = region_source(tmp_path / "full", ["f1"])
    other = make_source(tmp_path / "other", ["o1"], [0, 1, 2])
    (other / "dataset.json").write_text('{"labels": {"background": 0, "whole": [1, 2], "core": [2]}, '
                                        '"regions_class_order": [1, 2]}')
    labels = labels_of_sources([NamedFolder("other", other), NamedFolder("full", full)])
    assert dict(labels[0].full.values) == {0: 0, 1: 2, 2: 1} and labels[0].listed == ("whole", "core")
    assert dict(labels[1].full.values) == {0: 0, 1: 1, 2: 2, 3: 3} and labels[1].listed is None


# ---- images that lie apart ------------------------------------------------------------------------------------------

def test_sources_may_be_labels_of_one_folder_of_images(folders, nnunet_folders, tmp_path, require_integrity):
    """One image has no label, and another one has two."""
    for folder in folders.values():
        for file in (folder / "images").iterdir():
            _write(tmp_path / "images" / file.name, read_voxels(file))
    _write(tmp_path / "images" / "u1.nii.gz", read_voxels(file) + 1)
    labels = {name: folder / "labels" for name, folder in folders.items()}
    described = read_json(mixed(labels, images=[tmp_path / "images"]) / "dataset.json")
    assert described["annotated_classes"] == {**dict.fromkeys(["a1", "a2", "a3"], ["liver"]),
                                              **dict.fromkeys(["r1", "r2"], ["kidney", "spleen"])}
    assert described["supervision"]["u1"] == "unlabelled" and len(described["supervision"]) == 6
    label = labels["renal"] / "a1.nii.gz"
    label.write_bytes((labels["renal"] / "r1.nii.gz").read_bytes())
    target = mixed(labels, images=[tmp_path / "images"], overwrite=True)
    described = read_json(target / "dataset.json")
    assert described["annotated_classes"]["renal_a1"] == ["kidney", "spleen"]
    assert patients_of(described["supervision"], described["patient_pattern"])["renal_a1"] == "a1"
    assert np.array_equal(read_voxels(target / "labelsTr" / "renal_a1.nii.gz"),
                          np.array([0, 2, 3])[read_voxels(label)])
    assert described["supervision"]["unlabelled_u1"] == "unlabelled"


def test_labels_of_no_image_are_told_for_all_sources(folders, nnunet_folders):
    labels = {name: folder / "labels" for name, folder in folders.items()}
    with pytest.raises(InputError, match="r1.nii.gz: has no image in"):
        mixed(labels, images=[folders["abdomen"] / "images"])
    with pytest.raises(InputError, match="only --unlabelled or --images goes with"):
        mixed(labels, images=[folders["abdomen"] / "images"], unlabelled=folders["renal"])


# ---- data sets that say themselves that their labels lack classes ---------------------------------------------------

@pytest.fixture
def lacking(folders, nnunet_folders):
    """An nnU-Net data set in which a1 to a3 are annotated for the liver alone, and f1 and f2 for all classes."""
    folders["full"] = make_source(folders["abdomen"].parent / "F", ["f1", "f2"], [0, 1, 2, 3])
    return mixed(folders, {"full": ["liver", "kidney", "spleen"]})


def _places(dataset, layout, cases):
    """The options of mix for some of the cases, and with all labels complete masks."""
    labels = [dataset / "labelsTr" / f"{case}.nii.gz" for case in cases]
    return {"full": {"full": dataset}, "folder": {"images": [dataset / "imagesTr"],
                                                  "full_labels": [dataset / "labelsTr"]},
            "files": {"images": [dataset / "imagesTr"], "full_labels": labels}}[layout]


@pytest.mark.parametrize("layout", ["full", "folder", "files"])
def test_labels_that_lack_classes_are_not_taken_for_complete_ones(lacking, layout, monkeypatch):
    """What nobody annotated would become background."""
    options = {"labels": ["background", "liver", "kidney", "spleen"], "processes": 1}
    places = _places(lacking, layout, ["a1", "r1", "f1"])
    text = r'dataset.json: has "annotated_classes", by which a1, .* lack classes, which would become background; make a'
    with pytest.raises(InputError, match=text):
        mix(places.pop("full", None), 8, **places, **options)
    monkeypatch.chdir(lacking / "labelsTr")
    with pytest.raises(InputError, match=text):
        mix(None, 8, images=["../imagesTr"], full_labels=["."], **options)


def test_labels_that_lack_classes_are_not_taken_for_scribbles_of_all_classes(lacking):
    options = {"labels": ["background", "liver", "kidney", "spleen"], "ignore_value": 9, "processes": 1}
    with pytest.raises(InputError, match='has "annotated_classes", by which r1, r2 lack classes'):
        mix(None, 8, images=[lacking / "imagesTr"], full_labels=[lacking / "labelsTr" / "f*"],
            partial_labels=[lacking / "labelsTr" / "r*"], **options)


def test_complete_labels_of_a_data_set_in_which_others_lack_classes_are_taken(lacking):
    options = {"labels": ["background", "liver", "kidney", "spleen"], "processes": 1}
    described = read_json(lacking / "dataset.json")
    described["annotated_classes"]["f2"] = ["spleen", "kidney", "liver"]  # all of them
    (lacking / "dataset.json").write_text(json.dumps(described))
    target = mix(None, 8, images=[lacking / "imagesTr" / "f*"], full_labels=[lacking / "labelsTr" / "f*"], **options)
    assert read_json(target / "dataset.json")["supervision"] == {"f1": "full", "f2": "full"}
    named = [NamedFolder(name, lacking / "labelsTr" / f"{name}*", classes) for name, classes in (
        ("a", ["liver=1"]), ("r", ["kidney=2", "spleen=3"]), ("f", ["liver", "kidney", "spleen"]))]
    target = mix(None, 9, images=[lacking / "imagesTr"], named=named, processes=1)
    assert read_json(target / "dataset.json")["annotated_classes"]["r1"] == ["kidney", "spleen"], "as the error advises"


def test_labels_that_the_table_declares_partial_are_not_taken_for_full_ones(folders, nnunet_folders):
    folder = folders["abdomen"]
    described = {"labels": {"background": 0, "liver": 1, "ignore": 2},
                 "supervision": {"a1": "full", "a2": "partial", "a3": "unlabelled"}}
    (folder / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match='dataset.json: "supervision" declares that a2, a3 are not full; give partial'):
        mix(folder, 8, processes=1)
    for name in ("a2", "a3"):
        (folder / "labels" / f"{name}.nii.gz").unlink()
    mix(None, 8, images=[folder / "images"], full_labels=[folder / "labels"], labels=["background", "liver"],
        processes=1)
    (folder / "dataset.json").write_text("no JSON")
    mix(None, 9, images=[folder / "images"], full_labels=[folder / "labels"], labels=["background", "liver"],
        processes=1)


# ---- names and patients ---------------------------------------------------------------------------------------------

def test_names_in_two_sources_get_prefixes_and_count_as_one_patient(folders, nnunet_folders, tmp_path, capsys):
    folders["full"] = make_source(tmp_path / "F", ["a1", "r2", "f1", "f2"], [0, 1, 2, 3])
    described = read_json(mixed(folders, {"full": ["liver", "kidney", "spleen"]}) / "dataset.json")
    cases = list(described["supervision"])
    assert cases == ["abdomen_a1", "abdomen_a2", "abdomen_a3", "full_a1", "full_f1", "full_f2", "full_r2", "renal_r1",
                     "renal_r2"]
    patients = patients_of(cases, described["patient_pattern"])
    assert patients["abdomen_a1"] == patients["full_a1"] == "a1" and len(set(patients.values())) == 7
    splits = read_json(nnunet_folders / "preprocessed" / "Dataset007_Mixed" / "splits_final.json")
    validating = {case for fold in splits for case in fold["val"]}
    assert validating == {"abdomen_a2", "abdomen_a3", "renal_r1"}, "a1 and r2 have a case on either side otherwise"


def test_a_source_whose_name_begins_another_ones_name_does_not_swallow_it():
    sources = [Source("partial", [], name=name, prefixed=True) for name in ("organs", "organs_2")]
    for pattern in (None, r"(\w+)", r"\w+"):
        patients = patients_of(["organs_p0", "organs_2_p0"], prefix_pattern(sources, pattern))
        assert set(patients.values()) == {"p0"}


@pytest.mark.parametrize("pattern, patient", [
    (r"(a|r|f)\d", "a"), (r"a|r|f", "a"), (r"[arf]\d", "a1"), (r"^(a|r|f)\d", "a"), (r"(^[arf])\d", "a"),
    (r"(?i)([ARF])\d", "a"), (r"(?i)^[ARF]\d", "a1"), (r"\A(?P<patient>[arf]\d)", "a1")])
def test_a_patient_pattern_is_that_of_the_names_in_the_folders(folders, nnunet_folders, tmp_path, pattern, patient):
    folders["full"] = make_source(tmp_path / "F", ["a1"], [0, 1, 2, 3])
    described = read_json(mixed(folders, {"full": ["liver", "kidney", "spleen"]}, patient_pattern=pattern)
                          / "dataset.json")
    assert patients_of(described["supervision"], described["patient_pattern"])["abdomen_a1"] == patient
    del folders["full"]
    described = read_json(mixed(folders, patient_pattern=pattern, overwrite=True) / "dataset.json")
    assert described["patient_pattern"] == pattern and "a1" in described["supervision"], "no prefix without need"


def test_patients_that_lack_classes_validate_if_they_are_named(folders, nnunet_folders, tmp_path):
    mixed(folders, validation=["a2", "r1"])
    splits = read_json(nnunet_folders / "preprocessed" / "Dataset007_Mixed" / "splits_final.json")
    assert splits == [{"train": ["a1", "a3", "r2"], "val": ["a2", "r1"]}]
    with pytest.raises(InputError, match="--validation 2: no patient is annotated for all classes.* a1 a2$"):
        mixed(folders, validation=["2"], overwrite=True)
    folders["full"] = make_source(tmp_path / "F", ["a1", "f1", "f2"], [0, 1, 2, 3])
    folders["scribbles"] = make_source(tmp_path / "S", ["s1"], [0, 1, 9])
    more = {"full": ["liver", "kidney", "spleen"], "scribbles": ["kidney=1", "background=9", "ignore=0"]}
    with pytest.raises(InputError, match="cases are full, or all of whose cases lack classes alone: a1, s1$"):
        mixed(folders, more, validation=["a1", "a2", "f1", "s1"], overwrite=True)  # a1 is full in one source alone
    mixed(folders, more, validation=["a2", "f1"], overwrite=True)
    split, = read_json(nnunet_folders / "preprocessed" / "Dataset007_Mixed" / "splits_final.json")
    assert split["val"] == ["abdomen_a2", "full_f1"]
    mixed(folders, more, validation=["1"], overwrite=True)
    split, = read_json(nnunet_folders / "preprocessed" / "Dataset007_Mixed" / "splits_final.json")
    assert len(split["val"]) == 1 and split["val"][0] in ("full_f1", "full_f2"), "a number chooses full ones alone"


def test_names_that_differ_in_case_alone_are_the_same(folders, nnunet_folders, tmp_path):
    folders["upper"] = make_source(tmp_path / "U", ["A1"], [0, 1])
    described = read_json(mixed(folders, {"upper": ["liver"]}) / "dataset.json")
    assert {"upper_A1", "abdomen_a1"} <= set(described["supervision"])


# ---- the command ----------------------------------------------------------------------------------------------------

def test_the_command_shows_what_it_would_do_writes_and_overwrites(folders, nnunet_folders, capsys):
    assert cli.main(arguments(folders, "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert re.search(r"a1 +full: liver +A/images/a1.nii.gz +A/labels/a1.nii.gz", shown)
    assert "labels: background 0, liver 1, kidney 2, spleen 3" in shown and not list((nnunet_folders / "raw").iterdir())
    assert cli.main(arguments(folders)) == 0
    assert cli.main(arguments(folders)) != 0
    assert "is taken" in capsys.readouterr().err
    (folders["abdomen"] / "images" / "a1.nii.gz").unlink()
    (folders["abdomen"] / "labels" / "a1.nii.gz").unlink()
    assert cli.main(arguments(folders, "--overwrite")) == 0
    assert "a1" not in read_json(nnunet_folders / "raw" / "Dataset007_Mixed" / "dataset.json")["supervision"]


@pytest.mark.parametrize("options, message", [
    (["--classes", "liver"], "comes after the --source"),
    (["--source", "a=b", "--classes", "x", "--classes", "y"], "comes after the --source whose classes these are, once"),
    (["--source", "folder"], "give NAME=FOLDER"),
    (["--source", "a/b=folder"], "holds a control character or one of")])
def test_sources_that_are_written_wrongly(options, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["mix", "--id", "7", *options])
    assert message in capsys.readouterr().err


# ---- bad input ------------------------------------------------------------------------------------------------------

def test_values_that_no_class_has_are_told_for_all_sources_at_once(folders, nnunet_folders):
    with pytest.raises(InputError) as error:
        mixed(folders, {"renal": ["kidney"], "abdomen": ["liver=5"]})
    text = str(error.value)
    assert "2 labels hold the value 2; a full label may hold 0, 1." in text
    assert "name it: --classes ... NAME=2. If it is a class that you do not need, it can be background: " \
           "background=0,2." in text
    assert "3 labels hold the value 1; a full label may hold 0, 5." in text and "--classes of abdomen: ignore=" in text
    assert not list((nnunet_folders / "raw").iterdir())


@pytest.mark.parametrize("classes, message", [
    (["liver=1", "tumour=1"], "--classes of one: 1 means liver and tumour; give each value one meaning"),
    (["liver=0"], "0 means liver and background"), (["liver", "liver"], "give names, each once"),
    (["liver="], "give names, each once"), (["background=0"], "names no class"), ([], "names no class"),
    (["liver", "ignore=1,2"], "ignore takes one whole number, got 1, 2"),
    (["liver", "ignore=1"], "1 means liver and ignore"),
    (["liver=Leber", "spleen=leber"], "leber means liver and spleen"),
    (["liver,spleen"], "--classes of one: names are separated by spaces, not by commas; give liver spleen"),
    (None, "dataset.json: there is no such file; name the classes: --source one=")])
def test_classes_that_contradict_each_other(tmp_path, classes, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        labels_of_sources([NamedFolder("one", tmp_path, classes), NamedFolder("two", tmp_path, ["x=1", "y=1"])])
    assert "--classes of two: 1 means x and y" in str(error.value), "all that is wrong is told"


@pytest.mark.parametrize("content, message", [
    ('{"labels": {"background": 0, "whole": [1, 2]}}', 'are regions, which need "regions_class_order"'),
    ('{"labels": {"background": 0, "whole": [1, 2]}, "regions_class_order": [1, 2]}', "a list of one value for each"),
    ('{"labels": {"background": 0, "liver": "one"}}', '"labels" must be names and values'),
    ("{}", "dataset.json: has no labels; name the classes"),
    ('{"labels": {"background": 0}}', "names no class; at least one besides the background"),
    ('{"labels": {"liver": 0, "background": 1}}', '"background" must be 0'),
    ('{"labels": {"background": 0, "liver": 1}, "annotated_classes": {"a": ["liver"]}}', "make a source of each list")])
def test_descriptions_that_do_not_fit(tmp_path, content, message):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(InputError, match=message):
        labels_of_sources([NamedFolder("one", tmp_path)])


def test_wrong_combinations_of_options(folders, nnunet_folders, tmp_path):
    with pytest.raises(InputError, match="--labels, --ignore-value and --background-value are those of all sources"):
        mixed(folders, ignore_value=3)
    with pytest.raises(InputError, match="only --unlabelled or --images goes with"):
        mixed(folders, partial=folders["renal"])
    with pytest.raises(InputError, match="two sources of the name Renal, renal; give each another"):
        mixed(folders | {"Renal": folders["renal"]}, {"Renal": ["liver"]})
    with pytest.raises(InputError, match="no such folder"):
        mixed(folders | {"more": tmp_path / "none"}, {"more": ["liver"]})


@pytest.mark.parametrize("classes, message", [
    (["whole=1", "tumour=2"], "--classes of flair: tumour is no region of {}/dataset.json, which has whole, core, act"),
    (["whole", "core"], "--classes of flair: 2 belongs to core and not to whole; no value in {}/dataset.json does"),
    (["whole=Lesion"], "'Lesion' names a segment, but the labels are regions, which have values only"),
    (["whole=1,2", "core=2", "ignore=2"], "--classes of flair: 2 means ignore and regions"),
    (["whole=0"], "0 means background and regions")])
def test_regions_that_contradict_each_other(tmp_path, classes, message):
    full = region_source(tmp_path / "full", ["f1"])
    with pytest.raises(InputError, match=re.escape(message.format(full))):
        labels_of_sources([NamedFolder("full", full), NamedFolder("flair", tmp_path, classes)])


def test_an_ignore_value_that_no_label_holds(folders, nnunet_folders):
    with pytest.raises(InputError, match="no label holds the value 4, which is said to mark what is not annotated"):
        mixed(folders, {"renal": ["kidney", "spleen", "ignore=4"]})
    with pytest.raises(InputError, match="ignore=VALUE in --classes of renal is missing"):
        mixed(folders, {"renal": ["kidney", "spleen", "ignore"]})


@pytest.mark.parametrize("one, other, asked", [
    ("posterior", "posteriro", True), ("lung", "lungs", True), ("Liver", "liver", True), ("kidney", "kiddney", True),
    ("rib_12", "rib_21", False), ("rib_1", "rib_11", False), ("kidney_left", "kidney_right", False),
    ("RV", "LV", False), ("liver", "spleen", False)])
def test_a_mistyped_class_is_asked_for(tmp_path, nnunet_folders, capsys, one, other, asked):
    texts = []
    for name, written in (("first", one), ("second", other)):
        folder = make_source(tmp_path / name, [f"{name}1"], [0, 1])
        texts += ["--source", f"{name}={folder}", "--classes", f"{written}=1"]
    assert cli.main(["mix", *texts, "--id", "7", "--processes", "1", "--dry-run"]) == 0
    assert (f"note: are {one} and {other} one class? Then give both the same name" in capsys.readouterr().out) is asked
