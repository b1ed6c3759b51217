"""The tables and the plot of accuracy.py's runs, written into docs/explanation."""
from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from nnunet_confkd.dataset_conversion.acdc import TWINS
from step_time import insert

from nnunet_confkd.data.patients import patients_of
from nnunet_confkd.evaluation.metrics import bootstrap_interval
from nnunet_confkd.evaluation.tables import cases_text, mean_text, percent_text

DOCS = Path(__file__).parent.parent / "docs"
RIVAL, LOWER, UPPER = "ignore", "full_only", "all"
BRANCHES = {"confkd": ("student", "teacher")}  # of all other rows only what predicts is shown


def read_runs(folder: Path) -> dict[tuple[str, int, int], dict]:
    """{(row, number of full patients, seed): run}; the row with all labels has 0 full patients."""
    runs = {}
    for file in sorted(folder.glob("*.json")):
        run = json.loads(file.read_text())
        spec = run["spec"]
        runs[spec["name"], spec["full"], spec["seed"]] = run
    return runs


def read_tables(tables: dict, rows: dict, folder: Path) -> dict[str, dict]:
    """Return the runs of each table that has any.

    Rows without partially annotated images do not depend on the style of the partial annotations. Tables that differ
    only in this style therefore share these rows.
    """
    found = {name: runs for name in tables if (runs := read_runs(folder / name))}
    for name in found:
        for other, runs in found.items():
            if replace(tables[other], title="", style="") == replace(tables[name], title="", style=""):
                found[name] = {key: run for key, run in runs.items() if rows[key[0]].labels != "mixed"} | found[name]
    return found


def values_of(runs: dict, row: str, full: int, branch: str, metric: str) -> dict[int, np.ndarray]:
    """{seed: values}, `(cases, classes)`; of the entropy `(cases, 1)`."""
    found = {}
    for (name, count, seed), run in runs.items():
        if (name, count) == (row, full):
            cases = [case[branch] for case in run["cases"].values()]
            found[seed] = np.array([[case["entropy"]] if metric == "entropy" else
                                    [v[metric] for v in case.values() if isinstance(v, dict)] for case in cases])
    return found


def patients_in(runs: dict) -> list[str]:
    """Return the patient of each case; all runs of a table have the same cases.

    ED and ES of a heart are two cases of one patient.
    """
    patients = patients_of(next(iter(runs.values()))["cases"], r"(.+?)(?:_frame\d+)?$").values()
    return [TWINS[0] if patient in TWINS else patient for patient in patients]


def mean_of(values: dict[int, np.ndarray]) -> float:
    """Return the mean over classes of the mean over cases and seeds, without NaN."""
    return float(np.nanmean(np.nanmean(np.concatenate(list(values.values())), 0))) if values else math.nan


def paired_gain(ours: dict[int, np.ndarray], rival: dict[int, np.ndarray], patients: list[str]):
    """Return the mean difference over the common seeds and its 95 % interval, or None without a common seed.

    The interval is that of a bootstrap that draws seeds, and patients with all of their cases, the same for both rows.
    """
    seeds = sorted(set(ours) & set(rival))
    if not seeds:
        return None
    difference = np.stack([np.nanmean(ours[s], 1) - np.nanmean(rival[s], 1) for s in seeds])  # (seeds, cases)
    low, high = bootstrap_interval(difference, patients)
    return float(np.nanmean(difference)), low, high


def gain_text(gain: tuple[float, float, float] | None) -> str:
    """Write what :func:`paired_gain` returns; nothing for None."""
    return "" if gain is None else mean_text(dict(zip(("mean", "ci_low", "ci_high"), gain)), signed=True)


