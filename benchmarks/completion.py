"""How right are the labels that `confkd complete` writes?

    python benchmarks/five_folds.py --data .../shared/data --work FOLDER --settings scribbles --rows ignore confkd_cost
    python benchmarks/completion.py

After each training, five_folds.py lets its model complete the partially annotated training cases (:func:`measured`).
If there is a teacher, it is shown their annotations. Otherwise the network predicts as always. Annotated voxels stay as
they are. The labels are compared with the whole masks, which no training has seen, before and after post-processing.
This script writes the table into docs/how-to/complete.md.

Runs of settings whose five folds are not complete yet, and runs that were made again for this, are in
benchmarks/completion/. The tables of the results do not use them.
"""
from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from accuracy import FULL_ID
from accuracy_report import patients_in
from five_folds import ROWS as TITLES
from five_folds import SETTINGS, TOLERANCE_MM, WORDS, dice_of, gain, gain_text, of_patients, post_processed, read_all
from step_time import insert

from nnunet_confkd.data.folders import find_dataset, raw_folder
from nnunet_confkd.data.images import read
from nnunet_confkd.data.json_files import read_json
from nnunet_confkd.data.supervision import PARTIAL, TABLE_KEY
from nnunet_confkd.evaluation.metrics import measure_masks

ID = 990  # of the completed data set, which is removed
KEY = "completed"  # in the JSON files of five_folds.py, and in the dataset.json of a completed data set
HERE = Path(__file__).resolve().parent
FOLDERS = HERE / "five_folds", HERE / "completion"
ROWS = ("ignore_uniform", "ignore", "confkd_cost", "completes_cost")
TEACHERS = {"confkd_cost": "the teacher, shown the annotations",
            "completes_cost": "the same after the first of two stages, a quarter of the training"}


# ---- one run --------------------------------------------------------------------------------------------------------

def measured(trainer, *choice, dataset_id: int = ID, keep: bool = False) -> dict:
    """Complete the partially annotated training cases, and measure their labels before and after post-processing.

    Args:
        trainer: After its training.
        choice: The post-processing that was chosen on the validation cases, of :func:`equal_terms.choice_of`.
        dataset_id: The id of the completed data set.
        keep: Whether the completed data set stays.

    Returns:
        {"branch": which branch predicted, "cases": {case: {class: {"dice", "dice_pp", "nsd_pp"}}}}; empty if no case is
        partially annotated.
    """
    from filelock import FileLock

    from nnunet_confkd.inference.completion import TrainedModel, complete

    source = raw_folder() / trainer.plans_manager.dataset_name
    if PARTIAL not in read_json(source / "dataset.json").get(TABLE_KEY, {}).values():
        return {}
    truth, ignore = raw_folder() / find_dataset(FULL_ID) / "labelsTr", trainer.label_manager.ignore_label
    branch = "teacher" if getattr(trainer, "two_branches", False) else "student"
    model, cases = Path(trainer.output_folder).parent, {}
    with FileLock(source.with_suffix(".lock")):  # runs that end at once take turns
        folder = complete(source.name, TrainedModel(model, branch, device="cpu"), dataset_id,
                          name=f"Completed{dataset_id}", processes=1, link=True)
        for case in read_json(folder / "dataset.json")[KEY][-1]["cases"]:
            file = f"{case}{trainer.dataset_json['file_ending']}"
            masks, annotations = read(truth / file), read(source / "labelsTr" / file).voxels[0]
            labels = read(folder / "labelsTr" / file).voxels[0]
            after = post_processed(labels, trainer.label_manager.foreground_labels, *choice)
            cases[case] = {str(c): measure(masks.voxels[0] == c, labels == c,
                                           np.where(annotations == ignore, mask, annotations == c),
                                           masks.geometry.spacing[::-1])
                           for c, mask in after.items()}
        if not keep:
            shutil.rmtree(folder)
            shutil.rmtree(Path(trainer.preprocessed_dataset_folder_base).parent / folder.name)
    return {"branch": branch, "cases": cases}


def measure(truth: np.ndarray, mask: np.ndarray, after: np.ndarray, spacing) -> dict[str, float]:
    """Measure a class of a completed label, before and after post-processing."""
    of = measure_masks(truth, after, spacing, tolerance_mm=TOLERANCE_MM)
    return {"dice": round(dice_of(truth, mask), 4), "dice_pp": round(of["Dice"], 4), "nsd_pp": round(of["NSD"], 4)}


# ---- report ---------------------------------------------------------------------------------------------------------

def values_of_run(content: dict) -> dict | None:
    """The metrics of each completed case and class, `(cases, classes)`, the branch, and the patient of each case."""
    if not content.get(KEY):
        return None
    cases = content[KEY]["cases"]
    found = {name: np.array([[of[name] for of in case.values()] for case in cases.values()], float)
             for name in ("dice", "dice_pp", "nsd_pp")}
    return {**found, "branch": content[KEY]["branch"], "patients": patients_in({None: {"cases": cases}})}


def table(*folders: Path) -> str:
    """A line for each setting and row. Gains are those of the teacher over the trainer without one."""
    runs = read_all(*folders, values=values_of_run)
    lines = ["| weak labels | completed by | Dice raw | Dice after | of each class | NSD after | gain raw | gain after "
             "| folds |", "|" + "---|" * 9]
    for setting, of_setting in SETTINGS.items():
        full = of_setting.full[0]
        for row in ROWS:
            folds = runs.get((setting, row, full))
            if not folds or (setting, "ignore", full) not in runs:  # there would be nothing to compare
                continue
            before, after, nsd = (np.concatenate(of_patients(folds, name)).mean() for name in (
                "dice", "dice_pp", "nsd_pp"))
            classes = np.nanmean(np.concatenate([run["dice_pp"] for run in folds.values()]), 0)
            gains = ["" if row == "ignore" else gain_text(gain(folds, runs.get((setting, "ignore", full), {}), name))
                     for name in ("dice", "dice_pp")]
            teacher = all(run["branch"] == "teacher" for run in folds.values())  # with points there is none
            title = TEACHERS[row] if teacher else TITLES[row].title
            lines.append(f"| {WORDS[setting]} | {title} (`{row}`) | {before:.3f} | {after:.3f} | "
                         f"{' / '.join(f'{dice:.3f}' for dice in classes)} | {nsd:.3f} | {' | '.join(gains)} | "
                         f"{len(folds)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    insert(HERE.parent / "docs" / "how-to" / "complete.md", "completion", table(*FOLDERS))
