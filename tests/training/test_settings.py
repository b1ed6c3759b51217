"""The settings: what is allowed, what overrides what, what older models may still say, and what an error tells."""
from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, fields

import pytest

from nnunet_confkd.errors import InputError
from nnunet_confkd.training.settings import ADDED, REMOVED, Settings, settings_table, without_removed

INF, NAN = float("inf"), float("nan")


def error_of(**settings) -> str:
    with pytest.raises(InputError) as error:
        Settings.from_blocks(settings)
    return str(error.value)


def test_the_defaults_are_valid_and_ask_for_the_whole_method():
    settings = Settings()
    assert settings == Settings.from_blocks() == Settings.from_blocks({})
    assert settings.weight_student == 1 and settings.uses_hints
    assert settings.weight_teacher is settings.weight_kl is settings.weight_entropy is None, "chosen from the data"
    assert not Settings(weight_kl=0).uses_hints and not Settings(weight_teacher=0).uses_hints


@pytest.mark.parametrize("given, suggested", [({"wieght_kl": 1.0}, ["weight_kl"]), ({"zzz": 1}, []),
                                              ({"wieght_kl": 1.0, "epoch": 2}, ["weight_kl", "epochs"])], ids=str)
def test_every_unknown_key_is_named_with_the_known_one_that_is_most_like_it(given, suggested):
    text = error_of(**given)
    assert all(f"'{key}'" in text for key in given)
    assert re.findall(r"did you mean '(\w+)'", text) == suggested
    assert all(f.name in text for f in fields(Settings))


@pytest.mark.parametrize("block", (None, [], "weight_kl", 3, [("weight_kl", 1.0)]), ids=repr)
def test_a_block_that_is_no_object_is_refused(block):
    with pytest.raises(InputError) as error:
        Settings.from_blocks({}, block)
    assert repr(block) in str(error.value)


BAD_VALUES = {
    "weight_kl": ("1.0", True, [1.0], NAN, INF, -0.1, 1e7),
    "kl_ramp_end": (1.1, -0.1, NAN, False),
    "full_share": (0, 0.0, 1.1, NAN, True),
    "epochs": (0, -1, 1.0, 2.5, "10", True, NAN),
    "seed": (-1, 2 ** 31, 1.0, "1", True, NAN),
    "cutmix": (-0.1, 1.5, NAN, True),
    "kl_images": ("unlabelled", "Full", None, True, 1, ["full"]),
    "teacher_hints": (0, 1, "true", None, 1.0),
    "equal_kinds": (0, 1, "true", 1.0),
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in BAD_VALUES.items() for value in values],
                         ids=str)
def test_a_bad_value_is_refused_with_key_value_and_what_is_allowed(key, value):
    text = error_of(**{key: value})
    field = next(f for f in fields(Settings) if f.name == key)
    allowed = field.metadata.get("choices") or field.metadata.get("range") or ("true", "false")
    assert all(part in text for part in (repr(key), repr(value), *map(str, allowed)))


@pytest.mark.parametrize("key, value", (
    ("weight_kl", 0), ("weight_kl", 2), ("weight_entropy", 1e6), ("full_share", 0.01), ("full_share", 1),
    ("full_share", None), ("equal_kinds", None), ("weight_kl", None), ("weight_teacher", None),
    ("epochs", 1), ("epochs", None), ("iterations_per_epoch", None), ("seed", None), ("seed", 0), ("seed", 2 ** 31 - 1),
    ("teacher_hints", False), ("teacher_trains_encoder", True),
    ("kl_images", "partial"), ("extra_resolutions", "all")), ids=str)
def test_values_at_the_limits_are_allowed_and_kept_as_they_are(key, value):
    found = getattr(Settings.from_blocks({key: value}), key)
    assert found == value and type(found) is type(value)


def test_values_are_checked_without_blocks_too():
    with pytest.raises(InputError, match="'weight_kl'"):
        Settings(weight_kl=-1)


@pytest.mark.parametrize("refused, allowed", [
    ({"weight_teacher": 0, "weight_student": 0, "weight_kl": 0}, {"weight_teacher": 0, "weight_kl": 0}),
    ({"weight_teacher": 0, "weight_kl": 1}, {"weight_teacher": 0}),  # an untrained teacher
    ({"weight_student": 0, "teacher_trains_encoder": False}, {"teacher_trains_encoder": False}),
    ({"weight_student": 0, "cutmix": 0.5}, {"weight_student": 0, "cutmix": 0}),
    ({"cutmix": 0.5, "kl_images": "full"}, {"cutmix": 0, "kl_images": "full"}),
    ({"cutmix": 0.5, "equal_kinds": True}, {"cutmix": 0.5}),
    ({"kl_ramp_start": 0.5, "kl_ramp_end": 0.25}, {"kl_ramp_start": 0.5, "kl_ramp_end": 0.5})], ids=str)
def test_settings_that_contradict_each_other_are_refused(refused, allowed):
    text = error_of(**refused)
    assert all(key in text for key in refused if key != "weight_kl")
    Settings(**allowed)


