"""The operator against the formula, for every member, path and shape, in two runtimes that are not ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.helpers import IN, OUT, RESIDUALS, TRANSFORMS, Member, adapter_of, bits, trained, weight_oracle
from trexport.errors import ArtifactError
from trexport.graph.ops import DOMAIN, RESIDUAL_OPS, TRANSFORM_OPS, VERSION
from trexport.graph.ops.linear import LinearSignature, linear_function
from trexport.graph.ops.plan import PATHS, Path
from trexport.graph.ops.slots import LayerSlot
from trlora import LayerAdapter
from trlora.residuals import RESIDUALS as RESIDUAL_TYPES
from trlora.transforms import TRANSFORMS as TRANSFORM_TYPES

OPSET = 20
TRIVIAL = {"identity", "none"}
RING = Member({"type": "tensor_ring", "order": 3, "rank": 2, "modes": None})


def model_of(signature: LinearSignature) -> onnx.ModelProto:
    """A model of one operator."""
    function = linear_function(signature, signature.name(), OPSET)
    inputs = [ir.val(value.name, ir.DataType.FLOAT) for value in function.inputs]
    output = ir.val("Y", ir.DataType.FLOAT)
    node = ir.node(signature.name(), inputs, domain=DOMAIN, outputs=[output])
    graph = ir.Graph(inputs, [output], nodes=[node], opset_imports={"": OPSET, DOMAIN: VERSION}, name="layer")
    model = ir.Model(graph, ir_version=10, functions=[function])
    tensors = ["X", *(value.name for value in inputs[1:])]
    ranks = {"X": signature.rank, "W": 2, "B": 1}
    shapes: dict[str, Sequence[int]] = {}
    for number, slot in enumerate(signature.slots):
        shapes[f"strength_{number}"] = (1,)
        for part, op in slot.parts.items():
            for name, shape in op.shapes.items():
                shapes[f"{part}.{name}".replace(".", "_") + f"_{number}"] = shape
    for name, value in zip(tensors, inputs, strict=True):
        known = shapes.get(str(name))
        value.shape = ir.Shape(known if known is not None else [None] * ranks[str(name)])
    output.shape = ir.Shape([None] * signature.rank)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(proto: onnx.ModelProto, feeds: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The output of ONNX Runtime and of ONNX's reference evaluator."""
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, arrays)[0])
    return found, torch.from_numpy(np.asarray(next(iter(onnx.reference.ReferenceEvaluator(proto).run(None, arrays)))))


def feeds_of(
    slots: Sequence[LayerSlot], adapters: Sequence[LayerAdapter], strengths: Sequence[float]
) -> dict[str, Tensor]:
    feeds: dict[str, Tensor] = {}
    for number, (slot, adapter, strength) in enumerate(zip(slots, adapters, strengths, strict=True)):
        feeds[f"strength_{number}"] = torch.tensor([strength])
        for name, tensor in slot.tensors(adapter).items():
            feeds[f"{name.replace('.', '_')}_{number}"] = tensor
    return feeds


