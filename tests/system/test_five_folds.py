"""benchmarks/five_folds.py: folds, post-processing, intervals, the report, and a run from real data to its table."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def module():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import five_folds
        yield five_folds


def test_every_patient_is_tested_once_and_has_one_role_in_each_fold(module):
    import accuracy
    cases = [f"patient{i:03d}_frame{j:02d}" for i in range(1, 101) for j in (1, 9)]
    twins = ("patient007", "patient050")
    folds = [accuracy.choose_roles(cases, (20, 20, 60), twins, fold=fold) for fold in range(module.FOLDS)]
    assert sorted(case for roles in folds for case in roles["test"]) == cases
    for number, roles in enumerate(folds):
        assert sorted(case for of in roles.values() for case in of) == cases
        assert roles["validation"] == folds[(number + 1) % module.FOLDS]["test"]
        role_of = {accuracy.patient_of(case): role for role, of in roles.items() for case in of}
        assert role_of[twins[0]] == role_of[twins[1]]
    assert folds[0]["train"][:6] != folds[2]["train"][:6]
    names = [f"hippocampus_{i:03d}" for i in range(200)]
    folds = [accuracy.choose_roles(names, module.HIPPOCAMPUS, fold=fold) for fold in range(module.FOLDS)]
    assert sorted(case for roles in folds for case in roles["test"]) == names
    assert all({role: len(of) for role, of in roles.items()} == {"test": 40, "validation": 20, "train": 120}
               and len({case for of in roles.values() for case in of}) == 180 for roles in folds)


def test_rows_that_do_not_depend_on_weak_labels_are_run_once(module):
    names = {setting: [(spec["name"], spec["full"]) for spec in module.specs_of(setting, 0, module.ROWS, [0])]
             for setting in module.SETTINGS}
    assert ("all", 0) in names["scribbles"] and ("full_only", 7) in names["scribbles"]
    assert names["erosion"] == [("ignore_uniform", 3), ("ignore", 3), ("confkd_cost", 3), ("completes_cost", 3),
                                ("ignore_long", 3), ("confkd_cost_long", 3)]
    assert names["unlabelled"] == [(name, 3) for name in ("confkd_cutmix_cost", "labels_itself", "labels_itself_long")]
    assert ("paper", 1) not in names["scribbles"]
    assert ("full_cutmix", 3) in names["scribbles"], "the unlabelled setting compares with it"
    long = {spec["name"]: spec["iterations"] for spec in module.specs_of("scribbles", 0, module.ROWS, [0])}
    assert long["all_long"] == 3 * long["all"]


def test_sparse_scribbles_are_those_of_a_quarter_of_the_slices(module, test_data):
    import accuracy

    from nnunet_confkd.data.images import read
    file = sorted((test_data / "acdc_scribbles").glob("*_scribble.nii.gz"))[0]
    every = read(file).voxels[0]
    few = [accuracy.in_some_slices(file, case="a", fraction=0.25, draw=draw, ignore=4).voxels[0] for draw in range(40)]
    for voxels in few:
        kept = (voxels != 4).any((1, 2))
        assert np.array_equal(voxels[kept], every[kept]) and kept.sum() <= max(1, round(len(every) / 4))
    annotated = [(voxels != 4).any((1, 2)) for voxels in few]
    assert np.array_equal(np.any(annotated, 0), (every != 4).any((1, 2))), "each slice has its chance"


def test_post_processing_is_chosen_on_validation_cases_and_applied_to_others(module):
    truth = np.zeros((2, 6, 20), np.uint8)
    truth[:, 1:5, 1:5], truth[:, 1:5, 5:9] = 1, 2
    island = truth.copy()
    island[:, 1:3, 15:17] = 1
    chosen = module.choose_post_processing([("a", "student", truth, island, None, (1, 1, 1))], [1, 2])
    assert chosen[0] and not chosen[1].any(), "the largest component of the foreground suffices"
    found = module.measure_both(truth, island, (1.0, 1.0, 1.0), [1, 2], *chosen)
    assert found["1"]["dice"] == pytest.approx(64 / 72, abs=1e-4) and found["1"]["dice_pp"] == 1
    assert found["1"]["hd95_mm"] > 3 and found["1"]["hd95_mm_pp"] == 0 and found["2"]["dice"] == 1
    raw = module.measure_both(truth, island, (1.0, 1.0, 1.0), [1, 2], False, [False, False])
    assert raw["1"]["dice_pp"] == raw["1"]["dice"]


def test_the_interval_follows_the_differences_of_folds(module):
    same = [np.full(20, 0.1)] * 5
    assert module.interval(same) == pytest.approx((0.1, 0.1))
    rng = np.random.default_rng(0)
    patients = [rng.normal(0, 0.05, 20) for _ in range(5)]
    narrow = module.interval(patients)
    wide = module.interval([values + shift for values, shift in zip(patients, (-0.1, -0.05, 0, 0.05, 0.1))])
    assert narrow[0] < np.mean(patients) < narrow[1] and wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    assert module.coverage(0.0, 0.1, repetitions=100) > 0.85


def write_run(folder: Path, row: str, full: int, dice: float, patients: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    of_class = {f"{name}{ending}": value for ending in ("", "_pp")
                for name, value in (("dice", dice), ("hd95_mm", 10.0), ("nsd", 0.5))}
    cases = {f"patient{i:03}_frame{j:02}": {"student": {"1": of_class}} for i in patients for j in (1, 9)}
    (folder / f"{row}_M{full}_s0.json").write_text(json.dumps(
        {"spec": {"name": row, "full": full, "seed": 0, "row": {"title": row.upper()}}, "cases": cases}))


def test_the_report_pairs_folds_and_takes_common_rows_from_their_setting(module, tmp_path):
    for fold in (0, 1):
        patients = range(10 * fold, 10 * fold + 10)
        write_run(tmp_path / f"erosion_{fold}", "ignore", 3, 0.5, patients)
        write_run(tmp_path / f"erosion_{fold}", "confkd_cost", 3, 0.6 + 0.1 * fold, patients)
        write_run(tmp_path / f"scribbles_{fold}", "all", 0, 0.9, patients)
        write_run(tmp_path / f"scribbles_{fold}", "ignore", 3, 0.5, patients)  # ConfKD has not been run yet
    lines = module.report(tmp_path).splitlines()
    assert [line for line in lines if line.startswith("**")] == [
        "**ACDC, eroded masks with background, 3 full patients**"]
    expected = " | 0.900 | 0.900 | 0.900 | 10.0 | 10.0 | 0.500 | +0.400 [+0.400, +0.400] |"
    assert any(line.startswith(f"| everything annotated (`all`){expected}") for line in lines)
    ours = next(line for line in lines if "(`confkd_cost`)" in line)
    assert "+0.150 [+0.100, +0.200]" in ours and ours.endswith("| 2 |")


def test_the_headline_compares_with_the_rivals_and_is_drawn(module, tmp_path):
    import headline
    for fold in (0, 1):
        patients = range(200 + 10 * fold, 210 + 10 * fold)
        for row, full, dice in (("full_only", 3, 0.4), ("full_cutmix", 3, 0.99), ("ignore", 3, 0.6),
                                ("ignore_uniform", 3, 0.5), ("confkd_cost", 3, 0.65 + 0.1 * fold), ("all", 0, 0.9)):
            write_run(tmp_path / f"scribbles_{fold}", row, full, dice, patients)
        write_run(tmp_path / f"unlabelled_{fold}", "labels_itself", 3, 0.95, patients)
        write_run(tmp_path / f"unlabelled_{fold}", "labels_itself_long", 3, 0.97, patients)
        write_run(tmp_path / f"scribbles_{fold}", "full_cutmix_long", 3, 0.96, patients)
    write_run(tmp_path / "scribbles_2", "confkd_cost", 3, 0.1, range(220, 230))  # no rival has this fold yet
    lines = headline.table(tmp_path).splitlines()
    assert lines[2] == ("| ACDC, scribbles | 3 | 0.400 | 0.500 | 0.600 | 0.700 | 0.900 | +0.200 [+0.150, +0.250] | "
                        "+0.100 [+0.050, +0.150] | +0.100 [+0.050, +0.150] | 2 |")
    # the full patients alone are run in the setting of the scribbles; CutMix is a rival of unlabelled images alone
    assert lines[3] == ("| ACDC, unlabelled images | 3 | 0.990 |  |  | 0.950 | 0.900 |  | "
                        "-0.040 [-0.040, -0.040] | -0.040 [-0.040, -0.040] | 2 |")
    assert lines[4] == ("| ACDC, unlabelled images, three times as long | 3 | 0.960 |  |  | 0.970 |  |  | "
                        "+0.010 [+0.010, +0.010] | +0.010 [+0.010, +0.010] | 2 |")
    assert len(lines) == 5
    headline.draw(tmp_path, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    first, second, longer = headline.by_fold(tmp_path).splitlines()[2:]
    assert first == ("| ACDC, scribbles | our trainer, no teacher | +0.050 | +0.150 | 100% | +0.100 [+0.050, +0.150] |")
    assert second.startswith("| ACDC, unlabelled images | full patients alone | -0.040 | -0.040 | 0% |")
    assert longer.startswith("| ACDC, unlabelled images, three times as long | full patients alone | +0.010 | +0.010 |")


def test_a_row_that_was_run_in_fewer_folds_than_another_of_its_column_is_left_out(module, tmp_path):
    import headline
    for fold in (0, 1):
        patients = range(10 * fold, 10 * fold + 10)
        write_run(tmp_path / f"scribbles_{fold}", "full_only", 3, 0.4, patients)
        write_run(tmp_path / f"unlabelled_{fold}", "labels_itself", 3, 0.5, patients)
    write_run(tmp_path / "scribbles_0", "full_cutmix", 3, 0.9, range(10))  # better, but not run in both
    (line,) = headline.lines_of(tmp_path)
    assert line["folds"] == [0, 1] and line["means"]["full patients alone"] == pytest.approx(0.4)


def test_the_tables_and_the_text_show_the_runs_that_are_here(module):
    import completion
    import headline

    from nnunet_confkd.demo.picture import STORED
    results, readme = ((ROOT / file).read_text() for file in ("docs/explanation/results.md", "README.md"))
    for section, text in (("headline", headline.table(module.OUTPUT)), ("by fold", headline.by_fold(module.OUTPUT)),
                          ("five folds", module.report(module.OUTPUT))):
        for page in (results, readme)[:1 + (section == "headline")]:
            assert f"<!-- {section} -->\n{text}\n<!-- end of {section} -->" in page, "--report writes it anew"
    alone, *items = results.split("**Test patients.**")[1].split("\n\nThe next table")[0].split("\n- ")
    lines, raw = headline.lines_of(module.OUTPUT), headline.lines_of(module.OUTPUT, "dice")
    assert len(items) == len(lines) > 0
    # with unlabelled images there is no trainer without a teacher but the full patients alone
    rivals = ["our trainer, no teacher" if "our trainer, no teacher" in line["gains"] else "full patients alone"
              for line in lines]
    for item, line, before, rival in zip(items, lines, raw, rivals):
        whole = rival == "our trainer, no teacher" and "everything annotated" in line["means"]
        common = re.findall(r"[+-]?\d\.\d{3}", alone) if whole else []
        columns = (("full patients alone", "everything annotated") if common else ()) + (rival, "ConfKD")
        numbers = [f"{line['means'][column]:.3f}" for column in columns] + re.findall(
            r"[+-]\d\.\d{3}", headline.gain_text(line["gains"][rival]) + headline.gain_text(before["gains"][rival]))
        assert common + re.findall(r"[+-]?\d\.\d{3}", item) == numbers
    gains = [f"{abs(np.concatenate(line['gains'][rival]).mean()):.3f}" for line, rival in zip(lines, rivals)]
    runs = completion.read_all(*completion.FOLDERS, values=completion.values_of_run)
    for setting in ("erosion", "scribbles"):  # of completed labels
        teacher, alone = (runs[setting, row, 3] for row in (headline.OUR_ROW[setting], "ignore"))
        gains.append(f"{np.concatenate(module.gain(teacher, alone, 'dice_pp')).mean():.3f}")
    assert re.findall(r"\d\.\d{3}", results.split("**In short.**")[1].split("\n\n")[0]) == gains
    advice = readme.split("**Which trainer")[1].split("\n## ")[0]
    found = [re.search(r"\d\.\d{3}.*", row.strip(" |"))[0] for row in advice.splitlines()
             if row.startswith("|") and re.search(r"\d\.\d{3}", row)]
    assert len(found) == len(lines)
    for text, line, rival in zip(found, lines, rivals):
        mean, (low, high) = np.concatenate(line["gains"][rival]).mean(), module.interval(line["gains"][rival])
        assert text.startswith(f"{abs(mean):.3f} {'worse' if mean < 0 else 'better'}")
        assert ("(not certain)" in re.split("[;,]", text)[0]) == (low <= 0 <= high)
    before = np.concatenate(raw[0]["gains"][rivals[0]]).mean()
    assert f"; before post-processing {before:.3f} better" in found[0]
    assert re.findall(r"\d\.\d{3}", advice.split("**Complete your labels.**")[1]) == gains[-2:]
    longer = [line["words"] for line in raw].index("ACDC, eroded masks without background, three times as long")
    before = np.concatenate(raw[longer]["gains"][rivals[longer]]).mean()
    assert f"; before post-processing {before:.3f} better" in found[longer]
    eroded = next(line for line in lines if line["setting"] == "erosion_foreground")
    # with these labels ConfKD has the KL and hints
    assert {title: round(eroded["means"][title.removesuffix(" with hints")], 3) for title in STORED} == STORED
    over_stock = np.concatenate(eroded["gains"]["nnU-Net's ignore label"]).mean()
    assert f"**What you gain** over nnU-Net's own ignore label: {over_stock:.2f} Dice" in readme
    with_background = next(line for line in lines if line["setting"] == "erosion")
    over_stock = np.concatenate(with_background["gains"]["nnU-Net's ignore label"]).mean()
    assert f"eroded masks without background, and {over_stock:.2f} with background" in readme
    for line in (eroded, with_background):
        over_alone = np.concatenate(line["gains"]["full patients alone"]).mean()
        for text in (readme, results):
            assert f"gains {over_alone:.2f} with eroded masks of both kinds" in " ".join(text.split())
    over_alone = np.concatenate(lines[0]["gains"]["full patients alone"]).mean()
    assert f"both kinds and {over_alone:.2f} with scribbles" in " ".join(results.split())
    over_stock = np.concatenate(lines[-1]["gains"]["nnU-Net's ignore label"]).mean()
    assert lines[-1]["setting"] == "points" and f"With points on Hippocampus it is {over_stock:.2f}" in readme


def test_the_text_on_hints_has_the_figures_of_the_runs(module):
    """Of the KL without hints, the paper's objective, ConfKD and no teacher, in this order."""
    results = (ROOT / "docs/explanation/results.md").read_text()
    text = results.split("**Test patients** show the same.")[1].split("\n")[0]
    runs = module.read_all(module.OUTPUT)
    means = [f"{np.concatenate(module.of_patients(runs[setting, row, 3], 'dice_pp')).mean():.3f}"
             for setting in ("scribbles", "erosion_foreground") for row in ("kl", "paper", "confkd_cost", "ignore")]
    assert re.findall(r"\d\.\d{3}", text) == means


