"""Casts where torch promotes silently: ONNX's `Concat` wants inputs of one type."""

from __future__ import annotations

import onnx_ir as ir


def promote(model: ir.Model) -> ir.Model:
    """Cast the inputs of every `Concat` to the type of its result; in place. Stable Diffusion XL's UNet, in half precision,
    puts its text embedding and the float32 sines of its sizes together."""
    for node in list(model.graph):
        kind = node.outputs[0].dtype
        if node.op_type != "Concat" or kind is None:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype is None or value.dtype == kind:
                continue
            cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(kind))], name=f"{node.name}_cast_{index}")
            cast.outputs[0].name = f"{node.outputs[0].name}_cast_{index}"
            cast.outputs[0].dtype, cast.outputs[0].shape = kind, value.shape
            cast.metadata_props.update(node.metadata_props)
            model.graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
    return model
