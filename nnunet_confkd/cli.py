"""The command `confkd`: one subcommand a tool, each imported only when it is called."""
from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import sys
import traceback
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

from nnunet_confkd import __version__
from nnunet_confkd.errors import InputError, TrainingError
from nnunet_confkd.faults import terminable


def _run(entry_point, name: str, argv: list[str]) -> None:
    """Call an entry point of nnU-Net's as its command would be."""
    before, sys.argv, running = sys.argv, [name, *argv], multiprocessing.active_children()
    try:
        entry_point()
    except BaseException:
        for process in {*multiprocessing.active_children()} - {*running}:
            process.terminate()  # the ranks of a training on several GPUs: Python would wait for their end
        raise
    finally:
        sys.argv = before


def _wants_help(argv: list[str]) -> bool:
    return any(word == "-h" or len(word) > 2 and "--help".startswith(word) for word in argv)


def train(argv: list[str]) -> None:
    from nnunetv2.run.run_training import run_training_entry

    from nnunet_confkd.device import choose_device
    from nnunet_confkd.discovery import make_findable
    from nnunet_confkd.loading import pretrained_for_both_branches
    from nnunet_confkd.nnunet_commands import DEFAULT_TRAINER, check_training, no_leftovers, parser_of, with_options

    name = "nnUNetv2_train"
    make_findable()
    if _wants_help(argv):
        print("confkd train: nnUNetv2_train with the ConfKD trainers in reach.\n"
              f"  -tr                  default: {DEFAULT_TRAINER}\n"
              "  -device              default: cuda where there is one, else cpu\n"
              "  -pretrained_weights  takes stock nnU-Net checkpoints, too\n"
              "All else is nnUNetv2_train's:\n")
        _run(run_training_entry, name, argv)
        return
    args = parser_of(run_training_entry, name).parse_args(argv)
    args.tr = args.tr or DEFAULT_TRAINER
    output = check_training(args)
    argv = with_options(argv, "-tr", args.tr, "-device", choose_device(args.device))
    given = args.pretrained_weights
    with no_leftovers(output), (nullcontext() if given is None else pretrained_for_both_branches(given)) as adapted:
        _run(run_training_entry, name, argv if given is None else with_options(argv, "-pretrained_weights", adapted))


def predict(argv: list[str]) -> None:
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point, predict_entry_point_modelfolder

    from nnunet_confkd.device import choose_device
    from nnunet_confkd.discovery import make_findable
    from nnunet_confkd.json_files import read_description
    from nnunet_confkd.network import BRANCHES, predicting
    from nnunet_confkd.nnunet_commands import (
        DEFAULT_TRAINER,
        check_model,
        name_source,
        parser_of,
        readable_images,
        with_options,
    )

    make_findable()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--branch", choices=BRANCHES, default="student")
    parser.add_argument("--save-entropy", action="store_true")
    own, argv = parser.parse_known_args(argv)
    with_folder = parser_of(predict_entry_point_modelfolder, "nnUNetv2_predict_from_modelfolder")
    for action in with_folder._actions:
        action.required = False
    from_folder = with_folder.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0].m is not None
    entry_point, name = ((predict_entry_point_modelfolder, "nnUNetv2_predict_from_modelfolder") if from_folder
                         else (predict_entry_point, "nnUNetv2_predict"))
    if _wants_help(argv):
        print("confkd predict: nnUNetv2_predict (with -m FOLDER: nnUNetv2_predict_from_modelfolder) with the ConfKD trainers\n"
              "in reach.\n"
              "  --branch {student,teacher,mean}  which branch predicts (default: student; mean: of the logits)\n"
              "  --save-entropy                   also write the entropy of each voxel, and a list of "
              "the cases\n                                   to look at first, to the folder uncertainty of -o\n"
              "  -i                               a folder of images, or an image; with a single channel the names "
              "need\n"
              "                                   no _0000 at their end\n"
              f"  -tr                              default: {DEFAULT_TRAINER}\n"
              "  -device                          default: cuda where there is one, else cpu\n"
              "All else is nnU-Net's:\n")
        _run(entry_point, name, argv)
        return
    args = parser_of(entry_point, name).parse_args(argv)
    if not from_folder:
        args.tr = args.tr or DEFAULT_TRAINER
        argv = with_options(argv, "-tr", args.tr)
    model = check_model(args)
    if own.branch != "student":
        _require_branches(model / f"fold_{args.f[0]}" / args.chk)
    device = choose_device(args.device)
    if own.save_entropy:
        from nnunet_confkd.uncertainty import EntropyPredictor, list_cases, with_names
        entry_point = with_names(entry_point, nnUNetPredictor=EntropyPredictor)
    source, described = Path(args.i), read_description(model / "dataset.json", ("file_ending",))
    with readable_images(source, described) as images, predicting(own.branch):
        _run(entry_point, name, with_options(argv, "-device", device, "-i", str(images)))
    if images != source:
        name_source(Path(args.o), source)
    if own.save_entropy:
        print("look at these cases first:", list_cases(EntropyPredictor.output))


