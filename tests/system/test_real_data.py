"""The main job on real data: MSD Hippocampus (5 fully annotated cases, the others with points or nothing), ACDC (expert
scribbles) and BraTS (nested regions)."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_confkd import cli
from nnunet_confkd.inference.export import export

HIPPOCAMPUS = "Dataset004_Hippocampus"
ACDC = "Dataset027_ACDC"


@pytest.fixture(scope="module")
def trained(nnunet, hippocampus):
    """The folder of a fold that was trained for a thousand iterations of a small plan, from mixed supervision."""
    settings = {"epochs": 10, "iterations_per_epoch": 100, "seed": 0, "weight_entropy": 0.05}
    configuration = nnunet.configure(HIPPOCAMPUS, "2d_learns", "2d", settings, features=(16, 32, 64), batch_size=8,
                                     max_patch=56)
    return nnunet.train(HIPPOCAMPUS, configuration)


@pytest.mark.slow  # a thousand iterations
def test_the_student_learns_and_keeps_up_with_its_teacher(trained):
    """A wrong sign, a detached student or a teacher that is fed nothing would be noticed here."""
    curves = torch.load(trained / "checkpoint_final.pth", weights_only=False)["logging"]
    student, teacher = (json.loads((trained / folder / "summary.json").read_text())["foreground_mean"]["Dice"]
                        for folder in ("validation", "validation_teacher"))
    first = curves["mean_fg_dice"][0]
    print(f"student {first:.3f} after the first epoch, {student:.3f} at the end; teacher {teacher:.3f}")
    # Measured: 0.46 and 0.52. Seeds differ by 0.2, and mutations leave almost nothing.
    assert student > first + 0.2 and teacher > 0.2 and student > teacher - 0.2
    assert curves["loss_teacher"][-1] < curves["loss_teacher"][0]
    assert 0 < curves["loss_entropy"][-1] < 0.7 * curves["loss_entropy"][0]
    assert curves["student_confidence"][-1] > curves["student_confidence"][0]
    # The student has come to agree with its teacher: a KL of the wrong sign would drive them apart. The KL begins after
    # a fifth of the epochs.
    assert curves["loss_kl"][:2] == [0, 0] and 0 < curves["loss_kl"][-1] < 2 * curves["loss_kl"][2]


@pytest.fixture(scope="module")
def acdc(nnunet, test_data) -> dict[str, list[str]]:
    """The cases, by role: three frames with full masks, of which one validates, and three with expert scribbles."""
    raw = nnunet.raw(ACDC)
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / folder).mkdir(parents=True)
    roles = {"full": ["patient001_frame01", "patient001_frame12"], "validation": ["patient002_frame01"],
             "partial": ["patient003_frame01", "patient003_frame15", "patient004_frame01"]}
    for role, cases in roles.items():
        for case in cases:
            patient = test_data / "acdc" / "training" / case[:10]
            shutil.copyfile(patient / f"{case}.nii.gz", raw / "imagesTr" / f"{case}_0000.nii.gz")
            label = (test_data / "acdc_scribbles" / f"{case}_scribble.nii.gz" if role == "partial"
                     else patient / f"{case}_gt.nii.gz")
            image = sitk.ReadImage(str(patient / f"{case}.nii.gz"))
            out = sitk.GetImageFromArray(sitk.GetArrayFromImage(sitk.ReadImage(str(label))).astype(np.uint8))
            out.CopyInformation(image)
            sitk.WriteImage(out, str(raw / "labelsTr" / f"{case}.nii.gz"))
    shutil.copyfile(raw / "imagesTr" / "patient002_frame01_0000.nii.gz", raw / "imagesTs" / "held_back_0000.nii.gz")
    (raw / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "cineMRI"}, "labels": {"background": 0, "RV": 1, "MLV": 2, "LVC": 3, "ignore": 4},
        "numTraining": 6, "file_ending": ".nii.gz"}))
    return roles


@pytest.mark.parametrize("base", ["2d", pytest.param("3d_fullres", marks=pytest.mark.slow)])
def test_acdc_trains_predicts_and_exports(nnunet, acdc, base, tmp_path):
    nnunet.prepare(ACDC, [base], {"train": acdc["full"] + acdc["partial"], "val": acdc["validation"]})
    configuration = nnunet.configure(ACDC, f"{base}_short", base, {"epochs": 1, "iterations_per_epoch": 2, "seed": 0},
                                     batch_size=2, max_patch=128)
    if base != "2d":
        # ACDC's slices are few and thick, so there is no pooling along them.
        file = nnunet.preprocessed(ACDC) / "nnUNetPlans.json"
        plans = json.loads(file.read_text())
        plans["configurations"][configuration]["patch_size"] = [12, 256, 224]
        architecture = plans["configurations"][configuration]["architecture"]
        architecture["arch_kwargs"]["strides"] = [[1, 1, 1], [1, 2, 2], [1, 2, 2]]
        file.write_text(json.dumps(plans))
    fold = nnunet.train(ACDC, configuration)
    kinds = json.loads((fold / "confkd.json").read_text())["supervision"]
    assert kinds == {case: role for role in ("full", "partial") for case in acdc[role]}
    model = nnunet.model(ACDC, configuration)
    images = ["-i", str(nnunet.raw(ACDC) / "imagesTs"), "-f", "0", "-device", "cpu", "--disable_tta"]
    assert cli.main(["predict", *images, "-o", str(tmp_path / "plugin"), "-d", "27", "-c", configuration,
                     "-npp", "0", "-nps", "0"]) == 0
    stock_model = export(model, tmp_path / "stock")
    assert cli.main(["predict", *images, "-o", str(tmp_path / "exported"), "-m", str(stock_model),
                     "-npp", "1", "-nps", "1"]) == 0  # nnU-Net's command for model folders needs a process of each
    image = sitk.ReadImage(str(nnunet.raw(ACDC) / "imagesTs" / "held_back_0000.nii.gz"))
    plugin, exported = (sitk.ReadImage(str(tmp_path / f / "held_back.nii.gz")) for f in ("plugin", "exported"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(plugin), sitk.GetArrayFromImage(exported))
    assert plugin.GetSpacing() == pytest.approx(image.GetSpacing()) and plugin.GetSize() == image.GetSize()


@pytest.mark.slow  # images of 155 x 240 x 240 voxels
def test_the_nested_regions_of_brats_from_published_files_to_a_prediction(nnunet, test_data, tmp_path, capfd):
    """One case trains with its full mask, one with scribbles, and one validates, at 4 mm."""
    for command in (f"convert brats --source {test_data / 'brats2015'} --id 21 --processes 1",
                    "weaken --source 21 --id 22 --name BraTSMixed --full 1 --style scribbles --processes 1",
                    "plan -d 22 -c 3d_fullres -np 1 -npfp 1 -overwrite_target_spacing 4 4 4 "
                    "-overwrite_plans_name nnUNetPlans"):
        assert cli.main(command.split()) == 0, capfd.readouterr().err
    dataset = "Dataset022_BraTSMixed"
    settings = {"epochs": 2, "iterations_per_epoch": 10, "seed": 0, "kl_ramp_start": 0.0, "kl_ramp_end": 0.0}
    configuration = nnunet.configure(dataset, "small", "3d_fullres", settings, batch_size=2)
    fold = nnunet.train(dataset, configuration)
    supervision = json.loads((fold / "confkd.json").read_text())["supervision"]
    assert sorted(supervision.values()) == ["full", "partial"]
    curves = torch.load(fold / "checkpoint_final.pth", weights_only=False)["logging"]
    assert all(curves[f"loss_{branch}"][1] < curves[f"loss_{branch}"][0] for branch in ("teacher", "student"))
    assert all(np.isfinite(curves[f"loss_{term}"]).all() and curves[f"loss_{term}"][1] > 0
               for term in ("kl", "entropy"))
    for folder in ("validation", "validation_teacher"):
        measured = json.loads((fold / folder / "summary.json").read_text())
        assert set(measured["mean"]) == {"(1, 2, 3, 4)", "(2, 3, 4)", "(4,)"}
        labels = sitk.GetArrayFromImage(sitk.ReadImage(measured["metric_per_case"][0]["prediction_file"]))
        assert labels.shape == (155, 240, 240) and set(np.unique(labels)) <= {0, 1, 2, 4}
