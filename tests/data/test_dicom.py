"""DICOM, as ITK, pydicom and highdicom write it."""
from __future__ import annotations

import builtins
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import ORIGIN, SHAPE, SIDE, SPACING, VOXELS, write_series
from image_files import read_voxels
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from nnunet_confkd.data.dicom import is_dicom_folder, read_segments, read_series, series_folders
from nnunet_confkd.data.mix import mix
from nnunet_confkd.errors import InputError

LIVER, TUMOUR = np.zeros((2, *SHAPE), bool)
LIVER[1:5, 1:7, 1:6], TUMOUR[2:4, 1:7, 6:9] = True, True


def _seg(file: Path, slices, segments: dict[str, np.ndarray], kind="BINARY") -> Path:
    """Write a DICOM SEG of these segments."""
    described = [highdicom.seg.SegmentDescription(
        number, name, codes.SCT.Organ, codes.SCT.Liver, highdicom.seg.SegmentAlgorithmTypeValues.MANUAL)
        for number, name in enumerate(segments, 1)]
    masks = np.stack(list(segments.values()), axis=-1)
    seg = highdicom.seg.Segmentation(
        slices, masks.astype(np.uint8) if kind == "BINARY" else masks.astype(np.float32), kind, described,
        generate_uid(), 2, generate_uid(), 1, "maker", "model", "1", "2",
        **({} if kind == "BINARY" else {"fractional_type": "PROBABILITY"}))
    file.parent.mkdir(parents=True, exist_ok=True)
    seg.save_as(file)
    return file


# ---- series ----------------------------------------------------------------------------------------------------------

def test_a_series_is_read_in_its_order_and_place(tmp_path):
    write_series(tmp_path / "p")
    picture = read_series(tmp_path / "p")
    assert np.array_equal(picture.voxels[0], VOXELS) and is_dicom_folder(tmp_path / "p")
    assert np.allclose(picture.geometry.spacing, SPACING) and np.allclose(picture.geometry.origin, ORIGIN)
    assert np.allclose(picture.geometry.direction, SIDE)


def test_a_missing_slice_is_noticed(tmp_path):
    write_series(tmp_path / "p", left_out=(2,))
    with pytest.raises(InputError, match="p: its slices are 3 to 6 mm apart; are some missing"):
        read_series(tmp_path / "p")


def _changed(folder: Path, change) -> Path:
    """A series whose data sets `change` has changed; it gets each of them, and its number."""
    for number, file in enumerate(sorted(write_series(folder) and folder.iterdir(), key=lambda file: int(file.stem))):
        content = pydicom.dcmread(file)
        change(content, number)
        content.save_as(file)
    return folder


@pytest.mark.parametrize("change, text", [
    (lambda slice_, _: setattr(slice_, "ImagePositionPatient", list(ORIGIN)), "its slices lie at one place"),
    (lambda slice_, number: setattr(slice_, "PixelSpacing", [0.8, 0.7] if number % 2 else [1.6, 1.4]),
     "its slices differ in their pixel spacing"),
    (lambda slice_, number: setattr(slice_, "ImageOrientationPatient", [1, 0, 0, 0, 1, 0] if number else
                                    [0, 1, 0, 0, 0, 1]), "its slices differ in direction"),
    (lambda slice_, number: setattr(slice_, "ImagePositionPatient", [
        float(x) for x in np.add(slice_.ImagePositionPatient, np.multiply(number, SIDE[1::3]))]),
     "by up to 5 mm .the gantry was tilted.*dcm2niix")])
def test_series_that_are_no_box_of_voxels_are_refused(tmp_path, change, text):
    with pytest.raises(InputError, match=text):
        read_series(_changed(tmp_path / "p", change))


def test_positions_of_few_decimals_are_no_tilt(tmp_path):
    def rounded(slice_, _):
        slice_.ImagePositionPatient = [round(float(x), 2) for x in slice_.ImagePositionPatient]

    assert np.array_equal(read_series(_changed(tmp_path / "p", rounded)).voxels[0], VOXELS)


def test_slices_without_a_pixel_spacing_are_read(tmp_path):
    for number, left in enumerate(("", None)):
        def without(slice_, index):
            if left is None and index:
                del slice_.PixelSpacing
            elif left == "":
                slice_.PixelSpacing = ""

        folder = _changed(tmp_path / str(number), without)
        if left == "":
            assert np.array_equal(read_series(folder).voxels[0], VOXELS)
        else:
            with pytest.raises(InputError, match="differ in their pixel spacing"):
                read_series(folder)


def test_each_slice_keeps_its_own_rescaling(tmp_path):
    def rescaled(slice_, number):
        slice_.RescaleSlope, slice_.RescaleIntercept = (1 if number == 0 else 0.125), 0

    voxels = read_series(_changed(tmp_path / "p", rescaled)).voxels[0]
    assert np.allclose(voxels, [(of + 1024) * (1 if number == 0 else 0.125) for number, of in enumerate(VOXELS)])


