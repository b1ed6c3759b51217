"""Two decoders on one encoder, held against the stock networks of the same seed."""
from __future__ import annotations

import pickle
from copy import deepcopy
from functools import partial

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet, ResidualUNet
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_confkd.errors import InputError
from nnunet_confkd.training.hints import hint_channels, hint_map
from nnunet_confkd.training.network import (
    FADE,
    TEACHER_PREFIX,
    HintMap,
    TwoBranchUNet,
    add_teacher,
    branch_weights,
    has_narrow_teacher,
    has_teacher,
    narrower,
    predicting,
    unwrap,
)

CLASSES = 3
BATCH = 3
HINTS = "hints.seg_layers."
ARCHITECTURES = (PlainConvUNet, ResidualEncoderUNet, ResidualUNet)

each_network = pytest.mark.parametrize("architecture, ndim, stages", [
    (architecture, ndim, stages) for architecture in ARCHITECTURES for ndim, stages in ((2, 4), (3, 2))],
    ids=lambda x: getattr(x, "__name__", str(x)))
deep_or_not = pytest.mark.parametrize("deep_supervision", (True, False), ids=("deep", "flat"))


def stock(architecture=PlainConvUNet, ndim: int = 2, stages: int = 3, deep_supervision: bool = True, seed: int = 0,
          classes: int = CLASSES, features: tuple[int, ...] = (8, 12, 16, 16)):
    """A tiny network, built and initialised as nnU-Net's get_network_from_plans does."""
    torch.manual_seed(seed)
    blocks = "n_conv_per_stage" if architecture is PlainConvUNet else "n_blocks_per_stage"
    network = architecture(
        input_channels=1, n_stages=stages, features_per_stage=list(features[:stages]),
        conv_op={2: nn.Conv2d, 3: nn.Conv3d}[ndim], kernel_sizes=3, strides=[1, 2, 2, 2][:stages], num_classes=classes,
        n_conv_per_stage_decoder=1, conv_bias=True, norm_op={2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[ndim],
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
        deep_supervision=deep_supervision, **{blocks: 1})
    network.apply(network.initialize)
    return network


def two_branches(*args, **kwargs) -> TwoBranchUNet:
    return TwoBranchUNet(stock(*args, **kwargs))


def images(ndim: int = 2) -> torch.Tensor:
    return torch.randn(BATCH, 1, *ndim * [16], generator=torch.Generator().manual_seed(1))


def as_list(outputs) -> list[torch.Tensor]:
    return [outputs] if torch.is_tensor(outputs) else list(outputs)


def equal(a, b) -> bool:
    a, b = as_list(a), as_list(b)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def total(outputs) -> torch.Tensor:
    """A scalar whose gradient reaches every output (the sum of an instance-normed map would hardly depend on it)."""
    return sum((x ** 2).sum() for x in as_list(outputs))


def gradients(module: nn.Module) -> list[torch.Tensor | None]:
    return [p.grad for p in module.parameters()]


def decoder_gradients(decoder: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in decoder.named_parameters() if not name.startswith("encoder.")}


# ---- construction ---------------------------------------------------------------------------------------------------

@each_network
def test_the_state_dict_is_the_stock_one_plus_the_teachers_decoder(architecture, ndim, stages):
    names = list(stock(architecture, ndim, stages).state_dict())
    decoder = [n.removeprefix("decoder.") for n in names
               if n.startswith("decoder.") and not n.startswith("decoder.encoder.")]
    expected = [*names, *(f"teacher_decoder.{n}" for n in decoder),
                *(f"teacher_decoder.{HINTS}{i}.weight" for i in range(stages))]
    assert list(two_branches(architecture, ndim, stages).state_dict()) == expected


@each_network
def test_the_encoder_is_stored_as_often_as_in_the_stock_network(architecture, ndim, stages):
    def distinct_and_named(network):
        encoder = [w for n, w in network.state_dict().items() if "encoder." in n]
        return len({w.data_ptr() for w in encoder}), len(encoder)
    network = two_branches(architecture, ndim, stages)
    assert distinct_and_named(network) == distinct_and_named(stock(architecture, ndim, stages))
    assert network.decoder.encoder is network.encoder
    assert not any("encoder" in name for name, _ in network.teacher_decoder.named_modules())


@each_network
@deep_or_not
def test_the_student_is_the_stock_network_of_the_same_seed_to_the_bit(architecture, ndim, stages, deep_supervision):
    network = two_branches(architecture, ndim, stages, deep_supervision)
    reference = stock(architecture, ndim, stages, deep_supervision)
    weights = network.state_dict()
    assert all(torch.equal(weights[name], w) for name, w in reference.state_dict().items())
    assert equal(network(images(ndim)), reference(images(ndim)))
    assert type(network(images(ndim))) is type(reference(images(ndim)))


@each_network
def test_the_teacher_has_the_students_shapes_and_an_initialisation_of_its_own(architecture, ndim, stages):
    network = two_branches(architecture, ndim, stages)
    teacher = {n: p for n, p in network.teacher_decoder.named_parameters() if not n.startswith(HINTS)}
    student = {n: p for n, p in network.decoder.named_parameters() if not n.startswith("encoder.")}
    assert list(teacher) == list(student)
    for name, weight in teacher.items():
        assert weight.shape == student[name].shape and weight.data_ptr() != student[name].data_ptr()
        if weight.ndim == 1:  # biases and norms start from constants, the same ones
            assert torch.equal(weight, student[name]), name
        else:
            assert not torch.equal(weight, student[name]), name


@each_network
def test_the_teachers_convolutions_start_with_the_spread_that_nnunet_gives_them(architecture, ndim, stages):
    # He: std sqrt(2 / (1 + 0.01^2) / fan_in). torch's own start would be smaller by sqrt(6), about 2.4.
    for name, module in two_branches(architecture, ndim, stages).teacher_decoder.named_modules():
        is_convolution = "Conv" in type(module).__name__ and hasattr(module, "weight")
        if is_convolution and HINTS not in name and module.weight.numel() >= 200:
            fan_in = module.weight[0].numel()  # what kaiming_normal_ counts, for transposed convolutions too
            assert module.weight.std().item() == pytest.approx((2 / 1.0001 / fan_in) ** 0.5, rel=0.3), name


class Uninitialised(nn.Module):
    """A U-Net without an `initialize` of its own."""

    def __init__(self):
        super().__init__()
        network = stock()
        self.encoder, self.decoder = network.encoder, network.decoder


def test_the_teacher_of_a_network_without_an_initialisation_gets_torchs():
    network = TwoBranchUNet(Uninitialised())
    weights = network.state_dict()
    for name in (n for n, p in network.teacher_decoder.named_parameters() if p.ndim > 1 and HINTS not in n):
        assert not torch.equal(weights[f"teacher_decoder.{name}"], weights[f"decoder.{name}"]), name


def test_two_teachers_of_one_seed_are_equal_and_of_two_seeds_are_not():
    first, again, other = (two_branches(seed=seed).teacher_decoder.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@each_network
def test_the_parameters_are_the_stock_ones_one_more_decoders_and_a_hint_a_resolution(architecture, ndim, stages):
    reference = stock(architecture, ndim, stages)
    count = len(list(reference.parameters()))
    decoder = count - len(list(reference.encoder.parameters()))
    optimizer = torch.optim.SGD(two_branches(architecture, ndim, stages).parameters(), 0.1)
    assert len(optimizer.param_groups[0]["params"]) == count + decoder + stages


class ThreeParts(nn.Module):
    def __init__(self):
        super().__init__()
        network = stock()
        self.encoder, self.decoder, self.head = network.encoder, network.decoder, nn.Identity()


class OtherParts(nn.Module):
    """Of the right names, but one of these lacks what a U-Net of nnU-Net's has."""

    def __init__(self, part: str, lacking: str):
        super().__init__()
        network = stock()
        self.encoder, self.decoder = network.encoder, network.decoder
        delattr(getattr(self, part), lacking)


def primus() -> nn.Module:
    return Primus(1, embed_dim=24, patch_embed_size=(8, 8, 8), num_classes=2, eva_depth=1, eva_numheads=2,
                  input_shape=(16, 16, 16))


LACKING = (("decoder", "deep_supervision"), ("decoder", "num_classes"), ("encoder", "output_channels"))


@pytest.mark.parametrize("build", (ThreeParts, lambda: nn.Sequential(nn.Conv2d(1, 2, 1)), primus,
                                   *(partial(OtherParts, *lacking) for lacking in LACKING)),
                         ids=("ThreeParts", "Sequential", "Primus", *("no " + name for _, name in LACKING)))
def test_other_architectures_are_refused_by_name(build):
    network = build()
    with pytest.raises(InputError) as error:
        TwoBranchUNet(network)
    assert f"{type(network).__module__}.{type(network).__name__}" in str(error.value)
    assert "ResidualEncoderUNet" in str(error.value)  # what to use instead


# ---- forward --------------------------------------------------------------------------------------------------------

class Calls:
    """Batch sizes that a decoder was run with."""

    def __init__(self, decoder: nn.Module):
        self.batch_sizes: list[int] = []
        decoder.register_forward_pre_hook(lambda _, args: self.batch_sizes.append(args[0][0].shape[0]))


@each_network
@deep_or_not
def test_prediction_is_the_stock_networks_and_does_not_run_the_teacher(architecture, ndim, stages, deep_supervision):
    network = two_branches(architecture, ndim, stages, deep_supervision).eval()
    student, teacher = Calls(network.decoder), Calls(network.teacher_decoder)
    with torch.no_grad():
        assert equal(network(images(ndim)), stock(architecture, ndim, stages, deep_supervision).eval()(images(ndim)))
    assert student.batch_sizes == [BATCH]
    assert teacher.batch_sizes == []


@each_network
@deep_or_not
@pytest.mark.parametrize("num_teacher", (1, BATCH))
def test_in_training_the_teacher_sees_the_first_images_only(architecture, ndim, stages, deep_supervision, num_teacher):
    network = two_branches(architecture, ndim, stages, deep_supervision)
    calls = Calls(network.decoder), Calls(network.teacher_decoder)
    student, teacher = network(images(ndim), num_teacher)
    assert [c.batch_sizes for c in calls] == [[BATCH], [num_teacher]]
    assert equal(student, stock(architecture, ndim, stages, deep_supervision)(images(ndim)))
    assert len(as_list(student)) == (stages - 1 if deep_supervision else 1)
    assert [(num_teacher, *s.shape[1:]) for s in as_list(student)] == [t.shape for t in as_list(teacher)]
    skips = network.encoder(images(ndim)[:num_teacher])
    for result, expected in zip(as_list(teacher), as_list(network.teacher_decoder(skips))):
        torch.testing.assert_close(result, expected)


@each_network
@deep_or_not
def test_without_an_image_for_the_teacher_its_gradient_is_zero_and_not_missing(architecture, ndim, stages,
                                                                             deep_supervision):
    network = two_branches(architecture, ndim, stages, deep_supervision)
    calls = Calls(network.teacher_decoder)
    student, teacher = network(images(ndim), 0)
    assert calls.batch_sizes == []
    assert [(0, *s.shape[1:]) for s in as_list(student)] == [t.shape for t in as_list(teacher)]
    (total(student) + total(teacher)).backward()
    assert all(g is not None and (g == 0).all() for g in gradients(network.teacher_decoder))

    reference = stock(architecture, ndim, stages, deep_supervision)
    total(reference(images(ndim))).backward()
    for ours, stocks in zip(gradients(network.encoder) + list(decoder_gradients(network.decoder).values()),
                            gradients(reference.encoder) + list(decoder_gradients(reference.decoder).values())):
        assert ours is stocks is None or torch.equal(ours, stocks)


def test_without_an_image_for_the_teacher_a_single_head_keeps_its_gradient_too():
    network = two_branches(classes=1)  # whose last layers have a single bias
    total(network(images(), 0)[1]).backward()
    assert all(g is not None and (g == 0).all() for g in gradients(network.teacher_decoder))


@each_network
def test_each_branch_gives_its_gradient_to_its_own_decoder_and_the_encoder(architecture, ndim, stages):
    for branch in (0, 1):
        network = two_branches(architecture, ndim, stages)
        decoders = network.decoder, network.teacher_decoder
        total(network(images(ndim), BATCH)[branch]).backward()
        assert all(g is not None for g in gradients(network.encoder))
        assert any(g.abs().sum() > 0 for g in gradients(network.encoder))
        assert all(g is not None for g in decoder_gradients(decoders[branch]).values())
        assert any(g.abs().sum() > 0 for g in decoder_gradients(decoders[branch]).values())
        assert all(g is None for g in decoder_gradients(decoders[1 - branch]).values())


@each_network
@pytest.mark.parametrize("with_hints", [False, True])
def test_a_teacher_that_does_not_train_the_encoder_learns_the_same_itself(architecture, ndim, stages, with_hints):
    found = []
    for trains_encoder in (True, False):
        network = two_branches(architecture, ndim, stages)
        network.teacher_trains_encoder = trains_encoder
        teacher = network(images(ndim), BATCH, hints_at(ndim, 0) if with_hints else None)[1]
        total(teacher).backward()
        assert all((g is not None) == trains_encoder for g in gradients(network.encoder))
        found.append(gradients(network.teacher_decoder))
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*found))


