"""Two decoders on one encoder: the network of nnU-Net's plans, with a teacher beside its decoder.

The decoder that nnU-Net built becomes the *student* and keeps its name, so that a ConfKD state dict is a stock one plus
`teacher_decoder.*`.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from nnunet_confkd.errors import InputError
from nnunet_confkd.training.names import BRANCHES

TEACHER_PREFIX = "teacher_decoder."

_predicted_branch: ContextVar[str] = ContextVar("predicted_branch", default="student")


@contextmanager
def predicting(branch: str) -> Iterator[None]:
    """Let networks that are built inside this context predict with a branch.

    nnU-Net builds the network for a prediction itself, from the trainer's class alone.

    Args:
        branch: "student", "teacher" or "mean" (of the logits).

    Raises:
        ValueError: There is no such branch.
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

    The teacher has an initialisation of its own and an additional input, its hints (see :class:`Hints`). It
    holds no reference to the encoder, so that the encoder is stored as often as in the stock network.

    Args:
        unet: A network with the children `encoder` (input -> list of skips) and `decoder` (skips -> logits, or a list
            of logits, highest resolution first, if `decoder.deep_supervision` is set), and no others.
        narrow: A network of the same plans with fewer features. Its decoder becomes the teacher, which costs less time
            and memory. None: the teacher has the shape of the student.

    Raises:
        InputError: The network has other parts. The text names its architecture.
    """

    encoder: nn.Module
    decoder: Any  # modules with the attributes of a UNetDecoder
    teacher_decoder: Any

    def __init__(self, unet, narrow=None):
        super().__init__()
        check_unet(unet)
        self.encoder = unet.encoder
        self.decoder = unet.decoder
        channels = (narrow or unet).encoder.output_channels
        # A decoder holds a reference to the encoder. The memo keeps the copy from copying it.
        self.teacher_decoder = narrow.decoder if narrow else deepcopy(unet.decoder, {id(unet.encoder): unet.encoder})
        if hasattr(self.teacher_decoder, "encoder"):
            del self.teacher_decoder.encoder
        for module in self.teacher_decoder.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if hasattr(unet, "initialize"):
            self.teacher_decoder.apply(unet.initialize)
        convolution = unet.encoder.conv_op
        # A narrow teacher gets linear combinations of the encoder's features.
        self.teacher_decoder.narrowing = nn.ModuleList(convolution(many, few, 1) for many, few in zip(
            unet.encoder.output_channels, channels) if narrow)
        self.teacher_decoder.hints = Hints(convolution, channels, unet.decoder.num_classes)
        self.batch_norms = [module for module in self.teacher_decoder.modules()
                            if isinstance(module, _BatchNorm) and module.track_running_stats]
        self.branch = _predicted_branch.get()
        self.hints_in_input = False

    def set_deep_supervision(self, enabled: bool) -> None:
        """Let both decoders return the logits of all resolutions, or of the highest alone."""
        for decoder in (self.decoder, self.teacher_decoder):
            decoder.deep_supervision = enabled

    def forward(self, x: Tensor, num_full: int | None = None, hints: Tensor | None = None, teach_all: bool = False,
                mixed: Tensor | None = None):
        """Compute logits, or a list of logits, highest resolution first, with deep supervision.

        Args:
            x: Images, `(B, C, *spatial)`. With `hints_in_input` the last channels are the hints, because nnU-Net's
                predictor passes one tensor.
            num_full: In training the number of fully annotated images, which come first. None in predictions.
            hints: The teacher's hints, `(B, heads + 1, *spatial)`. None: no hints.
            teach_all: In training whether the teacher is also run on the other images, which do not update it.
            mixed: In training the images that the student sees instead, `(B, C, *spatial)`. The teacher then does not
                update the encoder, which saves time. None: those that the teacher sees.

        Returns:
            In predictions the output of the branch that predicts (`self.branch`). In training two outputs: the
            student's on all images, and the teacher's on the fully annotated ones, with `teach_all` on all of them.
        """
        if self.hints_in_input:
            x, hints = x.tensor_split([x.shape[1] - self.decoder.num_classes - 1], 1)
        if num_full is None:
            skips = self.encoder(x)
            if self.branch == "student":
                return self.decoder(skips)
            teacher = self._teach(skips, hints)
            return teacher if self.branch == "teacher" else _combine(self.decoder(skips), teacher, self.branch)
        skips = self.encoder(x if mixed is None else mixed)
        student = self.decoder(skips)
        if mixed is not None:
            with torch.no_grad():
                skips = self.encoder(x if teach_all else x[:num_full])
        if hints is None:
            # DDP fails on parameters without gradient. The sum of nothing gives the weights of the hints a gradient of
            # zero at no cost.
            anchor = sum(p.flatten()[:0].sum() for p in self.teacher_decoder.hints.parameters())
            skips = [*skips[:-1], skips[-1] + anchor]
        return student, self.run_teacher(skips, hints, student, num_full, teach_all)

    def run_teacher(self, skips: list[Tensor], hints: Tensor | None, student, num_full: int, teach_all: bool):
        """Compute the teacher's output in training.

        Args:
            skips: The encoder's, `(B, channels, *spatial)` each; without `teach_all` those of the fully annotated
                images suffice.
            hints: See :meth:`forward`.
            student: The student's output on the same images.
            num_full: See :meth:`forward`.
            teach_all: See :meth:`forward`.
        """
        def part(images: slice) -> Tensor | None:
            return None if hints is None else hints[images]

        if num_full > 0:
            teacher = self._teach([skip[:num_full] for skip in skips], part(slice(num_full)))
        else:
            # No image for the teacher: empty outputs that depend on its parameters, whose gradient is then zero. DDP
            # fails on parameters without gradient.
            anchor = sum(p.flatten()[0] for p in self.teacher_decoder.parameters())
            teacher = (student[:0].detach() + anchor if torch.is_tensor(student) else
                       [logits[:0].detach() + anchor for logits in student])
        if not teach_all or num_full == len(skips[0]):
            return teacher
        with torch.no_grad(), _unchanged(self.batch_norms):
            others = self._teach([skip[num_full:].detach() for skip in skips], part(slice(num_full, None)))
        if torch.is_tensor(teacher):
            return torch.cat((teacher, others))
        return [torch.cat(pair) for pair in zip(teacher, others)]

    def _teach(self, skips: list[Tensor], hints: Tensor | None):
        skips = self.narrowed(skips)
        return self.teacher_decoder(skips if hints is None else self.teacher_decoder.hints(skips, hints))

    def narrowed(self, skips: list[Tensor]) -> list[Tensor]:
        """Return the encoder's features with as many channels as the teacher has, without hints."""
        layers = self.teacher_decoder.narrowing
        return [layer(skip) for layer, skip in zip(layers, skips)] if layers else skips


