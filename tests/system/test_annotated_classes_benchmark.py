"""benchmarks/annotated_classes.py: its rows, and runs of all rows from real data to the table."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_files import read_json, read_voxels

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def module():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import annotated_classes
        yield annotated_classes


def test_without_full_cases_there_is_no_row_with_hints(module):
    names = {setting: [spec["name"] for spec in module.specs_of(setting, 0, list(module.ROWS), [0])]
             for setting in module.SETTINGS}
    assert names["acdc_3"] == list(module.ROWS)
    assert names["acdc"] == names["hippocampus"] == ["naive", "ignored", "marginal", "all"]
    trainers = [spec["row"]["trainer"] for setting in ("acdc", "acdc_3")
                for spec in module.specs_of(setting, 0, ["ignored"], [0])]
    assert trainers == ["nnUNetTrainer", "ConfKDTrainer_partialOnly"]


@pytest.mark.slow  # five trainings in fresh processes
def test_all_rows_from_real_data_to_the_table(module, test_data, tmp_path):
    script = tmp_path / "short.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import annotated_classes
from dataclasses import replace
stock = annotated_classes.table_of
annotated_classes.table_of = lambda *args: replace(stock(*args), patients=(2, 2, 9), iterations=2, epoch=1)
annotated_classes.__file__ = __file__
if __name__ == "__main__":
    annotated_classes.main()
""")
    rows = ["naive", "ignored", "marginal", "hints", "all"]
    command = [sys.executable, str(script), "--data", str(test_data), "--work", str(tmp_path / "work"), "--output",
               str(tmp_path / "runs"), "--settings", "acdc_3", "--seeds", "0", "--processes", "1", "--rows", *rows]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=os.environ)
    log = tmp_path / "work" / "acdc_3_0" / "log.txt"
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:] + (log.read_text()[-3000:] if log.is_file()
                                                                              else "")
    assert done.stdout.startswith("5 runs") and all(f"(`{row}`)" in done.stdout for row in rows)
    assert len(list((tmp_path / "runs" / "acdc_3_0").glob("*_M3_s0.json"))) == 5

    raw = tmp_path / "work" / "acdc_3_0" / "raw"
    listed = read_json(raw / "Dataset903_listed" / "dataset.json")
    lists, labels = listed["annotated_classes"], listed["labels"]
    assert {tuple(names) for names in lists.values()} == {(name,) for name in labels} - {("background",), ("ignore",)}
    kinds = list(listed["supervision"].values())
    assert kinds.count("partial") == len(lists) == 12 and kinds.count("full") == 10  # two cases a patient
    for case, (name,) in lists.items():
        everything, naive, ignored, merged = (
            read_voxels(next(raw.glob(f"Dataset90{k}_*")) / "labelsTr" / f"{case}.nii.gz") for k in range(4))
        expected = np.where(everything == labels[name], everything, 0)
        assert np.array_equal(naive, expected) and np.array_equal(merged, expected)
        assert np.array_equal(ignored, np.where(expected == 0, labels["ignore"], expected))
    spec = json.loads((tmp_path / "runs" / "acdc_3_0" / "hints_M3_s0.json").read_text())["spec"]
    assert spec["settings"]["teacher_hints"] and spec["row"]["labels"] == "listed"
