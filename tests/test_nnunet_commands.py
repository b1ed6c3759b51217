"""The ordinary mistakes of `confkd train` and `confkd predict`: one sentence each, with the command that helps."""
from __future__ import annotations

import argparse
import json
import shutil
import types

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from image_files import write_image

from nnunet_confkd import cli, nnunet_commands
from nnunet_confkd.data import small_configuration
from nnunet_confkd.errors import InputError
from nnunet_confkd.nnunet_commands import as_argv, explanation, no_leftovers, parser_of, with_options

HIPPOCAMPUS = "Dataset004_Hippocampus"
ONE_CHANNEL = {"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}


@pytest.fixture
def said(capsys):
    """Run a command that must fail; return its one sentence."""
    def run(*argv) -> str:
        assert cli.main([str(word) for word in argv]) == 1
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err and "unexpected" not in err and len(err.splitlines()) == 1, err
        return err
    return run


@pytest.fixture
def predict(said, tmp_path, nnunet, hippocampus):
    """Run `confkd predict` on held-back images of Hippocampus."""
    def run(*argv, images=None) -> str:
        images = images or nnunet.raw(HIPPOCAMPUS) / "imagesTs"
        return said("predict", "-i", images, "-o", tmp_path / "out", "-device", "cpu", *argv)
    return run


def tree(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- training -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, expected", [
    (("99", "2d", "0"), "there is no data set 099 (there are: Dataset004_Hippocampus"),
    (("Dataset099_Nothing", "2d", "0"), "there is no data set Dataset099_Nothing (there are: Dataset004_Hippocampus"),
    (("hippocampus", "2d", "0"), "give its id or its name, 27 or Dataset027_NAME"),
    (("4", "3d_lowres", "0"), "has no configuration 3d_lowres; it has 2d, 3d_fullres"),
    (("4", "2d", "0", "-p", "nnUNetResEncUNetMPlans"),
     "nnUNetResEncUNetMPlans.json: is not there; plan and preprocess the data set first: confkd plan -d 4 -c 2d "
     "-pl nnUNetPlannerResEncM; or choose other plans with -p: nnUNetPlans"),
    (("4", "2d", "0", "-p", "Mine"), "confkd plan -d 4 -c 2d -overwrite_plans_name Mine, with the options that"),
    (("4", "2d", "1"), "there is no fold 1; use all, or 0 to 0"),
    (("4", "2d", "first"), "there is no fold first; use all, or 0 to 0"),
    (("4", "2d", "0", "--quik"), "unknown argument '--quik' (did you mean '--quick'?)"),
    (("4", "2d", "0", "1"), "unknown argument '1'\n"),
    (("4", "2d", "0", "-tr", "ConfKDTrainr"), "-tr ConfKDTrainr: there is no such trainer"),
    (("4", "2d", "0", "--val", "-tr", "ConfKDTrainer_5epochs"),
     "has no checkpoint_final.pth, so --val has nothing to validate; finish the training first: confkd train 4 2d 0 "
     "-tr ConfKDTrainer_5epochs --c"),
    (("4", "2d", "0", "--val", "--c"), "--c and --val exclude each other"),
    (("4", "2d", "0", "--quick", "-tr", "nnUNetTrainer"), "--quick: -tr nnUNetTrainer cannot be shortened by it"),
    (("4", "3d_lowres", "0", "--quick"), "has no configuration 3d_lowres; it has 2d, 3d_fullres"),
    (("4", "2d", "7", "--quick"), "there is no fold 7; use all, or 0 to 0"),
    (("4", "2d", "0", "--quick", "--val", "--c"), "--c and --val exclude each other"),
    (("-d", "4", "-c", "2d", "-f", "0"), "the fold without options: confkd train 4 2d 0\n"),
    (("-d", "4"), "the fold without options: confkd train 4 CONFIGURATION FOLD\n"),
    (("4", "2d", "0", "-device", "gpu"), "-device gpu: must be cuda, cpu or mps"),
    (("4", "2d", "0", "-pretrained_weights", "no.pth"), "no.pth: there is no such checkpoint")])
