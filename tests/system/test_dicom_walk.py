"""A walk of a new user: a model, and a DICOM folder to predict."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import write_series
from image_files import read_voxels
from nnunetv2.postprocessing.remove_connected_components import determine_postprocessing

from nnunet_confkd import cli

SPACING = (1.0, 1.0, 1.0)
COMMAND = ["predict", "-d", "4", "-c", "2d_export", "-f", "0", "-npp", "0", "-nps", "0", "-device", "cpu",
           "--disable_tta"]


@pytest.fixture
def scans(nnunet, hippocampus, tmp_path):
    """Two held-back images as DICOM, a folder for each patient; {patient: voxels}."""
    voxels = {}
    for patient, case in zip(("Patient 1", "patient_2"), hippocampus["test"]):
        image = read_voxels(nnunet.raw("Dataset004_Hippocampus") / "imagesTs" / f"{case}_0000.nii.gz")
        voxels[patient] = np.round(image / image.max() * 1000).astype(np.int16)
        write_series(tmp_path / "scans" / patient / "series", voxels[patient], spacing=SPACING)
    return voxels


def test_a_dicom_folder_is_predicted_on_the_grid_of_its_series(scans, hippocampus_model, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main([*COMMAND, "-i", str(tmp_path / "scans"), "-o", str(output), "--save-entropy", "--preview"]) == 0
    said = capsys.readouterr().out
    assert "these predictions are raw, and the model has no post-processing" in said
    assert f"preview: {output / 'preview' / 'index.html'}" in said
    assert sorted(file.name for file in output.glob("*.nii.gz")) == ["Patient 1.nii.gz", "patient_2.nii.gz"]
    for patient, voxels in scans.items():
        series = sitk.ImageSeriesReader()
        series.SetFileNames(series.GetGDCMSeriesFileNames(str(tmp_path / "scans" / patient / "series")))
        grid, predicted = series.Execute(), sitk.ReadImage(str(output / f"{patient}.nii.gz"))
        assert sitk.GetArrayFromImage(predicted).shape == voxels.shape
        for method in ("GetOrigin", "GetSpacing", "GetDirection"):
            assert np.allclose(getattr(predicted, method)(), getattr(grid, method)(), atol=1e-4)
    record = json.loads((output / "predict_from_raw_data_args.json").read_text())
    assert record["list_of_lists_or_source_folder"] == str(tmp_path / "scans")

    first = json.loads((output / "uncertainty" / "review_first.json").read_text())["cases"][0]["case"]
    page = (output / "preview" / "index.html").read_text()
    assert f"<h3>1. {first}</h3>" in page and len(list((output / "preview").glob("*.png"))) == 2

    # the same as of the images that mix would write
    for patient, voxels in scans.items():
        image = sitk.GetImageFromArray(voxels)
        image.CopyInformation(sitk.ReadImage(str(output / f"{patient}.nii.gz")))
        sitk.WriteImage(image, str(tmp_path / f"{patient}.nii.gz"))
        alone = tmp_path / f"alone {patient}"
        assert cli.main([*COMMAND, "-i", str(tmp_path / f"{patient}.nii.gz"), "-o", str(alone)]) == 0
        assert np.array_equal(read_voxels(alone / f"{patient}.nii.gz"), read_voxels(output / f"{patient}.nii.gz"))


@pytest.mark.usefixtures("thread_pools")
def test_post_processing_is_applied_on_request(scans, hippocampus_model, nnunet, tmp_path, capsys):
    folder = shutil.copytree(hippocampus_model / "fold_0" / "validation", tmp_path / "validation")
    truth = nnunet.preprocessed("Dataset004_Hippocampus") / "gt_segmentations"
    determine_postprocessing(str(folder), str(truth), str(hippocampus_model / "plans.json"),
                             str(hippocampus_model / "dataset.json"), 1, False)
    assert cli.main([*COMMAND, "-i", str(tmp_path / "scans" / "patient_2"), "-o", str(tmp_path / "out"),
                     "--postprocessing", str(folder)]) == 0
    raw = tmp_path / "out" / "series.nii.gz"  # the folder in that of the patient
    assert "post-processed predictions: " in capsys.readouterr().out and raw.is_file()
    assert read_voxels(tmp_path / "out" / "postprocessed" / raw.name).shape == scans["patient_2"].shape
