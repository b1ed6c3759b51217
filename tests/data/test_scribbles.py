"""Scribbles that are taken for complete masks are found, and complete masks are not."""
from __future__ import annotations

import json
import re
import tracemalloc

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from nnunet_confkd import cli
from nnunet_confkd.data import scribbles as scribbles_module
from nnunet_confkd.data.check import check_dataset
from nnunet_confkd.data.scribbles import leaves_a_margin, shape_of, suspects
from nnunet_confkd.data.weak_labels import case_rng, weaken

SPACING = (5.0, 1.0, 1.0)


def organs(seed, size=1.0):
    """Two cylinders side by side in ten thick slices, of random radii and places."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((48, 48))
    label = np.zeros((10, 48, 48), np.uint8)
    for value, center in ((1, 14), (2, 34)):
        radius = size * rng.uniform(5, 9)
        label[2:9, (y - rng.uniform(20, 28)) ** 2 + (x - center) ** 2 < radius ** 2] = value
    return label


def scribble(label, style="points", **options):
    """Of a mask its weak label, 0 where nothing is annotated."""
    weak = weaken(label, style, 9, case_rng("case", style, 0), spacing=SPACING, **options)
    return np.where(weak == 9, 0, weak).astype(np.uint8)


def found(masks, scribbles, spacing=SPACING):
    """The names of suspects among masks (m0, ...) and scribbles (s0, ...)."""
    labels = {
        f"{letter}{k}": label for letter, group in (("m", masks), ("s", scribbles)) for k, label in enumerate(group)
    }
    return sorted(suspects({name: shape_of(label, spacing) for name, label in labels.items()}))


@pytest.mark.parametrize("masks, scribbles", [(4, 20), (1, 3), (20, 1)])
def test_points_among_masks_are_found_whatever_there_are_more_of(masks, scribbles):
    assert found([organs(k) for k in range(masks)], [scribble(organs(100 + k)) for k in range(scribbles)]) == sorted(
        f"s{k}" for k in range(scribbles))


def test_lines_are_found():
    def line(k):
        label = np.zeros((10, 48, 48), np.uint8)
        label[2:9, 20 + k, 8:20], label[2:9, 20:30, 34 + k] = 1, 2
        return label

    assert found([organs(k) for k in range(3)], [line(k) for k in range(3)]) == ["s0", "s1", "s2"]


def test_every_third_slice_is_found_even_where_all_cases_are_so():
    def thinned(label, step):
        kept = np.zeros_like(label)
        kept[::step] = label[::step]
        return kept

    assert found([], [thinned(organs(k).repeat(3, 0), 3) for k in range(4)]) == ["s0", "s1", "s2", "s3"]
    shape = shape_of(thinned(organs(0), 2), SPACING)
    assert suspects({"s": shape}) == {"s": "foreground in one slice of 2"}


def test_where_all_cases_are_scribbles_all_are_found():
    assert found([], [scribble(organs(k)) for k in range(3)]) == ["s0", "s1", "s2"]


def test_complete_masks_of_any_size_and_empty_ones_are_not_found():
    assert (
        found([*(organs(k, size) for k in range(4) for size in (0.5, 1, 1.5)), np.zeros((10, 48, 48), np.uint8)], [])
        == []
    )


def test_a_small_compact_lesion_beside_large_ones_is_not_found_and_a_line_of_as_many_voxels_is():
    def lesion(k):
        return (organs(k) == 1).astype(np.uint8)

    small, line = np.zeros((10, 48, 48), np.uint8), np.zeros((10, 48, 48), np.uint8)
    small[4:6, 20:22, 20:22] = 1
    line[4, np.arange(20, 28), np.arange(20, 28)] = 1
    assert found([lesion(k) for k in range(4)] + [small], []) == []
    assert found([lesion(k) for k in range(4)], [line]) == ["s0"]


def test_a_structure_that_is_thin_in_all_cases_is_not_found_beside_solid_ones():
    def wall(k):
        label = organs(k)
        label[2:9, 10:40, 24:26] = 3  # two voxels thick, everywhere
        return (label == 3).astype(np.uint8)

    assert found([wall(k) for k in range(3)], []) == ["m0", "m1", "m2"]  # alone it cannot be told from scribbles
    assert found([np.where(wall(k) > 0, 3, organs(k)) for k in range(3)], []) == []


def test_a_mask_that_is_thin_in_one_class_only_or_thin_and_large_is_not_found():
    remnant = organs(0)
    remnant[remnant == 2] = 0
    remnant[2:9, 20:24, 34] = 2  # of the second organ an edge is in the image
    assert found([remnant, *(organs(k) for k in range(1, 4))], []) == []
    net = np.zeros((10, 48, 48), np.uint8)
    net[:, ::6], net[:, 3::6], net[:, :, 0] = 1, 2, 1
    assert found([net, *(organs(k) for k in range(1, 4))], []) == []


def test_two_dimensions_and_equal_spacings_are_measured_too():
    flat = [organs(k)[4] for k in range(4)]
    assert found(flat, [scribble(organs(k))[4] for k in range(10, 13)], SPACING[1:]) == ["s0", "s1", "s2"]
    cube = (1.0, 1.0, 1.0)
    assert found(
        [organs(k).repeat(3, 0) for k in range(3)], [scribble(organs(k)).repeat(3, 0) for k in range(10, 12)], cube
    ) == ["s0", "s1"]


# ---- real masks and scribbles ---------------------------------------------------------------------------------------

def read(file):
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    image = sitk.ReadImage(str(file))
    return sitk.GetArrayFromImage(image), image.GetSpacing()[::-1]


def test_no_real_mask_of_hippocampus_is_found(test_data):
    files = sorted((test_data / "hippocampus" / "labelsTr").glob("*.nii.gz"))
    assert len(files) == 200 and suspects({file.name: shape_of(*read(file)) for file in files}) == {}


def test_experts_scribbles_are_found_among_real_masks_of_acdc_and_none_of_these(test_data):
    files = sorted((test_data / "acdc" / "training").glob("patient*/*_gt.nii.gz"))
    names = {file.name[:-10]: shape_of(*read(file)) for file in files}
    assert len(names) == 200 and suspects(names) == {}

    scribbled = sorted(names)[1::20]
    for case in scribbled:
        scribbles, spacing = read(test_data / "acdc_scribbles" / f"{case}_scribble.nii.gz")
        names[case] = shape_of(np.where(scribbles == 4, 0, scribbles), spacing)
    assert sorted(suspects(names)) == scribbled and len(scribbled) == 10


def test_eroded_masks_of_acdc_keep_a_margin_and_would_be_taken_for_scribbles_without_it(test_data):
    files = sorted((test_data / "acdc" / "training").glob("patient*/*_gt.nii.gz"))[::4]
    shapes, margins = {}, []
    for file in files:
        label, spacing = read(file)
        shapes[file.name] = shape_of(label, spacing)
        eroded = weaken(label.astype(np.int16), "erosion", 9, case_rng(file.name, "erosion", 0))
        margins.append(leaves_a_margin(eroded, 9))
        shapes[f"eroded {file.name}"] = shape_of(np.where(eroded == 9, 0, eroded), spacing)
        scribbles, _ = read(test_data / "acdc_scribbles" / f"{file.name[:-10]}_scribble.nii.gz")
        # 4 is not annotated; a tool that writes 0 for it and 5 for background, of which 5 is ignored by mistake
        assert not leaves_a_margin(np.where(scribbles == 4, 0, np.where(scribbles == 0, 5, scribbles)), 5)
    assert all(margins) and len(files) == 50 and any(name.startswith("eroded") for name in suspects(shapes))


@pytest.mark.parametrize("label, margin", [([0, 0, 9, 1, 1, 1, 9, 0], True), ([9, 0, 1, 0, 9], False),
                                           ([0, 1, 9, 9], False), ([9, 2, 0, 9, 1, 9], True)])
def test_a_margin_is_more_ignored_voxels_than_background_beside_the_classes(label, margin):
    for turned in (np.array([label]), np.array([label]).T, np.array([[label]])):
        assert leaves_a_margin(turned, 9) is margin


# ---- the way that failed --------------------------------------------------------------------------------------------

def test_scribbles_with_0_for_not_annotated_given_as_full_masks_are_named_by_check(tmp_path, monkeypatch, capsys):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    for k in range(24):
        label = organs(k) if k < 4 else scribble(organs(k))
        for sub, array in (
            ("images", np.random.default_rng(k).normal(size=label.shape).astype(np.float32)),
            ("labels", label),
        ):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing(SPACING[::-1])
            file = tmp_path / ("full" if k < 4 else "scribbles") / sub / f"p{k:02d}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(image, str(file))
    command = ["mix", "--full", str(tmp_path / "full"), "--labels", "background", "one", "two", "--processes", "1"]
    assert cli.main([*command, "--partial", str(tmp_path / "scribbles"), "--ignore-value", "255", "--id", "7"]) == 1
    error = capsys.readouterr().err
    assert (
        re.search(
            r"no label holds the value 255, .*The labels hold 0: 9\d\.\d %, 1: 0\.\d+ %, 2: 0\.\d+ %; "
            r"correct --ignore-value: if 0 is \*not annotated\*: --ignore-value 0$",
            error.strip(),
        )
        and "--full" not in error
    )

    for file in (tmp_path / "scribbles").rglob("*.nii.gz"):  # who gives them as --full all the same
        file.rename(tmp_path / "full" / file.parent.name / file.name)
    assert cli.main([*command, "--id", "7"]) == 0
    assert cli.main(["check", "-d", "7", "--processes", "1"]) == 0
    report = check_dataset(7, 1)
    (warning,) = [text for text in report.warnings if "look like scribbles" in text]
    assert warning.startswith("20 of 24 fully annotated cases look like scribbles and not like complete masks: p04 (")
    assert (
        re.search(
            r"p04 \(\d+ foreground voxels in lines or dots; complete masks of these classes have \d{4}\), "
            r"p05 .* and 15 more\. Look",
            warning,
        )
        and "give such cases to confkd mix as --partial, with --ignore-value 0" in warning
    )

    file = next((tmp_path / "raw").glob("Dataset007_*/dataset.json"))  # as confkd complete writes it
    described = json.loads(file.read_text())
    file.write_text(json.dumps({**described, "completed": [{"cases": {f"p{k:02d}": {} for k in range(4, 24)}}]}))
    assert not [text for text in check_dataset(7, 1).warnings if "look like scribbles" in text], "a model's labels"


def test_scribbles_of_which_the_wrong_value_is_ignored_are_named_by_check(tmp_path, monkeypatch, capsys):
    """0 is not annotated and 5 is background, and --ignore-value names the second. Eroded masks are not named."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    rng = np.random.default_rng(0)

    def write(folder: str, k: int, label: np.ndarray) -> None:
        for sub, array in (("images", rng.normal(size=label.shape).astype(np.float32)), ("labels", label)):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing(SPACING[::-1])
            file = tmp_path / folder / sub / f"p{k:02d}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(image, str(file))

    for k in range(4):
        write("full", k, organs(k))
    for k in range(4, 12):
        in_background = (organs(k) == 0) & (rng.random(organs(k).shape) < 0.01)
        write("scribbles", k, np.where(in_background, 5, scribble(organs(k))).astype(np.uint8))
        write("eroded", k, weaken(organs(k), "erosion", 9, case_rng(f"p{k}", "erosion", 0)))
    command = ["mix", "--full", str(tmp_path / "full"), "--labels", "background", "one", "two", "--processes", "1"]
    for dataset, folder, values, named in (("7", "scribbles", ("5",), True), ("9", "eroded", ("9",), False),
                                           ("8", "scribbles", ("0", "--background-value", "5"), False)):
        assert cli.main([*command, "--partial", str(tmp_path / folder), "--ignore-value", *values, "--id", dataset,
                         "--name", f"No{dataset}"]) == 0
        report = check_dataset(int(dataset), 1)
        assert not report.errors
        warnings = [text for text in report.warnings if "look like scribbles" in text]
        assert bool(warnings) == named
        assert cli.main(["check", "-d", dataset, "--processes", "1"]) == 0
        last, advice = capsys.readouterr().out.splitlines()[-1], "look at the warnings" if report.warnings else "ready"
        assert last.endswith(f"{advice}; next: confkd plan -d {dataset}")
        if named:
            assert warnings[0].startswith("8 of 8 partially annotated cases look like scribbles, but nearly all their ")
            assert "confkd mix --ignore-value 0, with the --background-value of the scribbles" in warnings[0]


