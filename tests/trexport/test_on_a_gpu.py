"""What a GPU machine is to show, from export to mixed batches, in every precision. CI has none: run it by hand there, with
`pytest -m gpu -n 8`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import bits
from tests.trexport.helpers import SIZES, adapter_on, drawn_by_torch
from trexport.artifact import Artifact, open_artifact
from trexport.backends import BACKENDS, Device, EngineOptions, engine_backend_of
from trexport.bench.forms import file_for
from trexport.engine import build_engine, default_profile
from trexport.errors import MissingError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.swappable import SwappableOptions
from trexport.io_spec import Dtype
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.parity.metrics import relative_l2
from trexport.parity.tolerance import TOLERANCES
from trexport.parity.validate import ValidateOptions, validate
from trexport.session import Session

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

DEVICE: Device = "cuda"
LEVELS = (None, 1)
FREE = {axis: size for axis, size in SIZES.items() if axis != "batch_size"}
QUICK = ValidateOptions(timesteps=(10,), seeds=(0,), trajectory_steps=0, locate=False)

FORMS: dict[str, dict[str, Any]] = {
    "merged": {},
    "factored": {"factored": FactoredOptions()},
    "blank": {"factored": FactoredOptions(blank=True)},
    "bank": {"factored": FactoredOptions(blank=True, bank=2)},
    "bank of a free batch": {"factored": FactoredOptions(blank=True, bank=2), "fixed": FREE},
    "swappable": {"swappable": SwappableOptions()},
    "every size free": {"fixed": {}},
}
LOW_RANK = {"residual": {"type": "low_rank", "rank": 2}}
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
LAYERS: dict[str, dict[str, Any]] = {
    "convolutions": {
        LINEAR: LOW_RANK,
        "conv_in": LOW_RANK,
        "conv_out": LOW_RANK,
        "down_blocks.0.downsamplers.0.conv": LOW_RANK,
        "down_blocks.1.resnets.0.conv_shortcut": LOW_RANK,
        "mid_block.attentions.0.proj_in": LOW_RANK,
        "up_blocks.0.resnets.0.conv1": {"transform": {"type": "diagonal"}},
    },
    "biases": {LINEAR: LOW_RANK, "time_embedding.linear_1": {"magnitude": {"type": "scale", "bias": True}}},
}
TAKES = {"convolutions": FORMS.keys() - {"bank", "bank of a free batch"}, "biases": FORMS.keys() - {"swappable"}}


def exported(base: Base, argument: str, dtype: Dtype, form: str, folder: Path) -> Artifact:
    options = ExportOptions(dtype, **{"fixed": SIZES, **FORMS[form]})
    export_onnx(base, open_adapters([argument], base), folder, options)
    return open_artifact(folder)


@pytest.fixture(params=["linear", *LAYERS])
def argument(request: pytest.FixtureRequest, base: Base, tmp_path: Path) -> str:
    if request.param == "linear":
        return "random:tlora:2:6=0.7"
    return adapter_on(base, LAYERS[request.param], tmp_path / "adapter") + "=0.7"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_form_is_proved(
    base: Base, tmp_path: Path, argument: str, dtype: Dtype, form: str, request: pytest.FixtureRequest
) -> None:
    kind = request.node.callspec.params["argument"]
    if form not in TAKES.get(kind, FORMS):
        pytest.skip("this form takes no such adapter, and says so")
    artifact = exported(base, argument, dtype, form, tmp_path / "out")
    report = validate(artifact, base, open_adapters([argument], base), DEVICE, QUICK)
    assert report.passed, report.failures


def test_bfloat16_has_no_kernel(base: Base, tmp_path: Path) -> None:
    """Once it has one the README is to say so."""
    artifact = exported(base, "random:tlora:2:6", "bf16", "merged", tmp_path / "out")
    with pytest.raises(MissingError, match="no kernel"):
        validate(artifact, base, open_adapters(["random:tlora:2:6"], base), DEVICE, QUICK)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("form", ["merged", "bank", "swappable"])
def test_an_engine_is_proved(base: Base, tmp_path: Path, dtype: Dtype, form: str, level: int | None) -> None:
    adapters = open_adapters(["random:tlora:2:6=0.7"], base)
    artifact = exported(base, "random:tlora:2:6=0.7", dtype, form, tmp_path / "onnx")
    options = EngineOptions((default_profile(artifact, base),), device=DEVICE, optimization_level=level)
    build_engine(artifact, base, adapters, tmp_path / "engine", engine_backend_of("aotinductor"), options)
    report = validate(open_artifact(tmp_path / "engine"), base, adapters, DEVICE, QUICK)
    assert report.passed, report.failures


@pytest.fixture
def deterministic() -> Iterator[None]:
    """ONNX Runtime's group normalisations add with atomics otherwise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("form", ["factored", "swappable", "bank", "bank of a free batch"])
