"""The whole report: what the page holds, for which models, and what is refused."""
from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

from nnunet_confkd import cli
from nnunet_confkd.errors import InputError
from nnunet_confkd.evaluation.metrics import MEASURES, measure_case, statistics
from nnunet_confkd.inference.export import export
from nnunet_confkd.report import sections
from nnunet_confkd.report.report import PAGE, report
from nnunet_confkd.training.record import write_record
from nnunet_confkd.training.settings import Settings

HIPPOCAMPUS, PLANS_2D = "Dataset004_Hippocampus", "nnUNetPlans_2d"
HOSTILE = "<img src=x onerror=alert(1)>'\"&amp; $x_1$ ü"
BRANCHES = ("student", "teacher")


@pytest.fixture(scope="module")
def written(small, tmp_path_factory) -> Path:
    """The small model's report, by the command: the page. It has all parts, also those of five cases and more."""
    output = tmp_path_factory.mktemp("page") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "FEWEST", 1)
        assert cli.main(["report", "--model", str(small), "--output", str(output), "-device", "cpu"]) == 0
    return output / PAGE


@pytest.fixture(scope="module")
def page(written, read_page):
    """The same, taken apart."""
    return read_page(written)


@pytest.fixture(scope="module")
def originals(predicted):
    """{branch: (segmentation, probabilities) of each case} on the grid of the labels, by nnU-Net's own function."""
    return {branch: [exported_by_nnunet(found, branch) for found in predicted.values()] for branch in BRANCHES}


@pytest.fixture(scope="module")
def true_labels(predicted, truths):
    return [sitk.ReadImage(str(truths / f"{case}.nii.gz")) for case in predicted]


def untrained(nnunet, dataset: str, configuration: str, trainer: str) -> Path:
    """Make a model as a training leaves it, without training it: its folder. The curves are made up."""
    made = nnunet.trainer(dataset, configuration, trainer)
    made.initialize()
    made.get_tr_and_val_datasets()
    write_record(made.output_folder, made.record, None)
    curves = made.logger.local_logger.my_fantastic_logging
    for key in curves:
        curves[key] = [0.5, 0.25]
    made.current_epoch = 1
    made.save_checkpoint(str(Path(made.output_folder) / "checkpoint_final.pth"))
    folder = nnunet.model(dataset, configuration, trainer)
    (folder / "plans.json").write_text(json.dumps(made.plans_manager.plans))
    (folder / "dataset.json").write_text(json.dumps(made.dataset_json))
    return folder


def exported_by_nnunet(found, branch):
    model = found.model
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        found.logits[branch], model.plans_manager, model.configuration_manager, model.label_manager, found.properties,
        return_probabilities=True, num_threads_torch=1)


def minus(text: str) -> str:
    return text.replace("-", "−")


# ---- the page -------------------------------------------------------------------------------------------------------

def test_the_page_is_well_formed_and_loads_nothing(page):
    outside = r"https?://|url\((?!#)|@import|//[a-z]"
    assert not re.search(outside, re.sub(r"base64,[^\"]*", "", page.source))
    assert not page.all("script") + page.all("link") + page.all("iframe")
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert attributes.get("href", "#").startswith("#")
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    wanted = {attributes["href"][1:] for _, attributes in page.elements if "href" in attributes}
    wanted |= {name for _, attributes in page.elements for value in attributes.values()
               for name in re.findall(r"url\(#(.+?)\)", value or "")}
    assert wanted and wanted <= set(identifiers)


def test_pictures_are_real_and_have_words(page, written, hippocampus):
    images = page.all("img")
    # two validation cases (best and worst) and one partially annotated one: image, label, student, teacher, entropy
    assert len(images) == 15
    for image in images:
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        assert content.startswith(b"\x89PNG") and len(content) > 1000 and len(image["alt"]) > 20
    drawings = [attributes for attributes in page.all("svg") if attributes.get("role") == "img"]
    assert len(drawings) >= 8 and all(len(drawing["aria-label"]) > 20 for drawing in drawings)
    names = sorted(file.name for file in written.parent.iterdir())
    cases = [*hippocampus["validation"][:2], hippocampus["partial"][0]]
    assert [name for name in names if not name.startswith("case_")] == [
        "calibration.png", "curves.png", "measures.png", PAGE]
    assert sorted(name[8:-4] for name in names if name.startswith("case_")) == sorted(cases)


