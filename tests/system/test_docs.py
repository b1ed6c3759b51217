"""The documentation is true: its commands parse and are run by tests, its links lead somewhere, and the generated
reference is that of the code. A release holds what it should."""
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest
from nnunet_confkd.dataset_conversion import CONVERTERS
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

import nnunet_confkd
from nnunet_confkd import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial" / "first_model.md"

# Which test runs a command of the documentation. It does so with other paths, ids and lengths, and mostly in its own
# process. A command that fits no entry must stand under a mark "not run" (see is_marked).
RUN_BY = {
    r"make test": ".ci/run",
    r"make demo": "system/test_docs.py::test_make_would_install_and_run_the_demo",  # a dry run of the next line
    r"confkd demo": "demo/test_demo.py::test_the_whole_demo_in_short_ends_with_the_figures_and_the_paths",
    # pip wheel
    r"pip install \.": "system/test_packaging.py::test_the_wheel_holds_one_top_level_name_and_its_trainers_are_found",
    r"export nnUNet_extTrainer=.*": "system/test_docs.py::test_the_line_for_the_shell_keeps_what_the_variable_holds",
    r"(mkdir -p raw .*|export nnUNet_raw=.*)": "system/test_docs.py::test_the_tutorial_up_to_the_training",
    r"confkd --help": "system/test_packaging.py::test_unknown_commands_and_help",
    r"confkd convert --list": "system/test_docs.py::test_the_list_of_converters",
    r"confkd convert acdc .*": "dataset_conversion/test_acdc.py::test_the_command_converts",
    r"confkd convert msd .*": "dataset_conversion/test_msd.py::test_the_command_converts_and_names_what_is_wrong",
    # from the test's own server
    r"confkd download hippocampus": "data/test_download.py::test_the_command_tells_what_comes_next",
    r"confkd inspect .*": "system/test_own_data.py::test_masks_and_scribbles_whose_zero_is_not_annotated",
    r"confkd mix --source .*":
        "data/test_class_sources.py::test_the_command_shows_what_it_would_do_writes_and_overwrites",
    r"confkd mix .*": "data/test_mix.py::test_the_command_says_what_it_wrote",
    r"confkd weaken .*": "data/test_weaken.py::test_the_command",
    r"confkd check .*": "data/test_check.py::test_acdc_with_scribbles_is_right_and_counted_as_in_the_source",
    r"confkd plan .*": "data/test_planning.py::test_every_point_survives_preprocessing_and_is_found_by_patch_sampling",
    r"confkd run .*": "system/test_walks.py::test_the_whole_run_on_a_laptop_interrupted_twice",
    r"confkd train .* --quick":
        "test_nnunet_commands.py::test_quick_trains_under_a_name_of_its_own_which_nnunet_predicts_with",
    # its function determine_postprocessing
    r"nnUNetv2_determine_postprocessing .*": "system/test_dicom_walk.py::test_post_processing_is_applied_on_request",
    r"confkd train .*":
        "system/test_scaling.py::test_a_task_of_the_array_trains_its_line_and_goes_on_when_submitted_again",
    # its function run_training
    r"nnUNetv2_train .*": "training/test_validation.py::test_both_branches_are_validated_as_nnunet_does",
    r"confkd predict .* --save-entropy": "inference/test_uncertainty.py::test_the_segmentation_is_the_same_to_the_bit",
    r"confkd predict .*": "test_nnunet_commands.py::test_images_without_numbers_are_predicted_under_their_own_names",
    r"nnUNetv2_predict_from_modelfolder .*": "inference/test_export.py::test_stock_nnunet_predicts_the_same_to_the_bit",
    r"confkd evaluate .* --against .*": "evaluation/test_evaluate.py::test_two_folders_are_compared_case_by_case",
    r"confkd evaluate .*": "evaluation/test_evaluate.py::test_the_command_writes_what_it_measures",
    r"confkd compare .*": "evaluation/test_compare.py::test_models_stand_side_by_side_with_both_branches",
    r"confkd report .*": "report/test_report.py::test_figures_are_those_of_nnunets_validation_and_of_the_files",
    r"confkd complete .* --confidence .*":
        "inference/test_completion.py::test_with_a_confidence_only_voxels_above_it_are_filled",
    r"confkd complete .*": "inference/test_completion.py::test_annotated_voxels_stay_and_the_others_are_the_students",
    # its function export
    r"confkd export .*": "inference/test_export.py::test_stock_nnunet_predicts_the_same_to_the_bit",
}