def check_unet(unet):
    """Return a network of one encoder and one decoder as it is; raise InputError for any other."""
    children = set(dict(unet.named_children()))
    if children != {"encoder", "decoder"} or not (
            hasattr(unet.decoder, "deep_supervision") and hasattr(unet.decoder, "num_classes")
            and hasattr(unet.encoder, "output_channels")):
        raise InputError(
            f"the plans ask for the architecture {type(unet).__module__}.{type(unet).__name__}, which is not a U-Net "
            f"of one encoder and one decoder (its parts: {sorted(children)}). ConfKDTrainer needs PlainConvUNet, "
            f"ResidualEncoderUNet or a network built like them: choose other plans, or another trainer.")
    return unet


def narrower(configuration: ConfigurationManager, width: float) -> ConfigurationManager:
    """Return a configuration whose network has fewer features.

    Args:
        configuration: nnU-Net's, which stays as it is.
        width: Factor of the number of features at each resolution.

    Raises:
        InputError: Its architecture has no list of features. The text names the architecture.
    """
    content = deepcopy(configuration.configuration)
    architecture = content["architecture"]
    features = architecture["arch_kwargs"].get("features_per_stage")
    if not isinstance(features, list):
        raise InputError(f"the architecture {architecture['network_class_name']} has no list features_per_stage, so "
                         f"the teacher cannot be narrower than the student: set \"teacher_width\": 1 in the confkd "
                         f"block of the plans")
    architecture["arch_kwargs"]["features_per_stage"] = [max(1, round(number * width)) for number in features]
    return ConfigurationManager(content)


@contextmanager
def _unchanged(batch_norms: list[_BatchNorm]) -> Iterator[None]:
    """Keep the running statistics of these layers; they still normalise by those of the batch."""
    for layer in batch_norms:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in batch_norms:
            layer.track_running_stats = True


