"""`confkd export`: the exported model needs no plugin, and stock checkpoints start a ConfKD training."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_confkd import cli, nnunet_commands
from nnunet_confkd.data.annotated_classes import CLASSES_KEY
from nnunet_confkd.data.folders import WRITTEN_BY
from nnunet_confkd.errors import InputError
from nnunet_confkd.inference.checkpoints import pretrained_for_both_branches
from nnunet_confkd.inference.export import ORIGIN_FILE, export
from nnunet_confkd.training.trainer import ConfKDTrainer

HIPPOCAMPUS = "Dataset004_Hippocampus"
# an interpreter in which the plugin cannot be imported, and nothing points to it
WITHOUT_PLUGIN = "import sys; sys.modules['nnunet_confkd'] = None; from nnunetv2.{} import {} as run; run()"
PREDICT_WITHOUT_PLUGIN = """
import json, sys, torch
sys.modules['nnunet_confkd'] = None
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
for images, output, model in json.loads(sys.argv[1]):
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, (0,))
    predictor.predict_from_files_sequential(images, output, save_probabilities=True)
"""


def without_plugin(code: str, *args, **environment) -> None:
    """Run Python code in a process that lacks the plugin."""
    env = {k: v for k, v in os.environ.items() if k != "nnUNet_extTrainer"} | environment
    result = subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def stock(module: str, function: str, *args, **environment) -> None:
    """Run a command of nnU-Net in a process that lacks the plugin."""
    without_plugin(WITHOUT_PLUGIN.format(module, function), *args, **environment)


def assert_same_predictions(first, second):
    files = sorted(f.name for f in first.glob("*.nii.gz"))
    assert files and files == sorted(f.name for f in second.glob("*.nii.gz"))
    for name in files:
        a, b = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / name))) for folder in (first, second))
        np.testing.assert_array_equal(a, b)
        npz = name.replace(".nii.gz", ".npz")
        np.testing.assert_array_equal(*(np.load(folder / npz)["probabilities"] for folder in (first, second)))


@pytest.fixture(scope="module")
def images(nnunet, hippocampus, tmp_path_factory):
    """Two held-back images."""
    folder = tmp_path_factory.mktemp("images")
    for case in hippocampus["test"][:2]:
        shutil.copyfile(nnunet.raw(HIPPOCAMPUS) / "imagesTs" / f"{case}_0000.nii.gz", folder / f"{case}_0000.nii.gz")
    return folder


@pytest.fixture(scope="module")
def predictions(hippocampus_model, images, tmp_path_factory):
    """Predictions of the plugin with each branch."""
    folder = tmp_path_factory.mktemp("plugin")
    for branch in ("student", "teacher", "mean"):
        nnunet_commands.predict(["-i", str(images), "-o", str(folder / branch), "-d", "4", "-c", "2d_export", "-f", "0",
                                 "-device", "cpu", "-npp", "0", "-nps", "0", "--disable_tta", "--save_probabilities",
                                 "--branch", branch])
    return folder


def test_stock_nnunet_predicts_the_same_to_the_bit(hippocampus_model, images, predictions, tmp_path):
    tasks = []
    for branch in ("student", "teacher"):
        model = export(hippocampus_model, tmp_path / f"model_{branch}", branch)
        checkpoints = {f.name for f in (hippocampus_model / "fold_0").glob("checkpoint_*.pth")}
        assert {f.name for f in (model / "fold_0").glob("checkpoint_*.pth")} == checkpoints
        assert checkpoints == {"checkpoint_final.pth", "checkpoint_best.pth"}
        (tmp_path / branch).mkdir()
        tasks.append((str(images), str(tmp_path / branch), str(model)))
    without_plugin(PREDICT_WITHOUT_PLUGIN, json.dumps(tasks))
    for branch in ("student", "teacher"):
        assert_same_predictions(predictions / branch, tmp_path / branch)


def test_the_branches_predict_differently_and_the_mean_is_that_of_the_logits(predictions, images):
    for name in (f.name.replace("_0000.nii.gz", ".npz") for f in images.iterdir()):
        p = {branch: np.load(predictions / branch / name)["probabilities"].astype(np.float64)
             for branch in ("student", "teacher", "mean")}
        assert not np.array_equal(p["student"], p["teacher"])
        # The softmax of the mean of logits is the normalised geometric mean. nnU-Net keeps sums of logits in half
        # precision, which is coarse in the corners, where the weights of the sliding window are small.
        geometric = np.sqrt(p["student"] * p["teacher"])
        error = np.abs(p["mean"] - geometric / geometric.sum(0))
        assert error.mean() < 1e-3 and error.max() < 0.05
        assert min(np.abs(p["mean"] - p[branch]).mean() for branch in ("student", "teacher")) > 10 * error.mean()


def test_nothing_in_the_exported_files_needs_or_names_the_plugin(hippocampus_model, tmp_path):
    trained = tmp_path / hippocampus_model.name
    shutil.copytree(hippocampus_model, trained)
    for file, entry in (("plans.json", ("configurations", "2d")), ("dataset.json", ())):
        content = part = json.loads((trained / file).read_text())
        for key in entry:
            part = part[key]
        part[WRITTEN_BY] = "confkd"  # as train --quick and mix leave it
        if file == "dataset.json":
            part[CLASSES_KEY] = {}
        (trained / file).write_text(json.dumps(content))
    model = export(trained, tmp_path / "model")
    plans = json.loads((model / "plans.json").read_text())
    assert plans["plans_name"] == "nnUNetPlans_ConfKDTrainer"
    assert "confkd" not in json.dumps(plans["configurations"])
    assert not {"supervision", CLASSES_KEY, WRITTEN_BY} & set(json.loads((model / "dataset.json").read_text()))
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert not any(name.startswith("teacher_decoder.") for name in checkpoint["network_weights"])
    assert "confkd" not in json.dumps(checkpoint["init_args"]["plans"]["configurations"])
    origin = json.loads((model / ORIGIN_FILE).read_text())
    assert origin["trainer"] == "ConfKDTrainer" and origin["branch"] == "student" and origin["settings"]["seed"] == 3
    assert origin["declared_supervision"] == {"full": 10, "partial": 30, "unlabelled": 10}


def test_nothing_of_single_cases_goes_to_others(hippocampus, hippocampus_model, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(hippocampus_model, trained)
    described = json.loads((trained / "dataset.json").read_text())
    first, second = hippocampus["partial"][:2]
    files = {"images": [str(tmp_path / "a.nii.gz")], "label": str(tmp_path / "b.nii.gz")}
    described |= {"completed": {"cases": {first: 7}}, "dataset": {second: files}}
    (trained / "dataset.json").write_text(json.dumps(described))
    model = export(trained, tmp_path / "model")
    names = [case.encode() for cases in hippocampus.values() for case in cases]
    assert any(file.name.startswith("hippocampus_") for file in hippocampus_model.rglob("*"))
    for file in model.rglob("*"):
        assert not file.name.startswith("hippocampus_")
        if file.is_file():
            assert not any(name in file.read_bytes() for name in [*names, str(tmp_path.parent).encode()]), file


def test_stock_nnunet_continues_an_exported_checkpoint_with_the_optimiser_of_its_branch(hippocampus_model, tmp_path):
    from nnunetv2.run.run_training import get_trainer_from_args
    source = torch.load(hippocampus_model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    model = export(hippocampus_model, tmp_path / "model", "teacher")
    trainer = get_trainer_from_args(HIPPOCAMPUS, "2d_export", 0, "nnUNetTrainer", device=torch.device("cpu"))
    trainer.load_checkpoint(str(model / "fold_0" / "checkpoint_final.pth"))
    names = [name for name, _ in trainer.network.named_parameters()]
    # how a two-branch network numbers its parameters, from a network and not from the code under test
    from nnunet_confkd.training.network import TwoBranchUNet
    two = [name for name, _ in TwoBranchUNet(trainer.network).named_parameters()]
    for name in ("encoder.stages.0.0.convs.0.conv.weight", "decoder.seg_layers.1.weight",
                 "decoder.stages.0.convs.0.conv.bias"):
        twin = name.replace("decoder.", "teacher_decoder.") if name.startswith("decoder.") else name
        ours = trainer.optimizer.state_dict()["state"][names.index(name)]["momentum_buffer"]
        assert torch.equal(ours, source["optimizer_state"]["state"][two.index(twin)]["momentum_buffer"])


@pytest.mark.parametrize("exported", [True, False])
def test_a_model_is_taken_as_pretrained_weights_by_stock_nnunet(hippocampus_model, tmp_path, exported):
    """Of a model that is not exported, too, stock nnU-Net takes the student."""
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.run.run_training import get_trainer_from_args
    model = export(hippocampus_model, tmp_path / "model") if exported else hippocampus_model
    trainer = get_trainer_from_args(HIPPOCAMPUS, "2d_export", 0, "nnUNetTrainer", device=torch.device("cpu"))
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(model / "fold_0" / "checkpoint_final.pth"))
    source = torch.load(hippocampus_model / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert torch.equal(trainer.network.decoder.transpconvs[0].weight, source["decoder.transpconvs.0.weight"])


@pytest.fixture(scope="module")
def installed(nnunet, hippocampus_model):
    """Both branches, exported to nnUNet_results."""
    models = [export(hippocampus_model, install=True, branch=branch) for branch in ("student", "teacher")]
    yield models
    for model in models:
        shutil.rmtree(model)
        (nnunet.preprocessed(HIPPOCAMPUS) / f"{model.name.split('__')[1]}.json").unlink()


def test_an_installed_export_lies_where_nnunet_looks_for_it(nnunet, hippocampus_model, installed):
    names = ["nnUNetPlans_ConfKDTrainer", "nnUNetPlans_ConfKDTrainer_teacher"]
    assert installed == [nnunet.model(HIPPOCAMPUS, "2d_export", "nnUNetTrainer", name) for name in names]
    for model, name, validation in zip(installed, names, ("validation", "validation_teacher")):
        plans = json.loads((model / "plans.json").read_text())
        assert json.loads((nnunet.preprocessed(HIPPOCAMPUS) / f"{name}.json").read_text()) == plans
        files = sorted((model / "fold_0" / "validation").glob("*.nii.gz"))
        assert len(files) == 5
        for file in files:
            assert file.read_bytes() == (hippocampus_model / "fold_0" / validation / file.name).read_bytes()
    with pytest.raises(InputError, match="exists already"):
        export(hippocampus_model, install=True)


@pytest.mark.slow
def test_an_installed_export_is_read_by_nnunets_own_commands(installed, tmp_path):
    """find_best_configuration, an ensemble of both branches, and the export to a zip file."""
    plans = [model.name.split("__")[1] for model in installed]
    stock("evaluation.find_best_configuration", "find_best_configuration_entry_point", "4", "-c", "2d_export", "-p",
          *plans, "-f", "0", "-np", "1")
    found = json.loads((installed[0].parent / "inference_information.json").read_text())["all_results"]
    assert len(found) == 3 and any(name.startswith("ensemble") for name in found)
    stock("model_sharing.entry_points", "export_pretrained_model_entry", "-d", "4", "-o", tmp_path / "model.zip", "-c",
          "2d_export", "-p", plans[0], "-f", "0")
    stock("model_sharing.entry_points", "install_from_zip_entry_point", tmp_path / "model.zip",
          nnUNet_results=str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / HIPPOCAMPUS / installed[0].name / "fold_0" / "checkpoint_final.pth").is_file()
    folders = [tmp_path / f"pred_{i}" for i in range(2)]
    for model, folder in zip(installed, folders):
        shutil.copytree(model / "fold_0" / "validation", folder)
        shutil.copyfile(model / "plans.json", folder / "plans.json")
        shutil.copyfile(model / "dataset.json", folder / "dataset.json")
    stock("ensembling.ensemble", "entry_point_ensemble_folders", "-i", *folders, "-o", tmp_path / "ensemble", "-np",
          "1")
    assert len(list((tmp_path / "ensemble").glob("*.nii.gz"))) == 5


def test_a_plugin_model_is_read_by_nnunets_own_commands(hippocampus_model, tmp_path, threads):
    from nnunetv2.evaluation.find_best_configuration import find_best_configuration
    from nnunetv2.model_sharing.model_export import export_pretrained_model
    found = find_best_configuration(HIPPOCAMPUS, ({"plans": "nnUNetPlans", "configuration": "2d_export",
                                                   "trainer": "ConfKDTrainer"},), num_processes=1, folds=(0,))
    assert found["best_model_or_ensemble"]["selected_model_or_models"][0]["trainer"] == "ConfKDTrainer"
    export_pretrained_model(HIPPOCAMPUS, str(tmp_path / "model.zip"), ("2d_export",), "ConfKDTrainer", folds=(0,))
    assert (tmp_path / "model.zip").stat().st_size > 10000
    # the model is that of other tests, too, which expect none
    shutil.rmtree(hippocampus_model / "crossval_results_folds_0")


# ---- bad input ------------------------------------------------------------------------------------------------------

def test_an_output_folder_that_exists_is_left_alone(hippocampus_model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export(hippocampus_model, tmp_path / "mine")
    assert [f.name for f in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_a_checkpoint_of_another_trainer_is_refused_and_nothing_is_written(hippocampus_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(hippocampus_model, model)
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    checkpoint["network_weights"] = {k: v for k, v in checkpoint["network_weights"].items() if "teacher" not in k}
    checkpoint["trainer_name"] = "nnUNetTrainer"
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(InputError, match="checkpoint_final.pth: was written by nnUNetTrainer, so it needs no plugin. "
                                         "Share the model with nnUNetv2_export_model_to_zip"):
        export(model, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("finished, unfinished, named", [
    (["0", "1"], [], "0 1"), (["0", "all"], ["1"], "0"), (["all"], ["0"], "all")])
def test_the_command_names_the_folds_whose_training_has_ended(tmp_path, monkeypatch, capsys, finished, unfinished,
                                                              named):
    for name, folds in (("checkpoint_final.pth", finished), ("checkpoint_latest.pth", unfinished)):
        for fold in folds:
            (tmp_path / f"fold_{fold}").mkdir()
            (tmp_path / f"fold_{fold}" / name).touch()
    monkeypatch.setattr("nnunet_confkd.inference.export.export", lambda *_: tmp_path)
    monkeypatch.setattr("nnunet_confkd.commands.export.require_model", lambda *_: None)
    assert cli.main(["export", "--model", "model", "--output", "out"]) == 0
    said = capsys.readouterr().out
    assert f"-o PREDICTIONS -f {named}   (without" in said
    assert ("has not ended" in said) == bool(unfinished)


def test_a_model_without_a_teacher_is_exported(hippocampus_model, tmp_path):
    """As ConfKDTrainer_partialOnly trains it: the weights are those of the student."""
    model = tmp_path / "model"
    shutil.copytree(hippocampus_model, model)
    for path in (model / "fold_0").glob("*.pth"):
        checkpoint = torch.load(path, weights_only=False)
        weights = {name: w for name, w in checkpoint["network_weights"].items() if "teacher" not in name}
        torch.save(checkpoint | {"network_weights": weights, "trainer_name": "ConfKDTrainer_partialOnly"}, path)
    found, expected = (torch.load(export(source, tmp_path / name) / "fold_0" / "checkpoint_final.pth",
                                  weights_only=False) for source, name in ((model, "a"), (hippocampus_model, "b")))
    assert found["trainer_name"] == "nnUNetTrainer"
    assert found["network_weights"].keys() == expected["network_weights"].keys()
    assert all(torch.equal(w, expected["network_weights"][name]) for name, w in found["network_weights"].items())
    with pytest.raises(InputError, match="ConfKDTrainer_partialOnly and holds no teacher; leave out --branch teacher"):
        export(model, tmp_path / "c", "teacher")


def test_a_subclass_by_another_name_is_exported(hippocampus_model, tmp_path):
    """What a model is follows from the names of its weights, not from the name of its trainer."""
    model = tmp_path / "model"
    shutil.copytree(hippocampus_model, model)
    for path in (model / "fold_0").glob("*.pth"):
        torch.save(torch.load(path, weights_only=False) | {"trainer_name": "MyTrainer"}, path)
    out = export(model, tmp_path / "out")
    assert json.loads((out / "plans.json").read_text())["plans_name"] == "nnUNetPlans_MyTrainer"


@pytest.mark.parametrize("spoil, text", [
    (lambda m: shutil.rmtree(m), "there is no such folder"),
    (lambda m: (m / "plans.json").unlink(), "plans.json missing"),
    (lambda m: shutil.rmtree(m / "fold_0"), "train first"),
    (lambda m: (m / "fold_0" / "checkpoint_best.pth").write_bytes(b"half"), "checkpoint_best.pth: cannot be read"),
    (lambda m: torch.save({"epoch": 3}, m / "fold_0" / "checkpoint_best.pth"), "is no nnU-Net checkpoint")])
def test_a_broken_model_folder_is_one_clear_error(hippocampus_model, tmp_path, spoil, text, capsys):
    model = tmp_path / "model"
    shutil.copytree(hippocampus_model, model)
    spoil(model)
    assert cli.main(["export", "--model", str(model), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert text in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_a_branch_of_a_model_that_has_none_is_refused(hippocampus_model, images, tmp_path, capsys):
    stock_model = export(hippocampus_model, tmp_path / "stock")
    code = cli.main(["predict", "-i", str(images), "-o", str(tmp_path / "out"), "-m", str(stock_model), "-f", "0",
                     "-device", "cpu", "--branch", "teacher"])
    assert code == 1 and "holds no teacher" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- pretrained weights ---------------------------------------------------------------------------------------------

def test_stock_pretrained_weights_start_both_branches(nnunet, hippocampus_model, tmp_path):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    stock_file = export(hippocampus_model, tmp_path / "stock") / "fold_0" / "checkpoint_final.pth"
    trainer = nnunet.trainer(HIPPOCAMPUS, "2d_export")
    trainer.initialize()
    with pytest.raises(AssertionError, match="teacher_decoder"):
        load_pretrained_weights(trainer.network, str(stock_file))
    with pretrained_for_both_branches(stock_file, lambda: trainer.network) as adapted:
        load_pretrained_weights(trainer.network, adapted)
    source = torch.load(stock_file, weights_only=False)["network_weights"]["decoder.stages.0.convs.0.conv.weight"]
    for decoder in (trainer.network.decoder, trainer.network.teacher_decoder):
        assert torch.equal(decoder.stages[0].convs[0].conv.weight, source)
    assert not os.path.exists(adapted) and stock_file.is_file()


def test_a_narrow_teacher_starts_anew_beside_stock_pretrained_weights(nnunet, hippocampus_model, tmp_path, capsys):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    confkd_file = hippocampus_model / "fold_0" / "checkpoint_final.pth"
    trainer = nnunet.trainer(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "2d_narrow", "2d", {"teacher_width": 0.5}))
    trainer.initialize()
    initial = trainer.network.teacher_decoder.stages[0].convs[0].conv.weight.clone()
    with pretrained_for_both_branches(confkd_file, lambda: trainer.network) as adapted:
        load_pretrained_weights(trainer.network, adapted)
    assert "has no teacher of this network" in capsys.readouterr().out and adapted != str(confkd_file)
    source = torch.load(confkd_file, weights_only=False)["network_weights"]["decoder.stages.0.convs.0.conv.weight"]
    assert torch.equal(trainer.network.decoder.stages[0].convs[0].conv.weight, source)
    assert torch.equal(trainer.network.teacher_decoder.stages[0].convs[0].conv.weight, initial)


def test_a_narrow_teacher_is_not_exported(nnunet, hippocampus_model, tmp_path):
    """No stock network has such a decoder. The student of the same model is exported."""
    model = tmp_path / "model"
    shutil.copytree(hippocampus_model, model)
    for file in (model / "fold_0").glob("checkpoint_*.pth"):
        checkpoint = torch.load(file, weights_only=False)
        checkpoint["network_weights"]["teacher_decoder.narrowing.0.weight"] = torch.zeros(1)
        torch.save(checkpoint, file)
    with pytest.raises(InputError, match='checkpoint_best.pth: its teacher is narrower.*"teacher_width": 1'):
        export(model, tmp_path / "teacher", branch="teacher")
    assert not (tmp_path / "teacher").exists()
    export(model, tmp_path / "student")


def test_confkd_train_takes_stock_weights(nnunet, hippocampus_model, tmp_path, capsys, monkeypatch):
    stock_file = export(hippocampus_model, tmp_path / "stock") / "fold_0" / "checkpoint_final.pth"
    configuration = nnunet.configure(HIPPOCAMPUS, "2d_pretrained", "2d", {"epochs": 1, "iterations_per_epoch": 1,
                                                                             "teacher_width": 1})
    monkeypatch.setattr(ConfKDTrainer, "perform_actual_validation", lambda *_: None)  # it takes time
    assert cli.main(["train", "4", configuration, "0", "-device", "cpu", "-pretrained_weights", str(stock_file)]) == 0
    assert "its decoder starts both branches" in capsys.readouterr().out
    assert (nnunet.model(HIPPOCAMPUS, configuration) / "fold_0" / "checkpoint_final.pth").is_file()


def test_missing_pretrained_weights_are_one_clear_error(nnunet, hippocampus, tmp_path, capsys):
    assert cli.main(["train", "4", "2d", "0", "-device", "cpu", "-pretrained_weights", str(tmp_path / "no.pth")]) == 1
    assert "no.pth: there is no such checkpoint" in capsys.readouterr().err
