"""Reports as strict JSON."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> Any:
    """The same with NaN and Inf, which JSON does not have, as strings; tuples as lists, keys as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [finite(item) for item in value]
    return value
