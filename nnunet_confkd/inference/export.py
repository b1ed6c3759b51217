"""Export of a trained branch as a model of stock nnU-Net, which needs no plugin.

The student's weights have the stock names, and the teacher's have the stock shapes. Each branch is a network that
nnU-Net's built-in trainer builds from the plans.
"""
from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_confkd import __version__
from nnunet_confkd.data.folders import WRITTEN_BY
from nnunet_confkd.data.json_files import read_description, read_plans
from nnunet_confkd.data.supervision import KINDS, TABLE_KEY
from nnunet_confkd.errors import InputError
from nnunet_confkd.files import new_folder, write_json
from nnunet_confkd.inference.checkpoints import fold_folders, has_own_teacher, load_checkpoint, require_teacher
from nnunet_confkd.training.names import TEACHER_CHECKPOINT, VALIDATION_FOLDERS
from nnunet_confkd.training.network import branch_weights, has_narrow_teacher, has_teacher

ORIGIN_FILE = "confkd_export.json"
STOCK_TRAINER = "nnUNetTrainer"
# What a dataset.json of nnU-Net says of the whole data set. Other keys may hold names of cases, or paths.
EXPORTED = ("channel_names", "modality", "labels", "regions_class_order", "file_ending", "numTraining",
            "overwrite_image_reader_writer", "name", "description", "reference", "licence", "license", "release",
            "tensorImageSize")


def export(model: str | Path, output: str | Path | None = None, branch: str = "student", install: bool = False) -> Path:
    """Write one branch of a trained ConfKD model as a model folder of stock nnU-Net, with all folds and checkpoints.

    Models of trainers without a teacher, such as ConfKDTrainer_partialOnly, have the student alone.
    `confkd_export.json` says where the model came from. A folder given as `output` holds nothing of single cases.

    Args:
        model: The folder TRAINER__PLANS__CONFIGURATION under nnUNet_results.
        output: The folder to write, which must not exist.
        branch: "student" or "teacher".
        install: Place the model under nnUNet_results instead, with the validation's segmentations. Its plans go beside
            those of the data set.

    Returns:
        The new folder.

    Raises:
        InputError: There is no such model, it is of a stock trainer, it has no teacher that can be exported, or
            something exists already.

    Examples:
        >>> export("MODEL", "my_model")  # doctest: +SKIP
        PosixPath('my_model')
    """
    model = Path(model)
    folds = fold_folders(model)
    plans, dataset_json = read_plans(model / "plans.json"), read_description(model / "dataset.json")
    checkpoints = {path: name for fold in folds for path, name in _checkpoints(fold, branch).items()}
    first = min(checkpoints)
    checkpoint = load_checkpoint(first)
    _require_branch(first, checkpoint, branch)
    configuration, trainer = checkpoint["init_args"]["configuration"], checkpoint["trainer_name"]
    _require_configuration(first, configuration, plans)
    stock_plans = _stock_plans(plans, trainer, branch)
    stock_dataset_json = {key: value for key, value in dataset_json.items() if key in EXPORTED}
    origin = {"model": model.name, "trainer": trainer, "plans": plans["plans_name"], "configuration": configuration,
              "branch": branch, "settings": plans["configurations"][configuration].get("confkd"),
              "nnunet_confkd": __version__, "declared_supervision": _kinds(dataset_json),
              "checkpoints": [path.relative_to(model).as_posix() for path in checkpoints]}
    output, plans_file = _targets(output, install, stock_plans, configuration)

    network = _stock_network(stock_plans, stock_dataset_json, configuration)
    with new_folder(output) as unfinished:
        for fold in folds:
            (unfinished / fold.name).mkdir()
            _copy_if_there(fold / "progress.png", unfinished / fold.name)
            if install:
                _copy_cases(fold, unfinished / fold.name, branch)
        for path, name in checkpoints.items():
            print(f"{path.parent.name}/{path.name}")
            stock = _stock_checkpoint(path, network, branch, stock_plans, stock_dataset_json)
            torch.save(stock, unfinished / path.parent.name / name)
        write_json(unfinished / "plans.json", stock_plans)
        write_json(unfinished / "dataset.json", stock_dataset_json)
        write_json(unfinished / ORIGIN_FILE, origin)
        _copy_if_there(model / "dataset_fingerprint.json", unfinished)
    if plans_file is not None and plans_file.parent.is_dir() and not plans_file.is_file():
        write_json(plans_file, stock_plans)
    return output


def _kinds(dataset_json: dict) -> dict[str, int]:
    """Return how many cases the description declares to be of each kind."""
    table = dataset_json.get(TABLE_KEY) or {}
    return {kind: sum(k == kind for k in table.values()) for kind in KINDS}


def _targets(output: str | Path | None, install: bool, plans: dict, configuration: str) -> tuple[Path, Path | None]:
    """Decide where to write the model, and with `install` the plans; raise InputError if one is in the way."""
    if install == (output is not None):
        raise InputError("give either an output folder or --install")
    plans_file = None
    if install:
        name = "__".join((STOCK_TRAINER, plans["plans_name"], configuration))
        output = Path(nnUNet_results) / plans["dataset_name"] / name
        if nnUNet_preprocessed.is_set():
            plans_file = Path(nnUNet_preprocessed) / plans["dataset_name"] / f"{plans['plans_name']}.json"
            if plans_file.is_file() and json.loads(plans_file.read_text(encoding="utf-8")) != plans:
                raise InputError(f"{plans_file}: exists, with other plans. Move it away first; nothing was written.")
    output = Path(output)
    if output.exists():
        raise InputError(f"{output}: exists already. Choose another folder, or remove it first; nothing was written.")
    return output, plans_file