def test_figures_are_those_of_nnunets_validation_and_of_the_files(page, small, originals, true_labels, predicted):
    """The student's figures are those of the files that the final validation has written, and of its summary.json.

    These come from another run of the network. The final validation gives hints to the teacher, the report gives none,
    so the teacher's figures are those of the predictions without hints.
    """
    shown = {}
    for row in page.rows["measures"]:
        shown.setdefault(tuple(row[0].removesuffix(" without hints").split()), row[1:])
    assert any(row[0].endswith(" teacher without hints") for row in page.rows["measures"])
    validation = small / "fold_0" / "validation"
    summary = json.loads((validation / "summary.json").read_text())
    dice = {Path(entry["prediction_file"]).name.removesuffix(".nii.gz"): entry["metrics"]
            for entry in summary["metric_per_case"]}
    classes = {"label_1": (1,), "label_2": (2,)}
    segmentations = {"student": [sitk.GetArrayFromImage(sitk.ReadImage(str(validation / f"{case}.nii.gz")))
                                 for case in predicted], "teacher": [pair[0] for pair in originals["teacher"]]}
    means = {}
    for branch in BRANCHES:
        measures = [measure_case(sitk.GetArrayFromImage(truth), segmentation, classes, truth.GetSpacing()[::-1])
                    for truth, segmentation in zip(true_labels, segmentations[branch])]
        for cls, (label,) in classes.items():
            if branch == "student":
                assert [case[cls]["Dice"] for case in measures] == pytest.approx(
                    [dice[case][str(label)]["Dice"] for case in predicted], nan_ok=True)
            for column, (measure, digits) in enumerate(MEASURES.items()):
                found = statistics([case[cls][measure] for case in measures])
                cell = shown[(cls, branch)][column].split()
                assert cell[0] == (minus(f"{found['mean']:.{digits}f}") if found["n"] else "none")
                assert cell[-1] == str(found["n"])
            without_distance = sum(case[cls]["NSD"] == 0 and np.isnan(case[cls]["HD95_mm"]) for case in measures)
            assert shown[(cls, branch)][-1].strip() == str(without_distance)
        means[branch] = [np.nanmean([case[cls]["Dice"] for cls in classes]) for case in measures]
    student, teacher = (np.mean(means[branch]) for branch in BRANCHES)
    assert f"Student {student:.3f}, teacher without hints {teacher:.3f}: mean Dice on 2 validation cases" in page.text
    assert minus(f"{np.mean(np.subtract(*means.values())):+.3f}") in page.text


def test_every_section_is_there_with_its_content(page, hippocampus):
    assert page.sections == ["measures", "cases", "partial", "calibration", "curves", "training"]
    for identifier, words in {
            "measures": ("label_1", "student", "teacher", "HD95"),
            "cases": ("Best", "Worst", *hippocampus["validation"][:2], "ground truth"),
            "partial": (hippocampus["partial"][0], "partial annotation"),
            "curves": ("Supervised loss", "KL", "Entropy", "Pseudo-Dice"),
            "training": ("partially annotated", hippocampus["partial"][0], "2d_export", "PlainConvUNet", "nnunetv2")
            }.items():
        for word in words:
            assert word in page.by_section[identifier], (identifier, word)
    assert "Median" not in page.by_section["cases"]  # of two cases there is none between them
    pictures = {identifier: page.by_section[identifier].partition("Slice")[2] for identifier in ("cases", "partial")}
    assert "ground truth" not in pictures["partial"] and "partial annotation" not in pictures["cases"]


def test_changed_settings_are_marked(page, small):
    record = json.loads((small / "fold_0" / "confkd.json").read_text())
    settings, chosen = record["settings"], record["chosen"]
    share = round(chosen["full_share"], 3)
    told = f"weight_teacher 1.0, weight_kl 3.0, weight_entropy 0.01, full_share {share}, equal_kinds"
    assert f"unless it was set: {told}" in page.text
    changed = {key for key, value in Settings().as_dict().items() if settings[key] != value}
    assert changed == {"weight_kl", "epochs", "iterations_per_epoch", "seed", "teacher_width"}  # by the fixture
    marked = re.findall(r'<tr class="changed"><th scope="row" class="words">(\w+)</th>', page.source)
    assert set(marked) == changed
    assert f"5 of {len(settings)} settings differ from the default" in page.text and "weight_kl" in page.text


def test_the_curves_are_those_of_the_checkpoint(page, small):
    curves = torch.load(small / "fold_0" / "checkpoint_final.pth", weights_only=False)["logging"]
    labels = " ".join(a["aria-label"] for a in page.all("svg") if "aria-label" in a)
    for key in ("loss_student", "loss_teacher", "loss_kl", "loss_entropy"):
        assert f"from {curves[key][0]:.3g} to {curves[key][-1]:.3g}" in labels


