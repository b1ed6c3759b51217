"""benchmarks/equal_terms.py: the choice of post-processing, the report, and a run from real data to its table."""
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
        import equal_terms
        yield equal_terms


def values(**dice):
    """The Dice (and as HD95 its negative) of two classes by post-processing, one case."""
    return {f"{metric}{how}": np.array([of]) * sign for how, of in dice.items()
            for metric, sign in (("dice", 1.0), ("hd95_mm", -1.0))}


@pytest.mark.parametrize("raw, foreground, of_class, both, chosen", [
    ((0.5, 0.5), (0.6, 0.5), (0.4, 0.9), (0.5, 0.7), (0.6, 0.7)),  # the foreground, then the second class
    ((0.5, 0.5), (0.9, 0.4), (0.4, 0.6), (0.9, 0.9), (0.5, 0.6)),  # the foreground would lower one class
    ((0.5, 0.5), (0.5, 0.5), (0.5, 0.4), (0.9, 0.9), (0.5, 0.5))])  # nothing helps
def test_post_processing_is_chosen_as_nnunet_chooses_it(module, raw, foreground, of_class, both, chosen):
    found = module.post_processed(values(**{"": raw, "_foreground": foreground, "_class": of_class, "_both": both}))
    assert np.allclose(found["dice"], [chosen]) and np.allclose(found["hd95_mm"], -np.array([chosen]))


