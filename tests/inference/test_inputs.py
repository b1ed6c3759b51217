"""Images under the names that nnU-Net needs."""
from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import VOXELS, write_series
from image_files import write_image

from nnunet_confkd.errors import InputError
from nnunet_confkd.inference.inputs import (
    Predicted,
    cases_of,
    readable_images,
    require_other_files,
    require_readable,
)

ONE_CHANNEL = {"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}
TWO_CHANNELS = {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".nii.gz"}


def test_a_model_of_several_channels_tells_the_names_that_it_needs(tmp_path):
    (tmp_path / "a.nii.gz").touch()
    both = r"CASE_0000\.nii\.gz \(T1\), CASE_0001\.nii\.gz \(T2\)"
    for source in (tmp_path, tmp_path / "a.nii.gz"):
        with pytest.raises(InputError, match=rf"a\.nii\.gz does not end with the number of a channel\. Name .* {both}"):
            with readable_images(source, TWO_CHANNELS):
                pass
    (tmp_path / "a.nii.gz").rename(tmp_path / "a_0000.nii.gz")
    with pytest.raises(InputError, match=rf"1 case\(s\) do not have all 2 channels: a\. Name .* {both}"):
        with readable_images(tmp_path, TWO_CHANNELS):
            pass
    (tmp_path / "a_0001.nii.gz").touch()
    with readable_images(tmp_path, TWO_CHANNELS) as images:
        assert images == tmp_path


def test_numbers_that_are_no_channels_belong_to_the_name_and_hidden_files_are_left_out(tmp_path):
    for name in ("scan_2019.nii.gz", "scan_2020.nii.gz", "._scan_2020.nii.gz"):
        (tmp_path / name).write_text(name)
    with readable_images(tmp_path, ONE_CHANNEL) as images:
        assert {file.name: file.read_text() for file in images.iterdir()} == {
            "scan_2019_0000.nii.gz": "scan_2019.nii.gz", "scan_2020_0000.nii.gz": "scan_2020.nii.gz"}
    assert not images.exists()
    for name in ("2019", "2020"):
        (tmp_path / f"scan_{name}.nii.gz").rename(tmp_path / f"scan{name}_0000.nii.gz")
    with readable_images(tmp_path, ONE_CHANNEL) as images:  # which nnU-Net would take for an image
        assert sorted(file.name for file in images.iterdir()) == ["scan2019_0000.nii.gz", "scan2020_0000.nii.gz"]


def test_where_links_are_not_permitted_images_are_copied_with_what_belongs_to_them(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("privilege not held")

    (tmp_path / "a.tif").write_text("image")
    (tmp_path / "a.json").write_text('{"spacing": [1, 1, 1]}')
    for links in (True, False):
        if not links:
            monkeypatch.setattr("pathlib.Path.symlink_to", refused)
        with readable_images(tmp_path / "a.tif", ONE_CHANNEL | {"file_ending": ".tif"}) as images:
            linked = {file.name: file.read_text() for file in images.iterdir()}
            assert linked == {"a_0000.tif": "image", "a.json": '{"spacing": [1, 1, 1]}'}
            assert (images / "a_0000.tif").is_symlink() == links
    header = b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 1 1 1\nencoding: raw\ndata file: b.raw\n\n"
    (tmp_path / "b.nrrd").write_bytes(header)
    (tmp_path / "b.raw").write_bytes(b"x")
    with readable_images(tmp_path / "b.nrrd", ONE_CHANNEL | {"file_ending": ".nrrd"}) as images:
        assert sorted(file.name for file in images.iterdir()) == ["b.raw", "b_0000.nrrd"]


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_images_that_were_cut_short_are_named_before_the_prediction(tmp_path, ending):
    described = ONE_CHANNEL | {"file_ending": ending}
    for name in ("a_0000", "b_0000", "c_0000"):
        write_image(tmp_path / f"{name}{ending}", np.random.default_rng(0).normal(size=(6, 7, 8)))
    require_readable(tmp_path, described)
    for name in ("a_0000", "c_0000"):
        file = tmp_path / f"{name}{ending}"
        file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"2 images; nothing was predicted:\n.*a_0000.* cannot be read(.|\n)*c_0000"):
        require_readable(tmp_path, described)
    require_readable(tmp_path, described, slice(1, None, 2))  # what another process predicts


def test_an_image_of_four_dimensions_becomes_one_of_each_channel(tmp_path):
    channels = [sitk.GetImageFromArray(np.full((3, 4, 5), value, np.float32)) for value in (1, 2)]
    for channel in channels:
        channel.SetSpacing((1, 2, 3))
    sitk.WriteImage(sitk.JoinSeries(channels), str(tmp_path / "a.nii.gz"))
    for name in ("a.nii.gz", "a_0000.nii.gz"):
        (tmp_path / "a.nii.gz").rename(tmp_path / name)
        with readable_images(tmp_path, TWO_CHANNELS) as images:
            require_readable(images, TWO_CHANNELS)
            for number in (0, 1):
                image = sitk.ReadImage(str(images / f"a_{number:04d}.nii.gz"))
                assert image.GetSpacing() == (1, 2, 3)
                assert (sitk.GetArrayFromImage(image) == number + 1).all()
        (tmp_path / name).rename(tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").rename(tmp_path / "a_0000.nii.gz")
    (tmp_path / "a_0001.nii.gz").write_bytes((tmp_path / "a_0000.nii.gz").read_bytes())
    with readable_images(tmp_path, TWO_CHANNELS) as images, pytest.raises(InputError, match="a_0001.*holds 2 channels"):
        require_readable(images, TWO_CHANNELS)


# ---- DICOM ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_series_become_images_of_the_model_s_format_on_their_grid(tmp_path, ending):
    for case in ("p1", "p2"):
        write_series(tmp_path / "in" / case)
    series = sitk.ImageSeriesReader()
    series.SetFileNames(series.GetGDCMSeriesFileNames(str(tmp_path / "in" / "p1")))
    grid = series.Execute()
    for source, names in ((tmp_path / "in", ["p1", "p2"]), (tmp_path / "in" / "p2", ["p2"])):
        with readable_images(source, ONE_CHANNEL | {"file_ending": ending}) as images:
            assert sorted(file.name for file in images.iterdir()) == [f"{name}_0000{ending}" for name in names]
            for file in cases_of(images, ending).values():
                image = sitk.ReadImage(str(file))
                assert np.array_equal(sitk.GetArrayFromImage(image), VOXELS)
                for method in ("GetOrigin", "GetSpacing", "GetDirection"):
                    assert np.allclose(getattr(image, method)(), getattr(grid, method)(), atol=1e-5)
        assert not images.exists()


def test_images_beside_dicom_are_the_images_and_what_is_left_out_is_named(tmp_path, capsys):
    write_series(tmp_path / "in" / "p1", VOXELS[:2])
    for name in ("a.nii.gz", "b.nii", "c.NII.GZ", "d.nrrd", "notes.txt"):
        (tmp_path / "in" / name).touch()
    with readable_images(tmp_path / "in", ONE_CHANNEL) as images:
        assert list(cases_of(images, ".nii.gz")) == ["a"]
    printed = capsys.readouterr().out
    assert "4 images left out" in printed and ": b.nii, c.NII.GZ, d.nrrd, p1." in printed and "notes" not in printed
    for name in ("b.nii", "c.NII.GZ", "d.nrrd"):
        (tmp_path / "in" / name).unlink()
    (tmp_path / "in" / "p1").rename(tmp_path / "p1")
    with readable_images(tmp_path / "in", ONE_CHANNEL):
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize("source, described, expected", [
    ("in", TWO_CHANNELS, r"holds DICOM series, and the model needs 2 channels, T1, T2, of which a series is one"),
    ("in", ONE_CHANNEL | {"file_ending": ".png"}, r"holds DICOM series, and the model's images end with \.png"),
    ("in/p1/0.dcm", ONE_CHANNEL, r"0\.dcm: is one file of DICOM; give the folder of its series: -i .*in/p1$")])
def test_series_that_do_not_fit_the_model_are_one_sentence(tmp_path, source, described, expected):
    write_series(tmp_path / "in" / "p1", VOXELS[:2])
    with pytest.raises(InputError, match=expected), readable_images(tmp_path / source, described):
        pass


def test_a_series_that_lacks_slices_is_named(tmp_path):
    write_series(tmp_path / "in" / "p1", left_out=(2,))
    with pytest.raises(InputError, match="p1: its slices are 3 to 6 mm apart"), readable_images(
            tmp_path / "in", ONE_CHANNEL):
        pass


def test_predicted_segmentations_without_foreground_are_named(tmp_path):
    files = {}
    for case, value in (("a", 0), ("b", 1), ("c", 0)):
        files[case] = tmp_path / f"{case}.nii.gz"
        voxels = np.zeros((3, 4, 5), np.uint8)
        voxels[1, 2, 3] = value
        sitk.WriteImage(sitk.GetImageFromArray(voxels), files[case])

    def warning(*cases: str) -> str | None:
        return Predicted({}, {case: files[case] for case in cases}, tmp_path, tmp_path, {}).warning_of_empty()

    assert warning("b") is None and warning() is None
    assert "2 of 3 predicted segmentations have no foreground: a, c. Was" in warning("a", "b", "c")


@pytest.mark.parametrize("source, output", [("p01.nii.gz", "."), (".", "."), (".", "other")])
def test_a_prediction_is_never_written_over_an_image(tmp_path, source, output):
    folder = tmp_path / "scans"
    (folder / "other").mkdir(parents=True)
    for name in ("p01", "p02"):
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 3, 4), np.float32)), str(folder / f"{name}.nii.gz"))
    if output == "other":  # a link to the image, through which SimpleITK writes
        (folder / "other" / "p02.nii.gz").symlink_to(folder / "p02.nii.gz")
    with readable_images(folder / source, ONE_CHANNEL) as images:
        with pytest.raises(InputError, match=r"written over the images themselves: .*p0"):
            require_other_files(folder / source, images, folder / output, ".nii.gz")
        require_other_files(folder / source, images, folder / "new", ".nii.gz")