def _require_branches(checkpoint: Path) -> None:
    """Raise InputError where the model has no teacher: --branch would be ignored without a word."""
    from nnunet_confkd.loading import load_checkpoint
    from nnunet_confkd.network import has_teacher

    if not has_teacher(load_checkpoint(checkpoint)["network_weights"]):
        raise InputError(f"{checkpoint}: holds no teacher, so --branch has nothing to choose from")


def export(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="confkd export", description=(
        "Write one branch of a trained ConfKD model as a model of stock nnU-Net, which needs no plugin."))
    parser.add_argument("--model", required=True, metavar="FOLDER",
                        help="the trained model: TRAINER__PLANS__CONFIGURATION under nnUNet_results")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", metavar="FOLDER", help="the folder to write; it must not exist")
    where.add_argument("--install", action="store_true",
                       help="place it under nnUNet_results, as nnUNetTrainer__PLANS__CONFIGURATION with a new plans name")
    parser.add_argument("--branch", choices=("student", "teacher"), default="student")
    args = parser.parse_args(argv)

    from nnunet_confkd.export import export

    print("written:", export(args.model, args.output, args.branch, args.install))


def trainer_dir(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="confkd trainer-dir", description=(
        "Print the folder that the environment variable nnUNet_extTrainer must name, and nothing else."))
    parser.add_argument("--export", action="store_true", help="print the whole line for the shell instead; it keeps what "
                                                              "the variable already holds")
    args = parser.parse_args(argv)

    from nnunet_confkd.discovery import export_line, trainer_dir

    print(export_line() if args.export else trainer_dir())