@deep_or_not
def test_deep_supervision_is_switched_in_both_branches(deep_supervision):
    network = two_branches(deep_supervision=not deep_supervision)
    network.set_deep_supervision(deep_supervision)
    outputs = network(images(), BATCH)
    assert [type(output) for output in outputs] == 2 * [list if deep_supervision else torch.Tensor]
    assert equal(outputs[0], stock(deep_supervision=deep_supervision)(images()))


# ---- hints and images that are not full -----------------------------------------------------------------------------

def hints_at(ndim: int, image: int, place: int = 5) -> torch.Tensor:
    hints = torch.zeros(BATCH, CLASSES + 1, *ndim * [16])
    hints[(image, slice(1, 2), *ndim * [place])] = 1
    return hints


@each_network
def test_hints_reach_the_teacher_of_their_image_alone(architecture, ndim, stages):
    network = two_branches(architecture, ndim, stages)
    student, teacher = network(images(ndim), BATCH)
    student_too, hinted = network(images(ndim), BATCH, hints_at(ndim, 1))
    assert equal(student, student_too)
    for plain, told in zip(teacher, hinted):
        assert torch.equal(plain[[0, 2]], told[[0, 2]]) and not torch.equal(plain[1], told[1])


@each_network
@deep_or_not
def test_no_hints_and_hints_of_zero_make_the_teacher_a_stock_decoder(architecture, ndim, stages, deep_supervision):
    network = two_branches(architecture, ndim, stages, deep_supervision)
    exported = stock(architecture, ndim, stages, deep_supervision, seed=7)
    exported.load_state_dict(branch_weights(network.state_dict(), "teacher"))
    for hints in (None, torch.zeros(BATCH, CLASSES + 1, *ndim * [16])):
        assert equal(network(images(ndim), BATCH, hints)[1], exported(images(ndim)))


