"""`confkd run`: it goes on where it was interrupted, refuses changed options, and prints the commands that it calls."""
from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from image_files import write_image

from nnunet_confkd import cli, nnunet_commands
from nnunet_confkd.commands import plan, report, run
from nnunet_confkd.data import check, mix
from nnunet_confkd.inference import postprocessing

OPTIONS = ["--images", "images", "--full-labels", "masks", "--partial-labels", "scribbles", "--ignore-value", "0",
           "--background-value", "2", "--labels", "background", "a liver", "--test", "test", "--output", "out"]
NAMES = ["mix", "check", "plan", "train", "predict", "postprocess", "report"]


class Steps:
    """Stand-ins of the commands: they make what the commands make, and can be interrupted before or after that."""

    def __init__(self, monkeypatch):
        self.calls, self.interrupted, self.error, self.found = [], None, None, 0
        self.shape, self.trainer = (1, 4, 4, 4), "ConfKDTrainer"
        for name, module in (("mix", mix), ("check", check), ("plan", plan), ("report", report)):
            monkeypatch.setattr(module, "main", self.command(name))
        for name in ("train", "predict"):
            monkeypatch.setattr(nnunet_commands, name, self.command(name))
        monkeypatch.setattr(postprocessing, "determine", self.determine)
        monkeypatch.setattr(postprocessing, "apply", lambda found, model, target, files: self.command("postprocess")([
            str(target)]))
        monkeypatch.setattr(run, "read", self.read)

    def read(self, file):
        if not file.read_bytes():
            raise run.InputError(f"{file}: is broken")
        return SimpleNamespace(voxels=np.zeros(self.shape))

    def command(self, name):
        def call(argv, **more):
            self.calls.append((name, argv))
            if self.interrupted == (name, "before"):
                raise self.error
            getattr(self, name)(argv, **more)
            if self.interrupted == (name, "after"):
                raise self.error
            return self.found if name == "check" else None
        return call

    def mix(self, argv, **more):
        folders = (os.environ[f"nnUNet_{name}"] for name in ("raw", "preprocessed"))
        raw, preprocessed = (Path(folder) / f"Dataset{argv[argv.index('--id') + 1]}_Mixed" for folder in folders)
        (raw / "imagesTr").mkdir(parents=True)  # it must not be there
        (raw / "imagesTr" / "a_0000.nii.gz").write_text("image")
        (raw / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz", "channel_names": {"0": "x"}} | more))
        preprocessed.mkdir(parents=True)
        (preprocessed / "splits_final.json").write_text(
            '[{"train": [], "val": ["a"]}, {"train": [], "val": ["b"]}]')

    def check(self, argv):
        pass

    def plan(self, argv):
        Path(os.environ["nnUNet_preprocessed"], f"Dataset{argv[1]}_Mixed", "nnUNetPlans.json").touch()

    def train(self, argv):
        name = f"Dataset{argv[0]}_Mixed"
        model = Path(os.environ["nnUNet_results"], name, f"{self.trainer}__nnUNetPlans__{argv[1]}")
        fold = model / f"fold_{argv[2]}"
        (fold / "validation").mkdir(parents=True, exist_ok=True)
        description = {"labels": {"background": 0, "a": 1}, "channel_names": {"0": "x"}, "file_ending": ".nii.gz"}
        raw = json.loads(Path(os.environ["nnUNet_raw"], name, "dataset.json").read_text())
        (model / "dataset.json").write_text(json.dumps(description | raw))
        (fold / "checkpoint_latest.pth").touch()
        if self.interrupted != ("train", "after"):
            (fold / "checkpoint_final.pth").touch()
            (fold / "validation" / "summary.json").touch()

    def predict(self, argv):
        folder = Path(argv[argv.index("-o") + 1])
        folder.mkdir(exist_ok=True)
        for name in ("dataset.json", "plans.json"):
            (folder / name).write_text("{}")
        (folder / "whole.nii.gz").write_text("mask")
        (folder / "half.nii.gz").write_text("" if self.interrupted == ("predict", "after") else "mask")

    def determine(self, model, folds, output):
        output.mkdir(exist_ok=True)
        return SimpleNamespace(text=lambda labels: "post-processing does not help")

    def postprocess(self, argv):
        pass

    def report(self, argv):
        Path(argv[argv.index("--output") + 1]).mkdir()


@pytest.fixture
def steps(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in run.VARIABLES:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    for folder in ("test", "others"):
        write_image(Path(folder, "whole.nii.gz"), np.zeros((2, 3, 4)))
    return Steps(monkeypatch)


def test_it_does_the_steps_in_order_with_the_commands_that_it_prints(steps, capsys, tmp_path):
    assert cli.main(["run", *OPTIONS, "-f", "0", "1", "-device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert [name for name, _ in steps.calls] == ["mix", "check", "plan", "train", "train", "predict", "postprocess",
                                                 "report"]
    printed = [shlex.split(line)[2:] for line in out.splitlines() if line.startswith("$ confkd")]
    assert printed[:2] == [["mix", "--images", "images", "--full-labels", "masks", "--partial-labels", "scribbles",
                            "--id", "100", "--labels", "background", "a liver", "--ignore-value", "0",
                            "--background-value", "2"], ["check", "-d", "100"]]
    assert [line[0] for line in printed] == [name for name, _ in steps.calls if name != "postprocess"]
    assert [line[1:] for line in printed] == [argv for name, argv in steps.calls if name != "postprocess"]
    assert printed[3] == ["train", "100", "3d_fullres", "0", "-device", "cpu"]
    assert printed[5] == ["predict", "-d", "100", "-i", "test", "-o", f"{tmp_path}/out/predictions_raw", "-c",
                          "3d_fullres", "-f", "0", "1", "-device", "cpu"]
    assert "$ nnUNetv2_determine_postprocessing" in out and "$ nnUNetv2_apply_postprocessing" in out
    assert f"predictions: {tmp_path}/out/predictions (not post-processed: {tmp_path}/out/predictions_raw)" in out
    assert f"export nnUNet_raw={tmp_path}/out/nnUNet_raw" in out
    steps.calls.clear()
    assert cli.main(["run", *OPTIONS, "-f", "0", "1", "-device", "cpu"]) == 0 and steps.calls == []
    assert capsys.readouterr().out.count(": done") == 7


def test_images_that_were_added_after_the_prediction_are_named(steps, capsys):
    assert cli.main(["run", *OPTIONS]) == 0
    write_image(Path("test", "added.nii.gz"), np.zeros((2, 3, 4)))
    assert "added since" not in capsys.readouterr().out
    assert cli.main(["run", *OPTIONS]) == 0
    assert "WARNING: --test: 1 image added since, which this run does not predict: added." in capsys.readouterr().out


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (SystemExit(143), 143)],
                         ids=("Ctrl-C", "SIGTERM"))
@pytest.mark.parametrize("moment", ("before", "after"))
@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_where_it_was_interrupted(steps, capsys, name, moment, error, status):
    steps.interrupted, steps.error = (name, moment), error
    with pytest.raises(SystemExit) as end:
        cli.main(["run", *OPTIONS])
    assert end.value.code == status
    text = f"step [{NAMES.index(name) + 1}/7] {name} was interrupted. The same command goes on"
    assert text in capsys.readouterr().err
    before = [called for called, _ in steps.calls]
    steps.calls.clear()
    steps.interrupted = None
    assert Path("out", "predictions").is_dir() == (name == "report"), "it is written at the very end, or not at all"
    if (name, moment) == ("report", "after"):
        Path("out", "report").rmdir()
    assert cli.main(["run", *OPTIONS]) == 0
    again = [] if (name, moment) == ("mix", "after") else [name]  # the data set was complete
    assert [called for called, _ in steps.calls] == again + NAMES[NAMES.index(name) + 1:]
    assert before == NAMES[:NAMES.index(name) + 1]
    called = dict(steps.calls)
    if name == "train":
        assert ("--c" in called["train"]) == (moment == "after")
    if name == "predict":
        assert ("--continue_prediction" in called["predict"]) == (moment == "after")


def test_a_prediction_that_was_being_written_is_made_again(steps):
    steps.interrupted, steps.error = ("predict", "after"), KeyboardInterrupt()
    with pytest.raises(SystemExit):
        cli.main(["run", *OPTIONS])
    seen = []
    steps.interrupted, steps.predict = None, lambda argv: seen.extend(
        sorted(file.name for file in Path("out", "predictions_raw").glob("*.nii.gz")))
    assert cli.main(["run", *OPTIONS]) == 0 and seen == ["whole.nii.gz"]


@pytest.mark.parametrize("change, expected", [
    (["--labels", "background", "kidney"], '--labels: ["background", "a liver"] then, ["background", "kidney"] now'),
    (["--quick"], "--quick: false then, true now"), (["-c", "2d"], '-c: null then, "2d" now'),
    (["-f", "1"], '-f: null then, ["1"] now'), (["--test", "others"], '--test: "test" then, "others" now'),
    (["--id", "7"], "--id: null then, 7 now"), (["--labels", "background", "Nödel"], '["background", "Nödel"] now')])
def test_a_changed_option_is_refused(steps, capsys, change, expected):
    step = {"--test": "predict", "-f": "predict", "-c": "train"}.get(change[0], "plan")
    steps.interrupted, steps.error = (step, "after"), KeyboardInterrupt()
    with pytest.raises(SystemExit):
        cli.main(["run", *OPTIONS])
    steps.interrupted = None
    capsys.readouterr()
    steps.calls.clear()
    assert cli.main(["run", *OPTIONS, *change]) == 1
    err = capsys.readouterr().err
    assert "this run was begun with other options" in err and expected in err and steps.calls == []
    assert cli.main(["run", *OPTIONS]) == 0


@pytest.mark.parametrize("wrong, message", [
    (["-f", "0", "2"], "there is no fold 2; use all, or 0 to 1"), (["-f", "1", "1"], "give each fold once"),
    (["-f", "0", "all"], "give each fold once, or all alone"), (["-tr", "ConfKDTrainr"], "there is no such trainer")])
def test_folds_and_trainer_are_checked_before_anything_is_trained_and_can_be_corrected(steps, capsys, wrong, message):
    assert cli.main(["run", *OPTIONS, *wrong]) == 1 and message in capsys.readouterr().err
    assert [name for name, _ in steps.calls] == ["mix"]
    steps.calls.clear()
    assert cli.main(["run", *OPTIONS, "-f", "1", "0"]) == 0
    assert [name for name, _ in steps.calls] == ["check", "plan", "train", "train", "predict", "postprocess", "report"]


def test_a_mistyped_configuration_can_be_left_out(steps):
    steps.interrupted, steps.error = ("plan", "before"), run.InputError("no configuration 3d_fulres")
    assert cli.main(["run", *OPTIONS, "-c", "3d_fulres"]) == 1
    steps.interrupted = None
    assert cli.main(["run", *OPTIONS]) == 0
    name, argv = steps.calls[-5]
    assert name == "plan" and argv[:4] == ["-d", argv[1], "-c", "3d_fullres"]


def test_folds_may_change_until_something_is_predicted(steps):
    steps.interrupted, steps.error = ("predict", "before"), KeyboardInterrupt()
    with pytest.raises(SystemExit):
        cli.main(["run", *OPTIONS, "-device", "cpu"])
    steps.interrupted = None
    steps.calls.clear()
    assert cli.main(["run", *OPTIONS, "-f", "0", "1"]) == 0
    calls = [(name, argv) for name, argv in steps.calls if name in ("train", "predict")]
    assert calls[0][0] == "train" and calls[0][1][2] == "1" and calls[1][1][-2:] == ["0", "1"], "fold 0 is trained"
    assert not any("-device" in argv for _, argv in calls)


def test_another_folder_or_other_folders_of_nnunets_are_refused(steps, capsys, monkeypatch, tmp_path):
    assert cli.main(["run", *OPTIONS]) == 0
    for name in run.VARIABLES:
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    assert cli.main(["run", *OPTIONS]) == 1
    assert f'nnUNet_raw: "{tmp_path}/out/nnUNet_raw" then, "{tmp_path}/elsewhere" now' in capsys.readouterr().err
    for name in run.VARIABLES:
        monkeypatch.delenv(name)
    (tmp_path / "sub" / "test").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "sub")
    assert cli.main(["run", *OPTIONS[:-1], "../out"]) == 1
    assert f'started in: "{tmp_path}" then' in capsys.readouterr().err


