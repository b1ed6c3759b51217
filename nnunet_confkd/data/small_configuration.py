"""Configurations with a small network, patch and batch, which a CPU can train."""
from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from nnunet_confkd.data.folders import WRITTEN_BY
from nnunet_confkd.data.json_files import read_plans
from nnunet_confkd.errors import InputError
from nnunet_confkd.files import write_json

QUICK, MARK = "_quick", "confkd train --quick"
# by the number of dimensions: a training takes some minutes on two CPU cores
LENGTHS = {2: {"epochs": 12, "iterations_per_epoch": 200}, 3: {"epochs": 12, "iterations_per_epoch": 50}}
SIZES: dict[int, dict[str, Any]] = {2: dict(features=(16, 32, 64, 128), batch_size=4, max_patch=96, convolutions=1),
                                    3: dict(features=(8, 16, 32, 64), batch_size=2, max_patch=48, convolutions=2)}


def add_small_configuration(plans_file: Path, name: str, base: str, confkd: dict | None = None, *,
                            features: tuple[int, ...] = (16, 32, 64, 128), batch_size: int = 8,
                            max_patch: int = 96, convolutions: int = 2) -> dict:
    """Add a configuration to a plans file: `base` with a small U-Net, patch and batch.

    The new configuration uses the preprocessed data of `base`.

    Args:
        plans_file: The plans file.
        name: The name of the new configuration.
        base: The configuration that it inherits from.
        confkd: Its settings for ConfKDTrainer.
        features: The number of channels per stage.
        batch_size: The number of patches per batch.
        max_patch: The largest size of a patch in voxels, rounded up to what the stages allow.
        convolutions: The number of convolutions per stage.

    Returns:
        The configuration.

    Examples:
        >>> add_small_configuration(Path("nnUNetPlans.json"), "2d_small", "2d", {"seed": 1})  # doctest: +SKIP
    """
    plans = read_plans(plans_file)
    configuration = _small(resolved(plans, base), base, features, batch_size, max_patch, convolutions)
    if confkd:
        configuration["confkd"] = confkd
    plans["configurations"][name] = configuration
    write_json(plans_file, plans, indent=4)
    return configuration


def _small(parent: dict, base: str, features: tuple[int, ...], batch_size: int, max_patch: int,
           convolutions: int) -> dict:
    multiple = 2 ** (len(features) - 1)
    patch = [min(max_patch, -(-size // multiple) * multiple) for size in parent["patch_size"]]
    stages, dim = len(features), len(patch)
    architecture = deepcopy(parent["architecture"])
    architecture["arch_kwargs"].update({
        "n_stages": stages, "features_per_stage": list(features), "kernel_sizes": [[3] * dim] * stages,
        "strides": [[1] * dim] + [[2] * dim] * (stages - 1), "n_conv_per_stage_decoder": [convolutions] * (stages - 1)})
    encoder = "n_blocks_per_stage" if "n_blocks_per_stage" in architecture["arch_kwargs"] else "n_conv_per_stage"
    architecture["arch_kwargs"][encoder] = [convolutions] * stages
    return {"inherits_from": base, "patch_size": patch, "batch_size": batch_size, "architecture": architecture}


def resolved(plans: dict, configuration: str) -> dict:
    """Return a configuration of the plans with what it inherits.

    Examples:
        >>> resolved(read_plans(Path("nnUNetPlans.json")), "2d_quick")["confkd"]["epochs"]  # doctest: +SKIP
        12
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    return PlansManager(deepcopy(plans)).get_configuration(configuration).configuration


def add_quick_configuration(plans_file: Path, configuration: str, keep: bool = False) -> tuple[str, str]:
    """Add the quick form of a configuration to a plans file, under a name of its own.

    Args:
        plans_file: The plans file.
        configuration: The usual configuration, or its quick form.
        keep: Whether a quick form that is there already stays as it is, because a training continues with it.

    Returns:
        The names of the usual configuration and of its quick form.

    Raises:
        InputError: The usual configuration is the second stage of a cascade, or the plans have another configuration
            of the new name, which this function did not write.

    Examples:
        >>> add_quick_configuration(Path("nnUNetPlans.json"), "2d")  # doctest: +SKIP
        ('2d', '2d_quick')
    """
    plans = read_plans(plans_file)
    content = plans["configurations"][configuration]
    base = content["inherits_from"] if content.get(WRITTEN_BY) == MARK else configuration
    name, parent = base + QUICK, resolved(plans, base)
    before = plans["configurations"].get(name)
    if before is not None and before.get(WRITTEN_BY) != MARK:
        raise InputError(f"--quick: {plans_file} has a configuration {name} that this command did not write; rename it")
    if parent.get("previous_stage"):
        raise InputError(f"--quick: {base} is the second stage of a cascade, which has no quick form; use 2d or "
                         f"3d_fullres")
    if before is not None and keep:
        return base, name
    dimensions = len(parent["patch_size"])
    new = _small(parent, base, **SIZES[dimensions])
    # to complete the labels would take longer than this training
    new |= {"confkd": {"complete_at": 0.0} | parent.get("confkd", {}) | LENGTHS[dimensions], WRITTEN_BY: MARK}
    if new != before:
        plans["configurations"][name] = new
        write_json(plans_file, plans, indent=4)
    return base, name
