"""Labels whose parts have names, written by the libraries of those who made the formats."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import slicerio
from image_files import read_json, read_voxels, write_image

from nnunet_confkd import cli
from nnunet_confkd.data.mix import mix
from nnunet_confkd.data.segments import has_segments, read_as_label, read_segments
from nnunet_confkd.errors import InputError

SHAPE, SPACING, ORIGIN = (6, 8, 10), (1.5, 0.5, 2.0), (-20.0, 7.0, 100.0)  # (z, y, x), and x, y, z
TURNED = (0, -1, 0, 1, 0, 0, 0, 0, 1)  # the axes of the voxels are not those of the body


def _mask(*box):
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(*side) for side in box)] = True
    return mask


LIVER, TUMOUR = _mask((1, 5), (1, 7), (1, 6)), _mask((1, 5), (1, 7), (6, 9))


def _image(file: Path, seed=0):
    return write_image(file, np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32), SPACING, ORIGIN, TURNED)


def _slicer(file: Path, segments: list[tuple[str, np.ndarray]], layers=False, crop=None):
    """Write a .seg.nrrd file: values in the order of the segments, one layer for each if asked for, cut to a box."""
    crop = crop or (slice(None),) * 3
    start = np.array([side.start or 0 for side in crop])[::-1]  # x, y, z
    axes = np.reshape(TURNED, (3, 3)) * SPACING
    place = np.eye(4)
    place[:3, :3], place[:3, 3] = axes, ORIGIN + axes @ start
    described, arrays = [], []
    merged = np.zeros(SHAPE, np.uint8)
    for number, (name, mask) in enumerate(segments, 1):
        described.append({"name": name, "labelValue": 1 if layers else number, "layer": number - 1 if layers else 0})
        arrays.append(mask[crop].T.astype(np.uint8))
        merged[mask] = number
    voxels = np.stack(arrays) if layers else merged[crop].T
    file.parent.mkdir(parents=True, exist_ok=True)
    slicerio.write_segmentation(str(file), {"voxels": voxels, "ijkToLPS": place, "segments": described})
    return file


def _label(file, outside=0, **values):
    return read_as_label(file, values=values or {"background": 0, "liver": 1, "tumour": 2}, outside=outside)


EXPECTED = np.where(TUMOUR, 2, np.where(LIVER, 1, 0))


# ---- 3D Slicer -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_segments_are_read_by_name_whatever_their_order(tmp_path, layers, order):
    file = _slicer(tmp_path / "p.seg.nrrd", [("Liver", LIVER), ("tumour", TUMOUR)][::order], layers)
    picture = _label(file)
    assert np.array_equal(picture.voxels[0], EXPECTED) and has_segments(file)
    assert picture.geometry.origin == ORIGIN and np.allclose(picture.geometry.spacing, SPACING)
    assert np.allclose(picture.geometry.direction, TURNED)


@pytest.mark.parametrize("named", [(), ("Liver",)])
def test_values_without_a_segment_are_refused(tmp_path, named):
    """SimpleITK writes the voxels of a .seg.nrrd file without the names of its segments."""
    file = _slicer(tmp_path / "p.seg.nrrd", [("Liver", LIVER), ("tumour", TUMOUR)])
    image = sitk.ReadImage(str(file))
    plain = sitk.GetImageFromArray(sitk.GetArrayFromImage(image))
    for key in image.GetMetaDataKeys():
        if named and key.startswith("Segment0_"):
            plain.SetMetaData(key, image.GetMetaData(key))
    sitk.WriteImage(plain, str(file))
    with pytest.raises(InputError, match=rf"p\.seg\.nrrd: holds the values {'2' if named else '1, 2'}, but its header "
                                         r"names no segment for them.*call it p\.nrrd"):
        _label(file)


def test_an_empty_segmentation_is_read(tmp_path):
    write_image(tmp_path / "p.seg.nrrd", np.zeros(SHAPE, np.uint8))
    assert not _label(tmp_path / "p.seg.nrrd").voxels.any()


def test_a_file_of_a_class_holds_0_and_one_more_value(tmp_path):
    write_image(tmp_path / "p" / "liver.nii.gz", LIVER.astype(np.uint8) + 1)
    with pytest.raises(InputError, match=r"liver\.nii\.gz: holds the values 1, 2; .*holds 0 and one more value"):
        _label(tmp_path / "p")


def test_segments_are_known_without_the_usual_ending(tmp_path):
    file = _slicer(tmp_path / "p.nrrd", [("Liver", LIVER)])
    plain = write_image(tmp_path / "q.nrrd", EXPECTED.astype(np.uint8))
    assert has_segments(file) and not has_segments(plain)


def test_overlapping_segments_are_named(tmp_path):
    file = _slicer(tmp_path / "p.seg.nrrd", [("Liver", LIVER | TUMOUR), ("tumour", TUMOUR)], layers=True)
    text = rf"p\.seg\.nrrd: the segments 'tumour' and 'Liver' overlap in {TUMOUR.sum()} "
    with pytest.raises(InputError, match=text):
        _label(file)


def test_segments_of_the_same_label_may_overlap(tmp_path):
    file = _slicer(tmp_path / "p.seg.nrrd", [("Liver", LIVER | TUMOUR), ("tumour", TUMOUR)], layers=True)
    assert np.array_equal(_label(file, liver=1, tumour=1).voxels[0], EXPECTED > 0)


def test_a_segment_without_a_name_in_labels_is_named_unless_it_is_empty(tmp_path):
    file = _slicer(tmp_path / "p.seg.nrrd", [("Liver", LIVER), ("Cyst", TUMOUR)])
    with pytest.raises(InputError, match="holds the segments Cyst, which --labels does not name"):
        _label(file)
    file = _slicer(tmp_path / "q.seg.nrrd", [("Liver", LIVER), ("Cyst", TUMOUR & False)])
    assert np.array_equal(_label(file).voxels[0], LIVER)


def test_two_segments_of_one_name_are_refused(tmp_path):
    file = _slicer(tmp_path / "p.seg.nrrd", [("Liver", LIVER), ("Liver", TUMOUR)])
    with pytest.raises(InputError, match="two segments of the name 'Liver'"):
        _label(file)


def test_a_damaged_file_is_named(tmp_path):
    file = _slicer(tmp_path / "p.seg.nrrd", [("Liver", LIVER)])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"p\.seg\.nrrd: cannot be read"):
        _label(file)


@pytest.fixture
def folders(tmp_path):
    """Two images with complete masks, the second one in another order, and one with scribbles."""
    for seed, case in enumerate(("a", "b", "c", "d")):
        _image(tmp_path / "images" / f"{case}.nrrd", seed)
    _slicer(tmp_path / "full" / "a.seg.nrrd", [("liver", LIVER), ("tumour", TUMOUR)])
    _slicer(tmp_path / "full" / "b-segmentation.seg.nrrd", [("tumour", TUMOUR), ("liver", LIVER)])
    scribbles = _mask((2, 3), (1, 7), (1, 2))
    background = _mask((2, 3), (0, 1), (0, 9))
    _slicer(tmp_path / "scribbles" / "c.seg.nrrd", [("Background", background), ("liver", scribbles)])
    return tmp_path


def _mix(folder, **options):
    return mix(None, 7, **{"images": [folder / "images"], "full_labels": [folder / "full"], "processes": 1,
                           "partial_labels": [folder / "scribbles"],
                           "labels": ["background", "liver", "tumour"]} | options)


def test_segments_become_labels_and_what_no_scribble_touches_is_ignored(folders, nnunet_folders, require_integrity):
    target = _mix(folders)
    for case in ("a", "b"):
        assert np.array_equal(read_voxels(target / "labelsTr" / f"{case}.nrrd"), EXPECTED)
    written = read_voxels(target / "labelsTr" / "c.nrrd")
    assert (written[2, 0, :9] == 0).all() and (written[2, 1:7, 1] == 1).all() and (written == 3).sum() == 480 - 15
    assert (read_voxels(target / "labelsTr" / "d.nrrd") == 3).all()
    assert read_json(target / "dataset.json")["supervision"] == {
        "a": "full", "b": "full", "c": "partial", "d": "unlabelled"}
    require_integrity(target)


def test_cropped_segments_are_padded_to_the_grid_of_the_image(folders, nnunet_folders):
    box = (slice(1, 5), slice(1, 7), slice(1, 9))
    _slicer(folders / "full" / "a.seg.nrrd", [("tumour", TUMOUR), ("liver", LIVER)], crop=box)
    _slicer(folders / "scribbles" / "c.seg.nrrd", [("liver", _mask((2, 3), (1, 7), (1, 2)))],
            crop=(slice(2, 3), slice(1, 7), slice(1, 2)))
    target = _mix(folders)
    assert np.array_equal(read_voxels(target / "labelsTr" / "a.nrrd"), EXPECTED)
    written = read_voxels(target / "labelsTr" / "c.nrrd")
    assert (written[2, 1:7, 1] == 1).all() and (written == 3).sum() == 480 - 6


def test_segments_beyond_the_image_are_refused(folders, nnunet_folders):
    image = sitk.ReadImage(str(folders / "images" / "a.nrrd"))
    sitk.WriteImage(image[:8], str(folders / "images" / "a.nrrd"))
    with pytest.raises(InputError, match=r"a\.seg\.nrrd: .*24 voxels are drawn outside of the image"):
        _mix(folders)


def test_segments_between_the_voxels_of_the_image_are_refused(folders, nnunet_folders):
    image = sitk.ReadImage(str(folders / "images" / "a.nrrd"))
    image.SetOrigin((ORIGIN[0] + 0.4, *ORIGIN[1:]))
    sitk.WriteImage(image, str(folders / "images" / "a.nrrd"))
    with pytest.raises(InputError, match=r"a\.seg\.nrrd: is on another grid than .*a\.nrrd.*--resample-labels"):
        _mix(folders)


def test_other_names_of_segments_are_told_with_an_option_that_works(folders, nnunet_folders):
    _slicer(folders / "full" / "a.seg.nrrd", [("Liver 1", LIVER), ("tumour", TUMOUR)])
    _slicer(folders / "full" / "b-segmentation.seg.nrrd", [("tumour", TUMOUR), ("Liver 1", LIVER)])
    with pytest.raises(InputError) as error:
        _mix(folders)
    text = str(error.value)
    assert text.startswith("2 labels hold the segment 'Liver 1', which --labels does not name.")
    assert "as in --labels ... 'NAME=Liver 1'" in text and text.count("Liver 1") < 5
    target = _mix(folders, partial_labels=[], labels=["background", "liver=Liver 1", "tumour"])
    assert np.array_equal(read_voxels(target / "labelsTr" / "b.nrrd"), EXPECTED)


def test_labels_that_differ_in_capitals_alone_are_refused(folders, nnunet_folders):
    with pytest.raises(InputError, match="--labels: liver and Liver differ in capitals alone"):
        _mix(folders, labels=["background", "liver", "Liver", "tumour"])


def test_segments_that_differ_in_capitals_alone_are_one_class_for_inspect(folders, nnunet_folders, capsys):
    _slicer(folders / "full" / "a.seg.nrrd", [("Liver", LIVER), ("tumour", TUMOUR)])
    places = [str(folders / name) for name in ("images", "full")]
    assert cli.main(["inspect", *places, "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "--labels background Liver tumour" in out
    assert "note: 'liver' is taken for the class of the same name in other capitals, which do not count" in out


def test_regions_have_values_only(folders, nnunet_folders):
    (folders / "full" / "dataset.json").write_text('{"labels": {"background": 0, "whole": [1, 2], "core": [2]}, '
                                                   '"regions_class_order": [1, 2]}')
    with pytest.raises(InputError, match="has segments, but the labels are regions"):
        _mix(folders, labels=None)


# ---- a folder with one file for each class ---------------------------------------------------------------------------

@pytest.fixture
def total(tmp_path):
    """TotalSegmentator's layout: a folder for each case, in it the image and a folder of masks."""
    for seed, case in enumerate(("s1", "s2", "s3")):
        _image(tmp_path / case / "ct.nii.gz", seed)
        for name, mask in (("liver", LIVER), ("tumour", TUMOUR), ("spleen", TUMOUR & False), ("body", LIVER | TUMOUR)):
            if case != "s3":
                write_image(tmp_path / case / "segmentations" / f"{name}.nii.gz", mask.astype(np.uint8), SPACING,
                            ORIGIN, TURNED)
    return tmp_path


