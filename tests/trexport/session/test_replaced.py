"""Adapted weights that are parts of greater constants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trexport.adapter_file import layer_shapes, open_for, swappable_of
from trexport.artifact import Artifact
from trexport.backends.base import EngineRecord
from trexport.engine import neighbours, pristine_weights
from trexport.models.base import Base
from trexport.models.rows import Rows
from trexport.profile import Profile
from trexport.session.replaced import ReplacedForm
from trlora import adapted_weight


def stacked(shapes: dict[str, tuple[int, ...]], constant: str, paths: list[str]) -> dict[str, Rows]:
    """Layers one below the other."""
    places, first = {}, 0
    for path in paths:
        places[path] = Rows(constant, first, shapes[path][0])
        first += shapes[path][0]
    return places


@pytest.fixture
def places(swappable: Artifact, base: Base) -> dict[str, Rows]:
    """q, k, v of one attention in one constant, and a layer that no adapter is on beside an adapted one."""
    adapted = swappable_of(swappable).slot.layers
    shapes = base.weight_shapes()
    attention = next(path.removesuffix(".to_q") for path in adapted if path.endswith("attn1.to_q"))
    alone = next(path for path in adapted if path.endswith("attn2.to_q"))
    other = next(path for path, shape in shapes.items() if path not in adapted and shape[1:] == shapes[alone][1:])
    parts = [f"{attention}.{name}" for name in ("to_q", "to_k", "to_v")]
    return stacked(shapes, "qkv", parts) | stacked(shapes, "pair", [other, alone])


def test_what_lies_beside_adapted_layers_is_kept(swappable: Artifact, base: Base, places: dict[str, Rows]) -> None:
    record = EngineRecord("x", "x", {}, ("cpu",), (Profile.of({}),), {}, {}, places)
    adapted = pristine_weights(swappable)
    found = neighbours(base, record, adapted, "fp32")
    other = next(path for path, rows in places.items() if rows.constant == "pair" and f"{path}.weight" not in adapted)
    assert list(found) == [f"{other}.weight"]
    stored = next(file for file in base.weights for entry in file.entries if entry.name == f"{other}.weight")
    assert torch.equal(found[f"{other}.weight"], stored.tensor(f"{other}.weight").float())


def test_weights_are_written_into_their_rows(
    swappable: Artifact, base: Base, places: dict[str, Rows], adapter_folder: Path
) -> None:
    slot = swappable_of(swappable).slot
    record = EngineRecord("x", "x", {}, ("cpu",), (Profile.of({}),), {}, layer_shapes(swappable), places)
    pristine = pristine_weights(swappable)
    pristine |= neighbours(base, record, pristine, "fp32")
    by_path = {name.removesuffix(".weight"): tensor for name, tensor in pristine.items()}
    form = ReplacedForm(slot, by_path, "cpu", places)
    expected_names = {f"{path}.weight" for path in slot.layers if path not in places} | {"qkv", "pair"}
    assert form.buffers.keys() == expected_names
    (adapter,) = open_for(swappable, [str(adapter_folder)])
    form.write([(form.prepare("a", adapter), 0.7)])
    for path, rows in places.items():
        found = form.buffers[rows.constant][rows.first : rows.first + rows.rows]
        pairs = [(adapter.layers[path], 0.7)] if path in adapter.layers else []
        torch.testing.assert_close(found, adapted_weight(by_path[path], pairs))
        assert torch.equal(found, by_path[path]) == (not pairs)
    form.write([])
    for path, rows in places.items():
        assert torch.equal(form.buffers[rows.constant][rows.first : rows.first + rows.rows], by_path[path])


def test_a_record_tells_the_constants_that_may_be_replaced() -> None:
    places = {"a": Rows("ab", 0, 4), "b": Rows("ab", 4, 2), "x": Rows("xy", 0, 1), "y": Rows("xy", 1, 1)}
    record = EngineRecord("n", "f", {}, ("cpu",), (), {}, {"b": (2, 3), "c": (5, 3)}, places)
    assert record.constants() == {"ab": (6, 3), "c.weight": (5, 3)}
    assert EngineRecord.from_dict(record.to_dict()) == record
    older = {key: value for key, value in record.to_dict().items() if key != "placements"}
    assert EngineRecord.from_dict(older).constants() == {"b.weight": (2, 3), "c.weight": (5, 3)}
