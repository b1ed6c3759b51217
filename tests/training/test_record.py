"""The record of a training, confkd.json: after a first run, after --c, and after --c with other settings."""
from __future__ import annotations

import json

from nnunet_confkd.training.record import RECORD, write_record
from nnunet_confkd.training.settings import ADDED, REMOVED

OLD, NEW = {"weight_kl": 3.0, "seed": None}, {"weight_kl": 1.5, "seed": None}


def write(folder, settings, epoch=None) -> tuple[str | None, dict]:
    changed = write_record(folder, {"settings": settings, "supervision": {"a": "full"}}, epoch)
    return changed, json.loads((folder / RECORD).read_text())


def test_earlier_settings_are_kept_with_the_epoch_until_which_they_were_used(tmp_path):
    changed, first = write(tmp_path, OLD)
    assert changed is None and first["settings"] == OLD and first["history"] == []
    changed, second = write(tmp_path, NEW, epoch=4)
    assert "weight_kl: 3.0 -> 1.5" in changed and "seed" not in changed and str(tmp_path / RECORD) in changed
    kept = {"until_epoch": 4, "nnunet_confkd": first["nnunet_confkd"], "settings": OLD}
    assert second["settings"] == NEW and second["history"] == [kept]
    assert write(tmp_path, NEW, epoch=5) == (None, second)
    assert write(tmp_path, OLD, epoch=6)[1]["history"] == [kept, {**kept, "until_epoch": 6, "settings": NEW}]


def test_cases_that_were_trained_on_before_stay_in_the_record(tmp_path):
    def write_cases(epoch, cases, **more) -> tuple[str | None, dict]:
        changed = write_record(tmp_path, {"settings": OLD, "supervision": cases, **more}, epoch)
        return changed, json.loads((tmp_path / RECORD).read_text())

    write_cases(None, {"a": "full", "b": "partial"}, annotated_classes={"b": ["organ"]})
    changed, record = write_cases(4, {"a": "full", "c": "full"})
    assert "other cases than before: 1 training case left out (b), 1 training case added (c)" in changed
    assert record["supervision"] == {"a": "full", "b": "partial", "c": "full"} and record["history"] == []
    assert record["annotated_classes"] == {"b": ["organ"]}, "compare still knows what b was annotated for"
    assert write_cases(None, {"c": "full"})[1]["supervision"] == {"c": "full"}, "it begins anew"


def test_other_kinds_of_cases_and_other_choices_from_the_data_are_told_and_kept(tmp_path):
    def write_chosen(epoch, kind, chosen, settings=OLD) -> tuple[str | None, dict]:
        content = {"settings": settings, "chosen": chosen, "supervision": {"a": "full", "b": kind}}
        return write_record(tmp_path, content, epoch), json.loads((tmp_path / RECORD).read_text())

    chosen = {"full_share": 0.5, "weight_kl": 3.0}
    _, first = write_chosen(None, "partial", chosen)
    assert write_chosen(2, "partial", chosen)[0] is None
    changed, second = write_chosen(4, "full", {**chosen, "full_share": 1.0})
    assert "settings and cases than before: full_share: 0.5 -> 1.0, 1 training case of another kind (b)." in changed
    assert second["chosen"]["full_share"] == 1.0 and second["supervision"]["b"] == "full"
    assert second["history"] == [{"until_epoch": 4, "nnunet_confkd": first["nnunet_confkd"], "settings": OLD,
                                  "chosen": {"full_share": 0.5}, "supervision": {"b": "partial"}}]
    changed, _ = write_chosen(5, "full", {"full_share": 1.0, "weight_kl": 1.5, "cutmix": 0.5}, NEW)
    assert changed.count("weight_kl") == 1, "a setting that was set is told once"
    assert "cutmix" not in changed, "an earlier version did not choose it"


def test_a_training_that_begins_anew_forgets_the_earlier_settings(tmp_path):
    write(tmp_path, OLD)
    changed, record = write(tmp_path, NEW)
    assert changed is None and record["history"] == []


def test_settings_that_an_earlier_version_had_are_no_change(tmp_path):
    write(tmp_path, {**OLD, **REMOVED})
    assert write(tmp_path, OLD, epoch=1)[0] is None


def test_settings_that_came_later_are_no_change_if_they_do_what_the_earlier_version_did(tmp_path):
    write(tmp_path, OLD)
    assert write(tmp_path, OLD | ADDED, epoch=1)[0] is None
    write(tmp_path, OLD)
    assert "teacher_width: 1.0 -> 0.5." in write(tmp_path, OLD | ADDED | {"teacher_width": 0.5}, epoch=1)[0]
