from __future__ import annotations

import json
import os
from functools import partial
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from image_files import file_states, read_voxels
from nnunet_confkd.dataset_conversion import msd

from nnunet_confkd.cli import main

NAMES = [f"prostate_{k:02d}" for k in (0, 1, 2, 4, 6, 7, 10, 13, 14, 16)]
TESTS = ["prostate_03", "prostate_05"]
# for nnU-Net's processes, which take seconds to start
THREADS = SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=ThreadPool))


def _write(file, array, spacing=(0.6, 0.7, 3.5), origin=(-11.0, 5.0, 20.5)):
    """array: (Z, Y, X), or (channels, Z, Y, X) for a 4-D file; an oblique direction, in whole cosines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    volumes = [sitk.GetImageFromArray(channel) for channel in (array if array.ndim == 4 else [array])]
    for volume in volumes:
        volume.SetSpacing(spacing)
        volume.SetOrigin(origin)
        volume.SetDirection((-1, 0, 0, 0, 0, 1, 0, 1, 0))
    sitk.WriteImage(sitk.JoinSeries(volumes) if array.ndim == 4 else volumes[0], str(file))


def _task(folder, modality):
    """A task as published: ./-paths in dataset.json, and what macOS leaves behind."""
    rng = np.random.default_rng(0)
    shape = (3, 5, 4) if len(modality) == 1 else (len(modality), 3, 5, 4)
    for name in NAMES + TESTS:
        split = "imagesTs" if name in TESTS else "imagesTr"
        _write(folder / split / f"{name}.nii.gz", rng.normal(size=shape).astype(np.float32))
        if split == "imagesTr":
            _write(folder / "labelsTr" / f"{name}.nii.gz", rng.integers(0, 3, (3, 5, 4)).astype(np.uint8))
    for split in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / split / f"._{NAMES[0]}.nii.gz").write_bytes(b"\0\5\26\7")
        (folder / split / ".DS_Store").write_bytes(b"Bud1")
    (folder / "._dataset.json").write_bytes(b"\0\5\26\7")
    _describe(
        folder,
        name="PROSTATE",
        description="Prostate",
        reference="Radboud",
        licence="CC-BY-SA 4.0",
        release="1.0",
        tensorImageSize="4D",
        modality=modality,
        labels={"0": "background", "1": "PZ", "2": "TZ"},
        numTraining=len(NAMES),
        numTest=len(TESTS),
        test=[f"./imagesTs/{name}.nii.gz" for name in TESTS],
        training=[{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in NAMES],
    )
    return folder


def _describe(folder, **entries):
    file = folder / "dataset.json"
    described = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(described | entries))


def _entry(name, **other):
    return {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} | other


@pytest.fixture
def task3d(tmp_path):
    return _task(tmp_path / "Task05_Prostate", {"0": "CT"})


@pytest.fixture
def task4d(tmp_path):
    return _task(tmp_path / "Task05_Prostate", {"0": "T2", "1": "ADC"})


@pytest.fixture
def refused(refusal):
    return partial(refusal, msd.convert)


# ---- what is written ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dimensions", [3, 4])
def test_a_proper_task_becomes_what_nnunets_own_converter_makes_of_it(request, nnunet_folders, monkeypatch, dimensions):
    from nnunetv2.dataset_conversion import convert_MSD_dataset
    source = request.getfixturevalue(f"task{dimensions}d")
    monkeypatch.setattr(convert_MSD_dataset, "multiprocessing", THREADS)
    before = file_states(source)
    ours = msd.convert(source, 5, processes=1)
    convert_MSD_dataset.convert_msd_dataset(str(source), 6, 1)
    theirs = nnunet_folders / "raw" / "Dataset006_Prostate"

    assert ours == nnunet_folders / "raw" / "Dataset005_Prostate" and file_states(source) == before
    files = {f.relative_to(theirs).as_posix() for f in theirs.rglob("*") if f.is_file()}
    assert {f.relative_to(ours).as_posix() for f in ours.rglob("*") if f.is_file()} == files
    # 10 training cases with a label, 2 test cases, and dataset.json
    assert len(files) == (10 + 2) * (dimensions - 2) + 10 + 1
    for name in sorted(files - {"dataset.json"}):
        if dimensions == 3 or name.startswith("labels"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()
        image, other = sitk.ReadImage(str(ours / name)), sitk.ReadImage(str(theirs / name))
        assert image.GetPixelID() == other.GetPixelID()
        assert np.array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(other))
        for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(image, get)() == getattr(other, get)()
    described, stock = (json.loads((folder / "dataset.json").read_text()) for folder in (ours, theirs))
    for key in ("labels", "channel_names", "file_ending", "numTraining"):
        assert described[key] == stock[key]


def test_the_channels_of_a_file_become_files_in_their_order(task4d, nnunet_folders):
    folder = msd.convert(task4d, 5, processes=1)
    for split, names in (("Tr", NAMES), ("Ts", TESTS)):
        for name in names:
            channels = read_voxels(task4d / f"images{split}" / f"{name}.nii.gz")
            assert channels.shape == (2, 3, 5, 4)
            for k in range(2):
                assert np.array_equal(read_voxels(folder / f"images{split}" / f"{name}_000{k}.nii.gz"), channels[k])


def test_dataset_json_and_the_split(task4d, nnunet_folders, crossvalidation):
    folder = msd.convert(task4d, 5, processes=1)
    assert json.loads((folder / "dataset.json").read_text()) == {
        "channel_names": {"0": "T2", "1": "ADC"}, "labels": {"background": 0, "PZ": 1, "TZ": 2}, "numTraining": 10,
        "file_ending": ".nii.gz", "name": "Prostate", "licence": "CC-BY-SA 4.0", "reference": "Radboud",
        "supervision": dict.fromkeys(NAMES, "full")}
    assert [len(fold["val"]) for fold in crossvalidation(folder.name)] == [2] * 5


@pytest.mark.parametrize("dimensions", [3, 4])
def test_nnunet_finds_nothing_wrong(request, nnunet_folders, require_integrity, dimensions):
    folder = msd.convert(request.getfixturevalue(f"task{dimensions}d"), 5, processes=1)
    require_integrity(folder)


def test_without_dataset_json_the_options_name_labels_and_channels(task3d, nnunet_folders):
    (task3d / "dataset.json").unlink()
    folder = msd.convert(task3d, 5, labels=["background", "zone", "core"], channels=["MRI"], processes=1)
    described = json.loads((folder / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "zone": 1, "core": 2} and described["channel_names"] == {"0": "MRI"}
    assert described["licence"] == "CC BY-SA 4.0" and "s41467-022-30695-9" in described["reference"]
    assert sorted(described["supervision"]) == NAMES


def test_of_more_than_nine_channels_the_order_is_that_of_the_numbers(tmp_path, nnunet_folders):
    modality = {str(k): f"M{k}" for k in range(11)}
    folder = msd.convert(
        _task(tmp_path / "Task11_Many", dict(sorted(modality.items()))), 5, processes=1
    )  # 0, 1, 10, 2, ...
    assert json.loads((folder / "dataset.json").read_text())["channel_names"] == modality


@pytest.mark.parametrize("folder, name, expected", [
    ("Task05_Prostate", None, "Dataset005_Prostate"), ("Task05_My_zones!", None, "Dataset005_My_zones"),
    ("here", None, "Dataset005_PROSTATE"), ("here", "Own", "Dataset005_Own")])
def test_its_name_is_the_tasks_unless_given(task3d, tmp_path, nnunet_folders, folder, name, expected):
    source = task3d.rename(tmp_path / folder)
    assert msd.convert(source, 5, name=name, processes=1).name == expected


def test_imagests_may_be_absent_and_a_link_within_the_folder_is_followed(task3d, nnunet_folders):
    for file in (task3d / "imagesTs").iterdir():
        file.unlink()
    (task3d / "imagesTs").rmdir()
    image = task3d / "imagesTr" / f"{NAMES[0]}.nii.gz"
    (task3d / "elsewhere").mkdir()
    image.rename(task3d / "elsewhere" / "image.nii.gz")
    image.symlink_to(task3d / "elsewhere" / "image.nii.gz")
    folder = msd.convert(task3d, 5, processes=1)
    assert sorted(os.listdir(folder)) == ["dataset.json", "imagesTr", "labelsTr"]
    written = folder / "imagesTr" / f"{NAMES[0]}_0000.nii.gz"
    assert not written.is_symlink() and written.read_bytes() == image.read_bytes()


def test_the_command_converts_and_names_what_is_wrong(task3d, nnunet_folders, capsys):
    (task3d / "dataset.json").unlink()
    command = ["convert", "msd", "--source", str(task3d), "--id", "5", "--processes", "1"]
    assert main(command) == 1
    assert capsys.readouterr().err == (f"confkd convert: {task3d / 'dataset.json'}: is missing; name the labels and "
                                       "the channels: --labels background NAME ... --channels MRI\n")
    assert main([*command, "--labels", "background", "PZ", "TZ", "--channels", "CT", "--name", "Zones"]) == 0
    assert "Dataset005_Zones: 10 training cases (10 full, 0 partial, 0 unlabelled)\n5 folds" in capsys.readouterr().out


# ---- the real files -------------------------------------------------------------------------------------------------

def test_real_hippocampus(test_data, nnunet_folders, crossvalidation):
    source = test_data / "hippocampus"
    before = file_states(source)
    folder = msd.convert(
        source, 4, labels=["background", "anterior", "posterior"], channels=["MRI"], name="Hippocampus", processes=1
    )
    assert file_states(source) == before and folder.name == "Dataset004_Hippocampus"
    names = sorted(f.name for f in (source / "labelsTr").glob("hippocampus_*.nii.gz"))
    assert len(names) == 200 and sorted(os.listdir(folder / "labelsTr")) == names
    changed = []
    for name in names:
        image = folder / "imagesTr" / name.replace(".nii.gz", "_0000.nii.gz")
        assert image.read_bytes() == (source / "imagesTr" / name).read_bytes()
        if (folder / "labelsTr" / name).read_bytes() != (source / "labelsTr" / name).read_bytes():
            changed.append(name)
            published, written = read_voxels(source / "labelsTr" / name), read_voxels(folder / "labelsTr" / name)
            assert published.dtype.kind == "f" and written.dtype == np.uint8 and np.array_equal(published, written)
    assert changed == ["hippocampus_243.nii.gz"]  # the one that is published in floats
    assert [len(fold["val"]) for fold in crossvalidation(folder.name)] == [40] * 5


# ---- bad input ------------------------------------------------------------------------------------------------------

def test_a_folder_that_is_no_task_is_refused(refused, tmp_path):
    (tmp_path / "labelled" / "imagesTr").mkdir(parents=True)
    assert refused(tmp_path / "none") == (f"{tmp_path / 'none'}: has no folder imagesTr and no folder labelsTr; give "
                                          f"the folder of one task, e.g. Task04_Hippocampus")
    assert "has no folder labelsTr;" in refused(tmp_path / "labelled")
    (tmp_path / "labelled" / "labelsTr").mkdir()
    assert refused(tmp_path / "labelled", labels=["background", "a"], channels=["CT"]) == (
        f"{tmp_path / 'labelled' / 'imagesTr'}: holds no images (.nii.gz)")


@pytest.mark.parametrize("options", [{}, {"labels": ["background", "a"]}, {"channels": ["CT"]}])
def test_without_dataset_json_both_options_are_needed(refused, task3d, options):
    (task3d / "dataset.json").unlink()
    assert refused(task3d, **options).startswith(f"{task3d / 'dataset.json'}: is missing; name the labels and the "
                                                 f"channels")


@pytest.mark.parametrize("labels", [["liver", "tumour"], ["background", "a", "a"], ["background"]])
def test_label_names_that_nnunet_does_not_take_are_refused(refused, task3d, labels):
    (task3d / "dataset.json").unlink()
    text = refused(task3d, labels=labels, channels=["CT"])
    assert text.startswith("--labels: the labels must be 0, 1, 2, ...") and text.endswith(
        f"not {dict(enumerate(labels))}"
    )


def test_the_options_do_not_overrule_dataset_json(refused, task3d):
    assert refused(task3d, labels=["background", "a", "b"], channels=["CT"]) == (
        f"{task3d / 'dataset.json'}: names the labels and the channels; leave out --labels and --channels, or correct "
        f"the file")


@pytest.mark.parametrize("content, text", [
    ("{\"labels\": ", "is no JSON file; fetch it anew"), ("\u00e4", "is no JSON file; fetch it anew"),
    ("[]", "is no description of a task"), ("{}", "is no description of a task"),
    ('{"labels": ["background", "a"], "modality": {"0": "CT"}}', "is no description of a task"),
    ('{"labels": {"zero": "background"}, "modality": {"0": "CT"}}', "is no description of a task"),
    ('{"labels": {"0": "background", "1": "a"}, "modality": {"0": "CT"}, "training": null}', "is no description of a "
                                                                                             "task"),
    ('{"labels": {"0": "background", "2": "a"}, "modality": {"0": "CT"}}', "the labels must be 0, 1, 2, ..."),
    ('{"labels": {"0": "background", "1": "a", "2": "a"}, "modality": {"0": "CT"}}', "the labels must be 0, 1, 2, ..."),
    ('{"labels": {"0": "a", "1": "background"}, "modality": {"0": "CT"}}', "the labels must be 0, 1, 2, ..."),
    ('{"labels": {"0": "background", "1": "a"}, "modality": {"1": "CT"}}', "the modalities must be numbered 0, 1, ..."),
    ('{"labels": {"0": "background", "1": "a"}, "modality": {}}', "the modalities must be numbered 0, 1, ...")])
def test_a_broken_dataset_json_is_named(refused, task3d, content, text):
    (task3d / "dataset.json").write_bytes(content.encode("latin-1"))
    assert refused(task3d).startswith(f"{task3d / 'dataset.json'}: {text}")


def test_listed_paths_that_leave_the_folder_are_never_followed(refused, task3d, tmp_path):
    outside = tmp_path / "secret.nii.gz"
    _write(outside, np.zeros((3, 5, 4), np.uint8))
    link = task3d / "labelsTr" / f"{NAMES[2]}.nii.gz"
    link.unlink()
    link.symlink_to(outside)
    _describe(task3d, training=[_entry(NAMES[0], image=str(outside)), _entry(NAMES[1], label="./../secret.nii.gz"),
                                _entry(NAMES[2]), *map(_entry, NAMES[3:])])
    text = refused(task3d)
    file = task3d / "dataset.json"
    assert f"{file}: lists {outside}, which lies outside of the folder" in text
    assert f"{file}: lists {task3d / '..' / 'secret.nii.gz'}, which lies outside of the folder" in text
    assert f"{file}: lists {link}, which lies outside of the folder" in text
    # their files are not listed then
    assert f"{task3d / 'imagesTr' / NAMES[0]}.nii.gz: is not listed in dataset.json" in text
    assert text.startswith("5 problems; nothing was written:")


def test_files_that_are_listed_but_missing_and_those_that_are_not_listed_are_all_named(refused, task3d):
    (task3d / "imagesTr" / f"{NAMES[0]}.nii.gz").unlink()
    (task3d / "labelsTr" / f"{NAMES[1]}.nii.gz").unlink()
    _describe(task3d, training=[*map(_entry, NAMES[:-1]), "./imagesTr/x.nii.gz", {"image": "./imagesTr/x.nii.gz"},
                                _entry(NAMES[2], image="\0")])
    assert refused(task3d).split("\n  ") == [
        "7 problems; nothing was written:",
        f"{task3d / 'imagesTr' / NAMES[0]}.nii.gz: is listed in dataset.json, but is missing",
        f"{task3d / 'labelsTr' / NAMES[1]}.nii.gz: is listed in dataset.json, but is missing",
        f"{task3d / 'dataset.json'}: the entry './imagesTr/x.nii.gz' of \"training\" has no image and label",
        f"{task3d / 'dataset.json'}: the entry {{'image': './imagesTr/x.nii.gz'}} of \"training\" has no image and "
        f"label",
        f"{task3d / 'dataset.json'}: the entry {_entry(NAMES[2], image=chr(0))!r} of \"training\" has no image and "
        f"label",
        f"{task3d / 'imagesTr' / NAMES[-1]}.nii.gz: is not listed in dataset.json",
        f"{task3d / 'labelsTr' / NAMES[-1]}.nii.gz: is not listed in dataset.json"]


def test_a_case_that_is_listed_twice_is_refused(refused, task3d):
    _describe(task3d, training=[*map(_entry, NAMES), _entry(NAMES[0])])
    assert f"the name of the case, '{NAMES[0]}', is that of" in refused(task3d)


def test_without_a_list_images_and_labels_must_be_pairs(refused, task3d):
    (task3d / "dataset.json").unlink()
    (task3d / "imagesTr" / f"{NAMES[0]}.nii.gz").unlink()
    (task3d / "labelsTr" / f"{NAMES[1]}.nii.gz").unlink()
    assert refused(task3d, labels=["background", "PZ", "TZ"], channels=["CT"]).split("\n  ")[1:] == [
        f"{task3d / 'imagesTr' / NAMES[1]}.nii.gz: has no label in labelsTr",
        f"{task3d / 'labelsTr' / NAMES[0]}.nii.gz: has no image in imagesTr"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("split, name", [("imagesTr", NAMES[3]), ("imagesTs", TESTS[0])])
def test_a_file_of_too_many_or_too_few_channels_is_refused(refused, task4d, channels, split, name):
    file = task4d / split / f"{name}.nii.gz"
    _write(file, np.zeros((channels, 3, 5, 4), np.float32))
    assert refused(task4d) == f"{file}: the case has {channels} channels; 2 are expected (T2, ADC)"


def test_several_channels_where_one_is_expected_are_refused(refused, task3d):
    file = task3d / "imagesTr" / f"{NAMES[3]}.nii.gz"
    _write(file, np.zeros((2, 3, 5, 4), np.float32))
    assert refused(task3d) == f"{file}: the case has 2 channels; 1 are expected (CT)"


def test_a_label_value_that_is_not_described_is_refused(refused, task3d):
    file = task3d / "labelsTr" / f"{NAMES[3]}.nii.gz"
    _write(file, np.full((3, 5, 4), 3, np.uint8))
    assert refused(task3d).startswith(f"{file}: holds the values 3; a full label may hold 0, 1, 2;")
