"""What does each part of the method gain, raw and after post-processing, at equal iterations and at equal cost?

    python benchmarks/equal_terms.py --data .../shared/data --work FOLDER --settings scribbles --rows ignore confkd
    python benchmarks/equal_terms.py --report

The protocol is in benchmarks/README.md. All figures are of validation patients. Each run writes one JSON file into
benchmarks/equal_terms/SETTING_DRAW/, and runs that have one are skipped. `--report` writes the tables into
benchmarks/README.md, and the short one and those of the questions into docs/explanation/ (see :func:`page_of`).
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accuracy import ROWS as USUAL_ROWS
from accuracy import (
    TABLES,
    Row,
    Table,
    environment,
    prepare,
    run,
    run_name,
    spec_of,
    still_to_do,
    with_earlier_defaults,
)
from accuracy_report import gain_text, paired_gain, patients_in, read_runs
from step_time import insert

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "equal_terms"

# name: the table, and the number of fully annotated patients
SETTINGS: dict[str, tuple[Table, int]] = {
    "scribbles": (TABLES["acdc_small"], 3),
    "erosion": (TABLES["acdc_small_erosion"], 3),
    "erosion_foreground": (replace(TABLES["acdc_small_erosion"], background=False), 3),
    "unlabelled": (TABLES["acdc_small_none"], 3),
    "points_5": (replace(TABLES["hippocampus"], full=(5, 10)), 5),
    "points_10": (replace(TABLES["hippocampus"], full=(5, 10)), 10),
}
DRAWS, SEEDS = (0, 1), (0, 1)
# largest components that are kept: none, of the foreground, of each class, or of the foreground and then each class
HOW = ("", "_foreground", "_class", "_both")
# The rows of the short table: rivals, of which the best counts, and the trainer's defaults. CutMix is one of them
# where all other images are unlabelled. The rivals of `MORE` count where they were run as often.
STOCK = "ignore_uniform"
MORE = ("ignore", "ignore_prior", "ignore_quarter", "ignore_prior_quarter", "ignore_three_quarters", "cutmix_full",
        "ignore_equal", "ignore_equal_quarter", "ignore_prior_equal_quarter")
# ConfKD's row, the last, has the settings that its trainer chooses from these data. With points there is no teacher.
SHORT = {"scribbles": ("ignore_equal_quarter", "apart_watershed_cost"),
         "erosion": ("ignore_prior_equal_quarter", "completes_corrected_cost"),
         "erosion_foreground": ("ignore_quarter", "equal_cost"),
         "unlabelled": ("full_only", "full_cutmix", "labels_itself"),
         "points_5": ("full_only", "ignore"), "points_10": ("full_only", "ignore_three_quarters")}
# What a row is compared with: what the trainer without a teacher chooses from these data, or the full patients alone.
RIVALS = {setting: rows[0] for setting, rows in SHORT.items()} | {"points_5": "ignore"}
WORDS = {"scribbles": "ACDC, scribbles", "erosion": "ACDC, eroded masks with background",
         "erosion_foreground": "ACDC, eroded masks without background", "unlabelled": "ACDC, unlabelled images",
         "points_5": "Hippocampus, points", "points_10": "Hippocampus, points"}


class Columns(NamedTuple):
    """A table with a line for each setting.

    Attributes:
        titles: Of the columns.
        gains: Numbers of columns, ours and the rival's, of which the gain is shown.
        rows: {setting: row of each column}
    """
    titles: tuple[str, ...]
    gains: tuple[tuple[int, int], ...]
    rows: dict[str, tuple[str, ...]]


COLUMNS = {
    "completed": Columns(("labels completed", "KL"), ((0, 1),), {
        "erosion": ("completes_corrected_cost", "apart_corrected_watershed_cost"),
        "scribbles": ("completes_cost", "apart_watershed_cost"),
        "erosion_foreground": ("completes_equal_cost", "equal_cost")}),
    "hints and KL": Columns(("no teacher", "two decoders", "KL without hints", "KL with hints"),
                            ((2, 1), (3, 1), (3, 2)), {
        "scribbles": ("ignore_equal_quarter", "equal_decoders_cost", "apart_nohints_cost", "apart_watershed_cost"),
        "erosion": ("ignore_prior_equal_quarter", "equal_corrected_decoders_cost", "apart_corrected_nohints_cost",
                    "apart_corrected_watershed_cost"),
        "erosion_foreground": ("ignore_quarter", "equal_decoders_cost", "equal_nohints_cost", "equal_cost")}),
}

# The questions that the pages answer: the setting, what all are compared with, and the rows.
QUESTIONS = {
    "hints": ("erosion_foreground", "decoders", ("decoders", "entropy_0.1", "paper_kl", "paper_0.1", "kl", "hints_kl",
                                                 "confkd")),
    "other entropy": ("erosion_foreground", "decoders", ("decoders", "entropy_0.01", "entropy_0.3", "paper_0.01",
                                                         "paper_0.3")),
    "unlabelled": ("unlabelled", "full_cutmix", ("full_only", "full_cutmix", "cutmix_three_quarters_cost",
                                                 "labels_itself")),
    "longer unlabelled": ("unlabelled", "full_cutmix_long", ("full_cutmix_long", "labels_itself_long")),
    "points": ("points_5", "ignore", ("full_only", "ignore", "confkd_cost")),
    "more points": ("points_10", "full_only", ("full_only", "today_cost", "ignore_three_quarters")),
    "longer": ("scribbles", "ignore_equal_quarter", ("ignore_equal_quarter", "equal_cost", "ignore_equal_quarter_long",
                                                     "equal_cost_long", "completes_cost_long")),
    "longer erosion": ("erosion", "ignore_prior_equal_quarter_long", ("ignore_prior_equal_quarter_long",
                                                                      "apart_corrected_reach_cost_long",
                                                                      "completes_corrected_cost_long")),
    "longer foreground": ("erosion_foreground", "ignore_quarter_long", ("ignore_quarter_long", "equal_cost_long",
                                                                        "together_cost_long")),
}

# of the questions that are not on the page of the results
PAGES = ({"completed": "method", "hints and KL": "hints"}
         | dict.fromkeys(("points", "other entropy"), "tried")
         | dict.fromkeys(("unlabelled", "longer unlabelled"), "unlabelled")
         | dict.fromkeys(("longer", "longer erosion", "longer foreground", "more points"), "weights_and_batches"))

# A step takes this many of the rival's, on average over a training: for a plain 2-D U-Net and half of a batch full,
# before the KL has a weight and from then on (step_time.py on a CPU; bounds by FLOPs 1.091 and 1.121). A row "at equal
# cost" has fewer. With CutMix half of the steps have one more pass through the encoder, which is a tenth of a step.
COST = 0.2 * 1.146 + 0.8 * 1.171
COST_CUTMIX = COST + 0.5 * 0.1
COST_WIDE = 0.2 * 1.345 + 0.8 * 1.456


def cost_completes(share: float, kl: bool = False) -> float:
    """The cost of a mean iteration if the first of two stages has this share of them.

    The teacher is run in the first stage alone. There is no KL, or one that begins after a fifth of all iterations. To
    complete the labels takes time as well, which does not grow with the length of the training and is not counted.
    """
    return share * 1.146 + 1 - share + (1.171 - 1.146) * max(0, share - 0.2) * kl


ROWS: dict[str, Row] = with_earlier_defaults({
    "full_only": USUAL_ROWS["full_only"],
    "ignore_uniform": USUAL_ROWS["ignore_uniform"],
    "ignore": replace(USUAL_ROWS["ignore"], title="no teacher, stratified batches"),
    "ignore_prior": Row("no teacher, the class-prior correction", "ConfKDTrainer_partialOnly"),
    "decoders": USUAL_ROWS["decoders"],
    "kl": Row("KL on all images, no hints, no entropy", settings={"teacher_hints": False, "weight_entropy": 0.0}),
    "confkd": Row("ConfKD"),
    "confkd_cost": Row("ConfKD, at equal cost", steps=1 / COST),
    "confkd_cutmix_cost": Row("ConfKD with CutMix, at equal cost", settings={"cutmix": 0.5}, steps=1 / COST_CUTMIX),
    "full_cutmix": Row("full cases only, with CutMix", "ConfKDTrainer_partialOnly", "full", settings={"cutmix": 0.5}),
    "corrected_cost": Row("ConfKD with the class-prior correction, at equal cost", settings={"prior_correction": 1.0},
                          steps=1 / COST),
    # a quarter of each batch fully annotated, and not a half; the step is cheaper then, which is not counted
    "ignore_quarter": Row("no teacher, a quarter of each batch full", "ConfKDTrainer_partialOnly",
                          settings={"prior_correction": 0.0, "full_share": 0.25}),
    "ignore_prior_quarter": Row("no teacher, the class-prior correction, a quarter of each batch full",
                                "ConfKDTrainer_partialOnly", settings={"full_share": 0.25}),
    "quarter_cost": Row("ConfKD, a quarter of each batch full, at equal cost", settings={"full_share": 0.25},
                        steps=1 / COST),
    "ignore_three_quarters": Row("no teacher, three quarters of each batch full", "ConfKDTrainer_partialOnly",
                                 settings={"prior_correction": 0.0, "full_share": 0.75}),
    "cutmix_full": Row("no teacher, full images exchange boxes", "ConfKDTrainer_partialOnly",
                       settings={"prior_correction": 0.0, "cutmix_full": 0.5}),
    "cutmix_full_cost": Row("ConfKD, full images exchange boxes, at equal cost", settings={"cutmix_full": 0.5},
                            steps=1 / COST),
    # the fully annotated images and the others have equal weights in L_w
    "equal_cost": Row("ConfKD, equal weights of both kinds of images, at equal cost", settings={"equal_kinds": True},
                      steps=1 / COST),
    "equal_corrected_cost": Row("ConfKD, equal weights and the class-prior correction, at equal cost",
                                settings={"equal_kinds": True, "prior_correction": 1.0}, steps=1 / COST),
    "equal_quarter_cost": Row("ConfKD, equal weights, a quarter of each batch full, at equal cost",
                              settings={"equal_kinds": True, "full_share": 0.25}, steps=1 / COST),
    "equal_corrected_quarter_cost": Row("ConfKD, equal weights, the correction, a quarter full, at equal cost",
                                        settings={"equal_kinds": True, "prior_correction": 1.0, "full_share": 0.25},
                                        steps=1 / COST),
    "equal_kl_partial_cost": Row("ConfKD, equal weights, KL on the other images alone, at equal cost",
                                 settings={"equal_kinds": True, "kl_images": "partial"}, steps=1 / COST),
    "equal_corrected_kl_partial_cost": Row("ConfKD, equal weights, the correction, KL on the others alone, equal cost",
                                           settings={"equal_kinds": True, "prior_correction": 1.0,
                                                     "kl_images": "partial"}, steps=1 / COST),
    "ignore_equal": Row("no teacher, equal weights of both kinds", "ConfKDTrainer_partialOnly",
                        settings={"prior_correction": 0.0, "equal_kinds": True}),
    "ignore_equal_quarter": Row("no teacher, equal weights of both kinds, a quarter of each batch full",
                                "ConfKDTrainer_partialOnly",
                                settings={"prior_correction": 0.0, "equal_kinds": True, "full_share": 0.25}),
    "ignore_prior_equal": Row("no teacher, the correction, equal weights", "ConfKDTrainer_partialOnly",
                              settings={"equal_kinds": True}),
    "ignore_prior_equal_quarter": Row("no teacher, the correction, equal weights, a quarter full",
                                      "ConfKDTrainer_partialOnly", settings={"equal_kinds": True, "full_share": 0.25}),
    # the teacher's supervised loss updates its decoder alone
    "apart_cost": Row("ConfKD, equal weights, a teacher that does not train the encoder, at equal cost",
                      settings={"equal_kinds": True, "teacher_trains_encoder": False}, steps=1 / COST),
    "apart_corrected_cost": Row("ConfKD, equal weights, the correction, a teacher that does not train the encoder, at "
                                "equal cost", settings={"equal_kinds": True, "prior_correction": 1.0,
                                                        "teacher_trains_encoder": False}, steps=1 / COST),
    "apart_quarter_cost": Row("ConfKD, equal weights, a teacher that does not train the encoder, a quarter of each "
                              "batch full, at equal cost", settings={"equal_kinds": True, "full_share": 0.25,
                                                                     "teacher_trains_encoder": False}, steps=1 / COST),
    "apart_joint_cost": Row("ConfKD, a teacher that does not train the encoder, at equal cost",
                            settings={"teacher_trains_encoder": False}, steps=1 / COST),
    "cutmix_three_quarters_cost": Row("ConfKD with CutMix, three quarters of each batch full, at equal cost",
                                      settings={"cutmix": 0.5, "full_share": 0.75}, steps=1 / COST_CUTMIX),
    "wide_cost": Row("ConfKD with a teacher as wide as the student, at equal cost",
                     settings={"teacher_width": 1.0}, steps=1 / COST_WIDE),
    "all": USUAL_ROWS["all"],
    # the paper's claim that entropy and KL together gain
    "entropy_0.01": Row("entropy of weight 0.01, no KL", settings={"weight_kl": 0.0, "weight_entropy": 0.01}),
    "entropy_0.1": Row("entropy of weight 0.1, no KL", settings={"weight_kl": 0.0, "weight_entropy": 0.1}),
    "entropy_0.3": Row("entropy of weight 0.3, no KL", settings={"weight_kl": 0.0, "weight_entropy": 0.3}),
    "paper_kl": Row("the paper's KL, no entropy", "ConfKDTrainer_MedIA2023", settings={"weight_entropy": 0.0}),
    "paper_0.01": Row("the paper's KL, entropy of weight 0.01", "ConfKDTrainer_MedIA2023",
                      settings={"weight_entropy": 0.01}),
    "paper_0.1": Row("the paper's KL, entropy of weight 0.1", "ConfKDTrainer_MedIA2023",
                     settings={"weight_entropy": 0.1}),
    "paper_0.3": Row("the paper's KL, entropy of weight 0.3", "ConfKDTrainer_MedIA2023",
                     settings={"weight_entropy": 0.3}),
    "hints_kl": Row("ConfKD without entropy", settings={"weight_entropy": 0.0}),
    "hints_0.1": Row("ConfKD, entropy of weight 0.1", settings={"weight_entropy": 0.1}),
    "hints_0.3": Row("ConfKD, entropy of weight 0.3", settings={"weight_entropy": 0.3}),
})
# the share of full images that the trainer chooses for these points
ROWS["today_cost"] = Row("ConfKD with the KL, and the share chosen from the data, at equal cost",
                         settings={"weight_kl": 3.0, "equal_kinds": False, "prior_correction": 0.0,
                                   "teacher_trains_encoder": True}, steps=1 / COST)
# The network labels the unlabelled images itself. There is no teacher, so that it costs as much as without them.
ROWS["labels_itself"] = Row("ConfKD, which labels the unlabelled images itself",
                            settings={"complete_at": 0.4, "cutmix": 0.5})
# What is chosen for scribbles and for eroded masks, with a weaker or a stronger KL.
ROWS |= {f"{name}_kl{weight}": replace(ROWS[name], title=f"{ROWS[name].title}; KL of weight {weight}",
                                       settings=ROWS[name].settings | {"weight_kl": float(weight)})
         for name in ("apart_cost", "apart_corrected_cost") for weight in (1, 10)}
# The same settings with hints that stay as far from borders as real annotations; the rows above were run before.
ROWS["apart_corrected_margins_cost"] = replace(
    ROWS["apart_corrected_cost"], title=f"{ROWS['apart_corrected_cost'].title}; hints stay away from borders")
# The same with hints that reach their neighbourhood, and a background that is annotated round the foreground.
ROWS |= {name: replace(ROWS[of], title=f"{ROWS[of].title}; hints that reach further",
                       settings=ROWS[of].settings | {"hint_reach": 4})
         for name, of in (("apart_reach_cost", "apart_cost"), ("equal_reach_cost", "equal_cost"),
                          ("apart_corrected_reach_cost", "apart_corrected_margins_cost"))}
# The same with hints that a watershed also spreads over the image.
ROWS |= {name: replace(ROWS[of], title=f"{ROWS[of].title}; a watershed spreads the hints",
                       settings=ROWS[of].settings | {"hint_watershed": True})
         for name, of in (("apart_watershed_cost", "apart_reach_cost"),
                          ("apart_corrected_watershed_cost", "apart_corrected_reach_cost"))}
# A second stage, in which the student alone learns from labels that the teacher has completed.
APART = "a teacher that does not train the encoder, "  # it does in the first stage
COMPLETES = {"": (0.25, "a quarter"), "late_": (0.4, "two fifths")}
ROWS |= {name.replace("_cost", f"_{when}cost"): replace(
    ROWS[of], title=f"{ROWS[of].title.replace(APART, '')}; the teacher completes the labels, after {words}",
    settings=ROWS[of].settings | {"complete_at": share, "weight_kl": 0.0, "teacher_trains_encoder": True},
    steps=1 / cost_completes(share))
    for when, (share, words) in COMPLETES.items()
    for name, of in (("completes_cost", "apart_watershed_cost"), ("completes_equal_cost", "equal_cost"),
                     ("completes_corrected_cost", "apart_corrected_watershed_cost"))}
# Without annotated background the KL comes first, and both branches complete the labels.
ROWS["together_cost"] = replace(
    ROWS["equal_cost"], title=f"{ROWS['equal_cost'].title}; both branches complete the labels, after half",
    settings=ROWS["equal_cost"].settings | {"complete_at": 0.5}, steps=1 / cost_completes(0.5, kl=True))
# The same without KL: a short first stage of two_stages.py, whose teacher completes the labels.
ROWS |= {name: replace(ROWS[of], title=f"{ROWS[of].title}; no KL, and the teacher trains the encoder", settings={
    **ROWS[of].settings, "kl_ramp_start": 1.0, "kl_ramp_end": 1.0, "teacher_trains_encoder": True})
    for name, of in (("teacher_watershed", "apart_watershed_cost"), ("teacher_equal", "equal_cost"),
                     ("teacher_corrected_watershed", "apart_corrected_watershed_cost"))}
# What the trainers choose, with a teacher that is not shown the annotations.
ROWS |= {name.replace("_cost", "_nohints_cost"): replace(ROWS[name], title=f"{ROWS[name].title}; no hints",
                                                         settings=ROWS[name].settings | {"teacher_hints": False})
         for name in ("apart_cost", "apart_corrected_cost", "equal_cost")}
# The same weights without KL and entropy, with as many iterations as ConfKD at equal cost. The teacher trains the
# encoder here. Otherwise it would change nothing of the student.
ROWS |= {name.replace("_cost", "_decoders_cost"): replace(
    ROWS[name], title=f"two decoders, no KL, no entropy, {words}; as many iterations as ConfKD at equal cost",
    settings=ROWS[name].settings | {"weight_kl": 0.0, "weight_entropy": 0.0})
    for name, words in (("equal_cost", "equal weights"), ("equal_corrected_cost", "equal weights, the correction"))}
# What the trainer chooses for scribbles, with as many iterations as the rival.
ROWS["apart_watershed"] = replace(ROWS["apart_watershed_cost"], steps=1.0,
                                  title=ROWS["apart_watershed_cost"].title.replace("equal cost", "equal iterations"))
# Rows that are made once without bfloat16, to check that it changes nothing.
FLOAT32 = "_float32"
ROWS |= {name + FLOAT32: replace(ROWS[name], title=f"{ROWS[name].title}; float32")
         for name in ("ignore", "confkd_cost")}
LONG, LONGER = "_long", 3


def longer(rows: Mapping[str, Row], names: Iterable[str]) -> dict[str, Row]:
    """Some rows at `LONGER` times the length, to see whether gains fade or grow."""
    return {name + LONG: replace(rows[name], title=f"{rows[name].title}; {LONGER} times as long",
                                 steps=LONGER * rows[name].steps) for name in names}


ROWS |= longer(ROWS, ("ignore_equal_quarter", "equal_cost", "full_cutmix", "cutmix_three_quarters_cost",
                      "ignore_prior_equal_quarter", "apart_corrected_reach_cost", "ignore_quarter", "equal_reach_cost",
                      "completes_corrected_cost", "completes_cost", "apart_watershed_cost", "labels_itself",
                      "together_cost"))


def table_of(setting: str, draw: int) -> Table:
    """The table of a setting, with long epochs and bfloat16 (on CPUs that compute in it), which make runs cheap."""
    return replace(SETTINGS[setting][0], draw=draw, epoch=250, bfloat16=True)


def work_folder(root: Path, setting: str, draw: int) -> Path:
    """The folder of the preprocessed data. Settings that differ in the number of full patients share it."""
    first = next(name for name, (table, _) in SETTINGS.items() if table == SETTINGS[setting][0])
    return root / f"{first}_{draw}"


def specs_of(setting: str, draw: int, rows: list[str], seeds: list[int]) -> list[dict]:
    table, full = table_of(setting, draw), SETTINGS[setting][1]
    specs = []
    for seed in seeds:
        for name in rows:
            row = ROWS[name]
            iterations = round(table.iterations * row.steps / table.epoch) * table.epoch
            table = replace(table, bfloat16=not name.endswith(FLOAT32))
            specs.append(spec_of(table, name, 0 if row.labels == "all" else full, seed, "cpu", iterations,
                                 "validation", row))
    return specs


# ---- runs -----------------------------------------------------------------------------------------------------------

def prepare_data(setting: str, draw: int, data: Path, work: Path) -> None:
    table = table_of(setting, draw)
    prepare(table, data / table.data, data / "acdc_scribbles" if table.style == "scribbles" else None, work)


def measure_all(args, script: str | None = None, specs: Callable = specs_of, folder: Callable = work_folder) -> None:
    """Prepare the data and run what is missing, each step in a process of its own with its nnU-Net folders.

    Args:
        args: Those of the command line.
        script: The script that each process runs; default: this one.
        specs: Gives the runs of a setting, as :func:`specs_of`.
        folder: Gives the folder of the data of a setting, as :func:`work_folder`.
    """
    def child(work: Path, *options: str) -> None:
        variables = os.environ | environment(work, "cpu")
        with open(work / "log.txt", "a") as log:
            subprocess.run([sys.executable, script or __file__, "--work", str(work), *options], check=True, stdout=log,
                           stderr=log, env=variables)

    def train(job: tuple[str, int, dict]) -> bool:
        setting, draw, spec = job
        try:
            child(folder(args.work, setting, draw), "--run", json.dumps(spec), "--output",
                  str(args.output / f"{setting}_{draw}"))
        except subprocess.CalledProcessError:
            print(f"FAILED: {setting} {draw} {run_name(spec)}", flush=True)
            return False
        print(f"{setting} {draw} {run_name(spec)}", flush=True)
        return True

    jobs = []
    for setting in args.settings:
        for draw in args.draws:
            child(folder(args.work, setting, draw), "--prepare", setting, str(draw), "--data", str(args.data))
    for seed in args.seeds:  # all settings once before any a second time
        for draw in args.draws:
            for setting in args.settings:
                output = args.output / f"{setting}_{draw}"
                output.mkdir(parents=True, exist_ok=True)
                missing = still_to_do(specs(setting, draw, args.rows, [seed]), output)
                jobs += [(setting, draw, spec) for spec in missing]
    print(f"{len(jobs)} runs", flush=True)
    with ThreadPoolExecutor(args.processes) as pool:
        if not all(list(pool.map(train, jobs))):
            raise SystemExit(f"some runs failed; see log.txt in the folders below {args.work}")


# ---- report ---------------------------------------------------------------------------------------------------------

def post_processed(student: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Choose a run's post-processing as nnU-Net does, and return the Dice and the HD95 after it, `(cases, classes)`.

    The largest component of the foreground is kept if this raises the mean Dice and lowers no class's. Then the
    largest component of each class is kept if this raises its Dice.

    Args:
        student: Values of :func:`accuracy.measure_post_processed` by name, `(cases, classes)` each.
    """
    foreground, per_class = choice_of({how: np.nanmean(student[f"dice{how}"], 0) for how in HOW})
    base, both = ("_foreground", "_both") if foreground else ("", "_class")
    return {metric: np.where(per_class, student[metric + both], student[metric + base])
            for metric in ("dice", "hd95_mm")}


