"""Two decoders on one encoder: the network of nnU-Net's plans, with a teacher beside its decoder.

The decoder that nnU-Net built becomes the *student* and keeps its name, so that a ConfKD state dict is a stock one plus
`teacher_decoder.*`.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from math import prod
from typing import Any, NamedTuple

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
LEFT_IN_EPOCH = f"{TEACHER_PREFIX}left.seg_layers.in_epoch"  # a buffer of networks whose teacher completes labels
FADE = 0.8  # what is left of a hint one voxel further, at a lower resolution

_predicted_branch: ContextVar[str] = ContextVar("predicted_branch", default="student")


@contextmanager
def predicting(branch: str) -> Iterator[None]:
    """Let networks that are built inside this context predict with a branch.

    nnU-Net builds the network for a prediction itself, from the trainer's class alone.

    Args:
        branch: "student", "teacher" or "mean" (of the logits).

    Raises:
        ValueError: There is no such branch.

    Examples:
        >>> with predicting("teacher"):  # doctest: +SKIP
        ...     predictor.initialize_from_trained_model_folder(model, use_folds=(0,))
    """
    if branch not in BRANCHES:
        raise ValueError(f"branch must be one of {BRANCHES}, got {branch!r}")
    token = _predicted_branch.set(branch)
    try:
        yield
    finally:
        _predicted_branch.reset(token)


class HintMap(NamedTuple):
    """The teacher's hints where each voxel has one label: the channels of `hint_channels` without their memory.

    Attributes:
        labels: Integers, `(B, 1, *spatial)`: label + 1 where there is a hint, 0 elsewhere. Labels for which an image is
            not annotated do not occur: they are background.
        listed: Bool, `(B, heads)`: for which heads the hints of each image are. The background then stands for all
            others, too. None: all.
        spread: Integers, `(B, 1, *spatial)`: the same annotations, spread over the image by a watershed (see
            :func:`nnunet_confkd.data.watershed.spread`). None: not shown to the teacher.
    """

    labels: Tensor
    listed: Tensor | None = None
    spread: Tensor | None = None

    def of(self, images: slice) -> HintMap:
        """Return the hints of some of the images."""
        return HintMap(*(values if values is None else values[images] for values in self))

    def channels(self, num_heads: int, ratio: Sequence[int]) -> Tensor:
        """Make the channels of `hint_channels` at a lower resolution, without those of the highest.

        Args:
            num_heads: Number of classes with the background.
            ratio: How many voxels a voxel of the lower resolution covers along each axis.

        Returns:
            `(B, heads + 1, *spatial)`, float32. A voxel has a hint if any voxel that it covers has it.
        """
        images, _, *sizes = self.labels.shape
        coarse = [-(-size // step) for size, step in zip(sizes, ratio)]
        place = torch.zeros((), dtype=torch.long, device=self.labels.device)
        for size, number, step in zip(sizes, coarse, ratio):
            place = place[..., None] * number + torch.arange(size, device=place.device) // step
        labels = self.labels[:, 0].long() - 1
        channel = torch.where(labels < 0, num_heads, labels)  # voxels without a hint share the last one, for now
        # Equal places get equal values, so their order does not matter.
        found = torch.zeros(images, (num_heads + 1) * prod(coarse), device=place.device).scatter_(
            1, (channel * prod(coarse) + place).flatten(1), 1.0).view(images, num_heads + 1, *coarse)
        found[:, num_heads] = found[:, :num_heads].amax(1)
        if self.listed is not None:
            unlisted = ~self.listed.view(*self.listed.shape, *[1] * len(sizes))
            found[:, :num_heads] = torch.where(unlisted, found[:, :1], found[:, :num_heads])
        return found


class TwoBranchUNet(nn.Module):
    """A U-Net of nnU-Net's plans with a second decoder, the teacher's, on the same encoder.

    The teacher has an initialisation of its own and an additional input, its hints (see :class:`Hints`). It
    holds no reference to the encoder, so that the encoder is stored as often as in the stock network.

    Args:
        unet: A network with the children `encoder` (input -> list of skips) and `decoder` (skips -> logits, or a list
            of logits, highest resolution first, if `decoder.deep_supervision` is set), and no others.
        narrow: A network of the same plans with fewer features. Its decoder becomes the teacher, which costs less time
            and memory. None: the teacher has the shape of the student.
        watershed: Whether the teacher also sees the annotations spread over the image (`HintMap.spread`).
        completes: Whether the teacher completes labels, and is not trained any more after that. The weights then tell
            in which epoch that was (`LEFT_IN_EPOCH`; 0: it has not been yet).

    Raises:
        InputError: The network has other parts. The text names its architecture.
    """

    encoder: nn.Module
    decoder: Any  # modules with the attributes of a UNetDecoder
    teacher_decoder: Any

    def __init__(self, unet, narrow=None, watershed: bool = False, completes: bool = False):
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
        self.teacher_decoder.spread_hints = (Hints(convolution, channels, unet.decoder.num_classes) if watershed
                                             else None)
        if completes:
            self.teacher_decoder.left = _Left()
        self.find_batch_norms()
        self.branch = _predicted_branch.get()
        self.hints_in_input = 0
        self.teach_resolutions = "all"
        self.teacher_trains_encoder = True

    def find_batch_norms(self) -> None:
        """List the teacher's batch normalisations; call this again if they are replaced, as DDP replaces them."""
        self.batch_norms = [module for module in self.teacher_decoder.modules()
                            if isinstance(module, _BatchNorm) and module.track_running_stats]

    def set_deep_supervision(self, enabled: bool) -> None:
        """Let both decoders return the logits of all resolutions, or of the highest alone."""
        for decoder in (self.decoder, self.teacher_decoder):
            decoder.deep_supervision = enabled

    def forward(self, x: Tensor, num_full: int | None = None, hints: Tensor | HintMap | None = None,
                teach_all: bool = False, mixed: Tensor | None = None, with_teacher: bool = True):
        """Compute logits, or a list of logits, highest resolution first, with deep supervision.

        Args:
            x: Images, `(B, C, *spatial)`. Because nnU-Net's predictor passes one tensor, the last `hints_in_input`
                channels are the hints: those of `image_hints`.
            num_full: In training the number of fully annotated images, which come first. None in predictions.
            hints: The teacher's hints, a :class:`HintMap` or `(B, heads + 1, *spatial)`. None: no hints.
            teach_all: In training whether the teacher is also run on the other images, which do not update it. With
                `teach_resolutions = "highest"` it is, on these, at the highest resolution alone.
            mixed: In training the images that the student sees instead, `(B, C, *spatial)`. The teacher then does not
                update the encoder, which saves time. None: those that the teacher sees.
            with_teacher: In training whether the teacher is run at all.

        Returns:
            In predictions the output of the branch that predicts (`self.branch`). In training two outputs: the
            student's on all images, and the teacher's on the fully annotated ones, with `teach_all` on all of them.
            Without the teacher the second is None.
        """
        if self.hints_in_input:
            x, last = x.tensor_split([x.shape[1] - self.hints_in_input], 1)
            map_channels = 1 if self.teacher_decoder.spread_hints is None else 2
            hints = HintMap(last[:, :1], None, last[:, 1:] if self.hints_in_input == 2 else None) \
                if self.hints_in_input <= map_channels else last
        if num_full is None:
            skips = self.encoder(x)
            if self.branch == "student":
                return self.decoder(skips)
            teacher = self._teach(skips, hints)
            return teacher if self.branch == "teacher" else _combine(self.decoder(skips), teacher, self.branch)
        skips = self.encoder(x if mixed is None else mixed)
        student = self.decoder(skips)
        if not with_teacher:
            return _anchored(student, self.teacher_decoder), None
        if mixed is not None:
            with torch.no_grad():
                skips = self.encoder(x if teach_all else x[:num_full])
        elif not self.teacher_trains_encoder:
            skips = [skip.detach() for skip in skips]
        of_hints, of_spread = self.teacher_decoder.hints, self.teacher_decoder.spread_hints
        unused = [of_hints] if hints is None else []
        if of_spread is not None and getattr(hints, "spread", None) is None:
            unused.append(of_spread)
        if unused:
            skips = [*skips[:-1], *_anchored(skips[-1:], *unused)]
        return student, self.run_teacher(skips, hints, student, num_full, teach_all)

    def run_teacher(self, skips: list[Tensor], hints: Tensor | HintMap | None, student, num_full: int,
                    teach_all: bool):
        """Compute the teacher's output in training.

        Args:
            skips: The encoder's, `(B, channels, *spatial)` each; without `teach_all` those of the fully annotated
                images suffice.
            hints: See :meth:`forward`.
            student: The student's output on the same images.
            num_full: See :meth:`forward`.
            teach_all: See :meth:`forward`.
        """
        def part(images: slice) -> Tensor | HintMap | None:
            if isinstance(hints, HintMap):
                return hints.of(images)
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
        deep_supervision = self.teacher_decoder.deep_supervision
        with torch.no_grad(), _unchanged(self.batch_norms):
            self.teacher_decoder.deep_supervision = deep_supervision and self.teach_resolutions == "all"
            others = self._teach([skip[num_full:].detach() for skip in skips], part(slice(num_full, None)))
            self.teacher_decoder.deep_supervision = deep_supervision
        if torch.is_tensor(teacher):
            return torch.cat((teacher, others))
        others = [others] if torch.is_tensor(others) else others
        return [torch.cat(pair) for pair in zip(teacher, others)] + teacher[len(others):]

    def _teach(self, skips: list[Tensor], hints: Tensor | HintMap | None):
        skips = self.narrowed(skips)
        return self.teacher_decoder(skips if hints is None else self.hinted(skips, hints))

    def narrowed(self, skips: list[Tensor]) -> list[Tensor]:
        """Return the encoder's features with as many channels as the teacher has, without hints."""
        layers = self.teacher_decoder.narrowing
        return [layer(skip) for layer, skip in zip(layers, skips)] if layers else skips

    def hinted(self, skips: list[Tensor], hints: Tensor | HintMap) -> list[Tensor]:
        """Return the teacher's features, which are :meth:`narrowed`, with the hints, and with what spreads them."""
        skips = self.teacher_decoder.hints(skips, hints)
        if isinstance(hints, HintMap) and hints.spread is not None:
            skips = self.teacher_decoder.spread_hints(skips, HintMap(hints.spread))
        return skips


