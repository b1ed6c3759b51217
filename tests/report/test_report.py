from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_confkd import cli
from nnunet_confkd.errors import InputError
from nnunet_confkd.evaluation.calibration import Counts
from nnunet_confkd.evaluation.metrics import MEASURES, measure_case, statistics
from nnunet_confkd.inference.export import export
from nnunet_confkd.report import pictures as report_pictures
from nnunet_confkd.report.cases import VOXELS, Findings, Model, Predictor, _spread
from nnunet_confkd.report.report import PAGE, report
from nnunet_confkd.training.settings import Settings

HIPPOCAMPUS, PLANS_2D = "Dataset004_Hippocampus", "nnUNetPlans_2d"
VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = "<img src=x onerror=alert(1)>'\"&amp; $x_1$ ü"


class Page(HTMLParser):
    """A page taken apart; an error where its elements are not nested."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.stack, self.elements, self.texts, self.by_section, self.rows = [], [], [], {}, {}
        self.section = None
        self.feed(text)
        self.close()
        assert not self.stack, f"left open: {self.stack}"
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "td" in self.stack or "th" in self.stack:
            self.rows[self.section][-1][-1] += f" {data}"
        if "style" not in self.stack:
            self.texts.append(data)
            if self.section:
                self.by_section[self.section] = self.by_section.get(self.section, "") + " " + data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(page: Path) -> Page:
    return Page(page.read_text(encoding="utf-8"))


def sections(page: Page) -> list[str]:
    return [attributes["id"] for attributes in page.all("section")]


@pytest.fixture(scope="module")
def small(hippocampus_model, hippocampus, nnunet, tmp_path_factory):
    """A copy of the model that knows of two validation cases and one partially labelled training case."""
    model = tmp_path_factory.mktemp("report") / hippocampus_model.name
    shutil.copytree(hippocampus_model, model)
    restrict(model, hippocampus["validation"][:2], hippocampus["partial"][:1])
    (model / "truths").symlink_to(nnunet.preprocessed(HIPPOCAMPUS) / "gt_segmentations")
    return model


def restrict(model: Path, validation: list[str], partial: list[str], full: list[str] = (), fold: int = 0) -> None:
    file = model / f"fold_{fold}" / "confkd.json"
    record = json.loads(file.read_text())
    kinds = {case: "full" for case in full} | {case: "partial" for case in partial}
    record |= {"supervision": kinds, "pseudo_dice_on": list(validation)}
    file.write_text(json.dumps(record))


@pytest.fixture(scope="module")
def written(small, tmp_path_factory) -> Path:
    """Its report, by the command: the page."""
    output = tmp_path_factory.mktemp("page") / "out"
    assert cli.main(["report", "--model", str(small), "--output", str(output), "-device", "cpu"]) == 0
    return output / PAGE


def untrained(nnunet, dataset: str, configuration: str, trainer: str, model: Path | None = None) -> Path:
    """A model as a training leaves it, but for the training: its folder. Curves of two epochs are made up."""
    made = nnunet.trainer(dataset, configuration, trainer)
    made.initialize()
    made.get_tr_and_val_datasets()
    curves = made.logger.local_logger.my_fantastic_logging
    for key in curves:
        curves[key] = [0.5, 0.25]
    made.current_epoch = 1
    made.save_checkpoint(str(Path(made.output_folder) / "checkpoint_final.pth"))
    folder = nnunet.model(dataset, configuration, trainer)
    (folder / "plans.json").write_text(json.dumps(made.plans_manager.plans))
    (folder / "dataset.json").write_text(json.dumps(made.dataset_json))
    return folder


# ---- the page -------------------------------------------------------------------------------------------------------

def test_the_page_is_well_formed_and_loads_nothing(written):
    text = written.read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?://|url\((?!#)|@import|//[a-z]", re.sub(r"base64,[^\"]*", "", text))
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


def test_pictures_are_real_and_have_words(written, hippocampus):
    page = read(written)
    images = page.all("img")
    # two validation cases (best and worst) and one partial one: image, label, student, teacher, entropy
    assert len(images) == 15
    for image in images:
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        assert content.startswith(b"\x89PNG") and len(content) > 1000 and len(image["alt"]) > 20
    drawings = [attributes for attributes in page.all("svg") if attributes.get("role") == "img"]
    assert len(drawings) >= 8 and all(len(drawing["aria-label"]) > 20 for drawing in drawings)
    names = sorted(file.name for file in written.parent.iterdir())
    cases = [*hippocampus["validation"][:2], hippocampus["partial"][0]]
    assert [name for name in names if not name.startswith("case_")] == ["calibration.png", "curves.png", "measures.png", PAGE]
    assert sorted(name[8:-4] for name in names if name.startswith("case_")) == sorted(cases)


def test_figures_are_those_of_nnunets_validation_and_of_the_files(written, small, hippocampus):
    """The student's Dice against the summary.json of nnU-Net's evaluation; all measures against those of the files that the final
    validation has written, which come from another run of the network. The final validation gives hints to the teacher, the report gives none."""
    page, shown = read(written), {}
    model = Model(small, None, "checkpoint_final.pth")
    predict = Predictor(model, model.fold_folders[0], ["student", "teacher"], torch.device("cpu"))
    classes = {"label_1": (1,), "label_2": (2,)}
    for row in page.rows["measures"]:
        shown.setdefault(tuple(row[0].removesuffix(" without hints").split()), row[1:])
    assert any(row[0].endswith(" teacher without hints") for row in page.rows["measures"])
    cases = hippocampus["validation"][:2]
    means = {}
    summary = json.loads((small / "fold_0" / "validation" / "summary.json").read_text())
    dice = {Path(entry["prediction_file"]).name.removesuffix(".nii.gz"): entry["metrics"] for entry in summary["metric_per_case"]}
    for branch in ("student", "teacher"):
        measures = []
        for case in cases:
            truth = sitk.ReadImage(str(small / "truths" / f"{case}.nii.gz"))
            predicted = (sitk.GetArrayFromImage(sitk.ReadImage(str(small / "fold_0" / "validation" / f"{case}.nii.gz")))
                         if branch == "student" else predict(case).original("teacher")[0])
            measures.append(measure_case(sitk.GetArrayFromImage(truth), predicted, classes, truth.GetSpacing()[::-1]))
            for cls, (label,) in classes.items() if branch == "student" else ():
                assert measures[-1][cls]["Dice"] == pytest.approx(dice[case][str(label)]["Dice"], nan_ok=True)
        for cls in classes:
            for column, (measure, digits) in enumerate(MEASURES.items()):
                found = statistics([case[cls][measure] for case in measures])
                value = f"{found['mean']:.{digits}f}".replace("-", "−") if found["n"] else "none"
                cell = shown[(cls, branch)][column].split()
                assert cell[0] == value and cell[-1] == str(found["n"])
            distances = sum(case[cls]["NSD"] == 0 and np.isnan(case[cls]["HD95_mm"]) for case in measures)
            assert shown[(cls, branch)][-1].strip() == str(distances)
        means[branch] = [np.nanmean([case[cls]["Dice"] for cls in classes]) for case in measures]
    title = "Student {:.3f}, teacher without hints {:.3f}: mean Dice on 2 validation cases".format(*(np.mean(v) for v in means.values()))
    assert title in page.text
    difference = np.mean(np.subtract(means["student"], means["teacher"]))
    assert f"{difference:+.3f}".replace("-", "−") in page.text


def test_every_section_is_there_with_its_content(written, small, hippocampus):
    page = read(written)
    assert sections(page) == ["measures", "cases", "partial", "calibration", "curves", "training"]
    for identifier, words in {
            "measures": ("label_1", "student", "teacher", "HD95"), "cases": ("Best", "Worst", *hippocampus["validation"][:2], "truth"),
            "partial": (hippocampus["partial"][0], "weak label"), "curves": ("Supervised loss", "KL", "Entropy", "Pseudo-Dice"),
            "training": ("partial label", hippocampus["partial"][0], "2d_export", "PlainConvUNet", "nnunet_confkd")}.items():
        for word in words:
            assert word in page.by_section[identifier], (identifier, word)
    assert "Median" not in page.by_section["cases"]  # of two cases there is none between them
    assert "truth" not in page.by_section["partial"] and "weak label" not in page.by_section["cases"]


def test_changed_settings_are_told_from_defaults(written, small):
    settings = json.loads((small / "fold_0" / "confkd.json").read_text())["settings"]
    changed = {key for key, value in Settings().as_dict().items() if settings[key] != value}
    assert changed == {"epochs", "iterations_per_epoch", "seed"}  # as the fixture has set them
    text = written.read_text(encoding="utf-8")
    assert set(re.findall(r'<tr class="changed"><th scope="row" class="words">(\w+)</th>', text)) == changed
    assert f"3 of {len(settings)} settings differ from the default" in text and "weight_kl" in text


def test_the_curves_are_those_of_the_checkpoint(written, small):
    curves = torch.load(small / "fold_0" / "checkpoint_final.pth", weights_only=False)["logging"]
    labels = " ".join(a["aria-label"] for a in read(written).all("svg") if "aria-label" in a)
    for key in ("loss_student", "loss_teacher", "loss_kl", "loss_entropy"):
        assert f"from {curves[key][0]:.3g} to {curves[key][-1]:.3g}" in labels


def test_calibration_is_that_of_the_branches_predictions(written, small, hippocampus):
    """Against bins counted here, from the branches' probabilities on the grid of the labels."""
    model = Model(small, None, "checkpoint_final.pth")
    predict = Predictor(model, model.fold_folders[0], ["student", "teacher"], torch.device("cpu"))
    probabilities, truths = {"student": [], "teacher": []}, []
    for case in hippocampus["validation"][:2]:
        prediction = predict(case)
        for branch, cases in probabilities.items():
            cases.append(prediction.original(branch)[1].reshape(3, -1))
        truths.append(sitk.GetArrayFromImage(sitk.ReadImage(str(model.truths / f"{case}.nii.gz"))).ravel())
    truth = np.concatenate(truths)
    probabilities = {branch: np.concatenate(cases, 1) for branch, cases in probabilities.items()}
    asked = np.any([(p.argmax(0) > 0) | (p.max(0) < 0.99) for p in probabilities.values()], 0)
    words = " ".join(read(written).by_section["calibration"].split())
    for branch, p in probabilities.items():
        for name, where in (("all voxels", slice(None)), ("in question", asked)):
            confidence, right = p.max(0)[where].astype(float), (p.argmax(0) == truth)[where]
            bins = np.ceil(confidence * 15)
            gaps = [abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in np.unique(bins)]
            shares = f"{100 * confidence.mean():.2f} % {100 * right.mean():.2f} %"
            called = "teacher without hints" if branch == "teacher" else branch
            expected = f"{name} {called} {right.size:,} {sum(gaps) / right.size:.4f} {shares}"
            assert expected in words.replace("\u00a0", " ")


