"""The commands of docs/how-to/organs.md lead from two folders that annotate different organs to a model."""
from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import TINY
from image_files import read_json, read_voxels
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

from nnunet_confkd import cli
from nnunet_confkd.data.small_configuration import add_small_configuration

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "organs.md"
MORE = {  # so that a CPU runs the commands within a minute
    "mix": ["--processes", "1"], "check": ["--processes", "1"], "compare": ["--processes", "1"],
    "plan": ["-npfp", "1", "-np", "1", "--no_pbar"], "train": ["-device", "cpu"],
    "predict": ["-device", "cpu", "-npp", "0", "-nps", "0", "--disable_tta"],
    "complete": ["-device", "cpu", "--processes", "1"]}


@pytest.fixture
def folders(test_data, tmp_path, monkeypatch):
    """Six images of Hippocampus with their anterior part, six others with their posterior part, and two to predict."""
    monkeypatch.chdir(tmp_path)
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / f"nnUNet_{name}").mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / f"nnUNet_{name}"))
    files = sorted((test_data / "hippocampus" / "labelsTr").glob("*.nii.gz"))[:14]
    for number, file in enumerate(files):
        image, label = sitk.ReadImage(str(file.parents[1] / "imagesTr" / file.name)), sitk.ReadImage(str(file))
        if number >= 12:
            Path("IMAGES").mkdir(exist_ok=True)
            sitk.WriteImage(image, f"IMAGES/{file.name}")
            continue
        folder, value = ("FRONT", 1) if number < 6 else ("BACK", 2)
        mask = sitk.GetImageFromArray((sitk.GetArrayFromImage(label) == value).astype(np.uint8))
        mask.CopyInformation(label)
        for kind, volume in (("images", image), ("labels", mask)):
            Path(folder, kind).mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(volume, f"{folder}/{kind}/{file.name}")
    # fewer samples of intensities are enough here
    monkeypatch.setattr(DatasetFingerprintExtractor, "num_foreground_voxels_for_intensitystats",
                        property(lambda self: 1e6, lambda self, value: None), raising=False)
    return tmp_path


def commands() -> list[list[str]]:
    """The commands of the numbered steps."""
    steps, _, _ = PAGE.read_text(encoding="utf-8").partition("\n## The options of a source")
    text = "\n".join(re.findall(r"```bash\n(.*?)\n```", steps, re.DOTALL))
    return [shlex.split(line)[1:] for line in text.splitlines()]


def test_the_commands_of_the_page_lead_to_a_model(folders, nnunet, thread_pools, capsys):
    printed = []
    for command in commands():
        name, *_ = command = [os.path.expandvars(word) for word in command]
        if name not in ("mix", "check", "plan"):  # a small network, for two steps
            command = [re.sub(r"(^|__)2d$", r"\g<1>2d_small", word) for word in command]
        assert cli.main([*command, *MORE[name]]) == 0, command
        printed.append((name, capsys.readouterr().out))
        if name == "plan":
            plans = folders / "nnUNet_preprocessed" / "Dataset008_Organs" / "nnUNetPlans.json"
            short = {"epochs": 1, "iterations_per_epoch": 2, "seed": 0}
            add_small_configuration(plans, "2d_small", "2d", short, **TINY)
    assert [name for name, _ in printed] == ["mix", "mix", "check", "plan", "train", "compare", "predict", "complete"]
    said = dict(printed)
    assert "nothing was written" in printed[0][1]
    assert re.search(r"anterior +6 +6\nposterior +6 +6\n", said["check"])

    raw = folders / "nnUNet_raw" / "Dataset008_Organs"
    described = read_json(raw / "dataset.json")
    assert described["labels"] == {"background": 0, "anterior": 1, "posterior": 2}
    splits = read_json(folders / "nnUNet_preprocessed" / "Dataset008_Organs" / "splits_final.json")
    lists = described["annotated_classes"]
    assert all({lists[case][0] for case in fold["val"]} == {"anterior", "posterior"} for fold in splits)

    model = folders / "nnUNet_results" / "Dataset008_Organs" / "ConfKDTrainer_partialOnly__nnUNetPlans__2d_small"
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    values = {"anterior": "1", "posterior": "2"}
    for entry in summary["metric_per_case"]:
        own = lists[Path(entry["prediction_file"]).name.removesuffix(".nii.gz")]
        assert {name for name, value in values.items() if not np.isnan(entry["metrics"][value]["TP"])} == set(own)
    assert len(summary["confkd_not_annotated"]) == len(splits[0]["val"])
    assert "cases are not annotated for all classes, and count for their own only" in said["compare"]
    assert len(list((folders / "predictions").glob("*.nii.gz"))) == 2

    for case, listed in lists.items():
        before, after = (read_voxels(folder / "labelsTr" / f"{case}.nii.gz")
                         for folder in (raw, raw.with_name("Dataset108_Organs_completed")))
        value = described["labels"][listed[0]]
        assert np.array_equal(before == value, after == value)


def test_regions_lead_from_two_sources_to_a_model(folders, test_data, nnunet, thread_pools, capsys):
    """One folder has the whole hippocampus and its hind part, as regions; the other one has the whole alone."""
    files = sorted(Path().glob("*/images/*.nii.gz"))
    for number, file in enumerate(files[:8]):
        folder = Path("NESTED" if number < 4 else "WHOLE")
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / "images")
        label = sitk.ReadImage(str(test_data / "hippocampus" / "labelsTr" / file.name))
        sitk.WriteImage(label if number < 4 else label > 0, str(folder / "labels" / file.name))
    Path("NESTED", "dataset.json").write_text(json.dumps(
        {"labels": {"background": 0, "whole": [1, 2], "hind": 2}, "regions_class_order": [1, 2]}))

    def run(line: str) -> str:
        assert cli.main([*line.split(), *MORE[line.split()[0]]]) == 0, line
        return capsys.readouterr().out

    run("mix --source nested=NESTED --source whole=WHOLE --classes whole=1 --id 9 --name Regions")
    assert re.search(r"whole +8 +8\nhind +4 +4\n", run("check -d 9"))
    run("plan -d 9 -c 2d")
    preprocessed = folders / "nnUNet_preprocessed" / "Dataset009_Regions"
    add_small_configuration(preprocessed / "nnUNetPlans.json", "2d_small", "2d",
                            {"epochs": 1, "iterations_per_epoch": 2, "seed": 0}, **TINY)
    run("train 9 2d_small 0")
    model = folders / "nnUNet_results" / "Dataset009_Regions" / "ConfKDTrainer__nnUNetPlans__2d_small"
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert set(summary["mean"]) == {"(1, 2)", "2"}
    assert "hind" in run(f"compare {model}")
    run("predict -d 9 -i IMAGES -o predictions -c 2d_small -f 0")
    for file in Path("predictions").glob("*.nii.gz"):
        assert set(np.unique(read_voxels(file))) <= {0, 1, 2}
    run(f"complete -d 9 --model {model} --id 109")
    raw = folders / "nnUNet_raw"
    before, after = ({file.name: read_voxels(file) for file in (raw / name / "labelsTr").iterdir()}
                     for name in ("Dataset009_Regions", "Dataset109_Regions_completed"))
    assert len(before) == 8
    for name, label in before.items():
        if (Path("NESTED") / "images" / name).exists():
            assert np.array_equal(label, after[name])
        else:
            assert np.array_equal(label > 0, after[name] > 0), "the whole stays; which of it is hind is completed"