@each_network
@pytest.mark.parametrize("branch", ("student", "teacher", "mean"))
def test_for_predictions_hints_may_be_the_last_channels(architecture, ndim, stages, branch):
    network = two_branches(architecture, ndim, stages, False)
    student, teacher = network(images(ndim), BATCH, hints_at(ndim, 1))
    network.branch, network.hints_in_input = branch, CLASSES + 1
    expected = {"student": student, "teacher": teacher, "mean": (student + teacher) / 2}[branch]
    torch.testing.assert_close(network(torch.cat((images(ndim), hints_at(ndim, 1)), 1)), expected)


@each_network
def test_a_hint_stands_at_every_resolution(architecture, ndim, stages):
    network = two_branches(architecture, ndim, stages)
    skips = network.encoder(images(ndim))
    told = network.teacher_decoder.hints(skips, hints_at(ndim, 0, place=15))
    for skip, with_hint, layer in zip(skips, told, network.teacher_decoder.hints.seg_layers):
        difference = (with_hint - skip).detach()
        last = (0, slice(None), *ndim * [-1])
        torch.testing.assert_close(difference[last], layer.weight[:, 1].flatten(), rtol=1e-4, atol=1e-5)
        difference[last] = 0
        assert not difference.any()


@deep_or_not
@pytest.mark.parametrize("num_full", (0, 1, BATCH))
def test_images_that_are_not_full_do_not_update_the_teacher(deep_supervision, num_full):
    network = two_branches(deep_supervision=deep_supervision)
    hints = hints_at(2, 2)
    student, teacher = network(images(), num_full, hints, teach_all=True)
    alone = network(images(), BATCH, hints)[1]
    for result, expected in zip(as_list(teacher), as_list(alone)):
        torch.testing.assert_close(result, expected)
    sum(x[num_full:].sum() for x in as_list(teacher)).backward()
    assert all(g is None or not g.any() for g in gradients(network))