def test_voxels_are_in_question_where_a_branch_sees_foreground_or_is_not_sure():
    found = Findings.__new__(Findings)
    found.model = SimpleNamespace(label_manager=SimpleNamespace(has_regions=False, ignore_label=None))
    found.counts = {branch: {voxels: Counts.none() for voxels in VOXELS} for branch in ("student", "teacher")}
    found.case_counts = {branch: {voxels: [] for voxels in VOXELS} for branch in ("student", "teacher")}
    # sure background; foreground to the student alone; the teacher in doubt; foreground that both miss: the truth does not choose
    truth, foreground = np.array([0, 0, 0, 1]), {"student": [0.001, 0.999, 0.001, 0.001], "teacher": [0.001, 0.001, 0.1, 0.001]}
    p = {branch: np.stack((1 - np.array(values), values)) for branch, values in foreground.items()}
    found._count(truth, {branch: (values.argmax(0), values) for branch, values in p.items()})
    numbers = {(branch, voxels): (c.count.sum(), c.correct.sum()) for branch, of in found.counts.items() for voxels, c in of.items()}
    assert numbers == {("student", "all"): (4, 2), ("student", "in question"): (2, 1),
                       ("teacher", "all"): (4, 3), ("teacher", "in question"): (2, 2)}


# ---- strangers' names -----------------------------------------------------------------------------------------------

