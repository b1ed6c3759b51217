"""Several processes (DDP) against one process with all of their images: network and losses, by gloo on the CPU.

nnU-Net's own runner insists on CUDA. This file is its own worker: `python test_ranks.py RANK FOLDER`.
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
from nnunet_confkd.training.losses import ConfKDLoss, PartialSupervision
from nnunet_confkd.training.network import TwoBranchUNet

WORLD = 2
CHANNELS = 3
IGNORE = CHANNELS
# images of each rank: full ones and others
SPLITS = {"even": ((1, 1), (1, 1)), "uneven": ((2, 1), (0, 1)), "a kind a rank": ((1, 0), (0, 2)), "full only": ((2, 0), (1, 0)),
          "no full image": ((0, 2), (0, 1))}
WEIGHTS = {"teacher": 1.0, "student": 0.7, "kl": 2.0, "entropy": 0.5}
OBJECTIVES = {"joint": {}, "separate": {"student_average": "separate"}, "partial": {"student_images": "partial"},
              "highest": {"extra_resolutions": "highest", "entropy_images": "all"},
              # with hints, as by default
              "kl on all": {"extra_resolutions": "highest", "kl_images": "all"}, "kl on others": {"kl_images": "partial"}}
SHARES = (0.3, 0.0, 0.02, 0.1)  # annotated, of each image that is not full
each_head = pytest.mark.parametrize("regions", (False, True), ids=("softmax", "regions"))
each_split = pytest.mark.parametrize("split", SPLITS)
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)
# nnU-Net plans batch Dice for 2-D, a Dice per image for 3-D
each_dice = pytest.mark.parametrize("ndim", (2, 3), ids=("batch_dice", "dice_per_image"))


def joint_batch(split: str, ndim: int, regions: bool):
    """Images, targets of two resolutions, and hints, of all ranks together; the full images come first."""
    full, others = (sum(part[kind] for part in SPLITS[split]) for kind in (0, 1))
    random = torch.Generator().manual_seed(3)
    images, targets = torch.randn(full + others, 1, *ndim * [16], generator=random).double(), []
    for side in (16, 8):
        labels = torch.randint(0, CHANNELS, (full + others, 1, *ndim * [side]), generator=random)
        for image, share in zip(labels[full:], SHARES):
            image[torch.rand(image.shape, generator=random) >= share] = IGNORE
        if regions:  # one-hot, then the ignore mask
            ignored = labels == IGNORE
            labels = torch.cat([*((labels == c) for c in range(CHANNELS)), ignored], 1)
        targets.append(labels)
    shown = torch.rand(images.shape, generator=random) < 0.2
    if not regions:
        shown &= targets[0] != IGNORE
    return images, targets, hint_channels(targets[0], shown, CHANNELS, regions).double(), full


def images_of_rank(split: str, rank: int) -> list[int]:
    """Its part of the joint batch."""
    full, others = (np.cumsum([0, *(part[kind] for part in SPLITS[split])]) for kind in (0, 1))
    return [*range(full[rank], full[rank + 1]), *range(full[-1] + others[rank], full[-1] + others[rank + 1])]


def network_of(ndim: int, seed: int = 0) -> TwoBranchUNet:
    torch.manual_seed(seed)
    unet = PlainConvUNet(
        input_channels=1, n_stages=3, features_per_stage=[4, 8, 8], conv_op={2: nn.Conv2d, 3: nn.Conv3d}[ndim], kernel_sizes=3,
        strides=[1, 2, 2], num_classes=CHANNELS, n_conv_per_stage=1, n_conv_per_stage_decoder=1, conv_bias=True,
        norm_op={2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[ndim], norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, deep_supervision=True)
    # in float32 a batch of another size rounds otherwise, and an activation next to the kink of a ReLU falls on its other side
    return TwoBranchUNet(unet).double()


def objective_of(name: str, ndim: int, regions: bool, ddp: bool) -> ConfKDLoss:
    dice = {"batch_dice": ndim == 2, "smooth": 1e-5, "do_bg": regions, "ddp": ddp}
    if regions:
        stock = DC_and_BCE_loss({}, dice, weight_ce=0.7, weight_dice=1.3, use_ignore_label=True, dice_class=MemoryEfficientSoftDiceLoss)
    else:
        stock = DC_and_CE_loss(dice, {}, weight_ce=0.7, weight_dice=1.3, ignore_label=IGNORE, dice_class=MemoryEfficientSoftDiceLoss)
    supervised = PartialSupervision(stock, IGNORE, regions, ddp=ddp)
    return ConfKDLoss(supervised, WEIGHTS, resolution_weights=(2 / 3, 1 / 3), regions=regions, **OBJECTIVES[name])


def step(network, loss: ConfKDLoss, images, targets, hints, num_full: int):
    """Terms and gradients. Twice, as DDP complains in the second step of what was missing in the first."""
    others = loss.kl_images != "full"
    for _ in range(2):
        network.zero_grad()
        total, terms = loss(*network(images, num_full, hints if others else None, others), targets, num_full)
        total.backward()
    return ({"loss": total.detach(), **terms}, {name.removeprefix("module."): p.grad for name, p in network.named_parameters()})


def experiments():
    return itertools.product(SPLITS, OBJECTIVES, (2, 3), (False, True))


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD,
                                         timeout=timedelta(seconds=60))
    results = {}
    for split, objective, ndim, regions in experiments():
        mine = images_of_rank(split, rank)
        images, targets, hints, _ = joint_batch(split, ndim, regions)
        network = DistributedDataParallel(network_of(ndim, seed=rank))  # which starts all ranks from the first's weights
        results[split, objective, ndim, regions] = step(network, objective_of(objective, ndim, regions, ddp=True), images[mine],
                                                        [t[mine] for t in targets], hints[mine], SPLITS[split][rank][0])
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(run_ranks, tmp_path_factory) -> list[dict]:
    """Terms and gradients of both ranks."""
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@each_split
@each_objective
@each_dice
@each_head
def test_the_gradients_of_two_ranks_are_those_of_one_process(ranks, split, objective, ndim, regions):
    terms, gradients = step(network_of(ndim), objective_of(objective, ndim, regions, ddp=False), *joint_batch(split, ndim, regions))
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert largest > 1e-3
    for _, found in (results[split, objective, ndim, regions] for results in ranks):
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6 * float(largest), msg=lambda text: f"{name}: {text}")
    for term, value in terms.items():  # what is logged: the mean over the ranks
        mean = sum(results[split, objective, ndim, regions][0][term] for results in ranks) / WORLD
        torch.testing.assert_close(mean, value, rtol=1e-4, atol=1e-5, msg=lambda text: f"{term}: {text}")


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