@pytest.mark.parametrize("slab", [1, 2000, 2 ** 20])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING, (1.0, 9.0, 1.0)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float32])
def test_a_part_at_a_time_the_shape_is_that_of_the_whole(monkeypatch, slab, spacing, dtype):
    monkeypatch.setattr(scribbles_module, "SLAB", slab)
    rng = np.random.default_rng(3)
    label = np.where(ndimage.gaussian_filter(rng.normal(size=(3, 30, 25, 20)), (0, 2, 2, 2)) > 0.02, 1, 0)
    label = (label[0] * (1 + label[1] + 2 * label[2])).astype(dtype)
    label[:, :3] = label[9:12] = 0
    label[-1, -1, -1] = 6
    found = shape_of(label, spacing)
    padded = np.pad(label.astype(int), 1)
    assert found.volumes == {value: int((label == value).sum()) for value in (1, 2, 3, 4, 6)}
    flat = max(spacing) >= 2 * min(spacing)
    assert list(found.inner) == ([int(np.argmax(spacing))] if flat else [0, 1, 2])
    for axis, shares in found.inner.items():
        square = np.ones([1 if of == axis else 3 for of in range(3)], bool)
        for value, share in shares.items():
            assert share == ndimage.binary_erosion(padded == value, square).sum() / found.volumes[value]
    for value, share in found.filled.items():
        box = ndimage.find_objects((label == value).astype(int))[0]
        assert share == found.volumes[value] / np.prod([side.stop - side.start for side in box])


