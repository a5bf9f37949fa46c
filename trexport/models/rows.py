"""Where the weight of a layer lies that is part of a greater one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True)
class Rows:
    """`constant[first : first + rows]`."""

    constant: str
    """The greater parameter's name."""
    first: int
    rows: int

    def to_list(self) -> list[Any]:
        return [self.constant, self.first, self.rows]