def blocks(page: Path, languages: str) -> list[tuple[str, str]]:
    """The (line before it, text) of each fenced block in one of the languages, e.g. "bash|sh"."""
    pattern = rf"(?:^|\n)([^\n]*)\n\s*```(?:{languages})\n(.*?)\n\s*```"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL)


def is_marked(before: str, line: str) -> bool:
    return "<!-- not run" in before or bool(re.search(r"#.*\bnot run\b", line))


def commands() -> list[tuple[str, bool, str]]:
    """The (page, whether it is marked as not run, command) of all shell blocks, with continued lines joined."""
    found = []
    for page in PAGES:
        for before, text in blocks(page, "bash|sh|console|shell"):
            for line in re.sub(r"\\\n\s*", "", text).splitlines():
                command = " ".join(re.sub(r"(^|\s)#.*", "", line).split()).removeprefix("$ ")
                if command:
                    found.append((page.relative_to(ROOT).as_posix(), is_marked(before, line), command))
    return found


COMMANDS = commands()


def test_every_shell_block_is_found():
    fences = sum(len(re.findall(r"^\s*```(?:bash|sh|console|shell)\b", page.read_text(encoding="utf-8"), re.MULTILINE))
                 for page in PAGES)
    assert fences == sum(len(blocks(page, "bash|sh|console|shell")) for page in PAGES) > 15


def test_every_command_is_run_by_a_test_or_marked_as_not_run():
    unknown = [f"{page}: {command}" for page, not_run, command in COMMANDS
               if not not_run and not any(re.fullmatch(pattern, command) for pattern in RUN_BY)]
    assert not unknown, "\n".join(unknown)


def test_no_entry_of_the_list_is_left_over_and_every_test_in_it_exists():
    used = [command for _, not_run, command in COMMANDS if not not_run]
    assert [pattern for pattern in RUN_BY if not any(re.fullmatch(pattern, command) for command in used)] == []
    for test in RUN_BY.values():
        file, _, name = test.partition("::")
        where = ROOT / "tests" / file if name else ROOT / file
        assert where.is_file() and (not name or f"\ndef {name}(" in where.read_text(encoding="utf-8")), test


# ---- parsing -------------------------------------------------------------------------------------------------------

class Parsed(BaseException):  # no Exception, which a command would take for a fault of its own
    """A parser took the arguments."""