def choice_of(means: Mapping[str, np.ndarray]) -> tuple[bool, np.ndarray]:
    """Choose whether to keep the largest component of the foreground, and of which classes, `(classes,)`.

    Args:
        means: The mean Dice of each class, `(classes,)`, by what was kept: one of `HOW`.
    """
    raw, foreground = means[""], means["_foreground"]
    keep_foreground = bool(foreground.mean() > raw.mean() and (foreground >= raw).all())
    base, both = ("_foreground", "_both") if keep_foreground else ("", "_class")
    return keep_foreground, means[both] > means[base]


def values_of_run(content: dict) -> dict:
    """Return a run's values of each case: "dice", "hd95_mm", and both with "_pp" after post-processing."""
    cases = [case["student"] for case in content["cases"].values()]
    student = {name: np.array([[of[name] for of in case.values() if isinstance(of, dict)] for case in cases], float)
               for name in cases[0]["1"]}
    after = {f"{metric}_pp": values for metric, values in post_processed(student).items()}
    return {"patients": patients_in({None: content}), "title": content["spec"]["row"]["title"], **student, **after}


def read_all(folder: Path) -> dict[tuple[str, int], dict[tuple[str, int], dict]]:
    """{(setting, draw): {(row, seed): run}}"""
    found = {}
    for inside in sorted(folder.glob("*/")):
        setting, draw = inside.name.rsplit("_", 1)
        found[setting, int(draw)] = {(row, seed): values_of_run(run)
                                     for (row, _, seed), run in read_runs(inside).items()}
    return found


