"""The operator of a bank: every sample with its own adapter, against the formula, in two runtimes that are not ours. And the
slots that a bank's adapters share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from tests.helpers import (
    IN,
    OUT,
    RESIDUALS,
    TRANSFORMS,
    Member,
    adapter_of,
    bits,
    delta_oracle,
    matrix_oracle,
    trained,
    weight_oracle,
)
from tests.trexport.graph.ops.helpers import (
    OPSET,
    RING,
    far,
    lower,
    model_of_function,
    run,
    slot_of,
    stack,
    stack_shapes,
    three_adapters,
)
from trexport.errors import ArtifactError
from trexport.graph.ops.linear import LinearSignature, linear_function
from trexport.graph.ops.plan import PATHS, Path
from trexport.graph.ops.slots import LayerSlot, joined_slot, stacked
from trlora import LayerAdapter

BATCH = 4
INDEX = [2, 0, 1, 2]
STRENGTHS = [0.7, -1.3, 0.5, 1.1]


def model_of(slot: LayerSlot, path: Path, rank: int = 3, bias: bool = True) -> onnx.ModelProto:
    signature = LinearSignature((slot,), OUT, IN, bias, rank, path, "fp32", bank=True)
    function = linear_function(signature, signature.name(), OPSET)
    assert function.name.startswith("BankedLinear")
    shapes = {
        "X": ("batch", "rows", IN)[3 - rank :] if rank == 3 else ("batch", IN),
        "W": (OUT, IN),
        "B": (OUT,),
        "index": ("samples",),
        "strength_0": ("scales",),
        **stack_shapes(slot, "_0"),
    }
    output = ("batch", "rows", OUT) if rank == 3 else ("batch", OUT)
    return model_of_function(function, shapes, output, {"index": ir.DataType.INT64})


def inputs_of(rank: int, bias: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    feeds = {
        "X": torch.randn(*(BATCH, 3)[: rank - 1], IN, generator=generator),
        "W": torch.randn(OUT, IN, generator=generator),
    }
    return feeds | ({"B": torch.randn(OUT, generator=generator)} if bias else {})


def choice(index: Sequence[int], strengths: Sequence[float]) -> dict[str, Tensor]:
    return {"index": torch.tensor(index), "strength_0": torch.tensor(strengths)}


def oracle(
    feeds: Mapping[str, Tensor], adapters: Sequence[LayerAdapter], index: Sequence[int], strengths: Sequence[float]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Each sample alone, by the formula."""
    rows = []
    for x, place, strength in zip(feeds["X"].double().numpy(), index, strengths, strict=True):
        y = x @ weight_oracle(feeds["W"], [(adapters[place], strength)]).T
        rows.append(y + feeds["B"].double().numpy() if "B" in feeds else y)
    return np.stack(rows)


def check(adapters: Sequence[LayerAdapter], path: Path, rank: int = 3, bias: bool = True) -> None:
    slot, feeds = slot_of(adapters), inputs_of(rank, bias)
    index = [place % len(adapters) for place in INDEX]
    expected = oracle(feeds, adapters, index, STRENGTHS)
    given = feeds | choice(index, STRENGTHS) | stack(slot, adapters, "_0")
    for found in run(model_of(slot, path, rank, bias), given):
        assert far(found, expected) <= 1e-5


SHAPES = [pytest.param(rank, bias, id=f"{rank}d{'-bias' * bias}") for rank in (2, 3) for bias in (False, True)]


