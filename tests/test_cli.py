"""The command `confkd`: what it must not import, and how long it may take to answer."""
from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from nnunet_confkd import __version__, cli

SLOW_IMPORTS = ("torch", "numpy", "SimpleITK", "nnunetv2", "matplotlib")


def imported_by(argv: list[str], names) -> list[str]:
    """Those of the modules that a command has imported at its end."""
    code = f"import sys\nfrom nnunet_confkd import cli\ntry:\n    cli.main({argv})\nexcept SystemExit as end:\n" \
           f"    assert not end.code\nprint()\nprint([name for name in {names} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return ast.literal_eval(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["trainer-dir"], ["trainer-dir", "--export"], []],
                         ids=lambda argv: " ".join(argv) or "none")
def test_short_answers_import_nothing_that_takes_time(argv):
    """This keeps them within half a second, and unlike a measurement it does not depend on the machine."""
    assert imported_by(argv, SLOW_IMPORTS) == []


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_of_a_command_imports_nothing_that_takes_time(command):
    slow = "torch", "SimpleITK", "scipy.ndimage", "matplotlib.pyplot", "skimage.measure"
    assert imported_by([command, "--help"], slow) == []


@pytest.mark.parametrize("argv", [["report", "--model", "nowhere"], ["export", "--model", "nowhere", "--output", "x"],
                                  ["complete", "-d", "1", "--id", "2", "--model", "nowhere"], ["compare", "nowhere"]],
                         ids=lambda argv: argv[0])
def test_a_path_that_is_no_model_is_told_before_torch_is_imported(argv):
    assert imported_by(argv, ("torch",)) == []


@pytest.mark.parametrize("command", ["mix", "train"])
def test_a_reader_who_has_gone_is_no_error_of_the_program(command):
    """As in `confkd train --help | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, "-m", "nnunet_confkd.cli", command, "--help"], stdout=writer,
                            stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_the_versions_are_those_that_are_installed():
    torch_version = subprocess.run([sys.executable, "-c", "import torch; print(torch.__version__, torch.version.cuda)"],
                                   capture_output=True, text=True, check=True).stdout.split()
    lines = cli.versions().splitlines()
    assert lines[:2] == [f"confkd {__version__}", f"nnunetv2 {version('nnunetv2')}"]
    cuda = "built without CUDA" if torch_version[1] == "None" else f"built for CUDA {torch_version[1]}"
    assert lines[2] == f"torch {torch_version[0].partition('+')[0]} ({cuda})" and len(lines) == 3


def test_the_commands_are_grouped_in_order_of_work():
    usage = cli.usage()
    order = ["your data:", "  mix ", "  check ", "train:", "  plan ", "  train ", "use:", "  predict ", "  report ",
             "experiments:", "  weaken "]
    places = [usage.index(f"\n{text}") for text in order]
    assert places == sorted(places) and set(cli.GROUPS.values()) <= set(cli.COMMANDS)


def test_every_command_is_in_the_usage_and_can_be_imported(capsys):
    assert cli.main([]) == 2 and cli.main(["explode"]) == 2
    out, err = capsys.readouterr()
    assert not out and "there is no command 'explode'" in err
    assert cli.main(["chek"]) == 2 and "no command 'chek' (did you mean 'check'?)" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    for name, (target, text, _) in cli.COMMANDS.items():
        module, function = target.split(":")
        assert f"  {name} " in usage and text in usage
        assert callable(getattr(__import__(f"nnunet_confkd.{module}", fromlist=[function]), function))
