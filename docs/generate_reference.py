"""Write reference/cli.md and reference/settings.md from the parsers and the settings.

    python docs/generate_reference.py

The tables are made from the options of the parsers. Their printed help would not do: its layout differs between
versions of Python.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import re
from dataclasses import fields
from pathlib import Path
from unittest import mock

from nnunet_confkd.trainers import confkd_trainers

from nnunet_confkd import cli, nnunet_commands
from nnunet_confkd.device import OPTION_HELP
from nnunet_confkd.training.settings import Settings, settings_table

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- written by docs/generate_reference.py -->\n"
OF_NNUNET = ("train", "predict")  # nnU-Net's own parsers, with a few words of ours before
TRAINERS = (
    "ConfKDTrainer",
    "ConfKDTrainer_noEntropy",
    "ConfKDTrainer_noKL",
    "ConfKDTrainer_partialOnly",
    "ConfKDTrainer_MedIA2023",
)
# defaults that depend on the machine
OF_THE_MACHINE = {
    "processes": "default: as many as there are cores, 8 at most",
    "device": OPTION_HELP,
}


class _Found(Exception):
    pass


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that `confkd COMMAND` makes."""
    def stop(parser, *_):
        raise _Found(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            cli.run(command, [])
        except _Found as found:
            return found.args[0]
    raise AssertionError(f"{command} makes no parser")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _code(text: str) -> str:
    """A bar within code in a table is read in different ways by GitHub and by the site; as an entity it is not."""
    return f"<code>{text.replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def _value(action: argparse.Action) -> str:
    """What stands after an option: FOLDER, {a,b}, N [N ...]."""
    if action.nargs == 0:
        return ""
    name = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper())
    if isinstance(action.nargs, int):
        return " " + " ".join(name if isinstance(name, tuple) else [name] * action.nargs)
    return {"+": f" {name} [{name} ...]", None: f" {name}"}[action.nargs]


def _meaning(action: argparse.Action, exclusive: set[str]) -> str:
    """The help, with a default that it does not tell itself."""
    text = (action.help or OF_THE_MACHINE.get(action.dest, "")).strip()
    given = action.default not in (None, []) and action.nargs != 0 and action.option_strings
    if given and "default" not in text:
        default = " ".join(map(str, action.default)) if isinstance(action.default, (list, tuple)) else action.default
        text += f"{'; ' if text else ''}default: {default}"
    if action.dest in exclusive:
        text += "; one of those that are needed"
    elif action.required and action.option_strings:
        text += f"{'; ' if text else ''}needed"
    return _cell(text)


def options_table(parser: argparse.ArgumentParser) -> str:
    exclusive = {
        action.dest for group in parser._mutually_exclusive_groups if group.required for action in group._group_actions
    }
    rows = ["| option | |", "|---|---|"]
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)) or action.help == argparse.SUPPRESS:
            continue
        options = ", ".join(_code(option + _value(action)) for option in action.option_strings)
        name = options or _code(_value(action).strip())
        rows.append(f"| {name} | {_meaning(action, exclusive)} |")
    return "\n".join(rows) + "\n"


def _text(described: str) -> str:
    """A description as Markdown; a colon before an indented block of a docstring stays text."""
    return re.sub(r"\n +", "\n", described.strip()) + "\n"


def _words(command: str) -> str:
    """What `confkd train --help` says before nnU-Net's help."""
    said = io.StringIO()
    with mock.patch.object(nnunet_commands, "run_as"), contextlib.redirect_stdout(said):
        cli.run(command, ["--help"])
    return said.getvalue().rstrip()


def command_line() -> str:
    parts = [
        "# The command line\n",
        NOTE,
        "At the end of this page you know every command and option. `confkd COMMAND --help` says the same.\n",
        "The exit status is 0, or 1 for an error in what was given (its text says what and where), or 2 for wrong "
        "options.\n",
        "| command | |\n|---|---|\n"
        + "".join(
            f"| [`confkd {name}`](#confkd-{name}) | {_cell(text)} |\n" for name, (_, text, _) in cli.COMMANDS.items()
        ),
    ]
    for name in cli.COMMANDS:
        parts.append(f"## confkd {name}\n\nExample: `{cli.COMMANDS[name][2]}`\n")
        if name in OF_NNUNET:
            parts.append(f"```text\n{_words(name)}\n```\n")
            continue
        parser = parser_of(name)
        parts.append(_text(parser.description))
        subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not subparsers:
            parts.append(options_table(parser))
        for action in subparsers:
            for converter, sub in action.choices.items():
                parts += [f"### confkd {name} {converter}\n", _text(sub.description), options_table(sub)]
        if parser.epilog:
            parts.append(_text(parser.epilog))
    return "\n".join(parts)


def settings() -> str:
    defaults = {f.name: f.default for f in fields(Settings)}
    variants = ""
    for name in TRAINERS:
        trainer = getattr(confkd_trainers, name)
        own = trainer.fixed_settings
        changed = ", ".join(f"`{key}` {_short(value)}" for key, value in own.items() if value != defaults[key])
        variants += f"| `{name}` | {changed or 'nothing'} |\n"
    return "\n".join(
        [
            "# Settings\n",
            NOTE,
            "At the end of this page you know every setting of the trainers, its default, and where to write it.\n",
            "Settings stand in a `confkd` block of a configuration in the plans file, e.g. `nnUNetPlans.json`. nnU-Net "
            "saves this file with the model:\n",
            '```json\n"configurations": '
            '{"3d_fullres_seed1": {"inherits_from": "3d_fullres", "confkd": {"seed": 1}}}\n```\n',
            "`nnUNetv2_train 27 3d_fullres_seed1 0 -tr ConfKDTrainer` then trains with it. Unknown keys and bad values "
            "are errors. The fold's `confkd.json` holds what was used, and under `chosen` what null stood for. "
            "The terms L are those of [the method](../explanation/method.md).\n",
            settings_table() + "\n",
            "Further errors are `weight_teacher` and `weight_student` that are both 0, `weight_kl` above 0 with "
            "`weight_teacher` 0, `teacher_trains_encoder` false with `weight_student` 0, and a ramp that ends before "
            "it starts.\n",
            "## What the trainers fix\n",
            "A variant's own settings win over the block, because the results are filed under its name.\n",
            "| trainer | differs from the defaults in |\n|---|---|\n" + variants,
            "`ConfKDTrainer_partialOnly` builds nnU-Net's own network, which has one branch. `ConfKDTrainer_1epoch`, "
            "`_5epochs`, `_50epochs`, `_100epochs` and `_250epochs` are `ConfKDTrainer` of these lengths. The length "
            "in the name wins over `epochs`.\n",
        ]
    )


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


PAGES = {"cli.md": command_line, "settings.md": settings}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