def write_run(folder: Path, row: str, seed: int, dice: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    of_class = {f"{metric}{how}": value for how, value in zip(
        ("", "_foreground", "_class", "_both"), (dice, dice + 0.1, dice, dice + 0.2))
        for metric, value in (("dice", value), ("hd95_mm", 10.0))}
    cases = {f"patient{i:03}_frame01": {"student": {"1": of_class, "entropy": 0.1}} for i in range(3)}
    (folder / f"{row}_M3_s{seed}.json").write_text(json.dumps(
        {"spec": {"name": row, "full": 3, "seed": seed, "row": {"title": row.upper()}}, "cases": cases}))


def test_the_report_pairs_draws_and_seeds(module, tmp_path):
    rival = module.RIVALS["scribbles"]
    for seed in (0, 1):
        write_run(tmp_path / "scribbles_0", rival, seed, 0.5)
        write_run(tmp_path / "scribbles_0", "confkd", seed, 0.6)
    write_run(tmp_path / "scribbles_1", "confkd", 0, 0.0)  # without a rival: in the means, not in the gain
    lines = module.report(tmp_path).splitlines()
    assert lines[0] == "**scribbles**" and lines[2] == f"Gains are over `{rival}`."
    title = module.ROWS[rival].title  # that of today, and not that of the run
    assert f"| {title} (`{rival}`) | 0.500 | 0.700 | 10.0 | 10.0 |  |  | 2 |" in lines
    ours = next(line for line in lines if "(`confkd`)" in line)
    assert ours.startswith("| ConfKD (`confkd`) | 0.400 | 0.600 | ") and ours.count("+0.100 [+0.100, +0.100]") == 2
    assert ours.endswith("| 3 |")


def test_a_draw_changes_the_full_patients_and_no_other_role(module):
    import accuracy
    cases = [f"case{i:02}" for i in range(30)]
    first, again, other = (accuracy.choose_roles(cases, (5, 5, 20), draw=draw) for draw in (0, 0, 1))
    assert first == again and all(first[role] == other[role] for role in ("test", "validation"))
    assert sorted(first["train"]) == sorted(other["train"]) and first["train"][:3] != other["train"][:3]


def test_the_short_table_compares_with_the_best_rival_in_the_same_draws_and_seeds(module, tmp_path, monkeypatch):
    monkeypatch.setitem(module.SHORT, "points_5", ("ignore_prior", "ignore", "confkd_cost"))
    for draw, seed, rivals, ours in ((0, 0, (0.4, 0.5), 0.7), (0, 1, (0.5, 0.5), 0.6), (1, 0, (0.9,), 0.1)):
        write_run(tmp_path / f"points_5_{draw}", "confkd_cost", seed, ours)
        for row, rival in zip(("ignore_prior", "ignore"), rivals):
            write_run(tmp_path / f"points_5_{draw}", row, seed, rival)
    write_run(tmp_path / "points_5_1", "ignore_prior", 1, 0.0)  # draw 1 lacks the other rival: it counts in no figure
    write_run(tmp_path / "points_5_1", "confkd_cost", 1, 0.9)
    write_run(tmp_path / "unlabelled_0", module.SHORT["unlabelled"][-1], 0, 0.4)  # without a rival
    *_, line = module.short_table(tmp_path).splitlines()
    assert line == "| Hippocampus, points | 5 |  |  | 0.700 | 0.850 | +0.150 [+0.100, +0.200] | 2 |"
    for seed in (0, 1):  # a rival of which not all rows have runs counts as well
        write_run(tmp_path / "points_5_0", "ignore_quarter", seed, 0.55)
    write_run(tmp_path / "points_5_0", "cutmix_full", 0, 0.75)  # but not if it was run less often
    *_, line = module.short_table(tmp_path).splitlines()
    assert line == "| Hippocampus, points | 5 |  |  | 0.750 | 0.850 | +0.100 [+0.050, +0.150] | 2 |"
    for seed in (0, 1):  # stock nnU-Net has a column of its own, and is a rival, too
        write_run(tmp_path / "points_5_0", "ignore_uniform", seed, 0.6)
    *_, line = module.short_table(tmp_path).splitlines()
    assert line == "| Hippocampus, points | 5 |  | 0.800 | 0.750 | 0.850 | +0.050 [+0.000, +0.100] | 2 |"
    for seed in (0, 1):  # the full patients alone are the same, whatever the labels of the others are
        for setting in ("scribbles_0", "unlabelled_0", "unlabelled_1"):
            write_run(tmp_path / setting, "full_only", seed, 0.3 if setting == "unlabelled_0" else 0.0)
        for row in module.SHORT["erosion"]:
            write_run(tmp_path / "erosion_0", row, seed, 0.5)
    (tmp_path / "scribbles_0" / "full_only_M3_s0.json").unlink()
    (tmp_path / "scribbles_0" / "full_only_M3_s1.json").unlink()
    line = next(line for line in module.short_table(tmp_path).splitlines() if "with background" in line)
    assert line.startswith("| ACDC, eroded masks with background | 3 | 0.500 |  | 0.700 | 0.700 | +0.000 ")


def between(file: Path, section: str) -> str:
    return file.read_text().split(f"<!-- {section} -->\n")[1].split(f"\n<!-- end of {section} -->")[0]


def test_the_tables_show_the_runs_that_are_here(module):
    results = ROOT / "docs" / "explanation" / "results.md"
    assert between(results, "equal terms") == module.short_table(module.OUTPUT), "--report writes it anew"
    assert between(ROOT / "benchmarks" / "README.md", "equal terms") == module.report(module.OUTPUT)
    for section in module.COLUMNS:
        table = module.columns_table(module.OUTPUT, section)
        assert between(module.page_of(section), section) == table
        assert table.count("\n") == 1 + len(module.COLUMNS[section].rows)
    for question, table in module.answers(module.OUTPUT).items():
        assert between(module.page_of(question), question) == table and table.count("\n") > 2


def test_the_text_on_hints_has_the_means_of_the_rows(module):
    text = (ROOT / "docs" / "explanation" / "hints.md").read_text().split("**What reaching further gains.**")[1]
    expected = []
    for setting, row, before in (("erosion", "apart_corrected_reach_cost", "apart_corrected_margins_cost"),
                                 ("scribbles", "apart_reach_cost", "apart_cost"),
                                 ("erosion_foreground", "equal_reach_cost", "equal_cost")):
        runs = module.runs_of(module.read_all(module.OUTPUT), setting)
        both = [(draw, seed) for draw, name, seed in runs if name == row and (draw, before, seed) in runs]
        for name in (row, before):
            dice = [np.nanmean(np.nanmean(runs[draw, name, seed]["dice_pp"], 0)) for draw, seed in both]
            expected.append(f"{np.mean(dice):.3f}")
    assert re.findall(r"\d\.\d{3}", text.split("\n\n")[0]) == expected


def test_the_text_on_kl_without_hints_has_the_figures_of_its_tables(module):
    text = (ROOT / "docs" / "explanation" / "results.md").read_text().split("**Without hints it does harm**")[1]
    lines = module.columns_table(module.OUTPUT, "hints and KL").splitlines()[2:]
    cells = [[cell.split(", ")[-1] for cell in line.strip("| ").split(" | ")] for line in lines]
    assert len(cells) == 3
    expected = [dice for _, _, *row in cells[:2] for dice in row[:3]]  # two decoders, without hints, and with
    assert re.findall(r"\d\.\d{3}", text.split("\n\n")[0]) == expected


def test_a_table_of_columns_has_the_draws_and_seeds_that_all_rows_have(module, tmp_path):
    rows = module.COLUMNS["completed"].rows["scribbles"]
    for draw, ours, rival in ((0, 0.6, 0.5), (1, 0.7, None)):  # the rival of draw 1 has not been run
        for row, dice in zip(rows, (ours, rival)):
            if dice is not None:
                write_run(tmp_path / f"scribbles_{draw}", row, 0, dice)
    assert module.columns_table(tmp_path, "completed").splitlines()[2:] == [
        "| scribbles | 0.600, 0.800 | 0.500, 0.700 | +0.100 [+0.100, +0.100] | 1, 1 |"]


def test_the_text_on_the_number_of_trials_counts_the_runs(module):
    text = (ROOT / "benchmarks" / "README.md").read_text().split("**Care for the baseline.**")[1].split("A baseline")[0]
    expected = []
    for setting in ("scribbles", "erosion", "erosion_foreground"):
        runs = module.runs_of(module.read_all(module.OUTPUT), setting)
        for trainer in ("ConfKDTrainer_partialOnly", "ConfKDTrainer"):
            rows = [row for _, row, _ in runs if module.ROWS[row].trainer == trainer]
            expected += [len(set(rows)), len(rows)]
    assert [int(number) for number in re.findall(r"\d+", text)] == expected


def test_the_text_on_bfloat16_has_the_figures_of_its_runs(module):
    text = (ROOT / "benchmarks" / "README.md").read_text().split("One pair of runs compares them")[1]
    runs = module.read_all(module.OUTPUT)["scribbles", 0]
    expected = [f"{module.mean_of([runs[row, 0]], metric):.3f}" for row in ("ignore", "ignore_float32")
                for metric in ("dice", "dice_pp")]
    assert re.findall(r"\d\.\d{3}", text.split("Seeds")[0]) == expected


def test_the_text_on_predicted_volumes_has_those_of_the_runs(module):
    text = (ROOT / "docs" / "explanation" / "method.md").read_text().split("without the correction predicts")[1]
    expected = []
    for draw in module.DRAWS:
        cases = json.loads((module.OUTPUT / f"erosion_{draw}" / "ignore_M3_s0.json").read_text())["cases"].values()
        expected += [f"{100 * np.divide(*(sum(case['student'][value][key] for case in cases) for key in keys)):.0f}"
                     for value in "123" for keys in [("predicted_ml", "truth_ml")]]
    assert re.findall(r"\d+", text.split("(row")[0]) == expected


def test_the_text_on_longer_trainings_has_the_figures_of_its_tables(module):
    text = (ROOT / "docs" / "explanation" / "results.md").read_text().split("## Three times as long")[1]
    answers = {question: [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
               for question, table in module.answers(module.OUTPUT).items() if question.startswith("longer")}
    *_, alone, ours, completed = answers["longer"]
    expected = [ours[2], alone[2], completed[2], completed[1], alone[1]]
    expected += re.findall(r"\d\.\d{3}", answers["longer erosion"][-1][6])  # the gain, and its interval
    assert re.findall(r"\d\.\d{3}", text.split("\n## ")[0]) == expected


def test_the_text_on_todays_default_three_times_as_long_has_the_figures_of_its_runs(module):
    text = (ROOT / "docs" / "explanation" / "weights_and_batches.md").read_text()
    runs = module.read_all(module.OUTPUT)["scribbles", 1]
    expected = [f"{module.mean_of([runs[row, 0]], metric):.3f}" for metric in ("dice_pp", "dice")
                for row in ("apart_watershed_cost_long", "ignore_equal_quarter_long")]
    assert re.findall(r"\d\.\d{3}", text.split("(`apart_watershed_cost_long`)")[1].split("\n")[0]) == expected


def test_confkds_row_in_the_readme_has_the_settings_that_its_trainer_chooses(module):
    from choices import OF_TEACHER, TRAINERS, of_folds, table_text
    choices = json.loads((ROOT / "benchmarks" / "choices.json").read_text())
    assert table_text(choices) == between(ROOT / "docs" / "explanation" / "weights_and_batches.md", "choices")
    folds = json.loads((ROOT / "benchmarks" / "choices_folds.json").read_text())
    assert of_folds(folds) == between(ROOT / "docs" / "explanation" / "weights_and_batches.md", "choices of folds")
    for setting, rows in module.SHORT.items():
        row, images = module.ROWS[rows[-1]], module.table_of(setting, 0).batch_size
        for draw in module.DRAWS:
            chosen, alone = (choices[f"{setting}_{draw}"][name] for name in TRAINERS)
            if setting == "unlabelled":  # so short a training is that of `full_cutmix`; the table shows `complete_at`
                assert alone == chosen and row.settings == {"complete_at": 0.4, "cutmix": chosen["cutmix"]}
                assert (chosen["weight_kl"], chosen["full_share"], chosen["cutmix"]) == (0, 1, 0.5)
                continue
            settings = row.settings
            if row.trainer == "ConfKDTrainer_partialOnly":  # without a teacher both trainers are the same
                assert alone == chosen and chosen["weight_kl"] == 0
                settings = {k: v for k, v in settings.items() if k not in OF_TEACHER}
            assert chosen["hint_reach"] == 4 * (setting in ("scribbles", "erosion", "points_5", "points_10"))
            of_row = {name: settings.get(name, value) for name, value in chosen.items()}
            if "hint_watershed" in chosen:  # not of the draws that were computed before
                assert chosen["hint_watershed"] == (setting in ("scribbles", "erosion"))
                assert chosen.get("complete_at", 0) == 0.25 * (setting == "erosion")
            for values in (of_row, chosen):  # what counts is the number of images
                values["full_share"] = round(images * values["full_share"])
            assert of_row == chosen, setting


@pytest.mark.slow  # two trainings in fresh processes
def test_a_run_from_real_data_to_the_table(module, test_data, tmp_path):
    script = tmp_path / "short.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import equal_terms
from dataclasses import replace
stock = equal_terms.table_of
equal_terms.table_of = lambda *args: replace(stock(*args), patients=(2, 2, 8), iterations=4, epoch=1, full=(3,))
equal_terms.__file__ = __file__
if __name__ == "__main__":
    equal_terms.main()
""")
    command = [sys.executable, str(script), "--data", str(test_data), "--work", str(tmp_path / "work"), "--output",
               str(tmp_path / "runs"), "--settings", "erosion_foreground", "--draws", "1", "--seeds", "0", "--rows",
               "ignore", "confkd_cost"]
    first, second = (subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)
                     for _ in range(2))
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    assert first.stdout.startswith("2 runs") and second.stdout.startswith("0 runs")
    assert "at equal cost" in second.stdout
    run = json.loads((tmp_path / "runs" / "erosion_foreground_1" / "confkd_cost_M3_s0.json").read_text())
    assert run["spec"]["iterations"] == 3 and run["spec"]["table"]["bfloat16"]
