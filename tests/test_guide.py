"""The guide: the average of the weights and of both branches, and mixed images."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_confkd.errors import InputError
from nnunet_confkd.guide import AREA, Guide, Mix, mean_of_branches
from nnunet_confkd.losses import ConfKDLoss, PartialSupervision, kl_divergence
from nnunet_confkd.settings import Settings

CPU = torch.device("cpu")


class Branches(nn.Module):
    """Two one-layer branches, called as TwoBranchUNet is."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1)

    def forward(self, x, num_teacher):
        assert num_teacher == len(x)
        return self.student(x), self.teacher(x)


@pytest.mark.parametrize("regions, probabilities", [(False, lambda x: x.softmax(1)), (True, torch.sigmoid)])
def test_mean_of_branches_is_the_mean_of_probabilities(regions, probabilities):
    student, teacher = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    mean = probabilities(mean_of_branches(student, teacher, regions))
    torch.testing.assert_close(mean, (probabilities(student) + probabilities(teacher)) / 2)
    extreme = mean_of_branches(torch.full((1, 2, 1, 1), 500.0), torch.full((1, 2, 1, 1), -500.0), regions)
    assert torch.isfinite(extreme).all()


def test_guide_is_the_moving_average_and_learns_nothing_itself():
    torch.manual_seed(0)
    network = Branches()
    guide = Guide(network, decay=0.9)
    guide.update(network)
    before = network.student.weight.detach().clone()
    with torch.no_grad():
        network.student.weight += 1
    guide.update(network)
    torch.testing.assert_close(guide.average.module.student.weight, before + 0.1)
    images = torch.randn(2, 1, 4, 4)
    output, = guide(images, regions=False)
    assert not output.requires_grad and not any(p.requires_grad for p in guide.average.parameters())
    average = guide.average.module
    torch.testing.assert_close(output.softmax(1), (average.student(images).softmax(1) + average.teacher(images).softmax(1)) / 2)


@pytest.mark.parametrize("shape", [(56, 40), (16, 56, 40)])
def test_mix_pastes_boxes_of_the_size_that_is_said(shape):
    shares = []
    for seed in range(50):
        mix = Mix(3, shape, np.random.default_rng(seed), CPU)
        assert sorted(mix.source.tolist()) == [0, 1, 2] and all(mix.source[i] != i for i in range(3))
        shares += mix.mask.flatten(1).mean(1).tolist()
        for mask in mix.mask[:, 0].bool():  # one solid box each
            corners = torch.nonzero(mask)
            extent = corners.max(0).values - corners.min(0).values + 1
            assert extent.prod() == mask.sum()
    assert AREA[0] - 0.02 < min(shares) < 0.2 and 0.4 < max(shares) < AREA[1] + 0.03


def test_mix_moves_image_label_and_output_alike():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 16, 16)
    mix = Mix(4, (16, 16), np.random.default_rng(3), CPU)
    mixed = mix(images)
    inside = mix.mask.bool()
    assert torch.equal(mixed[~inside], images[~inside])
    assert torch.equal(mixed[inside], images[mix.source][inside])
    assert torch.equal(mix(images.to(torch.int8)), mixed.to(torch.int8))
    half = mix(images[:, :, ::2, ::2].expand(4, 2, 8, 8))
    assert torch.equal(half[:, :1], mixed[:, :, ::2, ::2]) and torch.equal(half[:, 0], half[:, 1])


def test_the_kl_follows_the_guide_on_the_images_named():
    torch.manual_seed(0)
    student, teacher, guide = torch.randn(3, 4, 3, 6, 6)
    target = torch.randint(0, 3, (4, 1, 6, 6))
    supervised = PartialSupervision(lambda logits, t: logits.sum() * 0, ignore_label=3)
    weights = {"teacher": 0.0, "student": 0.0, "kl": 1.0, "entropy": 0.0}
    for images, where in (("partial", slice(2, None)), ("full", slice(2)), ("all", slice(None))):
        loss = ConfKDLoss(supervised, weights, kl_images=images)
        value, _ = loss(student, teacher[:2], target, 2, guide=[guide[where]])
        torch.testing.assert_close(value, kl_divergence(guide[where], student[where]).mean())


@pytest.mark.parametrize("block", [{"kl_images": "partial"}, {"kl_teacher": "averaged"}])
def test_mixing_needs_a_guide_and_images_to_mix(block):
    with pytest.raises(InputError, match="kl_mix needs kl_teacher"):
        Settings(kl_mix=True, **block)
    Settings(kl_mix=True, kl_images="all", kl_teacher="averaged")
