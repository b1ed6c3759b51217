"""Which settings do the trainers choose from the data of equal_terms.py, and of five_folds.py?

    python benchmarks/choices.py --work FOLDER
    python benchmarks/choices.py --work FOLDER --folds

FOLDER is that of equal_terms.py, or of five_folds.py, which has prepared the data there. Nothing is trained. The script
writes choices.json (choices_folds.json) beside this file, and the table into docs/explanation/weights_and_batches.md.
What is there of data that FOLDER lacks is kept.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import equal_terms
import five_folds
from accuracy import FOLDS, Row, Table, build_trainer, environment, spec_of
from equal_terms import DRAWS, HERE, SETTINGS
from step_time import insert

TRAINERS = {"ConfKDTrainer": "`ConfKDTrainer`", "ConfKDTrainer_partialOnly": "`_partialOnly`"}
WORDS = five_folds.WORDS | {"unlabelled": "ACDC, unlabelled"}
SHOWN = {"weight_kl": "weight of the KL", "full_share": "share of full images", "equal_kinds": "equal weights",
         "teacher_trains_encoder": "teacher trains the encoder", "hint_reach": "reach of hints",
         "hint_watershed": "watershed of hints", "complete_at": "labels completed after",
         "prior_correction": "class-prior correction", "cutmix": "CutMix"}
OF_TEACHER = ("teacher_trains_encoder", "weight_kl", "hint_reach", "hint_watershed", "complete_at")


def choices_of(table: Table, full: int) -> dict:
    """{"part": annotated part of the foreground, trainer: {setting of `SHOWN`: value}} of prepared data."""
    found: dict = {}
    for name in TRAINERS:
        row = Row("choices", name)
        # two epochs, so that a training could have two stages
        spec = spec_of(table, "choices", full, 0, "cpu", 2 * table.epoch, "validation", row)
        trainer = build_trainer(table, spec)
        trainer.choose_network()
        train, _ = trainer.do_split()
        chosen = trainer._choose(train)
        found[name] = {key: getattr(chosen, key) for key in SHOWN}
        found["part"] = round(trainer._annotations(train).part, 4)
    return found


def shown(value) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value:.2g}"


def head(first: str) -> list[str]:
    return [f"| {first} | annotated part | trainer | {' | '.join(SHOWN.values())} |", "|" + "---|" * (3 + len(SHOWN))]


def cells(name: str, found: list[dict]) -> str:
    """All values of each setting that a trainer has chosen; none of a setting that was added later."""
    return " | ".join(", ".join(sorted({shown(of[name][key]) for of in found if key in of[name]}))
                      if name == "ConfKDTrainer" or key not in OF_TEACHER else "" for key in SHOWN)


def of_folds(choices: dict) -> str:
    """A line for each setting and trainer, with all values that were chosen in a fold."""
    lines = head("data, five folds")
    for setting in five_folds.SETTINGS:
        of_setting = [of for key, of in choices.items() if key.rsplit("_", 1)[0] == setting]
        for name, words in TRAINERS.items() if of_setting else ():
            parts = [of["part"] for of in of_setting]
            part = " to ".join(dict.fromkeys(f"{value:.2g}" for value in (min(parts), max(parts))))
            lines.append(f"| {WORDS[setting]} | {part} | {words} | "
                         f"{cells(name, of_setting)} |")
    return "\n".join(lines)


def table_text(choices: dict) -> str:
    lines = head("data (draw)")
    for key, found in choices.items():
        setting, draw = key.rsplit("_", 1)
        for name, words in TRAINERS.items():
            lines.append(f"| {WORDS[setting]}, {SETTINGS[setting][1]} full ({draw}) | {found['part']:.2g} | {words} | "
                         f"{cells(name, [found])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--folds", action="store_true", help="the data are those of five_folds.py")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    protocol = five_folds if args.folds else equal_terms
    if args.one:
        setting, number = args.one
        table = protocol.table_of(setting, int(number))
        full = table.full[0] if args.folds else SETTINGS[setting][1]
        print("CHOICES " + json.dumps(choices_of(table, full)))
        return
    file = HERE / ("choices_folds.json" if args.folds else "choices.json")
    found, flag = json.loads(file.read_text()) if file.is_file() else {}, ["--folds"] * args.folds
    for setting in protocol.SETTINGS:
        for number in range(FOLDS) if args.folds else DRAWS:
            work = protocol.work_folder(args.work.resolve(), setting, number)
            if not (work / "roles.json").is_file():
                continue
            printed = subprocess.run([sys.executable, __file__, "--work", str(work), *flag, "--one", setting,
                                      str(number)], check=True, stdout=subprocess.PIPE, text=True,
                                     env=os.environ | environment(work, "cpu")).stdout
            found[f"{setting}_{number}"] = json.loads(printed.split("CHOICES ")[1])
    section, text = ("choices of folds", of_folds(found)) if args.folds else ("choices", table_text(found))
    file.write_text(json.dumps(found, indent=1) + "\n")
    insert(HERE.parent / "docs" / "explanation" / "weights_and_batches.md", section, text)
    print(text)


if __name__ == "__main__":
    main()
