"""Whether ONNX Runtime may turn the weights of a model's convolutions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from tests.trexport.helpers import SIZES, adapter_on
from trexport.artifact import open_artifact
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.layout import takes_nhwc
from trexport.graph.swappable import SwappableOptions
from trexport.models.adapters import open_adapters
from trexport.models.base import Base

CONV = "y = Conv(x, w, b)"


def model(body: str, inputs: str = "") -> bytes:
    text = f'<ir_version: 10, opset_import: ["": 20]> g (float[1,4,5,5] x{inputs}) => (float[1,6,3,3] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, shape in (("w", (6, 4, 3, 3)), ("b", (6,))):
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("body", "inputs", "takes"),
    [
        (CONV, "", True),
        (CONV, ", float[6] b", True),
        (CONV, ", float[6,4,3,3] w", False),
        (f"d = Mul(w, w) {CONV.replace('w', 'd')}", "", False),
        (f"z = Relu(x) {CONV.replace('x', 'z')}", "", True),
    ],
    ids=["constant", "a bias that can be fed", "fed", "computed", "behind something"],
)
def test_by_where_the_weight_comes_from(body: str, inputs: str, takes: bool) -> None:
    assert takes_nhwc(model(body, inputs)) == takes


LAYERS = {"linear": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "convolution": "conv_in"}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", ["merged", "factored", "swappable"])
def test_forms(base: Base, tmp_path: Path, form: str, layer: str) -> None:
    """A factored convolution is one inside of its operator, its weight computed there."""
    argument = adapter_on(base, {LAYERS[layer]: {"residual": {"type": "low_rank", "rank": 2}}}, tmp_path / "adapter")
    forms = {
        "merged": ExportOptions(fixed=SIZES),
        "factored": ExportOptions(fixed=SIZES, factored=FactoredOptions()),
        "swappable": ExportOptions(fixed=SIZES, swappable=SwappableOptions()),
    }
    export_onnx(base, open_adapters([argument], base), tmp_path / "out", forms[form])
    assert takes_nhwc(str(open_artifact(tmp_path / "out").onnx_path)) == (form == "merged" or layer == "linear")
