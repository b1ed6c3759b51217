"""The settings of ConfKDTrainer: one dataclass, with the defaults and what each may be.

Overridden by a `confkd` block in a configuration of the plans file (which nnU-Net saves with the model), and fixed by
the trainer's variants.
"""
from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

from nnunet_confkd.errors import InputError, shown


def _choice(default: str, *others: str, doc: str):
    return field(default=default, metadata={"choices": (default, *others), "doc": doc})


def _number(default, low, high, doc: str):
    return field(default=default, metadata={"range": (low, high), "doc": doc})


def _optional(low: int, high: int, doc: str):
    return field(default=None, metadata={"range": (low, high), "doc": doc})


def _flag(default: bool, doc: str):
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Settings:
    """What ConfKDTrainer does; every field is a key of the `confkd` block.

    Raises InputError for a value out of range, naming the key, the value and what is allowed.
    """

    weight_teacher: float = _number(1.0, 0, 1e6, "weight of L_s, the teacher's supervised loss")
    weight_student: float = _number(1.0, 0, 1e6, "weight of L_w, the student's supervised loss")
    weight_kl: float = _number(3.0, 0, 1e6, "weight of L_kd, the distillation from teacher to student")
    weight_entropy: float = _number(0.01, 0, 1e6, "weight of L_ent, the student's entropy")
    supervised_loss: str = _choice("dice_ce", "ce", doc="nnU-Net's Dice + cross-entropy, or cross-entropy alone")
    student_images: str = _choice("all", "partial", doc="images that enter L_w: all, or those not fully labelled")
    student_average: str = _choice(
        "joint", "separate", doc="L_w: one loss over the batch, or the mean of the losses of full and of other images")
    kl_reference: str = _choice("teacher", "student", doc="first argument of the KL: KL(teacher || student) or reverse")
    kl_detach_teacher: bool = _flag(True, "the KL does not update the teacher")
    kl_temperature: float = _number(1.0, 1e-2, 1e2, "temperature T of the KL, which is scaled by T^2")
    kl_softmax_twice: bool = _flag(False, "the conference paper's softmax over the softmax outputs, scaled by T^2 / (2 C)")
    teacher_hints: bool = _flag(True, "the teacher also sees annotated voxels, if the KL acts on images that are not fully annotated: "
                                "real annotations on partially annotated images, simulated ones on fully annotated images")
    kl_images: str = _choice("all", "full", "partial", doc="images on which the KL acts: all, those fully labelled, or the others")
    kl_ramp_start: float = _number(0.2, 0, 1, "share of the iterations after which the KL's weight starts to rise")
    kl_ramp_end: float = _number(0.5, 0, 1, "share of the iterations after which the KL has its whole weight")
    entropy_images: str = _choice("partial", "full", "all", doc="images on which the entropy acts: those not fully "
                                                                "labelled, those fully labelled, or all")
    entropy_ramp_start: float = _number(0.0, 0, 1, "share of the iterations after which the entropy's weight starts to rise")
    entropy_ramp_end: float = _number(0.0, 0, 1, "share of the iterations after which the entropy has its whole weight")
    extra_resolutions: str = _choice(
        "highest", "all", doc="resolutions of the KL and the entropy: the highest, or all supervised ones")
    full_share: float = _number(0.5, 0.01, 0.99, "share of fully annotated images in a training batch")
    unlabelled_share: float = _number(0.25, 0, 1, "share of unlabelled images among the others in a batch, but at most their share of "
                                                  "the cases; the rest is partially annotated")
    epochs: int | None = _optional(1, 10 ** 6, "number of epochs; null: the trainer's own (1000, or its name's)")
    iterations_per_epoch: int | None = _optional(1, 10 ** 6, "training steps an epoch; null: nnU-Net's 250")
    max_nonfinite_steps: int = _number(20, 1, 10 ** 6, "steps in a row whose loss or gradient is not finite, after which the "
                                       "training stops; such steps are left out")
    seed: int | None = _optional(0, 2 ** 31 - 1, "seed of weights, batches and augmentation; null: a new one every run. "
                                                 "Exactly repeatable with nnUNet_n_proc_DA=0")

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for f in fields(self):
            _check(f, getattr(self, f.name), hints[f.name])
        if not (self.weight_teacher or self.weight_student):
            raise InputError("confkd: weight_teacher and weight_student are both 0: there is nothing to learn from")
        if self.weight_kl and not self.weight_teacher:
            raise InputError("confkd: weight_kl is above 0, but weight_teacher is 0: an untrained teacher would teach")
        for term in ("kl", "entropy"):
            start, end = getattr(self, f"{term}_ramp_start"), getattr(self, f"{term}_ramp_end")
            if end < start:
                raise InputError(f"confkd: {term}_ramp_end ({end}) lies before {term}_ramp_start ({start})")

    @classmethod
    def from_blocks(cls, *blocks: dict) -> Settings:
        """The defaults, overridden by each block in turn. Raises InputError for unknown keys and bad values."""
        known = [f.name for f in fields(cls)]
        merged = {}
        for block in blocks:
            if not isinstance(block, dict):
                raise InputError(f"confkd: the block of settings must be an object of keys and values, got {shown(block, repr)}")
            merged.update(block)
        unknown = [key for key in merged if key not in known]
        if unknown:
            hints = {key: difflib.get_close_matches(key, known, 1) for key in unknown}
            raise InputError("confkd: unknown setting " + ", ".join(
                f"'{key}'" + (f" (did you mean '{hint[0]}'?)" if hint else "") for key, hint in hints.items())
                + f". Known: {', '.join(known)}")
        return cls(**merged)

    def as_dict(self) -> dict:
        return asdict(self)

    @property
    def kl_on_non_full(self) -> bool:
        """Whether the KL acts on images that are not fully annotated."""
        return self.weight_kl > 0 and self.kl_images != "full"

    @property
    def uses_hints(self) -> bool:
        """Whether the teacher learns to use hints."""
        return self.teacher_hints and self.kl_on_non_full

    def ramp(self, term: str, progress: float) -> float:
        """Factor of the weight of `term` ("kl" or "entropy") at `progress`, the share of the iterations done, 0 to 1."""
        start, end = getattr(self, f"{term}_ramp_start"), getattr(self, f"{term}_ramp_end")
        if progress >= end:
            return 1.0
        return 0.0 if progress <= start else (progress - start) / (end - start)


