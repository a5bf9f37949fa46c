"""What a parity check found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from trexport.io_spec import Dtype
from trexport.parity.tolerance import Tolerance


@final
@dataclass(frozen=True)
class StepParity:
    """One UNet step of the artifact against the reference."""

    sizes: dict[str, int]
    timestep: float
    seed: int
    max_abs: float
    max_abs_ratio: float
    relative_l2: float
    cosine: float
    effect: float
    """How far the adapters move the reference: `‖adapted − base‖ / ‖base‖`."""
    distance_to_base: float
    """How far the artifact is from the base without adapters, measured the same way."""
    who: str = ""
    """Of a bank: the adapter that all samples took, or `each its own`."""


@final
@dataclass(frozen=True)
class TrajectoryParity:
    """The final image of a whole trajectory, the artifact's own against the reference's own."""

    steps: int
    guidance: float
    seed: int
    relative_l2: float
    psnr_db: float
    effect: float
    """How far the adapters move the final image: relative L2 of the reference to the base."""


@final
@dataclass(frozen=True)
class ComponentParity:
    """One output of a pipeline's other model against PyTorch, at its worst."""

    component: str
    output: str
    dtype: Dtype
    cases: int
    relative_l2: float
    max_abs: float
    limit: float
    """On relative L2."""
    effect: float | None = None
    """How far the adapters move it at most, as `StepParity.effect`; None where no adapter is on the model."""


@final
@dataclass(frozen=True)
class FirstDeviation:
    """The first tensor of a graph that leaves the tolerance."""

    tensor: str
    operator: str
    module: str
    relative_l2: float
    last_good: str | None
    last_good_relative_l2: float | None


@final
@dataclass(frozen=True)
class ParityReport:
    """The verdict, with what it rests on."""

    artifact: str
    backend: str
    device: str
    dtype: Dtype
    tolerance: Tolerance
    steps: Sequence[StepParity]
    trajectory: TrajectoryParity | None
    failures: Sequence[str]
    first_deviation: FirstDeviation | None = None
    location_note: str | None = None
    components: Sequence[ComponentParity] = ()
    """Of a whole pipeline, its other models."""

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def worst(self) -> StepParity:
        """The step with the greatest relative L2; a NaN counts as greatest."""
        return max(self.steps, key=lambda step: (step.relative_l2 != step.relative_l2, step.relative_l2))

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed} | asdict(self)