def test_hostile_names_of_cases_classes_and_folders_are_escaped(small, hippocampus, nnunet, tmp_path, monkeypatch):
    source, base = nnunet.preprocessed(HIPPOCAMPUS), tmp_path / "preprocessed" / HIPPOCAMPUS
    for folder in (PLANS_2D, "gt_segmentations"):
        (base / folder).mkdir(parents=True)
    old, name = hippocampus["validation"][0], HOSTILE
    for ending in (".b2nd", "_seg.b2nd", ".pkl"):
        shutil.copyfile(source / PLANS_2D / f"{old}{ending}", base / PLANS_2D / f"{name}{ending}")
    truth = sitk.ReadImage(str(source / "gt_segmentations" / f"{old}.nii.gz"))
    truth.SetSpacing((0.5, 1, 4))  # the cube that it is would not show whether mm are counted along the right axes
    sitk.WriteImage(truth, str(base / "gt_segmentations" / f"{name}.nii.gz"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    model = tmp_path / "<b>model"
    shutil.copytree(small, model)
    restrict(model, [name], [], [f"{HOSTILE} full"])
    described = json.loads((model / "dataset.json").read_text())
    described["labels"] = {"background": 0, f"{HOSTILE} one": 1, "</style><script>alert(2)</script>": 2, "ignore": 3}
    (model / "dataset.json").write_text(json.dumps(described))
    predictions = tmp_path / "<i>given"
    shutil.copytree(base / "gt_segmentations", predictions)
    page = read(report(model, predictions=predictions, output=tmp_path / "out"))
    assert not page.all("script") and not page.all("b") and len(page.all("img")) == 6
    assert not [tag for tag, attributes in page.elements if "onerror" in attributes]
    for word in (HOSTILE, f"{HOSTILE} full", f"{HOSTILE} one", "</style><script>alert(2)</script>", "<i>given"):
        assert " ".join(word.split()) in page.text
    student = sitk.ReadImage(str(small / "fold_0" / "validation" / f"{old}.nii.gz"))
    expected = measure_case(*map(sitk.GetArrayFromImage, (truth, student)), {"one": (1,)}, (4, 1, 0.5))["one"]["HD95_mm"]
    assert page.rows["measures"][1][3].split()[0] == (f"{expected:.2f}" if np.isfinite(expected) else "none")
    assert page.rows["measures"][3][3].split()[0] == "0.00"  # what was given is the truth
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {PAGE, "calibration.png", "curves.png", "measures.png", "case_01_img_src_x_onerror_alert_1_amp_x_1.png"}


# ---- other models ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stock(small, tmp_path_factory) -> Path:
    """The student as a model of stock nnU-Net."""
    return export(small, tmp_path_factory.mktemp("stock") / "nnUNetTrainer__plans__2d_export")


def test_a_stock_model_is_reported_without_a_word_of_a_teacher(stock, nnunet, hippocampus, tmp_path, monkeypatch):
    from nnunet_confkd.report import cases as report_cases

    monkeypatch.setattr(report_cases, "PARTIAL_CASES", 1)
    base = tmp_path / "preprocessed" / HIPPOCAMPUS
    base.mkdir(parents=True)
    for folder in (PLANS_2D, "gt_segmentations"):
        (base / folder).symlink_to(nnunet.preprocessed(HIPPOCAMPUS) / folder)
    training = [*hippocampus["full"], *hippocampus["partial"], *hippocampus["unlabelled"]]
    (base / "splits_final.json").write_text(json.dumps([{"train": training, "val": hippocampus["validation"][:1]}]))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    page = read(report(stock, output=tmp_path / "out"))
    assert sections(page) == ["measures", "cases", "partial", "calibration", "curves", "training"]
    assert "teacher" not in page.text.lower() and "student" not in page.text.lower()
    assert len(page.all("img")) == 8  # without the teacher's segmentation
    assert re.search(r"fold 0 5 30 10 1", " ".join(page.by_section["training"].split()))
    assert "Pseudo-Dice" in page.by_section["curves"] and "KL" not in page.by_section["curves"]


def test_the_baseline_of_one_branch_has_no_teacher(nnunet, hippocampus, tmp_path):
    model = untrained(nnunet, HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "2d_report", "2d"), "ConfKDTrainer_partialOnly")
    restrict(model, hippocampus["validation"][:1], [])
    page = read(report(model, output=tmp_path / "out"))
    assert sections(page) == ["measures", "cases", "calibration", "curves", "training"]
    # the settings have their names, among them weight_teacher and kl_teacher
    assert "teacher" not in "".join(page.by_section[part] for part in ("measures", "cases", "calibration")).lower()
    assert len(page.all("img")) == 4


def test_regions_in_3d(nnunet, regions, tmp_path):
    configuration = nnunet.configure(regions, "3d_report", "3d_fullres", {"seed": 1})
    page = read(report(untrained(nnunet, regions, configuration, "ConfKDTrainer"), output=tmp_path / "out"))
    assert sections(page)[:4] == ["measures", "cases", "partial", "calibration"]
    assert "whole" in page.by_section["measures"] and "posterior" in page.by_section["measures"]
    assert "whole (1 2), posterior (2); ignore: 3" in page.by_section["training"]


def test_several_folds_are_pooled_and_a_case_of_two_is_told_apart(small, hippocampus, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(small, model)
    shutil.copytree(model / "fold_0", model / "fold_1")
    first, second = hippocampus["validation"][:2]
    restrict(model, [first], [])
    restrict(model, [first, second], [], fold=1)
    page = read(report(model, output=tmp_path / "out"))
    assert "on 3 validation cases of 2 patients" in page.text and "folds 0, 1" in page.text
    assert f"{first} (fold_0)" in page.text and f"{first} (fold_1)" in page.text and f"{second} (" not in page.text
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))  # nothing there: one fold, quickly
    one = read(report(model, ["1"], output=tmp_path / "one"))
    assert "fold 1, after" in one.text and "fold 0" not in one.text


