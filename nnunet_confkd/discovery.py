"""How nnU-Net finds the trainers: the environment variable nnUNet_extTrainer."""
from __future__ import annotations

import argparse
import os
from importlib.resources import files
from pathlib import Path

VARIABLE = "nnUNet_extTrainer"


def trainer_dir() -> Path:
    """The folder that nnUNet_extTrainer must name.

    Asked of the package itself: in an editable install it does not lie under nnunet_confkd's folder.
    """
    return Path(str(files("nnunet_confkd.trainers").joinpath("confkd_trainers.py"))).parent


def export_line() -> str:
    """The shell line that makes nnU-Net's own commands find the trainers, and keeps what the variable holds."""
    return f'export {VARIABLE}="{trainer_dir()}${{{VARIABLE}:+{os.pathsep}${VARIABLE}}}"'


def make_findable() -> None:
    """Add the folder to nnUNet_extTrainer, for this process and those that it starts."""
    held = [entry for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry]
    if str(trainer_dir()) not in held:
        os.environ[VARIABLE] = os.pathsep.join([*held, str(trainer_dir())])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="confkd trainer-dir", description=(
        "Print the folder that the environment variable nnUNet_extTrainer must name, and nothing else."))
    parser.add_argument("--export", action="store_true", help="print the whole line for the shell instead; it keeps what "
                                                              "the variable already holds")
    args = parser.parse_args(argv)

    print(export_line() if args.export else trainer_dir())
