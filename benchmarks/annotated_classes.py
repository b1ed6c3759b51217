"""What does it gain to know which classes each case is annotated for? Raw and after post-processing.

    python benchmarks/annotated_classes.py --data .../shared/data --work FOLDER --settings acdc acdc_3 hippocampus
    python benchmarks/annotated_classes.py --report

Every training patient is annotated for one class; the patients take turns. In `acdc_3` three other patients are
annotated for all classes. The plan, the iterations, the seeds and the 20 validation patients, which are annotated for
all classes, are those of equal_terms.py, and so are the measures and the choice of post-processing. Each run writes one
JSON file into benchmarks/annotated_classes/SETTING_0/, and runs that have one are skipped. `--report` writes the tables
into benchmarks/README.md.
"""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from accuracy import FULL_ID, TABLES, Row, Table, converted, patient_of, planned, run, spec_of, with_earlier_defaults
from equal_terms import measure_all, parsed, report
from step_time import insert

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "annotated_classes"

# name: the table, and the number of patients that are annotated for all classes
SETTINGS: dict[str, tuple[Table, int]] = {
    "acdc": (TABLES["acdc_small"], 0),
    "acdc_3": (TABLES["acdc_small"], 3),
    "hippocampus": (TABLES["hippocampus"], 0),
}
SEEDS = (0, 1, 2)
RIVAL = "ignored"

# labels: the data set. "naive": what a case is not annotated for is background. "ignored": all voxels of no annotated
# class are ignored. "listed": dataset.json lists the classes of each case.
ROWS: dict[str, Row] = with_earlier_defaults({
    "naive": Row("0 is background, stock nnU-Net", "nnUNetTrainer", "naive"),
    "ignored": Row("what is not listed is ignored", "ConfKDTrainer_partialOnly", "ignored",
                   settings={"prior_correction": 0.0}),
    "marginal": Row("the marginal loss", "ConfKDTrainer_partialOnly", "listed"),
    "marginal_quarter": Row("the marginal loss, a quarter of each batch annotated for all classes",
                            "ConfKDTrainer_partialOnly", "listed", settings={"full_share": 0.25}),
    "hints": Row("the marginal loss with hints", labels="listed"),
    "hints_quarter": Row("the marginal loss with hints, a quarter of each batch annotated for all classes",
                         labels="listed", settings={"full_share": 0.25}),
    "all": Row("everything annotated, stock nnU-Net", "nnUNetTrainer", "all"),
})
IDS = {labels: FULL_ID + number for number, labels in enumerate(("all", "naive", "ignored", "listed"))}


def table_of(setting: str) -> Table:
    """The table of a setting, with long epochs and bfloat16, as in equal_terms.py."""
    return replace(SETTINGS[setting][0], epoch=250, bfloat16=True)


def work_folder(root: Path, setting: str, draw: int) -> Path:
    """The folder of the preprocessed data."""
    return root / f"{setting}_{draw}"


def row_of(setting: str, name: str) -> Row | None:
    """The row in a setting; None if it cannot be.

    Without cases that are annotated for all classes, there is no teacher, and our trainers refuse to ignore what is not
    listed, because nothing would tell them the background.
    """
    if SETTINGS[setting][1] or name in ("naive", "marginal", "all"):
        return ROWS[name]
    return None if name != "ignored" else replace(ROWS[name], trainer="nnUNetTrainer", settings={})


def specs_of(setting: str, draw: int, rows: list[str], seeds: list[int]) -> list[dict]:
    """The runs of some rows."""
    table, full = table_of(setting), SETTINGS[setting][1]
    found = [(seed, name, row_of(setting, name)) for seed in seeds for name in rows]
    return [spec_of(table, name, full, seed, "cpu", table.iterations, "validation", row)
            for seed, name, row in found if row is not None]


def prepare(setting: str, data: Path, work: Path) -> None:
    """Write and preprocess the four data sets, which differ in the labels of the training cases alone."""
    from nnunet_confkd.data.folders import preprocessed_folder
    from nnunet_confkd.data.raw_format import raw_dataset, with_ignore, write_dataset
    from nnunet_confkd.data.supervision import FULL, PARTIAL
    from nnunet_confkd.data.weaken import class_lists, weakened

    done = work / "prepared.json"
    if done.is_file():
        return
    table, full = table_of(setting), SETTINGS[setting][1]
    source, cases, roles = converted(table, data / table.data)
    patients = list(dict.fromkeys(map(patient_of, roles["train"])))
    labels = raw_dataset(source, "all").labels
    lists = class_lists(patients[full:], labels, len(labels) - 2, seed=0)
    lists = {case: lists[patient_of(case)] for case in roles["train"] if patient_of(case) in lists}
    split = [{"train": sorted(roles["train"]), "val": sorted(roles["validation"])}]
    folders = [source]
    for variant in ("naive", "ignored", "listed"):
        dataset = raw_dataset(source, variant)
        dataset.labels = with_ignore(labels)
        kept = {value: value for value in dataset.values}
        values = kept | {0: dataset.labels["ignore"]} if variant == "ignored" else kept
        dataset.training = [cases[case] for case in (*roles["train"], *roles["validation"])]
        dataset.training = [
            replace(weakened(case, PARTIAL, dataset.labels, None, 0, lists[case.name]), values=values,
                    kind=FULL if variant == "naive" else PARTIAL) if case.name in lists else case
            for case in dataset.training]
        if variant == "listed":
            dataset.annotated_classes, dataset.complete = lists, set(lists)
        folders.append(write_dataset(dataset, IDS[variant], link=True))
    for folder in folders:
        (preprocessed_folder() / folder.name).mkdir(exist_ok=True)
        (preprocessed_folder() / folder.name / "splits_final.json").write_text(json.dumps(split))
    planned(table, list(IDS.values()))
    (work / "roles.json").write_text(json.dumps(roles))
    done.write_text(json.dumps(lists))


def main() -> None:
    args = parsed(__doc__, OUTPUT, SETTINGS, ROWS, draws=[0], seeds=SEEDS)
    if args.prepare:
        return prepare(args.prepare[0], args.data, args.work)
    if args.run:
        spec = json.loads(args.run)
        return print(run(spec, args.work, args.output, teacher=False, dataset_id=IDS[spec["row"]["labels"]]))
    if not args.report:
        measure_all(args, __file__, specs_of, work_folder)
    text = report(args.output, dict.fromkeys(SETTINGS, RIVAL), ROWS)
    if args.output == OUTPUT:
        insert(HERE / "README.md", "annotated classes", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
