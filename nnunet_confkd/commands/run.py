"""`confkd run`: from folders of images to predictions and a report, in one command that can be interrupted."""
from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from nnunet_confkd import nnunet_commands
from nnunet_confkd.commands import plan, report
from nnunet_confkd.data import mix
from nnunet_confkd.data.annotated_classes import unlisted_classes
from nnunet_confkd.data.folders import WRITTEN_BY, folder_name, preprocessed_folder, raw_folder
from nnunet_confkd.data.images import read
from nnunet_confkd.data.json_files import read_description, read_json, split_of_fold
from nnunet_confkd.data.small_configuration import QUICK
from nnunet_confkd.device import OPTION_HELP
from nnunet_confkd.errors import InputError, counted, shown, some
from nnunet_confkd.files import new_folder, write_json

RECORD, LOCK, RAW_PREDICTIONS = "run.json", ".confkd_run.lock", "predictions_raw"
VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
STEPS = ("mix", "check", "plan", "train", "predict", "postprocess", "report")
ONLY_MIX = ("--dry-run", "--overwrite")


# ---- arguments ------------------------------------------------------------------------------------------------------

def arguments() -> argparse.ArgumentParser:
    """Return the parser: all options of `confkd mix` that say where the files are and what they mean, and our own."""
    parser = mix.arguments()
    parser.prog, parser.description = "confkd run", (
        "Mix, check, plan, train, predict and report in one command. It prints the commands that it stands for. If it "
        "is interrupted, by Ctrl-C, by SIGTERM or by a lack of power, the same command goes on.")
    for action in parser._actions:
        if action.dest == "id":
            action.required, action.help = False, "id of the data set to write; default: the first free one from 100 on"
        elif action.option_strings[0] in ONLY_MIX:
            action.help = argparse.SUPPRESS
    own = parser.add_argument_group("then")
    own.add_argument("--test", required=True, type=Path, metavar="DIR", help="the images to predict")
    own.add_argument("--output", required=True, type=Path, metavar="DIR", help="gets the predictions, the report, and "
                     "what is needed to go on; nnU-Net's three folders, too, if its variables are not set")
    own.add_argument("-c", dest="configuration", metavar="CONFIGURATION", help="default: 3d_fullres, or 2d for images "
                     "of a single slice")
    own.add_argument("-f", dest="folds", nargs="+", metavar="FOLD", help="folds to train; default: 0, or all if there "
                     "are too few fully annotated cases to validate")
    own.add_argument("-tr", dest="trainer", metavar="TRAINER", help=f"default: {nnunet_commands.DEFAULT_TRAINER}, or "
                     "ConfKDTrainer_partialOnly if cases lack classes (--source)")
    own.add_argument("-device", choices=("cuda", "cpu", "mps"), help=OPTION_HELP)
    own.add_argument("--quick", action="store_true", help="a first look in minutes, as confkd train --quick")
    return parser


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options as JSON has them, and the folder that relative paths begin at."""
    def plain(value):
        return [str(item) for item in value] if isinstance(value, list) else (
            str(value) if isinstance(value, Path) else value)

    return {name: plain(value) for name, value in vars(args).items()} | {
        "named": [word for source in args.named for word in source.words], "started in": os.getcwd()}


# ---- the record -----------------------------------------------------------------------------------------------------

@dataclass
class Work:
    """A run, and how far it has come. The record on the disk is written whole after every step.

    Attributes:
        args: The options.
        output: The output folder.
        record: The content of the record.
        commands: The commands that were called.
    """
    args: argparse.Namespace
    output: Path
    record: dict
    commands: list[str] = field(default_factory=list)

    def save(self) -> None:
        """Write the record."""
        write_json(self.output / RECORD, self.record)

    @property
    def number(self) -> str:
        """The id of the data set."""
        return str(self.record["id"])

    @property
    def name(self) -> str:
        """The name of the data set's folder."""
        return folder_name(self.record["id"], self.args.name)

    @property
    def configuration(self) -> str:
        """The configuration that is planned."""
        return self.record["configuration"]

    @property
    def trained(self) -> str:
        """The configuration that is trained."""
        return self.configuration + (QUICK if self.args.quick else "")

    @property
    def model(self) -> Path:
        """The folder of the model."""
        return Path(os.environ["nnUNet_results"], self.name, f"{self.record['trainer']}__nnUNetPlans__{self.trained}")

    @property
    def device(self) -> list[str]:
        """The option that chooses the device, if one was given."""
        return ["-device", self.args.device] if self.args.device else []

    @property
    def trainer(self) -> list[str]:
        """The option that chooses the trainer, if it is not the default."""
        trainer = self.record["trainer"]
        return ["-tr", trainer] if trainer != nnunet_commands.DEFAULT_TRAINER else []

    def call(self, name: str, function: Callable, argv: list[str]):
        """Print a command and call it. Return what its function returns."""
        print(f"\n$ {shlex.join(['confkd', name, *argv])}\n", flush=True)
        return function(argv)