def test_a_shape_needs_less_memory_than_a_mask(monkeypatch):
    monkeypatch.setattr(scribbles_module, "SLAB", 2 ** 16)
    monkeypatch.setattr(scribbles_module, "SAMPLED", 2 ** 14)
    label = np.zeros((150, 150, 150), np.uint8)
    for value in range(1, 118):
        label[value:value + 30, 5:140, 7:130] = value
    tracemalloc.start()
    try:
        shape_of(label, (1.0, 1.0, 1.0))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < label.nbytes


def test_the_centers_of_large_labels_come_from_a_part_of_the_voxels(monkeypatch):
    label = organs(0)
    label[0, 1, 1] = 3  # in no part but the whole
    exact = shape_of(label, SPACING).centers
    assert exact[1] == pytest.approx(tuple(np.argwhere(label == 1).mean(0))) and exact[3] == (0, 1, 1)
    monkeypatch.setattr(scribbles_module, "SAMPLED", label.size // 8)
    coarse = shape_of(label, SPACING).centers
    assert coarse != exact and coarse[3] == exact[3]
    assert all(np.abs(np.subtract(coarse[value], exact[value])).max() < 1 for value in exact)
    assert shape_of(label[4], SPACING[1:]).centers[1] == pytest.approx(tuple(np.argwhere(label[4] == 1).mean(0)))