def test_completed_labels_are_compared_by_patient_and_fold(module, tmp_path):
    import completion
    for fold in (0, 1):
        for row, dice in (("ignore", 0.5), ("confkd_cost", 0.6 + 0.1 * fold)):
            write_run(tmp_path / f"erosion_{fold}", row, 3, 0.1, range(10))
            file = tmp_path / f"erosion_{fold}" / f"{row}_M3_s0.json"
            cases = {f"patient{i:03}_frame{j:02}": {"1": {"dice": dice, "dice_pp": dice + 0.1, "nsd_pp": 0.3}}
                     for i in range(4) for j in (1, 9)}
            file.write_text(json.dumps(json.loads(file.read_text()) | {"completed": {"branch": "?", "cases": cases}}))
    other = tmp_path / "erosion_0" / "confkd_cost_M7_s0.json"  # with another number of full patients
    other.write_text(file.read_text().replace('"full": 3', '"full": 7'))
    write_run(tmp_path / "scribbles_0", "confkd_cost", 3, 0.9, range(10))  # before completed labels were measured
    first, second = completion.table(tmp_path).splitlines()[2:]
    assert first.endswith("(`ignore`) | 0.500 | 0.600 | 0.600 | 0.300 |  |  | 2 |")
    assert second.endswith("| 0.650 | 0.750 | 0.750 | 0.300 | +0.150 [+0.100, +0.200] | +0.150 [+0.100, +0.200] | 2 |")


