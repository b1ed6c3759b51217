"""Walks with what people have: inspect prints a command, and this command, as printed, writes the right data set."""
from __future__ import annotations

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
    """The images, masks and experts' strokes of 40 ACDC cases, cut to the heart, as [(name, image, mask, strokes)].

    The masks hold 0 and 1, the heart. The strokes are as a tool writes them whose 0 is *not annotated*: 1 is the heart,
    and 2 is background.
    """
    found = []
    for patient in range(1, 21):
        folder = test_data / "acdc" / "training" / f"patient{patient:03d}"
        for file in sorted(folder.glob("*_gt.nii.gz")):
            name = file.name[:-10]
            scribble = next((test_data / "acdc_scribbles").rglob(f"{name}_scribble.nii.gz"))
            with quiet():
                image, mask, strokes = (sitk.ReadImage(str(f)) for f in (folder / f"{name}.nii.gz", file, scribble))
            strokes.CopyInformation(image)
            box = _box(sitk.GetArrayViewFromImage(mask))
            image, mask, strokes = image[box], mask[box], strokes[box]
            found.append((name, image, _recoded(mask, {0: 0, 1: 1, 2: 1, 3: 1}),
                          _recoded(strokes, {0: 2, 1: 1, 2: 1, 3: 1, 4: 0})))
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
    for number, (name, image, mask, strokes) in enumerate(hearts):
        written = read_voxels(folder / "labelsTr" / f"{name}.nii.gz")
        assert np.array_equal(read_voxels(folder / "imagesTr" / f"{name}_0000.nii.gz"), sitk.GetArrayFromImage(image))
        if number < FULL:
            expected, kind = sitk.GetArrayFromImage(mask), "full"
        elif number < FULL + PARTIAL:
            expected, kind = np.vectorize({0: ignore, 1: 1, 2: 0}.get)(sitk.GetArrayFromImage(strokes)), "partial"
        else:
            expected, kind = np.full(written.shape, ignore), "unlabelled"
        assert kinds[name] == kind and np.array_equal(written, np.vectorize(classes.get)(expected)), name


PLACES = {
    "a folder each": ("images/{}", "masks/{}_seg", "strokes/{}_scribble"),
    "masks and strokes together": ("images/{}", "labels/{}_seg", "labels/{}_seg"),
    "one folder": ("data/{}", "data/{}_seg", "data/{}_scribble"),
    "a folder for each case": ("data/{}/cine", "data/{}/seg", "data/{}/strokes")}


@pytest.mark.parametrize("places", PLACES)
def test_masks_and_strokes_whose_zero_is_not_annotated(hearts, tmp_path, nnunet_folders, capsys, monkeypatch, places):
    monkeypatch.chdir(tmp_path)
    images, masks, strokes = PLACES[places]
    for number, (name, image, mask, stroke) in enumerate(hearts):
        _write(image, Path(f"{images.format(name)}.nii.gz"))
        if number < FULL:
            _write(mask, Path(f"{masks.format(name)}.nii.gz"))
        elif number < FULL + PARTIAL:
            _write(stroke, Path(f"{strokes.format(name)}.nii.gz"))
    folders = sorted(f.name for f in Path().iterdir() if f.name != "nnunet")
    assert cli.main(["inspect", *folders, "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "0 = not annotated" in out and "2 = strokes in the background" in out
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
    for number, (name, image, mask, strokes) in enumerate(hearts):
        _write(image, Path(f"images/{name}.nii.gz"))
        mask, strokes = sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(strokes)
        left = np.arange(mask.shape[2]) < mask.shape[2] // 2  # two classes, so that there is an order
        if number < FULL:
            _write_slicer(image, {"Left part": (mask == 1) & left, "right": (mask == 1) & ~left},
                          Path(f"masks/{name}.seg.nrrd"), number)
        elif number < FULL + PARTIAL:
            _write_slicer(image, {"Background": strokes == 2, "right": (strokes == 1) & ~left,
                                  "Left part": (strokes == 1) & left}, Path(f"strokes/{name}.seg.nrrd"), number)
    assert cli.main(["inspect", "images", "masks", "strokes", "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "--labels background Left_part=" in out or "--labels background 'Left_part=Left part' right" in out
    assert _run_as_printed(out) == 0
    folder = nnunet_folders / "raw" / "Dataset100_Mixed"
    assert read_json(folder / "dataset.json")["labels"] == {"background": 0, "Left_part": 1, "right": 2, "ignore": 3}
    for number, (name, _, mask, strokes) in enumerate(hearts[:FULL + PARTIAL]):
        written = read_voxels(folder / "labelsTr" / f"{name}.nii.gz")
        mask, strokes = sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(strokes)
        sides = np.where(np.arange(mask.shape[2]) < mask.shape[2] // 2, 1, 2)
        expected = np.where(mask == 1, sides, 0) if number < FULL else np.select(
            [strokes == 0, strokes == 2], [3, 0], sides)
        assert np.array_equal(written, expected), name
