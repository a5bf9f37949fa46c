"""Packages of AOTInductor, really compiled: a merged one of free sizes, and a swappable one whose weights are replaced in
place. One compilation takes half a minute, so that all tests share two."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.export import ExportedProgram

from tests.helpers import bits
from tests.trexport.helpers import SIZES, drawn_by_torch, leftovers, run_cli
from trexport.artifact import ADAPTED_NAME, Artifact, open_artifact
from trexport.backends import BACKENDS, EngineFile, EngineOptions, EngineRecord, engine_backend_of
from trexport.backends.aoti.compiling import fake_caches, own_cache
from trexport.backends.aoti.runner import AotInductorRunner
from trexport.bench.forms import cost_of, file_for
from trexport.bench.run import BenchOptions, bench
from trexport.deploy.options import TritonOptions
from trexport.deploy.serve.folder import AdapterFolder
from trexport.deploy.serve.unet import AdapterServer, Asked
from trexport.deploy.unet_model import unet_config
from trexport.engine import build_engine, usual_sizes
from trexport.errors import ArtifactError, ExportError, MissingError, UsageError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.parity.metrics import relative_l2
from trexport.parity.validate import ValidateOptions, validate
from trexport.profile import Profile, parse_profile
from trexport.session import Session, fed_tensors
from trexport.session.sources import source_of, source_with

pytestmark = pytest.mark.slow
AOTI = engine_backend_of("aotinductor")
FREE = "1x8x8x5,2x8x8x5,3x12x16x9"
QUICK = ValidateOptions(timesteps=(1, 500), seeds=(0,), trajectory_steps=2, locate=False)


def build(artifact: Artifact, out: Path, profile: str, level: int | None = None) -> Artifact:
    base, adapters = artifact.sources()
    parsed = parse_profile(profile, artifact.manifest.io, usual_sizes(artifact, base))
    compiled = torch._inductor.aoti_compile_and_package

    def spy(program: ExportedProgram, **settings: Any) -> Any:
        # torch.export answers without cuDNN, and with these answers the compiler would read real convolutions wrongly
        kept = [key for cache in fake_caches(program) for key in cache]
        assert not any(torch.ops.aten.convolution.default in key.key for key in kept)
        return compiled(program, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._inductor, "aoti_compile_and_package", spy)
        build_engine(artifact, base, adapters, out, AOTI, EngineOptions((parsed,), optimization_level=level))
    return open_artifact(out)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, onnx_artifact: Artifact) -> Artifact:
    """Merged at strength 0.7, sizes free within `FREE`."""
    return build(onnx_artifact, tmp_path_factory.mktemp("aoti") / "merged", FREE)


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory, swappable: Artifact) -> Artifact:
    """Swappable, blank, of fixed `SIZES`, from a rewritten UNet."""
    return build(swappable, tmp_path_factory.mktemp("aoti") / "replaced", "2x8x8x5", level=1)


def feeds_of(artifact: Artifact, **sizes: int) -> dict[str, Tensor]:
    return random_feeds(artifact.manifest.io, SIZES | sizes, seed=6)


def test_the_artifact(merged: Artifact, onnx_artifact: Artifact) -> None:
    record, manifest = merged.engine_record, merged.manifest
    assert (manifest.kind, manifest.form) == ("engine", "merged")
    assert (manifest.base, manifest.adapters) == (onnx_artifact.manifest.base, onnx_artifact.manifest.adapters)
    assert record.runtime == {"torch": torch.__version__}
    assert (record.targets, record.settings["device"], manifest.target_gpu) == (("cpu",), "cpu", "cpu")
    assert leftovers(merged.folder) == ["build.json", "trexport.json", "unet"]
    assert leftovers(merged.folder / "unet") == ["config.json", "model.pt2"]
    assert AOTI.loads_here(record)[0]


def test_the_record_says_what_was_rewritten(merged: Artifact, replaced: Artifact) -> None:
    plain, record = merged.engine_record, replaced.engine_record
    assert (plain.settings["optimization_level"], plain.placements) == (0, {})
    assert record.settings["optimization_level"] == 1
    counts = record.settings["rewrites"]["replaced"]
    assert min(counts.values()) > 0
    names = {rows.constant for rows in record.placements.values()}
    assert len(names) == counts["self_attention"] + 2  # one for all texts, one for all time embeddings
    with BACKENDS["aotinductor"].load(source_of(replaced, [], "cpu"), "cpu") as runner:
        assert isinstance(runner, AotInductorRunner)
        assert names <= set(runner._model.get_constant_fqns())
    adapted = {f"{path}.weight" for path in record.layers}
    assert not adapted & {f"{path}.weight" for path in record.placements} & record.constants().keys()


@pytest.mark.gpu
@pytest.mark.parametrize("profile", ["2x8x8x5", "1x8x8x5,2x8x8x5,4x8x8x5", FREE])
def test_with_our_kernels_a_package_draws_what_torch_draws(
    profile: str, tmp_path: Path, base: Base, adapter_folder: Path
) -> None:
    adapters = open_adapters([str(adapter_folder)], base)
    export_onnx(base, adapters, tmp_path / "onnx", ExportOptions("fp16"))
    artifact = open_artifact(tmp_path / "onnx")
    parsed = parse_profile(profile, artifact.manifest.io, usual_sizes(artifact, base))
    options = EngineOptions((parsed,), device="cuda", optimization_level=1)
    build_engine(artifact, base, adapters, tmp_path / "engine", AOTI, options)
    report = validate(open_artifact(tmp_path / "engine"), base, adapters, "cuda", QUICK)
    assert report.passed, report.failures


def test_no_cache_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "TORCHINDUCTOR_CACHE_DIR"
    for before in (None, default_cache_dir()):
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
        with own_cache():
            used = Path(os.environ[name])
            assert str(used) != default_cache_dir()
            (used / "kernel").write_text("x")
        assert not used.exists()
        assert os.environ.get(name) == before
    monkeypatch.setenv(name, str(tmp_path))  # the user's own
    with own_cache():
        assert os.environ[name] == str(tmp_path)


@pytest.mark.parametrize("sizes", [(1, 8, 8, 5), (2, 8, 8, 5), (3, 12, 16, 9), (3, 10, 12, 6)])
def test_every_size_of_the_profile(sizes: tuple[int, ...], merged: Artifact, adapter_folder: Path) -> None:
    base, _ = merged.sources()
    named = dict(zip(("batch_size", "height", "width", "sequence_length"), sizes, strict=True))
    feeds = feeds_of(merged, **named)
    with BACKENDS["aotinductor"].load(source_of(merged, [], "cpu"), "cpu") as runner:
        found = runner(feeds)["out_sample"]
    assert relative_l2(found, drawn_by_torch(base, [f"{adapter_folder}=0.7"], feeds)) <= 1e-5


def test_sizes_outside_are_refused(merged: Artifact) -> None:
    with BACKENDS["aotinductor"].load(source_of(merged, [], "cpu"), "cpu") as runner:
        with pytest.raises(UsageError, match="the engine takes"):
            runner(feeds_of(merged, batch_size=4))
        with pytest.raises(UsageError, match="the engine takes"):
            runner(feeds_of(merged, height=6))
        feeds = feeds_of(merged)
        with pytest.raises(UsageError, match="encoder_hidden_states"):
            runner({**feeds, "encoder_hidden_states": feeds["encoder_hidden_states"][..., :-1]})
        with pytest.raises(UsageError, match="sample"):
            runner({**feeds, "sample": feeds["sample"][0]})


def test_inputs_of_other_layouts_and_dtypes(merged: Artifact) -> None:
    """The compiled code checks neither."""
    feeds = feeds_of(merged, width=16)
    with BACKENDS["aotinductor"].load(source_of(merged, [], "cpu"), "cpu") as runner:
        expected = runner(feeds)["out_sample"]
        other = {**feeds, "sample": feeds["sample"].to(memory_format=torch.channels_last).double()}
        assert torch.equal(runner(other)["out_sample"], expected)


ALONE = """
import sys, torch
from safetensors.torch import load_file, save_file
path, folder = sys.argv[1:]
given = load_file(folder + "/feeds.safetensors")
unet = torch._inductor.aoti_load_package(path)
found = {"base": unet(**given).detach().clone()}
unet.load_constants(load_file(folder + "/weights.safetensors"), check_full_update=False)
found["adapted"] = unet(**given).detach().clone()
save_file(found, folder + "/found.safetensors")
assert not {"trexport", "trlora", "diffusers"} & set(sys.modules)
"""


def test_torch_alone_loads_it_and_replaces_weights(replaced: Artifact, adapter_folder: Path, tmp_path: Path) -> None:
    base, _ = replaced.sources()
    feeds = feeds_of(replaced)
    adapters = open_adapters([str(adapter_folder)], base)
    weights = fed_tensors(replaced, adapters, "cpu")
    for file, tensors in (("feeds", feeds), ("weights", weights)):
        safetensors.torch.save_file(tensors, tmp_path / f"{file}.safetensors")
    path = replaced.folder / replaced.engine_record.file
    subprocess.run([sys.executable, "-c", ALONE, str(path), str(tmp_path)], check=True, timeout=120, cwd=tmp_path)
    for name, arguments in (("base", []), ("adapted", [str(adapter_folder)])):
        found = safetensors.torch.load_file(tmp_path / "found.safetensors")[name]
        assert relative_l2(found, drawn_by_torch(base, arguments, feeds)) <= 1e-5


def test_a_session_switches_to_the_bit(replaced: Artifact, adapter_folder: Path, lora_folder: Path) -> None:
    base, _ = replaced.sources()
    feeds = feeds_of(replaced)
    with Session(replaced) as session:
        session.load_adapter("a", adapter_folder)
        session.load_adapter("b", lora_folder)
        plain = session.run(feeds)["out_sample"]
        assert relative_l2(plain, drawn_by_torch(base, [], feeds)) <= 1e-5
        session.activate({"a": 0.6})
        first = session.run(feeds)["out_sample"]
        assert relative_l2(first, drawn_by_torch(base, [f"{adapter_folder}=0.6"], feeds)) <= 1e-5
        session.activate({"b": 1.0, "a": 0.6})
        both = session.run(feeds)["out_sample"]
        expected = drawn_by_torch(base, [f"{adapter_folder}=0.6", f"{lora_folder}=1.0"], feeds)
        assert relative_l2(both, expected) <= 1e-5
        session.activate({"a": 0.6})
        assert bits(session.run(feeds)["out_sample"]) == bits(first)
        session.activate({"a": 0.0})
        assert bits(session.run(feeds)["out_sample"]) == bits(plain)
        session.activate({"b": None})
        session.deactivate()
        assert bits(session.run(feeds)["out_sample"]) == bits(plain)
        step = session.step(feeds)
        session.activate({"a": 0.6})
        step.run()  # of what is active when it runs
        assert bits(step.outputs["out_sample"]) == bits(first)


def test_served_requests_are_filled_up_to_the_batch_of_the_engine(
    replaced: Artifact, adapter_folder: Path, tmp_path: Path
) -> None:
    """The engine takes two samples, requests bring one and three."""
    shutil.copytree(adapter_folder, tmp_path / "a")
    feeds = feeds_of(replaced)
    with Session(replaced) as session:
        session.load_adapter("a", adapter_folder)
        plain = session.run(feeds)["out_sample"]
        session.activate({"a": None})
        adapted = session.run(feeds)["out_sample"]
    one = {name: tensor[:1] if tensor.dim() else tensor.expand(1) for name, tensor in feeds.items()}
    three = {name: torch.cat([tensor[:1]] * 3) for name, tensor in one.items()}
    server = AdapterServer(Session(replaced), AdapterFolder(tmp_path), 8)
    first, second = server.answer([Asked(one), Asked(three, [["a"], [""], ["a"]])])
    server.close()
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert relative_l2(first["out_sample"], plain[:1]) <= 1e-6
    for row, wanted in enumerate((adapted, plain, adapted)):
        assert relative_l2(second["out_sample"][row], wanted[0]) <= 1e-6


def test_an_engine_of_one_size_says_so(replaced: Artifact, merged: Artifact, tmp_path: Path) -> None:
    assert replaced.manifest.io.fixed_sizes() == SIZES
    assert merged.manifest.io.fixed_sizes() == {}
    config = unet_config(replaced, TritonOptions())
    assert (config.backend, config.max_batch) == ("python", SIZES["batch_size"])
    assert unet_config(merged, TritonOptions(max_batch=8)).max_batch == 3
    with pytest.raises(UsageError, match="--device cpu"):
        unet_config(replaced, TritonOptions(device="cuda"))


def test_weights_that_overflow_leave_what_was_active(
    replaced: Artifact, adapter_folder: Path, overflowing: Path
) -> None:
    feeds = feeds_of(replaced)
    with Session(replaced) as session:
        session.load_adapter("a", adapter_folder)
        session.load_adapter("o", overflowing)
        session.activate({"a": 1.0})
        first = session.run(feeds)["out_sample"]
        with pytest.raises(ArtifactError, match="not finite"):
            session.activate({"o": 1.0})
        assert session.active == {"a": 1.0}
        assert bits(session.run(feeds)["out_sample"]) == bits(first)


def test_a_constant_of_another_shape_is_refused(replaced: Artifact) -> None:
    """torch itself takes it, and computes rubbish."""
    constants = fed_tensors(replaced, [], "cpu")
    name = next(iter(constants))
    backend = BACKENDS["aotinductor"]
    for wrong in (constants[name][:-1], constants[name].half()):
        with pytest.raises(ArtifactError, match="expected torch.float32"):
            backend.load(source_with(replaced, {**constants, name: wrong}), "cpu")
    with pytest.raises(ArtifactError, match="is no weight"):
        backend.load(source_with(replaced, {**constants, "nowhere.weight": constants[name]}), "cpu")


def test_validation(merged: Artifact, replaced: Artifact, lora_folder: Path, base: Base) -> None:
    report = validate(merged, *merged.sources(), "cpu", QUICK)
    assert report.passed, report.failures
    sizes = {tuple(step.sizes.values()) for step in report.steps}
    assert {(2, 8, 8, 5), (1, 8, 8, 5), (3, 12, 16, 9)} <= sizes
    assert validate(replaced, base, open_adapters([str(lora_folder)], base), "cpu", QUICK).passed
    # the weights beside it are what an activation starts from: spoilt ones are found
    other = replace(merged, manifest=replace(merged.manifest, adapters=()))
    assert not validate(other, base, [], "cpu", QUICK).passed
    with pytest.raises(UsageError, match="the engine takes"):
        validate(merged, *merged.sources(), "cpu", replace(QUICK, sizes={"batch_size": 7}))


def test_bench(merged: Artifact, replaced: Artifact, onnx_artifact: Artifact) -> None:
    base, adapters = onnx_artifact.sources()
    files = {"engine": file_for(merged, adapters, "cpu"), "swappable": file_for(replaced, adapters, "cpu")}
    engines = {name: file for name, file in files.items() if isinstance(file, EngineFile)}
    options = BenchOptions(("torch", "aotinductor", "tensorrt-rtx"), sizes=SIZES, warm_up=1, iterations=3)
    report = bench(base, adapters, {}, "cpu", options, engines=engines)
    assert [result.backend for result in report.results] == ["torch", "engine", "swappable"]
    assert all(result.relative_l2 <= 1e-5 for result in report.results)
    assert "trexport engine" in report.skipped["tensorrt-rtx"]
    cost = cost_of(replaced, adapters, "cpu", report.results[-1])
    assert cost.swap_ms > 0


def check(form: str = "merged", **options: object) -> EngineOptions:
    profiles = (Profile.of(SIZES),)
    return AOTI.check(replace(EngineOptions(profiles), **options), form)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"targets": ("sm89",)}, "--target"),
        ({"optimization_level": 4}, "knows 0 to 3"),
        ({"timing_cache": Path("x")}, "--timing-cache"),
        ({"refit": "all"}, "--refit"),
        ({"strip": True}, "--strip"),
        ({"version_compatible": True}, "--version-compatible"),
        ({"form": "factored"}, "swappable models"),
        ({"profiles": (Profile.of(SIZES), Profile.of(SIZES))}, "takes one"),
    ],
)
def test_what_it_has_no_notion_of(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check(**options)  # type: ignore[arg-type]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingError, match="install g\\+\\+"):
        check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_no_gpu(merged: Artifact) -> None:
    with pytest.raises(MissingError, match="CUDA"):
        check(device="cuda")
    with pytest.raises((MissingError, UsageError), match="--device cpu"):
        BACKENDS["aotinductor"].load(source_of(merged, [], "cpu"), "cuda")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"runtime": {"torch": "1.0.0"}}, "torch 1.0.0"),
        ({"settings": {"device": "cpu", "isa": "AVX9", "cpu_features": ["avx9"]}}, "no avx9"),
        ({"targets": ["sm90"], "settings": {"device": "cuda"}}, "sm90"),
    ],
)
def test_will_it_load_here(change: dict[str, object], says: str, merged: Artifact) -> None:
    ok, reason = AOTI.loads_here(EngineRecord.from_dict({**merged.engine_record.to_dict(), **change}))
    assert not ok
    assert says in reason


def test_a_failing_compile_leaves_nothing(
    onnx_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("C++ compile error\n\nCommand: g++\n\nno space left in the register file\n")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fail)
    with pytest.raises(ExportError, match="register file"):
        build(onnx_artifact, tmp_path / "engine", "1x8x8x5")
    assert leftovers(tmp_path) == []


def test_damaged_files(replaced: Artifact, merged: Artifact, tmp_path: Path) -> None:
    shutil.copytree(merged.folder, tmp_path / "engine")
    path = tmp_path / "engine" / merged.engine_record.file
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="changed or damaged"):
        open_artifact(tmp_path / "engine")
    damaged = open_artifact(tmp_path / "engine", verify=False)
    with pytest.raises(ArtifactError, match="does not load"):
        BACKENDS["aotinductor"].load(source_of(damaged, [], "cpu"), "cpu")
    shutil.copytree(replaced.folder, tmp_path / "other")
    (tmp_path / "other" / "unet" / ADAPTED_NAME).write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="cannot be read"):
        Session(open_artifact(tmp_path / "other", verify=False))


def test_command_line(onnx_artifact: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["engine", onnx_artifact.folder, "-o", tmp_path / "engine", "--backend", "aotinductor"]
    assert run_cli([*arguments, "--device", "cpu", "--dry-run", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["backend"] == "aotinductor"
    for wrong, code in (
        (["--target", "sm89"], 2),
        (["--profile", "3x8x8x5,2x8x8x5,1x8x8x5"], 2),
        (["--profile", "noise=1x4x8x8"], 2),
        (["--workspace", "much"], 2),
    ):
        assert run_cli([*arguments, "--device", "cpu", *wrong]) == code
    assert leftovers(tmp_path) == []
