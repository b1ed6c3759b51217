"""The settings: what is allowed, what overrides what, and what an error says."""
from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, fields

import pytest

from nnunet_confkd.errors import InputError
from nnunet_confkd.training.settings import Settings, settings_table

INF, NAN = float("inf"), float("nan")


def error_of(**settings) -> str:
    with pytest.raises(InputError) as error:
        Settings.from_blocks(settings)
    return str(error.value)


def test_the_defaults_are_valid_and_ask_for_the_whole_method():
    settings = Settings()
    assert settings == Settings.from_blocks() == Settings.from_blocks({})
    assert min(settings.weight_teacher, settings.weight_student, settings.weight_kl, settings.weight_entropy) > 0
    assert settings.kl_detach_teacher and settings.kl_reference == "teacher"  # the journal paper's


def test_an_unknown_key_is_refused_with_a_suggestion_and_the_known_ones():
    text = error_of(wieght_kl=1.0)
    assert "'wieght_kl'" in text and "did you mean 'weight_kl'?" in text
    assert all(f.name in text for f in fields(Settings))


def test_an_unknown_key_like_no_other_gets_no_suggestion():
    text = error_of(zzz=1)
    assert "'zzz'" in text and "did you mean" not in text


def test_every_unknown_key_is_named():
    text = error_of(wieght_kl=1.0, epoch=2)
    assert "'wieght_kl'" in text and "'epoch'" in text and "did you mean 'epochs'?" in text


@pytest.mark.parametrize("block", (None, [], "weight_kl", 3, [("weight_kl", 1.0)]), ids=repr)
def test_a_block_that_is_no_object_is_refused(block):
    with pytest.raises(InputError) as error:
        Settings.from_blocks({}, block)
    assert repr(block) in str(error.value)


BAD_VALUES = {
    "weight_kl": ("1.0", True, None, [1.0], NAN, INF, -0.1, 1e7),
    "kl_temperature": (0, 0.0, 1e3, NAN, "2"),
    "kl_ramp_end": (1.1, -0.1, NAN, False),
    "full_share": (0, 1, 0.0, 1.0, NAN, None, True),
    "epochs": (0, -1, 1.0, 2.5, "10", True, NAN),
    "iterations_per_epoch": (0, 1.0, False),
    "seed": (-1, 2 ** 31, 1.0, "1", True, NAN),
    "kl_detach_teacher": (0, 1, "true", None, 1.0),
    "kl_softmax_twice": (1, "no"),
    "kl_reference": ("master", "Teacher", None, True, 1, ["teacher"]),
    "supervised_loss": ("dice", ""),
    "student_images": ("full",),
    "student_average": ("mean",),
    "kl_images": ("unlabelled",),
    "teacher_hints": (1, "no"),
    "unlabelled_share": (-0.1, 1.1, "no"),
    "entropy_images": ("unlabelled",),
    "extra_resolutions": ("lowest",),
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in BAD_VALUES.items() for value in values],
                         ids=str)
def test_a_bad_value_is_refused_with_key_value_and_what_is_allowed(key, value):
    text = error_of(**{key: value})
    assert f"'{key}' must be" in text and f"got {value!r}" in text
    field = next(f for f in fields(Settings) if f.name == key)
    allowed = field.metadata.get("choices") or field.metadata.get("range") or ("true", "false")
    assert all(str(a) in text for a in allowed)


@pytest.mark.parametrize("key, value", (
    ("weight_kl", 0), ("weight_kl", 2), ("weight_entropy", 1e6), ("kl_temperature", 0.01), ("full_share", 0.99),
    ("epochs", 1), ("epochs", None), ("iterations_per_epoch", None), ("seed", None), ("seed", 0), ("seed", 2 ** 31 - 1),
    ("kl_detach_teacher", False), ("kl_reference", "student"), ("entropy_images", "all")), ids=str)
def test_values_at_the_limits_are_allowed(key, value):
    settings = Settings.from_blocks({key: value})
    assert getattr(settings, key) == value
    assert type(getattr(settings, key)) is type(value)


def test_numbers_and_choices_are_checked_without_blocks_too():
    with pytest.raises(InputError, match="'weight_kl'"):
        Settings(weight_kl=-1)


def test_nothing_to_learn_from_is_refused():
    text = error_of(weight_teacher=0, weight_student=0, weight_kl=0)
    assert "weight_teacher" in text and "weight_student" in text
    assert Settings(weight_teacher=0, weight_kl=0).weight_student > 0
    assert Settings(weight_student=0).weight_teacher > 0


