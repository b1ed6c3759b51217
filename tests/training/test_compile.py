"""torch.compile as nnU-Net uses it on GPUs (network and Dice): nothing is compiled anew once a training is warm.

The tracing (Dynamo) decides about that. The code generator, which needs a compiler, is left out (`backend="eager"`).
"""
from __future__ import annotations

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn
from torch._dynamo.utils import counters

from nnunet_confkd.training.losses import TERMS, ConfKDLoss, PartialSupervision
from nnunet_confkd.training.network import HintMap, TwoBranchUNet

BATCH, CHANNELS, SIDE = 6, 3, 16
IGNORE = CHANNELS


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def network_of(architecture, ndim: int) -> TwoBranchUNet:
    blocks = "n_conv_per_stage" if architecture is PlainConvUNet else "n_blocks_per_stage"
    return TwoBranchUNet(architecture(
        input_channels=1, n_stages=4, features_per_stage=[4, 8, 8, 8], conv_op={2: nn.Conv2d, 3: nn.Conv3d}[ndim],
        kernel_sizes=3, strides=[1, 2, 2, 2], num_classes=CHANNELS, n_conv_per_stage_decoder=1, conv_bias=True,
        nonlin=nn.LeakyReLU,
        norm_op={2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[ndim], norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin_kwargs={"inplace": True}, deep_supervision=True, **{blocks: 1}), watershed=True)


def objective_of(ndim: int, regions: bool, hints: bool) -> ConfKDLoss:
    dice = {"batch_dice": ndim == 2, "smooth": 1e-5, "do_bg": regions, "ddp": False}
    if regions:
        stock = DC_and_BCE_loss({}, dice, use_ignore_label=True, dice_class=MemoryEfficientSoftDiceLoss)
    else:
        stock = DC_and_CE_loss(dice, {}, ignore_label=IGNORE, dice_class=MemoryEfficientSoftDiceLoss)
    stock.dc = compiled(stock.dc)
    return ConfKDLoss(PartialSupervision(stock, IGNORE, regions), dict.fromkeys(TERMS, 1.0), regions=regions,
                      resolution_weights=(4 / 7, 2 / 7, 1 / 7), kl_images="all" if hints else "full",
                      extra_resolutions="highest")


class Training:
    """Iterations of training and validation as ConfKDTrainer's; with hints the KL acts on all images, as by default."""

    def __init__(self, architecture, ndim: int, regions: bool, hints: bool):
        self.ndim, self.regions, self.hints = ndim, regions, hints
        network = network_of(architecture, ndim)
        network.teach_resolutions = "highest"
        self.network, self.loss = compiled(network), objective_of(ndim, regions, hints)

    def batch(self, num_full: int):
        targets = []
        for side in (SIDE, SIDE // 2, SIDE // 4):
            labels = torch.randint(0, CHANNELS, (BATCH, 1, *self.ndim * [side]))
            labels[num_full:][torch.rand(labels[num_full:].shape) > 0.2] = IGNORE
            targets.append(torch.cat([labels == c for c in range(CHANNELS + 1)], 1) if self.regions else labels)
        return torch.randn(BATCH, 1, *self.ndim * [SIDE]), targets

    def step(self, num_full: int) -> None:
        self.network.train()
        images, targets = self.batch(num_full)
        hints = None
        if self.hints and self.regions:
            hints = torch.zeros(BATCH, CHANNELS + 1, *images.shape[2:])
        elif self.hints:
            hints = HintMap(torch.randint(0, CHANNELS + 1, images.shape), None,
                            torch.randint(0, CHANNELS + 1, images.shape))
        self.loss(*self.network(images, num_full, hints, self.hints), targets, num_full)[0].backward()

    @torch.no_grad()
    def validate(self) -> None:
        self.network.eval()
        images, targets = self.batch(BATCH)
        for branch in self.network(images, BATCH):
            for output, target in zip(branch, targets):
                self.loss.supervised(output, target)


@pytest.mark.slow
@pytest.mark.parametrize("hints", (False, True), ids=("full_only", "hints"))
@pytest.mark.parametrize("architecture, ndim, regions", [
    (PlainConvUNet, 2, False), (PlainConvUNet, 3, True), (ResidualEncoderUNet, 2, False)],
    ids=("2d", "3d_regions", "residual_2d"))
def test_no_batch_is_compiled_anew_after_the_first_ones(architecture, ndim, regions, hints):
    torch.compiler.reset()
    counters.clear()
    training = Training(architecture, ndim, regions, hints)
    # Otherwise Dynamo gives up silently after some recompilations, and nothing would be compiled anew.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for num_full in (3, 2, 1, 0, BATCH - 1, BATCH):  # graphs for many, for one and for none, of either kind
            training.step(num_full)
            training.validate()
    assert counters["stats"]["unique_graphs"] > 0
    with torch._dynamo.config.patch(error_on_recompile=True, fail_on_recompile_limit_hit=True):
        for num_full in range(BATCH + 1):
            training.step(num_full)
            training.validate()
    assert not counters["graph_break"], "the network, or nnU-Net's Dice, is compiled in pieces"
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("ndim", (2, 3))
def test_compiled_gradients_are_those_of_the_plain_network(ndim):
    """The teacher learns from the fully annotated images alone, also in one graph.

    `aot_eager` traces autograd ahead of time, as on GPUs.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    network = network_of(PlainConvUNet, ndim)
    images = torch.randn(BATCH, 1, *ndim * [SIDE])
    hints = (torch.rand(BATCH, CHANNELS + 1, *ndim * [SIDE]) < 0.1).float()
    labels, found = torch.randint(0, CHANNELS + 1, images.shape), []
    listed, spread = torch.rand(BATCH, CHANNELS) < 0.5, torch.randint(1, CHANNELS + 1, images.shape)
    for called in (network, torch.compile(network, backend="aot_eager")):
        network.zero_grad()
        for form in (hints, HintMap(labels), HintMap(labels, listed), HintMap(labels, None, spread)):
            student, teacher = called(images, 2, form, True)
            sum(output.square().mean() for output in (*student, *teacher)).backward()
        found.append({name: p.grad.clone() for name, p in network.named_parameters()})
    plain, compiled_ones = found
    for part in ("hints", "spread_hints"):
        assert plain[f"teacher_decoder.{part}.seg_layers.0.weight"].abs().max() > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled_ones[name], gradient, rtol=1e-4, atol=1e-6,
                                   msg=lambda text: f"{name}: {text}")
    torch.compiler.reset()


def test_a_constant_number_of_full_images_is_compiled_once():
    """What training does: the share of full images is the same in every batch."""
    torch.compiler.reset()
    counters.clear()
    network = compiled(network_of(PlainConvUNet, 2))
    images, hints = torch.randn(BATCH, 1, SIDE, SIDE), torch.zeros(BATCH, CHANNELS + 1, SIDE, SIDE)
    for _ in range(3):
        network(images, 3, hints, True)
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()
