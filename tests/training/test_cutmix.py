"""CutMix: boxes that fit at every resolution, and what the student, the teacher and the loss get."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_confkd.training.cutmix import CutMix, FullCutMix, Mix, mixed
from nnunet_confkd.training.losses import TERMS, ConfKDLoss

SHAPES = {2: (48, 64), 3: (32, 48, 64)}
each_dimension = pytest.mark.parametrize("ndim", (2, 3), ids=("2d", "3d"))


def numbered(images: int, *spatial: int) -> torch.Tensor:
    """Images `(B, 1, *spatial)` whose voxels all hold the number of the image."""
    return torch.arange(images).view(-1, 1, *[1] * len(spatial)).expand(images, 1, *spatial)


def drawn(images: int, spatial: tuple[int, ...], number: int = 100) -> list[Mix]:
    np.random.seed(0)
    target = [numbered(images, *(size // ratio for size in spatial)) for ratio in (1, 2, 4)]
    return [CutMix(1.0)({"target": target})["mix"] for _ in range(number)]


def test_a_box_of_another_image_replaces_that_of_each_image():
    images = numbered(3, 4, 6)
    result = Mix(1, (0.25, 0.5), (0.75, 1.0))(images)
    box = torch.zeros(4, 6, dtype=torch.bool)
    box[1:3, 3:] = True
    for i in range(3):
        assert torch.equal(result[i, 0], torch.where(box, (i - 1) % 3, i))
    assert (images == numbered(3, 4, 6)).all()  # the images themselves are not changed


@each_dimension
def test_boxes_are_the_same_at_every_resolution(ndim):
    """The nearest voxels of the mixed label map are the mixed lower resolution."""
    labels = torch.randint(0, 9, (4, 1, *SHAPES[ndim]), generator=torch.Generator().manual_seed(0)).float()
    for mix in drawn(4, SHAPES[ndim]):
        for ratio in (2, 4):
            lower = labels[(..., *[slice(None, None, ratio)] * ndim)]
            assert torch.equal(mix(labels)[(..., *[slice(None, None, ratio)] * ndim)], mix(lower))


@each_dimension
def test_boxes_take_a_quarter_to_three_quarters_of_an_image_anywhere(ndim):
    covered, shares = torch.zeros(SHAPES[ndim]), []
    for mix in drawn(2, SHAPES[ndim]):
        box = mix(numbered(2, *SHAPES[ndim]))[0, 0] == 1
        covered += box
        shares.append(box.float().mean().item())
    assert covered.min() > 0
    # the corners lie between voxels of the lowest resolution, which has 8 to 16 voxels a side
    assert 0.15 < min(shares) < 0.35 and 0.65 < max(shares) < 0.85


@each_dimension
def test_fully_annotated_images_exchange_boxes_among_themselves(ndim):
    np.random.seed(0)
    shape = SHAPES[ndim]
    batch = {"data": numbered(5, *shape).float(), "inside": numbered(5, *shape) > 0, "num_full": 3, "keys": "abcde",
             "target": [numbered(5, *(size // ratio for size in shape)) for ratio in (1, 2)]}
    found = FullCutMix(1.0)(batch)
    assert set(found) == set(batch) and found["keys"] == "abcde"
    for ours, before in zip((found["data"], found["inside"], *found["target"]),
                            (batch["data"], batch["inside"], *batch["target"])):
        assert torch.equal(ours[3:], before[3:]) and not torch.equal(ours[:3], before[:3])
        assert ours.dtype == before.dtype
    assert torch.equal(found["data"].long(), found["target"][0]) and found["data"][:3].max() == 2
    assert torch.equal(found["inside"], found["target"][0] > 0)
    # a single full image has none to exchange with, and not every batch is mixed
    assert FullCutMix(1.0)({**batch, "num_full": 1})["data"] is batch["data"]
    mixed = [FullCutMix(0.5)(batch)["data"] is not batch["data"] for _ in range(200)]
    assert 70 < sum(mixed) < 130


def test_every_other_image_is_a_source_and_an_image_never_its_own():
    assert {mix.shift for mix in drawn(4, SHAPES[2])} == {1, 2, 3}


def test_the_set_share_of_the_batches_is_mixed():
    np.random.seed(0)
    batch = {"target": numbered(4, 8, 8)}
    found = ["mix" in CutMix(0.3)(batch) for _ in range(1000)]
    assert abs(np.mean(found) - 0.3) < 0.073  # five standard deviations
    assert "mix" not in CutMix(0.0)(batch)


def test_a_single_image_has_nothing_to_be_mixed_with():
    assert "mix" not in CutMix(1.0)({"target": numbered(1, 8, 8)})


def test_without_a_mix_tensors_stay_as_they_are():
    tensor = torch.zeros(2, 1, 4, 4)
    assert mixed(tensor, None) is tensor
    assert [x.shape for x in mixed([tensor, tensor[..., :2, :2]], Mix(1, (0, 0), (0.5, 0.5)))] == [
        (2, 1, 4, 4), (2, 1, 2, 2)]


# ---- in the loss ----------------------------------------------------------------------------------------------------

MIX = Mix(1, (0.0, 0.25), (0.5, 1.0))


class SquaredError(torch.nn.Module):
    """A stand-in for the supervised loss, by whose value one sees what it got."""

    def forward(self, logits, target):
        return ((logits - target) ** 2).mean()


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, channels, 4, 4, generator=generator) for channels in (2, 2, 1)]


def value_of(tensors, mix, prior_shift=None, **weights):
    loss = ConfKDLoss(SquaredError(), dict.fromkeys(TERMS, 0.0) | weights)
    return loss(*tensors, 1, prior_shift=prior_shift, mix=mix)[0]


def test_the_student_learns_the_mixed_labels(tensors):
    student, teacher, target = tensors
    value = value_of(tensors, MIX, student=1.0)
    assert torch.equal(value, value_of((student, teacher, MIX(target)), None, student=1.0))
    assert not torch.equal(value, value_of(tensors, None, student=1.0))


def test_the_student_follows_the_mixed_teacher(tensors):
    student, teacher, target = tensors
    value = value_of(tensors, MIX, kl=1.0)
    assert torch.equal(value, value_of((student, MIX(teacher), target), None, kl=1.0))
    assert not torch.equal(value, value_of(tensors, None, kl=1.0))


def test_the_teacher_learns_the_labels_of_the_images_that_it_sees(tensors):
    assert torch.equal(value_of(tensors, MIX, teacher=1.0), value_of(tensors, None, teacher=1.0))


def test_the_class_prior_correction_moves_with_the_voxels(tensors):
    """Image 0 is fully annotated. Its box comes from image 2, and is corrected; the box of image 1 is not."""
    student, teacher, target = tensors
    shift = torch.tensor([1.0, -2.0])
    corrected = student + shift.view(2, 1, 1) * MIX(torch.tensor([0.0, 1, 1]).view(3, 1, 1, 1).expand(3, 1, 4, 4))
    value = value_of(tensors, MIX, shift, student=1.0)
    assert torch.allclose(value, value_of((corrected, teacher, target), MIX, student=1.0))
    assert not torch.allclose(value, value_of(tensors, MIX, student=1.0))


def test_mixed_images_have_no_list_of_classes(tensors):
    loss = ConfKDLoss(SquaredError(), dict.fromkeys(TERMS, 0.0) | {"student": 1.0})
    with pytest.raises(ValueError, match="give either mix or listed"):
        loss(*tensors, 1, mix=MIX, listed=torch.ones(3, 2, dtype=torch.bool))


def test_mixed_images_are_of_no_kind(tensors):
    loss = ConfKDLoss(SquaredError(), dict.fromkeys(TERMS, 0.0) | {"student": 1.0}, equal_kinds=True)
    with pytest.raises(ValueError, match="cannot have equal weights"):
        loss(*tensors, 1, mix=MIX)
