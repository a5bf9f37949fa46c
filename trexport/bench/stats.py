"""Order statistics of latencies."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final


@final
@dataclass(frozen=True)
class Latency:
    """Median, tenth and ninetieth percentile of n latencies, in milliseconds."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    n: int

    @classmethod
    def of(cls, latencies_ms: Sequence[float]) -> Self:
        """From at least one latency."""
        ordered = sorted(latencies_ms)
        if len(ordered) == 1:
            return cls(ordered[0], ordered[0], ordered[0], 1)
        tenths = statistics.quantiles(ordered, n=10, method="inclusive")
        return cls(statistics.median(ordered), tenths[0], tenths[8], len(ordered))
