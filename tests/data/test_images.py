from __future__ import annotations

import gzip
import json
import os
import struct
import tracemalloc
from contextlib import contextmanager

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from skimage import io as skio

from nnunet_confkd.data.images import (
    ENDINGS,
    Geometry,
    Volume,
    carry_over,
    count_voxels,
    ending_of,
    parts,
    quiet,
    read,
    spacing_file,
    stands_alone,
    values_in,
    write,
)
from nnunet_confkd.errors import InputError

ITK = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")
SIZE, SPACING, ORIGIN = (5, 4, 3), (0.75, 1.5, 5.0), (-3.5, 11.25, 2.0)
OBLIQUE = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)
STRAIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
UNREADABLE = "{}: cannot be read as an image; is it cut short, damaged, or of another format? Fetch or write it anew ("


@pytest.fixture
def voxels() -> np.ndarray:
    """(Z, Y, X)"""
    return np.random.default_rng(0).normal(size=SIZE[::-1]).astype(np.float32)


def _write(file, voxels, direction=OBLIQUE, compress=False, spacing=SPACING, origin=ORIGIN):
    n = voxels.ndim
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing[:n])
    image.SetOrigin(origin[:n])
    image.SetDirection(np.reshape(direction, (3, 3))[:n, :n].ravel().tolist())
    sitk.WriteImage(image, str(file), compress)
    return file


def _nifti(file, voxels, kind=nibabel.Nifti1Image, affine=None):
    """voxels in NIfTI's order, (X, Y, Z, ...)"""
    header = kind.header_class(endianness=">" if voxels.dtype.byteorder == ">" else "<")
    image = kind(voxels, np.diag((*SPACING, 1)) if affine is None else affine, header)
    image.set_data_dtype(voxels.dtype)
    image.to_filename(file)
    return file


def _assert_unreadable(file, reason):
    with pytest.raises(InputError) as error:
        read(file)
    text = str(error.value)
    assert text.startswith(UNREADABLE.format(file)) and reason in text and text.endswith(")") and "\n" not in text


# ---- formats --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending", [*ITK, ".mhd"])
@pytest.mark.parametrize("compress", [False, True])
def test_voxels_and_place_are_those_that_were_written(tmp_path, voxels, ending, compress):
    direction = STRAIGHT if ending == ".gipl" else OBLIQUE  # GIPL stores none
    picture = read(_write(tmp_path / f"image{ending}", voxels, direction, compress))
    assert picture.voxels.dtype == np.float32
    np.testing.assert_array_equal(picture.voxels, voxels[None])
    assert picture.geometry.size == SIZE
    np.testing.assert_allclose(picture.geometry.spacing, SPACING)
    np.testing.assert_allclose(picture.geometry.origin, ORIGIN)
    np.testing.assert_allclose(picture.geometry.direction, direction, atol=1e-7)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".mhd"])
def test_a_two_dimensional_image_stays_one(tmp_path, voxels, ending):
    picture = read(_write(tmp_path / f"image{ending}", voxels[0]))
    np.testing.assert_array_equal(picture.voxels, voxels[:1])
    assert picture.geometry.size == SIZE[:2]
    np.testing.assert_allclose(picture.geometry.spacing, SPACING[:2])
    np.testing.assert_allclose(picture.geometry.direction, (0.8, -0.6, 0.6, 0.8), atol=1e-7)


@pytest.mark.parametrize("ending", [*ITK, ".mhd"])
def test_the_last_axis_of_a_four_dimensional_image_is_its_channels(tmp_path, voxels, ending):
    direction = STRAIGHT if ending == ".gipl" else OBLIQUE
    channels = []
    for factor in (1, 2, 3):
        channels.append(sitk.GetImageFromArray(factor * voxels))
        channels[-1].SetSpacing(SPACING)
        channels[-1].SetDirection(direction)
    file = tmp_path / f"image{ending}"
    sitk.WriteImage(sitk.JoinSeries(channels), str(file))
    picture = read(file)
    np.testing.assert_array_equal(picture.voxels, np.stack([voxels, 2 * voxels, 3 * voxels]))
    assert picture.geometry.size == SIZE
    np.testing.assert_allclose(picture.geometry.spacing, SPACING)
    np.testing.assert_allclose(picture.geometry.direction, direction, atol=1e-7)
    np.testing.assert_array_equal(Volume(file, channel=1).read().voxels, 2 * voxels[None])


