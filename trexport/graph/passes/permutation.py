"""An `Einsum` that only reorders axes as the `Transpose` that it is."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import convenience


def permutation(model: ir.Model) -> ir.Model:
    """Put a `Transpose` in the place of every `Einsum` of one operand that keeps all its axes; in place. Stable Diffusion 3
    puts its patches together so; ONNX's `Einsum` does not take bfloat16.
    """
    for node in list(model.graph):
        if node.op_type != "Einsum" or node.domain or len(node.inputs) != 1:
            continue
        before, _, after = node.attributes["equation"].as_string().replace(" ", "").partition("->")
        if not before.isalpha() or len(set(before)) != len(before) or sorted(before) != sorted(after):
            continue
        old = node.outputs[0]
        new = ir.val(old.name, dtype=old.dtype, shape=old.shape)
        perm = [before.index(axis) for axis in after]
        turned = ir.node(
            "Transpose",
            node.inputs,
            {"perm": perm},
            outputs=[new],
            name=node.name,
            metadata_props=dict(node.metadata_props),
        )
        convenience.replace_nodes_and_values(model.graph, node, [node], [turned], [old], [new])
    return model
