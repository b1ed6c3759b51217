"""Walks of a new user: a data set that stock nnU-Net has split, and a laptop without CUDA."""
from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from image_files import read_json, read_voxels
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.utilities.crossval_split import generate_crossval_split
from scipy import ndimage

from nnunet_confkd import cli, nnunet_commands
from nnunet_confkd.commands import run
from nnunet_confkd.data import small_configuration
from nnunet_confkd.training.trainer import ConfKDTrainer

HIPPOCAMPUS = "Dataset004_Hippocampus"


@pytest.fixture
def quick(monkeypatch, thread_pools):
    """Make planning and training as short as they can be; all else is as the user has it."""
    monkeypatch.setattr(DatasetFingerprintExtractor, "num_foreground_voxels_for_intensitystats",
                        property(lambda self: 1e6, lambda self, value: None), raising=False)
    monkeypatch.setitem(small_configuration.LENGTHS, 2, {"epochs": 2, "iterations_per_epoch": 2})


@pytest.fixture
def say(capsys):
    """Run a command that must end well; return what it prints."""
    def run_command(command: str, status: int = 0) -> str:
        assert cli.main(shlex.split(command)[1:]) == status, capsys.readouterr().err
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return out
    return run_command


# ---- (3) an nnU-Net data set with an ignore label and stock nnU-Net's split ------------------------------------------

@pytest.fixture
def split_by_nnunet(nnunet, hippocampus, tmp_path, monkeypatch):
    """The raw data set, and the folds that nnUNetv2_train writes: of all cases, whatever their labels hold."""
    folders = nnunet.copy(tmp_path / "walk")
    shutil.copytree(nnunet.raw(HIPPOCAMPUS), folders.raw(HIPPOCAMPUS))
    described = read_json(folders.raw(HIPPOCAMPUS) / "dataset.json")
    described.pop("supervision")  # stock nnU-Net knows of none
    (folders.raw(HIPPOCAMPUS) / "dataset.json").write_text(json.dumps(described))
    cases = sorted(file.name[:-7] for file in (folders.raw(HIPPOCAMPUS) / "labelsTr").iterdir())
    split = folders.preprocessed(HIPPOCAMPUS) / "splits_final.json"
    split.parent.mkdir()
    split.write_text(json.dumps(generate_crossval_split(cases)))
    monkeypatch.chdir(tmp_path)
    return folders, split


def test_the_split_of_stock_nnunet_is_told_with_the_remedy(split_by_nnunet, say, quick):
    folders, split = split_by_nnunet
    out = say("confkd check -d 4 --processes 1", status=1)
    assert "validates on cases that are not fully annotated" in out and "Did nnU-Net write this file? Then" in out
    split.unlink()
    out = say("confkd check -d 4 --processes 1")
    assert "0 errors" in out and "next: confkd plan -d 4" in out
    out = say("confkd plan -d 4 -c 2d -npfp 1 -np 1 --no_pbar")
    assert "next: confkd train 4 2d 0   (with --quick for a first look)" in out and "old nnU-Net" not in out
    kinds = {case: "full" if not (read_voxels(folders.raw(HIPPOCAMPUS) / "labelsTr" / f"{case}.nii.gz") == 3).any()
             else "weak" for fold in read_json(split) for case in fold["val"]}
    assert set(kinds.values()) == {"full"}


@pytest.mark.slow
def test_the_whole_walk_with_such_a_data_set(split_by_nnunet, say, quick, nnunet, hippocampus):
    folders, split = split_by_nnunet
    split.unlink()
    say("confkd plan -d 4 -c 2d -npfp 1 -np 1 --no_pbar")
    out = say("confkd train 4 2d 0 --quick -device cpu")
    assert "Time left: about" in out and f"model: {folders.model(HIPPOCAMPUS, '2d_quick')}" in out
    following = next(line for line in out.splitlines() if line.startswith("next: confkd predict"))
    Path("images").mkdir()
    for case in hippocampus["test"][:2]:
        shutil.copyfile(nnunet.raw(HIPPOCAMPUS) / "imagesTs" / f"{case}_0000.nii.gz", Path("images", f"{case}.nii.gz"))
    command = following.removeprefix("next: ").replace("IMAGES", "images").replace("PREDICTIONS", "predictions")
    out = say(command + " -device cpu -npp 0 -nps 0 --disable_tta")
    following = out[out.index("confkd evaluate"):].strip()
    truth = nnunet.raw(HIPPOCAMPUS) / "labelsTs"
    out = say(following.replace("LABELS", str(truth)) + " --subset --processes 1")
    assert "next: confkd report --model MODEL" in out and "foreground" in out
    say(f"confkd report --model {folders.model(HIPPOCAMPUS, '2d_quick')} -device cpu")
    assert (folders.model(HIPPOCAMPUS, "2d_quick") / "report" / "report.html").is_file()


# ---- (4) a laptop without CUDA ---------------------------------------------------------------------------------------

