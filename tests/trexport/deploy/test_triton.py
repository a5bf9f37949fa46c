"""What a repository holds, and what is refused before anything is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from tests.trexport.helpers import SIZES, copy_of, leftovers, run_cli
from trexport.artifact import Artifact, open_artifact
from trexport.backends import EngineRecord
from trexport.deploy.options import TritonOptions
from trexport.deploy.triton import plan_triton, write_triton
from trexport.deploy.unet_model import unet_config
from trexport.errors import ArtifactError, BaseError, UsageError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.manifest import Manifest
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.profile import Profile
from trexport.session import Session
from trlora import save_adapter

text_format = pytest.importorskip("google.protobuf.text_format")
messages = pytest.importorskip("tritonclient.grpc").model_config_pb2


@pytest.fixture(scope="session")
def per_sample(tmp_path_factory: pytest.TempPathFactory, base: Base, adapter_folder: Path) -> Artifact:
    """The merged ONNX model with a timestep for each sample, every axis free."""
    folder = tmp_path_factory.mktemp("onnx") / "per_sample"
    export_onnx(base, open_adapters([str(adapter_folder)], base), folder, ExportOptions(timestep_per_sample=True))
    return open_artifact(folder)


def configs(repository: Path) -> dict[str, Any]:
    """Every model's configuration, as Triton reads it."""
    return {
        file.parent.name: text_format.Parse(file.read_text(), messages.ModelConfig())
        for file in repository.glob("*/config.pbtxt")
    }


def test_a_merged_model_goes_to_tritons_own_backend(tmp_path: Path, per_sample: Artifact) -> None:
    """The copied model alone, run as Triton would: rows of (batch, 1) timesteps squeezed, batch in front of `dims`."""
    repository = tmp_path / "repository"
    write_triton(per_sample, repository, TritonOptions(max_batch=4, instances=2, image=False))
    config = configs(repository)["unet"]
    assert (config.backend, config.max_batch_size, config.instance_group[0].count) == ("onnxruntime", 4, 2)
    session = onnxruntime.InferenceSession(repository / "unet" / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    found = {port.name: port for port in session.get_inputs()}
    assert [port.name for port in config.input] == list(found)
    for port in config.input:
        batch, *axes = found[port.name].shape
        assert isinstance(batch, str)
        dims = [] if port.HasField("reshape") else list(port.dims)
        assert [axis if isinstance(axis, int) else -1 for axis in axes] == dims
    feeds = random_feeds(per_sample.manifest.io, SIZES)
    (drawn,) = session.run(["out_sample"], {name: tensor.numpy() for name, tensor in feeds.items()})
    with Session(per_sample) as original:
        torch.testing.assert_close(torch.from_numpy(drawn), original.run(feeds)["out_sample"], rtol=0, atol=1e-6)


def test_a_repository_stands_alone(
    tmp_path: Path, per_sample: Artifact, swappable: Artifact, lora_folder: Path
) -> None:
    """Nothing in it names a place outside it, and the artifact in it opens with all its hashes."""
    adapters = tmp_path / "adapters"
    copy_of(lora_folder, adapters / "ink")
    repository = tmp_path / "repository"
    plan = write_triton(swappable, repository, TritonOptions("swap", adapters=adapters, max_batch=8))
    assert plan.adapters == ("ink",)
    open_artifact(repository / "swap" / "1" / "artifact")
    config = configs(repository)["swap"]
    assert config.max_batch_size == SIZES["batch_size"]  # what the graph fixes
    assert [port.name for port in config.input if port.optional] == ["adapter", "adapter_strength"]
    assert not any(path.is_symlink() for path in repository.rglob("*"))
    texts = [
        path.read_text()
        for path in repository.rglob("*")
        if path.suffix in (".pbtxt", ".py") or path.name == "image.json"
    ]
    assert len(texts) == 5
    base = swappable.manifest.base.name  # provenance, for the check; nothing is read from there
    assert not any(str(tmp_path) in text.replace(base, "") for text in texts)


def test_the_image_model_follows_the_unets(tmp_path: Path, swappable: Artifact) -> None:
    repository = tmp_path / "repository"
    write_triton(swappable, repository, TritonOptions(image_instances=3, python_env="/opt/env"))
    image = configs(repository)["unet_image"]
    settings = json.loads((repository / "unet_image" / "1" / "image.json").read_text())
    assert settings["unet"] == "unet"
    assert settings["sample_shape"] == [4, 8, 8]
    assert [port.name for port in image.output] == ["latents"]  # no decoder in the artifact
    assert image.instance_group[0].count == 3
    assert image.parameters["EXECUTION_ENV_PATH"].string_value == "/opt/env"
    assert "adapter" in [port.name for port in image.input]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "name": ("onnx_artifact", {"name": "a/b"}, "expected letters"),
    "one timestep": ("onnx_artifact", {"native": True}, "--timestep-per-sample"),
    "form": ("swappable", {"native": True}, "chosen by trexport's own code"),
    "no adapters": ("onnx_artifact", {"adapters": Path("x")}, "takes no adapters"),
    "no folder": ("swappable", {"adapters": Path("nowhere")}, "no such folder"),
}