def table_of(table, rows: dict, runs: dict, rival: str, lower: str, upper: str) -> str:
    lines = []
    for full in table.full:
        shown = []
        for row, described in rows.items():
            count = 0 if described.labels == "all" else full
            for branch in BRANCHES.get(row, ("student",)):
                dice = values_of(runs, row, count, branch, "dice")
                if dice:
                    shown.append(
                        (row, described.title + (f", {branch}" if row in BRANCHES else ""), count, branch, dice)
                    )
        if not any(rows[row].labels == "mixed" for row, *_ in shown):
            continue
        classes = next(iter(shown[0][4].values())).shape[1]
        low, high = (
            mean_of(values_of(runs, row, count, "student", "dice")) for row, count in ((lower, full), (upper, 0))
        )
        rival_dice = values_of(runs, rival, full, "student", "dice")
        lines += [f"**{full} patients fully annotated**", "",
                  "| row | Dice | per class | gain over the ignore label, stratified | gap closed | HD95 mm | "
                  "entropy, nats | far false positives, ml | seeds | s, fastest run |", "|" + "---|" * 10]
        for row, title, count, branch, dice in shown:
            gain = paired_gain(dice, rival_dice, patients_in(runs)) if row != rival else None
            mean = mean_of(dice)
            per_class = [mean_of({s: v[:, [c]] for s, v in dice.items()}) for c in range(classes)]
            closed = (mean - low) / (high - low) if high > low else math.nan
            seconds = np.min([run["seconds"] for (name, n, _), run in runs.items() if (name, n) == (row, count)])
            lines.append(
                "| "
                + " | ".join(
                    [
                        f"**{title}**" if row == "confkd" and branch == "student" else title,
                        f"{mean:.3f}",
                        " / ".join(f"{v:.3f}" for v in per_class),
                        gain_text(gain),
                        "" if math.isnan(closed) else percent_text(closed, 0),
                        f"{mean_of(values_of(runs, row, count, branch, 'hd95_mm')):.2f}",
                        f"{mean_of(values_of(runs, row, count, branch, 'entropy')):.3f}",
                        f"{mean_of(values_of(runs, row, count, branch, 'far_ml')):.3f}",
                        str(len(dice)),
                        f"{seconds:.0f}",
                    ]
                )
                + " |"
            )
        lines.append("")
    return "\n".join(lines)


def describe(table, runs: dict) -> str:
    machines = sorted({run["machine"] for run in runs.values()})
    found = {
        package: sorted({run["versions"][package] for run in runs.values()})
        for package in next(iter(runs.values()))["versions"]
    }
    versions = ", ".join(f"{package} {' and '.join(of)}" for package, of in found.items())
    test, validation, train = table.patients
    patients = patients_in(runs)
    seconds = sum(run["seconds"] for run in runs.values())
    sentences = [
        f"{train} patients train, {validation} validate and {test} test. The figures are of "
        f"{cases_text(len(patients), len(set(patients)))}",
        f"Trainings have {table.iterations} iterations"
        + (f" of batches of {table.batch_size}" if table.batch_size else ""),
    ]
    if table.small:
        sentences.append(
            f"The plan is small: features 16 to 128, one convolution per stage, patches up to {table.max_patch} voxels "
            f"wide"
        )
    if table.spacing:
        sentences.append(f"Images are resampled to {' x '.join(f'{mm:g}' for mm in table.spacing)} mm")
    sentences += [
        f"{len(runs)} runs took {seconds / 3600:.1f} hours in sum ({', '.join(machines)})",
        f"Versions: {versions}",
        "*Far* is more than 5 mm from the class",
        "Intervals are of 95 %, by a paired bootstrap over seeds and over patients, each with all of their cases",
    ]
    return ". ".join(sentences) + "."


FLOOR = 0.42  # of the plot; what lies below stands at its foot, with its figure
STYLES = {
    "full_only": ("0.45", "s", ":"),
    "ignore_uniform": ("0.45", "x", "--"),
    "ignore": ("#0072B2", "o", "-"),
    "ignore_time": ("#56B4E9", "o", "--"),
    "decoders": ("#999933", "v", ":"),
    "kl": ("#009E73", "^", ":"),
    "entropy": ("#CC79A7", "<", ":"),
    "medIA2023": ("#E69F00", "^", ":"),
    "confkd": ("#D55E00", "D", "-"),
    "ipmi2021": ("0.65", "+", ":"),
    "all": ("black", "_", "-"),
}


