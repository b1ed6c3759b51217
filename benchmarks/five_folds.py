"""Every patient of ACDC and Hippocampus is tested once: the final tables, raw and after post-processing.

    python benchmarks/five_folds.py --data .../shared/data --work FOLDER --settings scribbles
    python benchmarks/five_folds.py --report

The protocol is in benchmarks/README.md. Each run writes one JSON file into benchmarks/five_folds/SETTING_FOLD/, and
runs that have one are skipped. The predictions of the test cases stay in FOLDER/SETTING_FOLD/predictions/, compressed.
So a new measure needs no new training. `--report` writes the tables into docs/explanation/results.md, the
headline (headline.py) into the README as well, and its figure into docs/.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import equal_terms
import numpy as np
from accuracy import FOLDS, TABLES, Row, Table, largest_components, predictions, prepare, run, spec_of
from accuracy import ROWS as USUAL_ROWS
from accuracy_report import gain_text as text_of_gain
from accuracy_report import patients_in, read_runs
from equal_terms import COST, COST_CUTMIX, HOW, LONG, choice_of, cost_completes, longer, measure_all, parsed
from equal_terms import ROWS as EQUAL_ROWS
from step_time import insert

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "five_folds"
TOLERANCE_MM = 2.0  # of the NSD
METRICS = {"dice": "Dice", "hd95_mm": "HD95_mm", "nsd": "NSD"}  # the name in a JSON file: that of evaluation.metrics

HIPPOCAMPUS = (40, 20, 120)  # patients to test, to validate and to train: a fifth, half a fifth and the rest of 200

# name: the table. `full` are the numbers of fully annotated patients.
SETTINGS: dict[str, Table] = {
    "scribbles": replace(TABLES["acdc_small"], full=(3, 1, 7)),
    "scribbles_sparse": replace(TABLES["acdc_small"], fraction=0.25),
    "erosion_foreground": replace(TABLES["acdc_small_erosion"], background=False),
    "erosion": TABLES["acdc_small_erosion"],
    "unlabelled": TABLES["acdc_small_none"],
    "points": replace(TABLES["hippocampus"], patients=HIPPOCAMPUS, full=(5, 3, 10)),
    "points_sparse": replace(TABLES["hippocampus"], patients=HIPPOCAMPUS, full=(5,), fraction=0.25),
    "points_3d": replace(TABLES["hippocampus_small_3d"], patients=HIPPOCAMPUS),
}
WORDS = equal_terms.WORDS | {"scribbles_sparse": "ACDC, scribbles in a quarter of the slices",
                             "points": "Hippocampus, points",
                             "points_sparse": "Hippocampus, points in a quarter of the slices",
                             "points_3d": "Hippocampus 3-D, points"}
# Rows that do not depend on the weak labels are run in the first of these settings alone.
SAME_IMAGES = (("scribbles", "scribbles_sparse", "erosion_foreground", "erosion", "unlabelled"),
               ("points", "points_sparse"))

KL = {"complete_at": 0.0}  # with eroded masks that annotate background, the trainer would choose to complete labels
ROWS: dict[str, Row] = {
    "full_only": replace(USUAL_ROWS["full_only"], title="the full patients alone"),
    "full_cutmix": replace(EQUAL_ROWS["full_cutmix"], title="the full patients alone, with CutMix",
                           settings={"cutmix": 0.5}),
    "ignore_uniform": USUAL_ROWS["ignore_uniform"],
    "ignore": Row("our trainer without a teacher", "ConfKDTrainer_partialOnly"),
    "paper": Row("the paper's objective", "ConfKDTrainer_MedIA2023"),
    "kl": Row("KL without hints", settings={"teacher_hints": False}),
    "confkd": Row("ConfKD with the KL", settings=KL),
    "confkd_cost": Row("ConfKD with the KL, at equal cost", settings=KL, steps=1 / COST),
    "confkd_cutmix_cost": Row("ConfKD, at equal cost", settings={"weight_kl": 3.0}, steps=1 / COST_CUTMIX),
    "labels_itself": Row("ConfKD, which labels the unlabelled images itself", settings={"complete_at": 0.4}),
    "completes_cost": Row("ConfKD with completed labels, at equal cost", settings={"complete_at": 0.25},
                          steps=1 / cost_completes(0.25)),
    "together_cost": Row("ConfKD with labels that both branches complete, at equal cost", settings={"complete_at": 0.5},
                         steps=1 / cost_completes(0.5, kl=True)),
    "all": replace(USUAL_ROWS["all"], title="everything annotated"),
}
USUAL = ("full_only", "ignore_uniform", "ignore", "confkd_cost", "all")
ALSO_LONGER = ("full_only", "ignore", "confkd_cost", "all")
LONGER_UNLABELLED = ("full_cutmix", "labels_itself")
ROWS |= longer(ROWS, (*ALSO_LONGER, *LONGER_UNLABELLED, "together_cost"))
NO_TEACHER = tuple(name for name in SETTINGS if name.startswith("points"))  # there ConfKD is the row "ignore"
# What all rows of a table are compared with, in the rows of the same length; else "ignore".
RIVAL = dict.fromkeys(NO_TEACHER, "full_only") | {"unlabelled": "full_cutmix"}
ROWS_OF = dict.fromkeys(SETTINGS, USUAL) | dict.fromkeys(NO_TEACHER, ("full_only", "ignore_uniform", "ignore", "all"))
ROWS_OF |= {
    "scribbles": tuple(name for name in ROWS if not name.startswith(("confkd_cutmix", "labels_itself", "together"))),
    "erosion": (*USUAL, "completes_cost", *(name + LONG for name in ALSO_LONGER)),
    "erosion_foreground": tuple(name for name in ROWS if "cutmix" not in name and "itself" not in name),
    "unlabelled": ("full_only", "full_cutmix", "confkd_cutmix_cost", "labels_itself", "all",
                   *(name + LONG for name in LONGER_UNLABELLED))}


def table_of(setting: str, fold: int) -> Table:
    """The table of a setting, with long epochs and bfloat16, as in equal_terms.py."""
    return replace(SETTINGS[setting], fold=fold, epoch=250, bfloat16=True)


def work_folder(root: Path, setting: str, fold: int) -> Path:
    """The folder of the preprocessed data."""
    return root / f"{setting}_{fold}"


def home_of(setting: str, row: str) -> str:
    """The setting in which a row is run: that of the setting, unless it does not depend on weak labels."""
    if ROWS[row].labels == "mixed":
        return setting
    return next((same[0] for same in SAME_IMAGES if setting in same), setting)


def specs_of(setting: str, fold: int, rows: Iterable[str], seeds: list[int]) -> list[dict]:
    """The runs of some rows. Rows that are compared with fewer full patients are run for the first number alone."""
    table, specs = table_of(setting, fold), []
    for seed in seeds:
        for name in rows:
            if name not in ROWS_OF[setting] or home_of(setting, name) != setting:
                continue
            row = ROWS[name]
            numbers = (0,) if row.labels == "all" else table.full if name in USUAL else table.full[:1]
            iterations = round(table.iterations * row.steps / table.epoch) * table.epoch
            specs += [spec_of(table, name, full, seed, "cpu", iterations, "test", row) for full in numbers]
    return specs


# ---- one run --------------------------------------------------------------------------------------------------------

def measured(trainer, roles: dict[str, list[str]], name: str, folder: Path) -> dict:
    """Choose the post-processing on the validation cases, and measure the test cases before and after it.

    Args:
        trainer: After its training.
        roles: {role: cases}
        name: Of the run.
        folder: Where the predictions of the test cases are written.

    Returns:
        "post_processing": what was chosen. "cases": {case: {"student": {class: metrics}}}; names with "_pp" are after
        post-processing. "completed": of :func:`completion.measured`.
    """
    import completion  # which imports this module
    classes = trainer.label_manager.foreground_labels
    chosen = choose_post_processing(predictions(trainer, roles["validation"], teacher=False), classes)
    cases, kept = {}, {}
    for case, _, truth, labels, _, spacing in predictions(trainer, roles["test"], teacher=False):
        kept[case] = labels.astype(np.uint8)
        cases[case] = {"student": measure_both(truth, labels, spacing, classes, *chosen)}
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / f"{name}.npz", **kept)
    kept_of = [int(c) for c, keep in zip(classes, chosen[1]) if keep]
    return {"post_processing": {"foreground": chosen[0], "classes": kept_of},
            "cases": cases,
            completion.KEY: completion.measured(trainer, *chosen)}


def choose_post_processing(predicted: Iterable[tuple], classes) -> tuple[bool, np.ndarray]:
    """As nnU-Net does. predicted: as of :func:`accuracy.predictions`. Returns :func:`equal_terms.choice_of`."""
    dice: dict[str, list] = {how: [] for how in HOW}
    for _, _, truth, labels, _, _ in predicted:
        masks = {"": {c: labels == c for c in classes}} | {
            f"_{how}": of for how, of in largest_components(labels, classes).items()}
        for how in HOW:
            dice[how].append([dice_of(truth == c, masks[how][c]) for c in classes])
    return choice_of({how: np.nanmean(values, 0) for how, values in dice.items()})


def dice_of(truth: np.ndarray, mask: np.ndarray) -> float:
    """Two masks' Dice; NaN if both are empty."""
    size = int(truth.sum()) + int(mask.sum())
    return 2 * int((truth & mask).sum()) / size if size else float("nan")