@pytest.mark.parametrize("num_full", (0, 1, BATCH))
def test_images_that_are_not_full_may_be_taught_at_the_highest_resolution_alone(num_full):
    network = two_branches()
    everywhere = network(images(), num_full, hints_at(2, 2), teach_all=True)[1]
    network.teach_resolutions = "highest"
    highest, *others = network(images(), num_full, hints_at(2, 2), teach_all=True)[1]
    assert equal([highest, *others], [everywhere[0], *(logits[:num_full] for logits in everywhere[1:])])
    assert others and network.teacher_decoder.deep_supervision
    network.set_deep_supervision(False)
    assert equal(network(images(), num_full, hints_at(2, 2), teach_all=True)[1], everywhere[0])


@pytest.mark.parametrize("ndim", (2, 3))
def test_a_hint_at_the_end_of_an_odd_image_stands_at_every_resolution(ndim):
    """Strided convolutions round up, and so does the pooling of the hints."""
    network = two_branches(PlainConvUNet, ndim)
    skips = network.encoder(torch.randn(1, 1, *ndim * [15]))
    hints = torch.zeros(1, CLASSES + 1, *ndim * [15])
    hints[(0, 1, *ndim * [14])] = 1
    for skip, with_hint in zip(skips, network.teacher_decoder.hints(skips, hints)):
        changed = (with_hint - skip).detach().abs().sum((0, 1))
        assert changed[ndim * (-1,)] > 0 and (changed > 0).sum() == 1


@each_network
def test_without_hints_none_are_computed_and_their_weights_have_a_gradient_of_zero(architecture, ndim, stages):
    """Zeros of the size of the image would cost (heads + 1) * 12 bytes per voxel. DDP fails without a gradient."""
    network = two_branches(architecture, ndim, stages)
    calls = Calls(network.teacher_decoder.hints)
    total(network(images(ndim), BATCH)[1]).backward()
    assert not calls.batch_sizes
    weights = list(network.teacher_decoder.hints.parameters())
    assert weights and all(p.grad is not None and not p.grad.any() for p in weights)