def test_calibration_is_that_of_the_branches_predictions(page, originals, true_labels):
    """Against bins counted here, from the branches' probabilities on the grid of the labels."""
    truth = np.concatenate([sitk.GetArrayFromImage(image).ravel() for image in true_labels])
    probabilities = {branch: np.concatenate([p.reshape(3, -1) for _, p in cases], 1)
                     for branch, cases in originals.items()}
    asked = np.any([(p.argmax(0) > 0) | (p.max(0) < 0.99) for p in probabilities.values()], 0)
    words = " ".join(page.by_section["calibration"].split())
    for branch, p in probabilities.items():
        for name, where in (("all voxels", slice(None)), ("in question", asked)):
            confidence, right = p.max(0)[where].astype(float), (p.argmax(0) == truth)[where]
            bins = np.ceil(confidence * 15)
            gaps = [abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in np.unique(bins)]
            shares = f"{100 * confidence.mean():.2f} % {100 * right.mean():.2f} %"
            title = "teacher without hints" if branch == "teacher" else branch
            expected = f"{name} {title} {right.size:,} {sum(gaps) / right.size:.4f} {shares}"
            assert expected in words.replace("\u00a0", " ")


def test_what_is_counted_is_what_nnunet_exports(predicted, originals):
    for number, found in enumerate(predicted.values()):
        found.summarise()
        for branch in BRANCHES:
            segmentation, p = originals[branch][number]
            np.testing.assert_array_equal(found.originals[branch].segmentation, segmentation)
            np.testing.assert_allclose(found.originals[branch].confidence[0], p.max(0), atol=1e-6)


# ---- strangers' names -----------------------------------------------------------------------------------------------