def post_processed(labels: np.ndarray, classes, foreground: bool, per_class) -> dict[int, np.ndarray]:
    """{class: mask} after the post-processing that :func:`choose_post_processing` has chosen."""
    components = largest_components(labels, classes)
    return {c: components["both" if foreground else "class"][c] if keep else
            components["foreground"][c] if foreground else labels == c for c, keep in zip(classes, per_class)}


def measure_both(truth: np.ndarray, labels: np.ndarray, spacing, classes, foreground: bool, per_class) -> dict:
    """{class: metrics} before and after post-processing; see :func:`measured`."""
    from nnunet_confkd.evaluation.metrics import measure_masks

    found: dict[str, dict] = {}
    for c, after in post_processed(labels, classes, foreground, per_class).items():
        found[str(c)] = {}
        for ending, mask in (("", labels == c), ("_pp", after)):
            of = measure_masks(truth == c, mask, spacing, tolerance_mm=TOLERANCE_MM)
            found[str(c)] |= {name + ending: round(of[key], 4) for name, key in METRICS.items()}
    return found


# ---- report ---------------------------------------------------------------------------------------------------------

def interval(differences: list[np.ndarray], draws: int = 4000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean difference, by a bootstrap that draws folds and then patients in each of them.

    Args:
        differences: One array for each fold, one value for each of its patients.
        draws: The number of draws.
        seed: Of the random numbers.
    """
    rng = np.random.default_rng(seed)
    folds = rng.integers(len(differences), size=(draws, len(differences)))
    sums, counts = np.zeros(folds.shape), np.zeros(folds.shape)
    for fold, values in enumerate(differences):
        places = folds == fold
        drawn = rng.integers(len(values), size=(int(places.sum()), len(values)))
        sums[places], counts[places] = values[drawn].sum(1), len(values)
    low, high = np.percentile(sums.sum(1) / counts.sum(1), (2.5, 97.5))
    return float(low), float(high)


def coverage(fold_sd: float, patient_sd: float, patients: int = 20, repetitions: int = 400) -> float:
    """How often :func:`interval` holds the true mean, if folds and patients differ by normal distributions."""
    rng = np.random.default_rng(0)
    hits = 0
    for repetition in range(repetitions):
        values = [rng.normal(0, fold_sd) + rng.normal(0, patient_sd, patients) for _ in range(FOLDS)]
        low, high = interval(values, draws=500, seed=repetition)
        hits += low <= 0 <= high
    return hits / repetitions


def by_patient(values: np.ndarray, patients: list[str]) -> np.ndarray:
    """The mean of each patient's cases, in the order of their names."""
    names = np.array(patients)
    return np.array([np.nanmean(values[names == name]) for name in sorted(set(patients))])


def of_patients(folds: Mapping[int, dict], metric: str) -> list[np.ndarray]:
    """The mean over classes, and then over the cases of each patient, by fold."""
    return [by_patient(np.nanmean(run[metric], 1), run["patients"]) for _, run in sorted(folds.items())]


def gain(ours: dict[int, dict], rival: dict[int, dict], metric: str) -> list[np.ndarray]:
    """Differences by patient, of each fold that both have."""
    folds = set(ours) & set(rival)
    pairs = zip(*(of_patients({fold: runs[fold] for fold in folds}, metric) for runs in (ours, rival)))
    return [of_ours - of_rival for of_ours, of_rival in pairs]


def gain_text(differences: list[np.ndarray]) -> str:
    """A mean gain with its interval; nothing without a fold."""
    return text_of_gain((float(np.concatenate(differences).mean()), *interval(differences)) if differences else None)


def values_of_run(content: dict) -> dict:
    """The metrics of each case and class, `(cases, classes)`, and the patient of each case."""
    cases = [case["student"] for case in content["cases"].values()]
    found = {name + ending: np.array([[of[name + ending] for of in case.values()] for case in cases], float)
             for name in METRICS for ending in ("", "_pp")}
    return {**found, "patients": patients_in({None: content})}


def read_all(*folders: Path, values: Callable[[dict], dict | None] = values_of_run
             ) -> dict[tuple[str, str, int], dict[int, dict]]:
    """{(setting, row, number of full patients): {fold: values}}; the row with all labels has 0 full patients.

    Args:
        folders: Each holds a folder for each setting and fold.
        values: Returns the values of a run, or None if it has none of them.
    """
    found: dict = {}
    for inside in sorted(path for folder in folders for path in folder.glob("*/")):
        setting, fold = inside.name.rsplit("_", 1)
        for (row, full, _), content in read_runs(inside).items():
            if (of_run := values(content)) is not None:
                found.setdefault((setting, row, full), {})[int(fold)] = of_run
    return found


def report(folder: Path) -> str:
    """One table for each setting and number of fully annotated patients, on test patients."""
    runs, lines = read_all(folder), []
    for setting, table in SETTINGS.items():
        for full in table.full:
            shown = {}
            for row in ROWS_OF[setting]:
                of = runs.get((home_of(setting, row), row, 0 if ROWS[row].labels == "all" else full))
                if of:
                    shown[row] = of
            ours = "ignore" if setting in NO_TEACHER else "confkd"
            if not any(row.startswith(ours) for row in shown):  # before, there is nothing to compare
                continue
            lines += [f"**{WORDS[setting]}, {full} full patients**", "",
                      "| row | Dice raw | Dice after | of each class | HD95 raw, mm | HD95 after, mm | NSD after | "
                      "gain raw | gain after | folds |", "|" + "---|" * 10]
            # a longer row alone, which was run for another setting, would be compared with nothing
            lines += [line_of(setting, row, shown) for row in shown
                      if not row.endswith(LONG) or rival_of(setting, row) in shown] + [""]
    return "\n".join(lines).rstrip()


def rival_of(setting: str, row: str) -> str:
    """The row of the same length that a row is compared with."""
    return RIVAL.get(setting, "ignore") + (LONG if row.endswith(LONG) else "")


def line_of(setting: str, row: str, shown: dict[str, dict[int, dict]]) -> str:
    """A line of a table."""
    folds = shown[row]

    def of_classes(metric: str) -> np.ndarray:
        return np.nanmean(np.concatenate([run[metric] for run in folds.values()]), 0)

    raw, after = (np.concatenate(of_patients(folds, metric)).mean() for metric in ("dice", "dice_pp"))

    rival = rival_of(setting, row)
    gains = ["" if row == rival else gain_text(gain(folds, shown.get(rival, {}), metric))
             for metric in ("dice", "dice_pp")]
    classes = " / ".join(f"{value:.3f}" for value in of_classes("dice_pp"))
    distances = f"{of_classes('hd95_mm').mean():.1f} | {of_classes('hd95_mm_pp').mean():.1f}"
    return (f"| {ROWS[row].title} (`{row}`) | {raw:.3f} | {after:.3f} | {classes} | {distances} | "
            f"{of_classes('nsd_pp').mean():.3f} | {gains[0]} | {gains[1]} | {len(folds)} |")


def main() -> None:
    args = parsed(__doc__, OUTPUT, SETTINGS, ROWS, draws=list(range(FOLDS)), seeds=[0])
    if args.prepare:
        table = table_of(args.prepare[0], int(args.prepare[1]))
        return prepare(table, args.data / table.data,
                       args.data / "acdc_scribbles" if table.style == "scribbles" else None, args.work)
    if args.run:
        return print(run(json.loads(args.run), args.work, args.output,
                         measured=partial(measured, folder=args.work / "predictions")))
    if not args.report:
        measure_all(args, __file__, specs_of, work_folder)
    text = report(args.output)
    if args.output == OUTPUT and text:
        import headline
        docs = HERE.parent / "docs"
        short = headline.table(OUTPUT)
        insert(HERE.parent / "README.md", "headline", short)
        for section, of in (("headline", short), ("by fold", headline.by_fold(OUTPUT)),
                            ("five folds", text)):
            insert(docs / "explanation" / "results.md", section, of)
        headline.draw(OUTPUT, docs / "results.png")
    else:
        print(text)


if __name__ == "__main__":
    main()
