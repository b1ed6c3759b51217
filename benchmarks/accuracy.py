"""Does ConfKD beat nnU-Net's ignore label? Each command measures one table of accuracy.

    python benchmarks/accuracy.py hippocampus --data .../hippocampus --work FOLDER
    python benchmarks/accuracy.py acdc_scribbles --data .../acdc --scribbles .../acdc_scribbles --work FOLDER \\
        --device cuda
    python benchmarks/accuracy.py --report

All rows of a table share data, plan, batch size, iterations, augmentation and seeds. The patients are sorted by name
and shuffled with `random.Random(0)`. The first patients are for testing, the next for validation, and the others for
training. Settings are chosen on the validation patients. The first M training patients are fully annotated.

Each run writes one JSON file into `benchmarks/accuracy/TABLE/`. Trials are measured on the validation cases and go into
`TABLE_validation/`. Runs that already have a file are skipped. `--report` writes the tables and the plot into docs/
(see accuracy_report.py).
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from accuracy_report import RIVAL, write_report
from filelock import FileLock

from nnunet_confkd.files import write_text

OUTPUT = Path(__file__).parent / "accuracy"
FULL_ID = 900  # the data set with all labels; the one with M full patients is FULL_ID + M
FAR_MM = 5.0  # false positives further than this from the target are "far"
SPLIT_SEED = 0
FOLDS = 5


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        labels: "all" (all training cases, fully annotated), "full" (only the first M patients) or "mixed". Others are
            those of annotated_classes.py.
        steps: Share of the table's iterations.
        time_of: Train for as long as this row takes, not for as many iterations.
    """
    title: str
    trainer: str = "ConfKDTrainer"
    labels: str = "mixed"
    settings: dict = field(default_factory=dict)
    steps: float = 1.0
    time_of: str | None = None


EARLIER = {"weight_kl": 3.0, "full_share": 0.5, "equal_kinds": False, "teacher_trains_encoder": True, "hint_reach": 0,
           "hint_watershed": False, "complete_at": 0.0}


