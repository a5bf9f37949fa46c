"""What the tests of operators share: models of one function, and two runtimes that are not ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from tests.helpers import Member, adapter_of, trained
from trexport.graph.ops import DOMAIN, VERSION
from trexport.graph.ops.slots import LayerSlot
from trlora import LayerAdapter

OPSET = 20
RING = Member({"type": "tensor_ring", "order": 3, "rank": 2, "modes": None})

Shape = Sequence[int | str | None]


def model_of_function(
    function: ir.Function, shapes: Mapping[str, Shape], output: Shape, dtypes: Mapping[str, ir.DataType] | None = None
) -> onnx.ModelProto:
    """A checked model of one function.

    Args:
        shapes: of every input, by name.
        dtypes: of inputs and of the output `Y`, where they are not float32.
    """
    kinds = dict(dtypes or {})
    inputs = []
    for value in function.inputs:
        name = str(value.name)
        inputs.append(ir.val(name, kinds.get(name, ir.DataType.FLOAT), ir.Shape(list(shapes[name]))))
    result = ir.val("Y", kinds.get("Y", ir.DataType.FLOAT), ir.Shape(list(output)))
    node = ir.node(function.name, inputs, domain=DOMAIN, outputs=[result])
    graph = ir.Graph(inputs, [result], nodes=[node], opset_imports={"": OPSET, DOMAIN: VERSION}, name="layer")
    proto = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function]))
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


def far(found: Tensor, expected: np.ndarray[Any, Any]) -> float:
    """Relative L2 error; a shape that differs is an error."""
    assert tuple(found.shape) == expected.shape
    return float(np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected))


def lower(member: Member | None) -> Member | None:
    """The member at ranks of one, where it has ranks; of a chain of reflections two, for one has no identity to start at."""
    if member is None or "rank" not in member.fields:
        return member
    rank = member.fields["rank"]
    ones = [1] * len(rank) if isinstance(rank, list) else 2 if member.type == "householder" else 1
    return Member({**member.fields, "rank": ones})


def three_adapters(transform: Member | None, residual: Member | None) -> list[LayerAdapter]:
    """Three different adapters that fit one slot, the second of lower ranks."""
    low = (lower(transform), lower(residual))
    pairs = [(transform, residual), low, (transform, residual)]
    return [trained(adapter_of(t, r, seed), seed + 11) for seed, (t, r) in enumerate(pairs)]


def slot_of(adapters: Sequence[LayerAdapter]) -> LayerSlot:
    """The slot that takes each of some adapters."""
    slot = LayerSlot.of(adapters[0])
    for adapter in adapters[1:]:
        slot = slot.joined(LayerSlot.of(adapter))
    return slot


def stack(slot: LayerSlot, adapters: Sequence[LayerAdapter], suffix: str = "") -> dict[str, Tensor]:
    """Adapters as a function's stacked inputs."""
    found = [slot.tensors(adapter) for adapter in adapters]
    return {f"{name.replace('.', '_')}{suffix}": torch.stack([f[name] for f in found]) for name in slot.names()}


def stack_shapes(slot: LayerSlot, suffix: str = "") -> dict[str, Shape]:
    """The shapes of those inputs, for any number of adapters."""
    return {
        f"{part}.{name}".replace(".", "_") + suffix: ("adapters", *shape)
        for part, op in slot.parts.items()
        for name, shape in op.shapes.items()
    }