def spread_labels(ndim: int) -> HintMap:
    """A hint in each image, and labels everywhere."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.randint(1, CLASSES + 1, (BATCH, 1, *ndim * [16]), generator=generator, dtype=torch.int16)
    hinted = torch.zeros_like(spread)
    hinted[..., :2] = spread[..., :2]
    return HintMap(hinted, None, spread)


@pytest.mark.parametrize("ndim", (2, 3))
def test_spread_hints_are_a_second_map_with_weights_of_its_own(ndim):
    network = TwoBranchUNet(stock(ndim=ndim), stock(ndim=ndim, features=(4, 6, 8, 8)), watershed=True)
    hints, skips = spread_labels(ndim), network.encoder(images(ndim))
    narrow = network.narrowed(skips)
    expected = network.teacher_decoder.spread_hints(
        network.teacher_decoder.hints(narrow, HintMap(hints.labels)), HintMap(hints.spread))
    student, teacher = network(images(ndim), BATCH, hints)
    assert equal(teacher, network.teacher_decoder(expected))
    assert not equal(teacher, network(images(ndim), BATCH, HintMap(hints.labels))[1])
    total(teacher).backward()
    assert all(p.grad.any() for p in network.teacher_decoder.spread_hints.parameters())
    # the teacher of other images sees their own map
    one = network(images(ndim), 1, hints, teach_all=True)[1]
    for result, whole in zip(one, teacher):
        torch.testing.assert_close(result, whole[:len(result)])


def test_for_predictions_spread_hints_are_the_last_channel():
    network = TwoBranchUNet(stock(deep_supervision=False), watershed=True)
    hints, channels = spread_labels(2), hints_at(2, 1)  # sets of classes are channels, and are not spread
    inputs = ((hints.labels, hints.spread), hints), ((hints.labels,), HintMap(hints.labels)), ((channels,), channels)
    expected = [network(images(), BATCH, shown)[1] for _, shown in inputs]
    network.branch = "teacher"
    for (last, _), teacher in zip(inputs, expected):
        last = torch.cat(last, 1)
        network.hints_in_input = last.shape[1]
        assert equal(network(torch.cat((images(), last), 1)), teacher)
    assert not equal(expected[0], expected[1])


def test_without_hints_the_weights_of_spread_ones_have_a_gradient_of_zero():
    network = TwoBranchUNet(stock(), watershed=True)
    total(network(images(), BATCH)[1]).backward()
    weights = list(network.teacher_decoder.spread_hints.parameters())
    assert weights and all(p.grad is not None and not p.grad.any() for p in weights)
    assert all(".seg_layers." in name for name, _ in network.teacher_decoder.named_parameters() if "spread" in name), (
        "-pretrained_weights leaves them out")


class Operators(TorchDispatchMode):
    """The names of all operators that run in this context."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


