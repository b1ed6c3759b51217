"""Walks with what people have: inspect prints a command, and this command, as printed, writes the right data set."""
from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import slicerio
from image_files import read_json, read_voxels

from nnunet_confkd import cli
from nnunet_confkd.data.images import quiet

FULL, PARTIAL, ALL = 4, 20, 40  # cases, of which the first ones are fully annotated


@pytest.fixture(scope="module")
def hearts(test_data):
    """The images, masks and experts' scribbles of 40 ACDC cases, cut to the heart, as [(name, image, mask, scribbles)].

    The masks hold 0 and 1, the heart. The scribbles are as a tool writes them whose 0 is *not annotated*: 1 is the
    heart, and 2 is background.
    """
    found = []
    for patient in range(1, 21):
        folder = test_data / "acdc" / "training" / f"patient{patient:03d}"
        for file in sorted(folder.glob("*_gt.nii.gz")):
            name = file.name[:-10]
            scribble = next((test_data / "acdc_scribbles").rglob(f"{name}_scribble.nii.gz"))
            with quiet():
                image, mask, scribbles = (sitk.ReadImage(str(f)) for f in (folder / f"{name}.nii.gz", file, scribble))
            scribbles.CopyInformation(image)
            box = _box(sitk.GetArrayViewFromImage(mask))
            image, mask, scribbles = image[box], mask[box], scribbles[box]
            found.append((name, image, _recoded(mask, {0: 0, 1: 1, 2: 1, 3: 1}),
                          _recoded(scribbles, {0: 2, 1: 1, 2: 1, 3: 1, 4: 0})))
    assert len(found) == ALL
    return found


def _box(mask):
    """Slices in x, y, z that leave 10 voxels around the heart."""
    sides = [np.flatnonzero(mask.any(axis=axes)) for axes in ((0, 1), (0, 2))]
    return (*(slice(max(0, int(side[0]) - 10), int(side[-1]) + 11) for side in sides), slice(None))


def _recoded(image, values):
    voxels = sitk.GetArrayFromImage(image)
    new = sitk.GetImageFromArray(np.vectorize(values.get)(voxels).astype(np.uint8))
    new.CopyInformation(image)
    return new


def _write(image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file), True)


def _run_as_printed(printed: str) -> int:
    command = printed[printed.index("confkd mix"):].replace("\\\n", " ")
    assert "\n" not in command.strip()
    return cli.main(shlex.split(command)[1:] + ["--processes", "1"])


def _require_right(folder: Path, hearts, classes: dict[int, int], ignore: int) -> None:
    """Compare each written label, voxel by voxel, with what it was made of."""
    kinds = read_json(folder / "dataset.json")["supervision"]
    assert len(kinds) == ALL
    for number, (name, image, mask, scribbles) in enumerate(hearts):
        written = read_voxels(folder / "labelsTr" / f"{name}.nii.gz")
        assert np.array_equal(read_voxels(folder / "imagesTr" / f"{name}_0000.nii.gz"), sitk.GetArrayFromImage(image))
        if number < FULL:
            expected, kind = sitk.GetArrayFromImage(mask), "full"
        elif number < FULL + PARTIAL:
            expected, kind = np.vectorize({0: ignore, 1: 1, 2: 0}.get)(sitk.GetArrayFromImage(scribbles)), "partial"
        else:
            expected, kind = np.full(written.shape, ignore), "unlabelled"
        assert kinds[name] == kind and np.array_equal(written, np.vectorize(classes.get)(expected)), name


PLACES = {
    "a folder each": ("images/{}", "masks/{}_seg", "scribbles/{}_scribble"),
    "masks and scribbles together": ("images/{}", "labels/{}_seg", "labels/{}_seg"),
    "one folder": ("data/{}", "data/{}_seg", "data/{}_scribble"),
    "a folder for each case": ("data/{}/cine", "data/{}/seg", "data/{}/scribbles")}


