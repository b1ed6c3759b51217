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
        continued_in_epoch: Number of epochs done if a training is continued, else None. If settings or the kinds of
            cases have changed, the earlier ones are kept under "history", with the epoch until which they were used.
            Cases that the training has seen before stay in "supervision".

    Returns:
        What has changed, for the log; None if nothing has.
    """
    file = Path(folder, RECORD)
    history: list[dict] = []
    changed: list[str] = []
    cases: list[str] = []
    if continued_in_epoch is not None and file.is_file():
        before = read_json(file)
        history, changed = before.get("history", []), _changed_settings(content, before)
        kinds = {case: kind for case, kind in before.get("supervision", {}).items()
                 if content["supervision"].get(case, kind) != kind}
        if changed or kinds:
            earlier = {name: before[name] for name in ("nnunet_confkd", "chosen") if name in before}
            earlier["settings"] = without_removed(before.get("settings", {}))
            if kinds:
                earlier["supervision"] = kinds
            history = [*history, {"until_epoch": continued_in_epoch, **earlier}]
        content, cases = _with_earlier_cases(content, before)
    write_json(file, {"nnunet_confkd": __version__, **content, "history": history})
    what = " and ".join(["settings"] * bool(changed) + ["cases"] * bool(cases))
    return (f"this training is continued with other {what} than before: {', '.join([*changed, *cases])}. {file} keeps "
            f"both." if what else None)


def _changed_settings(content: dict, before: dict) -> list[str]:
    """Name the settings that were set or chosen otherwise, each with both values."""
    settings, earlier = content["settings"], without_removed(before.get("settings", {}))
    earlier = {name: value for name, value in ADDED.items() if name in settings} | earlier
    chosen, chosen_earlier = content.get("chosen", {}), before.get("chosen", {})

    def changes(now: dict, then: dict, names) -> dict[str, str]:
        return {name: f"{name}: {shown(then.get(name))} -> {shown(now.get(name))}"
                for name in names if then.get(name) != now.get(name)}

    # what the user sets is chosen, too: it is told once
    found = (changes(chosen, chosen_earlier, {*chosen} & {*chosen_earlier})
             | changes(settings, earlier, {*settings, *earlier}))
    return [found[name] for name in sorted(found)]


def _with_earlier_cases(content: dict, before: dict) -> tuple[dict, list[str]]:
    """Add the cases that a training has been trained on to its record; also return what has changed in the split."""
    now, earlier = content["supervision"], before.get("supervision", {})
    gone, new = sorted(set(earlier) - set(now)), sorted(set(now) - set(earlier))
    other = sorted(case for case in set(now) & set(earlier) if now[case] != earlier[case])
    lists = {case: listed for case, listed in before.get(CLASSES_KEY, {}).items() if case in gone}
    content = {**content, "supervision": {**earlier, **now}}
    if lists or CLASSES_KEY in content:
        content[CLASSES_KEY] = lists | content.get(CLASSES_KEY, {})
    return content, [f"{counted(len(cases), 'training case')} {verb} ({some(cases)})" for cases, verb in (
        (gone, "left out"), (new, "added"), (other, "of another kind")) if cases]
