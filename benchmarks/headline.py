"""The headline table and its figure, from the runs of five_folds.py.

A line is one kind of labels and one number of fully annotated patients. The columns are what a reader compares: the
fully annotated patients alone, the ignore label, ConfKD, and everything annotated. Of several rows in a column the best
counts, so that the rivals get the benefit of every doubt. ConfKD has one row, its default at equal cost. A row that was
run in fewer folds than another one of its column is left out.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
from five_folds import SETTINGS, home_of, interval, of_patients, read_all

COLUMNS = {"those alone": ("full_only", "full_cutmix"), "ignore label": ("ignore_uniform", "ignore"),
           "ConfKD": ("confkd_cost", "confkd_cutmix_cost"), "everything annotated": ("all",)}
OURS = "ConfKD"
COLOURS = {"those alone": "0.65", "ignore label": "tab:blue", "ConfKD": "tab:red", "everything annotated": "0.3"}
LEGEND = {"those alone": "the fully annotated patients alone", "ignore label": "the ignore label (no teacher)"}
WORDS = {"scribbles": "ACDC, expert scribbles", "scribbles_sparse": "ACDC, scribbles in a quarter of the slices",
         "erosion": "ACDC, eroded masks with background",
         "erosion_foreground": "ACDC, eroded masks without background", "unlabelled": "ACDC, unlabelled",
         "points": "Hippocampus, points", "points_sparse": "Hippocampus, points in a quarter of the slices",
         "points_3d": "Hippocampus 3-D, points"}


def lines_of(folder: Path, metric: str = "dice_pp") -> list[dict]:
    """Collect the lines that have ConfKD and at least one rival.

    Args:
        folder: Of the runs.
        metric: "dice", or "dice_pp" after post-processing.

    Returns:
        For each line "setting", "full", "folds", "means" and "intervals" of the columns, the "rival", which is the
        better of the first two columns, and "gain" (mean, low, high), of the folds that all columns have.
    """
    runs, found = read_all(folder), []
    for setting, table in SETTINGS.items():
        for full in table.full:
            rows: dict[str, dict[str, dict[int, dict]]] = {column: {} for column in COLUMNS}
            for column, names in COLUMNS.items():
                for row in names:
                    of = runs.get((home_of(setting, row), row, 0 if column == "everything annotated" else full))
                    if of and not (setting != "unlabelled" and "cutmix" in row):
                        rows[column][row] = of
            rows = {column: {row: of for row, of in choices.items() if len(of) == max(map(len, choices.values()))}
                    for column, choices in rows.items() if choices}
            if OURS not in rows or len(rows) < 2:
                continue
            folds = set.intersection(*(set(of) for column in rows.values() for of in column.values()))
            if not folds:
                continue
            best = {column: max(([run for fold, run in sorted(of.items()) if fold in folds] for of in choices.values()),
                                key=lambda of: np.concatenate(of_patients(dict(enumerate(of)), metric)).mean())
                    for column, choices in rows.items()}
            patients = {column: of_patients(dict(enumerate(of)), metric) for column, of in best.items()}
            means = {column: float(np.concatenate(of).mean()) for column, of in patients.items()}
            rival = max((column for column in list(COLUMNS)[:2] if column in means), key=means.__getitem__)
            gains = [ours - theirs for ours, theirs in zip(patients[OURS], patients[rival])]
            found.append({"setting": setting, "full": full, "folds": len(folds), "means": means, "rival": rival,
                          "intervals": {column: interval(of) for column, of in patients.items()},
                          "gain": (float(np.concatenate(gains).mean()), *interval(gains))})
    return found


def table(folder: Path) -> str:
    """The headline table: means after post-processing, and the gain over the better rival, raw and after."""
    raw = {(line["setting"], line["full"]): line["gain"] for line in lines_of(folder, "dice")}
    text = ["| other images | fully annotated patients | " + " | ".join(
        f"**{column}**" if column == OURS else column for column in COLUMNS) + " | gain raw | gain | folds |",
        "|" + "---|" * (len(COLUMNS) + 5)]
    for line in lines_of(folder):
        cells = [f"{line['means'][column]:.3f}" if column in line["means"] else "" for column in COLUMNS]
        gains = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*of)
                 for of in (raw[line["setting"], line["full"]], line["gain"])]
        text.append(f"| {WORDS[line['setting']]} | {line['full']} | {' | '.join([*cells, *gains])} | {line['folds']} |")
    return "\n".join(text)


def draw(folder: Path, file: Path) -> None:
    """Draw the table: a line for each kind of labels, a point with its 95 % interval for each column."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    lines = lines_of(folder)[::-1]
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.75 * len(lines)), layout="constrained")
    for place, line in enumerate(lines):
        for number, (column, mean) in enumerate(line["means"].items()):
            height = place + 0.12 * (1.5 - number)
            axis.plot(line["intervals"][column], (height, height), color=COLOURS[column])
            axis.plot(mean, height, "o", color=COLOURS[column],
                      label=LEGEND.get(column, column) if place == len(lines) - 1 else None)
    axis.set_yticks(range(len(lines)), [f"{WORDS[line['setting']]}\n{line['full']} fully annotated patients"
                                        for line in lines])
    axis.set_xlabel("mean Dice of test patients after post-processing, with 95 % interval")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(COLUMNS), frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)
