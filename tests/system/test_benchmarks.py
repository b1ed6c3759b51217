"""The benchmarks run. These are tiny ones, and nothing is asserted about their times."""
from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """nnU-Net's three folders, empty, where the benchmarks can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_compile", "false")
    return tmp_path


@pytest.mark.parametrize("network", ("PlainConvUNet", "ResidualEncoderUNet"))
def test_step_time_measures_steps_parts_and_predictions(folders, network):
    import step_time
    case = step_time.Case(network, (16, 16), 4, (4, 8, 8), 0.5)
    run = step_time.measure(case, "cpu", False, False, 2, folders)
    bound = run["flops"]["confkd"] / run["flops"]["stock"]
    assert run["flops"]["stock"] < run["flops"]["kl on full"] == run["flops"]["before the KL"] and bound < 2
    assert run["flops"]["before the KL"] < run["flops"]["confkd"]
    assert {f"term {term}" for term in ("teacher", "student", "kl", "entropy")} < set(run["parts_ms"])
    assert set(run["step"]) == {"stock", *step_time.VARIANTS}
    assert set(run["prediction"]) == {"stock", "confkd", "exported"}
    described, output = {"device": "cpu", "machine": "one", "versions": "1"}, folders / "rows.json"
    for row in (run, run, run | {"compiled": True, "parts_ms": None}):
        step_time.save(row, described, [case.name], output)
    result = json.loads(output.read_text())
    assert [row["compiled"] for row in result["runs"]] == [False, True], "a row is renewed, the others stay"
    head, _, row, _, *_, names, _, parts = step_time.table_of(result).splitlines()
    assert row.count("|") == head.count("|") and f"| {bound:.3f} |" in row
    assert parts.count("|") == names.count("|") and "teacher's decoder" in names and parts.count(" + ") == 4
    assert step_time.peak_memory(case, "cpu", "confkd", folders) > 0


@pytest.mark.parametrize("file", ["step_time_cpu_narrow.json", "step_time_cpu_watershed.json"])
def test_the_text_on_a_step_has_the_ratios_of_its_files(file):
    (run,) = json.loads((BENCHMARKS / file).read_text())["runs"]
    low, whole, high = run["step"]["confkd"]["ratios"]
    before_low, before, before_high = run["step"]["before the KL"]["ratios"]
    text = (BENCHMARKS.parent / "docs" / "explanation" / "performance.md").read_text().split(f"`benchmarks/{file}`")[1]
    numbers = [float(number) for number in re.findall(r"\d\.\d{2,3}", text)]
    bounds = [round(flops / run["flops"]["stock"], 3) for flops in run["flops"].values()]
    numbers = [number for number in numbers if number not in bounds]
    assert numbers[:7] == [round(number, 3) for number in (whole, low, high, before, before_low, before_high)] + [
        round(0.2 * before + 0.8 * whole, 2)]


def test_many_classes_measures_the_rows_that_are_asked_for_and_keeps_the_others(folders, monkeypatch):
    import many_classes
    sizes = [(many_classes.PLAIN, (16, 16), 4, (4, 8, 8), 0.5), (many_classes.PLAIN, (8, 8, 8), 4, (4, 8, 8), 0.5)]
    assert [case.classes - 1 for case in many_classes.cases_of("cpu")] == 2 * list(many_classes.CLASSES)
    monkeypatch.setattr(many_classes, "cases_of", lambda device, classes: [
        many_classes.Case(*size, number + 1) for size in sizes for number in classes])
    output = folders / "rows.json"
    for classes in (["2", "3"], ["3"]):
        many_classes.main(["--classes", *classes, "--repetitions", "2", "--output", str(output)])
    runs = json.loads(output.read_text())["runs"]
    assert [(run["case"], run["classes"]) for run in runs] == [("2-D", 2), ("2-D", 3), ("3-D", 2), ("3-D", 3)]
    for run in runs:
        assert set(run["step"]) == set(run["peak_mib"]) == {"stock", "confkd", many_classes.HIDDEN}
        assert min(run["peak_mib"].values()) > 0 and run["loss"]["hints"]["median_ms"] > 0
    head, _, *rows = many_classes.table_of(runs).splitlines()
    assert len(rows) == 4 and all(row.count("|") == head.count("|") for row in rows)


def test_many_cases_counts_what_nnunet_reads(folders, monkeypatch):
    import many_cases
    monkeypatch.setattr(many_cases, "LABEL_SHAPE", (16, 24, 24))
    (folders / "many").mkdir()
    seconds = many_cases.measure_counts(folders / "many", 6, 1)
    assert list(seconds) == ["nnU-Net's read", "the label alone", "counts"] and min(seconds.values()) >= 0
    assert len(list((folders / "many").glob("*_seg.b2nd"))) == 6


def test_many_cases_measures_starts_and_batches(folders, capsys):
    import many_cases
    seconds, batches = many_cases.measure(many_cases.TINY, (4, 16, 16), 20, 5, 2, folders)
    assert set(seconds) == {"stock", "confkd, first", "confkd, again", "stock, again"}
    assert batches["confkd, again"]["median_ms"] > 0 and batches["confkd, again"]["own_ms"] > 0


def test_generated_organs_are_as_many_as_are_asked_for(folders):
    import volumes
    truth, prediction = volumes.organs((60, 64, 64), 117)
    assert len(np.unique(truth)) > 110  # a few small ones are hidden by others
    assert 0.8 < (truth == prediction).mean() < 1
    image = volumes.ct(truth)
    assert image.dtype == np.int16 and np.std(image[truth == 1]) < np.std(image)


@pytest.mark.slow
def test_large_volumes_measures_every_step(folders, tmp_path):
    import large_volumes
    output = tmp_path / "result.json"
    large_volumes.main(["--volume", "24", "64", "64", "--organs", "3", "12", "--validated", "16", "32", "32",
                        "--output", str(output), "--work", str(tmp_path / "work")])
    result = json.loads(output.read_text())
    assert set(result["labels"]) == {"3", "12"} and set(result["labels"]["12"]) == {"evaluate", "check"}
    assert set(result["predictions"]) == {"report", "entropy", "complete"}
    table = large_volumes.table_of(result)
    assert all(step in table for step in large_volumes.STEPS) and result["validation"]["command"]["peak_mib"] > 0


@pytest.mark.parametrize("spatial", ((3, 21, 18), (5, 8, 9)))
def test_several_tiles_at_once_give_the_logits_of_nnunet(folders, monkeypatch, spatial):
    import tiles
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    torch.manual_seed(0)
    predictor = nnUNetPredictor(use_mirroring=True, perform_everything_on_device=False, device=torch.device("cpu"))
    predictor.network = torch.nn.Conv2d(2, 3, 3, padding=1)
    predictor.allowed_mirroring_axes = (0, 1)
    predictor.configuration_manager = SimpleNamespace(patch_size=(8, 8))
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=3)
    image = torch.randn(2, *spatial)
    expected = predictor.predict_sliding_window_return_logits(image)
    # monkeypatch puts nnU-Net's own function back at the end
    monkeypatch.setattr(nnUNetPredictor, "_internal_predict_sliding_window_return_logits", None)
    monkeypatch.setattr(tiles, "AT_ONCE", 4)  # not a divisor of the number of tiles
    tiles.many_at_once()
    found = predictor.predict_sliding_window_return_logits(image)
    assert found.dtype == expected.dtype == torch.half and found.shape == (3, *spatial)
    assert torch.allclose(found.float(), expected.float(), atol=0.01) and expected.std() > 0.1
