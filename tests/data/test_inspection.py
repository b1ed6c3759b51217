"""What files are, and which command fits them."""
from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from image_files import read_json, read_voxels, write_image

from nnunet_confkd import cli
from nnunet_confkd.data.groups import Group, grouped_files, units_below
from nnunet_confkd.data.inspection import checked, command_text, description, free_id, inspect, propose
from nnunet_confkd.data.measures import (
    EMPTY,
    IMAGE,
    MASK,
    SCRIBBLES,
    UNREADABLE,
    Measure,
    measured,
    tell_scribbles_from_masks,
)
from nnunet_confkd.errors import InputError

SHAPE = (5, 32, 32)


def _image(file: Path, seed=0, low=0.0):
    voxels = np.random.default_rng(seed).normal(100, 30, SHAPE).astype(np.int16)
    voxels[0, 0, 0] = low
    return write_image(file, voxels)


def _mask(file: Path, organ=1, background=0, size=12):
    label = np.full(SHAPE, background, np.uint8)
    label[1:4, 4:4 + size, 4:4 + size] = organ
    return write_image(file, label)


def _scribbles(file: Path, rest=0, organ=1, background=2):
    label = np.full(SHAPE, rest, np.uint8)
    label[1:4, 8, 5:15] = organ
    label[1:4, 22, 2:20] = background
    return write_image(file, label)


def _kinds(*files):
    measures = {file: measured(file) for file in files}
    tell_scribbles_from_masks(measures)
    return [measure.kind for measure in measures.values()]


# ---- kinds -----------------------------------------------------------------------------------------------------------

def test_images_masks_scribbles_and_empty_labels_are_told_apart(tmp_path):
    damaged = tmp_path / "x.nii.gz"
    damaged.write_bytes(b"x")
    assert _kinds(_image(tmp_path / "i.nii.gz"), _mask(tmp_path / "m.nii.gz"), _scribbles(tmp_path / "s.nii.gz"),
                  write_image(tmp_path / "e.nii.gz", np.zeros(SHAPE, np.uint8)), damaged) == [
        IMAGE, MASK, SCRIBBLES, EMPTY, UNREADABLE]


def test_a_value_that_marks_what_is_not_annotated_tells_scribbles_of_any_thickness(tmp_path):
    thick = np.full(SHAPE, 255, np.uint8)
    thick[1:4, 2:9, 2:9], thick[1:4, 15:20] = 1, 0
    assert _kinds(_mask(tmp_path / "m.nii.gz"), write_image(tmp_path / "s.nii.gz", thick)) == [MASK, SCRIBBLES]


def test_a_large_organ_is_no_such_value(tmp_path):
    large, small = _mask(tmp_path / "a.nii.gz"), _mask(tmp_path / "b.nii.gz")
    label = read_voxels(large)
    label[...] = 1
    label[:, :2] = 0
    write_image(large, label)
    assert _kinds(large, small) == [MASK, MASK]


def test_every_third_slice_is_a_partial_label(tmp_path):
    label = np.zeros((10, 24, 24), np.uint8)
    label[1::3, 4:16, 4:16] = 1
    assert _kinds(write_image(tmp_path / "m.nii.gz", label)) == [SCRIBBLES]


def test_the_masks_of_a_small_organ_are_compared_with_those_of_the_same_organ(tmp_path):
    """The other masks have a large, solid organ, too; beside it the small one looks like scribbles."""
    files = []
    for number in range(4):
        label = np.zeros(SHAPE, np.uint8)
        label[1:4, 20:24, 2:26] = 2
        if number < 2:
            label[:, 1:15, 1:29] = 1
        files.append(write_image(tmp_path / f"{number}.nii.gz", label))
    assert _kinds(*files) == [MASK] * 4


