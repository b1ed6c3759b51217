"""The record of a training, `confkd.json` in the folder of the fold: what was trained on what, with which settings."""
from __future__ import annotations

from pathlib import Path

from nnunet_confkd import __version__
from nnunet_confkd.data.annotated_classes import CLASSES_KEY
from nnunet_confkd.data.json_files import read_json
from nnunet_confkd.errors import counted, shown, some
from nnunet_confkd.files import write_json
from nnunet_confkd.training.settings import ADDED, without_removed

RECORD = "confkd.json"


def write_record(folder: str | Path, content: dict, continued_in_epoch: int | None) -> str | None:
    """Write the record.

    Args:
        folder: Folder of the fold.
        content: The record, with the "settings".
        continued_in_epoch: Number of epochs done if a training is continued, else None. If settings, choices from the
            data or kinds of cases have changed, the earlier ones are kept under "history", with the epoch until which
            they were used. Cases that the training has seen before stay in "supervision".

    Returns:
        What has changed, for the log; None if nothing has.
    """
    file = Path(folder, RECORD)
    history: list[dict] = []
    changed: dict[str, str] = {}
    texts: list[str] = []
    if continued_in_epoch is not None and file.is_file():
        before = read_json(file)
        history, settings = before.get("history", []), without_removed(before.get("settings", {}))
        known = {name: value for name, value in ADDED.items() if name in content["settings"]} | settings
        changed = _changes(content["settings"], known, {*known, *content["settings"]})
        # what is set is chosen, too: it is told once
        chosen, was_chosen = content.get("chosen", {}), before.get("chosen", {})
        choices = _changes(chosen, was_chosen, {*chosen} & {*was_chosen} - {*changed})
        kinds = _changes(content["supervision"], before.get("supervision", {}),
                         {*content["supervision"]} & {*before.get("supervision", {})})
        if changed or choices or kinds:
            earlier = {"chosen": {name: was_chosen[name] for name in choices},
                       "supervision": {case: before["supervision"][case] for case in kinds}}
            history = [*history, {"until_epoch": continued_in_epoch, "nnunet_confkd": before.get("nnunet_confkd"),
                                  "settings": settings, **{key: values for key, values in earlier.items() if values}}]
        changed |= choices
        content, texts = _with_earlier_cases(content, before, sorted(kinds))
    write_json(file, {"nnunet_confkd": __version__, **content, "history": history})
    what = " and ".join(["settings"] * bool(changed) + ["cases"] * bool(texts))
    texts = [*(changed[name] for name in sorted(changed)), *texts]
    return (f"this training is continued with other {what} than before: {', '.join(texts)}. {file} keeps both." if what
            else None)


def _changes(now: dict, then: dict, names: set[str]) -> dict[str, str]:
    """{name: text} of the values that differ."""
    return {name: f"{name}: {shown(then.get(name))} -> {shown(now.get(name))}"
            for name in names if then.get(name) != now.get(name)}


def _with_earlier_cases(content: dict, before: dict, other: list[str]) -> tuple[dict, list[str]]:
    """Add the cases that a training has been trained on to its record; also return what has changed in the split.

    `other` are the cases of another kind than before.
    """
    now, earlier = content["supervision"], before.get("supervision", {})
    gone, new = sorted(set(earlier) - set(now)), sorted(set(now) - set(earlier))
    lists = {case: listed for case, listed in before.get(CLASSES_KEY, {}).items() if case in gone}
    content = {**content, "supervision": {**earlier, **now}}
    if lists or CLASSES_KEY in content:
        content[CLASSES_KEY] = lists | content.get(CLASSES_KEY, {})
    return content, [f"{counted(len(cases), 'training case')} {verb} ({some(cases)})" for cases, verb in (
        (gone, "left out"), (new, "added"), (other, "of another kind")) if cases]