def runs_of(runs: dict, setting: str) -> dict[tuple[int, str, int], dict]:
    """{(draw, row, seed): run} of a setting"""
    return {(draw, *key): run for (name, draw), found in runs.items() if name == setting for key, run in found.items()}


def runs_of_all(of_setting: dict[tuple[int, str, int], dict], rows: Iterable[str]) -> set[tuple[int, int]]:
    """The (draw, seed) that all of the rows have been run with."""
    return set.intersection(*({(draw, seed) for draw, name, seed in of_setting if name == row} for row in rows))


def mean_of(runs: Iterable[dict], metric: str) -> float:
    """The mean over runs, classes and cases, in this order from outside."""
    return float(np.mean([np.nanmean(np.nanmean(run[metric], 0)) for run in runs]))


def short_table(folder: Path) -> str:
    """A line for each setting, of the draws and seeds that all of its rows have been run with."""
    lines = ["| other images | full patients | full patients alone | nnU-Net's ignore label | "
             "our trainer, no teacher | **ConfKD** | gain | trainings |", "|" + "---|" * 8]
    runs = read_all(folder)
    for setting, (table, full) in SETTINGS.items():
        of_setting = runs_of(runs, setting)
        *others, own = SHORT[setting]
        rows = dict.fromkeys(row for row in (STOCK, *MORE, *others) if row != own)
        of_row = {row: {(draw, seed): run for (draw, name, seed), run in of_setting.items() if name == row}
                  for row in (*rows, own)}
        common = set.intersection(*(set(of_row[row]) for row in SHORT[setting]))
        if not common:
            continue
        of_row = {row: {key: of[key] for key in common} for row, of in of_row.items() if common <= set(of)}
        means = {row: mean_of(of.values(), "dice_pp") for row, of in of_row.items()}
        *rivals, ours = of_row
        best = max(rivals, key=means.__getitem__)
        gain = paired_gain(*({key: run["dice_pp"] for key, run in of_row[row].items()} for row in (ours, best)),
                           next(iter(of_setting.values()))["patients"])
        ours_without_teacher = [means[row] for row in of_row if row in MORE]
        if ours_without_teacher:
            # the same patients, whatever the labels of the others are
            same = [name for name, (other, number) in SETTINGS.items() if (other.data, number) == (table.data, full)]
            alone = [run for name in same for key, run in runs_of(runs, name).items()
                     if key[1] == "full_only" and key[::2] in common]
            first = mean_of(alone, "dice_pp") if len(alone) == len(common) else None
        else:
            first = means[best]
        columns = (first, means.get(STOCK), max(ours_without_teacher, default=None), means[ours])
        cells = [*("" if value is None else f"{value:.3f}" for value in columns), gain_text(gain), str(len(common))]
        lines.append(f"| {WORDS[setting]} | {full} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(folder: Path, rivals: Mapping[str, str] = RIVALS, rows: Mapping[str, Row] = ROWS) -> str:
    """One table for each setting: means over draws and seeds, and gains over the rival in the same draws and seeds.

    Args:
        folder: Of the runs.
        rivals: {setting: row that the others are compared with}, in the order of the tables.
        rows: In the order of the tables, with their titles. Others come last, with the title that they were run with.
    """
    runs = read_all(folder)
    parts = []
    for setting, rival in rivals.items():
        of_setting = runs_of(runs, setting)
        if of_setting:
            names = dict.fromkeys([*rows, *(key[1] for key in of_setting)])
            parts.append(f"**{setting}**\n\nGains are over `{rival}`.\n\n"
                         f"{table_of_rows(of_setting, rival, names, rows)}")
    return "\n\n".join(parts)


def table_of_rows(runs: dict[tuple[int, str, int], dict], rival: str, names: Iterable[str],
                  rows: Mapping[str, Row] = ROWS) -> str:
    """A table of some rows of a setting.

    Args:
        runs: As of :func:`runs_of`.
        rival: The row that the others are compared with.
        names: Of the rows. Those without runs are left out.
        rows: Their titles. Others have the title that they were run with.
    """
    lines = ["| row | Dice raw | Dice after | HD95 raw, mm | HD95 after, mm | gain raw | gain after | runs |",
             "|" + "---|" * 8]
    for row in names:
        chosen, others = ({(draw, seed): run for (draw, name, seed), run in runs.items() if name == wanted}
                          for wanted in (row, rival))
        if not chosen:
            continue
        means = [mean_of(chosen.values(), metric) for metric in ("dice", "dice_pp", "hd95_mm", "hd95_mm_pp")]
        first = next(iter(chosen.values()))
        gains = ["" if row == rival else gain_text(paired_gain(
            *({key: run[metric] for key, run in of.items()} for of in (chosen, others)), first["patients"]))
            for metric in ("dice", "dice_pp")]
        title = rows[row].title if row in rows else first["title"]
        lines.append(f"| {title} (`{row}`) | {means[0]:.3f} | {means[1]:.3f} | {means[2]:.1f} | {means[3]:.1f} | "
                     f"{gains[0]} | {gains[1]} | {len(chosen)} |")
    return "\n".join(lines)


def answers(folder: Path) -> dict[str, str]:
    """The table of each question, of the draws and seeds that all of its rows have been run with."""
    runs, found = read_all(folder), {}
    for question, (setting, rival, rows) in QUESTIONS.items():
        of_setting = runs_of(runs, setting)
        common = runs_of_all(of_setting, rows)
        of_setting = {key: run for key, run in of_setting.items() if key[::2] in common}
        found[question] = table_of_rows(of_setting, rival, rows)
    return found


def columns_table(folder: Path, section: str) -> str:
    """A line for each setting: Dice raw and after post-processing, of the draws and seeds that all of its rows have.

    Args:
        folder: Of the runs.
        section: One of `COLUMNS`. Its gains are after post-processing.
    """
    titles, pairs, rows_of = COLUMNS[section]
    gains = [f"gain of {titles[ours]} over {titles[rival]}" for ours, rival in pairs]
    lines = ["| | " + " | ".join((*titles, *gains, "draws, seeds")) + " |",
             "|" + "---|" * (len(titles) + len(gains) + 2)]
    runs = read_all(folder)
    for setting, rows in rows_of.items():
        of_setting = runs_of(runs, setting)
        if not (common := runs_of_all(of_setting, rows)):
            continue
        of_rows = [{(draw, seed): of_setting[draw, row, seed] for draw, seed in common} for row in rows]
        cells = [", ".join(f"{mean_of(of_row.values(), metric):.3f}" for metric in ("dice", "dice_pp"))
                 for of_row in of_rows]
        after = [{key: run["dice_pp"] for key, run in of_row.items()} for of_row in of_rows]
        patients = next(iter(of_setting.values()))["patients"]
        cells += [gain_text(paired_gain(after[ours], after[rival], patients)) for ours, rival in pairs]
        draws, seeds = (len(set(of)) for of in zip(*common))
        lines.append(f"| {WORDS[setting].removeprefix('ACDC, ')} | {' | '.join(cells)} | {draws}, {seeds} |")
    return "\n".join(lines)


def page_of(section: str) -> Path:
    """The page that has the table."""
    return HERE.parent / "docs" / "explanation" / f"{PAGES.get(section, 'results')}.md"


def parsed(text: str | None, output: Path, settings: dict, known_rows: dict, **defaults) -> argparse.Namespace:
    """Parse the arguments of this script or of one like it; its paths are absolute.

    Args:
        text: What `--help` says.
        output: The default folder of the JSON files.
        settings: Those to choose from.
        known_rows: Those to choose from.
        defaults: Of "rows", "seeds" and "draws". A single draw leaves nothing to choose.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that contains acdc/, acdc_scribbles/ and hippocampus/")
    parser.add_argument("--work", type=Path, help="a folder for data and trainings; used again after an interruption")
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--settings", nargs="+", choices=settings, default=list(settings))
    parser.add_argument("--rows", nargs="+", choices=known_rows, default=list(known_rows))
    if len(defaults.get("draws", DRAWS)) > 1:
        parser.add_argument("--draws", nargs="+", type=int, default=DRAWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--processes", type=int, default=2, help="trainings at once, of one thread each")
    parser.add_argument("--report", action="store_true", help="only write the tables of what is there")
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    if not (args.prepare or args.run or args.report or args.data and args.work):
        parser.error("name --data and --work; or --report")
    for name in ("data", "work", "output"):
        if getattr(args, name):
            setattr(args, name, getattr(args, name).resolve())
    return args


def main() -> None:
    args = parsed(__doc__, OUTPUT, SETTINGS, ROWS, rows=["ignore", "ignore_prior", "confkd_cost"])
    if args.prepare:
        return prepare_data(args.prepare[0], int(args.prepare[1]), args.data, args.work)
    if args.run:
        return print(run(json.loads(args.run), args.work, args.output, teacher=False))
    if not args.report:
        measure_all(args)
    text = report(args.output)
    if args.output == OUTPUT:
        insert(HERE / "README.md", "equal terms", text)
        for section, table in {"equal terms": short_table(args.output), **answers(args.output),
                               **{name: columns_table(args.output, name) for name in COLUMNS}}.items():
            insert(page_of(section), section, table)
    else:
        print(text)


if __name__ == "__main__":
    main()