def test_options_may_change_as_long_as_nothing_is_written(steps, capsys):
    """Such as after an error of mix, which tells which option is wrong."""
    steps.interrupted, steps.error = ("mix", "before"), run.InputError("masks: wrong values; use --ignore-value 3")
    assert cli.main(["run", *OPTIONS]) == 1
    assert "step [1/7] mix failed" in capsys.readouterr().err
    steps.interrupted = None
    assert cli.main(["run", *OPTIONS, "--ignore-value", "3"]) == 0


@pytest.mark.parametrize("folder, expected", [
    ("nix", "--test nix: there is no such file or folder"),
    ("empty", "--test empty: has no image that ends with .nii.gz, as the model's training images do, and no DICOM"),
    ("two", "--test two: a_0001.nii.gz does not end with the number of a channel")])
def test_images_to_predict_are_checked_before_the_training_and_may_be_corrected(steps, capsys, folder, expected):
    Path("empty").mkdir()
    Path("two").mkdir()
    for channel in (0, 1):
        Path("two", f"a_000{channel}.nii.gz").touch()
    wrong = [word if word != "test" else folder for word in OPTIONS]
    assert cli.main(["run", *wrong]) == 1
    err = capsys.readouterr().err
    assert expected in err and "train" not in [name for name, _ in steps.calls]
    if folder != "nix":
        assert "failed. Correct what is said below, and give the same command again." in err
    assert cli.main(["run", *OPTIONS]) == 0
    assert ("-i", "test") in [tuple(argv[2:4]) for name, argv in steps.calls if name == "predict"]


