"""Whether ONNX Runtime may change the layout of a model's convolutions."""

from __future__ import annotations

from pathlib import Path

import onnx

from trexport.graph.matching import STANDARD


def takes_nhwc(model: str | bytes) -> bool:
    """Whether the weight of every convolution is a constant, so that ONNX Runtime can turn it when it loads the model.

    Of one that has a constant bias, its CUDA provider takes a weight that is fed, or computed from adapters, for one with
    its channels last, and the run fails ("Input channels C is not equal to kernel channels * group").

    Args:
        model: a path, or the serialised model. External data is not read.
    """
    proto = onnx.load(Path(model), load_external_data=False) if isinstance(model, str) else onnx.load_from_string(model)
    constants = {tensor.name for tensor in proto.graph.initializer} - {value.name for value in proto.graph.input}
    inside = [node for function in proto.functions for node in function.node]  # with what a caller gives them
    return not any(_is_convolution(node) for node in inside) and all(
        node.input[1] in constants for node in proto.graph.node if _is_convolution(node)
    )


def _is_convolution(node: onnx.NodeProto) -> bool:
    return node.op_type in ("Conv", "ConvTranspose") and node.domain in STANDARD