def test_an_untrained_teacher_may_not_teach():
    text = error_of(weight_teacher=0)
    assert "weight_kl" in text and "weight_teacher" in text


@pytest.mark.parametrize("term", ("kl", "entropy"))
def test_a_ramp_that_ends_before_it_starts_is_refused(term):
    text = error_of(**{f"{term}_ramp_start": 0.5, f"{term}_ramp_end": 0.25})
    assert f"{term}_ramp_end" in text and "0.25" in text and "0.5" in text


# ---- ramps ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("term", ("kl", "entropy"))
def test_a_ramp_rises_linearly_from_its_start_to_its_end(term):
    other = {"kl": "entropy", "entropy": "kl"}[term]
    settings = Settings(**{f"{term}_ramp_start": 0.2, f"{term}_ramp_end": 0.6, f"{other}_ramp_start": 0.0, f"{other}_ramp_end": 0.0})
    factors = [settings.ramp(term, progress) for progress in (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)]
    assert factors == pytest.approx([0, 0, 0, 0.25, 0.5, 1, 1, 1])
    assert settings.ramp(other, 0.0) == 1.0


def test_without_a_ramp_the_whole_weight_holds_from_the_first_epoch():
    settings = Settings(kl_ramp_start=0.0, kl_ramp_end=0.0)
    assert settings.ramp("kl", 1 / 1000) == settings.ramp("entropy", 0.0) == 1.0


def test_a_ramp_without_length_is_a_step():
    settings = Settings(kl_ramp_start=0.5, kl_ramp_end=0.5)
    assert [settings.ramp("kl", progress) for progress in (0.0, 0.49, 0.5, 0.51, 1.0)] == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("start, end", ((0.0, 0.0), (0.0, 0.5), (0.5, 0.5), (1.0, 1.0), (0.0, 1.0)))
def test_the_last_epoch_has_the_whole_weight_also_where_it_is_the_only_one(start, end):
    # the progress of epoch e of n, counted from 0, is (e + 1) / n: 1 in the last
    assert Settings(entropy_ramp_start=start, entropy_ramp_end=end).ramp("entropy", 1.0) == 1.0


# ---- blocks, and settings as data -----------------------------------------------------------------------------------

def test_later_blocks_win_and_leave_the_other_settings_alone():
    settings = Settings.from_blocks({"weight_kl": 2.0, "full_share": 0.25}, {"weight_kl": 3.0}, {"seed": 1})
    assert (settings.weight_kl, settings.full_share, settings.seed) == (3.0, 0.25, 1)
    assert settings == Settings(weight_kl=3.0, full_share=0.25, seed=1)


def test_a_bad_value_that_a_later_block_overrides_does_no_harm():
    assert Settings.from_blocks({"weight_kl": -1}, {"weight_kl": 1}).weight_kl == 1


def test_blocks_are_not_changed():
    blocks = {"weight_kl": 2.0}, {"weight_kl": 3.0}
    Settings.from_blocks(*blocks)
    assert blocks == ({"weight_kl": 2.0}, {"weight_kl": 3.0})


def test_settings_survive_json():
    settings = Settings(weight_kl=0.1, kl_detach_teacher=False, kl_reference="student", epochs=7, seed=0,
                        entropy_ramp_end=1 / 3)
    for one in (settings, Settings()):
        assert Settings.from_blocks(json.loads(json.dumps(one.as_dict()))) == one
    assert set(settings.as_dict()) == {f.name for f in fields(Settings)}


def test_settings_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Settings().weight_kl = 2.0


def table_rows() -> list[list[str]]:
    """Cells as Markdown sees them: a bar ends a cell unless it is escaped."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in settings_table().splitlines()]


def test_the_table_has_a_row_for_every_setting_with_its_default_and_meaning():
    rows = table_rows()
    assert [row[0] for row in rows[2:]] == [f"`{f.name}`" for f in fields(Settings)]
    cells = {row[0].strip("`"): row[1:] for row in rows[2:]}
    assert cells["weight_entropy"][0] == "0.01"
    assert cells["kl_detach_teacher"][:2] == ["true", "`true`, `false`"]
    assert cells["seed"][0] == "null"
    assert cells["kl_images"][:2] == ["all", '`"all"`, `"full"`, `"partial"`']
    assert cells["weight_kl"][2] == "weight of L_kd, the distillation from teacher to student"


def test_no_cell_of_the_table_is_empty_or_broken_by_a_bar_in_its_text():
    for row in table_rows():
        assert len(row) == 4 and all(row), row