# ---- settings of earlier versions -----------------------------------------------------------------------------------

def test_the_block_of_an_older_model_means_the_same_as_before():
    """The plans of a trained model hold all settings of the version that trained it."""
    block = {**REMOVED, **Settings().as_dict(), "weight_kl": 2.0}
    assert Settings.from_blocks(json.loads(json.dumps(block))) == Settings(weight_kl=2.0)
    assert not set(REMOVED) & set(Settings().as_dict())
    assert without_removed(block) == Settings(weight_kl=2.0).as_dict()


@pytest.mark.parametrize("key, value", [("kl_temperature", 2.0), ("kl_detach_teacher", False),
                                        ("supervised_loss", "ce"),
                                        ("entropy_ramp_end", NAN), ("student_images", ["all"])], ids=str)
def test_a_removed_setting_of_another_value_is_refused_with_what_is_left(key, value):
    text = error_of(**{key: value})
    assert f"'{key}' has been removed" in text
    assert json.dumps(value) in text and json.dumps(REMOVED[key]) in text and "Delete it from the plans" in text
    assert without_removed({key: value}).keys() == {key}


# ---- the ramp of the KL ---------------------------------------------------------------------------------------------

def test_the_ramp_rises_linearly_from_its_start_to_its_end():
    settings = Settings(kl_ramp_start=0.2, kl_ramp_end=0.6)
    factors = [settings.kl_ramp(progress) for progress in (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)]
    assert factors == pytest.approx([0, 0, 0, 0.25, 0.5, 1, 1, 1])


def test_a_ramp_without_length_is_a_step():
    settings = Settings(kl_ramp_start=0.5, kl_ramp_end=0.5)
    assert [settings.kl_ramp(progress) for progress in (0.0, 0.49, 0.5, 0.51, 1.0)] == [0, 0, 1, 1, 1]
    assert Settings(kl_ramp_start=0.0, kl_ramp_end=0.0).kl_ramp(0.0) == 1


@pytest.mark.parametrize("start, end", ((0.0, 0.0), (0.0, 0.5), (0.5, 0.5), (1.0, 1.0), (0.0, 1.0)))
def test_the_last_iteration_has_the_whole_weight(start, end):
    assert Settings(kl_ramp_start=start, kl_ramp_end=end).kl_ramp(1.0) == 1.0


# ---- blocks, and settings as data -----------------------------------------------------------------------------------

def test_later_blocks_win_and_leave_the_other_settings_and_the_blocks_alone():
    blocks = {"weight_kl": -1, "full_share": 0.25}, {"weight_kl": 3.0}, {"seed": 1}
    assert Settings.from_blocks(*blocks) == Settings(weight_kl=3.0, full_share=0.25, seed=1)
    assert blocks == ({"weight_kl": -1, "full_share": 0.25}, {"weight_kl": 3.0}, {"seed": 1})


def test_settings_survive_json():
    settings = Settings(weight_kl=0.1, teacher_hints=False, kl_images="partial", epochs=7, seed=0, kl_ramp_start=1 / 3)
    for one in (settings, Settings()):
        assert Settings.from_blocks(json.loads(json.dumps(one.as_dict()))) == one
    assert set(settings.as_dict()) == {f.name for f in fields(Settings)}


def test_settings_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Settings().weight_kl = 2.0


def test_the_table_has_a_row_for_every_setting_under_the_heading_of_its_group():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in settings_table().splitlines()]
    assert all(len(row) == 4 for row in rows)
    groups, heading = {}, None
    for name, *cells in rows[2:]:
        if name.startswith("**"):
            heading = name.strip("*")
        else:
            assert all(cells), name
            groups.setdefault(heading, {})[name.strip("`")] = cells
    assert list(groups) == ["losses", "teacher", "batches", "run"]
    cells = {name: of for group in groups.values() for name, of in group.items()}
    assert list(cells) == [f.name for f in fields(Settings)]
    assert groups["teacher"].keys() == {"teacher_width", "teacher_hints", "hint_reach", "hint_watershed", "complete_at",
                                        "teacher_trains_encoder"}
    assert cells["weight_student"][:2] == ["1", "0 to 1000000"]
    assert cells["teacher_hints"][:2] == ["true", "`true`, `false`"]
    assert cells["seed"][0] == "null"
    assert cells["kl_images"][:2] == ["all", '`"all"`, `"full"`, `"partial"`']


def test_the_settings_of_a_model_of_version_0_1_keep_its_network_and_its_loss():
    """A training writes all of its settings into the plans. Those that are new since then had no effect."""
    written = Settings().as_dict()
    for name in ADDED:
        del written[name]
    settings = Settings.from_blocks(written)
    assert (settings.teacher_width, settings.prior_correction) == (1, 0)
    assert (settings.cutmix, settings.cutmix_full) == (0, 0)
    assert Settings.from_blocks({**written, "teacher_width": 0.25}).teacher_width == 0.25
    del written["seed"]  # a user's block
    assert Settings.from_blocks(written) == Settings()
