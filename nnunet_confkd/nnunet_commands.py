"""`confkd train` and `confkd predict`: nnU-Net's commands with the ConfKD trainers in reach.

The arguments are parsed by nnU-Net's own parsers and handed on. Before that, each ordinary mistake is reported in one
sentence, with the command that helps.
"""
from __future__ import annotations

import argparse
import ast
import contextlib
import io
import multiprocessing
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import nnunetv2

from nnunet_confkd.arguments import unknown_arguments
from nnunet_confkd.device import OPTION_HELP, choose_device, cpu_threads
from nnunet_confkd.discovery import make_findable
from nnunet_confkd.errors import InputError, some
from nnunet_confkd.training.names import BRANCHES, TEACHER_CHECKPOINT

DEFAULT_TRAINER = "ConfKDTrainer"
ENTRY_POINTS = {
    "nnUNetv2_train": ("nnunetv2.run.run_training", "run_training_entry"),
    "nnUNetv2_predict": ("nnunetv2.inference.predict_from_raw_data", "predict_entry_point"),
    "nnUNetv2_predict_from_modelfolder": ("nnunetv2.inference.predict_from_raw_data",
                                          "predict_entry_point_modelfolder")}


# ---- arguments ------------------------------------------------------------------------------------------------------

def parser_of(name: str) -> argparse.ArgumentParser:
    """Get the parser of a command of nnU-Net, so that abbreviations and defaults are the same here and there.

    nnU-Net's modules import torch, which takes seconds. So only those lines are run that make the parser.

    Args:
        name: The command's name, a key of `ENTRY_POINTS`.

    Returns:
        The parser, in which the device and the trainer are None by default.

    Raises:
        RuntimeError: There are no such lines.
    """
    module, function = ENTRY_POINTS[name]
    source = Path(nnunetv2.__path__[0], *module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    lines = [node for node in getattr(functions.get(function), "body", ()) if _makes_parser(node)]
    called = {node.id for line in lines for node in ast.walk(line) if isinstance(node, ast.Name)}
    names: dict[str, Any] = {"argparse": argparse, "os": os}
    helpers = [node for name, node in functions.items() if name in called]
    exec(compile(ast.Module([*helpers, *lines], []), module, "exec"), names)
    parser = names.get("parser")
    if not isinstance(parser, argparse.ArgumentParser):
        raise RuntimeError(f"{name} makes no parser: nnU-Net is of another version than was tested")
    parser.prog = name
    parser.set_defaults(device=None, tr=None)
    return parser


def _makes_parser(line: ast.stmt) -> bool:
    call = line.value if isinstance(line, (ast.Assign, ast.Expr)) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func) in ("argparse.ArgumentParser", "parser.add_argument")


def entry_point(name: str) -> Callable:
    """Import the function that a command of nnU-Net runs."""
    module, function = ENTRY_POINTS[name]
    return getattr(import_module(module), function)


