"""How equal an artifact must be to its float32 reference, for each precision, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from trexport.io_spec import Dtype


@final
@dataclass(frozen=True)
class Tolerance:
    """Limits on one step and on a whole trajectory, with their reason."""

    relative_l2: float
    """Of one step's output."""
    max_abs_ratio: float
    """Greatest absolute error of one step over the greatest absolute value of the reference."""
    cosine: float
    """At least, of one step."""
    trajectory_relative_l2: float
    """Of the final image."""
    psnr_db: float
    """At least, of the final image."""
    reason: str

    def scaled(self, relative_l2: float | None) -> Tolerance:
        """The same with another limit on one step's relative L2, where one is given."""
        return self if relative_l2 is None else replace(self, relative_l2=relative_l2, reason="given by the user")


TOLERANCES: dict[Dtype, Tolerance] = {
    "fp32": Tolerance(
        1e-5,
        1e-4,
        1 - 1e-9,
        1e-3,
        60.0,
        "float32 rounds at 6e-8; sums in another order over some hundred layers were seen to give 1e-6 to 3e-6",
    ),
    "fp16": Tolerance(
        3e-3,
        2e-2,
        1 - 1e-5,
        3e-2,
        35.0,
        "float16 rounds at 5e-4; weights and activations rounded over some hundred layers give 1e-3 to 2.5e-3",
    ),
    "bf16": Tolerance(
        2.5e-2,
        1e-1,
        1 - 1e-3,
        2e-1,
        20.0,
        "bfloat16 rounds at 4e-3, eight times float16",
    ),
}
