"""Several processes (DDP) against one process with all of their images: network and losses, by gloo on the CPU.

nnU-Net's own runner insists on CUDA. This file is its own worker: `python test_ranks.py RANK FOLDER [short]`.
"""
from __future__ import annotations

import itertools
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_confkd.training.hints import hint_channels
from nnunet_confkd.training.losses import ConfKDLoss, PartialSupervision, hide_unlisted
from nnunet_confkd.training.network import TwoBranchUNet

WORLD = 2
CHANNELS = 3
IGNORE = CHANNELS
# fully annotated and other images of each rank
SPLITS = {"even": ((1, 1), (1, 1)), "uneven": ((2, 1), (0, 1)), "a kind a rank": ((1, 0), (0, 2)),
          "full only": ((2, 0), (1, 0)), "no full image": ((0, 2), (0, 1))}
WEIGHTS = {"teacher": 1.0, "student": 0.7, "kl": 2.0, "entropy": 0.5}
OBJECTIVES = {"default": {}, "papers": {"kl_images": "full", "extra_resolutions": "all"},
              "kl on others": {"kl_images": "partial"}, "mean of kinds": {"equal_kinds": True}}
SHARES = (0.3, 0.0, 0.02, 0.1)  # annotated, of each image that is not fully annotated
# nnU-Net plans batch Dice for 2-D, a Dice of each image for 3-D. The last two: regions, and hidden classes
EXPERIMENTS = list(itertools.product(SPLITS, OBJECTIVES, (2, 3), (False, True), (False, True)))
SHORT = [("uneven", "default", 2, False, False), ("uneven", "default", 3, True, False),
         ("uneven", "default", 2, False, True), ("uneven", "default", 3, False, True),
         ("uneven", "default", 3, True, True), ("a kind a rank", "mean of kinds", 2, False, False)]


def lists_of(number: int, ndim: int) -> torch.Tensor:
    """The heads that the images of all ranks are annotated for. The background is head 0 of labels.

    In 2-D no image with annotated voxels lists class 2, so that the Dice of the batch is that of class 1 alone. In 3-D
    the images list all classes, all but 1, all but 2, and so on.
    """
    lists = torch.ones(number, CHANNELS, dtype=torch.bool)
    if ndim == 2:
        lists[:3, 2] = False
    else:
        lists[1::3, 1] = lists[2::3, 2] = False
    return lists


def joint_batch(split: str, ndim: int, regions: bool, hidden: bool = False):
    """Images, targets of two resolutions, hints, the number of fully annotated images, which come first, and for which
    heads each image is annotated (None: all of them for all), of all ranks together."""
    full, others = (sum(part[kind] for part in SPLITS[split]) for kind in (0, 1))
    random = torch.Generator().manual_seed(3)
    images, targets = torch.randn(full + others, 1, *ndim * [16], generator=random).double(), []
    for side in (16, 8):
        labels = torch.randint(0, CHANNELS, (full + others, 1, *ndim * [side]), generator=random)
        for image, share in zip(labels[full:], SHARES):
            image[torch.rand(image.shape, generator=random) >= share] = IGNORE
        if hidden:
            labels = hide_unlisted(labels, lists_of(len(labels), ndim))
        if regions:  # one-hot, then the ignore mask
            ignored = labels == IGNORE
            labels = torch.cat([*((labels == c) for c in range(CHANNELS)), ignored], 1)
        targets.append(labels)
    hint_mask = torch.rand(images.shape, generator=random) < 0.2
    if not regions:
        hint_mask &= targets[0] != IGNORE
    hints = hint_channels(targets[0], hint_mask, CHANNELS, regions).double()
    return images, targets, hints, full, lists_of(len(images), ndim) if hidden else None


def images_of_rank(split: str, rank: int) -> list[int]:
    """The rank's part of the joint batch."""
    full, others = (np.cumsum([0, *(part[kind] for part in SPLITS[split])]) for kind in (0, 1))
    return [*range(full[rank], full[rank + 1]), *range(full[-1] + others[rank], full[-1] + others[rank + 1])]


