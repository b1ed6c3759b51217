"""What docs/reference/api.md lists exists, and its docstrings hold examples that do what they say."""
from __future__ import annotations

import ast
import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "api.md"
LISTED = re.findall(r"^::: (nnunet_confkd\.[\w.]+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples_of(listed: str) -> tuple[dict, list[doctest.Example]]:
    """The names that the examples of an object can use, those of its module, and the examples."""
    module, _, name = listed.rpartition(".")
    names = vars(import_module(module))
    return dict(names), doctest.DocTestParser().get_examples(names[name].__doc__ or "")


@pytest.mark.parametrize("listed", LISTED)
def test_the_example_of_what_the_reference_lists_is_right(listed):
    names, examples = examples_of(listed)
    assert examples, "its docstring has no example"
    test = doctest.DocTest(examples, names, listed, None, None, None)
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not result.failed, "".join(said)


def test_every_example_of_the_package_is_listed_and_so_run():
    root = PAGE.parents[2]
    found = []
    for file in sorted((root / "nnunet_confkd").rglob("*.py")):
        module = ".".join(file.relative_to(root).with_suffix("").parts)
        found += [f"{module}.{node.name}" for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                  if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ">>>" in (ast.get_docstring(node) or "")]
    assert sorted(found) == sorted(LISTED)


def test_most_examples_are_run():
    skipped = [listed for listed in LISTED if doctest.SKIP in examples_of(listed)[1][0].options]
    assert len(skipped) < 0.3 * len(LISTED), skipped