def _check(f, value, hint) -> None:
    """Raise InputError unless `value` is of the field's type and within its range or choices."""
    def complain(allowed: str):
        raise InputError(f"confkd: '{f.name}' must be {allowed}, got {shown(value, repr)}")

    if "choices" in f.metadata:
        if value not in f.metadata["choices"]:
            complain("one of " + ", ".join(map(repr, f.metadata["choices"])))
    elif hint is bool:
        if not isinstance(value, bool):
            complain("true or false")
    elif value is not None or f.default is not None:
        low, high = f.metadata["range"]
        types = (int, float) if hint is float else int
        # `not (low <= value)` rather than `value < low`: NaN must not pass
        if isinstance(value, bool) or not isinstance(value, types) or not low <= value <= high:
            complain(f"{'a number' if hint is float else 'a whole number'} from {low} to {high}")


def settings_table() -> str:
    """The settings as a Markdown table (for the documentation)."""
    rows = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for f in fields(Settings):
        if "choices" in f.metadata:
            allowed = ", ".join(f'`"{c}"`' for c in f.metadata["choices"])
        elif "range" in f.metadata:
            allowed = "{:g} to {:g}".format(*f.metadata["range"])
        else:
            allowed = "`true`, `false`"
        spelled: dict[Any, str] = {True: "true", False: "false", None: "null"}
        default = spelled.get(f.default, f.default) if not isinstance(
            f.default, (int, float)) or isinstance(f.default, bool) else f"{f.default:g}"
        rows.append(f"| `{f.name}` | {default} | {allowed} | {f.metadata['doc'].replace('|', chr(92) + '|')} |")
    return "\n".join(rows)