@pytest.mark.parametrize(("fixture", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(
    tmp_path: Path, request: pytest.FixtureRequest, fixture: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        write_triton(request.getfixturevalue(fixture), tmp_path / "repository", TritonOptions(**options))
    assert leftovers(tmp_path) == []


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, base: Base, swappable: Artifact) -> None:
    """Of a higher rank than the graph was exported for."""
    (bound,) = open_adapters(["random:tlora:3:6"], base)
    save_adapter(bound.adapter, tmp_path / "adapters" / "ink")
    with pytest.raises(ArtifactError, match="export for"):
        plan_triton(swappable, tmp_path / "repository", TritonOptions(adapters=tmp_path / "adapters"))


def test_a_fixed_batch_is_for_the_python_backend(per_sample: Artifact) -> None:
    io = per_sample.manifest.io
    inputs = tuple(replace(tensor, axes=(2, *tensor.axes[1:])) for tensor in io.inputs)
    fixed = Artifact(per_sample.folder, replace(per_sample.manifest, io=replace(io, inputs=inputs)))
    with pytest.raises(UsageError, match="its batch is fixed"):
        unet_config(fixed, TritonOptions(native=True))
    config = unet_config(fixed, TritonOptions())
    assert (config.backend, config.max_batch) == ("python", 2)


def test_a_base_that_has_gone_needs_no_pipeline(tmp_path: Path, onnx_artifact: Artifact) -> None:
    manifest = replace(onnx_artifact.manifest, base=replace(onnx_artifact.manifest.base, name=str(tmp_path / "gone")))
    moved = Artifact(onnx_artifact.folder, manifest)
    with pytest.raises(BaseError, match="--no-pipeline"):
        plan_triton(moved, tmp_path / "repository", TritonOptions())
    assert len(plan_triton(moved, tmp_path / "repository", TritonOptions(image=False)).configs) == 1


# --- engines, from their records alone ---------------------------------------------------------------------------------


def engine(artifact: Artifact, folder: Path, backend: str = "tensorrt", least: int = 1) -> Artifact:
    """An artifact that says it is an engine; the plan itself is a few bytes, which nothing here loads."""
    copy_of(artifact.folder, folder)
    (folder / "unet" / "model.plan").write_bytes(b"a plan")
    sizes = [{"batch_size": batch, "height": 8, "width": 8, "sequence_length": 5} for batch in (least, 2, 4)]
    record = EngineRecord(backend, "unet/model.plan", {}, ("sm90",), (Profile(*sizes),), {})
    manifest: Manifest = replace(
        artifact.manifest, kind="engine", engine=record.to_dict(), files={"unet/model.plan": "", "unet/config.json": ""}
    )
    manifest.write(folder)
    return open_artifact(folder, verify=False)


def test_a_tensorrt_engine_goes_to_tritons_tensorrt_backend(tmp_path: Path, per_sample: Artifact) -> None:
    built = engine(per_sample, tmp_path / "engine")
    write_triton(built, tmp_path / "repository", TritonOptions(device="cuda", max_batch=8, image=False))
    config = configs(tmp_path / "repository")["unet"]
    assert (config.backend, config.max_batch_size) == ("tensorrt", 4)  # no more than the profile
    assert config.instance_group[0].kind == messages.ModelInstanceGroup.KIND_GPU
    assert (tmp_path / "repository" / "unet" / "1" / "model.plan").read_bytes() == b"a plan"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "tensorrt-rtx"}, "no backend for engines of tensorrt-rtx"),
        ({"least": 2}, "takes one sample too"),
    ],
)
def test_engines_that_triton_cannot_run_itself(
    tmp_path: Path, per_sample: Artifact, changes: dict[str, Any], message: str
) -> None:
    built = engine(per_sample, tmp_path / "engine", **changes)
    with pytest.raises(UsageError, match=message):
        unet_config(built, TritonOptions(native=True, device="cuda"))
    assert unet_config(built, TritonOptions(device="cuda")).backend == "python"
    for native in (None, False):  # no backend at all would load it there
        with pytest.raises(UsageError, match="--device cuda"):
            unet_config(built, TritonOptions(native=native))


# --- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_or_says_what_it_would(
    tmp_path: Path, onnx_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "repository"
    command = ["deploy", "triton", onnx_artifact.folder, "-o", out, "--device", "cpu", "--json"]
    assert run_cli([*command, "--dry-run"]) == 0
    assert not out.exists()
    assert run_cli(command) == 0
    said = capsys.readouterr().out
    assert json.loads(said[: said.index("}\n{") + 1])["models"] == {"unet": "python", "unet_image": "python"}
    assert sorted(path.name for path in out.iterdir()) == ["unet", "unet_image"]
    assert run_cli(command) == 1
    assert run_cli([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "either -o REPO"),
        (["-o", "x"], 2, "no artifact given"),
        (["--check", "ftp://x"], 2, "http://HOST:PORT or grpc://"),
        (["--check", "http://127.0.0.1:1"], 1, "no server answers"),
        (["--check", "grpc://127.0.0.1:1"], 1, "no server answers"),
    ],
)
def test_wrong_usage(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["deploy", "triton", *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_model_of_scalars_is_still_asked_with_one_for_each_sample(tmp_path: Path, onnx_artifact: Artifact) -> None:
    write_triton(onnx_artifact, tmp_path / "repository", TritonOptions(image=False))
    ports = {port.name: port for port in configs(tmp_path / "repository")["unet"].input}
    assert list(ports["timestep"].dims) == [1]
    graph = onnx.load(onnx_artifact.onnx_path, load_external_data=False).graph
    (scalar,) = [port for port in graph.input if port.name == "timestep"]
    assert len(scalar.type.tensor_type.shape.dim) == 0
