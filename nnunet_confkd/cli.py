"""The command `confkd`. Each subcommand is imported only when it is called, so that the help appears at once."""
from __future__ import annotations

import io
import os
import sys
import traceback
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from nnunet_confkd import __version__
from nnunet_confkd.errors import InputError, TrainingError
from nnunet_confkd.processes import terminable

COMMANDS = {  # name: (module and function, text of the help)
    "convert": ("dataset_conversion:main", "a public data set to nnU-Net's format"),
    "inspect": ("data.inspection:main", "what folders of images and labels hold, and the mix command that fits"),
    "mix": ("data.mix:main", "folders of full, partial and no labels to one data set"),
    "weaken": ("data.weaken:main", "a fully labelled data set to a mixed one, for experiments"),
    "check": ("data.check:main", "what is wrong with a data set, and which case is what"),
    "plan": ("data.planning:main", "nnUNetv2_plan_and_preprocess that keeps every annotation"),
    "train": ("nnunet_commands:train", "nnUNetv2_train with the ConfKD trainers"),
    "predict": ("report.preview:predict",
                "nnUNetv2_predict, also of DICOM, with a choice of the branch, entropy, and pictures"),
    "evaluate": ("evaluation.evaluate:main",
                 "Dice, surface distances and more of predictions, and of two sets of them paired"),
    "compare": ("evaluation.compare:main", "trained models side by side"),
    "report": ("report.report:main", "a page of what a trained model does: figures, cases, calibration, curves"),
    "complete": ("inference.completion:main", "the labels of partly labelled cases, completed by a model"),
    "export": ("inference.export:main", "a trained model as a stock nnU-Net one"),
    "trainer-dir": ("discovery:main", "the folder for nnUNet_extTrainer"),
    "download": ("data.download:main", "a public data set, for a first try"),
    "demo": ("demo.demo:main", "the main job on generated or given data"),
}
USAGE = ("usage: confkd COMMAND ...   (confkd COMMAND --help tells more; confkd --version)\n\n"
         + "\n".join(f"  {name:<13}{text}" for name, (_, text) in COMMANDS.items()))


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


def _wait_without_spinning(argv: list[str]) -> None:
    """Let PyTorch's threads sleep while they wait for each other, if the network runs on the CPU.

    By default they spin, which slows small networks down several times if other processes use the cores, too. OpenMP
    reads the variable when torch is imported. A value that the user has set stays.
    """
    if {"cpu", "-device=cpu"} & {*argv} or not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments. None: those of the process.

    Returns:
        The exit code: 0, or 1 after an error, or 2 if there is no such command.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"confkd {__version__} (nnunetv2 {version('nnunetv2')})")
        return 0
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if not argv or argv[0] not in COMMANDS:
        unknown = f"confkd: there is no command '{argv[0]}'\n" if argv else ""
        print(unknown + USAGE, file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold bytes that are no text
    _wait_without_spinning(argv)
    try:
        with terminable():
            return run(argv[0], argv[1:])
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