@pytest.mark.parametrize("shape, channels, size", [
    ((5, 4, 3, 1), 1, (5, 4, 3)), ((5, 4, 1), 1, (5, 4, 1)), ((5, 4, 1, 1), 1, (5, 4, 1)), ((5, 4, 1, 3), 3, (5, 4, 1)),
    ((5, 4, 3, 2, 1), 2, (5, 4, 3)), ((5, 4), 1, (5, 4))])
def test_axes_of_length_one_in_a_nifti_file_are_taken_as_itk_takes_them(tmp_path, shape, channels, size):
    stored = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    file = _nifti(tmp_path / "image.nii", stored)
    picture = read(file)
    assert picture.geometry.size == size and picture.voxels.shape == (channels, *size[::-1])
    itk = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    np.testing.assert_array_equal(picture.voxels, itk.reshape(picture.voxels.shape))


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i2", "u2", "i4", ">f4", "f8", ">f8", "i8", "u8"])
def test_every_number_type_of_a_nifti_file_arrives_in_the_machines_byte_order(tmp_path, dtype):
    stored = np.arange(60).reshape(SIZE).astype(dtype)
    picture = read(_nifti(tmp_path / "image.nii.gz", stored))
    assert picture.voxels.dtype == np.dtype(dtype).newbyteorder("=") and picture.voxels.dtype.isnative
    np.testing.assert_array_equal(picture.voxels[0], stored.T)


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8"])
def test_scaled_voxels_equal_those_of_itk(tmp_path, dtype):
    file = _nifti(tmp_path / "image.nii", np.arange(60).reshape(SIZE).astype(dtype))
    content = bytearray(file.read_bytes())
    struct.pack_into("<ff", content, 112, 0.37, -11.5)  # scl_slope, scl_inter
    file.write_bytes(content)
    itk = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    picture = read(file)
    assert itk[0, 0, 1] == pytest.approx(0.37 * 12 - 11.5)  # (1, 0, 0) was the 12th: the slope was used
    assert picture.voxels.dtype == itk.dtype
    np.testing.assert_array_equal(picture.voxels[0], itk)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti2_is_read_as_its_twin_in_nifti1(tmp_path, voxels, ending):
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(OBLIQUE, (3, 3)) * SPACING
    affine[:3, 3] = ORIGIN
    for order in "<>":
        twins = [_nifti(tmp_path / f"{kind.__name__}{ending}", voxels.T.astype(f"{order}f4"), kind, affine)
                 for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image)]
        first, second = (read(file) for file in twins)
        np.testing.assert_array_equal(second.voxels, voxels[None])
        assert second.geometry.size == SIZE
        for name in ("spacing", "origin", "direction"):
            np.testing.assert_allclose(getattr(second.geometry, name), getattr(first.geometry, name), atol=1e-6)
        assert [stands_alone(file) for file in twins] == [True, False]  # SimpleITK does not read the second


@pytest.mark.parametrize("unit", ["meter", "mm", "micron", "unknown"])
def test_units_of_nifti2_are_those_of_nifti1(tmp_path, unit):
    spacings = []
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        image = kind(np.zeros((3, 4, 5), np.float32), np.diag([200.0, 300.0, 400.0, 1.0]))
        image.header.set_xyzt_units(unit)
        image.to_filename(tmp_path / f"{kind.__name__}.nii")
        spacings.append(read(tmp_path / f"{kind.__name__}.nii").geometry.spacing)
    np.testing.assert_allclose(*spacings, rtol=1e-6)


def test_the_spacing_is_pixdims_where_the_affine_has_unit_scale(tmp_path, voxels):
    """As in ACDC: sform without scale, and no qform."""
    image = nibabel.Nifti1Image(voxels.T, None)
    image.header.set_sform(np.eye(4), code=1)
    image.header["qform_code"] = 0
    image.header["pixdim"][1:4] = (1.5, 1.5, 10)
    image.to_filename(tmp_path / "image.nii.gz")
    assert nibabel.load(tmp_path / "image.nii.gz").affine[2, 2] == 1  # that of nibabel is wrong
    assert read(tmp_path / "image.nii.gz").geometry.spacing == (1.5, 1.5, 10)


