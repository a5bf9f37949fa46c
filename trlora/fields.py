"""Reading the fields of a spec from JSON, with errors that name the field."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from trlora.errors import SpecError, nearest


def check_known(kind: str, fields: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise `SpecError` for a field that `known` does not list."""
    known = list(known)
    for name in fields:
        if name not in known:
            raise SpecError(f"{kind}: unknown field {name!r}; it takes {known or 'none'}{nearest(name, known)}")


def positive_int(kind: str, name: str, value: Any) -> int:
    """`value` as an int of at least 1, or `SpecError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpecError(f"{kind}: {name} is {value!r}, expected a whole number of at least 1")
    return value


def optional_int(kind: str, name: str, value: Any) -> int | None:
    """None, or `positive_int`."""
    return None if value is None else positive_int(kind, name, value)


def boolean(kind: str, name: str, value: Any) -> bool:
    """`value` as a bool, or `SpecError`."""
    if not isinstance(value, bool):
        raise SpecError(f"{kind}: {name} is {value!r}, expected true or false")
    return value


def alpha_of(kind: str, value: Any) -> float | None:
    """None, or a number above 0: the scaling of a residual times its rank."""
    if value is not None and finite_number(kind, "alpha", value) <= 0:
        raise SpecError(f"{kind}: alpha is {value!r}, expected null or a number above 0")
    return value


def kernel_of(kind: str, value: Any) -> tuple[int, int] | None:
    """None, or the height and width of a convolution's kernel."""
    kernel = optional_ints(kind, "kernel", value)
    if kernel is not None and len(kernel) != 2:
        raise SpecError(f"{kind}: kernel is {value!r}, expected null or [height, width]")
    return kernel and (kernel[0], kernel[1])


def row_and_column(kind: str, modes: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """None, or the modes of the outputs and of the inputs from `{"row": […], "column": […]}`."""
    if modes is None:
        return None
    if not isinstance(modes, Mapping) or set(modes) != {"row", "column"}:
        raise SpecError(f'{kind}: modes is {modes!r}, expected null or {{"row": […], "column": […]}}')
    return positive_ints(kind, "modes.row", modes["row"]), positive_ints(kind, "modes.column", modes["column"])


def positive_ints(kind: str, name: str, value: Any) -> tuple[int, ...]:
    """`value` as a tuple of ints of at least 1, or `SpecError`."""
    if not isinstance(value, (list, tuple)) or not value:
        raise SpecError(f"{kind}: {name} is {value!r}, expected a list of whole numbers")
    return tuple(positive_int(kind, name, item) for item in value)


def optional_ints(kind: str, name: str, value: Any) -> tuple[int, ...] | None:
    """None, or `positive_ints`."""
    return None if value is None else positive_ints(kind, name, value)


def rank_or_ranks(kind: str, value: Any) -> int | tuple[int, ...]:
    """One rank, or a list with one for each core."""
    if isinstance(value, (list, tuple)):
        return positive_ints(kind, "rank", value)
    return positive_int(kind, "rank", value)


def finite_number(kind: str, name: str, value: Any) -> float:
    """`value` as a float that is neither NaN nor Inf, or `SpecError`."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not math.isfinite(number):
        raise SpecError(f"{kind}: {name} is {value!r}, expected a finite number")
    return number


def order_of(kind: str, order: Any, *modes: tuple[int, ...] | None) -> int:
    """The order, which the modes, where given, must have as their number."""
    result = positive_int(kind, "order", order)
    for given in modes:
        if given is not None and len(given) != result:
            raise SpecError(f"{kind}: order {result} and modes {list(given)} given, expected {result} modes")
    return result
