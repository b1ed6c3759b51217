"""The command `confkd`: what it must not import, and how long it may take to answer."""
from __future__ import annotations

import subprocess
import sys

import pytest

from nnunet_confkd import cli

SLOW_IMPORTS = ("torch", "numpy", "SimpleITK", "nnunetv2", "matplotlib")


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["trainer-dir"], ["trainer-dir", "--export"], []],
                         ids=lambda argv: " ".join(argv) or "none")
def test_short_answers_import_nothing_that_takes_time(argv):
    """This keeps them within half a second, and unlike a measurement it does not depend on the machine."""
    code = f"import sys; from nnunet_confkd import cli; cli.main({argv}); " \
           f"print([name for name in {SLOW_IMPORTS} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr


def test_every_command_is_in_the_usage_and_can_be_imported(capsys):
    assert cli.main([]) == 2 and cli.main(["explode"]) == 2
    out, err = capsys.readouterr()
    assert not out and "there is no command 'explode'" in err
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    for name, (target, text) in cli.COMMANDS.items():
        module, function = target.split(":")
        assert f"  {name} " in usage and text in usage
        assert callable(getattr(__import__(f"nnunet_confkd.{module}", fromlist=[function]), function))
