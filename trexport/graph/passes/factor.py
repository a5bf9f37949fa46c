"""Linear layers and convolutions into `ai.trlora` operators, their cores into overridable initialisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from trexport.errors import ExportError
from trexport.graph.ops import DOMAIN, VERSION
from trexport.graph.ops.body import Body
from trexport.graph.ops.conv import ConvSignature, conv_function
from trexport.graph.ops.linear import LinearSignature, linear_function
from trexport.graph.ops.plan import LayerPlan, Path
from trexport.graph.ops.slots import LayerSlot, Slot
from trexport.io_spec import ADAPTER_INDEX, ADAPTER_STRENGTH, Dtype


def factor(
    model: ir.Model,
    slots: Sequence[Slot],
    tensors: Mapping[str, Tensor],
    plan: Mapping[str, LayerPlan],
    dtype: Dtype,
    bank: int | None = None,
) -> ir.Model:
    """Put one operator in the place of every layer that `plan` names; in place.

    Args:
        bank: how many adapters the tensors are stacks of, after a neutral place, of which every sample takes its own; this
            adds the graph inputs `adapter_index` and `adapter_strength`.
        tensors: the defaults of every slot's inputs, float32; they become overridable initialisers, which are graph inputs
            with a value.

    Raises:
        ExportError: a layer is not in the graph as a product or convolution with its weight.
    """
    opset = model.opset_imports[""]
    selected = _select(model, bank) if bank is not None else None
    values = {name: _overridable(model, name, tensor) for name, tensor in tensors.items()}
    functions: dict[str, str] = {}
    for path, layer in plan.items():
        product, bias, output = _find(model, path)
        x = product.inputs[0]
        weight = model.graph.initializers[f"{path}.weight"]
        assert x is not None
        on_layer = [slot for slot in slots if path in slot.layers]
        layers = tuple(slot.layers[path] for slot in on_layer)
        signature = _signature(
            product, x, weight, layers, layer.path, dtype, bias=bias is not None, bank=bank is not None
        )
        key = repr(signature)
        if key not in functions:
            name, number = signature.name(), 2
            while name in functions.values():  # ranks that differ in a way the name does not tell
                name, number = f"{signature.name()}_{number}", number + 1
            functions[key] = name
            write = linear_function if isinstance(signature, LinearSignature) else conv_function
            function = write(signature, name, opset)  # type: ignore[arg-type]
            model.functions[function.identifier()] = function
        inputs = [x, weight, *([bias] if bias is not None else [])]
        inputs += selected[:1] if selected is not None else []
        for slot in on_layer:
            inputs.append(values[slot.strength] if selected is None else selected[1])
            inputs += [values[f"{slot.prefix}{path}.{key}"] for key in slot.layers[path].names()]
        result = ir.val(output.name, dtype=output.dtype, shape=output.shape)
        node = ir.Node(
            DOMAIN, functions[key], inputs, outputs=[result], name=path, metadata_props=dict(product.metadata_props)
        )
        last = output.producer()
        assert last is not None
        old = [product] if last is product else [product, last]
        convenience.replace_nodes_and_values(model.graph, last, old, [node], [output], [result])
    model.opset_imports[DOMAIN] = VERSION
    RemoveUnusedNodesPass()(model)
    return model


def _signature(
    node: ir.Node,
    x: ir.Value,
    weight: ir.Value,
    layers: tuple[LayerSlot, ...],
    path: Path,
    dtype: Dtype,
    *,
    bias: bool,
    bank: bool,
) -> LinearSignature | ConvSignature:
    assert weight.shape is not None
    rows, columns, *kernel = (int(size) for size in weight.shape)  # type: ignore[call-overload]
    if not kernel:
        rank = x.shape.rank() if x.shape is not None else 3
        return LinearSignature(layers, rows, columns, bias, rank, path, dtype, bank)
    assert not bank, "convolutions take one weight for all samples: see plan_factored"
    height, width = kernel
    attributes: dict[str, tuple[int, ...] | int | str] = {}
    for name, attribute in node.attributes.items():
        value = attribute.value
        attributes[name] = tuple(value) if isinstance(value, (list, tuple)) else value  # type: ignore[arg-type]
    attributes.pop("kernel_shape", None)  # of the layer's own kernel, which is told by its weight
    return ConvSignature(layers, (rows, columns, height, width), bias, attributes, path, dtype)


def _select(model: ir.Model, bank: int) -> list[ir.Value]:
    """The inputs `adapter_index`, which is a place in the stacks, and `adapter_strength`, made into places and effective
    strengths: at place 0 there is no adapter whatever its strength. A negative index becomes a place outside the stacks,
    never another adapter: ONNX Runtime refuses it on the CPU; on CUDA its kernels do not look."""
    first = model.graph.inputs[0].shape
    assert first is not None
    axes = ir.Shape([first[0]])
    index = ir.val(ADAPTER_INDEX, dtype=ir.DataType.INT64, shape=axes)
    strength = ir.val(ADAPTER_STRENGTH, dtype=ir.DataType.FLOAT, shape=axes)
    model.graph.inputs.extend([index, strength])
    body = Body("fp32")
    zero, outside = body.ints([0]), body.ints([bank + 1])
    none = body.op("Equal", index, zero)
    place = body.op("Where", body.op("Less", index, zero), outside, index)
    scale = body.op("Where", none, body.op("CastLike", zero, strength), strength)
    for node in body.nodes:
        for output in node.outputs:
            output.name = f"adapter_select.{output.name}"
    model.graph.insert_before(model.graph[0], body.nodes)
    return [place, scale]


def _overridable(model: ir.Model, name: str, tensor: Tensor) -> ir.Value:
    array = tensor.detach().to(torch.float32).contiguous().numpy()
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(array.shape),
        const_value=ir.tensor(array, name=name),
    )
    model.graph.initializers.add(value)
    model.graph.inputs.append(value)
    return value


def _find(model: ir.Model, path: str) -> tuple[ir.Node, ir.Value | None, ir.Value]:
    """The product of a layer, its bias, and its output: `MatMul(x, Transpose(W)) [+ b]`, `Gemm`, or `Conv`."""
    weight = model.graph.initializers.get(f"{path}.weight")
    bias = model.graph.initializers.get(f"{path}.bias")
    for turned in [] if weight is None else weight.consumers():
        if turned.op_type in ("Gemm", "Conv") and turned.inputs[1] is weight:
            return turned, bias, turned.outputs[0]
        for product in turned.outputs[0].consumers() if turned.op_type == "Transpose" else []:
            if product.op_type != "MatMul" or product.inputs[1] is not turned.outputs[0]:
                continue
            if bias is None:
                return product, None, product.outputs[0]
            for add in product.outputs[0].consumers():
                if add.op_type == "Add" and bias in add.inputs:
                    return product, bias, add.outputs[0]
    raise ExportError(f"{path}: not found in the graph as a product or convolution with its weight; export it merged")