def begin(args: argparse.Namespace, output: Path) -> Work:
    """Begin a run, or find how far it has come.

    Raises:
        InputError: It was begun with other options or by a version without marks, the data set of its id is not its
            own, or the output holds other files.
    """
    file = output / RECORD
    for left in output.glob(f".[0-9]*.{RECORD}"):  # of a process that was killed while it wrote the record
        left.unlink()
    folders = {name: os.environ[name] for name in VARIABLES}
    given = _given(args)
    record = read_json(file) if file.is_file() else {"done": []}
    if record["done"] and "token" not in record:
        raise InputError(f"{file}: is of an earlier version, which did not note whether the data set is that of this "
                         f"run. Give a new --output to begin anew, or go on with confkd train, predict and report")
    if not record["done"] and not _is_ours(record):  # such as after an error of mix, which needs other options
        if others := [path.name for path in output.iterdir() if path.name not in (*VARIABLES, RECORD, LOCK)]:
            raise InputError(f"--output {args.output}: holds other files ({', '.join(sorted(others)[:5])}); give an "
                             f"empty or a new folder")
        work = Work(args, output, {"given": given, "folders": folders, "done": [], "token": uuid4().hex,
                                   "id": _id_to_write(args)})
        work.save()
        return work
    _take_changes(Work(args, output, record), given)
    changed = [f"{_option(name)}: {shown(record['given'].get(name))} then, {shown(given.get(name))} now"
               for name in {**record["given"], **given} if record["given"].get(name) != given.get(name)]
    changed += [f"{name}: {shown(record['folders'].get(name))} then, {shown(folder)} now"
                for name, folder in folders.items() if record["folders"].get(name) != folder]
    if changed:
        raise InputError(f"{file}: this run was begun with other options: {'; '.join(changed)}. Give those of the "
                         f"beginning to go on, or a new --output to begin another run")
    work = Work(args, output, record)
    if (raw_folder() / work.name).exists() and not _is_ours(record):
        raise InputError(f"{raw_folder() / work.name}: is not the data set that this run wrote, but was replaced "
                         f"since; give a new --output to begin anew")
    return work


def _take_changes(work: Work, given: dict[str, Any]) -> None:
    """Take options that may still change: those that nothing depends on that has been done."""
    record, free = work.record, ["device", "processes"]
    if not (work.output / RAW_PREDICTIONS).exists():
        free += ["test", "folds"]
    if "train" not in record["done"] and not ("trainer" in record and work.model.exists()):
        free += ["trainer"]
    if "plan" not in record["done"]:
        free += ["configuration"]
    if {"train", "folds"} <= {*record["done"], *free} and record["given"].get("folds") != given["folds"]:
        record["done"].remove("train")  # which finds the folds that are trained
    record["given"] |= {name: given[name] for name in free}


def _id_to_write(args: argparse.Namespace) -> int:
    """Return the id of the data set to write. Raise InputError if there is one of this id and name."""
    if args.id is None:
        from nnunet_confkd.data.inspection import free_id

        return free_id()
    target = raw_folder() / folder_name(args.id, args.name)
    if target.exists():
        raise InputError(f"--id {args.id}: {target} is there, and this run did not write it; give another --id, or "
                         f"leave it out for a free one")
    return args.id


def _mark(record: dict) -> str:
    """Return what tells the data set of a run from those of others, in its dataset.json."""
    return f"confkd run {record['token']}"


def _is_ours(record: dict) -> bool:
    """Whether the data set of a run is there, and it was this run that wrote it."""
    if "token" not in record:
        return False
    file = raw_folder() / folder_name(record["id"], record["given"]["name"]) / "dataset.json"
    return file.is_file() and read_json(file).get(WRITTEN_BY) == _mark(record)


def _option(name: str) -> str:
    dest = {action.dest: action.option_strings[0] for action in arguments()._actions}
    return dest.get(name, name)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Let no other process work on this run. The system releases the lock however this process ends."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(output / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise InputError(f"--output {output}: another confkd run is working there; wait for it") from error


# ---- the steps ------------------------------------------------------------------------------------------------------