def test_the_table_of_completed_labels_shows_the_runs_that_are_here(module):
    import completion
    page = (ROOT / "docs" / "how-to" / "complete.md").read_text()
    assert f"<!-- completion -->\n{completion.table(*completion.FOLDERS)}\n<!-- end of completion -->" in page


def test_a_completed_label_is_measured_as_it_is_and_after_post_processing(module):
    import completion
    truth = np.zeros((2, 8, 8), bool)
    truth[:, 2:6, 2:6] = True
    of = completion.measure(truth, truth & (np.arange(8) < 4), truth, (1.0, 1.0, 1.0))
    assert of == {"dice": 0.6667, "dice_pp": 1.0, "nsd_pp": 1.0}


def test_the_text_has_the_hours_of_the_table(module):
    import effort
    results = (ROOT / "docs" / "explanation" / "results.md").read_text()
    text = results.split("## More full masks")[1].split("\n## ")[0]
    cells = [line.split("|") for line in effort.table(json.loads(effort.FILE.read_text()), effort.OUTPUT).splitlines()
             if line.startswith(("| 3 |", "| 7 | not used"))]
    assert re.findall(r"([\d.]+) hours", text) == [cell[6].strip() for cell in cells]
    assert set(re.findall(r"\d\.\d{3}", text)) == {dice.strip() for cell in cells for dice in cell[7:]} - {""}