@pytest.mark.parametrize("places", PLACES)
def test_masks_and_scribbles_whose_zero_is_not_annotated(hearts, tmp_path, nnunet_folders, capsys, monkeypatch, places):
    monkeypatch.chdir(tmp_path)
    images, masks, scribbles = PLACES[places]
    for number, (name, image, mask, scribble) in enumerate(hearts):
        _write(image, Path(f"{images.format(name)}.nii.gz"))
        if number < FULL:
            _write(mask, Path(f"{masks.format(name)}.nii.gz"))
        elif number < FULL + PARTIAL:
            _write(scribble, Path(f"{scribbles.format(name)}.nii.gz"))
    folders = sorted(f.name for f in Path().iterdir() if f.name != "nnunet")
    assert cli.main(["inspect", *folders, "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "0 = not annotated" in out and "2 = scribbles in the background" in out
    assert _run_as_printed(out) == 0
    _require_right(nnunet_folders / "raw" / "Dataset100_Mixed", hearts, {0: 0, 1: 1, 2: 2}, 2)


# ---- 3D Slicer -------------------------------------------------------------------------------------------------------

def _write_slicer(image, masks: dict[str, np.ndarray], file: Path, order: int) -> None:
    """Write segments with slicerio. Their order, and so their values, differ from case to case, as in Slicer."""
    names = list(masks)
    names = names[order % len(names):] + names[:order % len(names)]
    voxels = np.zeros(sitk.GetArrayViewFromImage(image).shape, np.uint8)
    for number, name in enumerate(names, 1):
        voxels[masks[name]] = number
    axes = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    place = np.eye(4)
    place[:3, :3], place[:3, 3] = axes, image.GetOrigin()
    file.parent.mkdir(exist_ok=True)
    slicerio.write_segmentation(str(file), {
        "voxels": voxels.T, "ijkToLPS": place,
        "segments": [{"name": name, "labelValue": number} for number, name in enumerate(names, 1)]})


def test_segments_of_slicer_whose_order_differs(hearts, tmp_path, nnunet_folders, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, (name, image, mask, scribbles) in enumerate(hearts):
        _write(image, Path(f"images/{name}.nii.gz"))
        mask, scribbles = sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(scribbles)
        left = np.arange(mask.shape[2]) < mask.shape[2] // 2  # two classes, so that there is an order
        if number < FULL:
            _write_slicer(image, {"Left part": (mask == 1) & left, "right": (mask == 1) & ~left},
                          Path(f"masks/{name}.seg.nrrd"), number)
        elif number < FULL + PARTIAL:
            _write_slicer(image, {"Background": scribbles == 2, "right": (scribbles == 1) & ~left,
                                  "Left part": (scribbles == 1) & left}, Path(f"scribbles/{name}.seg.nrrd"), number)
    assert cli.main(["inspect", "images", "masks", "scribbles", "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "--labels background Left_part=" in out or "--labels background 'Left_part=Left part' right" in out
    assert _run_as_printed(out) == 0
    folder = nnunet_folders / "raw" / "Dataset100_Mixed"
    assert read_json(folder / "dataset.json")["labels"] == {"background": 0, "Left_part": 1, "right": 2, "ignore": 3}
    for number, (name, _, mask, scribbles) in enumerate(hearts[:FULL + PARTIAL]):
        written = read_voxels(folder / "labelsTr" / f"{name}.nii.gz")
        mask, scribbles = sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(scribbles)
        sides = np.where(np.arange(mask.shape[2]) < mask.shape[2] // 2, 1, 2)
        expected = np.where(mask == 1, sides, 0) if number < FULL else np.select(
            [scribbles == 0, scribbles == 2], [3, 0], sides)
        assert np.array_equal(written, expected), name


# ---- folders that are annotated for different classes ----------------------------------------------------------------

@pytest.fixture(scope="module")
def hippocampi(test_data):
    """The images and masks of 12 Hippocampus cases, as [(name, image, mask)]. The masks hold 0, 1 and 2."""
    files = sorted((test_data / "hippocampus" / "labelsTr").glob("*.nii.gz"))[:12]
    return [(file.name[:-7], sitk.ReadImage(str(file.parents[1] / "imagesTr" / file.name)), sitk.ReadImage(str(file)))
            for file in files]


def _by_side(hippocampi):
    """Yield (side, its class, name, image, mask): the first half is the front, class 1, and the rest the back, 2."""
    for number, case in enumerate(hippocampi):
        yield (*(("front", 1) if number < 6 else ("back", 2)), *case)


def _printed(capsys, *folders: str) -> str:
    assert cli.main(["inspect", *folders, "--processes", "1"]) == 0
    return capsys.readouterr().out


def _require_lists(folder: Path, hippocampi, values: dict[str, int]) -> None:
    """Compare each label with what it was made of: the first half has class 1 in it, the second one class 2."""
    described = read_json(folder / "dataset.json")
    assert described["labels"] == {"background": 0, **values}
    for side, own, name, _, mask in _by_side(hippocampi):
        case = name if name in described["supervision"] else f"{side}_{name}"
        (listed,) = described["annotated_classes"][case]
        assert listed == list(values)[own - 1]
        assert np.array_equal(read_voxels(folder / "labelsTr" / f"{case}.nii.gz"),
                              np.where(sitk.GetArrayFromImage(mask) == own, values[listed], 0)), name


SOURCES = {
    "images and labels in each folder": ("{}/images", "{}/labels", ["back", "front"]),
    "one folder of images": ("images", "labels_{}", ["images", "labels_front", "labels_back"]),
    "all in one folder": ("images", "{}", ["."])}


@pytest.mark.parametrize("layout", SOURCES)
def test_folders_of_different_values_become_sources(hippocampi, tmp_path, nnunet_folders, capsys, monkeypatch, layout):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    images, labels, folders = SOURCES[layout]
    for side, own, name, image, mask in _by_side(hippocampi):
        _write(image, Path(f"{images.format(side)}/{name}.nii.gz"))
        _write(_recoded(mask, {0: 0, own: own, 3 - own: 0}), Path(f"{labels.format(side)}/{name}.nii.gz"))
    out = _printed(capsys, *folders)
    assert "--classes class_1=1" in out and "--classes class_2=2" in out and "--source" in out
    assert "front: taken to be not annotated for class_2" in out.replace("/labels:", ":")
    assert ("--images" in out) == (layout != "images and labels in each folder")
    assert _run_as_printed(out) == 0
    order = ["class_2", "class_1"] if out.index("class_2=2") < out.index("class_1=1") else ["class_1", "class_2"]
    _require_lists(nnunet_folders / "raw" / "Dataset100_Mixed", hippocampi,
                   {name: order.index(name) + 1 for name in ("class_1", "class_2")})


def test_the_names_in_two_data_sets_of_the_decathlon_are_taken(hippocampi, tmp_path, nnunet_folders, capsys,
                                                               monkeypatch):
    """Both have the values 0 and 1. The images of both have the same names, and there are images without a label."""
    monkeypatch.chdir(tmp_path)
    for number, (side, own, _, image, mask) in enumerate(_by_side(hippocampi)):
        _write(image, Path(f"{side}/imagesTr/case_{number % 6}.nii.gz"))
        _write(_recoded(mask, {0: 0, own: 1, 3 - own: 0}), Path(f"{side}/labelsTr/case_{number % 6}.nii.gz"))
        Path(side, "dataset.json").write_text(json.dumps({
            "name": side, "modality": {"0": "MRI"}, "labels": {"0": "background", "1": f"the {side}"}}))
    _write(hippocampi[0][1] + 1, Path("more/u1.nii.gz"))
    out = _printed(capsys, "front", "back", "more")
    assert "--source front=front" in out and "--classes 'the front=1'" in out and "--unlabelled more" in out
    assert _run_as_printed(out) == 0
    described = read_json(nnunet_folders / "raw" / "Dataset100_Mixed" / "dataset.json")
    assert described["labels"] == {"background": 0, "the front": 1, "the back": 2, "ignore": 3}
    assert described["annotated_classes"]["front_case_0"] == ["the front"] and len(described["supervision"]) == 13
    assert described["channel_names"] == {"0": "MRI"}


def test_segments_of_slicer_that_some_folders_lack(hippocampi, tmp_path, nnunet_folders, capsys, monkeypatch):
    """Each image has two labels, in two folders: it becomes two cases of one patient."""
    monkeypatch.chdir(tmp_path)
    for side, own, name, image, mask in _by_side(hippocampi):
        _write(image, Path(f"images/{name}.nii.gz"))
        segment = {"front": "Anterior", "back": "Posterior part"}[side]
        _write_slicer(image, {segment: sitk.GetArrayFromImage(mask) == own}, Path(f"{side}/{name}.seg.nrrd"), 0)
    name, image, mask = hippocampi[0]
    _write_slicer(image, {"Posterior part": sitk.GetArrayFromImage(mask) == 2}, Path(f"back/{name}.seg.nrrd"), 0)
    out = _printed(capsys, "images", "front", "back")
    assert "--source front=front" in out and "--classes Anterior" in out
    assert "--classes 'Posterior_part=Posterior part'" in out
    assert _run_as_printed(out) == 0
    folder = nnunet_folders / "raw" / "Dataset100_Mixed"
    _require_lists(folder, hippocampi, {"Anterior": 1, "Posterior_part": 2})
    described = read_json(folder / "dataset.json")
    assert len(described["supervision"]) == 13 and "patient_pattern" in described


@pytest.mark.parametrize("scribbles, expected", [
    ({0: 255, 1: 1, 2: 2, 3: 0}, "--classes class_1=1 class_2=2 ignore=255"),
    ({0: 0, 1: 1, 2: 2, 3: 3}, "--classes class_1=1 class_2=2 background=3 ignore=0")])
def test_scribbles_beside_folders_of_different_values(hippocampi, tmp_path, nnunet_folders, capsys, monkeypatch,
                                                      scribbles, expected):
    """Beside masks of one class there are scribbles of both: 1 and 2 in the classes, and 3 in the background."""
    monkeypatch.chdir(tmp_path)
    for number, (name, image, mask) in enumerate(hippocampi):
        _write(image, Path(f"images/{name}.nii.gz"))
        drawn = np.zeros(mask.GetSize()[::-1], np.uint8)
        voxels = sitk.GetArrayFromImage(mask).astype(int)
        for value in (1, 2, 3):
            row = np.argmax([(plane == value % 3).sum() for plane in voxels.swapaxes(0, 1)])
            drawn[::4, row][voxels[::4, row] == value % 3] = value
        drawn = sitk.GetImageFromArray(drawn)
        drawn.CopyInformation(mask)
        if number < 8:
            own = 1 if number < 4 else 2
            _write(_recoded(mask, {0: 0, own: own, 3 - own: 0}), Path(f"masks_{own}/{name}.nii.gz"))
        else:
            _write(_recoded(drawn, scribbles), Path(f"scribbles/{name}.nii.gz"))
    out = _printed(capsys, "images", "masks_1", "masks_2", "scribbles")
    assert expected in out and "--classes class_1=1 \\\n" in out
    assert _run_as_printed(out) == 0
    folder = nnunet_folders / "raw" / "Dataset100_Mixed"
    assert "annotated_classes" in read_json(folder / "dataset.json")
    for number, (name, _, mask) in enumerate(hippocampi):
        label, mask = read_voxels(folder / "labelsTr" / f"{name}.nii.gz"), sitk.GetArrayFromImage(mask)
        known = np.where(mask == (1 if number < 4 else 2), mask, 0) if number < 8 else mask
        assert (label == np.where(label == 3, 3, known)).all() and set(np.unique(label)) <= {0, 1, 2, 3}
        assert (label == 3).any() == (number >= 8) and (label == 0).any()


def test_folders_of_equal_values_stay_one_data_set_and_the_other_reading_is_told(hippocampi, tmp_path, nnunet_folders,
                                                                                 capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for side, own, name, image, mask in _by_side(hippocampi):
        _write(image, Path(f"images/{name}.nii.gz"))
        _write(_recoded(mask, {0: 0, own: 1, 3 - own: 0}), Path(f"{side}/{name}.nii.gz"))
    out = _printed(capsys, "images", "front", "back")
    assert "--full-labels front back" in out
    told = out[out.index("different organs"):].partition("confkd mix ")[2].replace("\\\n", " ")
    assert shlex.split(told) == ["--images", "images", "--source", "front=front", "--classes", "front_1=1", "--source",
                                 "back=back", "--classes", "back_1=1", "--id", "100"]
    assert cli.main(["mix", *shlex.split(told), "--processes", "1"]) == 0
    _require_lists(nnunet_folders / "raw" / "Dataset100_Mixed", hippocampi, {"front_1": 1, "back_1": 2})


def test_masks_and_scribbles_in_one_folder_beside_masks_of_other_classes(hippocampi, tmp_path, nnunet_folders, capsys,
                                                                       monkeypatch):
    monkeypatch.chdir(tmp_path)
    for side, own, name, image, mask in _by_side(hippocampi):
        _write(image, Path(f"images/{name}.nii.gz"))
        voxels = sitk.GetArrayFromImage(mask)
        if name == hippocampi[0][0]:
            voxels[:, ::3], voxels[:, 1::3] = 0, 0  # every third slice of one axis
        voxels = sitk.GetImageFromArray(np.where(voxels == own, own, 0).astype(np.uint8))
        voxels.CopyInformation(mask)
        _write(voxels, Path(f"{side}/{name}.nii.gz"))
    assert "no command: front holds both masks and scribbles" in _printed(capsys, "images", "front", "back")
