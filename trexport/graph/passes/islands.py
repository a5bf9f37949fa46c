"""Normalisations in float32 within a graph of half precision."""

from __future__ import annotations

import onnx_ir as ir

from trexport.errors import ExportError

NORMALISATIONS = ("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization")
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def islands(model: ir.Model) -> ir.Model:
    """Cast what goes into a normalisation to float32 and what comes out back, so that means and variances over thousands of
    values, and the squares in them, leave neither range nor precision; in place. A strongly typed engine computes what the
    graph says, and fuses the casts into the normalisation's kernel. Values must have types.

    The rest of a UNet is at home in half precision: products accumulate in float32 anyway, a softmax stays between 0 and 1,
    and the timestep's sinusoid is float32 in the model already.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type not in NORMALISATIONS or node.domain not in ("", "ai.onnx"):
            continue
        dtype = node.outputs[0].dtype
        if dtype is None:
            raise ExportError(f"{node.name}: a normalisation of unknown precision; infer the graph's types first")
        if dtype not in _HALVES:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in _HALVES:
                continue
            cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{node.name}.wide_{index}")
            cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
        old = node.outputs[0]
        back = ir.node("Cast", [old], {"to": int(dtype)}, name=f"{node.name}.narrow")
        narrow = back.outputs[0]
        narrow.shape, narrow.type = old.shape, ir.TensorType(dtype)
        graph.insert_after(node, back)
        old.replace_all_uses_with(narrow, replace_graph_outputs=True)
        back.replace_input_with(0, old)
        name = old.name
        old.name, narrow.name, old.type = f"{name}.wide", name, ir.TensorType(ir.DataType.FLOAT)
    return model