def test_what_is_gone_and_what_is_not_ours_is_told(steps, capsys):
    steps.found = 1
    assert cli.main(["run", *OPTIONS]) == 1
    assert "confkd check has found errors (above)" in capsys.readouterr().err
    steps.found = 0
    assert cli.main(["run", *OPTIONS]) == 0
    shutil.rmtree(Path("out", "predictions"))
    assert cli.main(["run", *OPTIONS]) == 1
    assert "out/predictions: was made by this run, and is gone" in capsys.readouterr().err
    Path("full").mkdir()
    Path("full", "thesis.txt").touch()
    assert cli.main(["run", *OPTIONS[:-1], "full"]) == 1
    assert "--output full: holds other files (thesis.txt)" in capsys.readouterr().err
    assert cli.main(["run", *OPTIONS, "--overwrite"]) == 1
    assert "are options of confkd mix alone" in capsys.readouterr().err


# ---- sources --------------------------------------------------------------------------------------------------------

REAL = {"mix": mix.main, "check": check.main, "plan": plan.main}
SOURCES = ["--source", "front=FRONT", "--classes", "anterior=1", "background=0,2", "--source", "back=BACK", "--classes",
           "posterior=1", "-c", "2d", "--processes", "1", "--test", "test", "--output", "out"]


@pytest.fixture
def sources(steps, monkeypatch, thread_pools):
    """A function that writes two folders that annotate different organs; mix, check and plan are the real ones."""
    for name, module in (("mix", mix), ("check", check), ("plan", plan)):
        setattr(steps, name, REAL[name])
        monkeypatch.setattr(module, "main", steps.command(name))

    def write(number):
        rng = np.random.default_rng(0)
        for folder, values in (("FRONT", 3), ("BACK", 2)):
            for case in range(number):
                image = rng.normal(size=(5, 12, 14)).astype(np.float32)
                write_image(Path(folder, "images", f"{folder}{case}.nii.gz"), image, (1.0, 1.0, 2.0))
                label = rng.integers(0, values, image.shape).astype(np.uint8)
                write_image(Path(folder, "labels", f"{folder}{case}.nii.gz"), label, (1.0, 1.0, 2.0))
    return write