def test_a_mistake_of_train_is_one_sentence_and_leaves_nothing(nnunet, hippocampus, said, argv, expected):
    plans = nnunet.preprocessed(HIPPOCAMPUS) / "nnUNetPlans.json"
    before = tree(nnunet.folder / "results"), plans.read_text()
    assert expected in said("train", *argv)
    assert (tree(nnunet.folder / "results"), plans.read_text()) == before


def test_a_configuration_that_is_not_preprocessed_is_named_with_the_command(nnunet, hippocampus, said):
    file = nnunet.preprocessed(HIPPOCAMPUS) / "nnUNetPlans.json"
    before = file.read_text()
    plans = json.loads(before)
    plans["configurations"]["2d_new"] = {"inherits_from": "2d", "data_identifier": "nnUNetPlans_2d_new"}
    plans["configurations"]["2d_lost"] = {"inherits_from": "2d_gone"}
    file.write_text(json.dumps(plans))
    try:
        text = said("train", "4", "2d_new", "0")
        assert "the configuration 2d_new is not preprocessed; do it first: confkd plan -d 4 -c 2d_new" in text
        assert "the configuration 2d_lost is not complete" in said("train", "4", "2d_lost", "0")
    finally:
        file.write_text(before)
    assert not nnunet.model(HIPPOCAMPUS, "2d_new").exists()


def test_a_data_set_that_is_only_raw_is_to_be_planned(nnunet, hippocampus, said):
    raw = nnunet.raw("Dataset098_Raw")
    raw.mkdir()
    try:
        text = said("train", "98", "2d", "0")
        assert "Dataset098_Raw/nnUNetPlans.json: is not there; plan and" in text and "confkd plan -d 98 -c 2d" in text
        nnunet.preprocessed("Dataset098_Other").mkdir()
        assert "several data sets of this id: Dataset098_Other, Dataset098_Raw" in said("train", "98", "2d", "0")
    finally:
        shutil.rmtree(raw)
        shutil.rmtree(nnunet.preprocessed("Dataset098_Other"), ignore_errors=True)


def test_variables_that_are_not_set_are_named_at_once(said, monkeypatch, tmp_path):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{name}", raising=False)
    text = said("train", "4", "2d", "0")
    assert "nnUNet_preprocessed and nnUNet_results, nnU-Net's environment variables, are not set" in text
    assert "export nnUNet_preprocessed=/path/to/nnUNet_preprocessed; export nnUNet_results=" in text
    assert "results, nnU-Net's environment variable, is not set; set it to your folder: export nnUNet_results=" in said(
        "predict", "-i", tmp_path, "-o", tmp_path, "-d", "4", "-c", "2d")


@pytest.mark.parametrize("fault, expected", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB.\nMore of it."), "(CUDA out of memory. Tried 9 GiB.)"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
     "DefaultCPUAllocator: can't allocate memory"), (MemoryError(), "exhausted. ")], ids=("cuda", "cpu", "python"))
def test_an_error_of_memory_is_explained_with_how_to_use_less(fault, expected):
    text = explanation(fault, "train")
    assert "the memory is exhausted" in text and expected in text
    assert "confkd plan -d ID -c CONFIGURATION -gpu_memory_target 4 " in text


def test_a_training_out_of_memory_is_one_sentence_and_leaves_nothing(nnunet, hippocampus, said, monkeypatch):
    from nnunet_confkd.training.trainer import ConfKDTrainer

    def train_step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB.\nMore of it.")

    configuration = nnunet.configure(HIPPOCAMPUS, "2d_memory", "2d", {"epochs": 1, "iterations_per_epoch": 1})
    monkeypatch.setattr(ConfKDTrainer, "train_step", train_step)
    before = tree(nnunet.folder / "results")
    assert "(CUDA out of memory. Tried 9 GiB.)" in said("train", "4", configuration, "0", "-device", "cpu")
    assert tree(nnunet.folder / "results") == before


