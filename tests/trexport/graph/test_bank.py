"""A bank as a graph: what other runtimes find in it, and what validation says of it."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from tests.trexport.helpers import SIZES, damaged, drawn_by_torch, onnx_session, run_onnx
from trexport.adapter_file import factored_of, swappable_of
from trexport.artifact import Artifact, open_artifact
from trexport.errors import ArtifactError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.ops import DOMAIN
from trexport.io_spec import ADAPTER_INDEX, ADAPTER_STRENGTH
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.parity.metrics import relative_l2
from trexport.parity.validate import ValidateOptions, validate

QUICK = ValidateOptions(timesteps=(1, 500), seeds=(0,), trajectory_steps=2, locate=False)
SECOND = "random:tlora:1:4"
CORE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.transform.core.0"


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, base: Base, adapter_folder: Path) -> Artifact:
    """A bank that holds two adapters, for batches of three."""
    folder = tmp_path_factory.mktemp("onnx") / "held"
    options = ExportOptions(factored=FactoredOptions(bank=2), fixed=SIZES | {"batch_size": 3})
    export_onnx(base, open_adapters([f"{adapter_folder}=0.7", SECOND], base), folder, options)
    return open_artifact(folder)


def feeds_of(artifact: Artifact, batch: int = SIZES["batch_size"]) -> dict[str, Tensor]:
    return random_feeds(artifact.manifest.io, SIZES | {"batch_size": batch}, seed=4)


def test_the_manifest_tells_the_form(bank: Artifact, held: Artifact) -> None:
    assert bank.manifest.form == held.manifest.form == "factored"
    assert bank.blank
    assert not held.blank
    assert factored_of(bank).bank == factored_of(held).bank == 2
    assert len(factored_of(bank).slots) == 1
    assert [adapter.strength for adapter in held.manifest.adapters] == [0.7, 1.0]
    with pytest.raises(ArtifactError, match="expected one of"):
        swappable_of(bank)


def test_the_bank_graph_is_whole(bank: Artifact) -> None:
    onnx.checker.check_model(str(bank.onnx_path), full_check=True)
    model = onnx.load(bank.onnx_path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert {node.name for node in nodes} == set(factored_of(bank).plan)
    assert all(node.op_type.startswith("BankedLinear") for node in nodes)
    stacks = [tensor for tensor in model.graph.initializer if ".core." in tensor.name]
    assert stacks
    assert {tensor.dims[0] for tensor in stacks} == {3}  # and the neutral one
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    for name, kind in ((ADAPTER_INDEX, onnx.TensorProto.INT64), (ADAPTER_STRENGTH, onnx.TensorProto.FLOAT)):
        assert inputs[name].elem_type == kind
        assert [axis.dim_param for axis in inputs[name].shape.dim] == ["batch_size"]


def test_tensorrt_rtx_parses_it(bank: Artifact) -> None:
    tensorrt_rtx: Any = importlib.import_module("tensorrt_rtx")  # its names are not in its type stubs
    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    network = tensorrt_rtx.Builder(logger).create_network(0)
    parser = tensorrt_rtx.OnnxParser(network, logger)
    assert parser.parse_from_file(str(bank.onnx_path)), [parser.get_error(i) for i in range(parser.num_errors)]
    assert network.num_layers > 0


def test_a_bank_takes_an_adapter_for_each_sample(held: Artifact, base: Base, adapter_folder: Path) -> None:
    feeds = feeds_of(held, 3)
    chosen = {ADAPTER_INDEX: torch.tensor([2, 0, 1]), ADAPTER_STRENGTH: torch.tensor([0.5, 9.0, 0.7])}
    found = run_onnx(held.onnx_path, feeds | chosen)["out_sample"]
    for row, adapters in enumerate(([f"{SECOND}=0.5"], [], [f"{adapter_folder}=0.7"])):
        own = {name: tensor[row : row + 1] if tensor.dim() else tensor for name, tensor in feeds.items()}
        assert relative_l2(found[row : row + 1], drawn_by_torch(base, adapters, own)) <= 1e-5


def test_a_place_that_is_not_there_is_refused(bank: Artifact, held: Artifact) -> None:
    for artifact in (bank, held):
        feeds = feeds_of(artifact, 3)
        session = onnx_session(artifact.onnx_path)
        for index in (-1, -2, 3, -(2**63), 2**63 - 1):
            with pytest.raises(Exception, match="(?i)indices|index|bounds"):
                run_onnx(session, feeds | {ADAPTER_INDEX: torch.tensor([0, index, 1])})
        last = run_onnx(session, feeds | {ADAPTER_INDEX: torch.tensor([0, 1, 2])})
        assert last["out_sample"].isfinite().all()


def test_a_bank_is_validated_each_adapter_alone_and_all_together(bank: Artifact, held: Artifact) -> None:
    base, bound = bank.sources(None, ["random:tlora:2:6=0.7", SECOND])
    report = validate(bank, base, bound, "cpu", QUICK)
    assert report.passed, report.failures
    assert len({step.who for step in report.steps}) == 3
    together = [step for step in report.steps if step.who not in [adapter.name for adapter in bound]]
    assert together
    assert min(step.sizes["batch_size"] for step in together) >= 3
    assert validate(bank, *bank.sources(), "cpu", QUICK).passed
    report = validate(held, *held.sources(), "cpu", QUICK)
    assert report.passed, report.failures


@pytest.mark.parametrize("place", [1, 2])
def test_a_bank_with_a_wrong_core_fails_where_it_is_used(place: int, held: Artifact, tmp_path: Path) -> None:
    model = onnx.load(held.onnx_path, load_external_data=False)
    (dims,) = [tensor.dims for tensor in model.graph.initializer if tensor.name == CORE]
    wrong = damaged(held, tmp_path / "x", CORE, 3.0, entry=place * int(np.prod(dims[1:])))
    base, bound = wrong.sources()
    report = validate(wrong, base, bound, "cpu", QUICK)
    assert not report.passed
    failed = {step.who for step in report.steps if not step.relative_l2 <= report.tolerance.relative_l2}
    assert bound[place - 1].name in failed
    assert bound[2 - place].name not in failed
    assert len(failed) == 2  # alone, and in the mixed batch


def test_a_bank_whose_adapter_is_another_one_fails(held: Artifact, tmp_path: Path) -> None:
    base, bound = held.sources()
    report = validate(held, base, [bound[0], dataclasses.replace(bound[1], strength=0.9)], "cpu", QUICK)
    assert report.passed, report.failures  # strengths are fed
    other = dataclasses.replace(open_adapters(["random:tlora:2:3"], base)[0], name=bound[1].name)
    report = validate(held, base, [bound[0], other], "cpu", QUICK)
    assert any(bound[1].name in failure for failure in report.failures)
    assert not any(failure.startswith(f"{bound[0].name}:") for failure in report.failures)