@pytest.mark.parametrize("number, fold", [(3, "0"), (1, "all")])
def test_sources_that_annotate_different_classes(steps, sources, capsys, number, fold):
    """The printed command of mix has the classes of each source. The trainer and the fold are those that plan names.
    """
    sources(number)
    steps.trainer = "ConfKDTrainer_partialOnly"
    assert cli.main(["run", *SOURCES]) == 0
    out = capsys.readouterr().out
    assert ("$ confkd mix --source front=FRONT --classes anterior=1 background=0,2 --source back=BACK --classes "
            "posterior=1 --id 100 --processes 1\n") in out
    described = json.loads(Path("out/nnUNet_raw/Dataset100_Mixed/dataset.json").read_text())
    assert described["annotated_classes"]["FRONT0"] == ["anterior"] and described["written_by"][:11] == "confkd run "
    assert Path("out/nnUNet_preprocessed/Dataset100_Mixed/nnUNetPlans_2d").is_dir()
    assert f"next: confkd train 100 2d {fold} -tr {steps.trainer}" in out
    called = dict(steps.calls)
    assert called["train"] == ["100", "2d", fold, "-tr", steps.trainer]
    assert called["predict"][-4:] == ["-f", fold, "-tr", steps.trainer]
    assert "postprocess" not in called and not Path("out", "predictions").exists()
    assert "no post-processing" in out and ("as absent" in out) == (fold == "0")
    assert cli.main(["run", *SOURCES]) == 0, "the options are those of the beginning"
    changed = [word.replace("posterior", "rear") for word in SOURCES]
    assert cli.main(["run", *changed]) == 1
    err = capsys.readouterr().err
    assert '"posterior=1"] then, ' in err and '"rear=1"] now' in err