def test_memory_that_really_runs_out_is_known_by_its_error():
    with pytest.raises((RuntimeError, MemoryError)) as error:
        torch.empty(2 ** 60, dtype=torch.uint8)
    assert "the memory is exhausted" in explanation(error.value, "predict")


def test_the_end_of_a_rank_is_told_by_its_own_sentence():
    def ended(name: str, text: str) -> RuntimeError:
        return RuntimeError(f"-- Process 1 terminated with the following error:\nTraceback:\n  ...\n{name}: {text}\n")

    assert explanation(ended("nnunet_confkd.errors.InputError", "plans.json: wrong"), "train") == "plans.json: wrong"
    assert "4 epochs" in explanation(ended("nnunet_confkd.errors.TrainingError", "stopped after 4 epochs"), "train")
    out_of_memory = explanation(ended("torch.OutOfMemoryError", "CUDA out of memory"), "train")
    assert "exhausted (torch.OutOfMemoryError: CUDA out of memory)" in out_of_memory
    assert explanation(ended("IndexError", "index out of range"), "train") is None
    assert explanation(ValueError("out of memory"), "train") is None


def test_what_an_earlier_training_left_stays_after_a_failed_start(tmp_path):
    fold = tmp_path / "Dataset001_A" / "model" / "fold_0"

    def fail(*files):
        with no_leftovers(fold):
            fold.mkdir(parents=True, exist_ok=True)
            for file in ("training_log.txt", *files):
                (fold / file).touch()
            (fold.parent / "plans.json").touch()
            raise InputError("wrong")

    def left() -> list[str]:
        return tree(tmp_path)

    with pytest.raises(InputError):
        fail()
    assert left() == []
    (tmp_path / "Dataset001_A" / "model" / "fold_1").mkdir(parents=True)  # another fold's
    with pytest.raises(InputError):
        fail()
    assert left()[2:] == ["Dataset001_A/model/fold_1", "Dataset001_A/model/plans.json"]
    with pytest.raises(InputError):
        fail("progress.png")  # an epoch was trained
    assert (fold / "training_log.txt").is_file()
    with pytest.raises(InputError):
        fail()  # it was there before
    assert (fold / "progress.png").is_file()


