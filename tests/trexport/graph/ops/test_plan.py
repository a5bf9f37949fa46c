"""The choice of a path."""

from __future__ import annotations

import pytest

from trexport.graph.ops.plan import COST_MODELS, CPU, PATHS, plan_layer
from trexport.graph.ops.slots import LayerSlot
from trlora import AdapterSpec, LayerAdapter


def slot_of(rows: int, columns: int, transform: dict[str, object], residual: dict[str, object]) -> LayerSlot:
    spec = AdapterSpec.from_dict({"transform": transform, "residual": residual})
    return LayerSlot.of(LayerAdapter.from_spec(spec, columns, rows))


TLORA = ({"type": "tensor_ring", "rank": 2}, {"type": "tensor_ring", "rank": 6})


@pytest.mark.parametrize("model", COST_MODELS.values(), ids=lambda model: model.name)
def test_many_tokens_rebuild_the_weight_and_few_do_not(model: object) -> None:
    slot = slot_of(320, 320, *TLORA)
    assert plan_layer([slot], (320, 320), 8192, model).path == "weight"  # type: ignore[arg-type]
    slot = slot_of(1280, 1280, *TLORA)
    assert plan_layer([slot], (1280, 1280), 16, model).path != "weight"  # type: ignore[arg-type]


def test_the_cheapest_is_taken_unless_one_is_forced() -> None:
    slot = slot_of(640, 768, *TLORA)
    for tokens in (1, 77, 512, 4096, 65536):
        plan = plan_layer([slot], (640, 768), tokens, CPU)
        assert plan.cost_ms[plan.path] == min(plan.cost_ms.values())
        assert plan.tokens == tokens
    for path in PATHS:
        assert plan_layer([slot], (640, 768), 77, CPU, path).path == path


def test_costs_grow_with_tokens_but_for_the_weight() -> None:
    slot = slot_of(640, 768, *TLORA)
    few, many = (plan_layer([slot], (640, 768), tokens, CPU).cost_ms for tokens in (100, 10_000))
    assert few["activations"] < many["activations"]
    assert few["dense"] < many["dense"]
    assert few["weight"] == many["weight"]


def test_a_low_rank_adapter_never_needs_a_dense_transform() -> None:
    slot = slot_of(320, 320, {"type": "identity"}, {"type": "low_rank", "rank": 4})
    assert plan_layer([slot], (320, 320), 64, CPU).path == "activations"