def test_the_text_on_intervals_has_the_coverage_of_the_simulation(module):
    text = (ROOT / "benchmarks" / "README.md").read_text().split("this often:\n\n")[1].split("\n\n")[0]
    first, _, last = (line.strip("| ").split(" | ")[1:] for line in text.splitlines())
    assert [f"{module.coverage(float(sd), 0.05):.0%}".replace("%", " %") for sd in first] == last


def test_what_annotating_costs_is_counted_on_the_real_labels(module, test_data, tmp_path):
    import effort
    labels = np.full((3, 4, 4), effort.IGNORE)
    labels[1, 0, :2], labels[2, 0, 0] = (0, 2), 0  # a scribble of a class and of the background; background alone
    assert effort.annotated(labels) == {"slices": 1, "voxels": 2}
    cases = json.loads(effort.FILE.read_text())
    real = effort.measure(test_data)
    assert {case: cases[case] for case in real} == real and len(real) >= 20
    for of in real.values():  # experts scribbled nearly all slices, and few of their voxels
        assert of["scribbles"]["slices"] <= of["full"]["slices"] + 2
        assert 20 * of["scribbles"]["voxels"] < of["full"]["voxels"]
    few, many = effort.effort(cases, 1), effort.effort(cases, 7)
    assert 6 * few["full slices"] < many["full slices"] and few["scribbled slices"] > many["scribbled slices"]
    write_run(tmp_path / "scribbles_0", "full_only", 3, 0.5, range(20))
    write_run(tmp_path / "scribbles_0", "confkd_cost", 3, 0.7, range(20))
    alone, both, sparse = (line.split("|") for line in effort.table(cases, tmp_path).splitlines()
                           if line.startswith("| 3 |"))
    assert float(alone[6]) < float(sparse[6]) < float(both[6]) and not "".join(sparse[7:]).strip()
    assert alone[-4] == " 0.500 " and both[-2] == " 0.700 " and float(both[6]) > float(alone[6]) > 0