def test_quick_trains_under_a_name_of_its_own_which_nnunet_predicts_with(nnunet, hippocampus, monkeypatch, tmp_path,
                                                                         capsys, thread_pools):
    monkeypatch.setitem(small_configuration.LENGTHS, 2, {"epochs": 2, "iterations_per_epoch": 1})
    usual = nnunet.model(HIPPOCAMPUS, "2d")
    before = tree(usual) if usual.exists() else None
    assert cli.main(["train", "4", "2d", "0", "--quick", "-device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "the configuration 2d_quick is 2d with a small network" in out and "2 epochs of 1 iterations" in out
    assert "The accuracy is not that of a usual training: confkd train 4 2d 0" in out
    assert out.count("Time left: about ") == 1 and " for 1 of 2 epochs, and then the validation" in out
    assert f"model: {nnunet.model(HIPPOCAMPUS, '2d_quick')}\nnext: confkd predict -d 4 -i IMAGES -o PREDICTIONS -c " \
           f"2d_quick -f 0\nor: confkd report --model " in out
    assert not any(text in out for text in ("not found", "old nnU-Net", "network architecture", "np.float"))
    assert (tree(usual) if usual.exists() else None) == before
    assert (nnunet.model(HIPPOCAMPUS, "2d_quick") / "fold_0" / "checkpoint_final.pth").is_file()
    images = tmp_path / "images"
    images.mkdir()
    name = f"{hippocampus['test'][0]}_0000.nii.gz"
    shutil.copyfile(nnunet.raw(HIPPOCAMPUS) / "imagesTs" / name, images / name)
    nnunet_commands.run_as("nnUNetv2_predict", [
        "-i", str(images), "-o", str(tmp_path / "out"), "-d", "4", "-c", "2d_quick", "-f", "0", "-tr", "ConfKDTrainer",
        "-device", "cpu", "-npp", "0", "-nps", "0", "--disable_tta"])
    assert (tmp_path / "out" / f"{hippocampus['test'][0]}.nii.gz").is_file()


# ---- prediction -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, expected", [
    (("-d", "4", "-c", "2d", "--val-best"), "unknown argument '--val-best'\n"),
    (("-d", "4", "-c", "2d", "--save-entrop"), "unknown argument '--save-entrop' (did you mean '--save-entropy'?)"),
    (("-d", "99", "-c", "2d", "-f", "0"), "there is no data set 099"),
    (("-d", "4", "-c", "3d_new", "-f", "0"),
     "ConfKDTrainer__nnUNetPlans__3d_new: there is no such model; train it first: confkd train 4 3d_new 0 -tr "
     "ConfKDTrainer; or choose with -tr, -p and -c one that is trained: "),
    (("-d", "4", "-c", "2d_export", "-tr", "ConfKDTrainer_noKL"),
     "ConfKDTrainer_noKL__nnUNetPlans__2d_export: there is no such"),
    (("-d", "4", "-c", "2d_export"), "folds 1, 2, 3, 4 have no checkpoint_final.pth; predict with what is trained: -f"),
    (("-d", "4", "-c", "2d_export", "-f", "0", "-chk", "other.pth"),
     "fold 0 has no other.pth; the training has not ended: continue it with --c, or predict with -chk checkpoint_"),
    (("-m", "nowhere", "-f", "0"), "-m nowhere: there is no such folder")])
def test_a_mistake_of_predict_is_one_sentence(hippocampus_model, predict, argv, expected):
    assert expected in predict(*argv)


def test_a_fold_without_any_checkpoint_is_to_be_trained(hippocampus_model, predict, tmp_path):
    model = tmp_path / "ConfKDTrainer__nnUNetPlans__2d"
    (model / "fold_0").mkdir(parents=True)
    text = predict("-m", model, "-f", "0")
    assert "is no trained model, because it has no plans.json; train first: confkd train" in text
    for name in ("plans.json", "dataset.json"):
        shutil.copyfile(hippocampus_model / name, model / name)
    assert "fold 0 has no checkpoint_final.pth; train first: confkd train" in predict("-m", model, "-f", "0")


def test_the_second_stage_of_a_cascade_asks_for_the_first(hippocampus_model, predict, tmp_path):
    model = tmp_path / "ConfKDTrainer__nnUNetPlans__3d_cascade_fullres"
    (model / "fold_0").mkdir(parents=True)
    plans = json.loads((hippocampus_model / "plans.json").read_text())
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (model / "plans.json").write_text(json.dumps(plans))
    shutil.copyfile(hippocampus_model / "dataset.json", model / "dataset.json")
    (model / "fold_0" / "checkpoint_final.pth").touch()
    text = predict("-m", model, "-f", "0")
    assert "predict with 3d_lowres first, and give the folder of these predictions here: -prev_stage" in text


@pytest.mark.parametrize("make, expected", [
    (lambda folder: None, "there is no such file or folder"),
    (lambda folder: folder.mkdir(),
     "ends with .nii.gz, as the model's training images do, and no DICOM series; it is empty"),
    (lambda folder: (folder / "patient").mkdir(parents=True), "it holds folders only"),
    (lambda folder: (folder.mkdir(), (folder / "a.nrrd").touch(), (folder / "b.nii").touch()), "it has .nii, .nrrd"),
    (lambda folder: (folder.mkdir(), (folder / "a_0000.nii.gz").touch(), (folder / "b.nii.gz").touch()),
     "b.nii.gz does not end with the number of a channel, but a_0000.nii.gz has one. Name the files of every case "
     "CASE_0000.nii.gz (channel_0)")], ids=("missing", "empty", "folders", "other format", "mixed"))