@pytest.fixture
def only_parsed(monkeypatch):
    """Let commands end as soon as their arguments have been parsed."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *arguments):
        parse(self, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setenv("nnUNet_extTrainer", "")


def accepted(command: str, monkeypatch) -> bool:
    name, *argv = shlex.split(command)
    try:
        if name == "confkd":
            return cli.main(argv) == 0 and argv in (["--help"], ["convert", "--list"])
        monkeypatch.setattr(sys, "argv", [name, *argv])
        next(iter(entry_points(group="console_scripts", name=name))).load()()
    except Parsed:
        return True
    except (SystemExit, StopIteration):
        return False
    return False


def test_every_command_of_ours_and_of_nnunets_parses(only_parsed, monkeypatch):
    ours = [(page, command) for page, _, command in COMMANDS if command.startswith(("confkd ", "nnUNetv2_"))]
    refused = [f"{page}: {command}" for page, command in ours if not accepted(command, monkeypatch)]
    assert not refused and len(ours) > 30, "\n".join(refused)


@pytest.mark.parametrize("words", [[name] for name in cli.COMMANDS] + [["convert", name] for name in CONVERTERS],
                         ids=" ".join)
def test_help_begins_with_an_example_that_the_parser_accepts(words, only_parsed, monkeypatch, capsys):
    with contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"example: confkd {' '.join(words)}")
    assert accepted(first.removeprefix("example: "), monkeypatch)


@pytest.mark.parametrize("command", [
    "confkd mix --full FULL", "confkd report --modle X", "confkd train 27 2d 0 --nonsense", "confkd explode",
    "nnUNetv2_train 27 2d", "nnUNetv2_explode 1", "confkd predict --branch both"])
def test_a_wrong_command_is_told_from_a_right_one(only_parsed, monkeypatch, command):
    assert not accepted(command, monkeypatch)


def test_commands_in_the_text_name_options_that_exist(only_parsed, monkeypatch):
    """They stand in the running text as `confkd NAME --option ...`."""
    known = {name: {option for sub in parsers(name) for action in sub._actions for option in action.option_strings}
             for name in cli.COMMANDS if name not in ("train", "predict")}
    wrong = []
    for page in PAGES:
        for name, rest in re.findall(r"`confkd ([a-z-]+)((?: [^`]*)?)`", page.read_text(encoding="utf-8")):
            assert name in cli.COMMANDS, f"{page}: confkd {name}"
            wrong += [f"{page}: confkd {name} {option}" for option in re.findall(r" (--?[a-z][a-z-]*)", rest)
                      if name in known and option not in known[name] | {"--help", "--list"}]
    assert not wrong, "\n".join(wrong)


GENERATED = ("cli.md", "settings.md")


# ---- the reference -------------------------------------------------------------------------------------------------

def generator():
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs" / "generate_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsers(name: str) -> list[argparse.ArgumentParser]:
    """The parser of a command and those of its subcommands."""
    parser = generator().parser_of(name)
    return [parser, *(sub for action in parser._actions if isinstance(action, argparse._SubParsersAction)
                      for sub in action.choices.values())]


@pytest.mark.parametrize("page", GENERATED)
def test_the_generated_reference_is_up_to_date(page):
    written = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    assert written == generator().PAGES[page](), "python docs/generate_reference.py writes it anew"


def test_the_reference_has_every_command_and_option():
    text = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"\n## confkd ([a-z-]+)\n(.*?)(?=\n## |\Z)", text, re.DOTALL))
    assert list(sections) == list(cli.COMMANDS)
    assert all(option in sections["predict"] for option in ("--branch", "--save-entropy"))
    for name in sorted(set(sections) - {"train", "predict"}):  # most options of these are nnU-Net's
        missing = {option for parser in parsers(name) for action in parser._actions if action.help != argparse.SUPPRESS
                   for option in action.option_strings if option not in sections[name]} - {"-h", "--help"}
        assert not missing, f"{name}: {missing}"
    assert sections["convert"].count("### ") == 7


def test_every_page_is_in_the_navigation_and_the_other_way_round():
    # mkdocs need not be installed here: the names are enough
    navigation = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]]
    assert sorted(navigation) == sorted(pages)


KINDS = ("tutorial", "how-to", "reference", "explanation")


def test_every_page_is_of_one_kind_and_stands_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w/-]+\.md)(?:#[\w-]+)?\)", index))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]} - {"index.md"}
    assert {page.split("/")[0] for page in pages} == set(KINDS)
    assert linked == pages


def faults_of_form(page: Path) -> list[str]:
    """What is wrong with a page: it is too long, or does not begin with what the reader has at its end."""
    text = page.read_text(encoding="utf-8")
    start = re.sub("<!--.*?-->", "", text.split("\n", 1)[1], flags=re.DOTALL).strip()
    faults = ["has more than 200 lines"] if text.count("\n") > 200 and page.name not in GENERATED else []
    if not (text.startswith("# ") and re.match(r"At the end of this page (you|a) ", start)):
        faults.append("does not begin with its title, and then with what the reader has at its end")
    return faults


def test_every_page_is_short_and_begins_with_what_the_reader_has_at_its_end():
    wrong = [f"{page.relative_to(ROOT)}: {fault}" for page in PAGES[1:] for fault in faults_of_form(page)]
    assert not wrong, "\n".join(wrong)


def test_a_long_page_or_one_without_a_promise_is_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# Title\n\nAt the end of this page you know it.\n" + "a line\n" * 198)
    assert faults_of_form(page) == ["has more than 200 lines"]
    page.write_text("# Title\n\nThis page is about much.\n")
    assert faults_of_form(page) == ["does not begin with its title, and then with what the reader has at its end"]


def test_the_readme_fits_on_a_screen_or_two():
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") < 110


def inserted_tables() -> list[tuple[str, str]]:
    """The (page, mark) of each call of `insert` in the benchmarks' scripts, and of each MARK that they look for."""
    found = []
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        text = script.read_text(encoding="utf-8")
        page = r'"([\w-]+)" / "(\w+\.md)"'
        for folder, name, mark in re.findall(rf'insert\(\s*\w+(?: / "docs")? / {page},\s*f?"([^"{{]+)', text):
            found.append((f"docs/{folder}/{name}", f"<!-- {mark}"))
        for mark in re.findall(r'^MARK = "(.+)"$', text, re.MULTILINE):
            (folder, name), = re.findall(rf'page = ROOT / "docs" / {page}', text)
            found.append((f"docs/{folder}/{name}", mark))
    return found