def test_hostile_names_of_cases_classes_and_folders_are_escaped(
        small, hippocampus, nnunet, truths, read_page, restrict, edit_json, tmp_path, monkeypatch):
    """The pictures are drawn for real: the names are in them, too."""
    monkeypatch.setattr(sections, "FEWEST", 1)
    source, base = nnunet.preprocessed(HIPPOCAMPUS), tmp_path / "preprocessed" / HIPPOCAMPUS
    for folder in (PLANS_2D, "gt_segmentations"):
        (base / folder).mkdir(parents=True)
    old, name = hippocampus["validation"][0], HOSTILE
    for ending in (".b2nd", "_seg.b2nd", ".pkl"):
        shutil.copyfile(source / PLANS_2D / f"{old}{ending}", base / PLANS_2D / f"{name}{ending}")
    truth = sitk.ReadImage(str(truths / f"{old}.nii.gz"))
    truth.SetSpacing((0.5, 1, 4))  # a spacing of 1 would not show whether mm are counted along the right axes
    sitk.WriteImage(truth, str(base / "gt_segmentations" / f"{name}.nii.gz"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    model = shutil.copytree(small, tmp_path / "<b>model")
    restrict(model, [name], full=[f"{HOSTILE} full"])
    edit_json(model / "dataset.json", labels={
        "background": 0, f"{HOSTILE} one": 1, "</style><script>alert(2)</script>": 2, "ignore": 3})
    predictions = shutil.copytree(base / "gt_segmentations", tmp_path / "<i>given")
    page = read_page(report(model, predictions=predictions, output=tmp_path / "out"))
    assert not page.all("script") and not page.all("b") and len(page.all("img")) == 6
    assert not [tag for tag, attributes in page.elements if "onerror" in attributes]
    for word in (HOSTILE, f"{HOSTILE} full", f"{HOSTILE} one", "</style><script>alert(2)</script>", "<i>given"):
        assert " ".join(word.split()) in page.text
    student = sitk.ReadImage(str(small / "fold_0" / "validation" / f"{old}.nii.gz"))
    arrays = map(sitk.GetArrayFromImage, (truth, student))
    expected = measure_case(*arrays, {"one": (1,)}, (4, 1, 0.5))["one"]["HD95_mm"]
    assert page.rows["measures"][1][3].split()[0] == (f"{expected:.2f}" if np.isfinite(expected) else "none")
    assert page.rows["measures"][3][3].split()[0] == "0.00"  # what was given is the ground truth
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {PAGE, "calibration.png", "curves.png", "measures.png",
                     "case_01_img_src_x_onerror_alert_1_amp_x_1.png"}


# ---- other models ---------------------------------------------------------------------------------------------------

def test_a_stock_model_is_reported_without_a_word_of_a_teacher(
        small, nnunet, hippocampus, read_page, quick, tmp_path, monkeypatch):
    stock = export(small, tmp_path / "nnUNetTrainer__plans__2d_export")  # the student as a model of stock nnU-Net
    monkeypatch.setattr("nnunet_confkd.report.cases.PARTIAL_CASES", 1)
    base = tmp_path / "preprocessed" / HIPPOCAMPUS
    base.mkdir(parents=True)
    for folder in (PLANS_2D, "gt_segmentations"):
        (base / folder).symlink_to(nnunet.preprocessed(HIPPOCAMPUS) / folder)
    training = [*hippocampus["full"], *hippocampus["partial"], *hippocampus["unlabelled"]]
    split = [{"train": training, "val": hippocampus["validation"][:1]}]
    (base / "splits_final.json").write_text(json.dumps(split))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    page = read_page(report(stock, output=tmp_path / "out"))
    assert page.sections == ["measures", "cases", "partial", "calibration", "curves", "training"]
    assert "teacher" not in page.text.lower() and "student" not in page.text.lower()
    assert len(page.all("img")) == 8  # without the teacher's segmentation
    assert "fold 0 5 30 10 1" in " ".join(page.by_section["training"].split())
    assert "Pseudo-Dice" in page.by_section["curves"] and "KL" not in page.by_section["curves"]
    assert "continued" not in page.text


def test_the_baseline_of_one_branch_has_no_teacher(nnunet, hippocampus, read_page, restrict, quick, tmp_path):
    configuration = nnunet.configure(HIPPOCAMPUS, "2d_report", "2d")
    model = untrained(nnunet, HIPPOCAMPUS, configuration, "ConfKDTrainer_partialOnly")
    restrict(model, hippocampus["validation"][:1])
    page = read_page(report(model, output=tmp_path / "out"))
    assert page.sections == ["measures", "cases", "calibration", "curves", "training"]
    # the settings have their names, among them weight_teacher and kl_teacher
    assert "teacher" not in "".join(page.by_section[part] for part in ("measures", "cases", "calibration")).lower()
    assert len(page.all("img")) == 4


@pytest.mark.slow  # 3-D data that are planned and preprocessed for it; test_cases.py has regions in short
def test_regions_in_3d(nnunet, regions, read_page, tmp_path):
    configuration = nnunet.configure(regions, "3d_report", "3d_fullres", {"seed": 1})
    page = read_page(report(untrained(nnunet, regions, configuration, "ConfKDTrainer"), output=tmp_path / "out"))
    assert page.sections[:4] == ["measures", "cases", "partial", "calibration"]
    assert "whole" in page.by_section["measures"] and "posterior" in page.by_section["measures"]
    assert "whole (1 2), posterior (2); ignore: 3" in page.by_section["training"]


def test_several_folds_are_pooled_and_a_case_of_two_is_told_apart(
        model, hippocampus, read_page, restrict, quick, tmp_path, monkeypatch):
    shutil.copytree(model / "fold_0", model / "fold_1")
    first, second = hippocampus["validation"][:2]
    restrict(model, [first])
    restrict(model, [first, second], fold=1)
    page = read_page(report(model, output=tmp_path / "out"))
    assert "on 3 validation cases of 2 patients" in page.text and "folds 0, 1" in page.text
    assert f"{first} (fold_0)" in page.text and f"{first} (fold_1)" in page.text and f"{second} (" not in page.text
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))  # without data, one fold alone is quick
    one = read_page(report(model, ["1"], output=tmp_path / "one"))
    assert "fold 1, after" in one.text and "fold 0" not in one.text


def test_intervals_are_by_patient_and_training_cases_are_called_that(
        model, hippocampus, read_page, restrict, edit_json, quick, tmp_path):
    """The two cases are of one patient, so there is nothing to draw. One of them was trained on."""
    first, second = hippocampus["validation"][:2]
    restrict(model, [first, second], full=[first])
    edit_json(model / "dataset.json", patient_pattern="(hippocampus)_")
    record = json.loads((model / "fold_0" / "confkd.json").read_text())
    edit_json(model / "fold_0" / "confkd.json", history=[
        {"until_epoch": 1, "settings": record["settings"] | {"weight_kl": 0.125}}])
    page = read_page(report(model, output=tmp_path / "out"))
    assert "on 2 validation cases of 1 patient" in page.text and "Mean over 2 cases of 1 patient" in page.text
    assert page.text.count("too few patients for an interval") == 3
    assert not re.search(r"95\xa0% interval [\d−+]", page.text)
    assert "fold_0: 1 of its 2 validation cases are training cases as well" in page.text
    assert "Fold 0 was continued with other settings after epoch 1" in page.by_section["training"]
    assert f"weight_kl 0.125 (then {record['settings']['weight_kl']})" in page.by_section["training"]