def test_images_that_cannot_be_read_are_told(hippocampus_model, predict, tmp_path, make, expected):
    make(tmp_path / "images")
    assert expected in predict("-d", "4", "-c", "2d_export", "-f", "0", images=tmp_path / "images")


def test_images_without_numbers_are_predicted_under_their_own_names(nnunet, hippocampus, hippocampus_model, tmp_path,
                                                                    capsys):
    """As `confkd mix` takes them, and where nnUNetv2_predict ends in an IndexError."""
    numbered, plain = tmp_path / "numbered", tmp_path / "plain"
    for folder in (numbered, plain):
        folder.mkdir()
    cases = hippocampus["test"][:2]
    for case in cases:
        source = nnunet.raw(HIPPOCAMPUS) / "imagesTs" / f"{case}_0000.nii.gz"
        shutil.copyfile(source, numbered / source.name)
        shutil.copyfile(source, plain / f"{case}.nii.gz")

    def run(images, output):
        folder = tmp_path / output
        assert cli.main(["predict", "-d", "4", "-i", str(images), "-o", str(folder), "-c", "2d_export", "-f", "0",
                         "-npp", "0", "-nps", "0", "--disable_tta"]) == 0
        return {file.name: sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in folder.glob("*.nii.gz")}

    expected = run(numbered, "a")
    for images, output, names in ((plain, "b", cases), (plain / f"{cases[0]}.nii.gz", "c", cases[:1]),
                                  (numbered / f"{cases[1]}_0000.nii.gz", "d", cases[1:])):
        found = run(images, output)
        assert sorted(found) == sorted(f"{case}.nii.gz" for case in names)
        assert all(np.array_equal(voxels, expected[name]) for name, voxels in found.items())
        record = json.loads((tmp_path / output / "predict_from_raw_data_args.json").read_text())
        assert record["list_of_lists_or_source_folder"] == str(images)
    if not torch.cuda.is_available():  # the default device is said
        assert capsys.readouterr().out.count("no CUDA device: running on the CPU with") == 4


# ---- devices ------------------------------------------------------------------------------------------------------

