"""The package's code must not execute what files or users wrote. test_fuzz.py gives it hostile files."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(file for folder in ("nnunet_confkd", "trainers", "dataset_conversion")
               for file in (ROOT / folder).rglob("*.py"))
TRUSTED = {
    # The trainer reads back what nnU-Net has just written for it, to add to it.
    "trainer.py: torch.load(aside, weights_only=False)",
    # The parsers of nnU-Net, from the installed package, without importing torch for the help.
    "nnunet_commands.py: exec(compile(ast.Module([*helpers, *lines], []), module, 'exec'), names)",
    "nnunet_commands.py: compile(ast.Module([*helpers, *lines], []), module, 'exec')"}
FORBIDDEN_IMPORTS = {"load", "loads", "system", "popen", "Unpickler", "getoutput", "getstatusoutput"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
                   "subprocess.getstatusoutput", "yaml.load", "tempfile.mktemp"}
FORBIDDEN_MODULES = {"pickle", "dill", "joblib", "marshal", "shelve"}
DANGEROUS = ("torch", "numpy", "os", "subprocess", "pickle", "marshal", "yaml")


def calls(file: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def test_there_is_something_to_look_at():
    assert len(FILES) > 40 and sum(len(calls(file)) for file in FILES) > 1000


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_nothing_is_executed_that_a_file_or_a_user_wrote(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    forbidden = [name.name for node in ast.walk(tree)
                 if isinstance(node, ast.ImportFrom) and node.module in DANGEROUS
                 for name in node.names if name.name in FORBIDDEN_IMPORTS]
    for call in calls(file):
        function, text = ast.unparse(call.func), ast.unparse(call)
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if f"{file.name}: {text}" in TRUSTED:
            continue
        unsafe_load = function == "torch.load" and keywords.get("weights_only") != "True"
        if (function in FORBIDDEN_CALLS or function.split(".")[0] in FORBIDDEN_MODULES
                or function.endswith("load_pickle") or unsafe_load
                or keywords.get("shell", "False") != "False" or keywords.get("allow_pickle", "False") != "False"
                or function.endswith((".extractall", ".extract")) and "filter" not in keywords):
            forbidden.append(text)
    assert not forbidden