def test_the_benchmarks_find_their_places_in_the_pages():
    tables = inserted_tables()
    assert len(tables) >= 15
    for page, mark in tables:
        assert (ROOT / page).read_text(encoding="utf-8").count(mark) >= 1, f"{page}: lacks {mark}"


# ---- links ---------------------------------------------------------------------------------------------------------

def anchors(page: Path) -> set[str]:
    """The anchors of the headings, where the site and GitHub agree on them."""
    text = re.sub(r"^\s*```.*?^\s*```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        github = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        ascii_only = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        if github == re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip()):
            found.add(github)
    return found


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"^\s*```.*?^\s*```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        outside = page in PAGES[1:] and not target.resolve().is_relative_to(ROOT / "docs")  # of the site
        if outside or not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(f"{page.relative_to(ROOT) if page.is_relative_to(ROOT) else page.name}: {link}")
    return broken


def test_links_and_anchors_lead_somewhere():
    others = [ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
    assert [link for page in PAGES + others for link in broken_links(page)] == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "b.md").write_text("# A `confkd mix` heading\n")
    page = tmp_path / "a.md"
    page.write_text("[x](b.md) [x](b.md#a-confkd-mix-heading) [x](c.md) [x](b.md#none) [x](#none) "
                    "[x](https://example.org)\n")
    assert broken_links(page) == ["a.md: c.md", "a.md: b.md#none", "a.md: #none"]


# ---- commands that no other test runs ------------------------------------------------------------------------------

def test_the_list_of_converters(capsys):
    assert cli.main(["convert", "--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["acdc", "brats", "la2018", "mmwhs", "mscmr", "msd", "promise12"]


@pytest.mark.skipif(os.name == "nt", reason="the line is one of a Unix shell")
def test_the_line_for_the_shell_keeps_what_the_variable_holds():
    line, = {command for _, _, command in COMMANDS if command.startswith("export nnUNet_extTrainer=")}
    folder = ROOT / "trainers"
    for held, expected in (("", f"{folder}"), ("/mine", f"{folder}:/mine")):
        # A shell function stands for the command, whose output test_packaging.py tests.
        command = f"confkd() {{ [ \"$*\" = trainer-dir ] && echo '{folder}'; }}"
        shell = subprocess.run(["sh", "-c", f"{command}\n{line}\nprintf %s \"$nnUNet_extTrainer\""],
                               env={**os.environ, "nnUNet_extTrainer": held}, capture_output=True, text=True)
        assert shell.stdout == expected, shell.stderr


def dry_run(target: str, *variables: str) -> str:
    """The commands that make would run."""
    if os.name == "nt" or shutil.which("make") is None:
        pytest.skip("the Makefile is for Unix, with make")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}  # set by a make that runs pytest
    said = subprocess.run(["make", "-n", target, *variables], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert said.returncode == 0, said.stderr
    return said.stdout.rstrip()


def test_make_would_install_and_run_the_demo(tmp_path):
    said = dry_run("demo", f"VENV={tmp_path / 'venv'}")
    assert "pip install -e ." in said and said.endswith("bin/confkd demo")


def test_make_would_run_all_tests_or_those_that_are_not_slow(tmp_path):
    for target, selected in (("test", '-m "not slow" tests/data'), ("test-all", " tests/data")):
        said = dry_run(target, f"VENV={tmp_path / 'venv'}", "ARGS=tests/data")
        assert 'pip install -e ".[test]"' in said and said.endswith(selected) and " -n 2 " in said
        assert ("not slow" in said) == (target == "test")


def tutorial() -> tuple[str, list[str]]:
    """The tutorial's Python snippet and its commands, in order."""
    first, = (text for _, text in blocks(TUTORIAL, "python"))
    return first, [command for page, _, command in COMMANDS if page == "docs/tutorial/first_model.md"]


@pytest.mark.skipif(os.name == "nt", reason="the commands are of a Unix shell")
def test_the_tutorial_up_to_the_training(tmp_path, monkeypatch, capsys, thread_pools):
    """The tutorial's snippets and commands run in its order, and print what it says. Other tests train."""
    monkeypatch.chdir(tmp_path)
    first, of_page = tutorial()
    exec(first, {})
    for folder, cases in (("full", 8), ("scribbles", 12), ("unlabelled", 6), ("test", 6)):
        assert len(list(Path(folder, "images").iterdir())) == cases
    assert not Path("unlabelled", "labels").exists()
    for command in of_page[:2]:  # mkdir, export
        values = subprocess.run(["sh", "-c", f"{command}; env"], capture_output=True, text=True, check=True).stdout
        for name in ("raw", "preprocessed", "results"):
            if f"nnUNet_{name}={tmp_path}/{name}\n" in values:
                monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    mix, check, plan = of_page[2:5]
    assert cli.main(shlex.split(mix)[1:] + ["--processes", "1"]) == 0
    out = capsys.readouterr().out
    seen = [text for _, text in blocks(TUTORIAL, "text")]
    expected = [line.replace("...", str(tmp_path)) for line in seen[0].splitlines() if line != "..."]
    assert all(line in out.splitlines() for line in expected), out
    assert cli.main(shlex.split(check)[1:] + ["--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert all(line in out for line in seen[1].splitlines() if line != "...")
    # Fewer samples of intensities are enough here.
    monkeypatch.setattr(DatasetFingerprintExtractor, "num_foreground_voxels_for_intensitystats",
                        property(lambda self: 1e6, lambda self, value: None), raising=False)
    assert cli.main(shlex.split(plan)[1:] + ["-npfp", "1", "-np", "1", "--no_pbar"]) == 0
    out = capsys.readouterr().out
    assert all(line in out for line in seen[2].splitlines() if line != "...")
    preprocessed = tmp_path / "preprocessed" / "Dataset027_Hearts"
    assert len(list((preprocessed / "nnUNetPlans_2d").glob("*.b2nd"))) == 2 * 26
    assert of_page[5] == "confkd train 27 2d 0 --quick"


# What the tutorial shows of the later steps, whose commands take too long here: (its module, the constant part).
PRINTED = [
    ("nnunet_commands.py", "with a small network (up to "), ("device.py", "running on the CPU"),
    ("inference/expected_time.py", " should take "),
    ("inference/expected_time.py", "(a rough guess; after an epoch the time left is told)"),
    ("training/trainer.py", "student's confidence"), ("training/trainer.py", "Pseudo dice of the teacher"),
    ("training/trainer.py", "(with simulated hints)"),
    ("training/validation.py", "Mean Validation Dice of the teacher: "),
    ("nnunet_commands.py", "next: confkd predict -d "), ("nnunet_commands.py", "or: confkd report --model "),
    ("inference/postprocessing.py", "these predictions are raw, and the model has no post-processing"),
    ("nnunet_commands.py", "look at these cases first:"),
    ("nnunet_commands.py", "next, where there is a ground truth: confkd evaluate --truth LABELS --prediction "),
    ("evaluation/tables.py", "each taken as one patient"), ("evaluation/evaluate.py", "written: "),
    ("commands/report.py", "written:"), ("commands/export.py", "written:")]


def test_the_later_outputs_in_the_tutorial_are_those_of_the_code():
    shown = "".join(text for _, text in blocks(TUTORIAL, "text")[3:])
    shown += "\n".join(re.findall(r"It prints `([^`\n]+)`", TUTORIAL.read_text(encoding="utf-8")))
    for file, text in PRINTED:
        source = (ROOT / "nnunet_confkd" / file).read_text(encoding="utf-8")
        one_line = re.sub(r'"\s*f?"', "", source)  # texts that are continued on the next line
        assert text in shown and text in one_line, f"{file}: {text}"


# A file of the new environment, so that the training is short enough for a test.
SHORT = """from nnunet_confkd.data import small_configuration
small_configuration.LENGTHS[2] = dict(epochs=2, iterations_per_epoch=3)
"""


def environment_of_the_wheel(folder: Path) -> Path:
    """Build the wheel and install it into an empty environment; return the folder of its programs.

    Only then are the packages that this Python has put in its reach, because to download them takes gigabytes.
    """
    source, python = folder / "source", folder / "venv" / "bin" / "python"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "tests", "benchmarks", "*.egg-info", "build"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder,
                    source], check=True)
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", next(folder.glob("*.whl"))],
                   check=True)
    site, = (folder / "venv").glob("lib/python*/site-packages")
    (site / "short_training.py").write_text(SHORT)
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "borrowed.pth").write_text("\n".join([*borrowed, "import short_training"]) + "\n")
    return python.parent


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the wheel is tried on Linux; the commands are of a Unix shell")
def test_the_tutorial_with_the_wheel_in_an_environment_of_its_own(tmp_path):
    programs, work = environment_of_the_wheel(tmp_path), tmp_path / "work"
    work.mkdir()
    first, of_page = tutorial()
    environment = {key: value for key, value in os.environ.items()
                   if not key.startswith(("nnUNet_", "PYTHON", "VIRTUAL_ENV"))}
    environment |= {"PATH": f"{programs}{os.pathsep}{environment['PATH']}", "nnUNet_def_n_proc": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = "import nnunet_confkd.trainers as t; print(nnunet_confkd.__file__, nnunet_confkd.__version__, t.__file__)"
    file, version, trainers = run("python", "-c", f"import nnunet_confkd; {where}").split()
    assert file.startswith(f"{tmp_path}/") and trainers.startswith(f"{tmp_path}/")
    assert version == nnunet_confkd.__version__
    run("python", "-c", first)
    script = "set -e\n" + "\n".join(of_page)
    assert script.count("confkd ") == 8
    said = run("sh", "-c", script)
    missing = [text for _, text in PRINTED if text not in said and text != "running on the CPU"]
    assert not missing, said
    model = work / "results" / "Dataset027_Hearts" / "ConfKDTrainer__nnUNetPlans__2d_quick"
    assert (model / "report" / "report.html").is_file() and len(list((work / "predictions").glob("*.nii.gz"))) == 6
    assert (work / "my_model" / "fold_0" / "checkpoint_final.pth").is_file()


# ---- a release -----------------------------------------------------------------------------------------------------

def test_the_version_is_the_same_everywhere():
    citation, changelog = (ROOT / "CITATION.cff").read_text(), (ROOT / "CHANGELOG.md").read_text()
    version, date = re.search(r"^version: (.+)\ndate-released: (.+)$", citation, re.MULTILINE).groups()
    assert version == nnunet_confkd.__version__
    assert re.search(r"^## (.+)$", changelog, re.MULTILINE)[1] in (f"{version} ({date})", f"{version} (unreleased)")


def test_every_dependency_stands_among_the_licences():
    listed = (ROOT / "docs" / "reference" / "third_party.md").read_text(encoding="utf-8")
    needed = {re.match(r"[\w-]+", requirement)[0] for requirement in distribution("nnunet-confkd").requires}
    assert {"nnunetv2", "filelock", "slicerio", "mkdocstrings"} <= needed
    assert [name for name in needed if not re.search(rf"^\| {name}( \(|\ \|)", listed, re.MULTILINE)] == []


def test_the_sdist_holds_the_package_and_neither_tests_nor_data(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(
        ".git", ".venv", "demo_output", "*.egg-info", "build", "site", "runs", "__pycache__"))
    built = subprocess.run([sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('..')"], cwd=source,
                           capture_output=True, text=True,
                           env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert built.returncode == 0, built.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()} - {""}
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders == {"nnunet_confkd", "trainers", "dataset_conversion", "nnunet_confkd.egg-info"}
    assert {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "pyproject.toml", "setup.py"} <= names
    ours = {name for name in names if not name.startswith("nnunet_confkd.egg-info")}
    assert {Path(name).suffix for name in ours if "/" in name} <= {".py", ".typed", ""}
    for folder in ("nnunet_confkd", "trainers", "dataset_conversion"):
        assert {file.relative_to(ROOT).as_posix() for file in (ROOT / folder).rglob("*.py")} <= names


def test_the_workflow_names_files_that_exist_and_pins_its_tools():
    # without a parser of YAML, which is not among the dependencies of the tests
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    paths = re.findall(r"\btests/[\w/.]+", workflow)
    assert len(paths) == 3 and all((ROOT / path).is_file() for path in paths)
    tools = re.findall(r"\b(ruff|mypy|mkdocs|mkdocs-material|mkdocstrings|mkdocstrings-python|build|twine)==[\d.]+",
                       workflow)
    assert len(tools) == 8
    assert not re.search(r"pip install [^\n]*\b(ruff|mypy|mkdocs[\w-]*|build|twine)(?![\w=-])", workflow)
