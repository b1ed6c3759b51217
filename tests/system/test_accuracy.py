"""benchmarks/accuracy.py measures, splits, keeps finished runs and writes its tables as it should."""
from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def modules():
    """benchmarks/accuracy.py and benchmarks/accuracy_report.py, which are in no package."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    found = []
    for name in ("accuracy", "accuracy_report"):
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        found.append(module)
    yield found
    sys.path.remove(str(ROOT / "benchmarks"))


def probabilities_of(labels, classes=2, certain=1.0):
    rest = (1 - certain) / (classes - 1)
    return np.stack([np.where(labels == c, certain, rest) for c in range(classes)])


def test_measures_of_two_cubes(modules):
    accuracy, _ = modules
    truth, labels = np.zeros((2, 20, 12, 12), np.uint8)
    truth[4:8, 4:8, 4:8] = 1
    labels[6:10, 4:8, 4:8] = 1  # two slices further, of 3 mm each
    labels[19, 0, 0] = 1  # far from the target, and too little to count among the 5 % furthest
    found = accuracy.measure(truth, labels, probabilities_of(labels, certain=0.5), (3.0, 1.0, 1.0), [1])
    assert found["1"]["dice"] == pytest.approx(2 * 32 / 129, abs=1e-5)
    assert found["1"]["hd95_mm"] == pytest.approx(6, abs=1e-3)
    # slice 9 is 6 mm away, slice 8 only 3 mm
    assert found["1"]["far_ml"] == pytest.approx(17 * 3 / 1000)
    assert found["entropy"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("there, dice", [((True, False), 0), ((False, True), 0), ((False, False), None)])
def test_measures_where_a_class_is_missing(modules, there, dice):
    truth, labels = (np.full((4, 4, 4), int(x), np.uint8) for x in there)
    found = modules[0].measure(truth, labels, probabilities_of(labels), (1.0, 1.0, 1.0), [1])
    assert math.isnan(found["1"]["hd95_mm"])
    assert math.isnan(found["1"]["dice"]) if dice is None else found["1"]["dice"] == 0
    assert found["1"]["far_ml"] == (0.064 if there == (False, True) else 0)


def test_the_split_is_fixed_and_keeps_patients_and_twins_together(modules):
    cases = [f"patient{i:03d}_frame{j:02d}" for i in range(1, 11) for j in (1, 9)]
    roles = modules[0].choose_roles(cases, (2, 2, 5), twins=("patient003", "patient004"))
    assert roles == modules[0].choose_roles(reversed(cases), (2, 2, 5), twins=("patient003", "patient004"))
    role_of = {case: role for role, of in roles.items() for case in of}
    assert sum(map(len, roles.values())) == len(role_of) == 20
    for a, b in (("patient003_frame01", "patient004_frame09"), ("patient007_frame01", "patient007_frame09")):
        assert role_of[a] == role_of[b]
    with pytest.raises(SystemExit, match="patients are needed"):
        modules[0].choose_roles(cases, (5, 5, 5))


def fake_runs(accuracy, folder, gain):
    """Runs of the rival and of ConfKD for two seeds, ConfKD better by `gain` on every case."""
    folder.mkdir(parents=True)
    for seed in (0, 1):
        for row, branches, plus in (("ignore", ("student",), 0), ("confkd", ("student", "teacher"), gain),
                                    ("full_only", ("student",), -0.1), ("all", ("student",), 0.1)):
            spec = accuracy.spec_of(accuracy.TABLES["hippocampus"], row, 0 if row == "all" else 5, seed, "cpu",
                                    accuracy.TABLES["hippocampus"].iterations)
            dice = np.random.default_rng(seed).uniform(0.6, 0.8, (8, 2)) + plus
            cases = {f"case{i}": {b: {c: {"dice": d, "hd95_mm": 2.0, "far_ml": 0.0} for c, d in zip("12", of)}
                                  | {"entropy": 0.1} for b in branches} for i, of in enumerate(dice)}
            (folder / f"{accuracy.run_name(spec)}.json").write_text(json.dumps(
                {"spec": spec, "seconds": 10, "machine": "m", "versions": {"torch": "2"}, "cases": cases}))


def test_report(modules, tmp_path):
    accuracy, report = modules
    fake_runs(accuracy, tmp_path / "runs" / "hippocampus", gain=0.05)
    fake_runs(accuracy, tmp_path / "runs" / "hippocampus_validation", gain=0.03)
    (tmp_path / "explanation").mkdir()
    pages = {name: tmp_path / "explanation" / f"{page}.md"
             for name, page in (("table", "earlier_results"), ("tables", "accuracy"), ("trials", "tried"))}
    for name, page in pages.items():
        page.write_text(f"before\n<!-- accuracy {name} -->\nold\n<!-- end of accuracy {name} -->\nafter\n")
    report.write_report(accuracy.TABLES, accuracy.ROWS, accuracy.TRIALS, tmp_path / "runs", tmp_path)
    text = {name: page.read_text() for name, page in pages.items()}
    assert all(of_page.endswith("after\n") and "old" not in of_page for of_page in text.values())
    line = next(line for line in text["tables"].splitlines() if line.startswith("| **ConfKD, student**"))
    assert "+0.050 [+0.050, +0.050]" in line and " 75 % " in line
    assert text["trials"].count("| ConfKD | 0.") == 1 and "| +0.030 [+0.030, +0.030] | 2 |" in text["trials"]
    row = "| Hippocampus 2-D, points, 5 full | 0."
    short = next(line for line in text["table"].splitlines() if line.startswith(row))
    assert "| +0.050 [+0.050, +0.050] |  |" in short
    assert (tmp_path / "accuracy.png").stat().st_size > 10000
    pages["trials"].write_text("no marks")
    with pytest.raises(SystemExit, match="lacks the lines"):
        report.write_report(accuracy.TABLES, accuracy.ROWS, accuracy.TRIALS, tmp_path / "runs", tmp_path)


def test_the_short_table_counts_the_seeds_of_each_cell(modules, tmp_path):
    accuracy, report = modules
    tmp_path = tmp_path / "runs"
    fake_runs(accuracy, tmp_path, 0.05)
    (tmp_path / "ignore_M5_s1.json").unlink()
    (tmp_path / "confkd_M5_s0.json").rename(tmp_path / "a_row_of_its_own.json")  # a run is known by its content
    extra = json.loads((tmp_path / "full_only_M5_s0.json").read_text())
    extra["spec"]["seed"] = 2  # a seed that ConfKD was not run with
    (tmp_path / "full_only_M5_s2.json").write_text(json.dumps(extra))
    text = report.short_table(accuracy.TABLES, {"hippocampus": report.read_runs(tmp_path)})
    head, _, line, *independent = text.splitlines()
    cells = dict(zip(head.split(" | "), line.split(" | ")))
    seeds = [re.sub(r"^0\.\d{3} ", "", cells[report.SUMMARY[row]]) for row in ("full_only", "ignore", "confkd", "all")]
    assert seeds == ["(2)", "(1)", "(2)", "(2)"] and cells["published objective"] == ""
    assert len(independent) == len(report.INDEPENDENT) and all("†" in line for line in independent)


def test_the_two_phases_of_a_heart_and_the_twins_are_one_patient(modules):
    _, report = modules
    names = ["patient001_frame01", "patient001_frame09", "patient074_frame01", "patient076_frame01", "hippocampus_014"]
    patients = ["patient001", "patient001", "patient074", "patient074", "hippocampus_014"]
    assert report.patients_in({0: {"cases": dict.fromkeys(names)}}) == patients


def test_a_second_case_of_each_patient_that_repeats_the_first_narrows_no_gain(modules):
    _, report = modules
    rng = np.random.default_rng(0)
    ours, rival = ({s: rng.uniform(0.6, 0.8, (12, 2)) for s in range(2)} for _ in range(2))
    patients = [f"p{i}" for i in range(12)]
    once = report.paired_gain(ours, rival, patients)
    twice = [{s: np.tile(v, (2, 1)) for s, v in of.items()} for of in (ours, rival)]
    assert report.paired_gain(*twice, patients * 2) == pytest.approx(once)
    assert np.ptp(report.paired_gain(*twice, [f"p{i}" for i in range(24)])[1:]) < 0.95 * np.ptp(once[1:])


def test_a_plot_needs_no_run_of_confkd(modules, tmp_path):
    accuracy, report = modules
    fake_runs(accuracy, tmp_path / "hippocampus", 0)
    runs = report.read_runs(tmp_path / "hippocampus")
    for rows in ({"ignore"}, {"all"}):
        shown = {"hippocampus": {key: run for key, run in runs.items() if key[0] in rows}}
        report.plot(accuracy.TABLES, accuracy.ROWS, shown, tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 5000
        (tmp_path / "a.png").unlink()


def test_tables_that_differ_in_style_share_the_rows_without_partial_images(modules, tmp_path):
    accuracy, report = modules
    for name, rows in (("acdc_small", ("full_only", "ignore", "confkd", "all")), ("acdc_small_none", ("ignore",)),
                       ("hippocampus", ("all",))):
        (tmp_path / name).mkdir()
        for row in rows:
            spec = accuracy.spec_of(accuracy.TABLES[name], row, 0 if row == "all" else 3, 0, "cpu", 50)
            (tmp_path / name / f"{row}.json").write_text(json.dumps({"spec": spec}))
    found = report.read_tables(accuracy.TABLES, accuracy.ROWS, tmp_path)
    assert set(found["acdc_small_none"]) == {("full_only", 3, 0), ("ignore", 3, 0), ("all", 0, 0)}
    assert set(found["acdc_small"]) == set(found["acdc_small_none"]) | {("confkd", 3, 0)}
    assert found["acdc_small_none"]["all", 0, 0]["spec"]["table"]["style"] == "scribbles"
    assert found["acdc_small_none"]["ignore", 3, 0]["spec"]["table"]["style"] == "none"
    assert set(found["hippocampus"]) == {("all", 0, 0)}  # other patients, other images


def test_the_interval_covers_zero_where_seeds_disagree(modules):
    _, report = modules
    rival = {s: np.zeros((20, 2)) for s in range(3)}
    ours = {s: np.full((20, 2), gain) for s, gain in enumerate((0.05, -0.05, 0.01))}
    patients = [f"p{i}" for i in range(20)]
    mean, low, high = report.paired_gain(ours, rival, patients)
    assert mean == pytest.approx(0.01 / 3) and low < 0 < high
    assert report.paired_gain({0: np.zeros((2, 1))}, {1: np.zeros((2, 1))}, patients[:2]) is None


def test_finished_runs_are_kept_and_other_settings_refused(modules, tmp_path):
    accuracy, _ = modules
    fake_runs(accuracy, tmp_path / "runs", 0.0)
    table = accuracy.TABLES["hippocampus"]
    specs = accuracy.jobs_of(table, ["ignore", "all", "confkd"], [5], [0, 1, 2], "cpu", "test", tmp_path)
    assert [(spec["name"], spec["full"]) for spec in specs[:3]] == [("ignore", 5), ("all", 0), ("confkd", 5)]
    missing = accuracy.still_to_do(specs, tmp_path / "runs")
    assert [spec["seed"] for spec in missing] == [2, 2, 2]
    changed = accuracy.jobs_of(replace(table, batch_size=8), ["ignore"], [5], [0], "cpu", "test", tmp_path)
    with pytest.raises(SystemExit, match="ignore_M5_s0.json: was made with another table"):
        accuracy.still_to_do(changed, tmp_path / "runs")


def test_settings_that_decide_nothing_and_titles_make_no_other_run(modules):
    accuracy, _ = modules
    table = accuracy.TABLES["hippocampus"]

    def spec(row, **changes):
        found = accuracy.spec_of(table, row, 5, 0, "cpu", 50)
        return {**found, "row": {**found["row"], "title": "another"}, "settings": {**found["settings"], **changes}}

    for row, harmless, decisive in (
            ("ignore", {"kl_images": "full", "teacher_hints": False, "entropy_images": "all"}, {"full_share": 0.25}),
            ("confkd", {"kl_temperature": 1.0}, {"teacher_hints": False}), ("confkd", {}, {"kl_temperature": 2.0}),
            ("kl", {"entropy_images": "all"}, {"kl_images": "full"})):
        now = accuracy.spec_of(table, row, 5, 0, "cpu", 50)
        assert accuracy.differences(spec(row, **harmless), now) == []
        assert accuracy.differences(spec(row, **decisive), now) == ["settings"]


@pytest.mark.slow  # three trainings in fresh processes
def test_a_table_from_real_data_to_json(modules, test_data, tmp_path):
    """The command trains three rows for a few iterations. The second time it has nothing left to do."""
    script = tmp_path / "short.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import accuracy
from dataclasses import replace
accuracy.TABLES["hippocampus"] = replace(accuracy.TABLES["hippocampus"], iterations=2, patients=(2, 2, 6), full=(2,),
                                         epoch=2)
if __name__ == "__main__":
    accuracy.main()
""")
    command = [sys.executable, str(script), "hippocampus", "--data", str(test_data / "hippocampus"), "--work",
               str(tmp_path / "work"), "--rows", "ignore", "confkd", "full_only", "--seeds", "0", "--on", "validation",
               "--output", str(tmp_path / "runs")]
    first, second = (subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)
                     for _ in range(2))
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    assert "3 runs, 0 of them done before" in first.stdout and "3 runs, 3 of them done before" in second.stdout
    run = json.loads((tmp_path / "runs" / "confkd_M2_s0.json").read_text())
    roles = json.loads((tmp_path / "work" / "roles.json").read_text())
    assert sorted(run["cases"]) == sorted(roles["validation"]) and len(roles["train"]) == 6
    assert set(run["cases"][roles["validation"][0]]) == {"student", "teacher"}
    models = tmp_path / "work" / "results" / "Dataset902_Mixed2"
    assert not (models / "ConfKDTrainer__nnUNetPlans__confkd_M2_s0").exists()