def as_argv(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """Return arguments that the parser, one of nnU-Net's, reads as `args`."""
    words, options = [], []
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if not action.option_strings:
            words.append(str(value))
        elif value is not None and value != action.default:
            values = value if isinstance(value, (list, tuple)) else [value]
            options += [action.option_strings[0], *(map(str, values) if action.nargs != 0 else ())]
    return [*options, "--", *words] if words else options


def with_options(argv: list[str], *options: str) -> list[str]:
    """Add options to the arguments. They win over earlier options of the same name."""
    end = argv.index("--") if "--" in argv else len(argv)
    return [*argv[:end], *options, *argv[end:]]


# ---- before a training ----------------------------------------------------------------------------------------------

def check_training(args: argparse.Namespace) -> Path:
    """Check that a training can start.

    Args:
        args: The arguments as nnU-Net parses them, with `tr` set.

    Returns:
        The folder that the training will write to.

    Raises:
        InputError: The variables are not set; there are no such data set, plans, configuration, trainer or fold; the
            configuration is not preprocessed; the options contradict each other; there are fewer GPUs than asked for.
    """
    _require_variables("nnUNet_preprocessed", "nnUNet_results")
    _require_no_contradiction(args)
    name = _dataset_name(args.dataset_name_or_id)
    folder = Path(os.environ["nnUNet_preprocessed"]) / name
    _require_preprocessed(folder, args.p, args.configuration)
    require_fold(folder, args.fold)
    require_trainer(args.tr)
    if args.num_gpus > 1:
        import torch
        if args.num_gpus > torch.cuda.device_count():
            raise InputError(f"-num_gpus {args.num_gpus}: this machine has {torch.cuda.device_count()} CUDA devices")
    model = Path(os.environ["nnUNet_results"]) / name / f"{args.tr}__{args.p}__{args.configuration}"
    output = model / f"fold_{args.fold}"
    if args.val and not (output / "checkpoint_final.pth").is_file():
        raise InputError(f"{output}: has no checkpoint_final.pth, so --val has nothing to validate; finish the "
                         f"training first: confkd train {args.dataset_name_or_id} {args.configuration} {args.fold} "
                         f"-tr {args.tr} --c")
    return output


def prepare_quick(args: argparse.Namespace) -> str:
    """Add the small configuration of `--quick` to the plans, and name it in the arguments.

    Args:
        args: The arguments as nnU-Net parses them, with `tr` set.

    Returns:
        What the user should know of this training.

    Raises:
        InputError: Those of :func:`check_training`; or there is no quick form of the configuration or the trainer.
    """
    from nnunet_confkd.data.json_files import read_plans
    from nnunet_confkd.data.small_configuration import add_quick_configuration, resolved

    _require_variables("nnUNet_preprocessed", "nnUNet_results")
    folder = _preprocessed(args)
    _require_no_contradiction(args)
    _require_preprocessed(folder, args.p, args.configuration)
    require_fold(folder, args.fold)  # before the plans are changed
    trainer = require_trainer(args.tr)
    if not hasattr(trainer, "settings_of"):  # none of ours, which alone read the number of epochs from the plans
        raise InputError(f"--quick: -tr {args.tr} cannot be shortened by it; use {DEFAULT_TRAINER} or a variant of it")
    plans_file = folder / f"{args.p}.json"
    usual, args.configuration = add_quick_configuration(plans_file, args.configuration, args.c or args.val)
    quick = resolved(read_plans(plans_file), args.configuration)
    settings = trainer.settings_of(quick["confkd"])
    features = quick["architecture"]["arch_kwargs"]["features_per_stage"]
    patch = " x ".join(map(str, quick["patch_size"]))
    return (f"--quick: the configuration {args.configuration} is {usual} with a small network (up to {features[-1]} "
            f"features), patches of {patch} voxels, and {settings.epochs} epochs of "
            f"{settings.iterations_per_epoch} iterations. This is for a first look. The accuracy is not that of a "
            f"usual training: confkd train {args.dataset_name_or_id} {usual} {args.fold}"
            + ("" if (long := re.sub(r"_\d+epochs?$", "", args.tr)) == DEFAULT_TRAINER else f" -tr {long}"))


@contextmanager
def no_leftovers(output: Path) -> Iterator[None]:
    """Remove the folders that a training made, if it fails before the end of its first epoch.

    Args:
        output: The fold's folder.
    """
    fold, model, dataset = output, output.parent, output.parent.parent
    existed = {folder for folder in (fold, model, dataset) if folder.exists()}
    try:
        yield
    except Exception:
        if fold not in existed and not [*fold.glob("checkpoint_*"), *fold.glob("progress*.png")]:
            shutil.rmtree(fold, ignore_errors=True)
            if model not in existed and not any(model.glob("fold_*")):
                shutil.rmtree(model, ignore_errors=True)  # nnU-Net's copies of the plans and the like
            with contextlib.suppress(OSError):  # not empty
                if dataset not in existed:
                    dataset.rmdir()
        raise


def after_training(args: argparse.Namespace, output: Path) -> str:
    """Say where the model is, and which commands follow.

    Args:
        args: The arguments as nnU-Net parses them, with `tr` set.
        output: The fold's folder.
    """
    from nnunet_confkd.data.json_files import number_of_folds

    model, more = output.parent, f" -tr {args.tr}" if args.tr != DEFAULT_TRAINER else ""
    more += f" -p {args.p}" if args.p != "nnUNetPlans" else ""
    splits = Path(os.environ.get("nnUNet_preprocessed", ""), model.parent.name, "splits_final.json")
    folds = ["all"] if args.fold == "all" else [str(fold) for fold in range(number_of_folds(splits))]
    trained = [fold for fold in folds if (model / f"fold_{fold}" / "checkpoint_final.pth").is_file()]
    missing = [fold for fold in folds if fold not in trained]
    lines = [f"model: {model}",
             f"next: confkd predict -d {args.dataset_name_or_id} -i IMAGES -o PREDICTIONS -c {args.configuration} "
             f"-f {' '.join(trained or [args.fold])}{more}",
             f"or: confkd report --model {shlex.quote(str(model))}"]
    if trained and missing:
        lines.append(f"or: confkd train {args.dataset_name_or_id} {args.configuration} {missing[0]}{more}, because the "
                     f"mean of several folds predicts better (not trained yet: {', '.join(missing)})")
    return "\n".join(lines)


def _require_no_contradiction(args: argparse.Namespace) -> None:
    for one, other in (("c", "val"), ("c", "pretrained_weights"), ("val_best", "disable_checkpointing")):
        if getattr(args, one) and getattr(args, other):
            raise InputError(f"{_flag(one)} and {_flag(other)} exclude each other; leave one out")


def _flag(name: str) -> str:
    return f"-{name}" if name == "pretrained_weights" else f"--{name}"


def _require_variables(*names: str) -> None:
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        what = ("variable, is not set; set it to your folder" if len(missing) == 1 else
                "variables, are not set; set them to your folders")
        raise InputError(f"{' and '.join(missing)}, nnU-Net's environment {what}: "
                         + "; ".join(f"export {name}=/path/to/{name}" for name in missing))


def _dataset_name(dataset: str) -> str:
    """Find the name of a data set that is given as 27 or Dataset027_NAME, in all three of nnU-Net's folders."""
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    if dataset.startswith("Dataset"):
        return dataset
    if not dataset.isdigit():
        raise InputError(f"{dataset}: is no data set; give its id or its name, 27 or Dataset027_NAME")
    found = [str(name) for name in find_candidate_datasets(int(dataset))]
    if len(found) > 1:
        raise InputError(f"{dataset}: there are several data sets of this id: {', '.join(found)}; rename all but one")
    if not found:
        raise _no_dataset(f"{int(dataset):03d}")
    return found[0]


def _preprocessed(args: argparse.Namespace) -> Path:
    """Return the folder of the data set of a training in nnUNet_preprocessed."""
    return Path(os.environ["nnUNet_preprocessed"]) / _dataset_name(args.dataset_name_or_id)


def _no_dataset(name: str) -> InputError:
    names = sorted({found.name for folder in _nnunet_folders() for found in folder.glob("Dataset[0-9][0-9][0-9]_*")})
    there = f"there are: {', '.join(names)}" if names else "there is none at all"
    return InputError(f"there is no data set {name} ({there}); confkd mix and confkd convert write one into the "
                      "folder nnUNet_raw")


def _nnunet_folders() -> list[Path]:
    variables = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    return [Path(os.environ[name]) for name in variables if os.environ.get(name)]


def _require_preprocessed(folder: Path, plans_name: str, configuration: str) -> None:
    """Require plans and preprocessed cases; `folder` is that of the data set in nnUNet_preprocessed."""
    from nnunet_confkd.data.json_files import read_plans

    file, plan = folder / f"{plans_name}.json", f"confkd plan -d {folder.name[7:10].lstrip('0')} -c {configuration}"
    preset = re.fullmatch("nnUNetResEncUNet(M|L|XL)Plans", plans_name)
    if preset:
        plan += f" -pl nnUNetPlannerResEnc{preset[1]}"
    elif plans_name != "nnUNetPlans":
        plan += f" -overwrite_plans_name {plans_name}, with the options that the plans of this name are made with"
    if not any((place / folder.name).is_dir() for place in _nnunet_folders()):
        raise _no_dataset(folder.name)
    if not file.is_file() or not (folder / "dataset.json").is_file():
        others = sorted(f.stem for f in folder.glob("*Plans*.json") if not f.name.startswith("confkd_"))
        raise InputError(f"{file}: is not there; plan and preprocess the data set first: {plan}"
                         + (f"; or choose other plans with -p: {', '.join(others)}" if others else ""))
    plans = read_plans(file)
    if configuration not in plans["configurations"]:
        large = configuration in ("3d_lowres", "3d_cascade_fullres")
        raise InputError(f"{file}: has no configuration {configuration}; it has {', '.join(plans['configurations'])}"
                         + ("; nnU-Net plans 3d_lowres and the cascade only for large images" if large else ""))
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # imports torch

    try:
        data = folder / PlansManager(plans).get_configuration(configuration).data_identifier
    except (RuntimeError, ValueError, KeyError) as error:  # what it inherits from
        raise InputError(f"{file}: the configuration {configuration} is not complete: {error}") from error
    if not data.is_dir() or not any(data.iterdir()):
        raise InputError(f"{data}: the configuration {configuration} is not preprocessed; do it first: {plan}")


def require_fold(folder: Path, fold: str) -> None:
    """Raise InputError unless a fold is `all`, or a number below that of the folds, as nnU-Net reads them.

    Args:
        folder: The preprocessed data set.
        fold: The fold.
    """
    from nnunet_confkd.data.json_files import number_of_folds

    splits = folder / "splits_final.json"
    number = number_of_folds(splits)
    if fold != "all" and not (fold.isdigit() and int(fold) < number):
        raise InputError(f"there is no fold {fold}; use all, or 0 to {number - 1}, the folds of {splits}")


def require_trainer(name: str) -> type:
    """Return the trainer of this name. Raises InputError if nnU-Net does not find it."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise InputError(f"-tr {name}: there is no such trainer in nnU-Net or in the folders of nnUNet_extTrainer "
                         f"({os.environ.get('nnUNet_extTrainer', '')})") from error


def _network_to_train(args: argparse.Namespace):
    """Build the network that a training would start with."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_confkd.data.json_files import read_description, read_plans

    folder = _preprocessed(args)
    description = read_description(folder / "dataset.json")
    plans = PlansManager(read_plans(folder / f"{args.p}.json"))
    configuration = plans.get_configuration(args.configuration)
    trainer = recursive_find_trainer_class_by_name(args.tr)
    if hasattr(trainer, "settings_of"):  # one of ours
        settings = trainer.settings_of(configuration.configuration.get("confkd", {}))
        configuration.configuration["confkd"] = settings.as_dict()
    return trainer.build_network_architecture(
        plans, configuration, determine_num_input_channels(plans, configuration, description),
        plans.get_label_manager(description).num_segmentation_heads)


# ---- before a prediction --------------------------------------------------------------------------------------------

def check_model(args: argparse.Namespace) -> Path:
    """Check that there is a model that can predict.

    Args:
        args: The arguments as nnU-Net parses them, with `tr` set if there is no `m`.

    Returns:
        The folder of the model.

    Raises:
        InputError: The variables are not set; there is no such data set or model; a fold is not trained; the
            predictions of a cascade's first stage are missing.
    """
    from nnunet_confkd.data.json_files import read_plans

    if getattr(args, "m", None) is not None:
        model, train = Path(args.m), "confkd train"
        if not model.is_dir():
            raise InputError(f"-m {model}: there is no such folder; give the folder TRAINER__PLANS__CONFIGURATION of "
                             "a model")
    else:
        _require_variables("nnUNet_results")
        name = _dataset_name(args.d)
        model = Path(os.environ["nnUNet_results"]) / name / f"{args.tr}__{args.p}__{args.c}"
        train = f"confkd train {args.d} {args.c} 0 -tr {args.tr}" + (f" -p {args.p}" if args.p != "nnUNetPlans" else "")
        if not model.is_dir():
            trained = sorted(found.name for found in model.parent.glob("*__*__*"))
            others = f"; or choose with -tr, -p and -c one that is trained: {', '.join(trained)}" if trained else ""
            raise InputError(f"{model}: there is no such model; train it first: {train}{others}")
    for file in ("plans.json", "dataset.json"):
        if not (model / file).is_file():
            raise InputError(f"{model}: is no trained model, because it has no {file}; train first: {train}")
    _require_folds(model, [str(fold) for fold in args.f], args.chk, train)
    configuration = model.name.split("__")[-1]
    previous = read_plans(model / "plans.json")["configurations"].get(configuration, {}).get("previous_stage")
    if previous and args.prev_stage_predictions is None:
        raise InputError(f"{model}: is the second stage of a cascade; predict with {previous} first, and give the "
                         "folder of these predictions here: -prev_stage_predictions FOLDER")
    return model


def _require_folds(model: Path, folds: list[str], checkpoint: str, train: str) -> None:
    untrained = [fold for fold in folds if not (model / f"fold_{fold}" / checkpoint).is_file()]
    if not untrained:
        return
    trained = [file.parent.name[len("fold_"):] for file in sorted(model.glob(f"fold_*/{checkpoint}"))]
    others = sorted({file.name for fold in untrained for file in (model / f"fold_{fold}").glob("checkpoint_*.pth")})
    if trained:
        remedy = f"predict with what is trained: -f {' '.join(trained)}"
    elif others:
        remedy = f"the training has not ended: continue it with --c, or predict with -chk {others[0]}"
    else:
        remedy = f"train first: {train}"
    which = f"fold {untrained[0]} has" if len(untrained) == 1 else f"folds {', '.join(untrained)} have"
    raise InputError(f"{model}: {which} no {checkpoint}; {remedy}")


def _with_checkpoint(branch: str, folds: list[Path], argv: list[str], args: argparse.Namespace) -> list[str]:
    """Choose the teacher's own checkpoint if there is one. Raise InputError if a branch has no teacher to predict."""
    from nnunet_confkd.inference.checkpoints import has_own_teacher, load_checkpoint, require_teacher

    if branch == "student":
        return argv
    named = any(word == "-chk" or word.startswith("-chk=") for word in argv)
    if not named and has_own_teacher(branch, folds):
        args.chk, argv = TEACHER_CHECKPOINT, with_options(argv, "-chk", TEACHER_CHECKPOINT)
    for fold in folds:  # in one of them the teacher may have completed labels, and in another one not yet
        require_teacher(fold / args.chk, load_checkpoint(fold / args.chk), "--branch")
    return argv


# ---- the commands ---------------------------------------------------------------------------------------------------

TRAIN_HELP = f"""confkd train: nnUNetv2_train with the ConfKD trainers in reach.
  -tr                  default: {DEFAULT_TRAINER}
  -device              {OPTION_HELP}
  -pretrained_weights  takes stock nnU-Net checkpoints, too
  --quick              a first look, in minutes on a CPU: a small network and a short training, as the
                       configuration CONFIGURATION_quick. It is less accurate than a usual training
All else is nnUNetv2_train's:
"""
PREDICT_HELP = f"""confkd predict: nnUNetv2_predict (with -m FOLDER: nnUNetv2_predict_from_modelfolder)
with the ConfKD trainers in reach.
  --branch {{student,teacher,mean}}  which branch predicts (default: student; mean: of the logits)
  --save-entropy                   also write the entropy of each voxel, and a list of the cases
                                   to look at first, to the folder uncertainty of -o
  --postprocessing [FOLDER]        also write post-processed predictions to the folder postprocessed of -o.
                                   FOLDER holds nnU-Net's postprocessing.json; default: that of the model
  --preview                        also write pictures of each case and a page of them to the folder
                                   preview of -o; with --save-entropy the most uncertain cases come first
  -i                               a folder of images, or an image; with a single channel the names need
                                   no _0000 at their end. Or a folder of a DICOM series, or of such folders
  -tr                              default: {DEFAULT_TRAINER}
  -device                          {OPTION_HELP}
All else is nnU-Net's:
"""


def train(argv: list[str]) -> None:
    """Run `confkd train`."""
    name = "nnUNetv2_train"
    parser = parser_of(name)
    if _wants_help(argv):
        print(TRAIN_HELP)
        parser.print_help()
        return
    own_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own_parser.add_argument("--quick", action="store_true")
    own, argv = own_parser.parse_known_args(argv)
    _require_places(argv)
    args = _parsed(parser, argv, own_parser._option_string_actions)
    args.tr = args.tr or DEFAULT_TRAINER
    make_findable()
    about = prepare_quick(args) if own.quick else None
    if about:
        print(about)
        argv = as_argv(parser, args)
    output = check_training(args)

    from nnunet_confkd.inference.checkpoints import pretrained_for_both_branches

    device = choose_device(args.device, lambda: expected_training_time(args))
    argv = with_options(argv, "-tr", args.tr, "-device", device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_leftovers(output))
        stack.enter_context(_threads(device, training=True))
        if args.pretrained_weights is not None:
            weights = stack.enter_context(pretrained_for_both_branches(args.pretrained_weights,
                                                                       lambda: _network_to_train(args)))
            argv = with_options(argv, "-pretrained_weights", weights)
        run_as(name, argv)
    print("\n".join(filter(None, [about, after_training(args, output)])))


def _require_places(argv: list[str]) -> None:
    """Raise InputError if the data set, the configuration or the fold is given by an option, as in `predict`."""
    given = dict(zip(argv, argv[1:]))
    if {"-c", "-f"} & given.keys() or re.match(r"\d|Dataset", given.get("-d", "")):
        words = [given.get(option, word) for option, word in (("-d", "ID"), ("-c", "CONFIGURATION"), ("-f", "FOLD"))]
        raise InputError(f"train takes the data set, the configuration and the fold without options: confkd train "
                         f"{shlex.join(words)}")


def predict(argv: list[str], afterwards: Callable[[Any], object] = lambda predicted: None,
            more_options: Iterable[str] = ()) -> None:
    """Run `confkd predict`.

    Args:
        argv: The arguments.
        afterwards: What to do with the :class:`nnunet_confkd.inference.inputs.Predicted`, while the images still have
            the names that nnU-Net needs.
        more_options: Options that the caller has taken out of the arguments, for the error about a mistyped one.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--branch", choices=BRANCHES, default="student")
    parser.add_argument("--save-entropy", action="store_true")
    parser.add_argument("--postprocessing", nargs="?", const="", metavar="FOLDER")
    own, argv = parser.parse_known_args(argv)
    name = _prediction_command(argv)
    if _wants_help(argv):
        print(PREDICT_HELP)
        parser_of(name).print_help()
        return
    args = _parsed(parser_of(name), argv, [*parser._option_string_actions, *more_options])
    make_findable()
    if not hasattr(args, "m"):
        args.tr = args.tr or DEFAULT_TRAINER
        argv = with_options(argv, "-tr", args.tr)
    model = check_model(args)
    argv = _with_checkpoint(own.branch, [model / f"fold_{fold}" for fold in args.f], argv, args)

    from nnunet_confkd.data.json_files import read_description
    from nnunet_confkd.inference import postprocessing
    from nnunet_confkd.inference.expected_time import prediction_text
    from nnunet_confkd.inference.inputs import (
        Predicted,
        name_source,
        readable_images,
        require_other_files,
        require_readable,
    )
    from nnunet_confkd.training.network import predicting

    found = postprocessing.required(model, args.f, own.postprocessing, own.branch)
    device = choose_device(args.device, lambda: prediction_text(model, len(args.f), not args.disable_tta))
    source, described = Path(args.i), read_description(model / "dataset.json", ("file_ending", "labels"))
    with (readable_images(source, described) as images, predicting(own.branch), _threads(device),
          _entropy_too() if own.save_entropy else contextlib.nullcontext()):
        require_other_files(source, images, Path(args.o), described["file_ending"])
        part = slice(getattr(args, "part_id", 0), None, getattr(args, "num_parts", 1))
        require_readable(images, described, part, Path(args.o) if args.continue_prediction else None)
        run_as(name, with_options(argv, "-device", device, "-i", str(images)))
        predicted = Predicted.of(images, model, Path(args.o), described, own.save_entropy, part)
        warning = predicted.warning_of_empty()
        afterwards(postprocessing.applied(found, predicted, own.postprocessing is not None))
    if images != source:
        name_source(Path(args.o), source)
    dataset = f" -d {args.d}" if hasattr(args, "d") else ""
    print("\n".join(filter(None, [
        _entropy_text(Path(args.o), own.save_entropy), warning,
        f"predictions: {args.o}\nnext, where there is a ground truth: confkd evaluate --truth LABELS --prediction "
        f"{shlex.quote(args.o)}{dataset}"])))


def _entropy_text(output: Path, saved: bool) -> str | None:
    """Say where the review list is, or warn of an entropy of segmentations that have been replaced."""
    if not saved and not (output / "uncertainty").is_dir():
        return None
    from nnunet_confkd.inference.uncertainty import list_cases, outdated

    if saved:
        return f"look at these cases first: {list_cases(output)}"
    cases = [score.stem for score in outdated(output)]
    return (f"WARNING: {output / 'uncertainty'}: is of earlier predictions of {some(cases)}; remove it, or predict "
            f"with --save-entropy") if cases else None


def _parsed(parser: argparse.ArgumentParser, argv: list[str], own: Iterable[str]) -> argparse.Namespace:
    """Parse nnU-Net's arguments; an unknown one is told with the option, of nnU-Net's or our own, that is most like it.
    """
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        raise unknown_arguments(unknown, [*parser._option_string_actions, *own])
    return parser.parse_args(argv)


def _prediction_command(argv: list[str]) -> str:
    """Choose between nnU-Net's two commands: with -m the model is a folder, otherwise it has a data set and a name."""
    by_folder = "nnUNetv2_predict_from_modelfolder"
    parser = parser_of(by_folder)
    for action in parser._actions:
        action.required = False
    args = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0]
    return by_folder if args.m is not None else "nnUNetv2_predict"


