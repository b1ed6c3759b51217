"""The section of the report on the training: which case had which label, settings, plans and versions."""
from __future__ import annotations

import json
import platform
import subprocess
from collections import Counter
from dataclasses import fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

from nnunet_confkd import __version__
from nnunet_confkd.data.json_files import read_json
from nnunet_confkd.data.supervision import FULL, KINDS, PARTIAL, UNLABELLED
from nnunet_confkd.report import page
from nnunet_confkd.report.model import Fold, Model
from nnunet_confkd.training.settings import Settings

KIND_NAMES = {FULL: "fully annotated", PARTIAL: "partially annotated", UNLABELLED: "unlabelled"}


def training_section(model: Model, folds: list[Fold]) -> str:
    """Return the section as HTML."""
    parts = {"Training cases": _supervision(folds), "Settings": _settings(folds) + _history(folds),
             "Plans": _plans(model, folds), "Versions": _versions(model, folds)}
    return "".join(page.title(name) + part for name, part in parts.items())


def _supervision(folds: list[Fold]) -> str:
    rows, lists = [], ""
    for fold in folds:
        name, counts = _fold_name(fold), Counter((fold.training or {}).values())
        numbers = [counts[kind] for kind in KINDS] if fold.training is not None else ["not known"] * len(KINDS)
        rows.append([name, *numbers, "not known" if fold.validation is None else len(fold.validation)])
        for kind in (kind for kind in KINDS if counts[kind]):
            cases = sorted(case for case, kind_of_case in fold.training.items() if kind_of_case == kind)
            lists += page.folded(f"{name}: {KIND_NAMES[kind]} training cases ({len(cases)})", page.names(cases))
        if fold.validation:
            lists += page.folded(f"{name}: validation cases ({len(fold.validation)})", page.names(fold.validation))
    head = ["fold", *(KIND_NAMES[kind] for kind in KINDS), "validation cases"]
    return page.table(head, rows, "Number of training cases of each kind") + lists


def _fold_name(fold: Fold) -> str:
    return fold.name.replace("_", " ")


def _settings(folds: list[Fold]) -> str:
    with_record = [fold for fold in folds if fold.record is not None]
    recorded = [fold.record["settings"] for fold in with_record]
    if not recorded:
        return page.paragraph("This is a model of stock nnU-Net, which has none of this plugin's settings.")
    note = "" if all(settings == recorded[0] for settings in recorded) else page.paragraph(
        "The folds were trained with different settings. The table shows those of the first fold.", "notice")
    defaults, meanings = Settings().as_dict(), {f.name: f.metadata["doc"] for f in fields(Settings)}
    changed, unchanged = [], []
    for name, value in recorded[0].items():
        known = name in defaults
        row = [name, _value(value), _value(defaults[name]) if known else "none",
               meanings.get(name, "a setting of another version")]
        (unchanged if known and value == defaults[name] else changed).append(row)
    head, body = ["setting", "value", "default", "meaning"], page.paragraph("Every setting has its default value.")
    if changed:
        caption = f"{len(changed)} of {len(recorded[0])} settings differ from the default"
        body = page.table(head, changed, caption, wrap=3, marked=range(len(changed)))
    if chosen := with_record[0].record.get("chosen"):
        body += page.paragraph(f"What followed from the annotations in {_fold_name(with_record[0])}, unless it was "
                               "set: " + ", ".join(
            f"{name} {_value(round(value, 3) if isinstance(value, float) else value)}"
            for name, value in chosen.items()) + ".")
    if unchanged:
        body += page.folded(f"The {len(unchanged)} settings with their default value",
                            page.table(head, unchanged, wrap=3))
    return note + body


def _history(folds: list[Fold]) -> str:
    """Say which settings a training had before it was continued with other settings."""
    paragraphs = []
    for fold in folds:
        earlier = fold.record.get("history", []) if fold.record is not None else []
        for entry, following in zip(earlier, [*earlier[1:], fold.record]):
            before, after = entry["settings"], following["settings"]
            changes = ", ".join(f"{name} {_value(before.get(name, 'none'))} (then {_value(after.get(name, 'none'))})"
                                for name in sorted({*before, *after}) if before.get(name) != after.get(name))
            paragraphs.append(f"{_fold_name(fold).capitalize()} was continued with other settings after epoch "
                              f"{entry['until_epoch']}. Until then it was trained with {changes}.")
    return "".join(page.paragraph(paragraph, "notice") for paragraph in paragraphs)


def _value(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _plans(model: Model, folds: list[Fold]) -> str:
    manager, labels, described = model.configuration_manager, model.label_manager, model.dataset_json
    configuration = manager.configuration
    features = manager.network_arch_init_kwargs.get("features_per_stage")
    classes = ", ".join(f"{name} ({' '.join(map(str, values))})" for name, values in model.classes.items())
    architecture = manager.network_arch_class_name.rpartition(".")[2]
    block = configuration.get("confkd", {})
    own_teacher = block.get("complete_at") and block.get("weight_teacher") != 0  # it is in a checkpoint of its own
    decoders = "2 decoders" if len(folds[0].branches) > 1 or own_teacher else "1 decoder"
    channels = described.get("channel_names") or described["modality"]
    rows = [["data set", model.plans_manager.dataset_name],
            ["configuration", f"{model.configuration} of {model.plans['plans_name']}"],
            ["channels", ", ".join(map(str, channels.values()))],
            ["regions" if labels.has_regions else "classes", f"{classes}; ignore: {labels.ignore_label}"],
            ["network", f"{architecture}, features {_value(features)}, {decoders}"],
            ["patch size, batch size", f"{_value(configuration['patch_size'])}, {configuration['batch_size']}"],
            ["spacing [mm]", _value([round(s, 4) for s in configuration["spacing"]])],
            ["normalisation", ", ".join(configuration["normalization_schemes"])]]
    rows += [[key, str(described[key])] for key in ("licence", "reference") if key in described]
    return page.table(["property", "value"], rows, wrap=1)


def _versions(model: Model, folds: list[Fold]) -> str:
    trained = sorted({fold.record["nnunet_confkd"] for fold in folds if fold.record is not None})
    ends = [fold.curves["epoch_end_timestamps"][-1] for fold in folds if fold.curves.get("epoch_end_timestamps")]
    debug = [read_json(folder / "debug.json") for folder in model.fold_folders if (folder / "debug.json").is_file()]
    torches = sorted({str(content["torch_version"]) for content in debug if "torch_version" in content})
    unknown = "not recorded"
    end = page.date_text(datetime.fromtimestamp(max(ends))) if ends else unknown
    return page.table(["", "training", "this report"], [
        ["nnunet_confkd", ", ".join(trained) or unknown, __version__],
        ["commit of nnunet_confkd", unknown, _commit() or "not known"],
        ["nnunetv2", unknown, version("nnunetv2")],
        ["torch", ", ".join(torches) or unknown, torch.__version__],
        ["Python", unknown, platform.python_version()],
        ["date", end, page.date_text(datetime.now())]], "Versions and dates", words=3)


def _commit() -> str | None:
    """Return the commit of the checkout that the package runs from, with "-dirty" if files were changed, or None."""
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed package may lie in somebody's repository
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None