def with_earlier_defaults(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Rows with the defaults that the trainers had when these rows were run."""
    def defaults(trainer: str) -> dict:
        if not trainer.startswith("ConfKD"):
            return {}
        return EARLIER | {"prior_correction": float(trainer == "ConfKDTrainer_partialOnly")}

    return {name: replace(row, settings=defaults(row.trainer) | row.settings) for name, row in rows.items()}


ROWS = with_earlier_defaults({
    "full_only": Row("full cases only, stock nnU-Net", "nnUNetTrainer", "full"),
    "ignore_uniform": Row("nnU-Net's ignore label, its own sampling", "nnUNetTrainer"),
    "ignore": Row("nnU-Net's ignore label, stratified batches", "ConfKDTrainer_partialOnly",
                  settings={"prior_correction": 0.0}),
    "ignore_time": Row("the same, as long in time as ConfKD", "ConfKDTrainer_partialOnly",
                       settings={"prior_correction": 0.0}, time_of="confkd"),
    "decoders": Row("two decoders, no KL, no entropy", settings={"weight_kl": 0.0, "weight_entropy": 0.0}),
    "kl": Row("KL, no entropy", "ConfKDTrainer_noEntropy"),
    "entropy": Row("entropy, no KL", "ConfKDTrainer_noKL"),
    "medIA2023": Row("the journal paper's: KL on the full images alone", "ConfKDTrainer_MedIA2023"),
    "confkd": Row("ConfKD"),
    "all": Row("everything labelled, stock nnU-Net", "nnUNetTrainer", "all"),
})

# These trials led to the defaults. Each changes one thing, and they run with `--on validation` only.
PLAIN = {
    "weight_kl": 0.0,
    "weight_entropy": 0.0,
    "kl_images": "full",
    "kl_ramp_start": 0.0,
    "kl_ramp_end": 0.0,
    "extra_resolutions": "all",
}
HINTS = {"kl_ramp_start": 0.0, "kl_ramp_end": 0.2, "extra_resolutions": "highest", "weight_entropy": 0.0}
TRIALS = with_earlier_defaults({
    "t_kl_0.1": Row("KL of weight 0.1 alone", settings={**PLAIN, "weight_kl": 0.1}),
    "t_kl_1": Row("KL of weight 1 alone", settings={**PLAIN, "weight_kl": 1.0}),
    "t_kl_late": Row("KL of weight 1 alone, rising from 50 to 80 % of the training",
                     settings={**PLAIN, "weight_kl": 1.0, "kl_ramp_start": 0.5, "kl_ramp_end": 0.8}),
    "t_entropy_0.01": Row("entropy of weight 0.01 alone", settings={**PLAIN, "weight_entropy": 0.01}),
    "t_entropy_0.1": Row("entropy of weight 0.1 alone", settings={**PLAIN, "weight_entropy": 0.1}),
    "t_hints_partial_3": Row("hints; KL of weight 3 on the images that are not full", settings={
        **HINTS, "weight_kl": 3.0, "kl_images": "partial"}),
    "t_hints_all_3": Row("hints; KL of weight 3 on all images",
                         settings={**HINTS, "weight_kl": 3.0, "kl_images": "all"}),
    "t_hints_all_6": Row("hints; KL of weight 6 on all images",
                         settings={**HINTS, "weight_kl": 6.0, "kl_images": "all"}),
    "t_nohints_all_3": Row("KL of weight 3 on all images, without hints", settings={
        **HINTS, "weight_kl": 3.0, "kl_images": "all", "teacher_hints": False}),
    "t_ignore_share_0.75": Row("the ignore label, stratified; three quarters of a batch full",
                               "ConfKDTrainer_partialOnly", settings={"full_share": 0.75}),
    "t_ignore_share_0.25": Row("the ignore label, stratified; a quarter of a batch full", "ConfKDTrainer_partialOnly",
                               settings={"full_share": 0.25}),
    "t_share_0.25": Row("ConfKD; a quarter of a batch full", settings={"full_share": 0.25}),
    "t_share_0.75": Row("ConfKD; three quarters of a batch full", settings={"full_share": 0.75}),
    "t_kl_from_0": Row("ConfKD; the KL rises from 0 to 20 % of the training",
                       settings={"kl_ramp_start": 0.0, "kl_ramp_end": 0.2}),
    "t_kl_from_0.2": Row("ConfKD; the KL rises from 20 to 50 % of the training",
                         settings={"kl_ramp_start": 0.2, "kl_ramp_end": 0.5}),
    "t_kl_from_0.4": Row("ConfKD; the KL rises from 40 to 70 % of the training",
                         settings={"kl_ramp_start": 0.4, "kl_ramp_end": 0.7}),
    "t_weight_10": Row("ConfKD; KL of weight 10", settings={"weight_kl": 10.0}),
    "t_late_share_0.75": Row("ConfKD; the KL rises from 40 to 70 % of the training; three quarters of a batch full",
                             settings={"kl_ramp_start": 0.4, "kl_ramp_end": 0.7, "full_share": 0.75}),
    "t_full_half": Row("full cases only, half of the steps: as many fully annotated patches as the mixed batches have",
                       "nnUNetTrainer", "full", steps=0.5),
})

# Rows whose settings the trainer no longer has: their results are reported, and they cannot be run again.
PAST_ROWS = {"ipmi2021": Row("the conference paper's settings")}
PAST_TRIALS = {"t_separate": Row("two decoders, no KL, no entropy; L_w the mean of the two kinds' losses")}


@dataclass(frozen=True)
class Table:
    """The settings that all rows of a table share.

    Attributes:
        patients: Numbers of patients for testing, validation and training.
        small: Use a small plan for CPUs (:func:`nnunet_confkd.data.small_configuration.add_small_configuration`).
        spacing: Target spacing in mm; None leaves the choice to nnU-Net.
        background: Whether weak labels that are made here annotate the background.
        fraction: Share of the slices that weak labels annotate; None: the style's own.
        draw: Which training patients are the first M, and the seed of weak labels that are made here.
        fold: Which of five groups of patients is for testing, and the next one for validation. None: the published
            rule.
        epoch: Iterations per epoch.
        bfloat16: Run the network in bfloat16 autocast where the CPU computes in bfloat16; the losses stay in float32.
    """
    title: str
    data: str
    style: str
    patients: tuple[int, int, int]
    iterations: int
    batch_size: int | None = None
    configuration: str = "2d"
    small: bool = True
    spacing: tuple[float, float, float] | None = None
    max_patch: int = 96
    full: tuple[int, ...] = (3, 5, 10)
    seeds: tuple[int, ...] = (0, 1, 2)
    background: bool = True
    fraction: float | None = None
    draw: int = 0
    fold: int | None = None
    epoch: int = 50
    bfloat16: bool = False


REDUCED: dict = {"spacing": (10.0, 3.0, 3.0), "max_patch": 64, "full": (3,)}
TABLES = {
    "hippocampus": Table("Hippocampus 2-D, points", "hippocampus", "points", (40, 20, 140), 5000, 4),
    "hippocampus_long": Table("Hippocampus 2-D, points, three times as long", "hippocampus", "points", (40, 20, 140),
                              15000, 4),
    "acdc_small": Table("ACDC 2-D, expert scribbles, reduced for a CPU", "acdc", "scribbles", (20, 20, 60), 6000, 4,
                        **REDUCED),
    "acdc_small_long": Table("ACDC 2-D, expert scribbles, reduced for a CPU, three times as long", "acdc", "scribbles",
                             (20, 20, 60), 18000, 4, **REDUCED),
    "acdc_small_erosion": Table("ACDC 2-D, erosion, reduced for a CPU", "acdc", "erosion", (20, 20, 60), 6000, 4,
                                **REDUCED),
    "acdc_small_none": Table("ACDC 2-D, unlabelled, reduced for a CPU", "acdc", "none", (20, 20, 60), 6000, 4,
                             **REDUCED),
    "hippocampus_small_3d": Table("Hippocampus 3-D, points, reduced for a CPU", "hippocampus", "points", (40, 20, 140),
                                  2000, 4, "3d_fullres", spacing=(1.5, 1.5, 1.5), max_patch=32, full=(5,)),
    "acdc_scribbles": Table("ACDC 2-D, expert scribbles", "acdc", "scribbles", (20, 20, 60), 15000, small=False),
    "acdc_erosion": Table("ACDC 2-D, erosion", "acdc", "erosion", (20, 20, 60), 15000, small=False),
    "acdc_none": Table("ACDC 2-D, unlabelled", "acdc", "none", (20, 20, 60), 15000, small=False),
    "acdc_3d": Table("ACDC 3-D, expert scribbles", "acdc", "scribbles", (20, 20, 60), 10000, 4, "3d_fullres", False),
    "hippocampus_3d": Table("Hippocampus 3-D, points", "hippocampus", "points", (40, 20, 140), 10000, 9, "3d_fullres",
                            False),
}


# ---- data -----------------------------------------------------------------------------------------------------------

def prepare(table: Table, data: Path, scribbles: Path | None, work: Path,
            roles: dict[str, list[str]] | None = None) -> None:
    """Preprocess the data sets of a table: one with all labels, and one for each number M of full patients.

    In the data set with all labels, fold 0 trains on all patients and each further fold on the first M of them. The
    data sets are kept in `work` and used again. `roles` holds patients, in place of those of :func:`choose_roles`.
    """
    from nnunet_confkd.data.folders import preprocessed_folder
    from nnunet_confkd.data.images import Volume
    from nnunet_confkd.data.raw_format import raw_dataset, with_ignore, write_dataset
    from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED
    from nnunet_confkd.data.weaken import weakened

    done = work / "prepared.json"
    asked = json.loads(json.dumps({**asdict(table), "data": str(data), "scribbles": str(scribbles)}))
    if done.is_file():
        before = json.loads(done.read_text())
        changed = [k for k in ("style", "background", "fraction", "draw", "fold", "patients", "configuration",
                               "spacing", "data")
                   if before.get(k, asked[k]) != asked[k]]
        if changed or not set(table.full) <= set(before["full"]):
            raise SystemExit(
                f"{work}: was prepared with another {', '.join(changed or ['number of full patients'])}; give "
                f"another --work"
            )
        return
    source, cases, roles = converted(table, data, roles)
    held_back = roles["test"] + roles["validation"]

    def first(count: int) -> list[str]:
        patients = list(dict.fromkeys(patient_of(case) for case in roles["train"]))[:count]
        return [case for case in roles["train"] if patient_of(case) in patients]

    # fold 0, then one fold for each M, in their order
    splits = [{"train": sorted(train), "val": sorted(roles["validation"])}
              for train in (roles["train"], *(first(count) for count in table.full))]
    (preprocessed_folder() / source.name).mkdir(exist_ok=True)
    (preprocessed_folder() / source.name / "splits_final.json").write_text(json.dumps(splits))
    for count in table.full:
        dataset = raw_dataset(source, f"Mixed{count}")
        dataset.labels = with_ignore(dataset.labels)
        kept = {*held_back, *first(count)}
        dataset.training = []
        for name in (*held_back, *roles["train"]):
            case = cases[name]
            if name not in kept and table.style == "scribbles" and scribbles is not None:
                reader = None if table.fraction is None else partial(
                    in_some_slices, case=name, fraction=table.fraction, draw=table.draw,
                    ignore=dataset.labels["ignore"])
                case = replace(case, label=Volume(scribbles / f"{name}_scribble.nii.gz", reader=reader), kind=PARTIAL)
            elif name not in kept:
                kind = UNLABELLED if table.style == "none" else PARTIAL
                case = weakened(case, kind, dataset.labels, table.style, SPLIT_SEED + table.draw,
                                background=table.background, fraction=table.fraction)
            dataset.training.append(case if name not in kept else replace(case, kind=FULL))
        dataset.validation = held_back
        folder = write_dataset(dataset, FULL_ID + count, link=True)
        (preprocessed_folder() / folder.name / "splits_final.json").write_text(json.dumps(splits[:1]))
    planned(table, [FULL_ID, *(FULL_ID + count for count in table.full)])
    (work / "roles.json").write_text(json.dumps(roles))
    done.write_text(json.dumps(asked))


def in_some_slices(file: Path, *, case: str, fraction: float, draw: int, ignore: int):
    """Read scribbles, and keep those in a share of the slices, at equal distances. It is sent to other processes."""
    from nnunet_confkd.data.images import read
    from nnunet_confkd.data.weak_labels import case_rng, spread_slices

    picture = read(file)
    voxels = picture.voxels.copy()
    voxels[:, ~spread_slices(voxels.shape[1], fraction, case_rng(case, "scribbles", SPLIT_SEED + draw))] = ignore
    return replace(picture, voxels=voxels)


def converted(table: Table, data: Path, patients: dict[str, list[str]] | None = None
              ) -> tuple[Path, dict, dict[str, list[str]]]:
    """Write the data set with all labels. Return its raw folder, {case: case} of it, and the cases of each role.

    patients: Those of each role, in place of :func:`choose_roles`.
    """
    from nnunet_confkd.dataset_conversion import acdc, msd

    from nnunet_confkd.data.raw_format import raw_dataset

    if table.data == "acdc":
        source = acdc.convert(data, FULL_ID, link=True)
    else:
        source = msd.convert(data, FULL_ID, labels=["background", "anterior", "posterior"], channels=["MRI"],
                             name="Hippocampus", link=True)
    cases = {case.name: case for case in raw_dataset(source, "source").training}
    if patients is not None:
        return source, cases, {role: [case for name in names for case in sorted(cases) if patient_of(case) == name]
                               for role, names in patients.items()}
    twins = acdc.TWINS if table.data == "acdc" else ()
    return source, cases, choose_roles(cases, table.patients, twins, table.draw, table.fold)


def planned(table: Table, ids: list[int]) -> None:
    """Data sets, planned and preprocessed."""
    from nnunet_confkd.data.planning import plan
    processes = int(os.environ["nnUNet_def_n_proc"])
    plan(
        ids,
        configurations=[table.configuration],
        processes=[processes],
        overwrite_target_spacing=table.spacing,
        overwrite_plans_name="nnUNetPlans" if table.spacing else None,
        fingerprint_processes=processes,
        no_progress_bar=True,
    )


def patient_of(case: str) -> str:
    """patient001_frame01 -> patient001; hippocampus_001 is a patient."""
    return case.split("_frame")[0]


def choose_roles(
    cases, sizes: tuple[int, int, int], twins: tuple[str, ...] = (), draw: int = 0, fold: int | None = None
) -> dict[str, list[str]]:
    """The published rule: see the head of this file. Patients that are one and the same (`twins`) share a role.

    A draw other than 0 shuffles the patients for training once more. With a fold, the shuffled patients are dealt to
    five groups. Group `fold` is for testing, the next one for validation, and the others are shuffled once more.
    """
    cases, same = sorted(cases), {twin: twins[0] for twin in twins}
    patients = sorted({same.get(patient_of(case), patient_of(case)) for case in cases})
    random.Random(SPLIT_SEED).shuffle(patients)
    test, validation, train = sizes
    if fold is not None:
        rest = [patient for i, patient in enumerate(patients) if (i - fold) % FOLDS > 1]
        random.Random(100 + fold).shuffle(rest)
        to_test, to_validate = patients[fold::FOLDS][:test], patients[(fold + 1) % FOLDS::FOLDS][:validation]
        test, validation, patients = len(to_test), len(to_validate), [*to_test, *to_validate, *rest]
    if test + validation + train > len(patients) + len(twins):
        raise SystemExit(f"{test} + {validation} + {train} patients are needed, there are {len(patients)}")
    groups = {"test": patients[:test], "validation": patients[test:test + validation],
              "train": patients[test + validation:test + validation + train]}
    if draw:
        random.Random(draw).shuffle(groups["train"])
    return {role: [case for patient in group for case in cases
                   if same.get(patient_of(case), patient_of(case)) == patient] for role, group in groups.items()}


# ---- one run --------------------------------------------------------------------------------------------------------

def spec_of(table: Table, name: str, full: int, seed: int, device: str, iterations: int, on: str = "test",
            row: Row | None = None) -> dict:
    """All that decides a run's result, but for the versions. row: None stands for the one of this name."""
    row = row or described(name)
    return json.loads(json.dumps({"table": asdict(table), "row": asdict(row), "name": name, "full": full,
                                  "seed": seed, "device": device, "iterations": iterations, "on": on,
                                  "settings": settings_of(row)}))


def described(row: str) -> Row:
    return ROWS.get(row) or TRIALS[row]


def settings_of(row: Row) -> dict | None:
    """All settings of a row of ours, the defaults of today included."""
    from nnunet_confkd.trainers import confkd_trainers

    if row.trainer == "nnUNetTrainer":
        return None
    settings = getattr(confkd_trainers, row.trainer).settings_of(row.settings).as_dict()
    del settings["max_nonfinite_steps"]  # no result depends on it
    return settings


def build_trainer(table: Table, spec: dict, dataset_id: int | None = None):
    """The trainer of a run, not yet initialised. dataset_id: of another data set than the row's."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    from nnunet_confkd.data.small_configuration import add_small_configuration
    from nnunet_confkd.discovery import make_findable
    from nnunet_confkd.training.batches import set_seed

    make_findable()
    row, full = Row(**spec["row"]), spec["full"]
    mixed = row.labels == "mixed"
    dataset = convert_id_to_dataset_name(dataset_id or (FULL_ID + full if mixed else FULL_ID))
    fold = 1 + table.full.index(full) if row.labels == "full" else 0
    plans_file = Path(os.environ["nnUNet_preprocessed"]) / dataset / "nnUNetPlans.json"
    configuration = run_name(spec)
    epochs = -(-spec["iterations"] // table.epoch)
    block = {**row.settings, "seed": spec["seed"], "epochs": epochs, "iterations_per_epoch": table.epoch}
    with FileLock(plans_file.with_suffix(".lock")):  # runs that start at once take turns
        if table.small:
            add_small_configuration(plans_file, configuration, table.configuration, block, batch_size=table.batch_size,
                                    max_patch=table.max_patch, convolutions=1)
        else:
            plans = json.loads(plans_file.read_text())
            batch = {"batch_size": table.batch_size} if table.batch_size else {}
            plans["configurations"][configuration] = {"inherits_from": table.configuration, "confkd": block, **batch}
            plans_file.write_text(json.dumps(plans, indent=4))
        set_seed(spec["seed"])  # stock rows, too, start from the seed
        trainer = get_trainer_from_args(dataset, configuration, fold, row.trainer, device=torch.device(spec["device"]))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, table.epoch, 4
    trainer.save_every = max(1, min(5, epochs // 10))
    trainer.logger.plot_progress_png = lambda folder: None  # nobody looks at it, and it takes 7 % of a short training
    return trainer


def run_in_bfloat16(network) -> None:
    """Run a network's forward pass in autocast to bfloat16, and return float32."""
    import torch

    def converted(output):
        if torch.is_tensor(output):
            return output.float()
        return output if output is None else type(output)(map(converted, output))

    def forward(*args, **options):
        with torch.autocast(network_device, torch.bfloat16):
            return converted(stock(*args, **options))

    stock, network_device = network.forward, next(network.parameters()).device.type
    network.forward = forward


def run(spec: dict, work: Path, output: Path, teacher: bool = True, dataset_id: int | None = None,
        measured: Callable[..., dict] | None = None, begin: Callable | None = None) -> str:
    """Train, predict the validation or test cases, and write the run's JSON file; a training that was cut off goes on
    from its last checkpoint. Returns a line to print.

    Args:
        spec: See :func:`spec_of`.
        work: The folder of the data and trainings.
        output: The folder of the JSON file.
        teacher: Whether the teacher is measured, too, which takes as long as the student.
        dataset_id: Of another data set than the row's.
        measured: Called with the trainer, {role: cases} and the run's name, in place of :func:`predict_and_measure`.
            It returns what the JSON file gets: "cases", {case: {branch: {class: metrics}}}, and more.
        begin: Called with the initialised trainer before a training that does not go on from a checkpoint.
    """
    from importlib.metadata import version

    import torch

    from nnunet_confkd import __version__

    table = Table(**{k: tuple(v) if isinstance(v, list) else v for k, v in spec["table"].items()})
    if spec["device"] == "cpu":
        from tiles import many_at_once

        torch.set_num_threads(1)
        many_at_once()
    start = time.time()
    trainer = build_trainer(table, spec, dataset_id)
    latest, made_with = (Path(trainer.output_folder) / name for name in ("checkpoint_latest.pth", "spec.json"))
    resumed = latest.is_file() and made_with.is_file() and json.loads(made_with.read_text()) == spec
    made_with.write_text(json.dumps(spec))
    trainer.initialize()
    # Other CPUs convert to float32 and back, and take 1.6 times as long as in float32.
    bfloat16 = table.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    if bfloat16:
        run_in_bfloat16(trainer.network)
    if resumed:
        trainer.load_checkpoint(str(latest))
    elif begin:
        begin(trainer)
    trainer.run_training()
    seconds = time.time() - start
    roles = json.loads((work / "roles.json").read_text())
    found = (measured(trainer, roles, run_name(spec)) if measured else
             {"cases": predict_and_measure(trainer, roles[spec["on"]], teacher)})
    curves = trainer.logger.local_logger.my_fantastic_logging
    result = {
        "spec": spec,
        "seconds": round(seconds),
        "resumed": resumed,
        "bfloat16": bfloat16,
        "seconds_per_iteration": round(
            sum(e - s for s, e in zip(curves["epoch_start_timestamps"], curves["epoch_end_timestamps"]))
            / trainer.num_epochs
            / (table.epoch + 4),
            4,
        ),
        "versions": {"nnunet_confkd": __version__, **{p: version(p) for p in ("nnunetv2", "torch", "numpy")}},
        "machine": (
            f"{platform.machine()}, {os.cpu_count()} cores" if spec["device"] == "cpu" else torch.cuda.get_device_name()
        ),
        "curves": {
            key: [round(float(v), 4) for v in values]
            for key, values in curves.items()
            if key in ("train_losses", "val_losses", "ema_fg_dice") or key.startswith("loss_")
        },
        **found,
    }
    cases = found["cases"]
    file = output / f"{run_name(spec)}.json"
    write_text(file, json.dumps(result))
    shutil.rmtree(Path(trainer.output_folder).parent)  # checkpoints of dozens of runs would fill the disk
    dice = {branch: np.nanmean([np.nanmean([c["dice"] for c in case[branch].values() if isinstance(c, dict)])
                                for case in cases.values()]) for branch in next(iter(cases.values()))}
    return (
        f"{run_name(spec)}: {spec['on']} Dice "
        + ", ".join(f"{b} {d:.4f}" for b, d in dice.items())
        + f", {seconds:.0f} s"
    )


def run_name(spec: dict) -> str:
    return f"{spec['name']}_M{spec['full']}_s{spec['seed']}" if spec["full"] else f"{spec['name']}_s{spec['seed']}"


def predict_and_measure(trainer, cases: list[str], teacher: bool = True) -> dict:
    """Measure predictions in the space of the raw labels.

    Returns:
        {case: {branch: {class: metrics, "entropy": nats}}}
    """
    measured: dict[str, dict] = {}
    classes = trainer.label_manager.foreground_labels
    for case, branch, truth, labels, probabilities, spacing in predictions(trainer, cases, teacher):
        found = measured.setdefault(case, {})[branch] = measure(truth, labels, probabilities, spacing, classes)
        if branch == "student":
            for c, values in measure_post_processed(truth, labels, spacing, classes).items():
                found[c] |= values
    return measured


def predictions(trainer, cases: list[str], teacher: bool = True) -> Iterator[tuple]:
    """Predict cases as the final validation does.

    A teacher that was trained with hints gets simulated hints. Without `teacher` only the student predicts.

    Yields:
        For each case and branch: the case, the branch, the ground truth and the predicted labels, `(z, y, x)` each, the
        probabilities, `(C, z, y, x)`, and the spacing in mm.
    """
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    from nnunet_confkd.training.validation import CasePredictor, simulated_hints

    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    both = teacher and getattr(trainer, "two_branches", False) and not getattr(trainer, "student_alone", False)
    predict = CasePredictor(trainer, ["student", "teacher"] if both else ["student"])
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    reader = trainer.plans_manager.image_reader_writer_class()
    folder, ending = Path(trainer.preprocessed_dataset_folder_base), trainer.dataset_json["file_ending"]
    for case in cases:
        data, seg, _, properties = dataset.load_case(case)
        hints = simulated_hints(trainer, case, data[:], seg[:]) if len(predict.branches) > 1 else None
        truth = reader.read_seg(str(folder / "gt_segmentations" / (case + ending)))[0][0]
        for branch, logits in predict(data[:], None, hints).items():
            labels, probabilities = convert_predicted_logits_to_segmentation_with_correct_shape(
                logits, trainer.plans_manager, trainer.configuration_manager, trainer.label_manager, properties, True)
            yield case, branch, truth, labels, probabilities, properties["spacing"]


def measure(truth: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, spacing, classes) -> dict:
    """Measure Dice, HD95 in mm and distant false positives in ml of each class, and the mean entropy in nats.

    A false positive is distant if it lies more than FAR_MM from the class. A class that is absent from both masks has
    NaN. A class that is present in only one mask has Dice 0, and its distance is NaN.

    Args:
        truth: Ground truth, `(z, y, x)`.
        labels: Prediction, `(z, y, x)`.
        probabilities: `(C, z, y, x)`.
        spacing: In mm, in the order of the axes.
        classes: Labels of the foreground classes.
    """
    from scipy.ndimage import distance_transform_edt

    from nnunet_confkd.evaluation.metrics import measure_masks

    found = {}
    for c in classes:
        a, b = truth == c, labels == c
        of = measure_masks(a, b, spacing)
        far = b & (distance_transform_edt(~a, spacing) > FAR_MM) if a.any() else b
        found[str(c)] = {"dice": round(of["Dice"], 5), "hd95_mm": round(of["HD95_mm"], 3),
                         "far_ml": round(float(far.sum() * np.prod(spacing) / 1000), 5)}
    p = np.clip(probabilities.astype(np.float32), 1e-7, 1)
    found["entropy"] = round(float(-(p * np.log(p)).sum(0).mean()), 5)
    return found


def measure_post_processed(truth: np.ndarray, labels: np.ndarray, spacing, classes) -> dict:
    """Dice and HD95 in mm of each class after nnU-Net's post-processing, and the volumes in ml of prediction and truth.

    nnU-Net keeps the largest component of the whole foreground ("foreground"), of single classes ("class"), of both
    or of neither, whatever is better on the validation cases. The report makes this choice, so all of them are
    measured.
    """
    from nnunet_confkd.evaluation.metrics import measure_masks

    millilitres = float(np.prod(spacing)) / 1000
    found = {str(c): {"predicted_ml": round(float((labels == c).sum()) * millilitres, 3),
                      "truth_ml": round(float((truth == c).sum()) * millilitres, 3)} for c in classes}
    for how, masks in largest_components(labels, classes).items():
        for c in classes:
            of = measure_masks(truth == c, masks[c], spacing)
            found[str(c)] |= {f"dice_{how}": round(of["Dice"], 5), f"hd95_mm_{how}": round(of["HD95_mm"], 3)}
    return found


def largest_components(labels: np.ndarray, classes) -> dict[str, dict[int, np.ndarray]]:
    """The masks of the classes after each post-processing of nnU-Net: {what is kept: {class: mask}}."""
    from nnunetv2.postprocessing.remove_connected_components import (
        remove_all_but_largest_component_from_segmentation as largest,
    )

    foreground = largest(labels, tuple(classes))
    return {"foreground": {c: foreground == c for c in classes},
            "class": {c: largest(labels, c) == c for c in classes},
            "both": {c: largest(foreground, c) == c for c in classes}}


# ---- all runs of a table --------------------------------------------------------------------------------------------

def time_factor(table: Table, work: Path, device: str) -> float:
    """How much longer a step of ConfKD takes than one of the rival, measured in turns; once for a work folder."""
    import torch
    file = work / "time_factor.json"
    if not file.is_file():
        if device == "cpu":
            torch.set_num_threads(1)
        trainers, seconds = {}, {}
        for row in ("confkd", RIVAL):
            trainers[row] = build_trainer(table, spec_of(table, row, table.full[0], 99, device, table.epoch))
            trainers[row].on_train_start()
            seconds[row] = []
        for turn in range(60):
            for row, trainer in trainers.items():
                batch = next(trainer.dataloader_train)
                start = time.perf_counter()
                trainer.train_step(batch)
                if turn >= 10:
                    seconds[row].append(time.perf_counter() - start)
                    if turn == 59:
                        trainer.on_train_end()
                        shutil.rmtree(Path(trainer.output_folder).parent)
        # loading is the same for both and is not counted: with worker processes it costs no time
        file.write_text(json.dumps({row: float(np.median(s)) for row, s in seconds.items()}))
    measured = json.loads(file.read_text())
    return measured["confkd"] / measured[RIVAL]


def jobs_of(table: Table, rows, full, seeds, device: str, on: str, work: Path) -> list[dict]:
    specs = []
    for seed in seeds:
        for count in full:
            for row in rows:
                everything = described(row).labels == "all"  # one run a seed
                if everything and count != full[0]:
                    continue
                iterations = round(table.iterations * described(row).steps)
                if described(row).time_of:
                    iterations = round(iterations * time_factor(table, work, device) / table.epoch) * table.epoch
                specs.append(spec_of(table, row, 0 if everything else count, seed, device, iterations, on))
    return specs


def still_to_do(specs: list[dict], output: Path) -> list[dict]:
    """Those without a result. Raises SystemExit where a result was obtained with other settings."""
    missing = []
    for spec in specs:
        file = output / f"{run_name(spec)}.json"
        if not file.is_file():
            missing.append(spec)
        elif changed := differences(json.loads(file.read_text())["spec"], spec):
            raise SystemExit(
                f"{file}: was made with another {', '.join(changed)}; move it away, or give another --output"
            )
    return missing


def differences(before: dict, now: dict) -> list[str]:
    """Entries in which two runs differ: settings of terms of weight 0 decide nothing, and a row's title does not."""
    from nnunet_confkd.training.automatic import COMPLETE_AT, HINT_REACH
    from nnunet_confkd.training.settings import ADDED, without_removed

    def effective(spec: dict) -> dict:
        settings = ADDED | without_removed(spec["settings"]) if spec["settings"] else {}
        # what null means for these tables
        few = spec["table"]["style"] in ("points", "none") and settings.get("weight_kl") is None
        background = (spec["table"].get("background", True) and spec["table"]["style"] != "none"
                      and spec["row"]["labels"] != "listed")
        completes = (spec["table"]["style"] == "erosion" and background and settings.get("weight_kl") is None
                     and settings.get("teacher_hints", True))
        for name, value in (("complete_at", COMPLETE_AT if completes else 0.0), ("weight_teacher", float(not few)),
                            ("weight_entropy", 0.0 if few else 0.01),
                            ("hint_reach", HINT_REACH if background else 0), ("hint_watershed", background)):
            if settings.get(name, 0) is None:
                settings[name] = value
        if settings.get("weight_kl", 0) is None:
            settings["weight_kl"] = 0.0 if few or settings.get("complete_at") else 3.0
        off = [term for term in ("kl", "entropy") if not settings.get(f"weight_{term}")]
        unused = tuple(f"{term}_" for term in off)
        if "kl" in off and not settings.get("complete_at"):
            unused += ("teacher_hints", "hint_", "average_decay")
        if len(off) == 2:
            unused += ("extra_resolutions",)
        if not settings.get("weight_teacher"):
            unused += ("teacher_",)
        if spec["row"]["labels"] != "listed":
            unused += ("class_share",)  # no other row hides classes
        if settings.get("cutmix", 0) is None:
            settings["cutmix"] = 0.5 if spec["table"]["style"] == "none" and spec["row"]["labels"] == "mixed" else 0.0
        row = {key: value for key, value in spec["row"].items() if key not in ("title", "settings", "steps")}
        # what tables have got since the oldest results were obtained
        table = {"background": True, "fraction": None, "draw": 0, "fold": None, "epoch": 50,
                 "bfloat16": False} | spec["table"]
        settings = {key: value for key, value in settings.items() if not key.startswith(unused)}
        first = {"first": effective(spec["first"])} if spec.get("first") else {}  # of two_stages.py
        return {**spec, "table": table, "row": row, "settings": settings, **first}

    before, now = effective(before), effective(now)
    return [key for key in now if before.get(key) != now[key]]


def environment(work: Path, device: str) -> dict[str, str]:
    """Make nnU-Net's folders in `work`, and return the variables that name them and set the numbers of processes."""
    variables = {"nnUNet_def_n_proc": "2"}
    for name in ("raw", "preprocessed", "results"):
        (work / name).mkdir(parents=True, exist_ok=True)
        variables[f"nnUNet_{name}"] = str(work / name)
    return variables | ({"nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1"} if device == "cpu" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=TABLES)
    parser.add_argument("--data", type=Path, help="the data set's folder, as published")
    parser.add_argument("--scribbles", type=Path, help="ACDC's expert scribbles")
    parser.add_argument("--work", type=Path, help="a folder for data and trainings; used again after an interruption")
    parser.add_argument(
        "--output", type=Path, help=f"folder for the runs' JSON files (default: {OUTPUT}/TABLE, or TABLE_validation)"
    )
    parser.add_argument("--rows", nargs="+", choices=(*ROWS, *TRIALS), default=list(ROWS))
    parser.add_argument(
        "--full", nargs="+", type=int, metavar="M", help="numbers of fully annotated patients (default: the table's)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the table's")
    parser.add_argument("--on", default="test", choices=("test", "validation"),
                        help="cases to measure; settings are chosen on \"validation\"")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--processes", type=int, default=2, help="trainings at once; on a CPU each has one thread")
    parser.add_argument("--prepare", action="store_true", help="only preprocess the data")
    parser.add_argument("--report", action="store_true", help="only write the tables of what is there")
    args = parser.parse_args()
    if not args.report:
        if not (args.table and args.work and (args.data or (args.work / "prepared.json").is_file())):
            parser.error("name a table, --data and --work; or --report")
        table, work = TABLES[args.table], args.work.resolve()
        os.environ |= environment(work, args.device)
        if args.data:
            prepare(table, args.data.resolve(), args.scribbles and args.scribbles.resolve(), work)
        if args.prepare:
            return
        output = (args.output or OUTPUT / (args.table + ("" if args.on == "test" else "_validation"))).resolve()
        output.mkdir(parents=True, exist_ok=True)
        if args.on == "test" and (trials := [row for row in args.rows if row in TRIALS]):
            parser.error(f"{', '.join(trials)}: trials are measured --on validation")
        if unknown := set(args.full or ()) - set(table.full):
            parser.error(f"--full: the table has {table.full}, not {sorted(unknown)}")
        specs = jobs_of(
            table, args.rows, args.full or table.full, args.seeds or table.seeds, args.device, args.on, work
        )
        missing = still_to_do(specs, output)
        print(f"{len(specs)} runs, {len(specs) - len(missing)} of them done before", flush=True)
        failed = 0
        # a new process for every run: nothing of one is left for the next
        with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            for future in as_completed([pool.submit(_quiet_run, spec, work, output) for spec in missing]):
                try:
                    print(future.result(), flush=True)
                except Exception as error:  # the other runs go on
                    failed += 1
                    print(f"FAILED: {error!r}", file=sys.stderr, flush=True)
        if failed:
            raise SystemExit(f"{failed} of {len(missing)} runs failed; their logs are in {work / 'logs'}")
        if args.output:
            return
    write_report(TABLES, ROWS | PAST_ROWS, TRIALS | PAST_TRIALS, OUTPUT)


def _quiet_run(spec: dict, work: Path, output: Path) -> str:
    """`run`, with all that nnU-Net prints in a log file."""
    from contextlib import redirect_stderr, redirect_stdout
    (work / "logs").mkdir(exist_ok=True)
    with open(work / "logs" / f"{run_name(spec)}.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        import traceback
        try:
            return run(spec, work, output)
        except BaseException:
            traceback.print_exc()
            raise


if __name__ == "__main__":
    main()