def test_a_laptop_is_told_how_long_a_training_takes(nnunet, hippocampus, say, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen = []
    monkeypatch.setattr(nnunet_commands, "run_as", lambda name, argv: seen.append((torch.get_num_threads(), argv)))
    out = say("confkd train 4 2d 0")
    line = next(line for line in out.splitlines() if "CPU" in line)
    assert line.startswith("no CUDA device: running on the CPU with 1 thread; 1000 epochs should take about ")
    assert ("hours" in line or "days" in line) and "a rough guess" in line
    assert "12 epochs should take about" in say("confkd train 4 2d 0 --quick")
    assert [(threads, argv[argv.index("-device") + 1]) for threads, argv in seen] == [(1, "cpu")] * 2


@pytest.fixture
def folders_of_a_laptop(tmp_path, test_data, monkeypatch) -> Path:
    """12 images of Hippocampus: 4 with masks, 6 with single annotated slices (0: not annotated, 3: background)."""
    monkeypatch.chdir(tmp_path)
    for name in run.VARIABLES:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for folder in ("images", "masks", "scribbles", "test"):
        Path(folder).mkdir()
    files = sorted((test_data / "hippocampus" / "labelsTr").glob("*.nii.gz"))[:14]
    for number, file in enumerate(files):
        image = file.parent.parent / "imagesTr" / file.name
        shutil.copyfile(image, Path("images" if number < 12 else "test", file.name))
        if number < 4:
            shutil.copyfile(file, Path("masks", file.name.replace(".nii.gz", "_seg.nii.gz")))
        elif number < 10:
            label = sitk.ReadImage(str(file), sitk.sitkUInt8)
            voxels = sitk.GetArrayFromImage(label)
            scribbles = np.zeros_like(voxels)
            scribbles[::4] = np.where(voxels[::4] == 0, 3, voxels[::4])
            new = sitk.GetImageFromArray(scribbles)
            new.CopyInformation(label)
            sitk.WriteImage(new, str(Path("scribbles", file.name)))
    return tmp_path


RUN = ("confkd run --images images --full-labels masks --partial-labels scribbles --labels background anterior "
       "posterior --ignore-value 0 --background-value 3 --test test --output out -c 2d -f 0 1 --quick --processes 1")


@pytest.mark.slow
def test_the_whole_run_on_a_laptop_interrupted_twice(folders_of_a_laptop, quick, say, capsys, monkeypatch):
    on_epoch_end, run_as, left = ConfKDTrainer.on_epoch_end, nnunet_commands.run_as, ["training", "prediction"]

    def interrupted_epoch(self):
        on_epoch_end(self)
        if "training" in left:
            left.remove("training")
            raise KeyboardInterrupt

    def interrupted_prediction(name, argv):
        run_as(name, argv)
        if name == "nnUNetv2_predict" and "prediction" in left:
            left.remove("prediction")
            cut = sorted(Path("out", "predictions_raw").glob("*.nii.gz"))[0]
            cut.write_bytes(cut.read_bytes()[:100])  # as if it had been killed while it wrote this file
            raise SystemExit(143)

    monkeypatch.setattr(ConfKDTrainer, "on_epoch_end", interrupted_epoch)
    monkeypatch.setattr(nnunet_commands, "run_as", interrupted_prediction)
    for status, step in ((130, "train"), (143, "predict")):
        with pytest.raises(SystemExit) as end:
            cli.main(shlex.split(RUN)[1:])
        err = capsys.readouterr().err
        assert end.value.code == status and f"{step} was interrupted. The same command goes on" in err
    out = say(RUN)
    assert not left and out.count(": done") == 4 and "--continue_prediction" in out
    model = Path("out", "nnUNet_results", "Dataset100_Mixed", "ConfKDTrainer__nnUNetPlans__2d_quick")
    for fold in ("fold_0", "fold_1"):
        assert (model / fold / "checkpoint_final.pth").is_file()
    rules = read_json(Path("out", "postprocessing", "postprocessing.json"))
    assert "post-processing " in out and len(list(Path("out", "postprocessing").glob("*.nii.gz"))) == 2
    for file in sorted(Path("test").iterdir()):
        expected = read_voxels(Path("out", "predictions_raw", file.name))
        for options in rules["postprocessing_kwargs"]:
            labels = np.atleast_1d(options["labels_or_regions"])
            expected = largest(expected, labels)
        assert np.array_equal(read_voxels(Path("out", "predictions", file.name)), expected), rules
    assert (Path("out", "report", "report.html")).is_file()
    assert "The accuracy is not that of a usual training: leave out --quick" in out


DRIVER = """
import signal
import sys
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunet_confkd import cli
from nnunet_confkd.data import small_configuration

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background ignore
    DatasetFingerprintExtractor.num_foreground_voxels_for_intensitystats = property(
        lambda self: 1e6, lambda self, value: None)
    small_configuration.LENGTHS[2].update(epochs=3, iterations_per_epoch=2)
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals are those of Unix")
def test_real_signals_in_real_processes_lose_nothing(folders_of_a_laptop):
    Path("driver.py").write_text(DRIVER)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1",
                   "nnUNet_npp": "1", "nnUNet_nps": "1"}

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "driver.py", *shlex.split(RUN)[1:]], env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

    for step, moment, number, status in (("plan", "Preprocessing...", signal.SIGINT, 130),
                                         ("train", "Epoch 1", signal.SIGTERM, 143),
                                         ("predict", "cases in the source folder", signal.SIGINT, 130)):
        process, seen = start(), []
        for line in process.stdout:
            seen.append(line)
            if moment in line:
                os.killpg(process.pid, number)  # as a terminal, or SLURM, does
                moment = "\0"
        assert process.wait(timeout=300) == status, "".join(seen)
        assert f" {step} was interrupted. The same command goes on" in "".join(seen), "".join(seen)
    process = start()
    out = process.communicate()[0]
    assert process.returncode == 0, out
    assert out.count(": done") == 4 and Path("out", "report", "report.html").is_file()
    assert len(list(Path("out", "predictions").glob("*.nii.gz"))) == 2
    left = [path.name for folder in ("nnUNet_raw", "nnUNet_preprocessed") for path in Path("out", folder).iterdir()]
    assert left == ["Dataset100_Mixed"] * 2


def largest(voxels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Keep the largest component of the union of these labels. All of several equally large ones stay."""
    parts, _ = ndimage.label(np.isin(voxels, labels), np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.where((parts > 0) & (sizes[parts] < sizes.max()), 0, voxels)
