"""The headline table and its figure, from the runs of five_folds.py.

A line is one kind of labels and one number of fully annotated patients. The columns are what a reader compares: the
fully annotated patients alone, nnU-Net's own ignore label, our trainer without a teacher, ConfKD, and
everything annotated. Of several rows in a column the best counts, so that the rivals get the benefit of every doubt.
ConfKD has one row, its default at equal cost. With points it has no teacher by default, so its trainings are those of
our trainer without a teacher. A row that was run in fewer folds than another one of its column is left out. Where our
row was also run three times as long, there is a second line, in which all columns were.
"""
from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
from accuracy import patient_of
from equal_terms import LONG
from five_folds import HERE, NO_TEACHER, ROWS, SETTINGS, WORDS, gain_text, home_of, interval, of_patients, read_all

OURS, STOCK, EVERYTHING = "ConfKD", "nnU-Net's ignore label", "everything annotated"
ALONE = "our trainer, no teacher"
COLUMNS = {"full patients alone": ("full_only", "full_cutmix"), STOCK: ("ignore_uniform",),
           ALONE: ("ignore",), OURS: (), EVERYTHING: ("all",)}
# what ConfKD's trainer chooses
OUR_ROW = (dict.fromkeys(SETTINGS, "confkd_cost") | dict.fromkeys(NO_TEACHER, "ignore")
           | {"erosion": "completes_cost", "unlabelled": "labels_itself"})
OUR_LONG_ROW = OUR_ROW | {"erosion_foreground": "together_cost"}
RIVALS = tuple(COLUMNS)[:3]
COLOURS = dict(zip(COLUMNS, ("0.65", "tab:orange", "tab:blue", "tab:red", "0.3")))


def lines_of(folder: Path, metric: str = "dice_pp") -> list[dict]:
    """Collect the lines that have ConfKD and at least one rival.

    Args:
        folder: Of the runs.
        metric: "dice", or "dice_pp" after post-processing.

    Returns:
        For each line "setting", "words", "full", "folds", "means" and "intervals" of the columns, the "rival" (the best
        of `RIVALS` that are other trainings), the "gains" over each rival (one array of differences by patient for each
        fold), and the names of these "patients". All are of the folds that all columns have.
    """
    runs, found = read_all(folder), []
    for setting, table in SETTINGS.items():
        for full, length in product(table.full, ("", LONG)):
            rows: dict[str, dict[str, dict[int, dict]]] = {column: {} for column in COLUMNS}
            ours = (OUR_LONG_ROW if length else OUR_ROW)[setting]
            for column, names in (COLUMNS | {OURS: (ours,)}).items():
                for row in (name + length for name in names if name + length in ROWS):
                    of = runs.get((home_of(setting, row), row, 0 if column == EVERYTHING else full))
                    if of and not (setting != "unlabelled" and "cutmix" in row):
                        rows[column][row] = of
            rows = {column: {row: of for row, of in choices.items() if len(of) == max(map(len, choices.values()))}
                    for column, choices in rows.items() if choices}
            if OURS not in rows or not set(rows) & set(RIVALS):
                continue
            folds = set.intersection(*(set(of) for column in rows.values() for of in column.values()))
            if not folds:
                continue
            best = {column: max(({fold: of[fold] for fold in folds} for of in choices.values()),
                                key=lambda of: np.concatenate(of_patients(of, metric)).mean())
                    for column, choices in rows.items()}
            patients = {column: of_patients(of, metric) for column, of in best.items()}
            means = {column: float(np.concatenate(of).mean()) for column, of in patients.items()}
            rivals = [rival for rival in RIVALS
                      if rival in means and rows[rival].keys() != rows[OURS].keys()]  # else the same trainings
            words = WORDS[setting] + (", three times as long" if length else "")
            found.append({"setting": setting, "words": words, "full": full, "folds": sorted(folds), "means": means,
                          "intervals": {column: interval(of) for column, of in patients.items()},
                          "rival": max(rivals, key=means.__getitem__),
                          "gains": {rival: [ours - theirs for ours, theirs in zip(patients[OURS], patients[rival])]
                                    for rival in rivals},
                          "patients": [sorted(set(run["patients"])) for _, run in sorted(best[OURS].items())]})
    return found


def table(folder: Path) -> str:
    """The headline table: means after post-processing, and the gains over nnU-Net's ignore label and the best rival."""
    raw = {(line["words"], line["full"]): line for line in lines_of(folder, "dice")}
    text = ["| other images | full patients | "
            + " | ".join(f"**{column}**" if column == OURS else column for column in COLUMNS)
            + f" | gain over {STOCK} | gain over the best rival | the same before post-processing | folds |",
            "|" + "---|" * (len(COLUMNS) + 6)]
    for line in lines_of(folder):
        before = raw[line["words"], line["full"]]
        cells = [f"{line['means'][column]:.3f}" if column in line["means"] else "" for column in COLUMNS]
        cells.append(gain_text(line["gains"][STOCK]) if STOCK in line["gains"] else "")
        cells += [gain_text(of["gains"][of["rival"]]) for of in (line, before)]
        text.append(f"| {line['words']} | {line['full']} | {' | '.join(cells)} | {len(line['folds'])} |")
    return "\n".join(text)


def by_fold(folder: Path) -> str:
    """The gains over the best rival in each fold, and without the patients that have decided the defaults."""
    decided = {patient_of(case) for file in (HERE / "equal_terms").glob("*_0/*.json")
               for case in json.loads(file.read_text())["cases"]}
    lines = lines_of(folder)
    most = max((len(line["folds"]) for line in lines), default=0)
    text = ["| other images | best rival | " + " | ".join(f"fold {fold}" for fold in range(most))
            + " | patients that gain | without the patients that decided the defaults |", "|" + "---|" * (most + 4)]
    for line in lines:
        gains = line["gains"][line["rival"]]
        others = [of[[name not in decided for name in names]] for of, names in zip(gains, line["patients"])]
        cells = [f"{of.mean():+.3f}" for of in gains] + [""] * (most - len(gains))
        cells += [f"{(np.concatenate(gains) > 0).mean():.0%}", gain_text(others)]
        text.append(f"| {line['words']} | {line['rival']} | {' | '.join(cells)} |")
    return "\n".join(text)


def draw(folder: Path, file: Path) -> None:
    """Draw the table: a line for each kind of labels, a point with its 95 % interval for each column."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    lines = lines_of(folder)[::-1]
    figure, axis = plt.subplots(figsize=(9, 1.4 + 0.85 * len(lines)), layout="constrained")
    for place, line in enumerate(lines):
        for number, (column, mean) in enumerate(line["means"].items()):
            height = place + 0.12 * (2 - number)
            axis.plot(line["intervals"][column], (height, height), color=COLOURS[column])
            axis.plot(mean, height, "o", color=COLOURS[column], label=column if place == len(lines) - 1 else None)
    axis.set_yticks(range(len(lines)), [f"{line['words']}\n{line['full']} fully annotated patients"
                                        for line in lines])
    axis.set_xlabel("mean Dice of test patients after post-processing, with 95 % interval")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)
