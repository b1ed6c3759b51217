"""benchmarks/two_stages.py: the cost of both stages, the report, and a run from real data to its table."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.system.test_equal_terms import write_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def module():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import two_stages
        yield two_stages


@pytest.mark.parametrize("setting", ["scribbles", "erosion", "erosion_foreground"])
def test_both_stages_together_cost_one_training(module, setting):
    for spec in module.specs_of(setting, 0, module.ROWS, [0]):
        total = 18000 if spec["name"].endswith("_long") else 6000
        if spec["name"].startswith("watershed"):
            assert "first" not in spec and spec["iterations"] == total and spec["row"]["trainer"] == "nnUNetTrainer"
            continue
        cost = 1 if spec["name"].startswith("ignore") else module.COST
        share = 0.3 if spec["name"].startswith("teacher") else 0.5
        both = spec["first"]["iterations"] * cost + spec["iterations"]
        assert total - 250 < both <= total and abs(spec["first"]["iterations"] * cost - total * share) < 300
        assert spec["first"]["row"]["trainer"] != spec["row"]["trainer"] == "nnUNetTrainer"


def test_gains_are_over_single_trainings_of_the_same_length(module, tmp_path):
    once, both = tmp_path / "once", tmp_path / "both"
    write_run(once / "erosion_0", "ignore_prior_equal_quarter", 0, 0.5)
    write_run(once / "erosion_0", "ignore_prior_equal_quarter_long", 0, 0.6)
    for name, dice in (("confkd_long", 0.7), ("confkd_long_first", 0.1), ("confkd", 0.4)):
        write_run(both / "erosion_0", name, 0, dice)
        write_run(both / "erosion_0", name, 1, 0.9)  # without a rival
    for name, dice, of_run in (("confkd_first", 0.2, 0.0), ("confkd_long_first", 0.3, 0.0), ("watershed", 0.5, 0.8)):
        file = both / "erosion_0" / f"{name}_M3_s0.json"
        write_run(both / "erosion_0", name, 0, of_run)
        completed = {"branch": "teacher", "cases": {"patient001_frame01": {
            str(c): dict.fromkeys(("dice", "dice_pp", "nsd_pp"), of) for c, of in ((1, dice), (2, dice + 0.2))}}}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"completed": completed}))
    short, flooded, long = module.table(both, once).splitlines()[2:]
    assert "| none: a watershed (`watershed`) | 0.600 | 0.800 | 1.000 |" in flooded and "| 1x |" in flooded
    assert short.endswith("(`confkd`) | 0.300 | 0.400 | 0.600 | 10.0 | -0.100 [-0.100, -0.100] | "
                          "-0.100 [-0.100, -0.100] | 1 |") and "| 1x |" in short
    assert long.endswith("(`confkd_long`) | 0.400 | 0.700 | 0.900 | 10.0 | +0.100 [+0.100, +0.100] | "
                         "+0.100 [+0.100, +0.100] | 1 |") and "| 3x |" in long


def test_the_page_shows_the_runs_that_are_here(module):
    page = (ROOT / "docs" / "how-to" / "complete.md").read_text()
    table = module.table(module.OUTPUT)
    assert f"<!-- two stages -->\n{table}\n<!-- end of two stages -->" in page
    text = page.split("<!-- end of two stages -->")[1]
    for line in table.splitlines()[2:]:
        assert line.split(" | ")[5] in text  # the Dice after post-processing


@pytest.mark.slow  # two trainings in fresh processes
def test_a_run_from_real_data_to_the_table(module, test_data, tmp_path):
    script = tmp_path / "short.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import equal_terms, two_stages
from dataclasses import replace
stock = equal_terms.table_of
equal_terms.table_of = two_stages.table_of = lambda *args: replace(
    stock(*args), patients=(2, 2, 8), iterations=8, epoch=1, full=(3,))
table = two_stages.table
two_stages.table = lambda folder: table(folder, folder)  # there are no such trainings that are not cut short
two_stages.__file__ = __file__
if __name__ == "__main__":
    two_stages.main()
""")
    command = [sys.executable, str(script), "--data", str(test_data), "--work", str(tmp_path / "work"), "--output",
               str(tmp_path / "runs"), "--settings", "erosion", "--draws", "1", "--seeds", "0", "--rows",
               "confkd", "watershed"]
    first, second = (subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)
                     for _ in range(2))
    log = (tmp_path / "work" / "erosion_1" / "log.txt").read_text()
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:] + log[-2000:]
    assert first.stdout.startswith("2 runs") and second.stdout.startswith("0 runs")
    runs = tmp_path / "runs" / "erosion_1"
    stages = [json.loads((runs / f"{name}_M3_s0.json").read_text()) for name in ("confkd_first", "confkd", "watershed")]
    assert [stage["spec"]["iterations"] for stage in stages] == [3, 4, 8]
    assert stages[0]["completed"]["branch"] == "teacher" and len(stages[0]["completed"]["cases"]) == 10
    of_watershed = stages[2]["completed"]["cases"]
    assert of_watershed.keys() == stages[0]["completed"]["cases"].keys()
    assert np.mean([of["dice"] for case in of_watershed.values() for of in case.values()]) > 0.6
    assert not list((tmp_path / "work").rglob("Dataset*Completed*")), "the completed labels are removed"
    assert "Loading pretrained weights" in log
