"""Does it pay to train again on completed labels?

    python benchmarks/two_stages.py --data .../shared/data --work FOLDER --settings erosion --rows confkd_long
    python benchmarks/two_stages.py --report

Half of the cost of a training (30 % in the row `teacher`) goes to a first network. It completes the labels of its
training cases, as `confkd complete` does; a teacher is shown their annotations. The other half goes to a stock
network that starts from the student's weights (`-pretrained_weights`), and learns from the completed labels. To
complete takes time as well, which does not grow with the length of the training and is not counted. In the row
`watershed` a watershed completes the labels (`confkd complete --watershed`), and a stock network learns from them for
the whole time.

The protocol is that of equal_terms.py: validation patients, raw and after post-processing. The rivals are its trainings
of the same length. Each run writes the JSON files of both stages into benchmarks/two_stages/SETTING_DRAW/. `--report`
writes the table into docs/how-to/complete.md.
"""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import equal_terms
import numpy as np
from accuracy import FULL_ID, Row, planned, predict_and_measure, run, run_name, spec_of
from completion import KEY, measure, measured
from completion import values_of_run as values_of_labels
from equal_terms import (
    COST,
    LONG,
    LONGER,
    gain_text,
    measure_all,
    paired_gain,
    parsed,
    prepare_data,
    runs_of,
    table_of,
)
from step_time import insert

from nnunet_confkd.data.folders import find_dataset, raw_folder
from nnunet_confkd.data.images import read
from nnunet_confkd.data.json_files import read_json
from nnunet_confkd.inference.watershed_completion import complete_by_watershed

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "two_stages"
FIRST = "_first"  # the name of a first stage is that of the row and this
# {setting: {row: the first stage, a row of equal_terms.py}}: what the trainers choose there
FIRST_STAGES = {"scribbles": {"ignore": "ignore_equal_quarter", "confkd": "apart_reach_cost",
                              "teacher": "teacher_watershed"},
                "erosion": {"ignore": "ignore_prior_equal_quarter", "confkd": "apart_corrected_reach_cost",
                            "teacher": "teacher_corrected_watershed"},
                "erosion_foreground": {"ignore": "ignore_quarter", "confkd": "equal_reach_cost",
                                       "teacher": "teacher_equal"}}
SHARES = {"teacher": 0.3}  # of the cost that goes to the first stage; that of the others is a half
SETTINGS = {name: equal_terms.SETTINGS[name] for name in FIRST_STAGES}
WATERSHED = "watershed"
TITLES = {"ignore": "our trainer without a teacher", "confkd": "ConfKD with the KL", WATERSHED: "none: a watershed",
          "teacher": "ConfKD without KL, hints spread where there is background, 30 % of the cost"}
ROWS = [row + length for row in TITLES for length in ("", LONG)]


def specs_of(setting: str, draw: int, rows: list[str], seeds: list[int]) -> list[dict]:
    """The second stages of some rows; "first" of each is the spec of its first stage."""
    table, full, specs = table_of(setting, draw), SETTINGS[setting][1], []
    for seed in seeds:
        for name in rows:
            row = name.removesuffix(LONG)
            total, cost = table.iterations * (LONGER if name.endswith(LONG) else 1), 1.0 if row == "ignore" else COST
            if row == WATERSHED:
                stock = Row("stock nnU-Net on the labels that a watershed completed", "nnUNetTrainer", "completed")
                specs.append(spec_of(table, name, full, seed, "cpu", total, "validation", stock))
                continue
            iterations = int(total * SHARES.get(row, 0.5) / cost / table.epoch) * table.epoch
            rest = int((total - iterations * cost) / table.epoch) * table.epoch
            first = equal_terms.ROWS[FIRST_STAGES[setting][row]]
            second = Row(f"{TITLES[row]}, then stock nnU-Net on the completed labels", "nnUNetTrainer", "completed")
            specs.append(spec_of(table, name, full, seed, "cpu", rest, "validation", second) | {
                "first": spec_of(table, name + FIRST, full, seed, "cpu", iterations, "validation", first)})
    return specs


# ---- one run --------------------------------------------------------------------------------------------------------

def run_both(spec: dict, work: Path, output: Path) -> str:
    """Run both stages; a finished first stage is not run again. Returns a line to print."""
    dataset_id = 950 + 10 * spec["seed"] + ROWS.index(spec["name"])
    name, weights = f"Dataset{dataset_id:03d}_Completed{dataset_id}", work / f"{run_name(spec)}.pth"

    def remove() -> None:
        """Remove the completed labels, and what was made of them."""
        for folder in ("raw", "preprocessed", "results"):
            shutil.rmtree(work / folder / name, ignore_errors=True)

    def complete(trainer, roles: dict[str, list[str]], _: str) -> dict:
        """Complete labels, keep the weights, and measure both."""
        none = False, np.zeros(len(trainer.label_manager.foreground_labels), bool)
        completed = measured(trainer, *none, dataset_id=dataset_id, keep=True)
        cases = predict_and_measure(trainer, roles["validation"], False)
        shutil.copy(Path(trainer.output_folder) / "checkpoint_final.pth", weights)
        return {"cases": cases, KEY: completed}

    def from_student(trainer) -> None:
        from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

        load_pretrained_weights(trainer.network, str(weights))

    if "first" not in spec:
        return run_on_watershed(spec, work, output, dataset_id, remove)
    if not (output / f"{run_name(spec['first'])}.json").is_file():
        remove()  # of a first stage that was cut off
        print(run(spec["first"], work, output, measured=complete), flush=True)
    if not (work / "preprocessed" / name / "nnUNetPlans.json").is_file():
        planned(equal_terms.Table(**spec["table"]), [dataset_id])
    text = run(spec, work, output, teacher=False, dataset_id=dataset_id, begin=from_student)
    remove()
    os.remove(weights)
    return text


