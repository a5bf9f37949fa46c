"""A factored artifact whose weights are written, as on a GPU, draws as with its cores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.torch
import torch

from tests.helpers import bits
from tests.trexport.contrib import evaluated
from tests.trexport.helpers import SIZES, adapter_on, damaged, drawn_by_torch, write_overflowing
from trexport.artifact import Artifact, open_artifact
from trexport.backends import BACKENDS, OnnxFile
from trexport.bench.forms import cost_of, file_for
from trexport.bench.report import BackendResult
from trexport.bench.stats import Latency
from trexport.errors import UsageError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.ort_graph import ort_graph
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.parity.metrics import relative_l2
from trexport.parity.validate import ValidateOptions, validate
from trexport.session import Session, forms
from trexport.session.form import AbstractBank
from trexport.session.forms import BankForm, FactoredForm, form_of
from trexport.session.replaced import WrittenBank, WrittenForm
from trexport.session.sample_bank import SampleBank
from trexport.session.sources import source_in_session
from trlora import save_adapter

ADAPTERS = {"a": "random:tlora:2:6", "b": "random:lora:3", "c": "random:tlora:1:4"}
"""Of the two slots a and c fit the first only, b the second only."""


@pytest.fixture(autouse=True)
def writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "WRITING", ("cpu", "cuda"))


@pytest.fixture
def session(two_slots: Artifact) -> Iterator[Session]:
    with Session(two_slots) as opened:
        for name, argument in ADAPTERS.items():
            opened.load_adapter(name, argument)
        yield opened


def test_it_draws_as_torch_does(session: Session, base: Base) -> None:
    assert isinstance(form_of(session.artifact, "cpu"), WrittenForm)
    feeds = random_feeds(session.spec, SIZES, seed=4)
    plain = session.run(feeds)["out_sample"]
    assert relative_l2(plain, drawn_by_torch(base, [], feeds)) <= 1e-5
    session.activate({"a": 0.7})
    alone = session.run(feeds)["out_sample"]
    assert relative_l2(alone, drawn_by_torch(base, ["random:tlora:2:6=0.7"], feeds)) <= 1e-5
    session.activate({"c": 0.5, "b": 0.9})
    expected = drawn_by_torch(base, ["random:lora:3=0.9", "random:tlora:1:4=0.5"], feeds)
    assert relative_l2(session.run(feeds)["out_sample"], expected) <= 1e-5
    session.activate({"a": 0.7})
    assert bits(session.run(feeds)["out_sample"]) == bits(alone)
    session.deactivate()
    assert bits(session.run(feeds)["out_sample"]) == bits(plain)
    assert relative_l2(alone, plain) > 1e-3


def test_no_more_than_the_slots_take(session: Session) -> None:
    session.activate({"b": 1.0})
    with pytest.raises(UsageError, match="takes 2"):
        session.activate({"a": 1.0, "b": 1.0, "c": 1.0})
    with pytest.raises(UsageError, match="do not fit into this graph's slots together"):
        session.activate({"a": 1.0, "c": 1.0})
    assert session.active == {"b": 1.0}


def test_the_graph_has_the_weights_as_inputs_and_no_cores(two_slots: Artifact) -> None:
    form = form_of(two_slots, "cpu")
    assert form is not None
    assert form.graph is not None
    graph = onnx.load_from_string(form.graph)
    assert not graph.functions
    own = {value.name for value in graph.graph.input} - {tensor.name for tensor in two_slots.manifest.io.inputs}
    assert own == form.buffers.keys()
    assert all(name.endswith(".weight") for name in own)
    original = {t.name: t for t in onnx.load(two_slots.onnx_path, load_external_data=False).graph.initializer}
    for tensor in graph.graph.initializer:
        assert tensor.SerializeToString(deterministic=True) == original[tensor.name].SerializeToString(
            deterministic=True
        )


def test_the_benchmark_measures_what_a_session_runs(two_slots: Artifact, base: Base) -> None:
    adapters = open_adapters(["random:tlora:2:6=0.7"], base)
    file = file_for(two_slots, adapters, "cpu")
    assert isinstance(file, OnnxFile)
    feeds = random_feeds(file.spec, SIZES, seed=4)
    expected = drawn_by_torch(base, ["random:tlora:2:6=0.7"], feeds)
    with BACKENDS["onnxruntime"].load(file, "cpu") as runner:
        assert relative_l2(runner(feeds)["out_sample"], expected) <= 1e-5
    result = BackendResult("onnxruntime", Latency.of([1.0]), 1.0, 1.0, 1.0, 1, 0.0, None)
    cost = cost_of(two_slots, adapters, "cpu", result)
    assert cost.form == "factored"
    assert "layers" in str(cost.swapped_by)


def test_validate_checks_what_a_session_runs_too(
    two_slots: Artifact, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ValidateOptions(timesteps=(10,), seeds=(0,), trajectory_steps=0, sizes=SIZES)
    adapters = open_adapters(["random:tlora:2:6=0.7", "random:lora:3"], base)
    report = validate(two_slots, base, adapters, "cpu", options)
    assert report.passed
    assert [step.who for step in report.steps] == ["", "in a session"]
    write = WrittenForm.write
    monkeypatch.setattr(WrittenForm, "write", lambda form, active: write(form, active[:1]))
    report = validate(two_slots, base, adapters, "cpu", options)
    assert not report.passed
    assert all(failure.startswith("in a session: ") for failure in report.failures)
    monkeypatch.setattr(forms, "WRITING", ("cuda",))
    assert [step.who for step in validate(two_slots, base, adapters, "cpu", options).steps] == [""]


@pytest.fixture
def holding(base: Base, tmp_path: Path) -> Artifact:
    """Factored, with an adapter in it."""
    options = ExportOptions(factored=FactoredOptions(), fixed=SIZES)
    export_onnx(base, open_adapters(["random:lora:3=0.9"], base), tmp_path / "held", options)
    return open_artifact(tmp_path / "held")


def test_a_wrong_weight_is_found_at_its_layer(holding: Artifact, tmp_path: Path) -> None:
    wrong = damaged(holding, tmp_path / "x", "down_blocks.0.resnets.0.norm2.weight", 0.5)
    options = ValidateOptions(timesteps=(10,), seeds=(0,), trajectory_steps=0, sizes=SIZES)
    report = validate(wrong, *wrong.sources(), "cpu", options)
    assert {failure.startswith("in a session") for failure in report.failures} == {True, False}
    assert report.first_deviation is not None
    assert report.first_deviation.module == "down_blocks.0.resnets.0.norm2"


def test_beside_another_artifact_it_draws_with_its_own_adapters(holding: Artifact, base: Base) -> None:
    own, others = open_adapters(["random:lora:3=0.9"], base), open_adapters(["random:lora:3=0.4"], base)
    for adapters, graph in ((own, True), (others, False)):
        file = file_for(holding, adapters, "cpu")
        assert isinstance(file, OnnxFile)
        assert (file.graph is not None) == graph
        feeds = random_feeds(file.spec, SIZES, seed=4)
        with BACKENDS["onnxruntime"].load(file, "cpu") as runner:
            assert relative_l2(runner(feeds)["out_sample"], drawn_by_torch(base, ["random:lora:3=0.9"], feeds)) <= 1e-5
            assert ("weights are fed" in str(runner.step(feeds).note)) == graph


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "conv_in": {"residual": {"type": "low_rank", "rank": 2}},
    "conv_out": {"residual": {"type": "low_rank", "rank": 1}, "magnitude": {"type": "scale"}},
    "down_blocks.0.downsamplers.0.conv": {"residual": {"type": "tensor_ring", "order": 3, "rank": 2}},
    "down_blocks.1.resnets.0.conv_shortcut": {"residual": {"type": "low_rank", "rank": 3}},
    "up_blocks.0.resnets.0.conv1": {"transform": {"type": "diagonal"}},
    "mid_block.attentions.0.proj_in": {"residual": {"type": "low_rank", "rank": 1}},
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": {"residual": {"type": "low_rank", "rank": 2}},
}
"""Strided, 1×1, beside activations and in the weight; and one linear layer."""


@pytest.fixture
def convolutions(base: Base, tmp_path: Path) -> tuple[Artifact, str]:
    argument = adapter_on(base, CONVOLUTIONS, tmp_path / "adapter")
    options = ExportOptions(factored=FactoredOptions(blank=True), fixed=SIZES)
    export_onnx(base, open_adapters([argument], base), tmp_path / "factored", options)
    return open_artifact(tmp_path / "factored"), argument


def test_convolutions(convolutions: tuple[Artifact, str], base: Base) -> None:
    artifact, argument = convolutions
    with Session(artifact) as session:
        session.load_adapter("it", argument)
        feeds = random_feeds(session.spec, SIZES, seed=4)
        plain = session.run(feeds)["out_sample"]
        assert relative_l2(plain, drawn_by_torch(base, [], feeds)) <= 1e-5
        session.activate({"it": 0.3})
        found = session.run(feeds)["out_sample"]
        assert relative_l2(found, drawn_by_torch(base, [f"{argument}=0.3"], feeds)) <= 1e-5
        session.deactivate()
        assert bits(session.run(feeds)["out_sample"]) == bits(plain)
        assert relative_l2(found, plain) > 1e-3


def test_convolutions_in_the_graph_that_a_gpu_gets(convolutions: tuple[Artifact, str], base: Base) -> None:
    artifact, argument = convolutions
    form = form_of(artifact, "cpu")
    assert form is not None
    assert form.buffers.keys() == {f"{path}.weight" for path in CONVOLUTIONS}
    (adapter,) = open_adapters([f"{argument}=0.3"], base)
    form.write([(form.prepare("it", adapter), 0.3)])
    graph = ort_graph(artifact.onnx_path, graph=form.graph)
    assert graph.replaced["nhwc_conv"]
    model = onnx.load_from_string(graph.model)
    maker = {output: node for node in model.graph.node for output in node.output}
    fed = {value.name for value in model.graph.input}
    for node in model.graph.node:
        if node.op_type == "NhwcConv":  # the provider drops it where its weight is no constant
            (weight,) = maker[node.input[1]].input
            assert weight not in fed
            assert weight not in maker
    onnx.load_external_data_for_model(model, str(artifact.onnx_path.parent))
    feeds = random_feeds(artifact.manifest.io, SIZES, seed=4)
    (found,) = evaluated(model, feeds | form.buffers)
    assert relative_l2(found, drawn_by_torch(base, [f"{argument}=0.3"], feeds)) <= 1e-5


def test_what_changes_biases_keeps_its_cores(base: Base, tmp_path: Path) -> None:
    spec = {"time_embedding.linear_1": {"magnitude": {"type": "scale", "bias": True}}}
    argument = adapter_on(base, spec, tmp_path / "adapter")
    options = ExportOptions(factored=FactoredOptions(), fixed=SIZES)
    export_onnx(base, open_adapters([argument], base), tmp_path / "factored", options)
    assert isinstance(form_of(open_artifact(tmp_path / "factored"), "cpu"), FactoredForm)


BANK = ["random:tlora:2:6=0.7", "random:tlora:1:4=-0.4"]
FREE = {axis: size for axis, size in SIZES.items() if axis != "batch_size"}
"""A bank of a fixed batch is written otherwise: see `test_sample_bank`."""


def test_a_bank_in_the_graph_that_a_gpu_gets(bank: Artifact, base: Base) -> None:
    source = source_in_session(bank, open_adapters(BANK, base), "cpu")
    assert isinstance(source, OnnxFile)
    assert source.graph is not None
    graph = ort_graph(bank.onnx_path, graph=source.graph)
    model = onnx.load_from_string(graph.model)
    onnx.load_external_data_for_model(model, str(bank.onnx_path.parent))
    sizes = SIZES | bank.manifest.io.fixed_sizes()
    feeds = random_feeds(bank.manifest.io, sizes, seed=4)
    assert sizes["batch_size"] == 2
    chosen = {"adapter_index": torch.tensor([2, 1]), "adapter_strength": torch.tensor([-0.4, 0.7])}
    (found,) = evaluated(model, feeds | chosen | dict(source.constants))
    own = {name: tensor for name, tensor in feeds.items() if name not in chosen}
    for row, argument in enumerate(BANK[::-1]):
        one = {name: tensor[row : row + 1] if tensor.dim() else tensor for name, tensor in own.items()}
        half = bank.manifest.dtype == "fp16"
        assert relative_l2(found[row : row + 1], drawn_by_torch(base, [argument], one)) <= (5e-3 if half else 1e-5)


def test_a_bank_is_proved_as_a_session_runs_it_too(bank: Artifact, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ValidateOptions(timesteps=(10,), seeds=(0,), trajectory_steps=0)
    adapters = open_adapters(BANK, base)
    report = validate(bank, base, adapters, "cpu", options)
    assert report.passed, report.failures
    assert [step.who for step in report.steps if step.who == "in a session"] != []
    put = WrittenBank.put
    monkeypatch.setattr(WrittenBank, "put", lambda form, place, prepared: put(form, 1, prepared))
    report = validate(bank, base, adapters, "cpu", options)
    assert not report.passed
    assert all(failure.startswith("in a session: ") for failure in report.failures)


@pytest.mark.parametrize(("fixed", "form"), [(FREE, WrittenBank), (SIZES, SampleBank)])
def test_a_great_strength_does_not_blow_up_what_rounding_leaves(
    base: Base, tmp_path: Path, fixed: dict[str, int], form: type[AbstractBank]
) -> None:
    """A small adapter at a great strength, in half precision: the change is rounded, or the weight at that strength."""
    (bound,) = open_adapters(["random:lora:3"], base)
    save_adapter(bound.adapter, tmp_path / "small")
    file = tmp_path / "small" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    factors = [name for name in tensors if name.endswith("residual.lora_B.weight")]
    assert factors
    safetensors.torch.save_file({n: t / 256 if n in factors else t for n, t in tensors.items()}, file)
    argument = f"{tmp_path / 'small'}=256"
    options = ExportOptions("fp16", fixed=fixed, factored=FactoredOptions(blank=True, bank=1))
    adapters = open_adapters([argument], base)
    export_onnx(base, adapters, tmp_path / "bank", options)
    artifact = open_artifact(tmp_path / "bank")
    assert type(form_of(artifact, "cpu")) is form
    report = validate(artifact, base, adapters, "cpu", ValidateOptions((10,), (0,), 0, locate=False))
    assert report.passed, report.failures
    of_file, in_session = (
        [step.relative_l2 for step in report.steps if (step.who == "in a session") == own] for own in (False, True)
    )
    assert max(in_session) <= 1.5 * max(of_file)


def test_a_change_that_does_not_fit_is_told_beside_the_file_s_own_steps(base: Base, tmp_path: Path) -> None:
    huge = write_overflowing(base, tmp_path / "huge")
    options = ExportOptions(fixed=FREE, factored=FactoredOptions(blank=True, bank=1))
    export_onnx(base, open_adapters(["random:tlora:2:6"], base), tmp_path / "bank", options)
    adapters = open_adapters([f"{huge}=0"], base)
    report = validate(open_artifact(tmp_path / "bank"), base, adapters, "cpu", ValidateOptions((10,), (0,), 0))
    assert not report.passed
    assert report.steps
    assert any(failure.startswith("in a session: ") and "not finite" in failure for failure in report.failures)


def test_a_bank_of_more_than_the_model_keeps_its_cores(base: Base, tmp_path: Path) -> None:
    for places, form in ((1, WrittenBank), (200, BankForm)):
        options = ExportOptions(factored=FactoredOptions(blank=True, bank=places), fixed=FREE)
        folder = tmp_path / str(places)
        export_onnx(base, open_adapters(["random:tlora:1:1"], base), folder, options)
        assert type(form_of(open_artifact(folder), "cpu")) is form