def convert(argv: list[str]) -> None:
    from importlib import import_module

    from nnunet_confkd.dataset_conversion import CONVERTERS
    from nnunet_confkd.dataset_conversion.writer import PROCESSES, summary

    def converter(name: str):
        return import_module(f"nnunet_confkd.dataset_conversion.{name}")

    if argv and argv[0] == "--list":
        print("\n".join(f"{name:<11}{converter(name).DESCRIPTION}" for name in CONVERTERS))
        return
    parser = argparse.ArgumentParser(prog="confkd convert", description=(
        "Write a public data set in nnU-Net's raw format, checked, with its supervision table and a split. confkd convert NAME "
        "--help tells the options of one; confkd convert --list what each of them reads."))
    parsers = parser.add_subparsers(dest="converter", required=True, metavar="NAME")
    for name in CONVERTERS:
        if argv and argv[0] in CONVERTERS and argv[0] != name:
            continue  # its module need not be imported
        sub = parsers.add_parser(name, help=converter(name).DESCRIPTION, description=converter(name).__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.add_argument("--source", required=True, type=Path, metavar="DIR", help="the data set as published")
        sub.add_argument("--id", required=True, type=int, help="id of the data set to write")
        sub.add_argument("--name", help="its name, Dataset027_NAME")
        sub.add_argument("--processes", type=int, default=PROCESSES)
        sub.add_argument("--link", action="store_true", help="hard links instead of copies of images: no space, but what "
                        "writes to one writes to the other")
        converter(name).add_arguments(sub)
    args = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    function = converter(args.pop("converter")).convert
    print(summary(function(args.pop("source"), args.pop("id"), **args)))


def mix(argv: list[str]) -> None:
    from nnunet_confkd.mix import main

    main(argv)


def weaken(argv: list[str]) -> None:
    from nnunet_confkd.weaken import main

    main(argv)


def complete(argv: list[str]) -> None:
    from nnunet_confkd.complete import main

    main(argv)


def check(argv: list[str]) -> int:
    from nnunet_confkd.check import main

    return main(argv)


def plan(argv: list[str]) -> None:
    from nnunet_confkd.planning import main

    main(argv)


def evaluate(argv: list[str]) -> None:
    from nnunet_confkd.evaluate import main

    main(argv)


def compare(argv: list[str]) -> None:
    from nnunet_confkd.compare import main

    main(argv)


def download(argv: list[str]) -> None:
    from nnunet_confkd.download import main

    main(argv)


def demo(argv: list[str]) -> None:
    from nnunet_confkd.demo import main

    main(argv)


def report(argv: list[str]) -> None:
    from nnunet_confkd.report import main

    main(argv)


COMMANDS = {
    "convert": (convert, "a public data set to nnU-Net's format"),
    "mix": (mix, "folders of full, partial and no labels to one data set"),
    "weaken": (weaken, "a fully labelled data set to a mixed one, for experiments"),
    "check": (check, "what is wrong with a data set, and which case is what"),
    "plan": (plan, "nnUNetv2_plan_and_preprocess that keeps every annotation"),
    "train": (train, "nnUNetv2_train with the ConfKD trainers"),
    "predict": (predict, "nnUNetv2_predict, with a choice of the branch, and entropy"),
    "evaluate": (evaluate, "Dice, surface distances and more of predictions, and of two sets of them paired"),
    "compare": (compare, "trained models side by side"),
    "report": (report, "a page of what a trained model does: figures, cases, calibration, curves"),
    "complete": (complete, "the labels of partly labelled cases, completed by a model"),
    "export": (export, "a trained model as a stock nnU-Net one"),
    "trainer-dir": (trainer_dir, "the folder for nnUNet_extTrainer"),
    "download": (download, "a public data set, for a first try"),
    "demo": (demo, "the main job on generated or given data"),
}


def _wait_without_spinning(argv: list[str]) -> None:
    """Let PyTorch's threads sleep while they wait for each other, if the CPU computes.

    By default they spin, which slows small networks down several times where other processes want the cores, too. OpenMP
    reads the variable when torch is imported. A value that is set already stays.
    """
    if {"cpu", "-device=cpu"} & {*argv} or not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"confkd {__version__} (nnunetv2 {version('nnunetv2')})")
        return 0
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in COMMANDS:
        known = bool(argv) and argv[0] in ("-h", "--help")
        if argv and not known:
            print(f"confkd: there is no command '{argv[0]}'", file=sys.stderr)
        print("usage: confkd COMMAND ...   (confkd COMMAND --help tells more; confkd --version)\n\n"
              + "\n".join(f"  {name:<13}{text}" for name, (_, text) in COMMANDS.items()),
              file=sys.stdout if known else sys.stderr)
        return 0 if known else 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the names of files may be no proper text
    _wait_without_spinning(argv)
    try:
        with terminable():
            return COMMANDS[argv[0]][0](argv[1:]) or 0
    except (InputError, TrainingError) as error:
        print(f"confkd {argv[0]}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        from nnunet_confkd.nnunet_commands import explanation

        if ordinary := explanation(error, argv[0]):
            print(f"confkd {argv[0]}: {ordinary}", file=sys.stderr)
            return 1
        traceback.print_exc()
        print(f"confkd {argv[0]}: an unexpected {type(error).__name__}. Either the program is at fault, or a file is of a form that nobody "
              f"thought of: confkd check examines a data set. Please report the lines above with the command.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
