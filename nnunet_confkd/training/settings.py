"""The settings of ConfKDTrainer: one dataclass, with defaults and allowed values.

A `confkd` block in a configuration of the plans file overrides the defaults, and a variant of the trainer overrides
both. nnU-Net saves the plans with the model.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

from nnunet_confkd.errors import InputError, did_you_mean, shown

# Settings of earlier versions, and the only value of each that the method has kept. The plans of a trained model hold
# all settings, so that older models name these, too.
REMOVED: dict[str, Any] = {
    "supervised_loss": "dice_ce", "student_images": "all", "student_average": "joint", "kl_reference": "teacher",
    "kl_detach_teacher": True, "kl_temperature": 1.0, "kl_softmax_twice": False, "entropy_images": "partial",
    "entropy_ramp_start": 0.0, "entropy_ramp_end": 0.0}

# Settings that came later, and what earlier trainings did. A model of theirs still loads.
ADDED: dict[str, Any] = {"class_share": 0.0, "complete_at": 0.0, "cutmix": 0.0, "cutmix_full": 0.0,
                         "equal_kinds": False, "hint_reach": 0, "hint_watershed": False, "largest_components": True,
                         "prior_correction": 0.0,
                         "teacher_trains_encoder": True, "teacher_width": 1.0}


def without_removed(block: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the settings of earlier versions that have the value which the method has kept.

    Args:
        block: Settings by name, of any version of this package.

    Returns:
        A new dictionary. A removed setting that has another value is still in it.
    """
    return {key: value for key, value in block.items() if not (key in REMOVED and value == REMOVED[key])}


def _setting(group: str, default: Any, allowed: tuple, meaning: str):
    """A field of :class:`Settings`.

    Args:
        group: The heading in the table.
        default: The default.
        allowed: Texts to choose from, or the lowest and the highest number; empty for true and false.
        meaning: The text in the table.
    """
    metadata: dict[str, Any] = {"group": group, "doc": meaning}
    if allowed:
        metadata["choices" if isinstance(allowed[0], str) else "range"] = allowed
    return field(default=default, metadata=metadata)


WEIGHTS, COUNTS, SHARES = (0, 10 ** 6), (1, 10 ** 6), (0, 1)


