"""Dropping what the exporter writes beside the graph, but for what `validate` needs to name a tensor's place."""

from __future__ import annotations

import onnx_ir as ir

SCOPE_KEY = "trexport.module"


def metadata(model: ir.Model) -> ir.Model:
    """Keep, of each node's metadata, the path of the torch module that it comes from, under `trexport.module`; in place.

    Stack traces hold paths of the machine that exported, and make a third of a small file.
    """
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        node.metadata_props.clear()
        node.doc_string = None
        path = module_of(scopes)
        if path:
            node.metadata_props[SCOPE_KEY] = path
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    return model


def module_of(scopes: str) -> str:
    """The module path in the exporter's list of scopes, `"['', 'conv_in', 'conv2d']"`: the last but one."""
    names = [part.strip().strip("'\"") for part in scopes.strip("[]").split(",")]
    return names[-2] if len(names) > 1 else ""
