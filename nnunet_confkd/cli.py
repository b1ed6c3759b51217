"""The command `confkd`. Each subcommand is imported only when it is called, so that the help appears at once."""
from __future__ import annotations

import io
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
from nnunet_confkd.errors import InputError, TrainingError
from nnunet_confkd.output import explained_output
from nnunet_confkd.processes import terminable

COMMANDS = {  # name: (module and function, text of the help), in order of work
    "inspect": ("data.inspection:main", "what folders of images and labels hold, and the mix command that fits"),
    "mix": ("data.mix:main", "folders of full, partial and no labels to one data set"),
    "convert": ("dataset_conversion:main", "a public data set to nnU-Net's format"),
    "download": ("data.download:main", "a public data set, for a first try"),
    "check": ("data.check:main", "what is wrong with a data set, and which case is what"),
    "run": ("commands.run:main", "all of mix, check, plan, train, predict and report, which can be interrupted"),
    "plan": ("commands.plan:main", "nnUNetv2_plan_and_preprocess that keeps every annotation"),
    "train": ("nnunet_commands:train", "nnUNetv2_train with the ConfKD trainers"),
    "trainer-dir": ("discovery:main", "the folder for nnUNet_extTrainer"),
    "predict": ("report.preview:predict",
                "nnUNetv2_predict, also of DICOM, with a choice of the branch, entropy, and pictures"),
    "evaluate": ("evaluation.evaluate:main",
                 "Dice, surface distances and more of predictions, and of two sets of them paired"),
    "report": ("commands.report:main", "a page of what a trained model does: figures, cases, calibration, curves"),
    "complete": ("commands.complete:main", "the labels of partly labelled cases, completed by a model"),
    "export": ("commands.export:main", "a trained model as a stock nnU-Net one"),
    "compare": ("commands.compare:main", "trained models side by side"),
    "weaken": ("data.weaken:main", "a fully labelled data set to a mixed one, for experiments"),
    "demo": ("demo.demo:main", "the main job on generated or given data"),
}
GROUPS = {  # title: the first of its commands
    "your data": "inspect", "train": "plan", "use": "predict", "experiments": "compare"}


def usage() -> str:
    """Return the help of `confkd`, with the commands in groups."""
    lines, titles = [], {first: title for title, first in GROUPS.items()}
    for name, (_, text) in COMMANDS.items():
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
        unknown = f"confkd: there is no command '{argv[0]}'\n" if argv else ""
        print(unknown + usage(), file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold bytes that are no text
    prepare_for_cpu(argv)
    warnings.filterwarnings("ignore", "`torch.jit.* is deprecated", FutureWarning)  # of torch, about torch
    try:
        with terminable(), explained_output():
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