@pytest.mark.slow  # three trainings in fresh processes
def test_a_run_from_real_data_to_the_table(module, test_data, tmp_path):
    script = tmp_path / "short.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import five_folds
from dataclasses import replace
stock = five_folds.table_of
five_folds.table_of = lambda *args: replace(stock(*args), patients=(2, 2, 8), iterations=4, epoch=1, full=(3,))
five_folds.__file__ = __file__
if __name__ == "__main__":
    five_folds.main()
""")
    command = [sys.executable, str(script), "--data", str(test_data), "--work", str(tmp_path / "work"), "--output",
               str(tmp_path / "runs"), "--settings", "scribbles", "--draws", "1", "--rows", "all", "ignore",
               "confkd_cost"]
    first, second = (subprocess.run(command, capture_output=True, text=True, timeout=1200, env=os.environ)
                     for _ in range(2))
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    assert first.stdout.startswith("3 runs") and second.stdout.startswith("0 runs")
    assert "**ACDC, scribbles, 3 full patients**" in second.stdout and "at equal cost" in second.stdout
    run = json.loads((tmp_path / "runs" / "scribbles_1" / "confkd_cost_M3_s0.json").read_text())
    roles = json.loads((tmp_path / "work" / "scribbles_1" / "roles.json").read_text())
    assert sorted(run["cases"]) == sorted(roles["test"]) and run["spec"]["table"]["fold"] == 1
    with np.load(tmp_path / "work" / "scribbles_1" / "predictions" / "confkd_cost_M3_s0.npz") as predictions:
        assert sorted(predictions) == sorted(roles["test"])
    # the teacher of one row and the network of the other have completed the scribbled training cases
    described = json.loads((tmp_path / "work/scribbles_1/raw/Dataset903_Mixed3/dataset.json").read_text())
    scribbled = sorted(case for case, kind in described["supervision"].items() if kind == "partial")
    for row, branch in (("confkd_cost", "teacher"), ("ignore", "student")):
        completed = json.loads((tmp_path / "runs" / "scribbles_1" / f"{row}_M3_s0.json").read_text())["completed"]
        assert completed["branch"] == branch and sorted(completed["cases"]) == scribbled
        assert all(case.keys() == {"1", "2", "3"} for case in completed["cases"].values())
        assert any(0 < of["dice_pp"] < 1 for case in completed["cases"].values() for of in case.values())
    everything = json.loads((tmp_path / "runs" / "scribbles_1" / "all_s0.json").read_text())
    assert everything["completed"] == {}, "nothing was left to complete"


def test_the_page_on_unlabelled_images_has_the_gains_of_the_headline(module):
    import headline
    page = (ROOT / "docs" / "explanation" / "unlabelled.md").read_text().split("On test patients")[1].split("\n")[0]
    gains = [headline.gain_text(line["gains"]["full patients alone"]) for metric in ("dice_pp", "dice")
             for line in headline.lines_of(module.OUTPUT, metric) if line["setting"] == "unlabelled"]
    assert len(gains) == 4 and all(gain in page for gain in gains)
    section = (ROOT / "docs" / "explanation" / "results.md").read_text().split("## Unlabelled images\n")[1]
    assert all(gain in section.split("\n## ")[0] for gain in gains[:2])