@pytest.mark.usefixtures("deterministic")
def test_switching_back_gives_the_same_bits(base: Base, tmp_path: Path, dtype: Dtype, form: str) -> None:
    artifact = exported(base, "random:tlora:2:6", dtype, form, tmp_path / "out")
    with Session(artifact, DEVICE) as session:
        session.load_adapter("a", "random:tlora:2:6")
        session.load_adapter("b", "random:tlora:1:4")
        feeds = random_feeds(session.spec, SIZES, seed=4)

        def drawn() -> bytes:
            return bits(session.run(feeds)["out_sample"].cpu())

        off = drawn()
        seen = set()
        for strengths in ({"a": 0.7}, {"b": -1.2}, {"a": 0.3}):
            session.activate(strengths)
            seen.add(drawn())
        session.activate({"a": 0.7})
        assert drawn() in seen
        assert len(seen | {off}) == 4
        session.deactivate()
        assert drawn() == off


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("form", ["bank", "bank of a free batch"])
def test_each_sample_its_own(base: Base, tmp_path: Path, dtype: Dtype, form: str) -> None:
    artifact = exported(base, "random:tlora:2:6", dtype, form, tmp_path / "out")
    arguments = {"a": "random:tlora:2:6=0.7", "b": "random:tlora:1:4=-0.9"}
    with Session(artifact, DEVICE) as session:
        for name, argument in arguments.items():
            session.load_adapter(name, argument)
        feeds = random_feeds(session.spec, SIZES, seed=4)
        for names in (["a", "b"], ["b", None], ["a", "a"]):
            found = session.run(feeds, adapters=names)["out_sample"]
            for row, name in enumerate(names):
                own = {key: (t[row : row + 1] if t.dim() else t).float() for key, t in feeds.items()}
                expected = drawn_by_torch(base, [] if name is None else [arguments[name]], own)
                assert relative_l2(found[row : row + 1].cpu(), expected) <= TOLERANCES[dtype].relative_l2


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("form", ["merged", "factored", "swappable", "bank", "bank of a free batch"])
def test_a_step_is_captured_and_follows_its_inputs(base: Base, tmp_path: Path, dtype: Dtype, form: str) -> None:
    """As `bench` runs it."""
    argument = "random:tlora:2:6=0.7"
    adapters = open_adapters([argument], base)
    artifact = exported(base, argument, dtype, form, tmp_path / "out")
    file = file_for(artifact, adapters, DEVICE)
    chosen = {name: t.expand(2).contiguous() for name, t in file.constants.items() if name.startswith("adapter_")}
    file = replace(file, constants={**file.constants, **chosen})
    with BACKENDS["onnxruntime"].load(file, DEVICE) as runner:
        step = runner.step(random_feeds(artifact.manifest.io, SIZES, seed=1))
        assert "not captured" not in str(step.note)
        feeds = random_feeds(artifact.manifest.io, SIZES, seed=2)
        for name, tensor in step.inputs.items():
            tensor.copy_(feeds[name])
        step.run()
        wide: dict[str, Tensor] = {n: t.float() for n, t in feeds.items() if not n.startswith("adapter_")}
        expected = drawn_by_torch(base, [argument], wide)
        assert relative_l2(step.outputs["out_sample"].cpu(), expected) <= TOLERANCES[dtype].relative_l2