def plot(tables: dict, rows: dict, results: dict, file: Path) -> None:
    """Plot Dice over the number of fully annotated patients.

    Each table with several such numbers has its own panel. All other tables share the last panel, side by side.
    """
    import textwrap

    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    numbers = {name: sorted({n for _, n, _ in runs} - {0}) or [tables[name].full[0]] for name, runs in results.items()}
    over = [name for name in results if len(numbers[name]) > 1]
    single = [name for name in results if len(numbers[name]) == 1]
    figure, axes = plt.subplots(
        1,
        len(over) + bool(single),
        figsize=(5 * len(over) + 1.7 * len(single) + 0.5, 6),
        squeeze=False,
        sharey=True,
        width_ratios=[5] * len(over) + [1.7 * len(single)] * bool(single),
        layout="constrained",
    )

    def draw(axis, row: str, name: str, places: dict[int, float]) -> None:
        color, marker, line = STYLES[row]
        everything = rows[row].labels == "all"
        points = []
        for n, x in places.items():
            # where ConfKD was run, the seeds that it was run with: others would shift the rows against it
            seeds = values_of(results[name], "confkd", n, "student", "dice")
            dice = [
                mean_of({s: v})
                for s, v in values_of(results[name], row, 0 if everything else n, "student", "dice").items()
                if not seeds or s in seeds
            ]
            if dice:
                points.append((x, np.mean(dice)))
                axis.plot([x] * len(dice), np.maximum(dice, FLOOR), ".", color=color, markersize=3)
                if points[-1][1] < FLOOR:
                    axis.annotate(
                        f"{points[-1][1]:.2f}", (x, FLOOR), (4, 2), textcoords="offset points", color=color, fontsize=8
                    )
        main = row in ("confkd", "ignore")
        axis.plot(
            [x for x, _ in points],
            [max(y, FLOOR) for _, y in points],
            color=color,
            marker=marker,
            linestyle=line,
            label=rows[row].title,
            linewidth=2.2 if main else 1.2,
            markersize=20 if everything else 8 if main else 6,
            zorder=3 if main else 2,
        )

    for axis, name in zip(axes.flat, over):
        for row in rows:
            draw(axis, row, name, {n: n for n in numbers[name]})
        axis.set(xlabel="fully annotated patients", xticks=numbers[name])
        axis.set_title(tables[name].title, fontsize=9)
    for x, name in enumerate(single):
        for row in rows:
            draw(axes.flat[-1], row, name, {numbers[name][0]: x})
    if single:
        axes.flat[-1].set_xticks(
            range(len(single)),
            [
                "\n".join(textwrap.wrap(f"{tables[name].title}, {numbers[name][0]} full patients", 17))
                for name in single
            ],
            fontsize=8,
        )
    axes.flat[0].set(ylabel="mean test Dice", ylim=(FLOOR - 0.01, None))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    shown = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize=8, markerscale=0.8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def trials_of(tables: dict, rows: dict, folder: Path) -> str:
    """What was tried, on the validation cases: Dice of the branches and the gain over the rival."""
    lines = []
    for name, table in tables.items():
        runs = read_runs(folder / f"{name}_validation")
        for full in table.full:
            rival = values_of(runs, RIVAL, full, "student", "dice")
            shown = [(row, described, 0 if described.labels == "all" else full) for row, described in rows.items()]
            shown = [(row, described, dice) for row, described, count in shown
                     if (dice := values_of(runs, row, count, "student", "dice"))]
            if not any(described.labels == "mixed" for _, described, _ in shown):
                continue
            lines += [
                f"**{table.title}, {full} patients fully annotated, {table.patients[1]} validation patients**",
                "",
                "| trial | student | teacher | student's gain over the ignore label, stratified | seeds |",
                "|---|---|---|---|---|",
            ]
            for row, described, dice in shown:
                gain = paired_gain(dice, rival, patients_in(runs)) if row != RIVAL else None
                first_run = next(run for (n, _, _), run in runs.items() if n == row)
                two = "teacher" in next(iter(first_run["cases"].values()))
                teacher = f"{mean_of(values_of(runs, row, full, 'teacher', 'dice')):.3f}" if two else ""
                lines.append(f"| {described.title} | {mean_of(dice):.3f} | {teacher} | "
                             f"{gain_text(gain)} | {len(dice)} |")
            lines.append("")
    return "\n".join(lines)