@pytest.fixture
def machine(monkeypatch):
    def with_devices(cuda=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    return with_devices


@pytest.mark.parametrize("argv", [
    ("train", "4", "2d_export", "0"),
    ("predict", "-i", "{images}", "-o", "{out}", "-d", "4", "-c", "2d_export", "-f", "0"),
    ("report", "--model", "{model}", "--output", "{out}"), ("complete", "-d", "4", "--model", "{model}", "--id", "77")],
    ids=lambda argv: argv[0])
def test_cuda_where_there_is_none_is_one_sentence(nnunet, hippocampus_model, machine, said, tmp_path, argv):
    machine()
    values = {"images": nnunet.raw(HIPPOCAMPUS) / "imagesTs", "out": tmp_path / "out", "model": hippocampus_model}
    text = said(*(word.format(**values) for word in argv), "-device", "cuda")
    assert "-device cuda: there is no CUDA device on this machine; use -device cpu" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cuda", (False, True))
def test_every_command_chooses_the_same_device(nnunet, hippocampus_model, machine, monkeypatch, tmp_path, capsys, cuda):
    from nnunet_confkd.commands import complete
    from nnunet_confkd.commands import report as report_command
    from nnunet_confkd.inference import completion
    from nnunet_confkd.report import report
    machine(cuda)
    seen = []

    class Chosen(Exception):
        pass

    def stop(*args, **kwargs):
        seen.extend(str(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.device))
        raise Chosen

    monkeypatch.setattr(nnunet_commands, "run_as", lambda name, argv: seen.append(argv[argv.index("-device") + 1]))
    monkeypatch.setattr(report, "report", stop)
    monkeypatch.setattr(completion, "_CompletingPredictor", stop)
    nnunet_commands.train(["4", "2d_export", "0"])
    images = nnunet.raw(HIPPOCAMPUS) / "imagesTs"
    nnunet_commands.predict(["-i", str(images), "-o", str(tmp_path), "-d", "4", "-c", "2d_export", "-f", "0"])
    for command, argv in ((report_command, []), (complete, ["-d", "4", "--id", "77"])):
        with pytest.raises(Chosen):
            command.main(["--model", str(hippocampus_model), *argv])
    assert seen == ["cuda" if cuda else "cpu"] * 4
    assert capsys.readouterr().out.count("no CUDA device: running on the CPU") == (0 if cuda else 4)


def test_predict_warns_if_no_foreground_is_predicted(nnunet, hippocampus_model, machine, monkeypatch, tmp_path, capsys):
    machine(cuda=False)
    images = nnunet.raw(HIPPOCAMPUS) / "imagesTs"
    truth = next((nnunet.raw(HIPPOCAMPUS) / "labelsTr").glob("*.nii.gz"))

    def predicted_as_background(name: str, argv: list[str]) -> None:
        empty = sitk.ReadImage(truth) * 0
        for image in images.glob("*.nii.gz"):
            sitk.WriteImage(empty, tmp_path / image.name.replace("_0000", ""))

    monkeypatch.setattr(nnunet_commands, "run_as", predicted_as_background)
    nnunet_commands.predict(["-i", str(images), "-o", str(tmp_path), "-d", "4", "-c", "2d_export", "-f", "0"])
    number = len(list(images.glob("*.nii.gz")))
    assert number and f"WARNING: {number} of {number} predicted segmentations have no" in capsys.readouterr().out


def test_more_gpus_than_there_are_is_one_sentence(nnunet, hippocampus, machine, said):
    machine(cuda=True)
    assert "-num_gpus 2: this machine has 1 CUDA devices" in said("train", "4", "2d", "0", "-num_gpus", "2")


# ---- arguments ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv", [
    ["27", "2d", "0"], ["2d", "2d", "all", "-p", "2d", "--npz", "--c"],
    ["27", "3d_fullres", "1", "-num_gpus", "2", "--val", "-pretrained_weights", "a b.pth", "-device", "cpu"]])
def test_parsed_arguments_can_be_written_as_arguments_again(argv):
    parser = parser_of("nnUNetv2_train")
    args = parser.parse_args(argv)
    assert parser.parse_args(as_argv(parser, args)) == args
    args.configuration = "other"
    assert parser.parse_args(as_argv(parser, args)).configuration == "other"


@pytest.fixture
def handed(monkeypatch, tmp_path):
    """Record what `confkd train` and `confkd predict` hand to nnU-Net, and how they parsed the arguments themselves."""
    seen = types.SimpleNamespace(args=None, command=None, argv=None)

    def remember(args):
        seen.args = args
        return tmp_path

    def run(name, argv):
        seen.command, seen.argv = name, argv

    monkeypatch.setattr(nnunet_commands, "check_training", remember)
    monkeypatch.setattr(nnunet_commands, "check_model", remember)
    monkeypatch.setattr("nnunet_confkd.data.json_files.read_description", lambda *_: ONE_CHANNEL)
    monkeypatch.setattr(nnunet_commands, "run_as", run)
    monkeypatch.setattr(nnunet_commands, "expected_training_time", lambda args: None)
    write_image(tmp_path / "a_0000.nii.gz", np.zeros((2, 3, 4)))
    return seen


