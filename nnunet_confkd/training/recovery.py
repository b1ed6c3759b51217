"""What happens when training steps fail: steps that are not finite are counted, and too many of them stop the training."""
from __future__ import annotations

import math
from collections.abc import Iterable

from nnunet_confkd.errors import TrainingError


class Divergence:
    """Counts consecutive steps whose loss or gradient is not finite.

    With a gradient scaler (mixed precision) it is normal that the gradient overflows while the loss is finite: the
    scaler leaves the step out and lowers its scale. Such steps are counted, too, but reported only from the fifth in a
    row on.

    Args:
        limit: The training stops after so many such steps in a row.
    """

    NORMAL_BACK_OFFS = 4  # in a row

    def __init__(self, limit: int):
        self.limit, self.count, self.reported = limit, 0, False

    def look(self, values: dict[str, float], epoch: int, cases: Iterable, scaled: bool = False) -> str | None:
        """Check one training step.

        Args:
            values: The loss, its terms, and the norm of the gradient under the name "gradient".
            epoch: Number of the epoch, for the message.
            cases: Names of the cases of the batch, for the message.
            scaled: Whether a gradient scaler is in use.

        Returns:
            The warning to print, or None. In a row of such steps the first one whose loss is not finite is reported,
            and every back-off of the gradient scaler from the fifth step on.

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
                f"{self.count} steps in a row were not finite, so the training stops ({what}). None of them has changed the network. Look "
                f"at these cases (confkd check), lower the weight of the term, or train in float32.")
        if back_off:
            if self.count <= self.NORMAL_BACK_OFFS:
                return None
            return (f"WARNING: {self.count} steps in a row are left out, because the gradient is not finite, though "
                    "the loss is. "
                    f"With mixed precision up to {self.NORMAL_BACK_OFFS} in a row are normal: {what}")
        if self.reported:
            return None
        self.reported = True
        return f"WARNING: this step is left out, because it is not finite: {what}"
