"""Do the numbers of a comparison prove equality?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trexport.parity.report import StepParity, TrajectoryParity
from trexport.parity.tolerance import Tolerance

_LEAST_EFFECT = 1e-4
"""An adapter that moves the output less than this, relative, cannot be seen in a picture of 8 bits."""
_EFFECT_OVER_ERROR = 3.0
"""The effect must stand this far above the error, or parity could not tell the adapter from none."""


def least_effect(errors: Sequence[float]) -> float:
    """What adapters must move an output by at least, beside errors that are within their tolerance."""
    return max(_LEAST_EFFECT, _EFFECT_OVER_ERROR * max(errors, default=0.0))


def judge(
    steps: Sequence[StepParity],
    trajectory: TrajectoryParity | None,
    tolerance: Tolerance,
    *,
    adapted: bool,
    has_effect: bool,
) -> list[str]:
    """Why the numbers do not prove equality; nothing when they do. Every limit is written so that a NaN fails it.

    Args:
        adapted: whether the artifact has adapters, so that an effect is expected.
        has_effect: whether any of them has a strength other than zero.
    """
    failures: list[str] = []

    def limit(name: str, values: Sequence[float], bound: float, *, least: bool = False) -> None:
        failing = [value for value in values if not (value >= bound if least else value <= bound)]
        if failing:
            worst = min(failing) if least else max(failing)
            if any(math.isnan(value) for value in failing):
                worst = math.nan
            sign = "below" if least else "above"
            failures.append(f"{name} is {worst:.3g}, {sign} {bound:.3g}, in {len(failing)} of {len(values)} cases")

    limit("relative L2 of a step", [step.relative_l2 for step in steps], tolerance.relative_l2)
    limit("greatest error of a step over its greatest value", [s.max_abs_ratio for s in steps], tolerance.max_abs_ratio)
    limit("cosine of a step", [step.cosine for step in steps], tolerance.cosine, least=True)
    if trajectory is not None:
        limit("relative L2 of the final image", [trajectory.relative_l2], tolerance.trajectory_relative_l2)
        limit("PSNR (dB) of the final image", [trajectory.psnr_db], tolerance.psnr_db, least=True)
    if adapted and not has_effect:
        failures.append("every adapter has strength 0: the artifact is the base, and no effect can be shown")
    elif adapted:
        effect = max(step.effect for step in steps)
        # an error outside its tolerance has failed above, and says nothing about the adapters
        least = least_effect([s.relative_l2 for s in steps if s.relative_l2 <= tolerance.relative_l2])
        if not effect >= least:
            failures.append(
                f"the adapters move the output by {effect:.3g} at most, expected at least {least:.3g}: they do nothing "
                "that could be told from no adapter"
            )
        # triangle inequality: an artifact that equals the adapted reference is as far from the base as that one is
        stuck = [step for step in steps if not step.distance_to_base >= 0.5 * step.effect]
        if stuck and effect >= _LEAST_EFFECT:
            failures.append(
                f"the artifact is nearer to the base than its adapters should leave it in {len(stuck)} of {len(steps)} "
                "cases: they are not, or not wholly, in it"
            )
    return failures
