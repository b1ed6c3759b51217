"""The settings that are null are chosen from what is annotated in the training cases.

Where the figures come from: docs/explanation/method.md and docs/explanation/weights_and_batches.md.
"""
from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED
from nnunet_confkd.errors import InputError
from nnunet_confkd.training.settings import Settings

# The annotated part of the foreground, from which on there is a teacher and partially annotated images weigh as much as
# full ones. In our data this is right for scribbles and eroded masks, and would be wrong for points.
DENSE = 0.055
WEIGHT_KL, WEIGHT_ENTROPY = 3.0, 0.01
HINT_REACH = 4  # voxels
# If the background is annotated at least this many times as densely as the foreground, the teacher completes the labels
# after this share of the epochs. In our data it is 7 to 31 times with eroded masks, and less than once with scribbles.
DENSER_BACKGROUND, COMPLETE_AT = 4, 0.25
# If partially annotated cases annotate no background, both branches complete the labels after this share of the epochs.
# If all other cases are unlabelled, the network labels them. Both need trainings of at least so many iterations: a
# network that has learnt for a shorter time makes poor labels.
TOGETHER_AT, LABEL_AT, LONG = 0.5, 0.4, 18_000
WEIGHTS = ("weight_teacher", "weight_kl", "weight_entropy")
# They follow from the cases of all folds, so that the networks of all folds are alike.
OF_NETWORK = (*WEIGHTS, "hint_reach", "hint_watershed", "complete_at")
AUTOMATIC = (*WEIGHTS, "full_share", "equal_kinds", "teacher_trains_encoder", "hint_reach", "hint_watershed",
             "complete_at", "prior_correction", "cutmix", "unlabelled_share")


@dataclass(frozen=True)
class Annotations:
    """What is annotated in the training cases.

    Attributes:
        kinds: {case: kind}. Cases that the teacher learns from count as fully annotated.
        foreground: {case: annotated voxels of the foreground}, of these and perhaps other cases.
        background: {case: annotated voxels of the background}, likewise.
        hidden: The cases that are not annotated for all classes.
        dataset: {case: kind} of the training cases of all folds, of which `part` is computed. So all folds agree. None:
            of the training cases of this one.

    Examples:
        >>> scribbles = Annotations({"a": "full", "b": "partial"}, {"a": 600, "b": 60}, {"a": 900, "b": 50})
        >>> scribbles.part, scribbles.foreground_is_sparser
        (0.1, False)
    """

    kinds: Mapping[str, str]
    foreground: Mapping[str, int]
    background: Mapping[str, int]
    hidden: Collection[str] = field(default=())
    dataset: Mapping[str, str] | None = None

    def of(self, voxels: Mapping[str, int], kind: str, hidden: bool = True) -> list[int]:
        """The numbers of voxels of the training cases of a kind, with or without those that lack classes."""
        return [voxels[case] for case, of_case in self.kinds.items()
                if of_case == kind and (hidden or case not in self.hidden)]

    @property
    def part(self) -> float:
        """The mean number of annotated foreground voxels of a partially annotated case, as a share of that of a fully
        annotated one. It is 0 if there is no such case."""
        of_dataset = replace(self, kinds=self.dataset or self.kinds)
        full, partial = (of_dataset.of(self.foreground, kind) for kind in (FULL, PARTIAL))
        return sum(partial) / len(partial) / (sum(full) / len(full)) if partial and sum(full) else 0.0

    @property
    def background_density(self) -> float:
        """How many times as densely as the foreground the background is annotated in partially annotated cases.

        The frequencies of the fully annotated cases count as the true ones. It is 0 without annotated background.
        """
        (full, partial), (full_background, partial_background) = (
            [sum(self.of(voxels, kind, hidden=False)) for kind in (FULL, PARTIAL)]
            for voxels in (self.foreground, self.background))
        if not partial_background * full:
            return 0.0
        return partial_background * full / (partial * full_background) if partial * full_background else float("inf")

    @property
    def others_are_unlabelled(self) -> bool:
        """Whether all training cases that are not fully annotated are unlabelled, and there are some."""
        return set(self.kinds.values()) == {FULL, UNLABELLED} and not self.hidden

    @property
    def foreground_is_sparser(self) -> bool:
        """Whether partially annotated cases annotate the foreground less densely than the background."""
        return self.background_density > 1


