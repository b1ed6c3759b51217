"""The guide: a calmer teacher for images without a full label, and the mixed images on which the student follows it.

The KL of the papers acts on the fully labelled images, where the student has the labels themselves. With `kl_teacher:
averaged` the student follows, on whichever images `kl_images` names, the mean of both branches of an exponential moving
average of the weights (Tarvainen, Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv 1703.01780), which
sees each image whole; with `kl_mix` the student sees rectangles of one image pasted into another (CutMix: Yun et al., ICCV 2019,
arXiv 1905.04899; for consistency: French et al., BMVC 2020, arXiv 1906.01916) and is to predict the guide's output pasted alike.
"""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

AREA = (0.1, 0.5)  # of a rectangle (in 3-D a box), as a share of the image
SIDES = 0.4  # shortest over longest relative side, at the least


class Guide:
    """An exponential moving average of a two-branch network, and its output.

    network: the network that is trained, without DDP. decay: of the average, per training step.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.average.requires_grad_(False)

    def update(self, network: nn.Module) -> None:
        """After a training step."""
        self.average.update_parameters(network)

    @torch.no_grad()
    def __call__(self, images: Tensor, regions: bool) -> list[Tensor]:
        """`(B, channels, *spatial)` -> logits of the mean of both branches' probabilities, a list over resolutions."""
        student, teacher = self.average(images, len(images))
        if torch.is_tensor(student):
            student, teacher = [student], [teacher]
        return [mean_of_branches(s, t, regions) for s, t in zip(student, teacher)]


def mean_of_branches(student: Tensor, teacher: Tensor, regions: bool = False) -> Tensor:
    """Logits whose softmax (regions: sigmoid) is the mean of both branches' probabilities. `(B, C, *spatial)`, float32."""
    student, teacher = student.float(), teacher.float()
    half = float(np.log(2))
    if regions:
        log_p, log_not_p = (torch.logaddexp(F.logsigmoid(sign * student), F.logsigmoid(sign * teacher)) - half for sign in (1, -1))
        return log_p - log_not_p
    return torch.logaddexp(F.log_softmax(student, 1), F.log_softmax(teacher, 1)) - half


class Mix:
    """One draw of boxes: the image at each place takes a box from another image of the batch.

    count: number of images. shape: their spatial shape. The same draw is applied to images, labels and outputs of any
    resolution. rng: of its own, so that the batches are those of a training without mixing.
    """

    def __init__(self, count: int, shape: tuple[int, ...], rng: np.random.Generator, device: torch.device):
        shift = rng.integers(1, count) if count > 1 else 0  # never itself, if there is another
        self.source = torch.arange(count, device=device).roll(int(shift))
        mask = np.zeros((count, 1, *shape), np.float32)
        for image in mask:
            sides = np.exp(rng.uniform(np.log(SIDES), 0, len(shape)))
            sides *= (rng.uniform(*AREA) / sides.prod()) ** (1 / len(shape))
            box = [int(round(min(1.0, side) * size)) for side, size in zip(sides, shape)]
            start = [rng.integers(size - length + 1) for size, length in zip(shape, box)]
            image[(0, *(slice(at, at + length) for at, length in zip(start, box)))] = 1
        self.mask = torch.from_numpy(mask).to(device)

    def __call__(self, values: Tensor) -> Tensor:
        """`(count, channels, *spatial)` at any resolution, mixed."""
        mask = self.mask if values.shape[2:] == self.mask.shape[2:] else F.interpolate(self.mask, values.shape[2:])
        return torch.where(mask.bool(), values[self.source], values)