def _entropy_too() -> contextlib.AbstractContextManager:
    """Let nnU-Net's commands predict with the predictor that also writes the entropy."""
    from nnunetv2.inference import predict_from_raw_data

    from nnunet_confkd.inference.uncertainty import EntropyPredictor

    return mock.patch.object(predict_from_raw_data, "nnUNetPredictor", EntropyPredictor)


@contextmanager
def _threads(device: str, training: bool = False) -> Iterator[None]:
    """On the CPU, give the network as many threads as `cpu_threads` says; nnU-Net takes all cores of the machine."""
    if device != "cpu":
        yield
        return
    import torch

    torch.set_num_threads(cpu_threads(training))
    with mock.patch.object(torch, "set_num_threads"):
        yield


def expected_training_time(args: argparse.Namespace) -> str | None:
    """Say how long a training is expected to take on the CPU; None if its number of epochs is not known."""
    from nnunet_confkd.data.json_files import read_plans
    from nnunet_confkd.data.small_configuration import resolved
    from nnunet_confkd.inference.expected_time import training_text

    trainer, folder = require_trainer(args.tr), _preprocessed(args)
    if args.val or args.c or not hasattr(trainer, "settings_of"):
        return None
    block = resolved(read_plans(folder / f"{args.p}.json"), args.configuration).get("confkd", {})
    settings = trainer.settings_of(block)
    return training_text(folder, args.p, args.configuration, settings.epochs or 1000,
                         settings.iterations_per_epoch or 250)