def test_a_mask_of_another_value_is_no_scribble_file(tmp_path, nnunet_folders, capsys):
    files = [_mask(tmp_path / "masks" / f"p{number}.nii.gz", organ) for number, organ in enumerate((1, 1, 1, 255))]
    assert _kinds(*files) == [MASK] * 4
    assert _kinds(*files, _scribbles(tmp_path / "s.nii.gz", organ=7, background=8)) == [MASK] * 4 + [SCRIBBLES]
    for number in range(4):
        _image(tmp_path / "images" / f"p{number}.nii.gz", number)
    assert cli.main(["inspect", str(tmp_path / "images"), str(tmp_path / "masks"), "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "note: each mask holds a single one of the values 1,255. If they mean the same class" in out
    command = ["mix", "--images", str(tmp_path / "images"), "--source", f"masks={tmp_path / 'masks'}", "--classes",
               "heart=1,255", "--id", "7", "--processes", "1"]  # as it advises
    assert cli.main(command) == 0
    labels = (nnunet_folders / "raw" / "Dataset007_Mixed" / "labelsTr").iterdir()
    assert [np.unique(read_voxels(label)).tolist() for label in labels] == [[0, 1]] * 4


def test_scribbles_alone_are_told_by_their_thickness(tmp_path):
    assert _kinds(_scribbles(tmp_path / "a.nii.gz"), _scribbles(tmp_path / "b.nii.gz")) == [SCRIBBLES, SCRIBBLES]


def test_a_picture_of_few_grey_values_is_an_image(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 20, SHAPE).astype(np.uint8)
    assert _kinds(write_image(tmp_path / "i.nii.gz", voxels)) == [IMAGE]


@pytest.mark.parametrize("others, noise", [(1, 0), (2, 0), (2, 1)])
def test_a_label_with_values_that_are_no_integers_is_no_image(tmp_path, nnunet_folders, capsys, others, noise):
    _folders(tmp_path)
    folder = tmp_path / "scribbles"
    broken = sorted(folder.iterdir())[0]
    if others == 2:
        _scribbles(folder / "p4.nii.gz")
    label = read_voxels(broken).astype(np.float32)
    label[label == 1] = 0.9999
    label += noise * np.random.default_rng(0).random(SHAPE, np.float32)  # more values than a label may have
    write_image(broken, label)
    assert cli.main(["inspect", str(tmp_path), "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{folder}: 1 unusable label, {others} scribble-like" in out
    assert f"{broken}: is a label with values that are no integers, such as 0." in out
    assert f"would stop, because of values that are no integers in {broken}" in out
    assert f"--images {tmp_path / 'images'} \\\n" in out


def test_an_image_beside_a_label_of_the_same_naming_stays_an_image(tmp_path):
    write_image(tmp_path / "image.nii.gz", np.random.default_rng(0).random(SHAPE, np.float32))
    _mask(tmp_path / "mask.nii.gz")
    (group,) = inspect([tmp_path], 1)
    assert [measure.kind for measure in group.files.values()] == [IMAGE, MASK]


def test_a_label_of_many_classes_is_no_image(tmp_path):
    label = np.repeat(np.arange(24, dtype=np.uint8), 24 * 24).reshape(24, 24, 24)
    assert _kinds(write_image(tmp_path / "m.nii.gz", label)) == [MASK]


# ---- groups ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("names, places", [
    (["images/p1.nii.gz", "images/p2.nii.gz", "labels/p1.nii.gz"], ["images", "labels"]),
    (["p1.nii.gz", "p2.nii.gz", "p1_seg.nii.gz", "p2_scribble.nii.gz"],
     ["{case}.nii.gz", "{case}_scribble.nii.gz", "{case}_seg.nii.gz"]),
    (["p1/T1.nii.gz", "p1/seg.nii.gz", "p2/T1.nii.gz", "p3/T1.nii.gz"], ["{case}/T1.nii.gz", "{case}/seg.nii.gz"]),
    (["p1/p1_T1.nii.gz", "p2/p2_T1.nii.gz"], ["{case}/{case}_T1.nii.gz"]),
    (["p1/day1/T1.nii.gz", "p2/day1/T1.nii.gz"], ["{case}/day1/T1.nii.gz"]),
    (["p1_0000.nii.gz", "p1_0001.nii.gz", "p1_seg.nii.gz"], ["{case}_*.nii.gz", "{case}_seg.nii.gz"]),
    (["a.nii.gz", "mask_a.nii.gz", "s_seg.nii.gz"], ["{case}.nii.gz", "mask_{case}.nii.gz", "{case}_seg.nii.gz"])])
def test_files_are_grouped_by_place_and_naming(tmp_path, names, places):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [group.place for group in grouped_files(tmp_path, units_below(tmp_path))]
    assert sorted(found) == sorted(f"{tmp_path}/{place}" for place in places)


# ---- the command -----------------------------------------------------------------------------------------------------

def _folders(tmp_path, scribbles=_scribbles, mask=_mask, low=0.0, **options):
    for number in range(5):
        _image(tmp_path / "images" / f"p{number}.nii.gz", number, low)
    for number in range(2):
        mask(tmp_path / "masks" / f"p{number}_seg.nii.gz")
    for number in range(2, 4):
        scribbles(tmp_path / "scribbles" / f"p{number}.nii.gz", **options)
    return propose(inspect([tmp_path / "images", tmp_path / "masks", tmp_path / "scribbles"], 1))


def _options(words):
    """{option: its values}."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return found


@pytest.mark.parametrize("values, expected", [
    ({}, {"--labels": ["background", "class_1"], "--ignore-value": ["0"], "--background-value": ["2"]}),
    ({"rest": 255, "background": 0}, {"--labels": ["background", "class_1"], "--ignore-value": ["255"]}),
    ({"rest": 0, "background": 1}, {"--labels": ["background", "class_1"], "--ignore-value": ["0"]})])
def test_the_values_of_scribbles_are_recognised(tmp_path, values, expected):
    options = _options(_folders(tmp_path, **values).words)
    places = {"--images": "images", "--full-labels": "masks", "--partial-labels": "scribbles"}
    assert options == {option: [f"{tmp_path}/{place}"] for option, place in places.items()} | expected


def test_values_of_ones_own_are_named(tmp_path):
    proposal = _folders(tmp_path, mask=lambda file: _mask(file, organ=100), organ=100, background=7)
    options = _options(proposal.words)
    assert options["--labels"] == ["background=0", "class_100=100"] and options["--background-value"] == ["7"]


def test_hounsfield_units_are_recognised(tmp_path):
    assert _options(_folders(tmp_path, low=-1000).words)["--channels"] == ["CT"]


def test_what_cannot_be_told_is_asked(tmp_path):
    def scribbles(file):
        label = read_voxels(_scribbles(file))
        label[1:4, 20, 2:20] = 3
        write_image(file, label)

    proposal = _folders(tmp_path, scribbles=scribbles)
    assert _options(proposal.words)["--background-value"] == ["?"]
    assert any("which of 2, 3 marks scribbles in the background?" in note for note in proposal.notes)


def test_without_a_complete_mask_there_is_no_command(tmp_path):
    proposal = _folders(tmp_path, mask=_scribbles)
    assert not proposal.words and "no label looks like a complete mask" in proposal.notes[0]


def test_a_label_on_another_grid_is_told_and_resampled(tmp_path, nnunet_folders, capsys):
    _folders(tmp_path)
    mask = tmp_path / "masks" / "p0_seg.nii.gz"
    label = read_voxels(mask)
    write_image(mask, label.repeat(2, axis=0), spacing=(1, 1, 0.5), origin=(0, 0, -0.25))
    folders = [f"{tmp_path}/{name}" for name in ("images", "masks", "scribbles")]
    assert cli.main(["inspect", *folders, "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "note: labels on another grid than their image: 1 (" in out and "--resample-labels" in out
    words = shlex.split(out[out.index("confkd mix"):].replace("\\\n", " "))
    assert cli.main([*words[1:], "--processes", "1"]) == 0
    assert np.array_equal(read_voxels(nnunet_folders / "raw" / "Dataset100_Mixed" / "labelsTr" / "p0.nii.gz"), label)


def test_a_label_whose_header_was_lost_is_not_resampled(tmp_path, nnunet_folders, capsys):
    for name in ("p0", "p1"):
        write_image(tmp_path / "images" / f"{name}.nii.gz", np.random.default_rng(0).normal(size=(6, 7, 8)),
                    spacing=(1, 1, 2), origin=(5, 6, 7))
        label = np.zeros((6, 7, 8), np.uint8)
        label[2:4, 2:4, 2:4] = 1
        write_image(tmp_path / "masks" / f"{name}.nii.gz", label, spacing=(1, 1, 1), origin=(0, 0, 0))
    assert cli.main(["inspect", f"{tmp_path}/images", f"{tmp_path}/masks", "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "header was probably lost" in out and "CopyInformation" in out and "would stop" in out
    assert "--resample-labels" not in out


def test_labels_without_a_header_are_not_resampled_beside_others_that_are(tmp_path, nnunet_folders, capsys):
    _folders(tmp_path)
    mask, fine = (tmp_path / "masks" / f"p{number}_seg.nii.gz" for number in (0, 1))
    write_image(fine, read_voxels(fine).repeat(2, axis=0), spacing=(1, 1, 0.5), origin=(0, 0, -0.25))
    image = next((tmp_path / "images").glob("p0*"))
    write_image(image, read_voxels(image), spacing=(1, 1, 2), origin=(5, 6, 7))
    folders = [f"{tmp_path}/{name}" for name in ("images", "masks", "scribbles")]
    cli.main(["inspect", *folders, "--processes", "1"])
    out = capsys.readouterr().out
    assert f"without a place: 1 ({mask})" in out and "--resample-labels" not in out


def test_folders_with_one_file_for_each_class_are_recognised(tmp_path, nnunet_folders, capsys):
    for number in range(3):
        _image(tmp_path / f"s{number}" / "ct.nii.gz", number, -1000)
        for name, organ in (("liver", 1), ("spleen", 1)):
            if number < 2:
                file = tmp_path / f"s{number}" / "segmentations" / f"{name}.nii.gz"
                _mask(file, organ)
                if name == "spleen":
                    write_image(file, read_voxels(file)[:, ::-1].copy() * (read_voxels(file) == 0))
    assert cli.main(["inspect", str(tmp_path), "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "--full-labels '" in out and "{case}/segmentations" in out and "--labels background liver spleen" in out
    words = shlex.split(out[out.index("confkd mix"):].replace("\\\n", " "))
    assert cli.main([*words[1:], "--processes", "1"]) == 0
    target = nnunet_folders / "raw" / "Dataset100_Mixed"
    assert read_json(target / "dataset.json")["labels"] == {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    assert set(np.unique(read_voxels(target / "labelsTr" / "s0.nii.gz"))) == {0, 1, 2}


def test_a_command_that_would_stop_is_told_with_the_reason(tmp_path, nnunet_folders, capsys):
    _folders(tmp_path)
    _mask(tmp_path / "masks" / "p0-label.nii.gz")
    assert cli.main(["inspect", str(tmp_path), "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "This command comes near, but would stop, because of:\n" in out and "two labels belong to it" in out


def test_patients_of_several_cases_are_noted(tmp_path, capsys):
    for name in ("p1_ED", "p1_ES", "p2_ED"):
        _image(tmp_path / "images" / f"{name}.nii.gz")
        _mask(tmp_path / "masks" / f"{name}.nii.gz")
    assert cli.main(["inspect", f"{tmp_path}/images", f"{tmp_path}/masks", "--processes", "1"]) == 0
    assert "3 cases have 2 beginnings, such as p1_" in capsys.readouterr().out


def test_the_variables_that_are_not_set_are_part_of_the_command(tmp_path, capsys, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    for name in ("p1", "p2"):
        _image(tmp_path / "images" / f"{name}.nii.gz")
        _mask(tmp_path / "masks" / f"{name}.nii.gz")
    assert cli.main(["inspect", f"{tmp_path}/images", f"{tmp_path}/masks", "--processes", "1"]) == 0
    assert 'export nnUNet_raw="$PWD/nnUNet_raw" nnUNet_results="$PWD/nnUNet_results"\nconfkd mix' in (
        capsys.readouterr().out)


def test_a_free_id_is_proposed(nnunet_folders):
    (nnunet_folders / "raw" / "Dataset100_A").mkdir()
    (nnunet_folders / "results" / "Dataset101_B").mkdir()
    assert free_id() == 102


def test_blanks_in_names_are_quoted():
    assert command_text(["--images", "my data", "--id", "7"]) == "confkd mix \\\n    --images 'my data' \\\n    --id 7"


@pytest.mark.parametrize("name, text", [("nothing", "nothing: there is no such folder"),
                                        ("empty", "empty: holds no images or labels")])
def test_what_is_not_there(tmp_path, name, text):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=text):
        inspect([tmp_path / name], 1)


def test_the_most_frequent_value_of_segments_is_nothing():
    assert Measure(MASK, voxels={"liver": 3, 0: 2}, named=True).drawn == {"liver": 3}


@pytest.mark.parametrize("masks, labels, background", [
    (Measure(MASK, voxels={0: 90, 1: 5, 2: 5}), ["background", "?", "?"], "5"),
    (Measure(MASK, voxels={0: 90, "liver": 5, "tumour": 5}, named=True), ["background"], "?")], ids=["values", "names"])
def test_segments_beside_values_are_told_to_be_the_same_classes(tmp_path, masks, labels, background):
    """The values 1 and 2 are the segments liver and tumour, 5 marks scribbles in the background, 0 nothing."""
    found = {"images": {"a": Measure(IMAGE)}, "masks": {"a": masks}, "scribbles": {
        "b": Measure(SCRIBBLES, voxels={0: 90, 1: 1, 2: 1, 5: 1}),
        "c": Measure(SCRIBBLES, voxels={0: 90, "liver": 1, "tumour": 1, "Background": 1}, named=True)}}
    groups = [Group(tmp_path / name, "{case}", True, {tmp_path / name / file: measure for file, measure in of.items()})
              for name, of in found.items()]
    proposal = propose(groups)
    options = _options(proposal.words)
    assert options["--labels"] == labels and options["--ignore-value"] == ["0"]
    assert options["--background-value"] == [background]
    assert proposal.notes[-1].startswith("some labels have the segments liver, tumour, and others have values. Name")
    assert checked(proposal.words, groups, 1) == (proposal.words, [], [])  # it is not tried with question marks


@pytest.mark.parametrize("kind, count, text", [
    ("image", 1, "1 image"), ("image", 2, "2 images"), ("mask-like", 4, "4 mask-like labels"),
    ("empty", 1, "1 empty label"), ("unreadable", 3, "3 unreadable files")])
def test_files_are_counted_in_whole_words(tmp_path, kind, count, text):
    measure = Measure(kind=kind)
    group = Group(tmp_path, "{case}", True, {tmp_path / str(i): measure for i in range(count)})
    assert description(group).splitlines()[0] == f"{group.place}: {text}"