class Hints(nn.Module):
    """Adds the hints to the features that the teacher gets.

    At each resolution a learnt vector for each class is added wherever a voxel is annotated. Without hints nothing is
    added: the teacher is a stock decoder.

    nnU-Net gives the name `seg_layers` to layers whose shape depends on the number of classes, and -pretrained_weights
    leaves them out.

    Args:
        convolution: `nn.Conv2d` or `nn.Conv3d`.
        channels: Number of channels of the features at each resolution.
        num_heads: Number of output channels.
    """

    def __init__(self, convolution: type[nn.Module], channels: Sequence[int], num_heads: int):
        super().__init__()
        self.seg_layers = nn.ModuleList(convolution(num_heads + 1, number, 1, bias=False) for number in channels)

    def forward(self, skips: list[Tensor], hints: Tensor) -> list[Tensor]:
        """Add the hints to the features.

        Args:
            skips: The features, `(B, channels, *spatial)` each, highest resolution first.
            hints: `(B, heads + 1, *spatial)`, see :func:`nnunet_confkd.training.hints.hint_channels`.

        Returns:
            The features with hints. At a lower resolution a voxel has a hint if any voxel that it covers has it.
        """
        # Adaptive pooling of volumes has no kernel on Apple's MPS.
        pool = F.max_pool2d if hints.ndim == 4 else F.max_pool3d
        hinted = []
        for skip, layer in zip(skips, self.seg_layers):
            if hints.shape[2:] != skip.shape[2:]:
                ratio = [-(-fine // coarse) for fine, coarse in zip(hints.shape[2:], skip.shape[2:])]
                hints = pool(hints, ratio, ceil_mode=True)  # from resolution to resolution: the largest is read once
            hinted.append(skip + layer(hints))
        return hinted


def _combine(student, teacher, how: str):
    """Combine logits: their "mean", or "both" one after the other on the channel axis, `(B, 2C, *spatial)`."""
    if not torch.is_tensor(student):
        return [_combine(s, t, how) for s, t in zip(student, teacher)]
    return torch.cat((student, teacher), 1) if how == "both" else (student + teacher) / 2


def unwrap(network: nn.Module) -> nn.Module:
    """The module inside DDP and torch.compile."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


# ---- weights --------------------------------------------------------------------------------------------------------

def has_teacher(weights: dict) -> bool:
    """Whether a state dict is that of a two-branch network. Its names decide, because users derive other trainers."""
    return any(name.startswith(TEACHER_PREFIX) for name in weights)


def branch_weights(weights: dict[str, Tensor], branch: str) -> dict[str, Tensor]:
    """Extract one branch of a two-branch state dict.

    Args:
        weights: A two-branch state dict.
        branch: "student" or "teacher".

    Returns:
        A stock state dict.

    Raises:
        ValueError: The state dict has no teacher, there is no such branch, or the teacher is narrower than the student:
            no stock network has such a decoder on this encoder.
    """
    if not has_teacher(weights):
        raise ValueError(f"these weights hold no teacher (no '{TEACHER_PREFIX}*')")
    stock = {name: w for name, w in weights.items() if not name.startswith(TEACHER_PREFIX)}
    if branch == "student":
        return stock
    if branch != "teacher":
        raise ValueError(f"branch must be 'student' or 'teacher', got {branch!r}")
    if has_narrow_teacher(weights):
        raise ValueError("the teacher is narrower than the student, so no stock network can hold it")
    return {name: weights.get(name.replace("decoder.", TEACHER_PREFIX, 1) if name.startswith("decoder.") else name, w)
            for name, w in stock.items()}


def has_narrow_teacher(weights: dict) -> bool:
    """Whether the teacher of a state dict has fewer features than the student."""
    return any(name.startswith(f"{TEACHER_PREFIX}narrowing.") for name in weights)


def add_teacher(weights: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add a teacher to a stock state dict. A teacher of the student's width starts from the stock decoder.

    Args:
        weights: The stock state dict.
        teacher: The weights of a teacher as it was initialised, `teacher_decoder.*`.

    Returns:
        A two-branch state dict.
    """
    if not has_narrow_teacher(teacher):
        teacher = {name: weights.get(name.removeprefix("teacher_"), initial) for name, initial in teacher.items()}
    return {**weights, **teacher}
