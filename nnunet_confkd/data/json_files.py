"""Read nnU-Net's JSON files: dataset.json, plans.json, splits_final.json. Errors name what is wrong in them."""
from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from nnunet_confkd.data.images import ENDINGS
from nnunet_confkd.errors import InputError, shown

CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")  # that nnU-Net plans by default
NEEDED = {  # of dataset.json, and what each must be
    "channel_names": 'the names of the channels, {"0": "T1", "1": ...}, numbered in order',
    "labels": 'names and values, {"background": 0, "one": 1, ...}, each a whole number or a list of them, "ignore" a '
              "number",
    "file_ending": f"one of {', '.join(ENDINGS)}",
    "numTraining": "the number of training cases"}
OPTIONAL = {
    "annotated_classes": "an object {case: [class, ...]}",
    "dataset": '{CASE: {"images": [FILE, ...], "label": FILE}}',
    "patient_pattern": "a regular expression, a text",
    "regions_class_order": "a list of whole numbers",
    "supervision": "an object {case: kind}"}


def read_json(file: str | Path, kind: type = dict):
    """Read a JSON file.

    Args:
        file: The file.
        kind: What it must hold: dict, list, or object for anything.

    Raises:
        InputError: The file cannot be read, or holds something else.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error}); correct it, or remove it and make it "
                         f"anew") from error
    if not isinstance(content, kind):
        raise InputError(f"{file}: must hold {'an object {...}' if kind is dict else 'a list [...]'}")
    return content


def malformed(described: dict) -> dict[str, str]:
    """Return {key: what it must be} of the entries of a dataset.json that are wrong, or are missing and needed."""
    labels, channels = described.get("labels"), described.get("channel_names")
    right = {
        "annotated_classes": described.get("annotated_classes") is None
        or isinstance(described["annotated_classes"], dict)
        and all(map(_texts, described["annotated_classes"].values())),
        "channel_names": isinstance(channels, dict) and channels
        and list(channels) == [str(i) for i in range(len(channels))] and _texts(list(channels.values())),
        "labels": isinstance(labels, dict) and set(labels) - {"ignore"} and is_whole(labels.get("ignore", 0))
        and all(is_whole(v) or _whole_numbers(v) and v for v in labels.values()),
        "numTraining": is_whole(described.get("numTraining")),
        "file_ending": isinstance(described.get("file_ending"), str) and described["file_ending"].lower() in ENDINGS,
        "dataset": _is_listing(described.get("dataset", {})),
        "patient_pattern": described.get("patient_pattern") is None or isinstance(described["patient_pattern"], str),
        "regions_class_order": described.get("regions_class_order") is None
        or _whole_numbers(described["regions_class_order"]),
        "supervision": described.get("supervision") is None or isinstance(described["supervision"], dict)}
    return {key: meaning for key, meaning in (NEEDED | OPTIONAL).items() if not right[key]}


def read_description(file: Path, needed: Iterable[str] = ("labels", "channel_names", "file_ending")) -> dict:
    """Read a dataset.json and check it by :func:`require_description`."""
    described = read_json(file)
    require_description(described, file, needed)
    return described


def require_description(described: dict, file: Path | str, needed: Iterable[str] = ("labels",)) -> None:
    """Raise InputError if `needed` entries of a dataset.json are missing, or any entry has not nnU-Net's form."""
    if not isinstance(described, dict):
        raise InputError(f"{file}: must hold an object {{...}}")
    wrong = {key: meaning for key, meaning in malformed(described).items() if key in described or key in needed}
    missing = [key for key in wrong if key not in described]
    texts = [f"lacks {', '.join(missing)}"] if missing else []
    texts += [f'"{key}" must be {meaning}; got {shown(described[key])}' for key, meaning in wrong.items()
              if key in described]
    if texts:
        raise InputError(f"{file}: " + "\n  ".join(texts))


def read_plans(file: Path) -> dict:
    """Read a plans.json.

    Raises:
        InputError: It has not nnU-Net's form, or its "plans_name" or "dataset_name" is not the name of a folder. Paths
            are made of these names, which must not lead elsewhere.
    """
    plans = read_json(file)
    for key in ("plans_name", "dataset_name"):
        if not is_folder_name(plans.get(key)):
            raise InputError(f'{file}: "{key}" must be the name of a folder; got {shown(plans.get(key))}')
    configurations = plans.get("configurations")
    if not isinstance(configurations, dict) or not all(isinstance(c, dict) for c in configurations.values()):
        raise InputError(f'{file}: "configurations" must be an object of objects; got {shown(configurations)}')
    return plans


