"""Reading TensorRT's inspector, in the JSON that its documentation shows."""

from __future__ import annotations

import json

from trexport.backends.trt.report import layers_of_inspection

DETAILED = {
    "Layers": [
        {
            "Name": "node_conv2d + node_silu",
            "LayerType": "CaskConvolution",
            "Outputs": [{"Name": "y", "Dimensions": [1, 4, 8, 8], "Format/Datatype": "Half"}],
            "Metadata": "[ONNX Layer: node_conv2d]\x1e[ONNX Layer: node_silu]",
        },
        {
            "Name": "reformat",
            "LayerType": "NoOp",
            "Outputs": [{"Name": "z", "Format/Datatype": "Channel major FP32 format"}],
        },
        {"Name": "a + b + c", "LayerType": "Myelin", "Outputs": []},
    ],
    "Bindings": ["x", "y"],
}


def test_detailed() -> None:
    assert layers_of_inspection(json.dumps(DETAILED)) == (
        {"name": "node_conv2d + node_silu", "type": "CaskConvolution", "precision": "Half", "fused": 2},
        {"name": "reformat", "type": "NoOp", "precision": "Channel major FP32 format", "fused": 1},
        {"name": "a + b + c", "type": "Myelin", "precision": "unknown", "fused": 3},
    )


def test_names_only() -> None:
    (layer,) = layers_of_inspection(json.dumps({"Layers": ["a + b"], "Bindings": []}))
    assert (layer["name"], layer["fused"], layer["type"]) == ("a + b", 2, "unknown")
