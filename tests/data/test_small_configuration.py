"""The quick form of a configuration: its size, its name, and what it never replaces."""
from __future__ import annotations

import json

import pytest

from nnunet_confkd.data.small_configuration import add_quick_configuration
from nnunet_confkd.errors import InputError


def plans(tmp_path, **configurations):
    def usual(patch, **more):
        return {"patch_size": patch, "batch_size": 12, "data_identifier": "nnUNetPlans_x", "architecture": {
            "network_class_name": "N", "arch_kwargs": {"n_stages": 6, "features_per_stage": [32] * 6,
                                                       "n_conv_per_stage": [2] * 6}}, **more}

    file = tmp_path / "nnUNetPlans.json"
    file.write_text(json.dumps({"plans_name": "nnUNetPlans", "dataset_name": "Dataset001_A", "configurations": {
        "2d": usual([320, 250], confkd={"seed": 5, "epochs": 700}), "3d_fullres": usual([20, 192, 160]),
        "3d_lowres": usual([64, 64, 64]),
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}, **configurations}}))
    return file


def test_the_quick_form_is_small_and_keeps_other_settings(tmp_path):
    file = plans(tmp_path)
    assert add_quick_configuration(file, "2d") == ("2d", "2d_quick")
    assert add_quick_configuration(file, "2d_quick") == ("2d", "2d_quick")
    assert add_quick_configuration(file, "3d_fullres") == ("3d_fullres", "3d_fullres_quick")
    found = json.loads(file.read_text())["configurations"]
    small = found["2d_quick"]
    assert small["patch_size"] == [96, 96] and small["batch_size"] == 4 and small["inherits_from"] == "2d"
    assert small["architecture"]["arch_kwargs"]["features_per_stage"] == [16, 32, 64, 128]
    assert small["confkd"] == {"seed": 5, "epochs": 12, "iterations_per_epoch": 200, "complete_at": 0.0}
    assert found["3d_fullres_quick"]["confkd"] == {"epochs": 12, "iterations_per_epoch": 50, "complete_at": 0.0}
    assert found["3d_fullres_quick"]["patch_size"] == [24, 48, 48] and found["3d_fullres_quick"]["batch_size"] == 2
    assert found["2d"]["patch_size"] == [320, 250] and found["2d"]["architecture"]["arch_kwargs"]["n_stages"] == 6


def test_it_follows_new_plans_but_not_while_a_training_continues(tmp_path):
    file = plans(tmp_path)
    add_quick_configuration(file, "2d")
    content = json.loads(file.read_text())
    content["configurations"]["2d"]["patch_size"] = [64, 64]
    file.write_text(json.dumps(content))
    add_quick_configuration(file, "2d", keep=True)
    assert json.loads(file.read_text())["configurations"]["2d_quick"]["patch_size"] == [96, 96]
    add_quick_configuration(file, "2d")
    assert json.loads(file.read_text())["configurations"]["2d_quick"]["patch_size"] == [64, 64]


def test_a_configuration_of_the_users_and_a_cascade_are_refused(tmp_path):
    file = plans(tmp_path, **{"2d_quick": {"inherits_from": "2d", "batch_size": 3}})
    before = file.read_text()
    with pytest.raises(InputError, match="has a configuration 2d_quick that this command did not write; rename it"):
        add_quick_configuration(file, "2d")
    with pytest.raises(InputError, match="3d_cascade_fullres is the second stage of a cascade.*use 2d or 3d_fullres"):
        add_quick_configuration(file, "3d_cascade_fullres")
    assert file.read_text() == before