def _require_configuration(path: Path, configuration: str, plans: dict) -> None:
    if configuration not in plans["configurations"]:
        raise InputError(f"{path}: is of the configuration {configuration}, which plans.json does not have")


def _checkpoints(fold: Path, branch: str) -> dict[Path, str]:
    """The checkpoints of a fold, and their names in the exported model. A teacher that was left has its own alone."""
    if has_own_teacher(branch, [fold]):
        return {fold / TEACHER_CHECKPOINT: "checkpoint_final.pth"}
    return {path: path.name for path in sorted(fold.glob("checkpoint_*.pth")) if path.name != TEACHER_CHECKPOINT}


def _require_branch(path: Path, checkpoint: dict, branch: str) -> None:
    """Raise InputError unless a stock network can hold this branch. A trainer without a teacher has the student's."""
    if not has_teacher(checkpoint["network_weights"]):
        trainer = str(checkpoint.get("trainer_name"))
        if trainer.startswith(STOCK_TRAINER):  # also nnU-Net's variants
            raise InputError(f"{path}: was written by {trainer}, so it needs no plugin. Share the model with "
                             f"nnUNetv2_export_model_to_zip")
        if branch == "teacher":
            raise InputError(f"{path}: was written by {trainer} and holds no teacher; leave out --branch teacher")
    if branch == "teacher":
        require_teacher(path, checkpoint, "--branch teacher")
    if branch == "teacher" and has_narrow_teacher(checkpoint["network_weights"]):
        raise InputError(
            f"{path}: its teacher is narrower than the student, so no stock network can hold it. Use it with "
            f"`confkd predict --branch teacher`, or train with \"teacher_width\": 1 in the confkd block of the plans.")


def _stock_plans(plans: dict, trainer: str, branch: str) -> dict:
    """Return a copy of the plans under another name, without ConfKD's settings and the mark of `train --quick`."""
    plans = deepcopy(plans)
    plans["plans_name"] = f"{plans['plans_name']}_{trainer}" + ("" if branch == "student" else f"_{branch}")
    for configuration in plans["configurations"].values():
        for key in ("confkd", WRITTEN_BY):
            configuration.pop(key, None)
    return plans


def _stock_network(plans: dict, dataset_json: dict, configuration: str) -> torch.nn.Module:
    """Build the network that nnU-Net predicts with under these plans."""
    manager = PlansManager(plans)
    configuration_manager = manager.get_configuration(configuration)
    channels = determine_num_input_channels(manager, configuration_manager, dataset_json)
    heads = manager.get_label_manager(dataset_json).num_segmentation_heads
    return nnUNetTrainer.build_network_architecture(manager, configuration_manager, channels, heads, False)


def _stock_checkpoint(path: Path, network: torch.nn.Module, branch: str, plans: dict, dataset_json: dict) -> dict:
    """Return a checkpoint of nnU-Net's built-in trainer with one branch's weights and optimiser state."""
    checkpoint = load_checkpoint(path)
    _require_branch(path, checkpoint, branch)
    weights = checkpoint["network_weights"]
    if has_teacher(weights):
        weights = branch_weights(weights, branch)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{path}: its weights do not fit the network of plans.json: {error}") from error
    return {
        **checkpoint,
        "network_weights": weights,
        "optimizer_state": _stock_optimizer(checkpoint.get("optimizer_state"), network, branch),
        "trainer_name": STOCK_TRAINER,
        "init_args": {**checkpoint["init_args"], "plans": plans, "dataset_json": dataset_json},
        # without the curves that stock nnU-Net does not have
        "logging": {k: v for k, v in checkpoint["logging"].items() if k in _stock_curves()},
    }


def _stock_curves() -> set[str]:
    from nnunetv2.training.logging.nnunet_logger import LocalLogger
    return set(LocalLogger().my_fantastic_logging)


def _stock_optimizer(state: dict | None, network: Any, branch: str) -> dict | None:
    """Return the part of the optimiser's state that belongs to one branch.

    A ConfKD network numbers its parameters in this order: encoder, student's decoder, teacher's decoder, hints. Both
    decoders have the same order inside. The stock `network` has the encoder and one decoder.
    """
    if state is None:
        return None
    num_parameters, encoder = (len(list(module.parameters())) for module in (network, network.encoder))
    decoder = num_parameters - encoder
    source = {i: i + decoder if branch == "teacher" and i >= encoder else i for i in range(num_parameters)}
    return {"state": {i: state["state"][s] for i, s in source.items() if s in state["state"]},
            "param_groups": [{**group, "params": [p for p in group["params"] if p < num_parameters]}
                             for group in state["param_groups"]]}


def _copy_cases(source: Path, target: Path, branch: str) -> None:
    """Copy what nnU-Net's commands read beside the checkpoints. It holds names of cases, segmentations and paths."""
    _copy_if_there(source / "debug.json", target)
    validation = source / VALIDATION_FOLDERS[branch]
    if validation.is_dir():
        shutil.copytree(validation, target / "validation")


def _copy_if_there(file: Path, folder: Path) -> None:
    if file.is_file():
        shutil.copyfile(file, folder / file.name)
