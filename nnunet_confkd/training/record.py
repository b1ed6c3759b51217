"""The record of a training, `confkd.json` in the folder of the fold: what was trained on what, with which settings."""
from __future__ import annotations

from pathlib import Path

from nnunet_confkd import __version__
from nnunet_confkd.data.json_files import read_json
from nnunet_confkd.errors import shown
from nnunet_confkd.files import write_json
from nnunet_confkd.training.settings import ADDED, without_removed

RECORD = "confkd.json"


def write_record(folder: str | Path, content: dict, continued_in_epoch: int | None) -> str | None:
    """Write the record.

    Args:
        folder: Folder of the fold.
        content: The record, with the "settings".
        continued_in_epoch: Number of epochs done if a training is continued, else None. If the settings have changed,
            the earlier ones are kept under "history", with the epoch until which they were used.

    Returns:
        What has changed, for the log; None if nothing has.
    """
    file, settings = Path(folder, RECORD), content["settings"]
    history: list[dict] = []
    changed: list[str] = []
    if continued_in_epoch is not None and file.is_file():
        before = read_json(file)
        earlier, history = without_removed(before.get("settings", {})), before.get("history", [])
        known = {name: value for name, value in ADDED.items() if name in settings} | earlier
        changed = [f"{name}: {shown(known.get(name))} -> {shown(settings.get(name))}"
                   for name in sorted({*known, *settings}) if known.get(name) != settings.get(name)]
        if changed:
            history = [*history, {"until_epoch": continued_in_epoch, "nnunet_confkd": before.get("nnunet_confkd"),
                                  "settings": earlier}]
    write_json(file, {"nnunet_confkd": __version__, **content, "history": history})
    return (f"this training is continued with other settings than before: {', '.join(changed)}. {file} keeps both."
            if changed else None)
