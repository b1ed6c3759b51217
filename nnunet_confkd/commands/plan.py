"""`confkd plan`: the options of nnUNetv2_plan_and_preprocess."""
from __future__ import annotations

from nnunet_confkd.arguments import Parser
from nnunet_confkd.data.annotated_classes import CLASSES_KEY
from nnunet_confkd.data.folders import find_dataset, preprocessed_folder
from nnunet_confkd.data.json_files import CONFIGURATIONS, read_json, read_plans
from nnunet_confkd.nnunet_commands import DEFAULT_TRAINER


def main(argv: list[str]) -> None:
    """Run `confkd plan`."""
    parser = Parser(prog="confkd plan", description=(
        "nnUNetv2_plan_and_preprocess, with all its options. Without an ignore label the result is the same. With one, "
        "the intensity statistics are those of annotated foreground, resampling keeps annotated voxels, a report is "
        "printed, and splits_final.json is written."))
    add = parser.add_argument
    add("-d", dest="datasets", nargs="+", required=True, metavar="DATASET", help="ids or names of data sets in "
                                                                                 "nnUNet_raw")
    add("-fpe", dest="fingerprint_extractor", default="DatasetFingerprintExtractor", metavar="CLASS",
        help="nnU-Net's class for the fingerprint")
    add("-npfp", dest="fingerprint_processes", type=int, default=8, metavar="N", help="processes for the fingerprint")
    add("--verify_dataset_integrity", dest="verify_integrity", action="store_true", help="run nnU-Net's check of the "
                                                                                         "data set")
    add("--no_pp", dest="no_preprocessing", action="store_true", help="fingerprint and planning only")
    add("--clean", action="store_true", help="replace an existing fingerprint; needed if the data set has changed")
    add("-pl", dest="planner", default="ExperimentPlanner", metavar="CLASS",
        help="nnU-Net's planner; nnUNetPlannerResEncM, L or XL are its presets")
    add("-gpu_memory_target", type=float, metavar="GB", help="default: the planner's own")
    add("-preprocessor_name", default="DefaultPreprocessor", metavar="CLASS",
        help="any other is used as it is, and may lose single annotated voxels")
    add("-overwrite_target_spacing", type=float, nargs="+", metavar="MM",
        help="three numbers, for 3d_fullres and its cascade")
    add("-overwrite_plans_name", metavar="NAME", help="default: the planner's own")
    add("-c", dest="configurations", nargs="+", default=list(CONFIGURATIONS), metavar="CONFIGURATION",
        help="to preprocess; 3d_fullres and 3d_lowres are skipped if the plans lack them")
    add("-np", dest="processes", type=int, nargs="+", metavar="N", help="processes for preprocessing: one number, or "
        "one for each configuration; default: 8 for 2d, 4 for 3d_fullres, 8 for 3d_lowres, 4 for any other")
    add("--verbose", action="store_true")
    add("--no_pbar", dest="no_progress_bar", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    from nnunet_confkd.data.planning import plan

    plans_name = plan(**vars(args))
    for dataset in args.datasets:
        print(next_step(find_dataset(dataset), plans_name, args.configurations, args.no_preprocessing))


def next_step(name: str, plans_name: str, configurations: list[str], only_planned: bool) -> str:
    """Say which command follows.

    Args:
        name: Of the data set's folder.
        plans_name: Of its plans.
        configurations: Those that were asked for.
        only_planned: Whether nothing was preprocessed.
    """
    folder, number = preprocessed_folder() / name, int(name[7:10])
    there = [c for c in configurations if c in read_plans(folder / f"{plans_name}.json")["configurations"]]
    if only_planned or not there:
        return f"next: confkd plan -d {number}, without --no_pp" if only_planned else (
            f"{name}: none of {', '.join(configurations)} is planned, because the images are 2-D or small; next: "
            f"confkd plan -d {number} -c 2d")
    described = read_json(folder / "dataset.json")
    mixed = "ignore" in described.get("labels", {}) or described.get(CLASSES_KEY)
    fold = "all" if mixed and not (folder / "splits_final.json").is_file() else "0"
    plans = "" if plans_name == "nnUNetPlans" else f" -p {plans_name}"
    trainer = trainer_for(described)
    plans += f" -tr {trainer}" if trainer != DEFAULT_TRAINER else ""
    configuration = "3d_fullres" if "3d_fullres" in there else there[0]
    return (f"next: confkd train {number} {configuration} {fold}{plans}   (with --quick for a first look)")


def trainer_for(described: dict) -> str:
    """Return the trainer to begin with.

    Cases that lack classes need no teacher, and often there is none (docs/how-to/organs.md).

    Args:
        described: The content of dataset.json.
    """
    return "ConfKDTrainer_partialOnly" if described.get(CLASSES_KEY) else DEFAULT_TRAINER