@pytest.mark.parametrize("ending", [*ITK, ".mhd"])
def test_voxels_that_are_not_finite_are_seen(tmp_path, voxels, ending):
    voxels[1, 2, 3], voxels[0, 1, 2] = np.nan, -np.inf
    found = read(_write(tmp_path / f"image{ending}", voxels, STRAIGHT)).voxels[0]
    assert np.isnan(found[1, 2, 3]) and found[0, 1, 2] == -np.inf and np.isfinite(found).sum() == 58


def test_a_tiff_stack_has_the_spacing_of_the_json_file_of_its_case(tmp_path):
    stack = np.random.default_rng(0).integers(0, 60000, (5, 6, 7)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a_0000.tif", stack)
    assert read(tmp_path / "a_0000.tif").geometry == Geometry((7, 6, 5), (1, 1, 1), (0, 0, 0), STRAIGHT)
    (tmp_path / "a.json").write_text(json.dumps({"spacing": [5, 2, 1.5]}))  # z, y, x
    np.testing.assert_array_equal(read(tmp_path / "a_0000.tif").voxels, stack[None])
    assert read(tmp_path / "a_0000.tif").geometry.spacing == (1.5, 2, 5)
    # a label's name has no channel, though the case's may look like one
    tifffile.imwrite(tmp_path / "a_2019.tiff", stack)
    assert read(tmp_path / "a_2019.tiff").geometry.spacing == (1.5, 2, 5)
    (tmp_path / "a_2019.json").write_text(json.dumps({"spacing": [4, 1, 1]}))
    assert read(tmp_path / "a_2019.tiff").geometry.spacing == (1, 1, 4)
    assert parts(tmp_path / "a_2019.tiff") == [tmp_path / "a_2019.tiff", tmp_path / "a_2019.json"]


def test_grey_and_coloured_pictures_have_one_channel_and_three(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    for ending in (".png", ".bmp"):
        skio.imsave(tmp_path / f"grey{ending}", colours[..., 0], check_contrast=False)
        skio.imsave(tmp_path / f"colours{ending}", colours, check_contrast=False)
        np.testing.assert_array_equal(read(tmp_path / f"grey{ending}").voxels, colours[None, None, ..., 0])
        np.testing.assert_array_equal(read(tmp_path / f"colours{ending}").voxels, colours.transpose(2, 0, 1)[:, None])
        assert read(tmp_path / f"grey{ending}").geometry.size == (7, 6, 1)
    tifffile.imwrite(tmp_path / "grey.tif", colours[..., 0])
    np.testing.assert_array_equal(read(tmp_path / "grey.tif").voxels, colours[None, None, ..., 0])


def test_endings_in_capitals_are_endings(tmp_path, voxels):
    _write(tmp_path / "image.nii.gz", voxels).rename(tmp_path / "IMAGE.NII.GZ")
    _write(tmp_path / "image.nrrd", voxels).rename(tmp_path / "IMAGE.NRRD")
    for name in ("IMAGE.NII.GZ", "IMAGE.NRRD"):
        np.testing.assert_array_equal(read(tmp_path / name).voxels, voxels[None])
        assert stands_alone(tmp_path / name)
    assert ending_of("IMAGE.NII.GZ") == ".NII.GZ" and ending_of("a/b.nii") == ".nii" and ending_of("a.jpg") is None
    assert {ending_of(f"x{ending}") for ending in ENDINGS} == set(ENDINGS)


# ---- what cannot be read --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("ending", [*ITK, ".tif", ".png"])
def test_a_file_that_was_cut_short_is_refused(tmp_path, ending, compress):
    stored = np.random.default_rng(0).integers(0, 60000, (6, 40, 50)).astype(np.uint16)
    file = tmp_path / f"image{ending}"
    if ending == ".tif":
        tifffile.imwrite(file, stored, compression="zlib" if compress else None)
    elif ending == ".png":
        skio.imsave(file, stored[0], check_contrast=False)
    else:
        _write(file, stored, STRAIGHT, compress)
    read(file)
    whole = file.read_bytes()
    for share in (0.3, 0.6, 0.9):  # TIFF ends with what describes the pages before
        file.write_bytes(whole[:int(share * len(whole))])
        _assert_unreadable(file, "")
    file.write_bytes(b"")
    _assert_unreadable(file, "")


def test_the_voxels_of_an_mhd_file_that_were_cut_short_are_refused(tmp_path, voxels):
    for compress, name in ((False, "image.raw"), (True, "image.zraw")):
        _write(tmp_path / "image.mhd", voxels, compress=compress)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:len(content) // 2])
        _assert_unreadable(tmp_path / "image.mhd", "")
        (tmp_path / name).unlink()
        _assert_unreadable(tmp_path / "image.mhd", "")


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_compressed_file_with_one_wrong_byte_is_refused(tmp_path, ending):
    stored = np.random.default_rng(0).integers(0, 9, (6, 40, 50)).astype(np.uint8)
    content = _write(tmp_path / f"image{ending}", stored, compress=True).read_bytes()
    for position in np.linspace(0.2, 0.95, 6):
        damaged = bytearray(content)
        damaged[int(position * len(content))] ^= 0x55
        (tmp_path / f"damaged{ending}").write_bytes(damaged)
        _assert_unreadable(tmp_path / f"damaged{ending}", "")


def test_a_wrong_checksum_is_named(tmp_path):
    file = _write(tmp_path / "image.nii.gz", np.random.default_rng(0).normal(size=(30, 40, 50)))
    content = bytearray(file.read_bytes())
    content[-8] ^= 1  # the first byte of the sum
    file.write_bytes(content)
    sitk.ReadImage(str(file))  # does not mind
    _assert_unreadable(file, "incorrect data check")


def test_a_gzip_file_of_several_streams_is_read_whole(tmp_path, voxels):
    """Tools that compress in parallel write such files, and tapes fill the end with zeros. Python's gzip reads both."""
    whole = _write(tmp_path / "image.nii", voxels).read_bytes()
    streams = [gzip.compress(whole[start:start + 50]) for start in range(0, len(whole), 50)]
    file = tmp_path / "image.nii.gz"
    for content in (b"".join(streams), b"".join(streams) + bytes(512), b"".join(streams) + bytes(2 ** 17)):
        file.write_bytes(content)
        assert gzip.decompress(content) == whole
        np.testing.assert_array_equal(read(file).voxels[0], voxels)
    file.write_bytes(b"".join(streams[:-1]))
    _assert_unreadable(file, "")
    file.write_bytes(b"".join(streams)[:-1])
    _assert_unreadable(file, "")
    file.write_bytes(b"".join(streams) + b"more")
    _assert_unreadable(file, "")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_the_voxels_of_a_nifti_file_are_in_memory_once(tmp_path, ending):
    stored = np.random.default_rng(0).integers(0, 2 ** 15, (60, 100, 100)).astype(np.int16)
    file = _write(tmp_path / f"image{ending}", stored, STRAIGHT)
    read(file)  # imports
    tracemalloc.start()
    try:
        voxels = read(file).voxels
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(voxels[0], stored)
    assert peak < 1.5 * stored.nbytes  # a growing buffer has a reserve of an eighth


@pytest.mark.parametrize("ending", [*ENDINGS, ".mhd", ".dcm"])
def test_a_text_is_no_image(tmp_path, ending):
    (tmp_path / f"image{ending}").write_text("You need to log in to see this page.\n" * 30)
    _assert_unreadable(tmp_path / f"image{ending}", "")


def test_what_is_not_there_and_a_folder_are_no_files(tmp_path):
    (tmp_path / "folder.nii.gz").mkdir()
    for name in ("folder.nii.gz", "none.nii", "none.mhd", "none.png"):
        with pytest.raises(InputError) as error:
            read(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name}: there is no such file"


def test_several_values_a_voxel_and_five_dimensions_are_refused(tmp_path, voxels):
    image = sitk.GetImageFromArray(np.zeros((3, 4, 5, 3), np.uint8), isVector=True)
    for ending in (".nii.gz", ".nrrd", ".mha"):
        sitk.WriteImage(image, str(tmp_path / f"colours{ending}"))
        with pytest.raises(InputError) as error:
            read(tmp_path / f"colours{ending}")
        assert str(error.value) == (f"{tmp_path}/colours{ending}: holds 3 values a voxel (colours?); nnU-Net needs a "
                                    f"file for each channel")
    colours = np.zeros(SIZE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(InputError, match="colours2.nii: holds .*; nnU-Net needs a file for each channel"):
        read(_nifti(tmp_path / "colours2.nii", colours, nibabel.Nifti2Image))
    with pytest.raises(InputError) as error:
        read(_nifti(tmp_path / "five.nii", np.zeros((5, 4, 3, 2, 2), np.int16)))
    assert str(error.value) == (f"{tmp_path / 'five.nii'}: is 5-dimensional; images have 2 or 3 dimensions, or 4 with "
                                f"the channels last")


@pytest.mark.parametrize("place", ["../outside.raw", "/etc/passwd", "..\\outside.raw", "LIST", "slice%03d.raw 1 3 1"])
@pytest.mark.parametrize("ending", [".mhd", ".mha", ".nrrd"])
def test_a_header_that_names_voxels_elsewhere_is_not_followed(tmp_path, voxels, ending, place):
    folder = tmp_path / "source"
    folder.mkdir()
    voxels.tofile(tmp_path / "outside.raw")
    nrrd = ("NRRD0004\ntype: float\ndimension: 3\nsizes: 5 4 3\nendian: little\nencoding: raw\n"
            f"data file: {place}\n")
    meta = ("ObjectType = Image\nNDims = 3\nDimSize = 5 4 3\nElementSpacing = 1 1 1\nElementType = MET_FLOAT\n"
            f"ElementDataFile = {place}\n")
    file = folder / f"image{ending}"
    file.write_text(nrrd if ending == ".nrrd" else meta)
    for function in (read, parts, stands_alone):
        with pytest.raises(InputError) as error:
            function(file)
        assert str(error.value) == (f"{file}: names {place!r} for its voxels, which is not one file beside it; write "
                                    f"the image anew, to one file")


@pytest.mark.parametrize("compress", [False, True])
def test_an_image_in_two_files_is_read_and_is_not_one_that_can_be_copied(tmp_path, voxels, compress):
    raw = "image.zraw" if compress else "image.raw"
    file = _write(tmp_path / "image.mhd", voxels, compress=compress)
    assert parts(file) == [file, tmp_path / raw] and not stands_alone(file)
    (tmp_path / "image.nrrd").write_text("NRRD0004\ntype: float\ndimension: 3\nsizes: 5 4 3\nendian: little\n"
                                         f"encoding: {'gzip' if compress else 'raw'}\ndata file: voxels\n")
    (tmp_path / "voxels").write_bytes(gzip.compress(voxels.tobytes()) if compress else voxels.tobytes())
    assert parts(tmp_path / "image.nrrd")[1] == tmp_path / "voxels" and not stands_alone(tmp_path / "image.nrrd")
    for name in ("image.mhd", "image.nrrd"):
        np.testing.assert_array_equal(read(tmp_path / name).voxels, voxels[None])
    for ending in (".nrrd", ".mha", ".nii.gz"):
        whole = _write(tmp_path / f"whole{ending}", voxels)
        assert parts(whole) == [whole] and stands_alone(whole)


# ---- the same grid --------------------------------------------------------------------------------------------------

def test_grids_within_the_tolerance_are_the_same_and_beyond_it_are_not():
    grid = Geometry(SIZE, SPACING, ORIGIN, OBLIQUE)
    # spacing: a thousandth; origin: a tenth of a voxel's edge, along an axis of the voxels; cosines: a thousandth
    along_x, along_z = np.array((0.8, 0.6, 0)), np.array((0, 0, 1))
    for share, differs in ((0.9, False), (1.1, True)):
        spacing = (0.75, 1.5 * (1 + share * 1e-3), 5.0)
        assert bool(grid.differences(Geometry(SIZE, spacing, ORIGIN, OBLIQUE))) == differs
        for axis, edge in ((along_x, 0.75), (along_z, 5.0)):
            origin = tuple(ORIGIN + share * 0.1 * edge * axis)
            assert bool(grid.differences(Geometry(SIZE, SPACING, origin, OBLIQUE))) == differs
        direction = (0.8 + share * 1e-3, *OBLIQUE[1:])
        assert bool(grid.differences(Geometry(SIZE, SPACING, ORIGIN, direction))) == differs


def test_a_shift_is_measured_along_the_axes_of_the_voxels():
    """Sagittal slices, 10 mm thick: the thick axis is the patient's x. There 0.9 mm is 0.09 of an edge, across 0.9."""
    grid = Geometry(SIZE, (1.0, 1.0, 10.0), (0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    assert grid.differences(Geometry(SIZE, grid.spacing, (0.9, 0.0, 0.0), grid.direction)) == []
    for origin in ((0.0, 0.9, 0.0), (0.0, 0.0, 0.9)):
        assert grid.differences(Geometry(SIZE, grid.spacing, origin, grid.direction)) == [
            f"origin (0.0, 0.0, 0.0) and {origin}"]


def test_differences_are_told_in_words_and_another_size_alone():
    grid = Geometry(SIZE, SPACING, ORIGIN, STRAIGHT)
    other = Geometry(SIZE, (0.75, 1.5, 6.0), (0.0, 0.0, 0.0), OBLIQUE)
    assert grid.differences(grid) == []
    assert grid.differences(other) == [
        "spacing (0.75, 1.5, 5.0) and (0.75, 1.5, 6.0)", "origin (-3.5, 11.25, 2.0) and (0.0, 0.0, 0.0)",
        "direction (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0) and (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)"]
    assert grid.differences(Geometry((5, 4, 2), (9, 9, 9), ORIGIN, OBLIQUE)) == ["size (5, 4, 3) and (5, 4, 2)"]
    flat = Geometry((5, 4), SPACING[:2], ORIGIN[:2], (1.0, 0.0, 0.0, 1.0))
    assert flat.differences(grid) == ["size (5, 4) and (5, 4, 3)"]


def test_what_nnunet_takes_for_equal_is_narrower():
    """np.allclose: 1e-5 of the value."""
    grid = Geometry(SIZE, SPACING, ORIGIN, OBLIQUE)
    for share, equal in ((1e-6, True), (1e-4, False)):
        for other in (Geometry(SIZE, tuple(np.multiply(SPACING, 1 + share)), ORIGIN, OBLIQUE),
                      Geometry(SIZE, SPACING, tuple(np.multiply(ORIGIN, 1 + share)), OBLIQUE),
                      Geometry(SIZE, SPACING, ORIGIN, tuple(np.multiply(OBLIQUE, 1 + share)))):
            assert grid.equals_for_nnunet(other) == equal and grid.differences(other) == []
    assert not grid.equals_for_nnunet(Geometry((5, 4, 2), SPACING, ORIGIN, OBLIQUE))


# ---- carrying over --------------------------------------------------------------------------------------------------

def test_a_copy_has_the_same_bytes_and_a_link_is_the_same_file(tmp_path):
    source = tmp_path / "image.nii.gz"
    source.write_bytes(os.urandom(3 * 2 ** 20 + 5))
    (tmp_path / "shortcut.nii.gz").symlink_to(source)
    for file in (source, tmp_path / "shortcut.nii.gz"):
        carry_over(file, tmp_path / "copy.nii.gz")
        carry_over(file, tmp_path / "link.nii.gz", link=True)
        assert (tmp_path / "copy.nii.gz").read_bytes() == source.read_bytes()
        assert (tmp_path / "copy.nii.gz").stat().st_ino != source.stat().st_ino
        assert (tmp_path / "link.nii.gz").stat().st_ino == source.stat().st_ino
        assert not (tmp_path / "link.nii.gz").is_symlink()
        (tmp_path / "copy.nii.gz").unlink()
        (tmp_path / "link.nii.gz").unlink()


def test_where_links_are_impossible_a_copy_is_made(tmp_path, monkeypatch):
    (tmp_path / "image.nii.gz").write_bytes(b"voxels")

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    carry_over(tmp_path / "image.nii.gz", tmp_path / "new.nii.gz", link=True)
    assert (tmp_path / "new.nii.gz").read_bytes() == b"voxels"
    assert (tmp_path / "new.nii.gz").stat().st_ino != (tmp_path / "image.nii.gz").stat().st_ino


@pytest.mark.parametrize("link", [False, True])
def test_a_file_is_never_written_over(tmp_path, link):
    (tmp_path / "image.nii.gz").write_bytes(b"new")
    (tmp_path / "there.nii.gz").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        carry_over(tmp_path / "image.nii.gz", tmp_path / "there.nii.gz", link)
    with pytest.raises(FileExistsError):
        write(tmp_path / "there.nii.gz", np.zeros((3, 4, 5), np.uint8), Geometry.plain((3, 4, 5), (1, 1, 1)))
    assert (tmp_path / "there.nii.gz").read_bytes() == b"old"


def test_the_spacing_of_a_tiff_image_comes_along_under_the_name_of_the_case(tmp_path):
    for name in ("a_0001.tif", "a_0001.json", "b_0000.tif", "b.json", "c.tif"):
        (tmp_path / name).write_text(name)
    new = tmp_path / "new"
    new.mkdir()
    for name, target in (("a_0001", "a_0001_0000"), ("b_0000", "b_0000"), ("c", "c_0000")):
        carry_over(tmp_path / f"{name}.tif", new / f"{target}.tif")
    assert {file.name: file.read_text() for file in new.iterdir()} == {
        "a_0001_0000.tif": "a_0001.tif", "a_0001.json": "a_0001.json", "b_0000.tif": "b_0000.tif", "b.json": "b.json",
        "c_0000.tif": "c.tif"}
    assert spacing_file(new / "b_0000.tif") == new / "b.json" and spacing_file(new / "b.tif") == new / "b.json"


# ---- writing --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64, ">i2", ">f4", bool, np.float16])
@pytest.mark.parametrize("ending", ITK)
def test_what_is_written_is_read_again(tmp_path, voxels, ending, dtype):
    stored = (10 * voxels).astype(dtype)
    grid = Geometry(SIZE, SPACING, ORIGIN, STRAIGHT if ending == ".gipl" else OBLIQUE)
    write(tmp_path / f"image{ending}", stored, grid)
    image = sitk.ReadImage(str(tmp_path / f"image{ending}"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), stored)
    assert image.GetSize() == SIZE
    np.testing.assert_allclose(image.GetSpacing(), SPACING)
    np.testing.assert_allclose(image.GetOrigin(), ORIGIN)
    np.testing.assert_allclose(image.GetDirection(), grid.direction, atol=1e-7)


def test_two_dimensions_are_written_as_two(tmp_path, voxels):
    for ending in (".nii.gz", ".nrrd", ".mha"):
        write(
            tmp_path / f"image{ending}", voxels[0], Geometry(SIZE[:2], SPACING[:2], ORIGIN[:2], (-1.0, 0.0, 0.0, 1.0))
        )
        image = sitk.ReadImage(str(tmp_path / f"image{ending}"))
        assert image.GetSize() == SIZE[:2] and image.GetOrigin() == ORIGIN[:2] and image.GetDirection() == (-1, 0, 0, 1)


def test_nan_can_be_written(tmp_path, voxels):
    voxels[0, 0, 0] = np.nan
    write(tmp_path / "image.mha", voxels, Geometry.plain(voxels.shape, (1, 1, 1)))
    assert np.isnan(read(tmp_path / "image.mha").voxels[0, 0, 0, 0])


def test_labels_are_written_as_tiff_stacks_and_pictures(tmp_path):
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
    label = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    write(tmp_path / "a.tif", label, Geometry.plain(label.shape, (5, 2, 1.5)))
    found, properties = Tiff3DIO().read_seg(str(tmp_path / "a.tif"))
    np.testing.assert_array_equal(found[0], label)
    assert properties["spacing"] == [5, 2, 1.5]
    for ending in (".png", ".bmp", ".tif"):
        write(tmp_path / f"flat{ending}", label[:1], Geometry.plain((1, 6, 7), (999, 1, 1)))
        np.testing.assert_array_equal(skio.imread(tmp_path / f"flat{ending}"), label[0])


def test_a_format_that_cannot_hold_the_grid_is_refused(tmp_path, voxels):
    with pytest.raises(OSError) as error:
        write(tmp_path / "image.gipl", voxels, Geometry(SIZE, SPACING, ORIGIN, OBLIQUE))
    assert str(error.value) == (
        f"{tmp_path / 'image.gipl'}: this format does not keep where the voxels lie: direction (1.0, 0.0, 0.0, 0.0, "
        f"1.0, 0.0, 0.0, 0.0, 1.0) and (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0); choose another")


@contextmanager
def _no_file_larger_than(size):
    """Python ignores the signal, so that writing more is an error, as on a disk that is full."""
    resource = pytest.importorskip("resource", reason="Windows has no limit of the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("ending", [*ITK, ".tif", ".png"])
def test_a_full_disk_is_noticed(tmp_path, ending):
    label = np.random.default_rng(0).integers(0, 250, (1 if ending == ".png" else 20, 60, 70)).astype(np.uint8)
    file = tmp_path / f"image{ending}"
    # ITK and others tell nothing; a file of 60 x 70 random bytes cannot be packed into 2000
    with _no_file_larger_than(2000), pytest.raises(OSError) as error:
        write(file, label, Geometry.plain(label.shape, (2, 1, 1)))
    assert error.value.errno == 27 or str(error.value).startswith(f"{file}: could not be written; is the disk full? (")


def test_voxels_that_came_back_changed_are_noticed(tmp_path, voxels, monkeypatch):
    from nnunet_confkd.data import images as volumes
    monkeypatch.setattr(sitk, "WriteImage", lambda image, *rest, write=sitk.WriteImage: write(image + 1, *rest))
    with pytest.raises(OSError) as error:
        volumes.write(tmp_path / "image.nrrd", voxels, Geometry.plain(voxels.shape, (1, 1, 1)))
    assert str(error.value) == f"{tmp_path / 'image.nrrd'}: was not written as it should be; is the disk full?"


def test_the_warnings_of_itk_are_as_before():
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    for setting in (True, False):
        sitk.ProcessObject.SetGlobalWarningDisplay(setting)
        with quiet():
            assert not sitk.ProcessObject.GetGlobalWarningDisplay()
        assert sitk.ProcessObject.GetGlobalWarningDisplay() == setting
    sitk.ProcessObject.SetGlobalWarningDisplay(before)


# ---- counting -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "dtype",
    [
        np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64, np.float16, np.float32,
        np.float64,
    ],
)
def test_voxels_of_each_value_are_counted_whatever_the_type_and_whatever_else_is_there(dtype):
    rng = np.random.default_rng(0)
    label = rng.integers(
        -1 if np.dtype(dtype).kind in "if" else 0, 130 if dtype != np.int8 else 127, (40, 30, 20)
    ).astype(dtype)
    strange = {
        "f": [np.nan, np.inf, -np.inf, 0.5, -0.5, 1e4],
        "i": [np.iinfo(dtype).max, np.iinfo(dtype).min] if np.dtype(dtype).kind == "i" else [],
        "u": [np.iinfo(dtype).max] if np.dtype(dtype).kind == "u" else [],
        "b": [],
    }[np.dtype(dtype).kind]
    label[0, 0, :len(strange)] = strange
    for values in (range(-1, 119), [0, 1, 2, 255], [3, -1], [0], [], [0, 32767], [-5, 2 ** 40]):
        counts = count_voxels(label[:, ::-1, ::2], values)  # not contiguous
        assert counts == {value: int(np.sum(label[:, ::-1, ::2] == value)) for value in values}
        assert all(type(count) is int for count in counts.values())


def test_more_voxels_than_are_counted_at_a_time_are_all_counted():
    label = np.zeros((3, 2 ** 20 + 5), np.uint8)
    label[1, -7:], label[2, 3] = 1, 2
    assert count_voxels(label, [0, 1, 2]) == {0: label.size - 8, 1: 7, 2: 1}


@pytest.mark.parametrize("dtype", "?bBhHiIlfd")
def test_the_values_are_those_of_numpys_unique(dtype):
    rng = np.random.default_rng(1)
    voxels = rng.integers(-3, 90, (3, 2 ** 20 // 2 + 7)).astype(dtype)
    voxels[1] = 0  # a part without anything
    for of in (voxels, voxels[:, ::-1], voxels[1:2], voxels[:, :0]):
        found = values_in(of)
        assert found.dtype == of.dtype
        np.testing.assert_array_equal(found, np.unique(of))


def test_counting_many_values_takes_no_pass_for_each():
    class Watched(np.ndarray):
        voxels = 0  # that any operation has looked at

        def __array_ufunc__(self, ufunc, method, *inputs, **options):
            Watched.voxels += max(np.size(i) for i in inputs)
            plain = [i.view(np.ndarray) if isinstance(i, Watched) else i for i in inputs]
            return getattr(ufunc, method)(*plain, **options)

    label = np.random.default_rng(0).integers(0, 119, (50, 50, 50)).astype(np.int16)
    assert count_voxels(label.view(Watched), range(119)) == dict(enumerate(np.bincount(label.ravel()).tolist()))
    assert Watched.voxels < 10 * label.size
