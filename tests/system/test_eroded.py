"""Eroded masks, as a user has them: by default the teacher completes them, and every command knows of it."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from image_files import read_voxels
from scipy import ndimage

from nnunet_confkd import cli
from nnunet_confkd.training.names import COMPLETED_LABELS

DATASET, IGNORE = "Dataset302_Eroded", 255
pytestmark = pytest.mark.usefixtures("thread_pools")


def write_case(folder: Path, name: str, seed: int, eroded: bool) -> None:
    """Write a bright ball in noise. Of an eroded one, the inside and what is far away are annotated."""
    rng = np.random.default_rng(seed)
    grid = np.indices((16, 16, 16))
    ball = (((grid.T - rng.integers(7, 10, 3)).T ** 2).sum(0) < rng.integers(26, 34)).astype(np.uint8)
    label = ball
    if eroded:
        label = np.full_like(ball, IGNORE)
        label[ndimage.binary_erosion(ball, iterations=3)] = 1
        label[~ndimage.binary_dilation(ball, iterations=2)] = 0
    for sub, array in (("images", (ball + rng.normal(0, 0.3, ball.shape)).astype(np.float32)), ("labels", label)):
        file = folder / sub / f"{name}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(file))


def test_eroded_masks_are_completed_in_the_training_and_every_command_knows_it(nnunet, tmp_path, capsys):
    for kind, count in (("full", 4), ("eroded", 3), ("new", 1)):
        for k in range(count):
            write_case(tmp_path / kind, f"{kind}{k}", len(kind) + 10 * k, kind == "eroded")

    def say(*words: str) -> str:
        assert cli.main(list(words)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    say("mix", "--full", str(tmp_path / "full"), "--partial", str(tmp_path / "eroded"), "--labels", "background",
        "ball", "--channels", "CT", "--ignore-value", str(IGNORE), "--id", "302", "--name", "Eroded",
        "--processes", "1")
    assert not cli.main(["plan", "-d", "302", "-c", "3d_fullres", "-np", "1", "-npfp", "1"])
    name = nnunet.configure(DATASET, "3d_eroded", "3d_fullres", {
        "weight_kl": None, "epochs": 4, "iterations_per_epoch": 3, "seed": 0}, features=(4, 4, 8), batch_size=2,
        max_patch=16, convolutions=1)
    fold = nnunet.train(DATASET, name)
    log = "".join(file.read_text() for file in fold.glob("training_log_*.txt"))
    assert "complete_at 0.25" in log and "The teacher completes the labels of 3 training cases" in log
    assert "From epoch 1 on the student alone is trained" in log and "completing eroded2 (3 of 3)" in log
    settings = json.loads((fold.parent / "plans.json").read_text())["configurations"][name]["confkd"]
    assert (settings["complete_at"], settings["weight_kl"], settings["teacher_trains_encoder"]) == (0.25, 0, None)
    assert len(list((fold / COMPLETED_LABELS).glob("*.b2nd"))) == 3

    model, images = str(fold.parent), tmp_path / "images"
    images.mkdir()
    (tmp_path / "new" / "images" / "new0.nii.gz").rename(images / "new0_0000.nii.gz")
    for branch in ("student", "teacher"):
        say("predict", "-m", model, "-i", str(images), "-o", str(tmp_path / branch), "-f", "0", "-device", "cpu",
            "-npp", "1", "-nps", "1", "--branch", branch)
        assert read_voxels(tmp_path / branch / "new0.nii.gz").shape == (16, 16, 16)
    say("complete", "-d", "302", "--model", model, "--fold", "0", "--branch", "teacher", "--id", "303", "-device",
        "cpu", "--processes", "1")
    (completed,) = nnunet.raw(DATASET).parent.glob("Dataset303_*")
    for case in ("eroded0", "eroded1", "eroded2"):
        before, after = (read_voxels(folder / "labelsTr" / f"{case}.nii.gz")
                         for folder in (nnunet.raw(DATASET), completed))
        assert np.array_equal(after[before != 2], before[before != 2]) and not (after == 2).any()
    say("report", "--model", model, "--output", str(tmp_path / "report"), "-device", "cpu")
    assert "2 decoders" in "".join(file.read_text() for file in (tmp_path / "report").rglob("*.html"))
    say("export", "--model", model, "--output", str(tmp_path / "stock"))
    assert not (tmp_path / "stock" / "fold_0" / "checkpoint_teacher.pth").exists()
    # a new training starts from these weights, and has both of its stages
    again = nnunet.train(DATASET, name, pretrained_weights=str(fold / "checkpoint_final.pth"))
    log = max(again.glob("training_log_*.txt")).read_text()
    assert log.count("The teacher completes the labels of 3 training cases") == 1
