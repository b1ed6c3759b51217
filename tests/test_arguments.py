"""What is said of mistyped options."""
from __future__ import annotations

import argparse

import pytest

from nnunet_confkd import cli
from nnunet_confkd.arguments import Parser
from nnunet_confkd.errors import InputError


@pytest.fixture
def parser():
    parser = Parser()
    parser.add_argument("files", nargs="*")
    parser.add_argument("-d", "--dataset", required=True)
    parser.add_argument("--ignore-value", type=int)
    parser.add_argument("--pattern")
    parser.add_argument("-device")
    return parser


@pytest.mark.parametrize("argv", [
    "-d 27", "-d27", "--dataset=27 --ignore-value -1", "--data 27 -device=cpu", "-d 27 -- --what -x"])
def test_what_argparse_takes_is_taken(parser, argv):
    plain = argparse.ArgumentParser(parents=[parser], add_help=False)
    assert parser.parse_args(argv.split()) == plain.parse_args(argv.split())


def test_a_value_with_blanks_is_no_option(parser):
    assert parser.parse_args(["-d", "1", "--pattern", "- a"]).pattern == "- a"


@pytest.mark.parametrize("argv, text", [
    ("--ignore_value 0", "unknown argument '--ignore_value' (did you mean '--ignore-value'?)"),
    ("--ignore-label=0 -d 1", "unknown argument '--ignore-label=0' (did you mean '--ignore-value'?)"),
    ("-x --patern a", "unknown argument '-x', '--patern' (did you mean '--pattern'?)")])
def test_an_unknown_option_is_told_before_a_missing_one(parser, argv, text):
    with pytest.raises(InputError) as error:
        parser.parse_args(argv.split())
    assert str(error.value).startswith(text)


@pytest.mark.parametrize("command", ["mix", "check", "evaluate", "plan", "convert acdc", "inspect", "trainer-dir"])
def test_commands_suggest_and_print_no_usage(capsys, command):
    assert cli.main([*command.split(), "--hepl"]) == 1
    err = capsys.readouterr().err
    assert err == f"confkd {command.split()[0]}: unknown argument '--hepl' (did you mean '--help'?)\n"


@pytest.mark.parametrize("command, missing", [
    ("mix", "the following arguments are required: --id"),
    ("check", "the following arguments are required: -d/--dataset"),
    ("complete -d 1 --id 2", "one of the arguments --model --watershed is required")])
def test_what_is_missing_is_told_in_two_lines(capsys, command, missing):
    with pytest.raises(SystemExit) as end:
        cli.main(command.split())
    prog = f"confkd {command.split()[0]}"
    assert end.value.code == 2
    assert capsys.readouterr().err == (f"{prog}: {missing}\n"
                                       f"'{prog} --help' shows an example and all options.\n")
