"""Concatenations of two precisions, which ONNX does not have."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from tests.trexport.helpers import SIZES, run_onnx
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.passes.promote import promote
from trexport.models.base import open_base
from trexport.models.model import first_output, load_model, random_feeds
from trexport.parity.metrics import relative_l2

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def concat(*kinds: ir.DataType) -> ir.Model:
    inputs = [ir.val(f"x{i}", dtype=kind, shape=ir.Shape([2])) for i, kind in enumerate(kinds)]
    node = ir.Node("", "Concat", inputs, [ir.AttrInt64("axis", 0)], name="concat")
    node.outputs[0].name, node.outputs[0].dtype = "y", SINGLE
    node.outputs[0].shape = ir.Shape([2 * len(kinds)])
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def test_inputs_of_another_type_are_cast_and_no_others(tmp_path: Path) -> None:
    model = promote(concat(SINGLE, HALF, SINGLE))
    assert [node.op_type for node in model.graph] == ["Cast", "Concat"]
    ir.save(model, tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    feeds = {"x0": torch.tensor([1.0, 2]), "x1": torch.tensor([3.0, 4]).half(), "x2": torch.tensor([5.0, 6])}
    assert run_onnx(tmp_path / "m.onnx", feeds)["y"].tolist() == [1, 2, 3, 4, 5, 6]
    assert [node.op_type for node in promote(concat(SINGLE, SINGLE)).graph] == ["Concat"]


def test_stable_diffusion_xl_in_half_precision(tmp_path: Path) -> None:
    base = open_base("random:tiny-sdxl")
    manifest = export_onnx(base, [], tmp_path / "x", ExportOptions("fp16", fixed=SIZES))
    feeds = random_feeds(manifest.io, SIZES, seed=1)
    with torch.inference_mode():
        wanted = first_output(load_model(base), {name: value.float() for name, value in feeds.items()})
    assert relative_l2(run_onnx(tmp_path / "x" / "unet" / "model.onnx", feeds)["out_sample"], wanted) <= 3e-3
