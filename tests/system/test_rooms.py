"""Each room of the package imports only the rooms below it, and nobody uses what is private to another module.

import-linter cannot do this here: two of the packages lie beside `nnunet_confkd`, not in it (setup.py).
"""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"nnunet_confkd": ROOT / "nnunet_confkd", "nnunet_confkd.trainers": ROOT / "trainers",
           "nnunet_confkd.dataset_conversion": ROOT / "dataset_conversion"}
# From top to bottom. A room may import the rooms below it. Rooms in the same braces do not know each other.
ORDER = [{"cli"}, {"demo", "commands"}, {"report"}, {"evaluation", "nnunet_commands"}, {"inference"},
         {"trainers"}, {"training"}, {"dataset_conversion"}, {"data"},
         {"colours", "device", "discovery", "files", "output", "processes"}, {"arguments"}, {"errors"},
         {""}]
# Within `training`, the parts of the method do not know the trainer.
PARTS = ("losses", "network", "hints", "hint_patterns", "hint_places", "settings", "batches", "recovery", "curves",
         "checks", "pseudo_dice", "ranks", "record", "candidate_hints")


def modules() -> dict[str, ast.Module]:
    """{dotted name: tree} of the whole package."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def imported(tree: ast.Module) -> list[tuple[str, str]]:
    """The (module, name) of all imports of the package, also within functions; the name is "" in `import MODULE`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] == "nnunet_confkd"]


def room(module: str) -> str:
    return (module.split(".") + [""])[1]


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(ORDER) if name in rooms)


MODULES = modules()


def whole_name(module: str, name: str) -> str:
    """The module that `from MODULE import NAME` imports from."""
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def wrong_imports(module: str, tree: ast.Module) -> list[str]:
    wrong = []
    for source, name in imported(tree):
        source, own = whole_name(source, name), room(module)
        other = room(source)
        if own != other and floor(other) <= floor(own):
            wrong.append(f"{module} must not import {source}: {other} is not below {own}")
        of_the_method = room(module) == "training" and module.split(".")[-1] in PARTS
        if of_the_method and source.endswith((".trainer", ".variants", ".validation")):
            wrong.append(f"{module} must not import {source}")
        if name.startswith("_") and name != "__version__":
            wrong.append(f"{module} imports {name}, which is private to {source}")
    return wrong


@pytest.mark.parametrize("module", MODULES)
def test_a_room_knows_only_the_rooms_below_it(module):
    assert wrong_imports(module, MODULES[module]) == []


@pytest.mark.parametrize("code, number", [
    ("from nnunet_confkd.report.page import page", 1), ("from nnunet_confkd import cli", 1),
    ("import nnunet_confkd.demo.demo", 1), ("def f():\n    from nnunet_confkd.evaluation.metrics import MEASURES", 1),
    ("from nnunet_confkd.data.folders import _claim", 1), ("from nnunet_confkd.data.folders import find_dataset", 0),
    ("from nnunet_confkd import __version__", 0), ("import numpy", 0)])
def test_wrong_imports_are_noticed(code, number):
    assert len(wrong_imports("nnunet_confkd.inference.export", ast.parse(code))) == number


def test_the_parts_of_the_method_do_not_know_the_trainer():
    code = ast.parse("from nnunet_confkd.training.trainer import ConfKDTrainer")
    assert wrong_imports("nnunet_confkd.training.losses", code)


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: {whole_name(*pair) for pair in imported(tree)} - {name} for name, tree in MODULES.items()}
    for start in graph:
        seen, to_visit = set(), set(graph[start])
        while to_visit:
            seen |= (there := to_visit)
            to_visit = set().union(*(graph.get(name, set()) for name in there)) - seen
        assert start not in seen, f"{start} imports itself by way of others"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("nnunet_confkd.")])
def test_nobody_uses_private_names_of_an_imported_module(module):
    tree = MODULES[module]
    names = {name for source, name in imported(tree) if f"{source}.{name}" in MODULES}
    used = {f"{node.value.id}.{node.attr}" for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            and node.value.id in names and node.attr.startswith("_")}
    assert not used