def read_folds(file: str | Path) -> list[dict[str, list[str]]]:
    """Read a splits_final.json. Raises InputError if it has not nnU-Net's form."""
    wrong = InputError(f'{file}: is no list of folds [{{"train": [CASE, ...], "val": [CASE, ...]}}, ...]; correct it, '
                       f"or remove it for the default")
    try:
        folds = read_json(file, list)
    except InputError as error:
        raise wrong from error
    if not folds or not all(isinstance(fold, dict) and _texts(fold.get("train")) and _texts(fold.get("val"))
                            for fold in folds):
        raise wrong
    return folds


def changed_since_planning(raw: dict, planned: dict) -> list[str]:
    """Compare a raw dataset.json with the copy that planning made of it, which is what training reads.

    Args:
        raw: The content of nnUNet_raw/DATASET/dataset.json.
        planned: The content of nnUNet_preprocessed/DATASET/dataset.json.

    Returns:
        The keys that matter to training and differ. The order of entries does not count, except that of regions.
    """
    def meaning(described: dict, key: str):
        value = described.get(key)
        if key == "labels" and isinstance(value, dict) and any(isinstance(v, list) for v in value.values()):
            return list(value.items())
        return None if value == {} else value

    return [key for key in (*NEEDED, *OPTIONAL) if meaning(raw, key) != meaning(planned, key)]


def planning_text(raw: str | Path, planned: str | Path, keys: Iterable[str], dataset_id: int) -> str:
    """Say what to do about the differences that :func:`changed_since_planning` found.

    Args:
        raw: The raw dataset.json.
        planned: The copy that planning made.
        keys: The keys that differ.
        dataset_id: For the commands in the text.
    """
    keys = list(keys)
    if {"annotated_classes", "supervision", "patient_pattern"}.issuperset(keys):
        remedy = f"Copy the first file over the second (confkd plan -d {dataset_id} --no_pp does so, too)"
    else:
        remedy = f"Plan and preprocess again: confkd plan -d {dataset_id}, with the options of the first time"
    return (f"{raw} differs from {planned}, which training reads, in {', '.join(keys)}: it was edited after planning, "
            f"and training would not notice. {remedy}, or undo the edit")


def read_record(file: str | Path) -> dict:
    """Read the confkd.json of a trained fold.

    Raises:
        InputError: It has no "supervision" (the kinds of the training cases) or no "pseudo_dice_on" (validation cases).
    """
    record = read_json(file)
    if not (isinstance(record.get("supervision"), dict) and _texts(record.get("pseudo_dice_on"))):
        raise InputError(f'{file}: must hold "supervision", {{CASE: kind}}, and "pseudo_dice_on", [CASE, ...], as the '
                         f"training writes them; take it from a copy, or train again")
    return record


def number_of_folds(file: str | Path) -> int:
    """Return how many folds a splits_final.json has, or nnU-Net's five if there is none. Raises InputError."""
    return len(read_folds(file)) if Path(file).is_file() else 5


def split_of_fold(file: str | Path, name: str) -> dict[str, list[str]] | None:
    """Return the split of a fold ("0", "1", ...) in a splits_final.json; None if there is no such file or fold.

    Raises:
        InputError: The file has not nnU-Net's form.
    """
    folds = read_folds(file) if Path(file).is_file() else []
    return folds[int(name)] if name.isdigit() and int(name) < len(folds) else None


def is_whole(value) -> bool:
    """Whether a JSON value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_folder_name(value) -> bool:
    """Whether a JSON value can be the name of a folder, which leads nowhere else."""
    return isinstance(value, str) and bool(re.fullmatch(r"[^/\\\0]+", value)) and value.strip(" .") != ""


def _texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _whole_numbers(value) -> bool:
    return isinstance(value, list) and all(map(is_whole, value))


def _is_listing(listed) -> bool:
    return isinstance(listed, dict) and all(
        isinstance(files, dict) and isinstance(files.get("label"), str) and isinstance(files.get("images"), list)
        and files["images"] and all(isinstance(image, str) for image in files["images"]) for files in listed.values())