def labelled(sizes: tuple[int, ...], with_lists: bool):
    """The hints of random labels as a map, and as a channel for each class."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, CLASSES + 1, (BATCH, 1, *sizes), generator=generator, dtype=torch.int16)
    mask = (torch.rand(labels.shape, generator=generator) < 0.1) & (labels < CLASSES)
    listed = torch.tensor([[True, False, False], [True, True, False], [True, True, True]]) if with_lists else None
    return hint_map(labels, mask, listed), hint_channels(labels, mask, CLASSES, listed=listed)


@pytest.mark.parametrize("sizes", ((16, 16), (15, 9), (8, 16, 12), (7, 6, 13)), ids=str)
@pytest.mark.parametrize("with_lists", (False, True), ids=("all", "lists"))
@pytest.mark.parametrize("narrow, reach", ((False, 0), (True, 0), (True, 3)))
def test_a_map_of_hints_adds_what_their_channels_add(sizes, with_lists, narrow, reach):
    """And so do the gradients."""
    network = two_branches(PlainConvUNet, len(sizes)).double()
    if narrow:
        network = TwoBranchUNet(stock(ndim=len(sizes)), stock(ndim=len(sizes), features=(4, 6, 8, 8))).double()
    hints, channels = labelled(sizes, with_lists)
    layers = network.teacher_decoder.hints
    layers.reach = reach
    skips = [skip.detach().requires_grad_() for skip in network.narrowed(
        network.encoder(torch.randn(BATCH, 1, *sizes, dtype=torch.float64)))]
    leaves, found = [*skips, *layers.parameters()], []
    for form in (hints, channels):
        hinted = layers(skips, HintMap(form.labels, form.listed) if form is hints else form.double())
        found.append([*hinted, *torch.autograd.grad(total(hinted), leaves)])
    for result, expected in zip(*found, strict=True):
        torch.testing.assert_close(result, expected)
    assert all((hinted - skip).detach().abs().max() > 0.1 for hinted, skip in zip(found[0], skips))


@pytest.mark.parametrize("ndim", (2, 3))
def test_at_lower_resolutions_a_hint_reaches_its_neighbourhood_and_fades(ndim):
    layers = two_branches(PlainConvUNet, ndim).double().teacher_decoder.hints
    layers.reach = 3
    labels = torch.zeros(1, 1, *ndim * [32], dtype=torch.int16)
    labels[(0, 0, *ndim * [16])] = 2  # a hint of class 1
    channels = [layer.weight.shape[0] for layer in layers.seg_layers]
    skips = [torch.zeros(1, number, *ndim * [size], dtype=torch.float64) for number, size in zip(channels, (32, 16, 8))]
    fine, *coarse = layers(skips, HintMap(labels))
    assert [voxel.tolist() for voxel in fine[0].abs().sum(0).nonzero()] == [ndim * [16]]
    for hinted, layer, size in zip(coarse, layers.seg_layers[1:], (16, 8)):
        distance = (torch.stack(torch.meshgrid(*ndim * [torch.arange(size)], indexing="ij")) - size // 2).abs().amax(0)
        strength = torch.where(distance <= 3, FADE ** distance, 0.0)
        vector = (layer.weight[:, 1] + layer.weight[:, -1]).flatten()
        torch.testing.assert_close(hinted[0], vector.view(-1, *ndim * [1]) * strength)


@pytest.mark.parametrize("sizes", ((16, 16), (15, 9), (8, 16, 12), (7, 6, 13)), ids=str)
@pytest.mark.parametrize("with_lists", (False, True), ids=("all", "lists"))
def test_a_map_of_hints_has_their_channels_at_lower_resolutions(sizes, with_lists):
    hints, channels = labelled(sizes, with_lists)
    pool = {2: torch.nn.functional.max_pool2d, 3: torch.nn.functional.max_pool3d}[len(sizes)]
    for ratio in ([1, 2, 2], [2, 2, 2], [1, 1, 1], [3, 1, 4]):
        ratio = ratio[-len(sizes):]
        assert torch.equal(hints.channels(CLASSES, ratio), pool(channels, ratio, ceil_mode=True))


@pytest.mark.parametrize("with_lists", (False, True), ids=("all", "lists"))
@pytest.mark.parametrize("num_full", (0, 1, BATCH))
def test_a_network_takes_its_hints_as_a_map_or_as_channels(num_full, with_lists):
    network = two_branches().double()
    hints, channels = labelled((16, 16), with_lists)
    results = [network(images().double(), num_full, form, teach_all=True) for form in (hints, channels.double())]
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)
    if not with_lists:
        network.set_deep_supervision(False)
        network.branch, network.hints_in_input = "teacher", 1
        torch.testing.assert_close(network(torch.cat((images().double(), hints.labels), 1)), results[1][1][0])


# All of them have a kernel for Apple's MPS (or consist of such), also for volumes, in PyTorch's native_functions.yaml.
# (`adaptive_max_pool3d` has none.)
ON_EVERY_DEVICE = {
    "add", "add_", "amax", "arange", "avg_pool2d", "avg_pool3d", "bitwise_not", "cat", "constant_pad_nd",
    "convolution", "copy_", "detach", "embedding", "empty", "expand", "fill_", "floor_divide", "gt", "leaky_relu_",
    "lift_fresh", "lt", "max_pool2d_with_indices", "max_pool3d_with_indices", "mm", "mul", "native_batch_norm",
    "permute", "repeat", "scalar_tensor", "scatter_", "select", "slice", "sub", "sum", "unsqueeze", "view", "where",
    "zeros", "_to_copy"}


@each_network
@pytest.mark.parametrize("with_hints", (True, False))
def test_no_operator_lacks_a_kernel_on_some_device(architecture, ndim, stages, with_hints):
    network, x = two_branches(architecture, ndim, stages), images(ndim)
    hints = hints_at(ndim, 0) if with_hints else None
    maps = [labelled(x.shape[2:], with_lists)[0] for with_lists in (False, True)] if with_hints else []
    with Operators() as operators:
        for form in (hints, *maps):
            network(x, 2, form, teach_all=True)
        network(x, 0, hints)
        network(x)
    assert "convolution" in operators.names and operators.names <= ON_EVERY_DEVICE, operators.names - ON_EVERY_DEVICE


def test_images_that_are_not_full_do_not_change_the_teachers_running_statistics():
    torch.manual_seed(0)
    unet = PlainConvUNet(1, 2, [4, 8], nn.Conv2d, 3, [1, 2], 1, CLASSES, 1, True, nn.BatchNorm2d, {},
                         nonlin=nn.LeakyReLU, deep_supervision=False)
    networks = [TwoBranchUNet(unet)]
    networks.append(deepcopy(networks[0]))
    before = deepcopy(networks[0].teacher_decoder.state_dict())
    teachers = [network(images(), 2, hints_at(2, 0), teach_all)[1]
                for network, teach_all in zip(networks, (True, False))]
    statistics = [{name: value for name, value in network.teacher_decoder.state_dict().items()
                   if "running" in name or "tracked" in name} for network in networks]
    assert statistics[0] and all(torch.equal(statistics[0][name], statistics[1][name]) for name in statistics[0])
    assert any(not torch.equal(statistics[0][name], before[name]) for name in statistics[0])
    assert len(teachers[0]) == BATCH and torch.equal(teachers[0][:2], teachers[1])
    assert all(layer.track_running_stats for layer in networks[0].batch_norms) and networks[0].batch_norms


def test_batch_normalisations_that_were_replaced_can_be_found_again():
    unet = PlainConvUNet(1, 2, [4, 8], nn.Conv2d, 3, [1, 2], 1, CLASSES, 1, True, nn.BatchNorm2d, {})
    network = nn.SyncBatchNorm.convert_sync_batchnorm(TwoBranchUNet(unet))  # nnU-Net does so with several GPUs
    network.find_batch_norms()
    inside = [module for module in network.teacher_decoder.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert inside and [*map(id, network.batch_norms)] == [*map(id, inside)]


# ---- the branch that predicts ---------------------------------------------------------------------------------------

@deep_or_not
def test_each_branch_their_mean_and_both_can_predict(deep_supervision):
    network = two_branches(deep_supervision=deep_supervision)
    student, teacher = map(as_list, network(images(), BATCH))
    expected = {"student": student, "teacher": teacher, "mean": [(s + t) / 2 for s, t in zip(student, teacher)],
                "both": [torch.cat((s, t), 1) for s, t in zip(student, teacher)]}
    for network.branch, outputs in expected.items():
        assert equal(network(images()), outputs), network.branch
        assert torch.is_tensor(network(images())) == (not deep_supervision)


def test_a_network_built_to_predict_with_a_branch_keeps_it():
    assert two_branches().branch == "student"
    with predicting("teacher"):
        teacher = two_branches()
        with predicting("mean"):
            mean = two_branches()
        assert two_branches().branch == "teacher"
    assert (teacher.branch, mean.branch, two_branches().branch) == ("teacher", "mean", "student")
    student_calls = Calls(teacher.decoder)
    assert equal(teacher(images()), teacher(images(), BATCH)[1])
    assert student_calls.batch_sizes == [BATCH]  # of the training call: to predict, the teacher alone is run


def test_the_branch_is_the_students_again_after_an_error():
    with pytest.raises(KeyError), predicting("teacher"):
        raise KeyError
    assert two_branches().branch == "student"


def test_an_unknown_branch_to_predict_with_is_refused():
    with pytest.raises(ValueError, match="'master'"), predicting("master"):
        pass


# ---- weights --------------------------------------------------------------------------------------------------------

@each_network
@pytest.mark.parametrize("branch", ("student", "teacher"))
def test_the_weights_of_a_branch_make_the_stock_network_that_branch_to_the_bit(architecture, ndim, stages, branch):
    network = two_branches(architecture, ndim, stages)
    exported = stock(architecture, ndim, stages, seed=7)
    exported.load_state_dict(branch_weights(network.state_dict(), branch), strict=True)
    assert equal(exported(images(ndim)), network(images(ndim), BATCH)[branch == "teacher"])


def teacher_of(network: TwoBranchUNet) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in network.state_dict().items() if name.startswith(TEACHER_PREFIX)}


@each_network
def test_a_stock_network_with_a_teacher_added_has_two_equal_branches(architecture, ndim, stages):
    reference = stock(architecture, ndim, stages)
    network = two_branches(architecture, ndim, stages, seed=7)
    network.load_state_dict(add_teacher(reference.state_dict(), teacher_of(network)))
    student, teacher = network(images(ndim), BATCH)
    assert equal(student, reference(images(ndim)))
    assert equal(teacher, student)


def test_adding_a_teacher_and_taking_a_branch_are_inverse():
    weights = stock().state_dict()
    for branch in ("student", "teacher"):
        result = branch_weights(add_teacher(weights, teacher_of(two_branches(seed=7))), branch)
        assert list(result) == list(weights)
        assert all(result[name] is weights[name] for name in weights)


def test_only_the_beginning_of_a_name_tells_the_branch():
    weights = {name: torch.zeros(1) for name in ("decoder.decoder.weight", "teacher_decoder.decoder.weight")}
    assert branch_weights(weights, "teacher")["decoder.decoder.weight"] is weights["teacher_decoder.decoder.weight"]


def test_names_tell_whether_weights_hold_a_teacher():
    assert has_teacher(two_branches().state_dict())
    assert not has_teacher(stock().state_dict())


# ---- mixed images of the student ------------------------------------------------------------------------------------

@each_network
@pytest.mark.parametrize("teach_all", (False, True))
def test_with_mixed_images_each_branch_predicts_what_it_sees(architecture, ndim, stages, teach_all):
    network, other = two_branches(architecture, ndim, stages), images(ndim).flip(-1)
    hints = hints_at(ndim, 1)
    student, teacher = network(images(ndim), 2, hints, teach_all, mixed=other)
    assert equal(student, network(other, 2, hints, teach_all)[0])
    assert equal(teacher, network(images(ndim), 2, hints, teach_all)[1])
    assert not equal(teacher, network(other, 2, hints, teach_all)[1])


def test_with_mixed_images_the_teacher_does_not_update_the_encoder():
    network = two_branches()
    teacher = network(images(), 2, hints_at(2, 1), mixed=images().flip(-1))[1]
    total(teacher).backward()
    assert all(gradient is None for gradient in gradients(network.encoder))
    assert all(gradient is not None for gradient in gradients(network.teacher_decoder))


# ---- a narrow teacher -----------------------------------------------------------------------------------------------

def narrow_branches(architecture=PlainConvUNet, ndim: int = 2, stages: int = 3, deep_supervision: bool = True):
    """A network whose teacher has half of the student's features."""
    return TwoBranchUNet(stock(architecture, ndim, stages, deep_supervision),
                         stock(architecture, ndim, stages, deep_supervision, features=(4, 6, 8, 8)))


