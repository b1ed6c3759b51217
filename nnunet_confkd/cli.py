"""The command `confkd`. Each subcommand is imported only when it is called, so that the help appears at once."""
from __future__ import annotations

import io
import os
import re
import sys
import traceback
import warnings
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from nnunet_confkd import __version__
from nnunet_confkd.device import prepare_for_cpu
from nnunet_confkd.errors import InputError, TrainingError, did_you_mean
from nnunet_confkd.output import NobodyReads, explained_output
from nnunet_confkd.processes import terminable

COMMANDS = {  # name: (module and function, text of the help, an example), in order of work
    "inspect": ("data.inspection:main", "what folders of images and labels hold, and the mix command that fits",
                "confkd inspect IMAGES MASKS SCRIBBLES"),
    "mix": ("data.mix:main", "folders of full, partial and no labels to one data set",
            "confkd mix --images IMAGES --full-labels MASKS --partial-labels SCRIBBLES --labels background liver "
            "--ignore-value 0 --background-value 2 --id 27"),
    "convert": ("dataset_conversion:main", "a public data set to nnU-Net's format",
                "confkd convert acdc --source ACDC --id 27"),
    "download": ("data.download:main", "a public data set, for a first try", "confkd download hippocampus"),
    "check": ("data.check:main", "what is wrong with a data set, and which case is what", "confkd check -d 27"),
    "run": ("commands.run:main", "all of mix, check, plan, train, predict and report, which can be interrupted",
            "confkd run --images IMAGES --full-labels MASKS --partial-labels SCRIBBLES --labels background liver "
            "--ignore-value 0 --background-value 2 --test NEW_IMAGES --output RESULTS"),
    "plan": ("commands.plan:main", "nnUNetv2_plan_and_preprocess that keeps every annotation",
             "confkd plan -d 27 -c 3d_fullres"),
    "train": ("nnunet_commands:train", "nnUNetv2_train with the ConfKD trainers", "confkd train 27 3d_fullres 0"),
    "trainer-dir": ("discovery:main", "the folder for nnUNet_extTrainer", "confkd trainer-dir"),
    "predict": ("report.preview:predict",
                "nnUNetv2_predict, also of DICOM, with a choice of the branch, entropy, and pictures",
                "confkd predict -d 27 -i IMAGES -o PREDICTIONS -c 3d_fullres -f 0"),
    "evaluate": ("evaluation.evaluate:main",
                 "Dice, surface distances and more of predictions, and of two sets of them paired",
                 "confkd evaluate --truth LABELS --prediction PREDICTIONS -d 27"),
    "report": ("commands.report:main", "a page of what a trained model does: figures, cases, calibration, curves",
               "confkd report --model MODEL"),
    "complete": ("commands.complete:main", "the labels of partly labelled cases, completed by a model or a watershed",
                 "confkd complete -d 27 --model MODEL --id 127"),
    "export": ("commands.export:main", "a trained model as a stock nnU-Net one",
               "confkd export --model MODEL --output STOCK_MODEL"),
    "compare": ("commands.compare:main", "trained models side by side", "confkd compare MODEL OTHER_MODEL"),
    "weaken": ("data.weaken:main", "a fully annotated data set to a mixed one, for experiments",
               "confkd weaken --source 4 --id 104 --full 5 --style scribbles"),
    "demo": ("demo.demo:main", "the main job on generated or given data", "confkd demo"),
}
GROUPS = {  # title: the first of its commands
    "your data": "inspect", "train": "plan", "use": "predict", "experiments": "compare"}


def usage() -> str:
    """Return the help of `confkd`, with the commands in groups."""
    lines, titles = [], {first: title for title, first in GROUPS.items()}
    for name, (_, text, _) in COMMANDS.items():
        if name in titles:
            lines += ["", f"{titles[name]}:"]
        lines.append(f"  {name:<13}{text}")
    return "usage: confkd COMMAND ...   (confkd COMMAND --help tells more; confkd --version)\n" + "\n".join(lines)


def versions() -> str:
    """Return the versions of what matters, without importing it, which would take seconds."""
    spec = find_spec("torch")
    source = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8") if spec and spec.origin else ""
    found = re.search(r"^cuda\b.*= ['\"]([\d.]+)['\"]", source, re.MULTILINE)
    cuda = f"built for CUDA {found[1]}" if found else "built without CUDA"
    return f"confkd {__version__}\nnnunetv2 {version('nnunetv2')}\ntorch {version('torch')} ({cuda})"


def example(argv: list[str]) -> str:
    """Return the example that the help of a command begins with.

    Args:
        argv: The arguments, which begin with the name of a command.
    """
    command, *more = argv
    if command == "convert" and more[0] in import_module("nnunet_confkd.dataset_conversion").CONVERTERS:
        return f"confkd convert {more[0]} --source {more[0].upper()} --id 27"
    return COMMANDS[command][2]


def run(command: str, argv: list[str]) -> int:
    """Run a subcommand.

    Args:
        command: Its name.
        argv: Its arguments.

    Returns:
        The exit code.
    """
    module, function = COMMANDS[command][0].split(":")
    return getattr(import_module(f"nnunet_confkd.{module}"), function)(argv) or 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments. None: those of the process.

    Returns:
        The exit code: 0, or 1 after an error, or 2 if there is no such command.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(versions())
        return 0
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not argv or argv[0] not in COMMANDS:
        unknown = f"confkd: there is no command '{argv[0]}'{did_you_mean(argv[0], COMMANDS)}\n" if argv else ""
        print(unknown + usage(), file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold bytes that are no text
    prepare_for_cpu(argv)
    warnings.filterwarnings("ignore", "`torch.jit.* is deprecated", FutureWarning)  # of torch, about torch
    try:
        with terminable(), explained_output():
            if {"-h", "--help"} & set(argv[1:]):
                print(f"example: {example(argv)}\n")
            return run(argv[0], argv[1:])
    except NobodyReads:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return 1
    except (InputError, TrainingError) as error:
        print(f"confkd {argv[0]}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        from nnunet_confkd.nnunet_commands import explanation

        if ordinary := explanation(error, argv[0]):
            print(f"confkd {argv[0]}: {ordinary}", file=sys.stderr)
            return 1
        traceback.print_exc()
        print(f"confkd {argv[0]}: an unexpected {type(error).__name__}. Either the program is at fault, or a file is "
              f"of a form that nobody thought of: confkd check examines a data set. Please report the lines above with "
              f"the command.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
