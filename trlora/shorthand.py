"""Members as people type them: `tensor_ring:2` in the place of `{"type": "tensor_ring", "rank": 2}`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from trlora.errors import SpecError
from trlora.residuals import RESIDUALS, ResidualSpec
from trlora.transforms import TRANSFORMS, TransformSpec

_NAMES = ("rank", "block_size")
_KINDS: dict[str, Mapping[str, type[TransformSpec] | type[ResidualSpec]]] = {
    "transform": TRANSFORMS,
    "residual": RESIDUALS,
}


def size_name(spec: type[TransformSpec] | type[ResidualSpec]) -> str | None:
    """The field of a kind of spec that is its size, None where it has none."""
    names = [field.name for field in dataclasses.fields(spec)]  # type: ignore[arg-type]
    return next((name for name in _NAMES if name in names), None)


def size_of(part: str, kind: str) -> str | None:
    """`size_name` by the names of a part and of its kind; None also where there is no such kind."""
    found = _KINDS.get(part, {}).get(kind)
    return None if found is None else size_name(found)


def fields_from_text(part: str, text: str) -> dict[str, Any]:
    """The fields of a part of an adapter, for `AdapterSpec.from_dict`.

    Args:
        part: `transform`, `residual` or `magnitude`.
        text: NAME, NAME:SIZE, or a JSON object as in a checkpoint. SIZE is a rank or a block size.

    Raises:
        SpecError: not to be read, or a size for a kind that has none. An unknown kind is left to whoever reads the fields.
    """
    if text.lstrip().startswith("{"):
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"{part} {text!r} is not JSON ({error})") from error
        if not isinstance(fields.get("type"), str):
            raise SpecError(f'{part} {text!r} has no "type"')
        return fields
    kind, colon, size = text.partition(":")
    if not colon:
        return {"type": kind}
    if not (size.isascii() and size.isdigit() and int(size)):
        raise SpecError(f"{part} {text!r}, expected NAME, or NAME:SIZE with a whole number from 1 on")
    name = size_of(part, kind)
    if name is None and (part not in _KINDS or kind in _KINDS[part]):
        raise SpecError(f"{part}: {kind} has no size, {size} given; expected NAME alone")
    return {"type": kind, name or "rank": int(size)}