@each_network
@deep_or_not
def test_a_narrow_teacher_predicts_on_the_same_grids(architecture, ndim, stages, deep_supervision):
    network = narrow_branches(architecture, ndim, stages, deep_supervision)
    student, teacher = network(images(ndim), BATCH, hints_at(ndim, 1), teach_all=True)
    assert [x.shape for x in as_list(teacher)] == [x.shape for x in as_list(student)]
    assert equal(student, stock(architecture, ndim, stages, deep_supervision)(images(ndim)))


@each_network
def test_a_narrow_teacher_has_about_a_quarter_of_the_weights_of_the_students_decoder(architecture, ndim, stages):
    network = narrow_branches(architecture, ndim, stages)
    own = sum(p.numel() for name, p in network.decoder.named_parameters() if not name.startswith("encoder."))
    narrow = sum(p.numel() for name, p in network.teacher_decoder.named_parameters()
                 if not name.startswith(("hints.", "narrowing.")))
    assert 0.2 < narrow / own < 0.3


def test_every_weight_of_a_narrow_teacher_learns():
    network = narrow_branches()
    total(network(images(), BATCH, hints_at(2, 1))[1]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.teacher_decoder.parameters())
    assert all(p.grad is None for name, p in network.decoder.named_parameters() if not name.startswith("encoder."))


