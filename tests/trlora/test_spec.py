from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers import RESIDUALS, TRANSFORMS, Member
from trlora import AdapterSpec, SpecError
from trlora.residuals import NoResidualSpec
from trlora.residuals import TensorRingResidualSpec as ResidualRing
from trlora.transforms import IdentityTransformSpec
from trlora.transforms import TensorRingTransformSpec as TransformRing


@pytest.mark.parametrize("residual", RESIDUALS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_a_spec_round_trips_through_json(transform: Member, residual: Member) -> None:
    fields = {"transform": dict(transform.fields), "residual": dict(residual.fields)}
    spec = AdapterSpec.from_dict(fields)
    assert spec.to_dict() == fields
    assert AdapterSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert hash(AdapterSpec.from_dict(fields)) == hash(spec)


def test_a_part_left_out_is_the_trivial_one() -> None:
    assert AdapterSpec.from_dict({}) == AdapterSpec(IdentityTransformSpec(), NoResidualSpec())
    assert AdapterSpec.from_dict({"residual": {"type": "tensor_ring"}}).transform == IdentityTransformSpec()
    assert AdapterSpec.from_dict({"transform": {"type": "tensor_ring"}}).residual == NoResidualSpec()


def test_the_defaults_are_the_papers() -> None:
    spec = AdapterSpec.from_dict({"transform": {"type": "tensor_ring"}, "residual": {"type": "tensor_ring"}})
    assert spec == AdapterSpec(TransformRing(order=3, rank=2, modes=None), ResidualRing(order=3, rank=6, modes=None))
    assert AdapterSpec.from_dict({"residual": {"type": "low_rank"}}).to_dict()["residual"] == {
        "type": "low_rank",
        "rank": 4,
        "alpha": None,
    }


def test_modes_decide_the_order() -> None:
    assert TransformRing.from_dict({"modes": [3, 5]}).order == 2
    assert ResidualRing.from_dict({"modes": {"row": [2, 2, 7, 1], "column": [3, 3, 5, 1]}}).order == 4


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown part": ({"transforms": {}}, ["'transforms'"]),
    "no type": ({"transform": {}}, ["transform", "type"]),
    "type no text": ({"transform": {"type": 3}}, ["transform", "type"]),
    "a part as text": ({"residual": "low_rank"}, ["residual", "'low_rank'"]),
    "a part as null": ({"residual": None}, ["residual", "None"]),
    "unknown transform": (
        {"transform": {"type": "tensor_rin"}},
        ["'tensor_rin'", "nearest existing name is 'tensor_ring'"],
    ),
    "a residual as transform": ({"transform": {"type": "kronecker"}}, ["transform", "'kronecker'"]),
    "a transform as residual": ({"residual": {"type": "diagonal"}}, ["residual", "'diagonal'"]),
    "field of identity": ({"transform": {"type": "identity", "rank": 2}}, ["identity", "'rank'"]),
    "field of diagonal": ({"transform": {"type": "diagonal", "size": 2}}, ["diagonal", "'size'"]),
    "field of none": ({"residual": {"type": "none", "alpha": 2}}, ["none", "'alpha'"]),
    "field of low_rank": ({"residual": {"type": "low_rank", "r": 2}}, ["low_rank", "'r'"]),
    "block size zero": ({"transform": {"type": "block_orthogonal", "block_size": 0}}, ["block_size", "0"]),
    "block size as text": ({"transform": {"type": "block_orthogonal", "block_size": "8"}}, ["block_size", "'8'"]),
    "block size null": ({"transform": {"type": "block_orthogonal", "block_size": None}}, ["block_size", "None"]),
    "misspelt block size": (
        {"transform": {"type": "block_orthogonal", "blocksize": 8}},
        ["'blocksize'", "'block_size'"],
    ),
    "rank as float": ({"residual": {"type": "low_rank", "rank": 4.0}}, ["rank", "4.0"]),
    "rank as truth": ({"residual": {"type": "low_rank", "rank": True}}, ["rank", "True"]),
    "rank negative": ({"residual": {"type": "low_rank", "rank": -4}}, ["rank", "-4"]),
    "alpha zero": ({"residual": {"type": "low_rank", "alpha": 0}}, ["alpha", "0"]),
    "alpha negative": ({"residual": {"type": "low_rank", "alpha": -1.5}}, ["alpha", "-1.5"]),
    "alpha NaN": ({"residual": {"type": "low_rank", "alpha": float("nan")}}, ["alpha", "nan"]),
    "alpha infinite": ({"residual": {"type": "low_rank", "alpha": float("inf")}}, ["alpha", "inf"]),
    "alpha as text": ({"residual": {"type": "low_rank", "alpha": "4"}}, ["alpha", "'4'"]),
    "ring rank zero": ({"transform": {"type": "tensor_ring", "rank": 0}}, ["rank", "0"]),
    "ring ranks with zero": ({"transform": {"type": "tensor_ring", "rank": [2, 0, 2]}}, ["rank", "0"]),
    "ring ranks empty": ({"transform": {"type": "tensor_ring", "rank": []}}, ["rank", "[]"]),
    "order zero": ({"transform": {"type": "tensor_ring", "order": 0}}, ["order", "0"]),
    "order null": ({"residual": {"type": "tensor_ring", "order": None}}, ["order", "None"]),
    "order against modes": ({"transform": {"type": "tensor_ring", "order": 3, "modes": [3, 5]}}, ["order 3", "[3, 5]"]),
    "modes empty": ({"transform": {"type": "tensor_ring", "modes": []}}, ["modes", "[]"]),
    "modes with zero": ({"transform": {"type": "tensor_ring", "modes": [3, 0, 5]}}, ["modes", "0"]),
    "modes as number": ({"transform": {"type": "tensor_ring", "modes": 45}}, ["modes", "45"]),
    "residual modes as list": ({"residual": {"type": "tensor_ring", "modes": [3, 5]}}, ["modes", "[3, 5]"]),
    "residual modes halved": ({"residual": {"type": "tensor_ring", "modes": {"row": [3, 5]}}}, ["modes", "row"]),
    "residual modes unequal": (
        {"residual": {"type": "tensor_ring", "modes": {"row": [3, 5], "column": [3, 5, 1]}}},
        ["order 2", "[3, 5, 1]"],
    ),
    "residual modes empty": ({"residual": {"type": "tensor_ring", "modes": {"row": [], "column": []}}}, ["modes.row"]),
}


@pytest.mark.parametrize(("fields", "expected"), WRONG.values(), ids=WRONG)
def test_what_describes_no_adapter_is_refused(fields: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        AdapterSpec.from_dict(fields)
    for text in expected:
        assert text in str(error.value)