def test_postprocessing_is_determined_where_the_validation_cases_have_all_classes(steps, monkeypatch):
    def train(argv):
        Steps.train(steps, argv)
        name = f"Dataset{argv[0]}_Mixed"
        file = Path(os.environ["nnUNet_results"], name, "ConfKDTrainer__nnUNetPlans__3d_fullres", "dataset.json")
        described = json.loads(file.read_text())
        described["labels"]["b"] = 2
        file.write_text(json.dumps(described | {"annotated_classes": {"lacking": ["a"], "all": ["a", "b"]}}))
        splits = [{"train": ["lacking"], "val": ["full", "all"]}, {"train": ["full"], "val": ["lacking"]}]
        Path(os.environ["nnUNet_preprocessed"], name, "splits_final.json").write_text(json.dumps(splits))

    steps.train = train
    assert cli.main(["run", *OPTIONS]) == 0 and "postprocess" in dict(steps.calls)
    steps.calls.clear()
    assert cli.main(["run", *OPTIONS[:-1], "other", "-f", "0", "1"]) == 0 and "postprocess" not in dict(steps.calls)


# ---- whose data set is it? ------------------------------------------------------------------------------------------

@pytest.fixture
def shared(monkeypatch, nnunet_folders):
    """nnU-Net's folders, which several runs share."""
    return nnunet_folders / "raw"


def test_a_data_set_of_the_same_name_that_another_run_wrote_is_not_adopted(steps, shared, capsys):
    assert cli.main(["run", *OPTIONS, "--id", "100"]) == 0
    steps.calls.clear()
    capsys.readouterr()
    assert cli.main(["run", *OPTIONS[:-1], "other", "--id", "100"]) == 1
    text = f"--id 100: {shared}/Dataset100_Mixed is there, and this run did not write it; give another --id"
    assert text in capsys.readouterr().err and steps.calls == [] and not Path("other", run.RECORD).exists()
    assert cli.main(["run", *OPTIONS, "--id", "100"]) == 0 and steps.calls == [], "the first run knows its own"