def run_as(name: str, argv: list[str]) -> None:
    """Call the entry point of a command of nnU-Net as the command would.

    Args:
        name: The command's name, a key of `ENTRY_POINTS`.
        argv: The command's arguments.
    """
    function = entry_point(name)
    before, sys.argv, running = sys.argv, [name, *argv], multiprocessing.active_children()
    try:
        function()
    except BaseException:
        for process in {*multiprocessing.active_children()} - {*running}:
            process.terminate()  # the ranks of a training on several GPUs, which Python would wait for
        raise
    finally:
        sys.argv = before


def _wants_help(argv: list[str]) -> bool:
    return any(word == "-h" or len(word) > 2 and "--help".startswith(word) for word in argv)


# ---- errors ---------------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "DefaultCPUAllocator", "ALLOC_FAILED")
LESS_MEMORY = {
    "train": "plan a smaller patch or batch, e.g. confkd plan -d ID -c CONFIGURATION -gpu_memory_target 4 "
             "-overwrite_plans_name nnUNetPlans_4GB, and train with -p nnUNetPlans_4GB; nnUNet_n_proc_DA=2 loads the "
             "data with fewer processes",
    "predict": "--not_on_device keeps the result out of the GPU's memory, -npp 1 -nps 1 use fewer processes, "
               "-device cpu uses no GPU"}


def explanation(error: BaseException, command: str) -> str | None:
    """Explain an error that has an ordinary cause.

    Args:
        error: What ended a command.
        command: The command's name, such as "train".

    Returns:
        A message for the user, or None for errors of another kind.
    """
    text = str(error).strip()
    inner = re.findall(r"^nnunet_confkd\.errors\.(?:InputError|TrainingError): (.*)", text, re.MULTILINE | re.DOTALL)
    if inner:  # from another rank, of which torch passes on the traceback
        return inner[-1]
    advice = f"To use less: {LESS_MEMORY.get(command, '-device cpu uses no GPU, --processes 1 uses fewer processes')}"
    if isinstance(error, MemoryError):
        return f"the memory is exhausted. {advice}"
    if isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY):
        cause = next(line for line in text.splitlines() if any(sign in line for sign in OUT_OF_MEMORY))
        return f"the memory is exhausted ({cause.strip()}). {advice}"
    if isinstance(error, RuntimeError) and re.search(r"ackground workers (died|are no longer alive)", text):
        return ("a process that works on the images has ended. Its error stands above; if there is none, the process "
                f"was killed, most likely because the memory was exhausted. {advice}")
    return None
