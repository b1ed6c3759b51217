"""Two decoders on one encoder: the network of nnU-Net's plans, with a teacher beside its decoder.

The decoder that nnU-Net built is the *student*'s and keeps its name, so a ConfKD state dict is a stock one plus
`teacher_decoder.*`.
"""
from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from nnunet_confkd.errors import InputError

TEACHER_PREFIX = "teacher_decoder."
BRANCHES = ("student", "teacher", "mean")

_predicted_branch: ContextVar[str] = ContextVar("predicted_branch", default="student")


@contextmanager
def predicting(branch: str):
    """Networks that are built inside this context predict with `branch`: "student", "teacher" or "mean" (of logits).

    nnU-Net builds the network for a prediction itself, from the trainer's class alone.
    """
    if branch not in BRANCHES:
        raise ValueError(f"branch must be one of {BRANCHES}, got {branch!r}")
    token = _predicted_branch.set(branch)
    try:
        yield
    finally:
        _predicted_branch.reset(token)


class TwoBranchUNet(nn.Module):
    """A U-Net of nnU-Net's plans with a second decoder, the teacher's, on the same encoder.

    unet: a network with the children `encoder` (input -> list of skips) and `decoder` (skips -> logits, or a list of
        logits, highest resolution first, where `decoder.deep_supervision` is set), and no others.

    The teacher has the decoder's shape and an initialisation of its own, and an input more, its hints (see :class:`Hints`). It holds
    no reference to the encoder, so the encoder is stored as often as in the stock network.

    Raises InputError, naming the architecture, for any other network.
    """

    encoder: nn.Module
    decoder: Any  # modules with attributes of a UNetDecoder
    teacher_decoder: Any

    def __init__(self, unet):
        super().__init__()
        children = dict(unet.named_children())
        if set(children) != {"encoder", "decoder"} or not (hasattr(unet.decoder, "deep_supervision") and hasattr(unet.decoder, "num_classes")
                                                           and hasattr(unet.encoder, "output_channels")):
            raise InputError(
                f"the plans ask for the architecture {type(unet).__module__}.{type(unet).__name__}, which is not a U-Net "
                f"of one encoder and one decoder (its parts: {sorted(children)}). ConfKDTrainer needs PlainConvUNet, "
                f"ResidualEncoderUNet or a network built like them: choose other plans, or another trainer.")
        self.encoder = unet.encoder
        self.decoder = unet.decoder
        # the memo keeps the copy from copying the encoder, to which a decoder holds a reference
        self.teacher_decoder = deepcopy(unet.decoder, {id(unet.encoder): unet.encoder})
        if hasattr(self.teacher_decoder, "encoder"):
            del self.teacher_decoder.encoder
        for module in self.teacher_decoder.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if hasattr(unet, "initialize"):
            self.teacher_decoder.apply(unet.initialize)
        self.teacher_decoder.hints = Hints(unet.encoder, unet.decoder.num_classes)
        self.batch_norms = [m for m in self.teacher_decoder.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.branch = _predicted_branch.get()
        self.hints_in_input = False

    def set_deep_supervision(self, enabled: bool) -> None:
        for decoder in (self.decoder, self.teacher_decoder):
            decoder.deep_supervision = enabled

    def forward(self, x: Tensor, num_full: int | None = None, hints: Tensor | None = None, teach_all: bool = False):
        """The outputs of the branches: logits, or a list of logits, highest resolution first, with deep supervision.

        Args:
            x: images, `(B, C, *spatial)`. With `hints_in_input` the last channels are the hints: nnU-Net's predictor passes one tensor.
            num_full: in training, the number of fully annotated images, which come first. None in predictions.
            hints: the teacher's hints, `(B, heads + 1, *spatial)`; None: no hints.
            teach_all: in training, whether the teacher is also run on the other images, which do not update it.

        Returns:
            In predictions the output of the branch that predicts (`self.branch`). In training the student's on all images, and the teacher's
            on the fully annotated ones, with `teach_all` on all of them.
        """
        if self.hints_in_input:
            x, hints = x.tensor_split([x.shape[1] - self.decoder.num_classes - 1], 1)
        skips = self.encoder(x)
        if num_full is None:
            if self.branch == "student":
                return self.decoder(skips)
            teacher = self._teach(skips, hints)
            return teacher if self.branch == "teacher" else _combine(self.decoder(skips), teacher, self.branch)
        student = self.decoder(skips)
        if hints is None:
            # DDP fails on parameters without gradient: an empty sum gives the hints' weights a gradient of zero, at no cost
            anchor = sum(p.flatten()[:0].sum() for p in self.teacher_decoder.hints.parameters())
            skips = [*skips[:-1], skips[-1] + anchor]
        return student, self.run_teacher(skips, hints, student, num_full, teach_all)

    def run_teacher(self, skips: list[Tensor], hints: Tensor | None, student, num_full: int, teach_all: bool):
        """The teacher's output on the encoder's skips, see `forward`; student: the student's on the same images."""
        def part(images: slice) -> Tensor | None:
            return None if hints is None else hints[images]

        if num_full > 0:
            teacher = self._teach([skip[:num_full] for skip in skips], part(slice(num_full)))
        else:
            # No image for the teacher: empty outputs that still depend on its parameters, whose gradient is then zero
            # rather than missing. DDP fails on parameters without gradient.
            anchor = sum(p.flatten()[0] for p in self.teacher_decoder.parameters())
            teacher = student[:0].detach() + anchor if torch.is_tensor(student) else [s[:0].detach() + anchor for s in student]
        if not teach_all or num_full == len(skips[0]):
            return teacher
        with torch.no_grad(), _unchanged(self.batch_norms):
            others = self._teach([skip[num_full:].detach() for skip in skips], part(slice(num_full, None)))
        return torch.cat((teacher, others)) if torch.is_tensor(teacher) else [torch.cat(pair) for pair in zip(teacher, others)]

    def _teach(self, skips: list[Tensor], hints: Tensor | None):
        return self.teacher_decoder(skips if hints is None else self.teacher_decoder.hints(skips, hints))


@contextmanager
def _unchanged(batch_norms: list[_BatchNorm]):
    """The running statistics of these layers do not change; they normalise by those of the batch as before."""
    for layer in batch_norms:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in batch_norms:
            layer.track_running_stats = True


class Hints(nn.Module):
    """Shows the annotated voxels to the teacher: at each resolution a learnt vector for each class is added to the
    encoder's features where a voxel is annotated. Without hints nothing is added: the teacher is a stock decoder.

    The layers have the name that nnU-Net gives to layers whose shape depends on the number of classes: -pretrained_weights leaves them out.
    """

    def __init__(self, encoder, num_heads: int):
        super().__init__()
        self.seg_layers = nn.ModuleList(encoder.conv_op(num_heads + 1, channels, 1, bias=False) for channels in encoder.output_channels)

    def forward(self, skips: list[Tensor], hints: Tensor) -> list[Tensor]:
        """Add the hints to the encoder's skips.

        Args:
            skips: `(B, channels, *spatial)` each, highest resolution first.
            hints: `(B, heads + 1, *spatial)`, see :func:`nnunet_confkd.training.hints.hint_channels`.

        Returns:
            The skips with hints. At a lower resolution a voxel has a hint if any voxel that it covers has it.
        """
        pool = F.max_pool2d if hints.ndim == 4 else F.max_pool3d  # adaptive pooling of volumes has no kernel on Apple's MPS
        hinted = []
        for skip, layer in zip(skips, self.seg_layers):
            if hints.shape[2:] != skip.shape[2:]:
                ratio = [-(-fine // coarse) for fine, coarse in zip(hints.shape[2:], skip.shape[2:])]
                hints = pool(hints, ratio, ceil_mode=True)  # from resolution to resolution: the largest is read once
            hinted.append(skip + layer(hints))
        return hinted


def _combine(student, teacher, how: str):
    """The branches' logits: their "mean", or "both" one after the other on the channel axis, `(B, 2C, *spatial)`."""
    if not torch.is_tensor(student):
        return [_combine(s, t, how) for s, t in zip(student, teacher)]
    return torch.cat((student, teacher), 1) if how == "both" else (student + teacher) / 2


def unwrap(network: nn.Module) -> nn.Module:
    """The module inside DDP and torch.compile."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def has_teacher(weights: dict) -> bool:
    """Whether a state dict is of a two-branch network. Names decide, not the trainer's: users subclass."""
    return any(name.startswith(TEACHER_PREFIX) for name in weights)


def branch_weights(weights: dict[str, Tensor], branch: str) -> dict[str, Tensor]:
    """One branch of a two-branch state dict, as a stock state dict.

    branch: "student" or "teacher". Raises ValueError where the state dict holds no teacher.
    """
    if not has_teacher(weights):
        raise ValueError(f"these weights hold no teacher (no '{TEACHER_PREFIX}*')")
    stock = {name: w for name, w in weights.items() if not name.startswith(TEACHER_PREFIX)}
    if branch == "student":
        return stock
    if branch != "teacher":
        raise ValueError(f"branch must be 'student' or 'teacher', got {branch!r}")
    return {name: weights.get(name.replace("decoder.", TEACHER_PREFIX, 1) if name.startswith("decoder.") else name, w)
            for name, w in stock.items()}


def add_teacher(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A stock state dict with its decoder as the teacher's too: both branches start from it."""
    teacher = {TEACHER_PREFIX + name.removeprefix("decoder."): w for name, w in weights.items()
               if name.startswith("decoder.") and not name.startswith("decoder.encoder.")}
    return {**weights, **teacher}
