"""Images under the names that nnU-Net needs."""
from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import VOXELS, write_series

from nnunet_confkd.errors import InputError
from nnunet_confkd.inference.inputs import Predicted, cases_of, readable_images

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
