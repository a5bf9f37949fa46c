"""Members as people type them."""

from __future__ import annotations

from typing import Any

import pytest

from trlora import AdapterSpec, SpecError
from trlora.residuals import RESIDUALS
from trlora.shorthand import fields_from_text, size_name
from trlora.transforms import TRANSFORMS


@pytest.mark.parametrize(
    ("part", "text", "fields"),
    [
        ("transform", "identity", {"type": "identity"}),
        ("transform", "tensor_ring:2", {"type": "tensor_ring", "rank": 2}),
        ("transform", "block_orthogonal:8", {"type": "block_orthogonal", "block_size": 8}),
        ("residual", "low_rank:16", {"type": "low_rank", "rank": 16}),
        ("residual", ' {"type": "low_rank", "alpha": 3}', {"type": "low_rank", "alpha": 3}),
        ("magnitude", "norm", {"type": "norm"}),
    ],
)
def test_what_is_typed_is_what_checkpoints_have(part: str, text: str, fields: dict[str, Any]) -> None:
    assert fields_from_text(part, text) == fields
    AdapterSpec.from_dict({part: fields})


@pytest.mark.parametrize(("part", "kinds"), [("transform", TRANSFORMS), ("residual", RESIDUALS)])
def test_every_member_has_its_size_under_its_own_name(part: str, kinds: Any) -> None:
    for kind, spec in kinds.items():
        name = size_name(spec)
        if name is None:
            with pytest.raises(SpecError, match=f"{kind} has no size, 4 given"):
                fields_from_text(part, f"{kind}:4")
        else:
            read = AdapterSpec.from_dict({part: fields_from_text(part, f"{kind}:4")})
            assert getattr(getattr(read, part), name) == 4


@pytest.mark.parametrize(
    ("part", "text", "words"),
    [
        ("residual", "low_rank:0", "NAME:SIZE"),
        ("residual", "low_rank:two", "NAME:SIZE"),
        ("residual", "low_rank:", "NAME:SIZE"),
        ("residual", "low_rank:²", "NAME:SIZE"),
        ("residual", "{", "not JSON"),
        ("residual", "{}", 'no "type"'),
        ("transform", "identity:2", "no size"),
        ("magnitude", "norm:2", "no size"),
    ],
)
def test_what_cannot_be_read_is_refused(part: str, text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        fields_from_text(part, text)


def test_an_unknown_member_is_left_to_who_knows_them() -> None:
    fields = fields_from_text("transform", "tensor_rng:2")
    with pytest.raises(SpecError, match="the nearest existing name is 'tensor_ring'"):
        AdapterSpec.from_dict({"transform": fields})