def choose_network(settings: Settings, annotations: Annotations, regions: bool = False,
                   two_stages: bool = True, long: bool = True) -> Settings:
    """Replace each of `OF_NETWORK` that is null; with the weights it is decided whether there is a teacher.

    Args:
        settings: Those of the plans and the trainer.
        annotations: Those of all cases, or of the training cases if none of these settings is null any more.
        regions: Whether the labels are regions, which may overlap.
        two_stages: Whether the training may have two stages.
        long: Whether it has at least `LONG` iterations.

    Returns:
        Settings of which no one of `OF_NETWORK` is null.

    Raises:
        InputError: `hint_watershed` is true, and hints are not labels. The text says why.
    """
    kinds = set(annotations.kinds.values())
    # With few annotations or none, the student does better without a teacher.
    few = FULL in kinds and kinds != {FULL} and annotations.part < DENSE and not annotations.hidden
    needed = (settings.weight_kl is not None or not settings.weight_student
              or bool(settings.complete_at) and not annotations.others_are_unlabelled)
    teacher, kl, entropy = (getattr(settings, name) for name in WEIGHTS)
    teacher = float(needed or not few) if teacher is None else teacher
    # Without annotated background, nothing tells how far from a border real annotations stay. Simulated ones come
    # closer, and a teacher that is told the distance from them would expect the border too close to real ones.
    background = any(annotations.of(annotations.background, PARTIAL, hidden=False))
    reach = HINT_REACH if background else 0
    if settings.hint_watershed and (regions or annotations.hidden):
        reason = "the labels are regions" if regions else "some cases are not annotated for all classes"
        raise InputError(f'confkd: hint_watershed is true, but {reason}; set "hint_watershed": false')
    # A watershed without seeds of the background would fill the image with foreground.
    watershed = few_lack_background(annotations) and not regions and not annotations.hidden
    completes = settings.complete_at
    if completes is None:
        completes = _complete_at(settings, annotations, bool(teacher), watershed, regions, long) if two_stages else 0.0
    # Without annotated background a teacher does not know where a class ends, so a KL comes first, and both branches
    # complete the labels.
    by_teacher = completes and background
    return replace(settings, weight_teacher=teacher, complete_at=completes,
                   hint_reach=reach if settings.hint_reach is None else settings.hint_reach,
                   hint_watershed=watershed if settings.hint_watershed is None else settings.hint_watershed,
                   weight_kl=(WEIGHT_KL if teacher and not by_teacher else 0.0) if kl is None else kl,
                   weight_entropy=(WEIGHT_ENTROPY if teacher else 0.0) if entropy is None else entropy)


def _complete_at(settings: Settings, annotations: Annotations, teacher: bool, watershed: bool, regions: bool,
                 long: bool) -> float:
    """Choose the share of the epochs after which labels are completed; 0: never."""
    if not teacher:
        return LABEL_AT if long and may_label(settings, annotations) else 0.0
    if regions or not may_complete(settings, annotations):
        return 0.0
    if annotations.background_density:
        return COMPLETE_AT if watershed else 0.0
    return TOGETHER_AT if long else 0.0


def may_complete(settings: Settings, annotations: Annotations) -> bool:
    """Whether the labels of partially annotated cases are completed, if `complete_at` is null.

    They are with masks whose inside is annotated less densely than the background, such as eroded ones, and with masks
    that annotate no background. A KL, some of its images or CutMix that the user asks for stay.
    """
    density = annotations.background_density
    return (settings.weight_kl is None and settings.kl_images == "all" and not settings.cutmix
            and settings.weight_student > 0 and settings.teacher_hints and not annotations.hidden
            and annotations.part >= DENSE and (not density or density >= DENSER_BACKGROUND))


def may_label(settings: Settings, annotations: Annotations) -> bool:
    """Whether a network without a teacher labels the unlabelled cases, if `complete_at` is null.

    It does not if the user asks for no teacher, or lets unlabelled images teach in another way or not at all.
    """
    return (annotations.others_are_unlabelled and settings.weight_teacher is None and not settings.weight_entropy
            and settings.unlabelled_share > 0)