def write_report(tables: dict, rows: dict, trials: dict, folder: Path, docs: Path = DOCS) -> None:
    tried = trials_of(tables, {**rows, **trials}, folder)
    insert(docs / "explanation" / "tried.md", "accuracy trials", tried)
    results = read_tables(tables, rows, folder)
    if not results and tried:
        return
    if not results:
        raise SystemExit(f"{folder}: holds no runs")
    plot(tables, rows, results, docs / "accuracy.png")
    parts = [f"### {tables[name].title}\n\n{describe(tables[name], runs)}\n\n"
             f"{table_of(tables[name], rows, runs, RIVAL, LOWER, UPPER)}" for name, runs in results.items()]
    insert(
        docs / "explanation" / "accuracy.md",
        "accuracy tables",
        "![Dice over the number of fully annotated patients](../accuracy.png)\n\n" + "\n".join(parts),
    )
    insert(docs / "explanation" / "earlier_results.md", "accuracy table", short_table(tables, results))


SUMMARY = {
    "full_only": "full patients alone",
    "ignore": "ignore label",
    "ignore_time": "ignore label, equal time",
    "medIA2023": "published objective",
    "no_hints": "KL on all images, no hints",
    "confkd": "**ConfKD with hints**",
    "all": "everything annotated",
}
# These rows come from an independent check on 50 ACDC patients that this benchmark does not use. It trained with 3
# fully annotated and 57 other patients for 6000 iterations and one seed. Its raw figures are not in this repository.
# "post-processed" keeps the largest component of the foreground and of each class. Gains without an interval were not
# given; they are differences of the means.
INDEPENDENT = [
    ("ACDC 2-D, expert scribbles, 3 full; 50 other patients †",
     {"full_only": 0.583, "ignore": 0.692, "no_hints": 0.668, "confkd": 0.761, "all": 0.820}, "+0.069"),
    ("the same, post-processed †",
     {"full_only": 0.611, "ignore": 0.804, "no_hints": 0.694, "confkd": 0.808, "all": 0.852},
     "+0.004 [-0.004, +0.016]"),
    ("ACDC 2-D, erosion without background, 3 full; 50 other patients †", {"ignore": 0.666, "confkd": 0.718}, "+0.052"),
    ("the same, post-processed †", {"ignore": 0.752, "confkd": 0.770}, "+0.018 [+0.003, +0.037]")]


def short_table(tables: dict, results: dict) -> str:
    """Write the first table: mean test Dice of the main rows, with the number of seeds in brackets.

    Each number of fully annotated patients has a line. Means include only seeds that ConfKD was run with, too.
    """
    lines = [
        "| mean test Dice (number of seeds) | "
        + " | ".join([*SUMMARY.values(), "gain, equal iterations", "gain, equal time"])
        + " |",
        "|" + "---|" * (len(SUMMARY) + 3),
    ]
    for name, runs in results.items():
        for full in tables[name].full:
            ours = values_of(runs, "confkd", full, "student", "dice")
            if not ours:
                continue
            cells, gains = [], {}
            for row in SUMMARY:
                dice = values_of(runs, row, 0 if row == "all" else full, "student", "dice")
                dice = {seed: v for seed, v in dice.items() if seed in ours}
                gains[row] = paired_gain(ours, dice, patients_in(runs))
                cells.append(f"{mean_of(dice):.3f} ({len(dice)})" if dice else "")
            cells += [gain_text(gains[rival]) for rival in ("ignore", "ignore_time")]
            title = tables[name].title.replace(", reduced for a CPU", "")
            lines.append(f"| {title}, {full} full | " + " | ".join(cells) + " |")
    for title, dice, gain in INDEPENDENT:
        cells = [f"{dice[row]:.3f} (1)" if row in dice else "" for row in SUMMARY]
        lines.append(f"| {title} | " + " | ".join([*cells, gain, ""]) + " |")
    return "\n".join(lines)
