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
        continued_in_epoch: Number of epochs done if a training is continued, else None. If the settings have changed,
            the earlier ones are kept under "history", with the epoch until which they were used. Cases that the
            training has seen before stay in "supervision".

    Returns:
        What has changed, for the log; None if nothing has.
    """
    file, settings = Path(folder, RECORD), content["settings"]
    history: list[dict] = []
    changed: list[str] = []
    cases: list[str] = []
    if continued_in_epoch is not None and file.is_file():
        before = read_json(file)
        earlier, history = without_removed(before.get("settings", {})), before.get("history", [])
        known = {name: value for name, value in ADDED.items() if name in settings} | earlier
        changed = [f"{name}: {shown(known.get(name))} -> {shown(settings.get(name))}"
                   for name in sorted({*known, *settings}) if known.get(name) != settings.get(name)]
        if changed:
            history = [*history, {"until_epoch": continued_in_epoch, "nnunet_confkd": before.get("nnunet_confkd"),
                                  "settings": earlier}]
        content, cases = _with_earlier_cases(content, before)
    write_json(file, {"nnunet_confkd": __version__, **content, "history": history})
    what = " and ".join(["settings"] * bool(changed) + ["cases"] * bool(cases))
    return (f"this training is continued with other {what} than before: {', '.join([*changed, *cases])}. {file} keeps "
            f"both." if what else None)


def _with_earlier_cases(content: dict, before: dict) -> tuple[dict, list[str]]:
    """Add the cases that a training has been trained on to its record; also return what has changed in the split."""
    now, earlier = content["supervision"], before.get("supervision", {})
    gone, new = sorted(set(earlier) - set(now)), sorted(set(now) - set(earlier))
    lists = {case: listed for case, listed in before.get(CLASSES_KEY, {}).items() if case in gone}
    content = {**content, "supervision": {**earlier, **now}}
    if lists or CLASSES_KEY in content:
        content[CLASSES_KEY] = lists | content.get(CLASSES_KEY, {})
    return content, [f"{counted(len(cases), 'training case')} {verb} ({some(cases)})"
                     for cases, verb in ((gone, "left out"), (new, "added")) if cases]
