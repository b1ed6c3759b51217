"""What happens when a training fails: iterations that are not finite, and what an early end leaves behind."""
from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from nnunet_confkd.errors import TrainingError
from nnunet_confkd.training.names import COMPLETED_LABELS
from nnunet_confkd.training.record import RECORD


class Divergence:
    """Counts consecutive iterations whose loss or gradient is not finite.

    With a gradient scaler (mixed precision) it is normal that the gradient overflows while the loss is finite: the
    scaler skips the update and lowers its scale. Such iterations are counted, too, but reported only from the fifth
    in a row on.

    Args:
        limit: The training stops after so many such iterations in a row.
    """

    NORMAL_BACK_OFFS = 4  # in a row

    def __init__(self, limit: int):
        self.limit, self.count, self.reported = limit, 0, False

    def check(self, values: dict[str, float], epoch: int, cases: Iterable, scaled: bool = False) -> str | None:
        """Check one iteration.

        Args:
            values: The loss, its terms, and the norm of the gradient under the name "gradient".
            epoch: Number of the epoch, for the message.
            cases: Names of the cases of the batch, for the message.
            scaled: Whether a gradient scaler is in use.

        Returns:
            The warning to print, or None. In a row of such iterations the first one whose loss is not finite is
            reported, and every back-off of the gradient scaler from the fifth iteration on.

        Raises:
            TrainingError: The limit is reached.
        """
        bad = {name: float(value) for name, value in values.items() if not math.isfinite(value)}
        if not bad:
            self.count, self.reported = 0, False
            return None
        self.count += 1
        back_off = scaled and set(bad) == {"gradient"}
        what = (f"epoch {epoch}, {', '.join(f'{name} = {value}' for name, value in bad.items())}; "
                f"cases: {', '.join(sorted(map(str, set(cases))))}")
        if self.count >= self.limit:
            raise TrainingError(
                f"{self.count} steps in a row were not finite, so the training stops ({what}). None of them has "
                f"changed the network. Check these cases (confkd check), lower the weight of the term, or train in "
                f"float32.")
        if back_off:
            if self.count <= self.NORMAL_BACK_OFFS:
                return None
            return (f"WARNING: {self.count} steps in a row were skipped, because the gradient is not finite, although "
                    f"the loss is. With mixed precision up to {self.NORMAL_BACK_OFFS} in a row are normal: {what}")
        if self.reported:
            return None
        self.reported = True
        return f"WARNING: this step was skipped, because it is not finite: {what}"


def set_aside_earlier(folder: str | Path) -> str | None:
    """Move what an earlier training has left out of the way of a new one, which would overwrite it.

    These are its checkpoints, its validation, its record and the labels that it has completed, and the
    post-processing that nnU-Net has determined with it. Without this, the validation of the earlier network would be
    taken for that of the new one until this is validated, too.

    Args:
        folder: Folder of the fold.

    Returns:
        A warning for the log, or None if there is neither a checkpoint nor a validation.
    """
    found = sorted(path for pattern in ("checkpoint_*.pth", "validation*") for path in Path(folder).glob(pattern))
    if not found:
        return None
    written = datetime.fromtimestamp(max(path.stat().st_mtime for path in found))
    target = Path(folder, f"earlier_{written:%Y%m%d_%H%M%S}")
    target.mkdir(exist_ok=True)
    for path in (*found, *Path(folder).glob(RECORD), *Path(folder).glob(COMPLETED_LABELS)):
        path.replace(target / path.name)
    model = Path(folder).parent  # what nnU-Net has found out from the validation of this and of other folds
    for path in (path for pattern in ("crossval_results_folds_*", "postprocessing.*") for path in model.glob(pattern)):
        with suppress(FileNotFoundError):  # another fold that begins anew has moved it
            path.replace(target / path.name)
    return (f"WARNING: {folder} holds an earlier training, of {written:%Y-%m-%d %H:%M}. This one begins anew. The "
            f"checkpoints, the validation and the record of the earlier one are now in {target}, and so is the model's "
            f"post-processing, if it had one. To go on with a training, give --c; to validate it again, --val.")


def explain_stop(error: BaseException, folder: str | Path, epoch: int, begun: bool = True) -> tuple[str, str | None]:
    """Say where a training has stopped, and from which checkpoint it can be continued.

    Args:
        error: What has ended the training.
        folder: Folder of the fold.
        epoch: Number of the epoch.
        begun: Whether the training had begun or was continued. If not, a checkpoint is that of an earlier training.

    Returns:
        The text, and the reason of an error that :class:`TrainingError` should carry, or None for any other.
    """
    names = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
    left = next((name for name in names if Path(folder, name).is_file()), None)
    stopped = f"The training stopped in epoch {epoch}. " + (
        f"{left} is whole: --c goes on from it." if left else "There is no checkpoint to go on from yet.")
    if not begun:
        stopped = "The training stopped before its first step."
        if left:
            stopped += f" {left} is that of an earlier training, which is left as it was."
    if isinstance(error, TrainingError):
        return stopped, str(error)
    if isinstance(error, RuntimeError) and "background workers" in str(error):
        return stopped, ("a process that loads and augments the data has ended. Its error message is printed above; if "
                         "there is none, the process was killed, most likely because the memory was exhausted (fewer "
                         "processes: nnUNet_n_proc_DA).")
    return stopped, None