def test_intervals_are_by_patient(small, tmp_path):
    """The two validation cases are of one patient: there is nothing to draw."""
    model = tmp_path / small.name
    shutil.copytree(small, model)
    described = json.loads((model / "dataset.json").read_text())
    (model / "dataset.json").write_text(json.dumps(described | {"patient_pattern": "(hippocampus)_"}))
    page = read(report(model, output=tmp_path / "out"))
    assert "on 2 validation cases of 1 patient" in page.text and "Means over the 2 cases of 1 patient" in page.text
    assert page.text.count("too few patients for an interval") == 3 and not re.search(r"95\xa0% interval [\d−+]", page.text)
    (model / "dataset.json").write_text(json.dumps(described | {"patient_pattern": "nobody"}))
    with pytest.raises(InputError, match="dataset.json: the patient pattern 'nobody' does not match these cases"):
        report(model, output=tmp_path / "out")


def test_figures_on_training_cases_are_called_that(small, hippocampus, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(small, model)
    case = hippocampus["full"][0]
    restrict(model, [case], [], [case])
    page = read(report(model, output=tmp_path / "out"))
    assert "on 1 training case " in page.text and "do not tell how it does on new cases" in page.text


# ---- bad input ------------------------------------------------------------------------------------------------------

def test_without_preprocessed_data_curves_and_record_are_shown_and_the_expected_path_told(small, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "gone"))
    page = read(report(small, output=tmp_path / "out"))
    assert sections(page) == ["curves", "training"]
    assert f"expected in {tmp_path / 'gone' / HIPPOCAMPUS / PLANS_2D}" in page.text
    assert not page.all("img") and "partial label" in page.by_section["training"]
    with pytest.raises(InputError, match="validation data are missing \\(expected in"):
        report(small, predictions=tmp_path, output=tmp_path / "other")
    monkeypatch.delenv("nnUNet_preprocessed")
    assert "nnUNet_preprocessed is not set" in read(report(small, output=tmp_path / "out")).text
    assert not (tmp_path / "other").exists()