def inputs_of(rank: int, bias: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    feeds = {
        "X": torch.randn(*(4, 3)[: rank - 1], IN, generator=generator),
        "W": torch.randn(OUT, IN, generator=generator),
    }
    return feeds | ({"B": torch.randn(OUT, generator=generator)} if bias else {})


def check(
    adapters: Sequence[LayerAdapter], strengths: Sequence[float], path: Path, rank: int = 3, bias: bool = True
) -> None:
    slots = tuple(LayerSlot.of(adapter) for adapter in adapters)
    feeds = inputs_of(rank, bias)
    expected = feeds["X"].double().numpy() @ weight_oracle(feeds["W"], list(zip(adapters, strengths, strict=True))).T
    expected = expected + (feeds["B"].double().numpy() if bias else 0)
    proto = model_of(LinearSignature(slots, OUT, IN, bias, rank, path, "fp32"))
    for found in run(proto, feeds | feeds_of(slots, adapters, strengths)):
        assert found.shape == expected.shape
        assert np.linalg.norm(found.double().numpy() - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_every_transform(transform: Member, path: Path) -> None:
    check([trained(adapter_of(transform, RESIDUALS[1]))], [0.7], path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("residual", RESIDUALS, ids=str)
def test_every_residual(residual: Member, path: Path) -> None:
    check([trained(adapter_of(RING, residual))], [1.3], path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_activations_of_two_and_three_dimensions_with_and_without_bias(path: Path, rank: int, bias: bool) -> None:
    check([trained(adapter_of(RING, RESIDUALS[-1]))], [0.5], path, rank, bias)


@pytest.mark.parametrize("path", PATHS)
def test_several_adapters_add_up(path: Path) -> None:
    adapters = [
        trained(adapter_of(t, r), seed) for seed, (t, r) in enumerate([(RING, None), (TRANSFORMS[1], RESIDUALS[2])])
    ]
    check(adapters, [0.4, -0.9], path)


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if t.type not in TRIVIAL], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_at_strength_zero_and_with_neutral_tensors_it_is_the_plain_layer(transform: Member, path: Path) -> None:
    adapter = trained(adapter_of(transform, RESIDUALS[5]))
    slot = LayerSlot.of(adapter)
    feeds = inputs_of(3, True)
    proto = model_of(LinearSignature((slot,), OUT, IN, True, 3, path, "fp32"))
    plain = model_of(LinearSignature((), OUT, IN, True, 3, "activations", "fp32"))
    expected, _ = run(plain, feeds)
    neutral = {f"{name.replace('.', '_')}_0": tensor for name, tensor in slot.neutral().items()}
    for given in (feeds_of([slot], [adapter], [0.0]), neutral | {"strength_0": torch.ones(1)}):
        found, _ = run(proto, feeds | given)
        assert bits(found) == bits(expected)


def test_lower_ranks_are_padded_exactly() -> None:
    wide = {"transform": {**RING.fields, "rank": 4}, "residual": {**RESIDUALS[5].fields, "rank": 5}}
    slot = LayerSlot.of(adapter_of(Member(wide["transform"]), Member(wide["residual"])))
    adapter = trained(adapter_of(RING, RESIDUALS[5]))
    feeds = inputs_of(3, False)
    expected = feeds["X"].double().numpy() @ weight_oracle(feeds["W"], [(adapter, 1.0)]).T
    for path in PATHS:
        proto = model_of(LinearSignature((slot,), OUT, IN, False, 3, path, "fp32"))
        for found in run(proto, feeds | feeds_of([slot], [adapter], [1.0])):
            assert np.linalg.norm(found.double().numpy() - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("slot", "given"),
    [
        (RING, {**RING.fields, "rank": 3}),
        (RING, {**RING.fields, "modes": [5, 3, 3]}),
        (RING, {**RING.fields, "order": 2}),
        (RING, {"type": "diagonal"}),
        (TRANSFORMS[2], TRANSFORMS[3].fields),
        (None, RING.fields),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(slot: Member | None, given: dict[str, object]) -> None:
    taker = LayerSlot.of(adapter_of(slot, RESIDUALS[1]))
    with pytest.raises(ArtifactError, match=r"takes"):
        taker.tensors(adapter_of(Member(given), RESIDUALS[1]))


def test_a_residual_of_higher_rank_is_refused() -> None:
    taker = LayerSlot.of(adapter_of(None, RESIDUALS[1]))
    with pytest.raises(ArtifactError, match="lora_A"):
        taker.tensors(adapter_of(None, Member({"type": "low_rank", "rank": 5, "alpha": None})))


def test_every_member_of_trlora_has_an_operator() -> None:
    assert set(TRANSFORM_OPS) == set(TRANSFORM_TYPES) - TRIVIAL
    assert set(RESIDUAL_OPS) == set(RESIDUAL_TYPES) - TRIVIAL


def test_half_precision_takes_float32_cores() -> None:
    adapter = trained(adapter_of(RING, RESIDUALS[5]), amount=0.1)
    slot = LayerSlot.of(adapter)
    for path in PATHS:
        function = linear_function(LinearSignature((slot,), OUT, IN, True, 3, path, "fp16"), "f", OPSET)
        casts = [node for node in function if node.op_type == "Cast"]
        assert casts
        assert {node.attributes["to"].as_int() for node in casts} == {int(ir.DataType.FLOAT16)}