def test_what_two_cases_cannot_show_is_left_out(small, read_page, quick, tmp_path):
    page = read_page(report(small, output=tmp_path / "out"))
    assert "Wilcoxon" not in page.text and "On the diagonal" not in page.text
    for section in ("measures", "calibration"):
        assert "fewer than five patients, too few for box plots, p-values" in page.by_section[section]
        assert not (tmp_path / "out" / f"{section}.png").exists() and page.rows[section]
    assert not any(image.get("id", "").startswith(("measures", "calibration")) for image in page.all("svg"))
    assert "Voxels are in question if a branch predicts" in page.by_section["calibration"]


def test_figures_of_training_cases_alone_are_in_the_headline(
        model, hippocampus, read_page, restrict, quick, tmp_path):
    case = hippocampus["full"][0]
    restrict(model, [case], full=[case])
    assert "mean Dice on 1 training case" in read_page(report(model, output=tmp_path / "out")).text


# ---- bad input ------------------------------------------------------------------------------------------------------

def test_without_preprocessed_data_curves_and_record_are_shown(small, read_page, quick, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "gone"))
    page = read_page(report(small, output=tmp_path / "out"))
    assert page.sections == ["curves", "training"]
    assert f"expected in {tmp_path / 'gone' / HIPPOCAMPUS / PLANS_2D}" in page.text
    assert not page.all("img") and "partially annotated" in page.by_section["training"]
    with pytest.raises(InputError, match="validation data are missing \\(.*expected in"):
        report(small, predictions=tmp_path, output=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    monkeypatch.delenv("nnUNet_preprocessed")
    assert "nnUNet_preprocessed is not set" in read_page(report(small, output=tmp_path / "out")).text


def test_a_case_that_is_gone_is_named(model, restrict, tmp_path):
    restrict(model, ["nobody"])
    with pytest.raises(InputError, match="'nobody' is not complete"):
        report(model, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_patient_pattern_that_does_not_match_is_named(model, edit_json, tmp_path):
    edit_json(model / "dataset.json", patient_pattern="nobody")
    with pytest.raises(InputError, match="dataset.json: the patient pattern 'nobody' does not match these cases"):
        report(model, output=tmp_path / "out")


@pytest.mark.parametrize("arguments, text", [
    (["--model", "nowhere"], "there is no such folder"),
    (["--model", "."], "plans.json and dataset.json missing"),
    (["--fold", "3"], "has no trained fold 3; there is fold_0"),
    (["-chk", "checkpoint_mine.pth"], "no checkpoint_mine.pth in fold_0.*-chk"),
    (["--predictions", "nowhere"], "nowhere: there is no such folder"),
    (["--predictions", "."], "does not match the model: no hippocampus_.*1 more of the 2 validation cases"),
    (["--output", "file"], "file: cannot be written"),
    (["--output", "file/below"], "below: cannot be written"),
    (["--output", "full"], "full: holds files that are not of a report \\(thesis.txt\\)"),
])
def test_bad_input_is_one_clear_error(small, tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("precious")
    options = {"--model": str(small), "--output": "out"} | dict(zip(arguments[::2], arguments[1::2]))
    assert cli.main(["report", *(word for pair in options.items() for word in pair), "-device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert re.search(text, error) and error.startswith("confkd report: ") and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    assert Path("full/thesis.txt").read_text() == "precious"


def test_a_model_of_an_unknown_trainer_is_refused(model, tmp_path):
    file = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    torch.save(checkpoint | {"trainer_name": "SomebodysTrainer"}, file)
    with pytest.raises(InputError, match="checkpoint_final.pth: its network cannot be built.*SomebodysTrainer"):
        report(model, output=tmp_path / "out")


def test_an_earlier_report_is_replaced_only_by_a_whole_one(written, small, quick, tmp_path, monkeypatch):
    output = shutil.copytree(written.parent, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "gone"))
    with monkeypatch.context() as patch:
        def interrupted(*_):
            raise KeyboardInterrupt
        patch.setattr("nnunet_confkd.report.sections.save_charts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            report(small, output=output)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert list(tmp_path.iterdir()) == [output]
    report(small, output=output)
    assert sorted(file.name for file in output.iterdir()) == ["curves.png", PAGE]
    assert list(tmp_path.iterdir()) == [output]
    (output / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="notes.txt"):
        report(small, output=output)