def _mix_total(folder, **options):
    return mix(None, 7, **{"images": [f"{folder}/{{case}}/ct.nii.gz"], "processes": 1,
                           "full_labels": [f"{folder}/{{case}}/segmentations"],
                           "labels": ["background", "liver", "tumour"]} | options)


def test_the_files_of_the_named_classes_become_one_label(total, nnunet_folders):
    target = _mix_total(total)
    for case in ("s1", "s2"):
        assert np.array_equal(read_voxels(target / "labelsTr" / f"{case}.nii.gz"), EXPECTED)
    assert read_json(target / "dataset.json")["supervision"] == {"s1": "full", "s2": "full", "s3": "unlabelled"}


def test_classes_that_overlap_are_named(total, nnunet_folders):
    with pytest.raises(InputError, match="s1/segmentations: the segments 'liver' and 'body' overlap in"):
        _mix_total(total, labels=["background", "liver", "body"])


def test_a_class_without_a_file_is_named(total, nnunet_folders):
    with pytest.raises(InputError, match="segmentations: has no file of livr; .*it holds body, liver, spleen, tumour"):
        _mix_total(total, labels=["background", "livr", "tumour"])


def test_a_file_of_several_values_is_no_class(total, nnunet_folders):
    write_image(total / "s2" / "segmentations" / "liver.nii.gz", EXPECTED.astype(np.uint8), SPACING, ORIGIN, TURNED)
    with pytest.raises(InputError, match=r"s2/segmentations/liver\.nii\.gz: holds the values 0, 1, 2"):
        _mix_total(total)


def test_classes_on_different_grids_are_refused(total):
    write_image(total / "s1" / "segmentations" / "tumour.nii.gz", TUMOUR[:5].astype(np.uint8), SPACING, ORIGIN, TURNED)
    with pytest.raises(InputError, match=r"tumour\.nii\.gz: is on another grid than .*liver\.nii\.gz: size"):
        read_segments(total / "s1" / "segmentations", ["liver", "tumour"])


def test_an_empty_class_is_background(total, nnunet_folders):
    target = _mix_total(total, labels=["background", "liver", "spleen"])
    assert np.array_equal(read_voxels(target / "labelsTr" / "s1.nii.gz"), LIVER)


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "gone.nrrd").symlink_to(tmp_path / "nowhere.nrrd")
    with pytest.raises(InputError, match=r"gone\.nrrd: there is no such file"):
        has_segments(tmp_path / "gone.nrrd")