def test_a_narrow_teacher_sees_its_hints():
    network = narrow_branches()
    without, with_hints = (as_list(network(images(), BATCH, hints)[1])[0] for hints in (None, hints_at(2, 1)))
    assert not torch.equal(without, with_hints)


def test_a_narrow_teacher_starts_anew_beside_a_pretrained_student():
    network, reference = narrow_branches(), stock(seed=7)
    initial = {name: weight.clone() for name, weight in teacher_of(network).items()}
    network.load_state_dict(add_teacher(reference.state_dict(), teacher_of(network)))
    assert equal(network(images(), BATCH)[0], reference(images()))
    assert all(torch.equal(initial[name], weight) for name, weight in teacher_of(network).items())


def test_a_narrow_teacher_is_no_stock_network():
    weights = narrow_branches().state_dict()
    assert has_narrow_teacher(weights) and not has_narrow_teacher(two_branches().state_dict())
    with pytest.raises(ValueError, match="narrower than the student"):
        branch_weights(weights, "teacher")
    stock(seed=7).load_state_dict(branch_weights(weights, "student"))


def test_a_narrower_configuration_leaves_the_original_as_it_is():
    def features(configuration):
        return configuration.configuration["architecture"]["arch_kwargs"]["features_per_stage"]

    original = ConfigurationManager({"architecture": {"network_class_name": "unet", "arch_kwargs": {
        "features_per_stage": [32, 33, 1]}}})
    assert features(narrower(original, 0.5)) == [16, 16, 1] and features(original) == [32, 33, 1]
    other = ConfigurationManager({"architecture": {"network_class_name": "primus.Primus", "arch_kwargs": {}}})
    with pytest.raises(InputError, match='primus.Primus.*"teacher_width": 1'):
        narrower(other, 0.5)


def test_a_branch_of_stock_weights_and_an_unknown_branch_are_refused():
    with pytest.raises(ValueError, match="teacher_decoder"):
        branch_weights(stock().state_dict(), "student")
    with pytest.raises(ValueError, match="'mean'"):
        branch_weights(two_branches().state_dict(), "mean")


@each_network
def test_weights_survive_a_strict_round_trip(architecture, ndim, stages, tmp_path):
    network, other = (two_branches(architecture, ndim, stages, seed=seed) for seed in (0, 1))
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    other.load_state_dict(torch.load(tmp_path / "weights.pth"), strict=True)
    for ours, theirs in zip(network(images(ndim), BATCH), other(images(ndim), BATCH)):
        assert equal(ours, theirs)


@each_network
def test_copies_and_pickles_compute_the_same_and_share_nothing(architecture, ndim, stages):
    network = two_branches(architecture, ndim, stages)
    before = [[x.detach() for x in branch] for branch in network(images(ndim), BATCH)]
    copies = [deepcopy(network)]
    if architecture is PlainConvUNet:  # the stock residual networks hold lambdas, which cannot be pickled
        copies.append(pickle.loads(pickle.dumps(network)))
    for copy in copies:
        assert all(equal(a, b) for a, b in zip(copy(images(ndim), BATCH), before))
        assert copy.decoder.encoder is copy.encoder
        with torch.no_grad():
            for p in copy.parameters():
                p.add_(1)
    assert all(equal(a, b) for a, b in zip(network(images(ndim), BATCH), before))


def test_unwrap_finds_the_network_inside_torch_compile():
    network = two_branches()
    assert unwrap(network) is network
    assert unwrap(torch.compile(network)) is network


def test_unwrap_finds_the_network_inside_ddp(tmp_path):
    network = two_branches()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for wrapped in (network, torch.compile(network)):  # nnU-Net's order
            assert unwrap(DistributedDataParallel(wrapped)) is network
    finally:
        torch.distributed.destroy_process_group()
