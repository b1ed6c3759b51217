"""The documentation's commands and links. Each command is run by a test, or the page says `<!-- not run: why -->` before its block;
what is written with other arguments than the test's must still be understood by the program."""
from __future__ import annotations

import argparse
import re
import shlex
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from nnunet_confkd import __version__, cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# command: the test that runs it, and how
RUN_BY = {
    "confkd check": ("test_check.py", '"check"'),
    "confkd compare": ("test_compare.py", '"compare"'),
    "confkd complete": ("test_complete.py", '"complete"'),
    "confkd convert": ("test_convert_acdc.py", '"convert"'),
    "confkd download": ("test_download.py", '"download"'),
    "confkd evaluate": ("test_evaluate.py", '"evaluate"'),
    "confkd export": ("test_export.py", '"export"'),
    "confkd mix": ("test_mix.py", '"mix"'),
    "confkd plan": ("test_planning.py", "main("),
    "confkd predict": ("test_export.py", '"predict"'),
    "confkd report": ("test_report.py", '"report"'),
    "confkd weaken": ("test_fuzz.py", '"weaken"'),
    "nnUNetv2_train": ("test_scaling.py", "train.sbatch"),  # `confkd train`, which is nnU-Net's entry point
    "nnUNetv2_predict_from_modelfolder": ("test_export.py", "predict_entry_point_modelfolder"),
    "nnUNetv2_predict": ("test_real_data.py", 'cli.main(["predict"'),  # `confkd predict`, likewise
    "sbatch": ("test_scaling.py", ".sbatch"),
    "python -m build": ("test_packaging.py", '"wheel"'),
}
# of the shell; or what makes all others possible
PLAIN = ("export ", "mkdir ", "cd ", "make demo", "make test", "pip install .", "tar tzf", "unzip -l", "seq ", "for ", "printf ", "done")


def blocks(page: Path) -> list[tuple[str, list[str]]]:
    """(the line before, commands) of each block of shell commands."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^( *)```(?:bash|sh|console)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        before = text[:match.start()].rstrip().rsplit("\n", 1)[-1].strip()
        lines = re.sub(r"\\\n\s*", "", match[2]).splitlines()
        found.append((before, [line.split("  #")[0].split(" # ")[0].strip() for line in lines if line.strip() and not line.strip().startswith("#")]))
    return found


COMMANDS = [(page, command) for page in PAGES for before, lines in blocks(page) if not before.startswith("<!-- not run")
            for command in lines if not command.startswith(PLAIN)]


def test_there_are_commands():
    assert len(COMMANDS) > 30 and {page.name for page, _ in COMMANDS} >= {"README.md", "tutorial.md", "data.md"}


@pytest.mark.parametrize("page, command", COMMANDS, ids=lambda value: value.name if isinstance(value, Path) else value[:50])
def test_each_command_is_run_by_a_test(page, command):
    words = " ".join(command.split()[:3])
    name = next((name for name in sorted(RUN_BY, key=len, reverse=True) if words.startswith(name)), None)
    assert name, f"{page.name}: {command}: name a test in RUN_BY, or write <!-- not run: why --> before its block"
    file, how = RUN_BY[name]
    assert how in (ROOT / "tests" / file).read_text(encoding="utf-8")


class Understood(Exception):
    pass


OURS = sorted({command for _, command in COMMANDS if command.startswith(("confkd ", "nnUNetv2_")) and "..." not in command
               and "--list" not in command})


@pytest.mark.parametrize("command", OURS)
def test_each_command_is_understood(command, monkeypatch, capsys):
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Understood
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    program, *arguments = shlex.split(command)
    with pytest.raises(Understood):  # SystemExit: argparse refused them; its reason is in the output
        if program == "confkd":
            cli.COMMANDS[arguments[0]][0](arguments[1:])
        else:
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            next(e for e in entry_points(group="console_scripts") if e.name == program).load()()


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        if not other.exists() or anchor and anchor not in anchors(other):
            broken.append(target)
    assert not broken


def test_the_reference_has_every_command_and_the_navigation_every_page():
    commands = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- help: (\S+) -->", commands) == list(cli.COMMANDS)
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) == {
        str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}


def test_the_citation_is_of_this_version():
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