def test_a_prediction_of_one_image_is_not_written_over_the_label_beside_it(tmp_path):
    for name in ("p01_0000", "p01"):
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 3, 4), np.float32)), str(tmp_path / f"{name}.nii.gz"))
    image = tmp_path / "p01_0000.nii.gz"
    with readable_images(image, ONE_CHANNEL) as images:
        with pytest.raises(InputError, match=r"written over a file beside the image: .*p01\.nii\.gz"):
            require_other_files(image, images, tmp_path, ".nii.gz")
        (tmp_path / "p01.nii.gz").unlink()
        require_other_files(image, images, tmp_path, ".nii.gz")


def test_names_with_channels_leave_room_for_predictions_in_the_same_folder(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 3, 4), np.float32)), str(tmp_path / "p01_0000.nii.gz"))
    with readable_images(tmp_path, ONE_CHANNEL) as images:
        require_other_files(tmp_path, images, tmp_path, ".nii.gz")


@pytest.mark.parametrize("names", [("a_0000.png", "b_0000.png"), ("a.png", "b.png")])
def test_pictures_hold_all_colours_in_one_file(tmp_path, names):
    colours = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}
    for name in names:
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 6, 3), np.uint8), isVector=True), str(tmp_path / name))
    with readable_images(tmp_path, colours) as images:
        assert sorted(file.name for file in images.iterdir()) == ["a_0000.png", "b_0000.png"]
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 6), np.uint8)), str(tmp_path / names[0]))  # grey
    with pytest.raises(InputError, match="a"), readable_images(tmp_path, colours):
        pass