def few_lack_background(annotations: Annotations) -> bool:
    """Whether at least nine of ten partially annotated cases annotate background."""
    partial = annotations.of(annotations.background, PARTIAL)
    return bool(partial) and 10 * sum(voxels > 0 for voxels in partial) >= 9 * len(partial)


def choose(settings: Settings, annotations: Annotations, batch_size: int, ignore_label: bool,
           regions: bool = False) -> Settings:
    """Replace each setting that is null, and each that has no effect on these data, by what the training does.

    Args:
        settings: Those of the plans and the trainer.
        annotations: Those of the training cases.
        batch_size: The number of images in a batch.
        ignore_label: Whether the data set has an ignore label.
        regions: Whether the labels are regions, which may overlap.

    Returns:
        Settings of which no one of `AUTOMATIC` is null.

    Raises:
        InputError: As of :func:`choose_network`.

    Examples:
        >>> scribbles = Annotations({"a": "full", "b": "partial"}, {"a": 600, "b": 60}, {"a": 900, "b": 50})
        >>> chosen = choose(Settings(), scribbles, batch_size=4, ignore_label=True)
        >>> {name: getattr(chosen, name) for name in AUTOMATIC[:4]}
        {'weight_teacher': 1.0, 'weight_kl': 3.0, 'weight_entropy': 0.01, 'full_share': 0.5}
    """
    def unless_set(name: str, automatic):
        return automatic if getattr(settings, name) is None else getattr(settings, name)

    settings = choose_network(settings, annotations, regions)
    kinds = set(annotations.kinds.values())
    background = any(annotations.of(annotations.background, PARTIAL))
    dense = annotations.part >= DENSE
    only_full_images = settings.weight_kl and settings.kl_images == "full"
    unlabelled_teach = settings.weight_entropy or settings.kl_on_non_full
    # a mixed step teaches the encoder through the student alone
    mixes = annotations.others_are_unlabelled and not only_full_images and settings.weight_student
    cutmix = unless_set("cutmix", 0.5 if mixes else 0.0)
    apart = {FULL, PARTIAL} <= kinds and batch_size > 1 and not cutmix
    # Without annotated background the student would learn too much foreground, unless the KL acts on these images.
    equal_kinds = apart and unless_set("equal_kinds", dense and not annotations.hidden
                                       and (background or settings.kl_on_non_full))
    trains_encoder = unless_set("teacher_trains_encoder", not settings.weight_student or settings.weight_teacher > 0
                                and (bool(settings.complete_at) or not (equal_kinds and background)))
    corrected = ignore_label and annotations.of(annotations.foreground, PARTIAL, hidden=False)
    prior_correction = unless_set("prior_correction", float(annotations.foreground_is_sparser))
    others_teach = kinds & ({PARTIAL, UNLABELLED} if unlabelled_teach else {PARTIAL})
    full_share = _full_share(annotations, dense, settings.weight_teacher > 0) if others_teach else 1.0
    return replace(settings, cutmix=cutmix, equal_kinds=equal_kinds, teacher_trains_encoder=trains_encoder,
                   prior_correction=prior_correction if corrected else 0.0,
                   full_share=unless_set("full_share", full_share),
                   unlabelled_share=settings.unlabelled_share if unlabelled_teach else 0.0)


def _full_share(annotations: Annotations, dense: bool, teacher: bool) -> float:
    """Choose the share of fully annotated images in a batch, if others have something to teach.

    With few annotations in the other cases, images are drawn about as often as they have something to teach. Else they
    are drawn as often as there are cases, because both kinds weigh as much. A teacher needs a half of each batch.
    """
    full, partial = (annotations.of(annotations.foreground, kind) for kind in (FULL, PARTIAL))
    if not sum(full) + sum(partial):
        return 0.5
    share = len(full) / (len(full) + len(partial)) if dense else sum(full) / (sum(full) + sum(partial))
    return min(max(share, 0.5 if teacher else 0.25), 0.75)