def test_two_series_in_a_folder_are_named(tmp_path):
    write_series(tmp_path / "p")
    for file in (tmp_path / "p").iterdir():
        file.rename(file.with_name(f"first{file.name}"))
    write_series(tmp_path / "p", VOXELS[:4])
    with pytest.raises(InputError, match=r"p: holds several DICOM series: portal venous \(\d files\)"):
        read_series(tmp_path / "p")


def test_a_segmentation_beside_a_series_is_no_second_series(tmp_path):
    _seg(tmp_path / "p" / "seg.dcm", write_series(tmp_path / "p"), {"liver": LIVER})
    assert np.array_equal(read_series(tmp_path / "p").voxels[0], VOXELS)


def test_series_are_found_however_deep_they_lie(tmp_path):
    for folder in ("p1", "p2/study/ct", "p3/a", "p3/b"):
        write_series(tmp_path / "all" / folder, VOXELS[:2])
    (tmp_path / "all" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    _seg(tmp_path / "all" / "p4" / "seg.dcm", write_series(tmp_path / "x"), {"liver": LIVER})
    (tmp_path / "all" / "p5").mkdir()
    found = {name: folder.relative_to(tmp_path / "all").as_posix()
             for name, folder in series_folders(tmp_path / "all").items()}
    assert found == {"p1": "p1", "p2": "p2/study/ct", "p3_a": "p3/a", "p3_b": "p3/b"}
    assert series_folders(tmp_path / "all" / "p1") == {"p1": tmp_path / "all" / "p1"}


def test_two_series_of_the_same_name_are_refused(tmp_path):
    for folder in ("p_1/2", "p_1/3", "p_1_2/scan"):
        write_series(tmp_path / folder, VOXELS[:2])
    with pytest.raises(InputError, match="p_1/2 and .*p_1_2/scan would both be called p_1_2"):
        series_folders(tmp_path)


def test_a_folder_of_other_files_is_no_series(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    assert not is_dicom_folder(tmp_path)
    with pytest.raises(InputError, match="no DICOM series of images"):
        read_series(tmp_path)


# ---- segmentations ---------------------------------------------------------------------------------------------------

def test_segments_are_read_by_name_where_they_lie(tmp_path):
    file = _seg(tmp_path / "seg.dcm", write_series(tmp_path / "p"), {"liver": LIVER, "tumour": TUMOUR})
    masks, geometry = read_segments(file)
    first = round(np.linalg.norm(np.subtract(geometry.origin, ORIGIN)) / SPACING[2])
    for name, mask in (("liver", LIVER), ("tumour", TUMOUR)):
        assert np.array_equal(masks[name], mask[first:first + len(masks[name])]) and masks[name].any()
    assert np.allclose(geometry.spacing, SPACING) and np.allclose(geometry.direction, SIDE)


def test_a_fractional_segmentation_is_refused(tmp_path):
    file = _seg(tmp_path / "seg.dcm", write_series(tmp_path / "p"), {"liver": LIVER}, "FRACTIONAL")
    with pytest.raises(InputError, match="fractional"):
        read_segments(file)


def test_an_image_is_no_segmentation(tmp_path):
    write_series(tmp_path / "p")
    with pytest.raises(InputError, match="is DICOM of the kind CT; a label is a DICOM SEG"):
        read_segments(tmp_path / "p" / "0.dcm")


def test_without_highdicom_the_extra_is_named(tmp_path, monkeypatch):
    imported = builtins.__import__

    def fail(name, *args, **options):
        if name == "highdicom":
            raise ImportError(name)
        return imported(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(InputError, match=r"pip install 'nnunet_confkd\[dicom\]'"):
        read_segments(tmp_path / "seg.dcm")


@pytest.mark.parametrize("place", ["segs/{}.dcm", "segs/{}_seg.dcm", "segs/{}/1.dcm", "segs/{}"])
def test_series_and_segmentations_become_a_data_set(tmp_path, nnunet_folders, require_integrity, place):
    both = {"liver": LIVER, "tumour": TUMOUR}
    for case, segments in (("a", both), ("b", dict(reversed(both.items()))), ("c", None)):
        slices = write_series(tmp_path / "images" / case)
        if segments:
            _seg(tmp_path / place.format(case), slices, segments)
    target = mix(None, 7, images=[tmp_path / "images"], full_labels=[tmp_path / "segs"], processes=1,
                 labels=["background", "liver", "tumour"], channels=["CT"])
    for case in ("a", "b"):
        assert np.array_equal(read_voxels(target / "labelsTr" / f"{case}.nii.gz"), np.where(TUMOUR, 2, LIVER))
        assert np.array_equal(read_voxels(target / "imagesTr" / f"{case}_0000.nii.gz"), VOXELS)
    image = sitk.ReadImage(str(target / "imagesTr" / "c_0000.nii.gz"))
    assert np.allclose(image.GetOrigin(), ORIGIN) and np.allclose(image.GetDirection(), SIDE)
    assert (read_voxels(target / "labelsTr" / "c.nii.gz") == 3).all()
    require_integrity(target)