def test_a_dicom_series_is_found_beside_other_files_and_a_folder_without_one_is_named(tmp_path, capsys):
    for patient, stray in (("p1", None), ("p2", "Thumbs.db"), ("p3", "README.txt")):
        write_series(tmp_path / patient)
        if stray:
            (tmp_path / patient / stray).write_bytes(b"not an image")
    (tmp_path / "p4").mkdir()
    (tmp_path / "p4" / "notes.txt").write_text("none")
    with readable_images(tmp_path, ONE_CHANNEL) as images:
        assert list(cases_of(images, ".nii.gz")) == ["p1", "p2", "p3"]
    assert "1 folder left out, because no file in it is an image in DICOM: p4" in capsys.readouterr().out


def test_the_cases_of_other_parts_are_left_to_them(tmp_path):
    for case in "abc":
        for name in (f"in/{case}_0000.nii.gz", f"out/{case}.nii.gz"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(np.ones((2, 3, 4), np.uint8)), str(tmp_path / name))
    whole = tmp_path / "out" / "b.nii.gz"
    whole.write_bytes(whole.read_bytes()[:-20])  # another part is writing it
    described = {"file_ending": ".nii.gz"}
    of_part = Predicted.of(tmp_path / "in", tmp_path, tmp_path / "out", described, part=slice(0, None, 2))
    assert list(of_part.segmentations) == ["a", "c"] and of_part.warning_of_empty() is None
