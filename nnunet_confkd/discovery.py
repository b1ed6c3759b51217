"""How nnU-Net finds the trainers: the environment variable nnUNet_extTrainer."""
from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from nnunet_confkd.arguments import Parser

VARIABLE = "nnUNet_extTrainer"


def trainer_dir() -> Path:
    """Return the folder that nnUNet_extTrainer must name.

    In an editable install it does not lie under the folder of nnunet_confkd, so the import system is asked for it.

    Examples:
        >>> sorted(file.name for file in trainer_dir().glob("confkd*.py"))
        ['confkd_trainers.py']
    """
    return Path(str(files("nnunet_confkd.trainers").joinpath("confkd_trainers.py"))).parent


def export_line() -> str:
    """Return the shell line that makes nnU-Net's own commands find the trainers. It keeps the variable's value.

    Examples:
        >>> export_line().startswith("export nnUNet_extTrainer=")
        True
    """
    return f'export {VARIABLE}="{trainer_dir()}${{{VARIABLE}:+{os.pathsep}${VARIABLE}}}"'


def make_findable() -> None:
    """Add the folder to nnUNet_extTrainer, for this process and the processes that it starts.

    Examples:
        >>> make_findable()  # doctest: +SKIP
    """
    folders = [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    if str(trainer_dir()) not in folders:
        os.environ[VARIABLE] = os.pathsep.join([*folders, str(trainer_dir())])


def main(argv: list[str]) -> None:
    """Run `confkd trainer-dir`."""
    parser = Parser(prog="confkd trainer-dir", description=(
        "Print the folder that the environment variable nnUNet_extTrainer must name, and nothing else."))
    parser.add_argument("--export", action="store_true",
                        help="print the whole line for the shell instead; it keeps what the variable already holds")
    args = parser.parse_args(argv)

    print(export_line() if args.export else trainer_dir())
