"""The size of the package's functions, and that no two places of it share ten or more lines of the same shape."""
from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREES = {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
         for folder in ("nnunet_confkd", "trainers", "dataset_conversion")
         for file in sorted((ROOT / folder).rglob("*.py"))}
MOST_LINES, MOST_PARAMETERS, SHARED_LINES = 60, 8, 10
OPTIONS = "the options of its command, one each"
ALLOWED_SIZES = {
    "nnunet_confkd/data/mix.py: mixture": OPTIONS,
    "nnunet_confkd/data/planning.py: plan": "nnU-Net's signature",
    "nnunet_confkd/data/weak_labels.py: weaken": OPTIONS,
    "nnunet_confkd/data/weak_labels.py: _check": OPTIONS,
    "nnunet_confkd/data/weaken.py: weaken_dataset": OPTIONS,
    "nnunet_confkd/demo/demo.py: run": "the six steps of the demo, one after the other",
    "nnunet_confkd/demo/synthetic.py: _draw": "not split yet",
    "nnunet_confkd/demo/synthetic.py: generate_dataset": OPTIONS,
    "nnunet_confkd/evaluation/evaluate.py: evaluate_folders": OPTIONS,
    "dataset_conversion/acdc.py: convert": OPTIONS,
}
ALLOWED_REPETITIONS: dict[str, str] = {}


def oversized(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The (name, sizes) of each function that is too long or has too many parameters; `self` is none."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            names = [word.arg for word in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            number = len(names) - (names[:1] in (["self"], ["cls"]))
            if lines > MOST_LINES or number > MOST_PARAMETERS:
                yield node.name, f"{lines} lines, {number} parameters"


def shape(node: ast.AST) -> tuple:
    """A statement without its names, its literals and the statements in it."""
    return type(node).__name__, *(shape(child) for child in ast.iter_child_nodes(node)
                                  if not isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)))


def lines_of(tree: ast.AST) -> Iterator[tuple[int, tuple]]:
    """The (number, shape) of each line, without imports and docstrings."""
    for node in ast.iter_child_nodes(tree):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not text and not isinstance(node, (ast.Import, ast.ImportFrom)):
            body = getattr(node, "body", None)
            end = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
            yield from ((number, (shape(node), number - node.lineno)) for number in range(node.lineno, end + 1))
        yield from lines_of(node)


def repetitions(trees: dict[str, ast.AST]) -> list[list[tuple[str, int]]]:
    """Lists of the (file, line) where the same shapes begin."""
    windows = defaultdict(list)
    for file, tree in trees.items():
        lines = list(lines_of(tree))
        for start in range(len(lines) - SHARED_LINES + 1):
            window = lines[start:start + SHARED_LINES]
            places = windows[tuple(line for _, line in window)]
            if not places or places[-1][0] != file or window[0][0] > places[-1][2]:  # it does not overlap with itself
                places.append((file, window[0][0], window[-1][0]))
    return [[place[:2] for place in places] for places in windows.values() if len(places) > 1]


def test_functions_are_short_and_their_signatures_too():
    found = {f"{file}: {name}": sizes for file, tree in TREES.items() for name, sizes in oversized(tree)}
    too_large = {name: sizes for name, sizes in found.items() if name not in ALLOWED_SIZES}
    assert not too_large, f"split these, or give a reason in ALLOWED_SIZES: {too_large}"
    assert not set(ALLOWED_SIZES) - set(found), "ALLOWED_SIZES has entries that are no longer needed"


def test_no_two_places_share_ten_lines_of_the_same_shape():
    found = repetitions(TREES)
    new = [places for places in found if not {file for file, _ in places} <= set(ALLOWED_REPETITIONS)]
    assert not new, f"these lines begin ten lines of the same shape: {new}"
    repeated = {file for places in found for file, _ in places}
    assert not set(ALLOWED_REPETITIONS) - repeated, "ALLOWED_REPETITIONS has entries that are no longer needed"


@pytest.mark.parametrize("lines, parameters, expected", [(60, 8, 0), (61, 1, 1), (2, 9, 1)])
def test_a_large_function_is_noticed(lines, parameters, expected):
    source = f"def f({', '.join(f'a{i}' for i in range(parameters))}):\n" + "    x = 1\n" * (lines - 1)
    method = "class C:\n    " + source.replace("f(", "f(self, ").replace("\n", "\n    ")
    for code in (source, method):
        assert len(list(oversized(ast.parse(code)))) == expected


def test_lines_of_the_same_shape_are_noticed_whatever_their_names():
    first = "".join(f"def f{i}(a):\n    return a + {i}\n" for i in range(5))
    second = first.replace("def f", "def g").replace("a +", "b +")
    assert repetitions({"one": ast.parse(first), "two": ast.parse(second)}) == [[("one", 1), ("two", 1)]]
    assert not repetitions({"one": ast.parse(first), "two": ast.parse(second.replace("+ 3", "- 3"))})
    assert not repetitions({"one": ast.parse("call(1)\n" * 19)}), "a window does not overlap with itself"