def mix_step(work: Work) -> Path:
    """Write the data set, unless this run has written it already: it is complete or not there."""
    target = raw_folder() / work.name
    if not _is_ours(work.record):
        parser = mix.arguments()
        args = argparse.Namespace(**{action.dest: getattr(work.args, action.dest, None) for action in parser._actions})
        args.id, args.named = work.record["id"], []
        words = [word for source in work.args.named for word in source.words]
        work.call("mix", partial(mix.main, written_by=_mark(work.record)), [*words, *nnunet_commands.as_argv(
            parser, args)])
    return target / "dataset.json"


def choose(work: Work) -> None:
    """Choose configuration, trainer and folds, unless they are given. It takes no time, so it is done every time.

    Raises:
        InputError: There is no such trainer or fold, or a fold is given twice or beside `all`.
    """
    target, splits = raw_folder() / work.name, preprocessed_folder() / work.name / "splits_final.json"
    if work.args.configuration is not None:
        work.record["configuration"] = work.args.configuration
    elif "plan" not in work.record["done"]:
        image = sorted((target / "imagesTr").glob("*_0000.*"))[0]
        shape = read(image).voxels.shape[1:]
        work.record["configuration"] = "2d" if len(shape) == 2 or 1 in shape else "3d_fullres"
    work.record["trainer"] = work.args.trainer or plan.trainer_for(read_json(target / "dataset.json"))
    folds = work.args.folds or ["0" if splits.is_file() else "all"]
    if len(set(folds)) < len(folds) or "all" in folds and len(folds) > 1:
        raise InputError(f"-f {' '.join(folds)}: give each fold once, or all alone")
    for fold in folds:
        nnunet_commands.require_fold(splits.parent, fold)
    if work.args.trainer:
        nnunet_commands.make_findable()
        nnunet_commands.require_trainer(work.args.trainer)
    work.record["folds"] = folds


def check_step(work: Work) -> Path:
    """Check the data set and the images to predict, before any training; it is quick enough to be done anew."""
    from nnunet_confkd.data import check

    _require_test_images(work)
    if work.call("check", check.main, ["-d", work.number]):
        raise InputError(f"confkd check has found errors (above). Correct the files, and begin anew: remove "
                         f"{raw_folder() / work.name}, and give a new --output")
    return raw_folder() / work.name


def _require_test_images(work: Work) -> None:
    """Raise InputError if the images to predict are not as those to train on."""
    from nnunet_confkd.inference.inputs import readable_images, require_readable

    described = read_description(raw_folder() / work.name / "dataset.json", ("file_ending",))
    with readable_images(work.args.test, described, "--test") as images:
        require_readable(images, described)


def plan_step(work: Work) -> Path:
    """Plan and preprocess."""
    processes, folder = str(work.args.processes), preprocessed_folder() / work.name
    begun = (folder / "dataset_fingerprint.json").exists()  # nnU-Net does not write it whole
    work.call("plan", plan.main, ["-d", work.number, "-c", work.configuration, "-np", processes, "-npfp", processes,
                                  *(["--clean"] if begun else [])])
    return folder / "nnUNetPlans.json"


def train_step(work: Work) -> Path:
    """Train the folds that are not trained yet; go on with one that was interrupted."""
    for fold in work.record["folds"]:
        folder = work.model / f"fold_{fold}"
        if (folder / "checkpoint_final.pth").is_file() and (folder / "validation" / "summary.json").is_file():
            print(f"fold {fold} is trained")
            continue
        resumed = ["--c"] if any(folder.glob("checkpoint_*.pth")) else []
        quick = ["--quick"] if work.args.quick else []
        work.call("train", nnunet_commands.train, [work.number, work.configuration, fold, *work.trainer, *quick,
                                                   *work.device, *resumed])
    return work.model


def predict_step(work: Work) -> Path:
    """Predict the test images; predictions that are whole already stay."""
    target = work.output / RAW_PREDICTIONS
    resumed = ["--continue_prediction"] if target.is_dir() else []
    if resumed:
        ending = read_description(work.model / "dataset.json")["file_ending"]
        for file in target.glob(f"*{ending}"):
            try:
                read(file)
            except InputError:
                file.unlink()  # this run was interrupted while it wrote it
    work.call("predict", nnunet_commands.predict, [
        "-d", work.number, "-i", str(work.args.test), "-o", str(target), "-c", work.trained, "-f",
        *work.record["folds"], *work.trainer, *work.device, *resumed])
    return target


def _tell_new_images(work: Work) -> None:
    """Name images that were added to --test after the others had been predicted."""
    from nnunet_confkd.inference.inputs import names_of

    described = read_description(work.model / "dataset.json", ("file_ending",))
    if not Path(work.args.test).exists():
        return  # the other steps do not need it
    new = [case for case in names_of(Path(work.args.test), described)
           if not (work.output / RAW_PREDICTIONS / f"{case}{described['file_ending']}").is_file()]
    if new:
        print(f"WARNING: --test: {counted(len(new), 'image')} added since, which this run does not predict: "
              f"{some(new)}. confkd predict does, or a new --output")


