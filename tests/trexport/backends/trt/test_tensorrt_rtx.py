"""Engines of TensorRT-RTX, really built, on a machine without a GPU; loading them is refused here, and says why."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trexport.helpers import SIZES, leftovers, run_cli
from trexport.artifact import Artifact, open_artifact
from trexport.backends import BACKENDS, EngineOptions, EngineRecord, OnnxFile, engine_backend_of
from trexport.backends.trt.build import _config
from trexport.engine import build_engine, default_profile
from trexport.errors import ExportError, MissingError, UsageError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.profile import Profile, parse_profile
from trexport.progress import Progress, Task
from trexport.session.sources import source_of
from trlora import save_adapter

RTX = engine_backend_of("tensorrt-rtx")
pytestmark = pytest.mark.slow
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")


def build(artifact: Artifact, out: Path, *profiles: str, targets: tuple[str, ...] = ("sm89",)) -> Artifact:
    base, adapters = artifact.sources()
    usual = default_profile(artifact, base)
    given = tuple(parse_profile(text, artifact.manifest.io, usual.opt) for text in profiles) or (usual,)
    assert build_engine(artifact, base, adapters, out, RTX, EngineOptions(given, targets)) is not None
    return open_artifact(out)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, onnx_artifact: Artifact) -> Artifact:
    """Float32, two profiles, two GPUs."""
    out = tmp_path_factory.mktemp("rtx") / "merged"
    return build(onnx_artifact, out, "1x8x8x5,2x8x8x5,4x16x16x9", "8x16x16x77", targets=("sm86", "sm89"))


def test_the_artifact(merged: Artifact, onnx_artifact: Artifact) -> None:
    record, manifest = merged.engine_record, merged.manifest
    assert (manifest.kind, manifest.form, manifest.target_gpu) == ("engine", "merged", "sm86, sm89")
    assert manifest.base == onnx_artifact.manifest.base
    assert manifest.adapters == onnx_artifact.manifest.adapters
    assert manifest.io == onnx_artifact.manifest.io  # the two profiles have no size in common
    assert record.backend == "tensorrt-rtx"
    assert record.runtime == {"tensorrt_rtx": RTX.availability("cpu").version}
    assert [str(profile) for profile in record.profiles] == ["1x8x8x5,2x8x8x5,4x16x16x9", "8x16x16x77"]
    assert leftovers(merged.folder) == ["build.json", "trexport.json", "unet"]
    assert leftovers(merged.folder / "unet") == ["config.json", "model.rtx"]
    report = json.loads((merged.folder / "build.json").read_bytes())
    assert report["size_bytes"] == (merged.folder / record.file).stat().st_size > 1e6
    assert "CONVOLUTION" in {layer["type"] for layer in report["layers"]}
    assert report["seconds"] > 0
    assert record.settings["cleared_flags"] == ["TF32"]


@pytest.mark.parametrize("half", [False, True])
def test_float32_is_no_tf32(half: bool, onnx_artifact: Artifact, half_artifact: Artifact) -> None:
    artifact = half_artifact if half else onnx_artifact
    trt: Any = importlib.import_module("tensorrt_rtx")
    builder = trt.Builder(trt.Logger())
    network = builder.create_network()
    config = _config(trt, builder, network, OnnxFile(artifact.onnx_path, artifact.manifest.io), EngineOptions(()))
    assert config.get_flag(trt.BuilderFlag.TF32) == half  # set by the builder itself


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory, base: Base) -> str:
    """A TLoRA(2,6) on the layers of the middle block alone: every operator of a bank is built for long."""
    (bound,) = open_adapters(["random:tlora:2:6"], base)
    layers = {path: parts for path, parts in bound.adapter.layers.items() if path.startswith("mid_block")}
    folder = tmp_path_factory.mktemp("adapter") / "middle"
    save_adapter(replace(bound.adapter, layers=layers), folder)
    return str(folder)


@pytest.fixture(scope="module")
def small_bank(tmp_path_factory: pytest.TempPathFactory, base: Base, middle: str) -> Artifact:
    """A bank of two places, blank, the batch free."""
    folder = tmp_path_factory.mktemp("onnx") / "small_bank"
    fixed = {axis: size for axis, size in SIZES.items() if axis != "batch_size"}
    options = ExportOptions(factored=FactoredOptions(blank=True, bank=2), fixed=fixed)
    export_onnx(base, open_adapters([middle], base), folder, options)
    return open_artifact(folder)


@pytest.mark.parametrize("which", ["two_slots", "small_bank", "swappable", "half_artifact"])
def test_every_form_is_built(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, base: Base, middle: str
) -> None:
    artifact: Artifact = request.getfixturevalue(which)
    fixed = "2x8x8x5" if which != "half_artifact" else "2x8x12x5"
    engine = build(artifact, tmp_path / "engine", "1x8x8x5,2x8x8x5,4x8x8x5" if which == "small_bank" else fixed)
    assert engine.manifest.form == artifact.manifest.form
    source = source_of(engine, [], "cpu")
    assert set(engine.engine_record.settings["inputs"]) == set(source.constants)  # type: ignore[union-attr]
    assert bool(source.constants) == (which != "half_artifact")  # type: ignore[union-attr]
    if which != "half_artifact":
        (bound,) = open_adapters([middle], base)
        rows, columns = base.weight_shapes()[next(iter(bound.layers))]
        assert engine.engine_record.layers[next(iter(bound.layers))] == (rows, columns)


def test_half_precision_for_every_gpu(half_artifact: Artifact, tmp_path: Path) -> None:
    targets = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
    engine = build(half_artifact, tmp_path / "engine", targets=targets)
    assert engine.engine_record.targets == targets


def test_bfloat16(onnx_artifact: Artifact, tmp_path: Path) -> None:
    base, adapters = onnx_artifact.sources()
    fixed = {"batch_size": 1, "height": 8, "width": 8, "sequence_length": 5}
    export_onnx(base, adapters, tmp_path / "onnx", ExportOptions("bf16", fixed=fixed))
    build(open_artifact(tmp_path / "onnx"), tmp_path / "engine")
    layers = json.loads((tmp_path / "engine" / "build.json").read_bytes())["layers"]
    precisions = {(layer["type"], layer["precision"]) for layer in layers}
    assert {("NORMALIZATION", "FLOAT"), ("CONVOLUTION", "BF16"), ("MATRIX_MULTIPLY", "BF16")} <= precisions
    assert ("NORMALIZATION", "BF16") not in precisions


def test_products_in_float32_on_turing_are_refused_by_the_builder(onnx_artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--dtype fp16"):
        build(onnx_artifact, tmp_path / "engine", targets=("sm75",))
    assert leftovers(tmp_path) == []


def check(**options: object) -> EngineOptions:
    profile = Profile.of({"batch_size": 1, "height": 8, "width": 8, "sequence_length": 5})
    form = str(options.pop("form", "merged"))
    return RTX.check(EngineOptions((profile,), **options), form)  # type: ignore[arg-type]


def test_targets() -> None:
    assert check(targets=("sm89", "sm89", "sm86")).targets == ("sm89", "sm86")
    with pytest.raises(UsageError, match="'sm90'"):
        check(targets=("sm90",))


@no_gpu
def test_without_a_target_it_is_for_all_that_compute_in_float32() -> None:
    assert check().targets == ("sm80", "sm86", "sm89", "sm120", "sm121")


@no_gpu
@pytest.mark.parametrize("options", [{"refit": "all"}, {"strip": True}, {"strip": True, "refit": "all"}])
def test_what_needs_a_gpu_is_said_before_anything_is_built(options: dict[str, object]) -> None:
    with pytest.raises(MissingError, match="GPU"):
        check(targets=("sm89",), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"timing_cache": Path("x")},
        {"hardware_compatible": "ampere-plus"},
        {"optimization_level": 3},
        {"version_compatible": True},
    ],
)
def test_what_it_has_no_notion_of(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="tensorrt-rtx"):
        check(targets=("sm89",), **options)


@pytest.mark.parametrize("form", ["factored", "swappable"])
def test_adapters_that_are_inputs_need_no_refit(form: str) -> None:
    with pytest.raises(UsageError, match="inputs"):
        check(targets=("sm89",), refit="all", form=form)


@no_gpu
def test_loading_says_what_is_missing(merged: Artifact) -> None:
    ok, reason = RTX.loads_here(merged.engine_record)
    assert not ok
    assert "sm86, sm89" in reason
    source = source_of(merged, [], "cpu")
    for device in ("cpu", "cuda"):
        with pytest.raises(MissingError, match="tensorrt-rtx"):
            BACKENDS["tensorrt-rtx"].load(source, device)


@pytest.mark.parametrize(
    ("here", "built", "flags", "ok", "says"),
    [
        ("sm89", "same", (), True, "sm89"),
        ("sm80", "same", (), False, "--target sm80"),
        ("sm90", "same", (), False, "aotinductor"),
        ("sm89", "1.0.0.1", (), False, "exactly 1.0.0.1"),
        ("sm89", "1.0.0.1", ("VERSION_COMPATIBLE",), True, "sm89"),
        ("sm89", "0.9.0.1", ("VERSION_COMPATIBLE",), False, "same major"),
        ("sm89", "1.99.0.1", ("VERSION_COMPATIBLE",), False, "newer"),
    ],
)
def test_will_it_load_here(
    here: str,
    built: str,
    flags: tuple[str, ...],
    ok: bool,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    merged: Artifact,
) -> None:
    monkeypatch.setattr("trexport.backends.trt.backend.gpu_here", lambda: here)
    fields = merged.engine_record.to_dict()
    fields["settings"]["flags"] = list(flags)
    if built != "same":
        fields["runtime"] = {"tensorrt_rtx": built}
    found, reason = RTX.loads_here(EngineRecord.from_dict(fields))
    assert found == ok
    assert says in reason


class Interrupted(Progress):
    """Ctrl-C at the tenth step of the builder."""

    def __init__(self) -> None:
        self.steps = 0

    def task(self, description: str, total: float | None = None):  # type: ignore[no-untyped-def]
        from contextlib import nullcontext

        owner = self

        class Counting(Task):
            def advance(self, amount: float) -> None:
                owner.steps += 1
                if owner.steps == 10:
                    raise KeyboardInterrupt

        return nullcontext(Counting())


def test_an_interrupted_build_leaves_nothing(onnx_artifact: Artifact, tmp_path: Path) -> None:
    base, adapters = onnx_artifact.sources()
    options = EngineOptions((default_profile(onnx_artifact, base),), ("sm89",))
    with pytest.raises(KeyboardInterrupt):
        build_engine(onnx_artifact, base, adapters, tmp_path / "engine", RTX, options, progress=Interrupted())
    assert leftovers(tmp_path) == []


def test_command_line(onnx_artifact: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "engine"
    arguments = ["engine", onnx_artifact.folder, "-o", out, "--backend", "tensorrt-rtx", "--target", "sm89,sm120"]
    assert run_cli([*arguments, "--profile", "1x8x8x5,2x8x8x5,4x8x8x5", "--dry-run"]) == 0
    assert "1x8x8x5,2x8x8x5,4x8x8x5" in capfd.readouterr().out
    assert leftovers(tmp_path) == []
    assert run_cli([*arguments, "--profile", "1x8x8x5,2x8x8x5,4x8x8x5", "--workspace", "4G", "--json"]) == 0
    fields = json.loads(capfd.readouterr().out)
    assert fields["engine"]["settings"]["workspace_bytes"] == 4 << 30
    assert fields["engine"]["targets"] == ["sm89", "sm120"]
    assert run_cli([*arguments]) == 1  # it is there already
    assert run_cli(["engine", out, "-o", tmp_path / "again", "--backend", "tensorrt-rtx"]) == 2
    assert run_cli(["engine", onnx_artifact.folder, "-o", tmp_path / "x", "--backend", "torch"]) == 2
    assert "builds no engines" in capfd.readouterr().err
    assert run_cli([*arguments[:3], tmp_path / "x", *arguments[4:6], "--profile", "2x8x8"]) == 2
    assert leftovers(tmp_path) == ["engine"]


def test_a_merged_unet_is_no_source(onnx_artifact: Artifact, tmp_path: Path) -> None:
    from trexport.merging import merge

    base, adapters = onnx_artifact.sources()
    merge(base, adapters, tmp_path / "merged")
    with pytest.raises(UsageError, match="trexport onnx"):
        build(open_artifact(tmp_path / "merged"), tmp_path / "engine", "1x8x8x5")
