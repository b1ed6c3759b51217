"""benchmarks/ssl4mis.py: the split, the smaller copy of ACDC, and a training that is stopped and goes on."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def module():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import ssl4mis
        yield ssl4mis


def test_the_split_has_every_patient_once(module):
    numbers = [*module.TEST, *module.VALIDATION, *module.LABELLED, *module.OTHERS]
    assert sorted(numbers) == list(range(1, 101)) and len(module.OTHERS) == 63
    assert module.ROLES["train"][:3] == ["patient038", "patient050", "patient099"]


def copy_patients(data: Path, target: Path, names) -> None:
    """A data folder with some patients only."""
    (target / "acdc" / "training").mkdir(parents=True)
    (target / "acdc_scribbles").mkdir()
    for name in names:
        shutil.copytree(data / "acdc" / "training" / name, target / "acdc" / "training" / name)
        for file in (data / "acdc_scribbles").glob(f"{name}_*"):
            shutil.copy(file, target / "acdc_scribbles")


def test_the_smaller_copy_holds_the_whole_heart_on_one_grid(module, test_data, tmp_path):
    copy_patients(test_data, tmp_path / "data", ["patient002"])
    module.shrink(tmp_path / "data", tmp_path / "small")
    for label in (tmp_path / "small").glob("acdc/training/patient002/*_gt.nii.gz"):
        image = sitk.ReadImage(str(label).replace("_gt", ""))
        scribble = sitk.ReadImage(str(tmp_path / "small" / "acdc_scribbles" /
                                      label.name.replace("_gt", "_scribble")))
        small, full = (sitk.ReadImage(str(file)) for file in (label, test_data / "acdc" / "training" / "patient002" /
                                                              label.name))
        assert small.GetSize() == image.GetSize() == scribble.GetSize() == (160, 160, full.GetSize()[2])
        assert small.GetSpacing()[:2] == pytest.approx((1.5, 1.5)) and image.GetOrigin() == small.GetOrigin()
        volumes = [[(sitk.GetArrayFromImage(of) == value).sum() * np.prod(of.GetSpacing()) for value in (1, 2, 3)]
                   for of in (small, full)]
        assert volumes[0] == pytest.approx(volumes[1], rel=0.03)
        drawn, truth = sitk.GetArrayFromImage(scribble), sitk.GetArrayFromImage(small)
        assert (drawn == 4).mean() > 0.9 and (drawn[drawn < 4] == truth[drawn < 4]).mean() > 0.9


def values_of(result: dict) -> float:
    return np.nanmean([[of["dice"] for of in case["student"].values()] for case in result["cases"].values()])


@pytest.mark.skipif(sys.platform == "win32", reason="groups of processes are POSIX")
@pytest.mark.slow  # trainings in fresh processes
def test_a_training_that_is_stopped_goes_on(module, test_data, tmp_path):
    kept = ["patient001", "patient002", *module.ROLES["train"][:3], "patient003"]
    copy_patients(test_data, tmp_path / "data", kept)
    script = tmp_path / "short.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import ssl4mis
from dataclasses import replace
ssl4mis.ROLES = {{"test": ["patient001"], "validation": ["patient002"], "train": {kept[2:]!r}}}
ssl4mis.TABLES = {{name: replace(table, small=True, batch_size=2, max_patch=32, full=(3,), spacing=(10.0, 3.0, 3.0))
                  for name, table in ssl4mis.TABLES.items()}}
ssl4mis.EPOCH = 10
ssl4mis.__file__ = __file__
if __name__ == "__main__":
    ssl4mis.main()
""")
    command = [sys.executable, str(script), "--data", str(tmp_path / "data"), "--work", str(tmp_path / "work"),
               "--output", str(tmp_path / "runs"), "--device", "cpu", "--seeds", "0", "--rows", "ignore", "confkd_cost",
               "--processes", "2", "--cost", "1.5", "--iterations", "30"]

    def run(*options: str) -> str:
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=900, env=os.environ)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    assert "done" not in run("--minutes", "0") and not list((tmp_path / "work").rglob("checkpoint*"))
    cut_off = subprocess.Popen(command, start_new_session=True)
    try:
        while not list((tmp_path / "work").rglob("checkpoint_latest.pth")):
            assert cut_off.poll() is None
            time.sleep(0.2)
    finally:
        os.killpg(cut_off.pid, signal.SIGKILL)
    text = run()
    assert "done" in text and "| and scribbles, ConfKD, at equal cost (`confkd_cost`) | 3 |" in text
    results = {row: json.loads((tmp_path / "runs" / f"{row}_M3_s0.json").read_text())
               for row in ("ignore", "confkd_cost")}
    assert any(result["resumed"] for result in results.values())
    assert [result["spec"]["iterations"] for result in results.values()] == [30, 20]
    values = results["confkd_cost"]["cases"]["patient001_frame01"]["student"]["1"]
    assert len(results["confkd_cost"]["cases"]) == 2
    assert set(values) == {"dice", "hd95_mm", "nsd", "dice_pp", "hd95_mm_pp", "nsd_pp", "hd95_voxels"}
    gain = values_of(results["confkd_cost"]) - values_of(results["ignore"])
    assert f"| {gain:+.3f} " in text  # a single patient has no interval