def postprocess_step(work: Work) -> Path:
    """Determine nnU-Net's post-processing on the validation cases, and apply it to the predictions."""
    from nnunet_confkd.inference import postprocessing

    raw, rules, target = (work.output / name for name in (RAW_PREDICTIONS, "postprocessing", "predictions"))
    if work.record["folds"] == ["all"]:
        print("no post-processing: fold all has no validation cases to determine it on")
        return raw
    described = read_description(work.model / "dataset.json", ("file_ending", "labels"))
    if lacking := _validated(work) & set(unlisted_classes(described, str(work.model / "dataset.json"))):
        print(f"no post-processing: nnU-Net would take classes that validation cases are not annotated for as absent "
              f"({some(sorted(lacking), 3)})")
        return raw
    truth = raw_folder() / work.name / "labelsTr"
    print("\n" + "\n".join("$ " + shlex.join(map(str, command)) for command in (
        ["nnUNetv2_determine_postprocessing", "-i", rules, "-ref", truth, "--remove_postprocessed"],
        ["nnUNetv2_apply_postprocessing", "-i", raw, "-o", target, "-pp_pkl_file", rules / "postprocessing.pkl"]))
        + f"\n({rules} holds the validation cases of all folds that were trained)\n", flush=True)
    found = postprocessing.determine(work.model, work.record["folds"], rules)
    with new_folder(target, replace=True) as folder:
        postprocessing.apply(found, work.model, folder, raw.glob(f"*{described['file_ending']}"))
        for name in ("dataset.json", "plans.json"):
            (folder / name).write_bytes((raw / name).read_bytes())
    print(found.text(described["labels"]))
    return target


def _validated(work: Work) -> set[str]:
    """Return the cases that the folds of a run validate on."""
    splits = [split_of_fold(preprocessed_folder() / work.name / "splits_final.json", fold)
              for fold in work.record["folds"]]
    return {case for split in splits if split for case in split["val"]}


def report_step(work: Work) -> Path:
    """Write the report."""
    target = work.output / "report"
    work.call("report", report.main, ["--model", str(work.model), "--output", str(target), *work.device])
    return target


# ---- all of them ----------------------------------------------------------------------------------------------------

def carry_out(work: Work) -> None:
    """Do the steps that are not done."""
    functions = dict(zip(STEPS, (mix_step, check_step, plan_step, train_step, predict_step, postprocess_step,
                                 report_step)))
    for number, (name, function) in enumerate(functions.items(), 1):
        title = f"[{number}/{len(STEPS)}] {name}"
        if name in work.record["done"]:
            made = Path(work.record["made"][name])
            if not made.exists():
                raise InputError(f"{made}: was made by this run, and is gone; restore it, or begin anew with a new "
                                 f"--output")
            print(f"=== {title}: done")
            if name == "mix":
                choose(work)
            if name == "predict":
                _tell_new_images(work)
            continue
        print(f"\n=== {title}", flush=True)
        try:
            made = function(work)
            if name == "mix":
                choose(work)
        except BaseException as error:
            how = "was interrupted. The same command goes on from here"
            if isinstance(error, Exception):
                how = "failed. " + ("Correct what is said below, and give the same command again"
                                    if isinstance(error, InputError) else "The same command tries it again")
            print(f"confkd run: step {title} {how}.", file=sys.stderr)
            raise
        work.record["done"].append(name)
        work.record.setdefault("made", {})[name] = str(made)
        work.save()


def main(argv: list[str]) -> None:
    """Run `confkd run`."""
    args = arguments().parse_args(argv)
    if args.dry_run or args.overwrite:
        raise InputError(f"{' and '.join(ONLY_MIX)} are options of confkd mix alone; leave them out")
    if not args.test.exists():
        raise InputError(f"--test {args.test}: there is no such file or folder")
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    for name in missing:
        os.environ[name] = str(output / name)
        (output / name).mkdir(exist_ok=True)
    with _alone(output):
        work = begin(args, output)
        print("\n".join([f"export {name}={shlex.quote(os.environ[name])}" for name in VARIABLES]))
        try:
            carry_out(work)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
    predictions = Path(work.record["made"]["postprocess"])
    raw = f" (not post-processed: {output / RAW_PREDICTIONS})" if predictions.name == "predictions" else ""
    print(f"\npredictions: {predictions}{raw}\nreport: {output / 'report' / 'report.html'}\nmodel: {work.model}")
    if args.quick:
        print("This was a first look (--quick). The accuracy is not that of a usual training: leave out --quick, and "
              "give a new --output and --id")