def run_on_watershed(spec: dict, work: Path, output: Path, dataset_id: int, remove: Callable[[], None]) -> str:
    """Complete the labels by a watershed, and train a stock network on them. Returns a line to print."""
    name = f"Completed{dataset_id}"
    if not (work / "preprocessed" / f"Dataset{dataset_id:03d}_{name}" / "nnUNetPlans.json").is_file():
        remove()
        complete_by_watershed(FULL_ID + spec["full"], dataset_id, name=name, processes=1, link=True)
        planned(equal_terms.Table(**spec["table"]), [dataset_id])

    def found(trainer, roles: dict[str, list[str]], _: str) -> dict:
        return {"cases": predict_and_measure(trainer, roles["validation"], False),
                KEY: {"branch": None, "cases": labels_of(trainer, roles)}}

    text = run(spec, work, output, teacher=False, dataset_id=dataset_id, measured=found)
    remove()
    return text


def labels_of(trainer, roles: dict[str, list[str]]) -> dict:
    """Measure the completed labels of the training cases; voxels that are still ignored count as background."""
    folder, truth = (raw_folder() / find_dataset(name) / "labelsTr"
                     for name in (trainer.plans_manager.dataset_name, FULL_ID))
    found = {}
    for case in read_json(folder.parent / "dataset.json")[KEY][-1]["cases"]:
        if case not in roles["validation"]:
            labels, masks = (read(of / f"{case}{trainer.dataset_json['file_ending']}") for of in (folder, truth))
            found[case] = {str(c): measure(masks.voxels[0] == c, labels.voxels[0] == c, labels.voxels[0] == c,
                                           masks.geometry.spacing[::-1])
                           for c in trainer.label_manager.foreground_labels}
    return found


# ---- report ---------------------------------------------------------------------------------------------------------

def table(folder: Path, single: Path = equal_terms.OUTPUT) -> str:
    """A line for each setting, length and row, of the draws and seeds of which the trainer without a teacher has been
    trained once for the whole length. Gains are over that training."""
    lines = ["| weak labels | length | first training | Dice of the completed labels | then Dice raw | then Dice after "
             "| HD95 after, mm | gain raw | gain after | runs |", "|" + "---|" * 10]
    both, once = equal_terms.read_all(folder), equal_terms.read_all(single)
    for setting in SETTINGS:
        for length in ("", LONG):
            rival = FIRST_STAGES[setting]["ignore"] + length
            rivals = {key[::2]: run for key, run in runs_of(once, setting).items() if key[1] == rival}
            mine = runs_of(both, setting)
            for row in TITLES:
                runs = {key[::2]: run for key, run in mine.items() if key[1] == row + length and key[::2] in rivals}
                if runs:
                    lines.append(_line(folder, setting, row + length, runs, {key: rivals[key] for key in runs}))
    return "\n".join(lines)


def _line(folder: Path, setting: str, name: str, runs: dict, rivals: dict) -> str:
    """The line of a row."""
    dice, after, hd95 = (np.mean([np.nanmean(np.nanmean(run[metric], 0)) for run in runs.values()])
                         for metric in ("dice", "dice_pp", "hd95_mm_pp"))
    patients = next(iter(runs.values()))["patients"]
    gains = [gain_text(paired_gain(*({key: run[metric] for key, run in of.items()} for of in (runs, rivals)), patients))
             for metric in ("dice", "dice_pp")]
    labels = np.mean([completed_dice(folder / f"{setting}_{draw}", name, seed) for draw, seed in runs])
    length, title = LONGER if name.endswith(LONG) else 1, TITLES[name.removesuffix(LONG)]
    cells = [f"{labels:.3f}", f"{dice:.3f}", f"{after:.3f}", f"{hd95:.1f}", *gains, str(len(runs))]
    return f"| {equal_terms.WORDS[setting]} | {length}x | {title} (`{name}`) | {' | '.join(cells)} |"


def completed_dice(folder: Path, name: str, seed: int) -> float:
    """The mean Dice of the labels that the first stage of a run completed."""
    first = "" if name.startswith(WATERSHED) else FIRST
    (file,) = folder.glob(f"{name}{first}_M*_s{seed}.json")
    return float(np.nanmean(np.nanmean(values_of_labels(json.loads(file.read_text()))["dice"], 0)))


def main() -> None:
    args = parsed(__doc__, OUTPUT, SETTINGS, ROWS)
    if args.prepare:
        return prepare_data(args.prepare[0], int(args.prepare[1]), args.data, args.work)
    if args.run:
        return print(run_both(json.loads(args.run), args.work, args.output))
    if not args.report:
        measure_all(args, __file__, specs_of)
    if args.output == OUTPUT:
        insert(HERE.parent / "docs" / "how-to" / "complete.md", "two stages", table(args.output))
    else:
        print(table(args.output))


if __name__ == "__main__":
    main()
