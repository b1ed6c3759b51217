"""How long a training or a prediction is expected to take on the CPU of this machine: a rough guess, made before."""
from __future__ import annotations

from math import ceil, prod
from pathlib import Path
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_confkd.data.json_files import read_description, read_plans
from nnunet_confkd.device import seconds_per_pass
from nnunet_confkd.errors import counted
from nnunet_confkd.output import duration

BRANCHES = 1.2  # a step of both branches, in steps of the student
VALIDATION = 1.1  # nnU-Net's validation batches of each epoch
STEP = 0.5  # of nnU-Net's sliding window, in patches


def _seconds(plans: PlansManager, configuration, described: dict, training: bool) -> float:
    """The time that the student takes for an image of the size of a patch, with the backward pass in a training."""
    channels = determine_num_input_channels(plans, configuration, described)
    heads = plans.get_label_manager(described).num_segmentation_heads
    network = nnUNetTrainer.build_network_architecture(plans, configuration, channels, heads, False)
    images = configuration.batch_size if training else 1
    return seconds_per_pass(network, (images, channels, *configuration.patch_size), training) / images


def training_text(folder: Path, plans_name: str, name: str, epochs: int, iterations: int) -> str:
    """Say how long a training is expected to take.

    Args:
        folder: Of the data set in nnUNet_preprocessed.
        plans_name: Of the plans.
        name: Of the configuration.
        epochs: Their number.
        iterations: The number of iterations per epoch.
    """
    plans = PlansManager(read_plans(folder / f"{plans_name}.json"))
    described = read_description(folder / "dataset.json")
    configuration = plans.get_configuration(name)
    seconds = _seconds(plans, configuration, described, True) * configuration.batch_size * BRANCHES * VALIDATION
    time = duration(seconds * epochs * iterations)
    return (f"{counted(epochs, 'epoch')} should take {time} "
            "(a rough guess; after an epoch the time left is told)")


def windows(size: tuple[int, ...], patch: tuple[int, ...]) -> int:
    """Return how many patches nnU-Net's sliding window predicts.

    Args:
        size: Of the image in voxels; with one number more than the patch, the first one counts slices.
        patch: Its size in voxels.
    """
    slices = size[:len(size) - len(patch)]
    sides = zip(size[len(slices):], patch)
    return prod(slices) * prod(ceil(max(0, side - length) / (length * STEP)) + 1 for side, length in sides)


def prediction_text(model: Path, folds: int = 1, mirroring: bool = True) -> str | None:
    """Say how long the prediction of an image of the usual size is expected to take; None if it is not known.

    Args:
        model: The folder of the trained model.
        folds: How many networks predict.
        mirroring: Whether all mirror images are predicted, too.
    """
    try:
        plans = PlansManager(read_plans(model / "plans.json"))
        described: dict[str, Any] = read_description(model / "dataset.json")
        configuration = plans.get_configuration(model.name.split("__")[-1])
        patch, size = configuration.patch_size, configuration.median_image_size_in_voxels
        if len(patch) == 2:
            size = [plans.plans["original_median_shape_after_transp"][0], *size]
        seconds = _seconds(plans, configuration, described, False)
    except (ValueError, KeyError, RuntimeError, TypeError):  # the prediction itself tells what is wrong
        return None
    passes = windows(tuple(map(int, size)), tuple(patch)) * (2 ** len(patch) if mirroring else 1) * folds
    return f"an image is expected to take {duration(seconds * passes)}"