def network_of(ndim: int, seed: int = 0) -> TwoBranchUNet:
    torch.manual_seed(seed)
    unet = PlainConvUNet(
        input_channels=1, n_stages=3, features_per_stage=[4, 8, 8], conv_op={2: nn.Conv2d, 3: nn.Conv3d}[ndim],
        kernel_sizes=3, strides=[1, 2, 2], num_classes=CHANNELS, n_conv_per_stage=1, n_conv_per_stage_decoder=1,
        conv_bias=True, norm_op={2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[ndim],
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, deep_supervision=True)
    # In float32 a batch of another size rounds otherwise, and an activation near the kink of a ReLU may fall on its
    # other side.
    return TwoBranchUNet(unet).double()


def objective_of(name: str, ndim: int, regions: bool, ddp: bool) -> ConfKDLoss:
    dice = {"batch_dice": ndim == 2, "smooth": 1e-5, "do_bg": regions, "ddp": ddp}
    weights = {"weight_ce": 0.7, "weight_dice": 1.3, "dice_class": MemoryEfficientSoftDiceLoss}
    if regions:
        stock = DC_and_BCE_loss({}, dice, use_ignore_label=True, **weights)
    else:
        stock = DC_and_CE_loss(dice, {}, ignore_label=IGNORE, **weights)
    return ConfKDLoss(PartialSupervision(stock, IGNORE, regions, ddp=ddp), WEIGHTS, resolution_weights=(2 / 3, 1 / 3),
                      regions=regions, **OBJECTIVES[name])


def step(network, loss: ConfKDLoss, images, targets, hints, num_full: int, listed):
    """Terms and gradients. Twice, as DDP complains in the second step of what was missing in the first."""
    others = loss.kl_images != "full"
    for _ in range(2):
        network.zero_grad()
        total, terms = loss(*network(images, num_full, hints if others else None, others), targets, num_full,
                            listed=listed)
        total.backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in network.named_parameters()}
    return {"loss": total.detach(), **terms}, gradients


def work(rank: int, folder: Path, experiments: list) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD,
                                         timeout=timedelta(seconds=60))
    results = {}
    for experiment in experiments:
        split, objective, ndim, regions, hidden = experiment
        mine = images_of_rank(split, rank)
        images, targets, hints, _, listed = joint_batch(split, ndim, regions, hidden)
        network = DistributedDataParallel(network_of(ndim, seed=rank))  # starts all ranks from the first's weights
        loss = objective_of(objective, ndim, regions, ddp=True)
        results[experiment] = step(network, loss, images[mine], [t[mine] for t in targets], hints[mine],
                                   SPLITS[split][rank][0], None if listed is None else listed[mine])
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def compare(ranks: list[dict], experiment: tuple) -> None:
    split, objective, ndim, regions, hidden = experiment
    loss = objective_of(objective, ndim, regions, ddp=False)
    terms, gradients = step(network_of(ndim), loss, *joint_batch(split, ndim, regions, hidden))
    largest = float(max(gradient.abs().max() for gradient in gradients.values()))
    assert largest > 1e-3
    for _, found in (results[experiment] for results in ranks):
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6 * largest,
                                       msg=lambda text: f"{experiment}, {name}: {text}")
    for term, value in terms.items():  # what is logged: the mean over the ranks
        mean = sum(results[experiment][0][term] for results in ranks) / WORLD
        torch.testing.assert_close(mean, value, rtol=1e-4, atol=1e-5, msg=lambda text: f"{experiment}, {term}: {text}")


def test_the_gradients_of_two_ranks_are_those_of_one_process(run_ranks, tmp_path):
    """Some of the experiments: ranks with unequal numbers of fully annotated images, one of them without any, and with
    unequal numbers of images that are not annotated for all classes."""
    ranks = run_ranks(__file__, tmp_path, "short")
    for experiment in SHORT:
        compare(ranks, experiment)


@pytest.fixture(scope="module")
def ranks(run_ranks, tmp_path_factory) -> list[dict]:
    """Terms and gradients of both ranks in all experiments."""
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_the_gradients_of_two_ranks_are_those_of_one_process_in_every_case(ranks, split):
    for experiment in EXPERIMENTS:
        if experiment[0] == split:
            compare(ranks, experiment)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]), SHORT if "short" in sys.argv else EXPERIMENTS)