def test_a_case_that_is_gone_is_named(small, hippocampus, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(small, model)
    restrict(model, ["nobody"], [])
    with pytest.raises(InputError, match="'nobody' is not complete"):
        report(model, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, text", [
    (["--model", "nowhere"], "there is no such folder"),
    (["--model", "."], "plans.json and dataset.json missing"),
    (["--fold", "3"], "has no trained fold 3; there is fold_0"),
    (["-chk", "checkpoint_mine.pth"], "no checkpoint_mine.pth in fold_0.*-chk"),
    (["--predictions", "nowhere"], "nowhere: there is no such folder"),
    (["--predictions", "."], "does not match the model: no hippocampus_.*1 more of the 2 validation cases"),
    (["--output", "file"], "file: cannot be written"),
    (["--output", "file/below"], "below: cannot be written"),
    (["--output", "full"], "full: holds files that are no report's \\(thesis.txt\\)"),
])
def test_bad_input_is_one_clear_error(small, tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("precious")
    given = dict(zip(arguments[::2], arguments[1::2]))
    options = {"--model": str(small), "--output": "out"} | given
    assert cli.main(["report", *(word for pair in options.items() for word in pair), "-device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert re.search(text, error) and error.startswith("confkd report: ") and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"] and Path("full/thesis.txt").read_text() == "precious"


def test_a_model_of_an_unknown_trainer_is_refused(small, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(small, model)
    file = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    torch.save(checkpoint | {"trainer_name": "SomebodysTrainer"}, file)
    with pytest.raises(InputError, match="checkpoint_final.pth: its network cannot be built.*SomebodysTrainer"):
        report(model, output=tmp_path / "out")


def test_predictions_on_another_grid_are_refused(small, nnunet, hippocampus, tmp_path):
    for case in hippocampus["validation"][:2]:
        label = sitk.ReadImage(str(nnunet.preprocessed(HIPPOCAMPUS) / "gt_segmentations" / f"{case}.nii.gz"))
        sitk.WriteImage(label[1:], str(tmp_path / f"{case}.nii.gz"))
    with pytest.raises(InputError, match="shape .* are not those of the true label"):
        report(small, predictions=tmp_path, output=tmp_path / "out")


def test_an_earlier_report_is_replaced_but_not_by_half_a_one(written, small, tmp_path, monkeypatch):
    output = tmp_path / "out"
    shutil.copytree(written.parent, output)
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "gone"))
    with monkeypatch.context() as patch:
        def interrupted(*_):
            raise KeyboardInterrupt
        patch.setattr("nnunet_confkd.report.sections.save_charts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            report(small, output=output)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before and list(tmp_path.iterdir()) == [output]
    report(small, output=output)
    assert sorted(file.name for file in output.iterdir()) == ["curves.png", PAGE] and list(tmp_path.iterdir()) == [output]
    (output / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="notes.txt"):
        report(small, output=output)


# ---- pictures -------------------------------------------------------------------------------------------------------

def test_the_slice_that_is_shown_holds_most_foreground(small, hippocampus):
    model = Model(small, None, "checkpoint_final.pth")
    predict = Predictor(model, model.fold_folders[0], ["student", "teacher"], torch.device("cpu"))
    prediction = predict(hippocampus["validation"][0])
    shown = prediction.slice()
    areas = [((prediction.seg[i] == 1) | (prediction.seg[i] == 2)).sum() + sum((prediction.logits[b][:, i].argmax(0) > 0).sum() for b in (
        "student", "teacher")) for i in range(len(prediction.seg))]
    assert areas[shown["index"]] == max(areas) > 0 and shown["count"] == len(areas)
    np.testing.assert_array_equal(shown["label"], prediction.seg[shown["index"]])
    p = np.exp(prediction.logits["student"][:, shown["index"]].numpy().astype(float))
    p /= p.sum(0)
    np.testing.assert_allclose(shown["entropy"], -(p * np.log(p)).sum(0) / np.log(3), atol=1e-4)
    # a segmentation on the image's grid, cropped and on the preprocessed one: the truth is the preprocessed label
    truth = model.plans_manager.image_reader_writer_class().read_seg(str(model.truths / f"{hippocampus['validation'][0]}.nii.gz"))[0][0]
    np.testing.assert_array_equal(prediction.to_preprocessed(truth), np.maximum(prediction.seg, 0))


def test_outlines_follow_the_borders_of_voxels():
    figure, axis = report_pictures.plt.subplots()
    mask = np.zeros((5, 7), bool)
    mask[2, 3] = True
    report_pictures._outline(axis, mask)
    corners = axis.collections[-1].get_paths()[0].vertices
    # the voxel reaches from 2.5 to 3.5 and from 1.5 to 2.5; 1 / 57 of a voxel is what one cell of the fine grid may round off
    np.testing.assert_allclose([corners.min(0), corners.max(0)], [[2.5, 1.5], [3.5, 2.5]], atol=1 / 57)
    report_pictures.plt.close(figure)


def test_cases_are_spread_evenly():
    assert _spread(list("abcdefg"), 3) == ["a", "d", "g"] and _spread(["a", "b"], 3) == ["a", "b"] and _spread([], 3) == []


@pytest.mark.parametrize("record, table, curves", [
    ({"teacher_validated_with_hints": True}, "teacher without hints", "teacher with simulated hints"),
    ({"teacher_validated_with_hints": False}, "teacher", "teacher"), ({}, "teacher", "teacher"), (None, "teacher", "teacher")])
def test_the_teachers_name_tells_whether_it_had_hints(record, table, curves):
    from nnunet_confkd.report.cases import Fold
    fold = Fold("fold_0", "ConfKDTrainer", 1, {}, record, ["student", "teacher"])
    assert fold.names == {"student": "student", "teacher": table} and fold.curve_names == {"student": "student", "teacher": curves}