def _anchored(outputs: Any, *parts: nn.Module) -> Any:
    """Give the parameters of some parts a gradient of zero at no cost. DDP fails on parameters without gradient.

    Args:
        outputs: A tensor, or a list of tensors.
        parts: The parts of the network that are not used.

    Returns:
        The outputs, which depend on the sum of nothing.
    """
    anchor = sum(p.flatten()[:0].sum() for part in parts for p in part.parameters())
    return outputs + anchor if torch.is_tensor(outputs) else [output + anchor for output in outputs]


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


class _Left(nn.Module):
    """In which epoch the teacher was left. -pretrained_weights leaves it out, because of its name (:class:`Hints`)."""

    def __init__(self):
        super().__init__()
        self.seg_layers = nn.Module()
        self.seg_layers.register_buffer("in_epoch", torch.zeros(1))


class Hints(nn.Module):
    """Adds the hints to the features that the teacher gets.

    At each resolution a learnt vector for each class is added wherever a voxel is annotated. At lower resolutions it is
    also added in the neighbourhood, and fades with the distance: how far the nearest annotations of each class are
    tells much of where a border is. Without hints nothing is added: the teacher is a stock decoder.

    nnU-Net gives the name `seg_layers` to layers whose shape depends on the number of classes, and -pretrained_weights
    leaves them out.

    Args:
        convolution: `nn.Conv2d` or `nn.Conv3d`.
        channels: Number of channels of the features at each resolution.
        num_heads: Number of output channels.

    Attributes:
        reach: How many voxels of a lower resolution a hint reaches. 0: the annotated voxels alone.
    """

    def __init__(self, convolution: type[nn.Module], channels: Sequence[int], num_heads: int):
        super().__init__()
        self.seg_layers = nn.ModuleList(convolution(num_heads + 1, number, 1, bias=False) for number in channels)
        self.reach = 0

    def forward(self, skips: list[Tensor], hints: Tensor | HintMap) -> list[Tensor]:
        """Add the hints to the features.

        Args:
            skips: The features, `(B, channels, *spatial)` each, highest resolution first.
            hints: `(B, heads + 1, *spatial)`, see :func:`nnunet_confkd.training.hints.hint_channels`, or the same as a
                :class:`HintMap`, which needs less memory.

        Returns:
            The features with hints. At a lower resolution a voxel has a hint if any voxel that it covers has it.
        """
        hinted, size = [], (hints.labels if isinstance(hints, HintMap) else hints).shape[2:]
        layer: Any
        for skip, layer in zip(skips, self.seg_layers):
            if isinstance(hints, HintMap) and size == skip.shape[2:]:
                hinted.append(skip + _look_up(layer.weight.to(skip.dtype), hints))
                continue
            of_hints = hints.labels if isinstance(hints, HintMap) else hints
            ratio = [-(-fine // coarse) for fine, coarse in zip(of_hints.shape[2:], skip.shape[2:])]
            if isinstance(hints, HintMap):
                hints = hints.channels(layer.weight.shape[1] - 1, ratio).to(layer.weight.dtype)
            elif any(step > 1 for step in ratio):
                # From resolution to resolution: the largest is read once. Adaptive pooling of volumes has no kernel on
                # Apple's MPS.
                pool = F.max_pool2d if hints.ndim == 4 else F.max_pool3d
                hints = pool(hints, ratio, ceil_mode=True)
            hinted.append(skip + layer(hints if size == skip.shape[2:] else _reaching(hints, self.reach)))
        return hinted


def _reaching(hints: Tensor, reach: int) -> Tensor:
    """Let hints, `(B, heads + 1, *spatial)`, reach their neighbourhood and fade with the (chessboard) distance."""
    for _ in range(reach):
        hints = torch.maximum(hints, FADE * _of_neighbours(hints))
    return hints


def _of_neighbours(values: Tensor) -> Tensor:
    """The maximum of each voxel and its neighbours; on a CPU PyTorch's pooling takes several times as long."""
    for axis in range(2, values.ndim):
        if (size := values.shape[axis]) > 1:
            pairs = torch.maximum(values.narrow(axis, 0, size - 1), values.narrow(axis, 1, size - 1))
            inner = torch.maximum(pairs.narrow(axis, 0, size - 2), pairs.narrow(axis, 1, size - 2))
            values = torch.cat((pairs.narrow(axis, 0, 1), inner, pairs.narrow(axis, size - 2, 1)), axis)
    return values


def _look_up(weight: Tensor, hints: HintMap) -> Tensor:
    """What a convolution with this weight, `(channels, heads + 1, 1, ...)`, makes of the hints' channels."""
    vectors, of_hint = weight.flatten(1).T[None, :-1], weight.flatten(1)[:, -1]
    if hints.listed is not None:
        background = ~hints.listed
        background[:, 0] = True
        merged = background.to(weight.dtype) @ vectors[0]
        vectors = torch.cat((merged[:, None], vectors[:, 1:].expand(len(merged), -1, -1)), 1)
    labels = hints.labels[:, 0].long()
    if len(vectors) > 1:  # each image has vectors of its own
        first = vectors.shape[1] * torch.arange(len(vectors), device=labels.device).view(-1, *[1] * (labels.ndim - 1))
        labels = torch.where(labels > 0, labels + first, 0)
    vectors = F.pad((vectors + of_hint).flatten(0, 1), (0, 0, 1, 0))  # none, where there is no hint
    return F.embedding(labels, vectors, padding_idx=0).movedim(-1, 1)


def _combine(student, teacher, how: str):
    """Combine logits: their "mean", or "both" one after the other on the channel axis, `(B, 2C, *spatial)`."""
    if not torch.is_tensor(student):
        return [_combine(s, t, how) for s, t in zip(student, teacher)]
    return torch.cat((student, teacher), 1) if how == "both" else (student + teacher) / 2


def without_ddp(network: nn.Module) -> nn.Module:
    """The module inside DDP, which a rank can run alone. DDP's first pass sends buffers, and waits for all ranks."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def unwrap(network: nn.Module) -> nn.Module:
    """The module inside DDP and torch.compile."""
    network = without_ddp(network)
    return network._orig_mod if isinstance(network, OptimizedModule) else network


# ---- weights --------------------------------------------------------------------------------------------------------

def has_teacher(weights: dict) -> bool:
    """Whether a state dict is that of a two-branch network. Its names decide, because users derive other trainers.

    Examples:
        >>> has_teacher({"encoder.weight": torch.zeros(1)})
        False
    """
    return any(name.startswith(TEACHER_PREFIX) for name in weights)


def teacher_was_left(weights: dict) -> bool:
    """Whether the teacher of a state dict has completed labels, after which the encoder was trained without it."""
    return bool(weights.get(LEFT_IN_EPOCH, torch.zeros(1)) > 0)


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