@dataclass(frozen=True)
class Settings:
    """What ConfKDTrainer does; every field is a key of the `confkd` block.

    Raises:
        InputError: A value is not allowed. The text names the key, the value and what is allowed.

    Examples:
        >>> Settings(full_share=0.75).full_share
        0.75
        >>> [round(Settings().kl_ramp(progress), 3) for progress in (0.1, 0.35, 0.9)]  # rises from 20 to 50 %
        [0.0, 0.5, 1.0]
    """

    weight_teacher: float | None = _setting("losses", None, WEIGHTS,
                                            "weight of L_s, the teacher's supervised loss; with 0 there is no teacher. "
                                            "Null means 1, but 0 if `weight_kl` is null, too, and the cases that are "
                                            "not fully annotated have few annotations (less than for `equal_kinds`) or "
                                            "none, because the student then does better alone. If "
                                            "the teacher completes labels (`complete_at`), it means 1")
    weight_student: float = _setting("losses", 1.0, WEIGHTS, "weight of L_w, the student's supervised loss")
    weight_kl: float | None = _setting("losses", None, WEIGHTS,
                                       "weight of L_kd, the distillation from teacher to student. Null means 3, but 0 "
                                       "without a teacher, and if the teacher alone completes labels (`complete_at`)")
    weight_entropy: float | None = _setting("losses", None, WEIGHTS,
                                            "weight of L_ent, the student's entropy. Null means 0.01, but 0 without a "
                                            "teacher")
    kl_images: str = _setting("losses", "all", ("all", "full", "partial"),
                              "images on which the KL acts: all, the fully annotated ones, or all others")
    kl_ramp_start: float = _setting("losses", 0.2, SHARES,
                                    "share of the iterations after which the KL's weight starts to rise")
    kl_ramp_end: float = _setting("losses", 0.5, SHARES,
                                  "share of the iterations after which the KL has its whole weight")
    extra_resolutions: str = _setting("losses", "highest", ("highest", "all"),
                                      "resolutions of the KL and the entropy: the highest, or all supervised ones")

    prior_correction: float | None = _setting("losses", None, SHARES,
                                              "strength of the class-prior correction of L_w; with 0 the annotated "
                                              "voxels of an image count as a fair sample of its voxels. Null means 1 "
                                              "if partially annotated cases annotate the foreground less densely than "
                                              "the background, else 0")

    equal_kinds: bool | None = _setting("losses", None, (),
                                        "whether L_w is the mean of the loss over the fully annotated images and that "
                                        "over the others, so that a few scribbles weigh as much as whole masks. Else "
                                        "it is one loss over all annotated voxels. Null means true if a partially "
                                        "annotated case has on average at least 0.055 of the annotated foreground "
                                        "voxels of a fully annotated one, and all cases are annotated for the same "
                                        "classes; without the KL on these cases they must also annotate background")

    teacher_width: float = _setting("teacher", 0.5, (0.05, 1), "features of the teacher's decoder, as a share of the "
                                    "student's; a narrow teacher costs less time and memory")
    teacher_hints: bool = _setting("teacher", True, (),
                                   "whether the teacher also sees annotated voxels: real annotations on partially "
                                   "annotated images, simulated ones on fully annotated images. It does so only if "
                                   "the KL acts on images that are not fully annotated, or if the teacher completes "
                                   "labels")

    hint_reach: int | None = _setting("teacher", None, (0, 100), "how many voxels a hint reaches at each of the lower "
                                      "resolutions, where it fades with the distance. 0: the annotated voxels alone. "
                                      "Null means 4 if partially annotated cases annotate background, else 0")

    hint_watershed: bool | None = _setting("teacher", None, (), "whether the teacher also sees the annotations spread "
                                           "over the whole image by a watershed. Null means true if nine of ten "
                                           "partially annotated cases annotate background. It must be false with "
                                           "regions, and if some cases are not annotated for all classes; null means "
                                           "false then")

    teacher_trains_encoder: bool | None = _setting("teacher", None, (),
                                                   "whether L_s also updates the encoder, as in the papers. If not, "
                                                   "the fully annotated images weigh less in it. Null means false if "
                                                   "both kinds of images have equal weights in L_w (`equal_kinds`) "
                                                   "and partially annotated cases annotate background, unless the "
                                                   "teacher completes labels (`complete_at`); else true")

    complete_at: float | None = _setting("teacher", None, (0, 0.95),
                                         "share of the epochs after which labels are completed: those of the partially "
                                         "annotated training cases by the teacher, or by both branches together if "
                                         "there is a KL. If there is no teacher, the network labels the unlabelled "
                                         "cases. From then on the student alone is trained, on these labels. The "
                                         "learning rate falls to zero twice. There is no KL if these cases annotate "
                                         "background, unless `weight_kl` is set. 0: never. Null means 0.25 where "
                                         "`hint_watershed` null means true, if partially annotated cases have enough "
                                         "annotations (as for `equal_kinds`), and annotate the background at least 4 "
                                         "times as densely as the foreground, as eroded masks do; but 0 if "
                                         "`weight_kl`, `kl_images` or `cutmix` is set. Null means 0.5 if they annotate "
                                         "no background and have as many annotations, but not with regions, and if "
                                         "there are at least 18,000 iterations. Null means 0.4 without a teacher, if "
                                         "all cases that are not fully annotated are unlabelled and there are at least "
                                         "18,000 iterations. It means 0 in all other cases, and with one epoch")

    largest_components: bool = _setting("batches", True, (),
                                        "whether a network that labels unlabelled cases (`complete_at`), or both "
                                        "branches that complete labels, keep the largest component alone of "
                                        "structures that are one piece in all fully annotated training cases, such as "
                                        "a heart. Set it to false for lesions, of which other cases may have several")

    cutmix: float | None = _setting("batches", None, SHARES,
                                    "share of the iterations in which the student's images exchange boxes, with their "
                                    "labels and the teacher's probabilities. Null means 0.5 if all training cases "
                                    "that are not fully annotated are unlabelled, else 0")
    cutmix_full: float = _setting("batches", 0.0, SHARES,
                                  "share of the iterations in which the fully annotated images exchange boxes among "
                                  "themselves, with their labels, for both branches. It has no effect with one of "
                                  "them in a batch, nor after labels have been completed")
    full_share: float | None = _setting("batches", None, (0.01, 1),
                                        "share of fully annotated images in a training batch, until the teacher "
                                        "completes labels. Null means the share "
                                        "of such cases if the others have enough annotations (as for `equal_kinds`), "
                                        "and else their share of all annotated foreground voxels. It is then at least "
                                        "0.5 (without a teacher 0.25) and at most 0.75. It is 0.75 if the others are "
                                        "unlabelled, and 1 if they then have nothing to teach, because there is no "
                                        "KL on them and no entropy")
    unlabelled_share: float = _setting("batches", 0.25, SHARES,
                                       "share of unlabelled images among the others in a batch, but at most their "
                                       "share of the cases; the rest is partially annotated. Without KL on them and "
                                       "entropy no unlabelled image is drawn")
    class_share: float = _setting("batches", 0.5, SHARES,
                                  "share of the draws in which first a class and then one of its cases is drawn, if "
                                  "cases are annotated for different classes. In all other draws all cases are "
                                  "equally likely")

    epochs: int | None = _setting("run", None, COUNTS, "number of epochs; null: nnU-Net's 1000")
    iterations_per_epoch: int | None = _setting("run", None, COUNTS, "iterations per epoch; null: nnU-Net's 250")
    max_nonfinite_steps: int = _setting("run", 20, COUNTS,
                                        "number of iterations in a row with a loss or gradient that is not finite, "
                                        "after which the training stops; such iterations change no weights")
    seed: int | None = _setting("run", None, (0, 2 ** 31 - 1),
                                "seed of weights, batches and augmentation; null: a new one in every run. Runs are "
                                "exactly repeatable with nnUNet_n_proc_DA=0")

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for f in fields(self):
            _check(f, getattr(self, f.name), hints[f.name])
        if self.weight_teacher == self.weight_student == 0:
            raise InputError("confkd: weight_teacher and weight_student are both 0: there is nothing to learn from")
        if not self.weight_student and self.teacher_trains_encoder is False:
            raise InputError("confkd: weight_student is 0, and teacher_trains_encoder is false: the encoder would "
                             "learn from no label; set \"teacher_trains_encoder\": true")
        if not self.weight_student and self.cutmix:
            raise InputError("confkd: weight_student is 0, and cutmix is above 0: in a mixed step the encoder would "
                             "learn from no label; set \"cutmix\": 0")
        if self.weight_kl and self.weight_teacher == 0:
            raise InputError("confkd: weight_kl is above 0, but weight_teacher is 0: an untrained teacher would teach")
        if self.cutmix and self.weight_kl != 0 and self.weight_teacher != 0 and self.kl_images == "full":
            raise InputError("confkd: with kl_images 'full' the teacher sees the fully annotated images alone, but "
                             "cutmix above 0 mixes them with others; set \"cutmix\": 0")
        if self.cutmix and self.equal_kinds:
            raise InputError("confkd: cutmix above 0 mixes fully annotated images with others, and equal_kinds needs "
                             "them apart; set \"cutmix\": 0 or \"equal_kinds\": false")
        # without a teacher the student labels unlabelled cases (see second_stage.py)
        needed = ("weight_student", "teacher_hints") if self.weight_teacher != 0 else ("weight_student",)
        for name in needed if self.complete_at else ():
            if getattr(self, name) in (0, False):
                raise InputError(f"confkd: complete_at is above 0, but {name} is {shown(getattr(self, name))}: a "
                                 f"teacher that sees hints completes the labels, and the student learns from them; "
                                 f"set \"complete_at\": 0")
        if self.weight_kl and self.complete_at and self.complete_at <= self.kl_ramp_start:
            raise InputError(f"confkd: the KL would never act, because complete_at ({self.complete_at}) is not above "
                             f"kl_ramp_start ({self.kl_ramp_start}); raise complete_at, lower kl_ramp_start, or set "
                             f"\"weight_kl\": 0")
        if self.kl_ramp_end < self.kl_ramp_start:
            raise InputError(f"confkd: kl_ramp_end ({self.kl_ramp_end}) lies before kl_ramp_start "
                             f"({self.kl_ramp_start})")

    @classmethod
    def from_blocks(cls, *blocks: dict) -> Settings:
        """Override the defaults by each block in turn.

        Args:
            blocks: Settings by name. Settings of earlier versions (`REMOVED`) are ignored if they have the value
                that the method has kept.

        Raises:
            InputError: A block is no object; a key is unknown or has been removed; a value is not allowed.
        """
        known = [f.name for f in fields(cls)]
        merged: dict[str, Any] = {}
        for block in blocks:
            if not isinstance(block, dict):
                raise InputError(f"confkd: the block of settings must be an object of keys and values, got "
                                 f"{shown(block, repr)}")
            if set(known) - set(ADDED) <= set(block):  # a training wrote it, and not a user
                block = ADDED | block
            merged.update(block)
        merged = without_removed(merged)
        if removed := [key for key in merged if key in REMOVED]:
            raise InputError("confkd: " + "; ".join(
                f"the setting '{key}' has been removed, and only its value {shown(REMOVED[key])} is left, but the "
                f"block has {shown(merged[key])}" for key in removed)
                + ". Delete it from the plans, or use the version of nnunet_confkd that the plans were written for")
        if unknown := [key for key in merged if key not in known]:
            raise InputError("confkd: unknown setting "
                             + ", ".join(f"'{key}'{did_you_mean(key, known)}" for key in unknown)
                             + f". Known: {', '.join(known)}")
        return cls(**merged)

    def as_dict(self) -> dict:
        """All settings by name, for JSON."""
        return asdict(self)

    @property
    def kl_on_non_full(self) -> bool:
        """Whether the KL acts on images that are not fully annotated, or may do so if weights are null."""
        return self.weight_kl != 0 and self.weight_teacher != 0 and self.kl_images != "full"

    @property
    def uses_hints(self) -> bool:
        """Whether the teacher learns to use hints, or may do so if settings are null."""
        return self.teacher_hints and self.weight_teacher != 0 and (self.kl_on_non_full or bool(self.complete_at))

    def kl_ramp(self, progress: float) -> float:
        """Compute the factor of the KL's weight, which rises linearly from `kl_ramp_start` to `kl_ramp_end`.

        Args:
            progress: Share of the iterations that are done, from 0 to 1.

        Returns:
            From 0 to 1.
        """
        start, end = self.kl_ramp_start, self.kl_ramp_end
        if progress >= end:
            return 1.0
        return 0.0 if progress <= start else (progress - start) / (end - start)