def test_a_run_whose_mix_failed_takes_another_id_if_the_first_was_taken_meanwhile(steps, shared):
    steps.interrupted, steps.error = ("mix", "before"), run.InputError("masks/a.nii.gz: cannot be read")
    assert cli.main(["run", *OPTIONS[:-1], "second"]) == 1
    steps.interrupted = ("check", "before")
    assert cli.main(["run", *OPTIONS]) == 1
    assert cli.main(["run", *OPTIONS[:-1], "second"]) == 1
    ids = [argv[argv.index("--id") + 1] for name, argv in steps.calls if name == "mix"]
    assert ids == ["100", "100", "101"]
    marks = [json.loads((shared / f"Dataset{number}_Mixed" / "dataset.json").read_text()) for number in ids[1:]]
    assert marks[0]["written_by"].startswith("confkd run ") and marks[0] != marks[1]


def test_a_data_set_that_was_replaced_since_is_told(steps, capsys):
    assert cli.main(["run", *OPTIONS]) == 0
    Path("out", "nnUNet_raw", "Dataset100_Mixed", "dataset.json").write_text('{"written_by": "confkd mix"}')
    steps.calls.clear()
    assert cli.main(["run", *OPTIONS]) == 1 and steps.calls == []
    assert "Dataset100_Mixed: is not the data set that this run wrote" in capsys.readouterr().err


@pytest.mark.parametrize("done, expected", [(["mix", "check"], 1), ([], 0)])
def test_a_record_of_a_version_without_marks(steps, shared, capsys, done, expected):
    """If it says that the data set is written, this may have been that of another run. Otherwise it is mixed anew."""
    steps.interrupted, steps.error = ("plan", "before"), KeyboardInterrupt()
    with pytest.raises(SystemExit):
        cli.main(["run", *OPTIONS])
    steps.interrupted = None
    record = json.loads(Path("out", run.RECORD).read_text())
    del record["token"]
    Path("out", run.RECORD).write_text(json.dumps(record | {"done": done}))
    steps.calls.clear()
    steps.interrupted, steps.error = ("check", "before"), run.InputError("stop")
    assert cli.main(["run", *OPTIONS]) == 1
    assert ("run.json: is of an earlier version" in capsys.readouterr().err) == bool(done)
    assert [argv[argv.index("--id") + 1] for name, argv in steps.calls if name == "mix"] == [[], ["101"]][not done]


def test_it_begins_anew_after_a_kill_while_the_record_was_written(steps):
    Path("out").mkdir()
    Path("out", ".4711.run.json").write_text('{"giv')
    assert cli.main(["run", *OPTIONS]) == 0 and not Path("out", ".4711.run.json").exists()


def test_only_one_run_works_in_a_folder(steps, capsys):
    from filelock import FileLock

    Path("out").mkdir()
    with FileLock(Path("out", run.LOCK)):
        assert cli.main(["run", *OPTIONS]) == 1
    assert "another confkd run is working there" in capsys.readouterr().err and steps.calls == []


@pytest.mark.parametrize("shape, configuration", [((1, 9, 8, 7), "3d_fullres"), ((2, 9, 8), "2d"), ((1, 1, 9, 8), "2d"),
                                                  ((1, 9, 8, 1), "2d")])
def test_images_of_a_single_slice_are_2d(steps, shape, configuration):
    """A 2-D NIfTI has no axis of slices; a PNG has one of length 1."""
    steps.shape, steps.interrupted, steps.error = shape, ("train", "before"), KeyboardInterrupt()
    with pytest.raises(SystemExit):
        cli.main(["run", *OPTIONS])
    assert dict(steps.calls)["plan"][2:4] == ["-c", configuration]