@pytest.mark.parametrize(("rank", "bias"), SHAPES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_every_transform(transform: Member, path: Path, rank: int, bias: bool) -> None:
    check(three_adapters(transform, RESIDUALS[1]), path, rank, bias)


@pytest.mark.parametrize(("rank", "bias"), SHAPES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("residual", RESIDUALS, ids=str)
def test_every_residual(residual: Member, path: Path, rank: int, bias: bool) -> None:
    check(three_adapters(RING, residual), path, rank, bias)


@pytest.mark.parametrize("transform", [TRANSFORMS[1], TRANSFORMS[2], RING], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rank", [2, 3])
def test_one_place_and_one_strength_for_all_samples(transform: Member, path: Path, rank: int) -> None:
    adapters = three_adapters(transform, RESIDUALS[4])
    slot, feeds = slot_of(adapters), inputs_of(rank, True)
    proto, tensors = model_of(slot, path, rank), stack(slot, adapters, "_0")
    for index, strengths in (([1], [0.8]), ([2], STRENGTHS), (INDEX, [0.8])):
        expected = oracle(feeds, adapters, index * (BATCH // len(index)), strengths * (BATCH // len(strengths)))
        for found in run(proto, feeds | choice(index, strengths) | tensors):
            assert far(found, expected) <= 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rank", [2, 3])
def test_a_sample_does_not_depend_on_its_neighbours(path: Path, rank: int) -> None:
    adapters = three_adapters(RING, RESIDUALS[5])
    slot, feeds = slot_of(adapters), inputs_of(rank, True)
    proto, tensors = model_of(slot, path, rank), stack(slot, adapters, "_0")
    found, _ = run(proto, feeds | choice(INDEX, STRENGTHS) | tensors)
    other, _ = run(proto, feeds | choice([2, 1, 0, 1], [0.7, 1.0, 2.0, -1.0]) | tensors)
    assert bits(found[0]) == bits(other[0])
    assert all(bits(found[row]) != bits(other[row]) for row in (1, 2, 3))


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if t.type != "identity"], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_at_strength_zero_and_with_neutral_tensors_it_is_the_plain_layer(transform: Member, path: Path) -> None:
    adapters = three_adapters(transform, RESIDUALS[5])
    slot, feeds = slot_of(adapters), inputs_of(3, True)
    proto = model_of(slot, path)
    plain = linear_function(LinearSignature((), OUT, IN, True, 3, "activations", "fp32"), "plain", OPSET)
    shapes = {"X": ("batch", "rows", IN), "W": (OUT, IN), "B": (OUT,)}
    expected, _ = run(model_of_function(plain, shapes, ("batch", "rows", OUT)), feeds)
    neutral = {f"{name.replace('.', '_')}_0": tensor[None] for name, tensor in slot.neutral().items()}
    for given in (
        choice(INDEX, [0.0] * BATCH) | stack(slot, adapters, "_0"),
        choice([0] * BATCH, STRENGTHS) | neutral,
    ):
        found, _ = run(proto, feeds | given)
        if path == "weight":  # a batch of products, another kernel
            assert far(found, expected.double().numpy()) <= 1e-6
        else:
            assert bits(found) == bits(expected)


# --- joined slots -----------------------------------------------------------------------------------------------------


def of_layer(adapters: Sequence[LayerAdapter]) -> LayerSlot:
    return joined_slot([{"layer": adapter} for adapter in adapters]).layers["layer"]


def single(transform: Member | None, residual: Member | None, seed: int = 1) -> LayerAdapter:
    return trained(adapter_of(transform, residual), seed).float()


def cores(tensors: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    return [tensor for name, tensor in tensors.items() if name.startswith(prefix)]


RING_RESIDUAL, LOW_RANK = RESIDUALS[5], RESIDUALS[2]


def test_adapters_of_different_ranks_share_a_slot_exactly() -> None:
    wide = single(Member({**RING.fields, "rank": [4, 1, 3]}), Member({**RING_RESIDUAL.fields, "rank": 5}))
    narrow = single(Member({**RING.fields, "rank": [2, 3, 1]}), RING_RESIDUAL, seed=2)
    slot = of_layer([wide, narrow])
    assert slot == of_layer([narrow, wide])
    assert slot.transform is not None
    assert slot.transform.shapes["core.0"][2:] == (4, 3)  # more than either's alone
    for adapter in (wide, narrow):
        tensors, own = slot.tensors(adapter), LayerSlot.of(adapter).tensors(adapter)
        assert any(tensors[name].shape != own[name].shape for name in own)
        for found, expected in (
            (matrix_oracle(cores(tensors, "transform.core")), matrix_oracle(cores(own, "transform.core"))),
            (
                delta_oracle(cores(tensors, "residual.row_core"), cores(tensors, "residual.column_core")),
                delta_oracle(cores(own, "residual.row_core"), cores(own, "residual.column_core")),
            ),
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "residuals",
    [
        [RING_RESIDUAL, LOW_RANK],
        [LOW_RANK, RING_RESIDUAL],
        [LOW_RANK, RESIDUALS[4], RING_RESIDUAL],
        [RING_RESIDUAL, RESIDUALS[4]],  # rings of other modes
        [RESIDUALS[3], LOW_RANK, Member({"type": "none"})],
    ],
    ids=lambda residuals: "+".join(map(str, residuals)),
)
def test_residuals_of_different_types_meet_as_low_rank_maps(residuals: list[Member]) -> None:
    adapters = [single(RING, residual, seed) for seed, residual in enumerate(residuals)]
    slot = of_layer(adapters)
    assert slot.residual is not None
    assert slot.residual.type == "low_rank"
    for adapter in adapters:
        tensors = slot.tensors(adapter)
        product = tensors["residual.lora_B.weight"].double() @ tensors["residual.lora_A.weight"].double()
        expected = adapter.double().residual.delta().detach().double()
        assert (product - expected).norm() <= 1e-6 * expected.norm()
        assert product.shape == (OUT, IN)
    check([adapter.double() for adapter in adapters], "activations")


def test_a_joined_slot_is_no_larger_than_needed() -> None:
    low = of_layer([single(None, RING_RESIDUAL), single(None, LOW_RANK)]).residual
    assert low is not None
    assert low.shapes == {"lora_A.weight": (4, IN), "lora_B.weight": (OUT, 4)}  # 2·2 of the ring
    ring = of_layer([single(None, RING_RESIDUAL), single(None, lower(RING_RESIDUAL))])
    assert ring == LayerSlot.of(single(None, RING_RESIDUAL))


def test_what_one_adapter_lacks_is_neutral() -> None:
    turning, adding = trained(adapter_of(RING, None), 1), trained(adapter_of(None, LOW_RANK), 2)
    slot = of_layer([turning, adding])
    assert set(slot.parts) == {"transform", "residual"}
    check([turning, adding], "activations")
    check([turning, adding], "weight")


def test_a_joined_slot_has_the_layers_of_all() -> None:
    a, b = single(RING, RING_RESIDUAL), single(lower(RING), RING_RESIDUAL, 2)
    slot = joined_slot([{"one": a, "two": a}, {"two": b, "three": b}])
    assert set(slot.layers) == {"one", "two", "three"}
    assert slot.layers["three"] == LayerSlot.of(b)
    assert slot.layers["two"] == LayerSlot.of(a)


@pytest.mark.parametrize(
    "other",
    [
        Member({**RING.fields, "modes": [5, 3, 3]}),
        Member({**RING.fields, "order": 2}),
        TRANSFORMS[1],
        TRANSFORMS[2],
    ],
    ids=str,
)
def test_transforms_without_a_common_shape_are_refused(other: Member) -> None:
    given = [{"layer": single(RING, LOW_RANK)}, {"layer": single(other, LOW_RANK)}]
    for adapters in (given, given[::-1]):
        with pytest.raises(ArtifactError, match="layer"):
            joined_slot(adapters)


def test_blocks_of_other_sizes_are_refused() -> None:
    with pytest.raises(ArtifactError, match="blocks"):
        of_layer([single(TRANSFORMS[2], None), single(TRANSFORMS[3], None)])


def test_a_stack_holds_adapters_in_order_and_neutral_places_after_them() -> None:
    given = [{"layer": single(RING, LOW_RANK)}, {"layer": single(lower(RING), RING_RESIDUAL, 2)}]
    slot = joined_slot(given)
    tensors = [slot.tensors(layers, 0.5, "x") for layers in given]
    found, neutral = stacked(slot, tensors, 4), slot.neutral()
    assert found.keys() == neutral.keys() - {"strength"}
    for name, tensor in found.items():
        assert torch.equal(tensor, torch.stack([tensors[0][name], tensors[1][name], neutral[name], neutral[name]]))
