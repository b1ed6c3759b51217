"""Which settings do the trainers choose from the data of equal_terms.py?

    python benchmarks/choices.py --work FOLDER

FOLDER is that of equal_terms.py, which has prepared the data there. Nothing is trained. The script writes choices.json
beside this file, and the table into docs/explanation/weights_and_batches.md.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from accuracy import Row, build_trainer, environment, spec_of
from equal_terms import DRAWS, HERE, SETTINGS, WORDS, table_of, work_folder
from step_time import insert

TRAINERS = {"ConfKDTrainer": "with a teacher", "ConfKDTrainer_partialOnly": "without"}
SHOWN = {"full_share": "share of full images", "equal_kinds": "equal weights",
         "teacher_trains_encoder": "teacher trains the encoder", "prior_correction": "class-prior correction",
         "cutmix": "CutMix"}


def choices_of(setting: str, draw: int) -> dict:
    """{"part": annotated part of the foreground, trainer: {setting of `SHOWN`: value}} of prepared data."""
    table, full, found = table_of(setting, draw), SETTINGS[setting][1], {}
    for name in TRAINERS:
        row = Row("choices", name)
        spec = spec_of(table, "choices", full, 0, "cpu", table.epoch, "validation", row)
        trainer = build_trainer(table, spec)
        trainer.find_supervision()
        train, _ = trainer.do_split()
        chosen = trainer._choose(train)
        found[name] = {key: getattr(chosen, key) for key in SHOWN}
        found["part"] = round(trainer._annotations(train).part, 4)
    return found


def table_text(choices: dict) -> str:
    def shown(value) -> str:
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value:.2g}"

    lines = [f"| data (draw) | annotated part | trainer | {' | '.join(SHOWN.values())} |",
             "|" + "---|" * (3 + len(SHOWN))]
    for key, found in choices.items():
        setting, draw = key.rsplit("_", 1)
        for name, words in TRAINERS.items():
            cells = [shown(found[name][of]) if name == "ConfKDTrainer" or not of.startswith("teacher") else ""
                     for of in SHOWN]
            lines.append(f"| {WORDS[setting]}, {SETTINGS[setting][1]} full ({draw}) | {found['part']:.2g} | {words} | "
                         f"{' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("CHOICES " + json.dumps(choices_of(args.one[0], int(args.one[1]))))
        return
    found = {}
    for setting in SETTINGS:
        for draw in DRAWS:
            work = work_folder(args.work.resolve(), setting, draw)
            if not (work / "roles.json").is_file():
                continue
            printed = subprocess.run([sys.executable, __file__, "--work", str(work), "--one", setting, str(draw)],
                                     check=True, stdout=subprocess.PIPE, text=True,
                                     env=os.environ | environment(work, "cpu")).stdout
            found[f"{setting}_{draw}"] = json.loads(printed.split("CHOICES ")[1])
    (HERE / "choices.json").write_text(json.dumps(found, indent=1) + "\n")
    insert(HERE.parent / "docs" / "explanation" / "weights_and_batches.md", "choices", table_text(found))
    print(table_text(found))


if __name__ == "__main__":
    main()