@pytest.mark.parametrize("argv, expected", [
    (["4", "2d", "0", "-t", "Mine", "-num", "2", "-dev", "cpu"], {"tr": "Mine", "num_gpus": 2, "device": "cpu"}),
    (["4", "2d", "0", "-pMyPlans", "-tr=Mine", "-device=cpu"], {"p": "MyPlans", "tr": "Mine", "device": "cpu"}),
    (["-tr", "One", "4", "2d", "0", "-tr", "Two", "--disable"], {"tr": "Two", "disable_checkpointing": True})])
def test_abbreviations_mean_what_they_mean_to_nnunets_train(handed, argv, expected):
    nnunet_commands.train(argv)
    assert {name: getattr(handed.args, name) for name in expected} == expected
    theirs = parser_of("nnUNetv2_train").parse_args(handed.argv)  # after what we have added
    assert theirs.tr == handed.args.tr and theirs.device in ("cpu", "cuda") and theirs.dataset_name_or_id == "4"


@pytest.mark.parametrize("command, argv, expected", [
    ("nnUNetv2_predict", ["-d4", "-c", "2d", "-f", "0", "1", "-t", "Mine"], {"d": "4", "f": ["0", "1"], "tr": "Mine"}),
    ("nnUNetv2_predict", ["-d", "4", "-c=2d", "-nu", "2", "-device", "cpu"], {"c": "2d", "num_parts": 2}),
    ("nnUNetv2_predict_from_modelfolder", ["-mmodel", "-ch", "best.pth"], {"m": "model", "chk": "best.pth"}),
    ("nnUNetv2_predict_from_modelfolder", ["-m=model", "-f", "all"], {"m": "model", "f": ["all"]})])
def test_abbreviations_mean_what_they_mean_to_nnunets_predict(handed, tmp_path, command, argv, expected):
    nnunet_commands.predict([*argv, "-i", str(tmp_path), "-o", str(tmp_path / "out")])
    assert handed.command == command and {name: getattr(handed.args, name) for name in expected} == expected
    assert "-tr" not in handed.argv or command == "nnUNetv2_predict"


def test_pretrained_weights_are_found_however_they_are_given(handed, hippocampus_model, monkeypatch):
    """nnU-Net's own parser decides: -pretrained is ambiguous with -p, at least in some versions of Python."""
    seen = []

    @nnunet_commands.contextmanager
    def adapted(file, build):
        seen.append(file)
        yield "adapted.pth"

    monkeypatch.setattr("nnunet_confkd.inference.checkpoints.pretrained_for_both_branches", adapted)
    nnunet_commands.train(["4", "2d", "0", "-pretrained_weights=stock.pth"])
    assert seen == ["stock.pth"] and handed.argv[-2:] == ["-pretrained_weights", "adapted.pth"]


def test_options_are_added_before_the_end_of_options():
    assert with_options(["a", "--", "b"], "-x", "1") == ["a", "-x", "1", "--", "b"]
    assert with_options(["a"], "-x") == ["a", "-x"]


@pytest.mark.parametrize("name", nnunet_commands.ENTRY_POINTS)
def test_the_parser_is_nnunets_own_although_nnunet_is_not_imported(name, monkeypatch):
    class Found(Exception):
        pass

    def stop(parser):
        raise Found(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Found) as found:
        nnunet_commands.entry_point(name)()
    theirs, ours = found.value.args[0], parser_of(name)

    def content(parser):
        return [{key: value for key, value in vars(action).items() if key != "container"
                 and not (key == "default" and action.dest in ("device", "tr"))} for action in parser._actions]

    assert content(ours) == content(theirs) and len(ours._actions) > 10
    assert ours.get_default("device") is None and ours.get_default("tr") is None and ours.prog == name


def test_a_command_without_a_parser_is_not_taken_for_one(monkeypatch):
    monkeypatch.setitem(nnunet_commands.ENTRY_POINTS, "x", ("nnunetv2.run.run_training", "find_free_network_port"))
    with pytest.raises(RuntimeError, match="of another version"):
        parser_of("x")