def _check(f, value, hint) -> None:
    """Raise InputError unless `value` is of the field's type and within its range or choices."""
    def complain(allowed: str):
        raise InputError(f"confkd: '{f.name}' must be {allowed}, got {shown(value, repr)}")

    if value is None and f.default is None:
        return
    if "choices" in f.metadata:
        if value not in f.metadata["choices"]:
            complain("one of " + ", ".join(map(repr, f.metadata["choices"])))
    elif hint in (bool, bool | None):
        if not isinstance(value, bool):
            complain("true or false")
    else:
        low, high = f.metadata["range"]
        types = (int, float) if hint in (float, float | None) else int
        # `not (low <= value)` rather than `value < low`: NaN must not pass
        if isinstance(value, bool) or not isinstance(value, types) or not low <= value <= high:
            complain(f"{'a whole number' if types is int else 'a number'} from {low} to {high}")


def settings_table() -> str:
    """Describe the settings in a Markdown table with a row for each group and each setting.

    Examples:
        >>> "`weight_kl`" in settings_table()
        True
    """
    rows, group = ["| setting | default | allowed | meaning |", "|---|---|---|---|"], None
    for f in fields(Settings):
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            rows.append(f"| **{group}** | | | |")
        if "choices" in f.metadata:
            allowed = ", ".join(f'`"{choice}"`' for choice in f.metadata["choices"])
        elif "range" in f.metadata:
            allowed = "{} to {}".format(*f.metadata["range"])
        else:
            allowed = "`true`, `false`"
        rows.append(f"| `{f.name}` | {_default_text(f.default)} | {allowed} | {f.metadata['doc']} |")
    return "\n".join(rows)


def _default_text(default) -> str:
    """A default as JSON spells it, numbers as short as possible."""
    if isinstance(default, bool) or default is None:
        return {True: "true", False: "false", None: "null"}[default]
    return default if isinstance(default, str) else f"{default:g}"
