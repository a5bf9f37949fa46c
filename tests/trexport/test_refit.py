"""What a refit writes: computed from the base, over what the old and the new adapters touch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import safetensors.torch
import torch
from onnx import numpy_helper
from torch import Tensor

from tests.helpers import bits
from tests.trexport.helpers import copy_of, leftovers, run_cli, weights_of
from tests.trexport.pipelines import opened
from trexport.artifact import Artifact, open_artifact
from trexport.backends import EngineOptions, engine_backend_of
from trexport.backends.trt.refit import check_names
from trexport.engine import build_engine, default_profile
from trexport.errors import ArtifactError, ExportError, MissingError, UsageError
from trexport.manifest import BaseRecord, ComponentRecord, Manifest
from trexport.models.adapters import BoundAdapter, on_component, open_adapters
from trexport.models.base import Base, open_base
from trexport.models.component import component_spec
from trexport.models.model import DTYPES
from trexport.refit import refit_engine, refit_weights

DTYPE = "fp16"


def partly(base: Base, name: str, every: int) -> BoundAdapter:
    """An adapter on some of its layers only."""
    (bound,) = open_adapters([name], base)
    kept = {path: layer for number, (path, layer) in enumerate(bound.layers.items()) if number % every == 0}
    return replace(bound, layers=kept)


def engine_of(base: Base, adapters: list[BoundAdapter]) -> dict[str, Tensor]:
    """The weights of an engine just built: the base's, and the adapters' layers merged."""
    weights = {name: tensor.to(DTYPES[DTYPE]) for name, tensor in weights_of(base).items()}
    return weights | refit_weights(base, [], adapters, DTYPE)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(bits(first[n]) == bits(second[n]) for n in first)


def test_there_and_back_has_the_first_bits(base: Base) -> None:
    """A touches layers that B does not, and the other way round."""
    a, b = partly(base, "random:tlora:2:6", 2), partly(base, "random:lora:3", 3)
    assert set(a.layers) - set(b.layers)
    assert set(b.layers) - set(a.layers)
    first = engine_of(base, [a])
    now = dict(first)
    for old, new in ((a, [b]), (b, [a])):
        now |= refit_weights(base, old.layers, new, DTYPE)
    assert same(now, first)
    now |= refit_weights(base, a.layers, [b], DTYPE)
    assert same(now, engine_of(base, [b]))
    now |= refit_weights(base, b.layers, [], DTYPE)
    assert same(now, engine_of(base, []))
    assert not same(first, engine_of(base, [b]))


def test_without_the_union_it_would_not(base: Base) -> None:
    a, b = partly(base, "random:tlora:2:6", 2), partly(base, "random:lora:3", 3)
    now = engine_of(base, [a]) | refit_weights(base, [], [b], DTYPE)
    assert not same(now, engine_of(base, [b]))


def test_the_weights_are_those_of_the_export(half_artifact: Artifact) -> None:
    base, adapters = half_artifact.sources()
    held = {i.name: numpy_helper.to_array(i) for i in onnx.load(half_artifact.onnx_path).graph.initializer}
    weights = refit_weights(base, [], adapters, "fp16")
    assert set(weights) == {f"{path}.weight" for path in adapters[0].layers}
    for (
        name,
        tensor,
    ) in weights.items():  # named as the graph's initialisers are, so that the engine has them by these names
        assert bits(tensor) == bits(torch.from_numpy(held[name].copy()))
        assert tensor.is_contiguous()


def test_a_name_that_the_engine_lacks() -> None:
    check_names(["a.weight"], ["a.weight", "b.weight"])
    with pytest.raises(ExportError, match="'a.weight'"):
        check_names(["a.weights"], ["a.weight", "b.weight"])


@pytest.fixture(scope="module")
def refittable(tmp_path_factory: pytest.TempPathFactory, half_artifact: Artifact) -> Artifact:
    """An engine whose record says that it was built with REFIT, as one on a machine with a GPU would be."""
    base, adapters = half_artifact.sources()
    out = tmp_path_factory.mktemp("refit") / "engine"
    options = EngineOptions((default_profile(half_artifact, base),), ("sm89",))
    build_engine(half_artifact, base, adapters, out, engine_backend_of("tensorrt-rtx"), options)
    manifest = Manifest.read(out)
    assert manifest.engine is not None
    layers = {path: list(base.weight_shapes()[path]) for path in adapters[0].layers}
    settings = manifest.engine["settings"] | {"flags": ["REFIT"]}
    replace(manifest, engine={**manifest.engine, "settings": settings, "layers": layers}).write(out)
    return open_artifact(out)


def with_settings(artifact: Artifact, **settings: object) -> Artifact:
    assert artifact.manifest.engine is not None
    engine = {**artifact.manifest.engine, "settings": {**artifact.manifest.engine["settings"], **settings}}
    return replace(artifact, manifest=replace(artifact.manifest, engine=engine))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_a_refit_without_the_gpu_is_refused(refittable: Artifact, tmp_path: Path) -> None:
    base, adapters = refittable.sources()
    with pytest.raises(MissingError, match="GPU"):
        refit_engine(refittable, base, adapters, tmp_path / "out")
    assert leftovers(tmp_path) == []
    assert refit_engine(refittable, base, adapters, tmp_path / "out", dry_run=True) is None


def test_engines_that_were_not_built_for_it(refittable: Artifact, half_artifact: Artifact, tmp_path: Path) -> None:
    base, adapters = refittable.sources()
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="--refit"):
        refit_engine(with_settings(refittable, flags=[]), base, adapters, out)
    stripped = with_settings(refittable, flags=["REFIT_IDENTICAL", "STRIP_PLAN"], strip=True)
    with pytest.raises(UsageError, match="--onnx"):
        refit_engine(stripped, base, [], out)
    with pytest.raises(UsageError, match="no others"):
        refit_engine(stripped, base, adapters, out, half_artifact)
    with pytest.raises(ArtifactError, match="hash differs"):
        refit_engine(refittable, open_base("sample:digits"), adapters, out)
    other = replace(half_artifact, manifest=replace(half_artifact.manifest, adapters=()))
    with pytest.raises(ArtifactError, match="built from"):
        refit_engine(stripped, base, [], out, other)
    assert leftovers(tmp_path) == []


UNET, TEXT = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "text_model.encoder.layers.0.self_attn.q_proj"


def of_pipeline(
    engine: Artifact, pipelines: Path, folder: Path, adapters: Sequence[str] = (), *, whole: bool = True
) -> Artifact:
    """The engine as one of a whole pipeline, its text encoder with adapters in it; or of that pipeline's UNet alone."""
    base = open_base(str(pipelines / "sd"))
    found = opened(pipelines / "sd").components["text_encoder"]
    bound = open_adapters(adapters, base, lambda: {"text_encoder": found.source})
    records = tuple(part.record() for part in on_component(bound, "text_encoder"))
    component = ComponentRecord(found.class_name, "fp32", None, None, 18, component_spec(found, "fp32"), "", records)
    assert engine.manifest.engine is not None
    manifest = replace(
        engine.manifest,
        engine={**engine.manifest.engine, "layers": {}},  # this test's are of another UNet
        base=BaseRecord(base.name, base.content_hash()),
        adapters=tuple(adapter.record() for adapter in bound),
        components={"text_encoder": component} if whole else {},
    )
    copy_of(engine.folder, folder)
    manifest.write(folder)
    return open_artifact(folder)


def both(file: Path, factor: float = 1.0) -> Path:
    """A LoRA on a layer of the tiny UNet, and on one of its text encoder."""
    tensors = {f"unet.{UNET}.lora_A.weight": torch.ones(2, 64), f"unet.{UNET}.lora_B.weight": torch.ones(64, 2)}
    tensors |= {f"text_encoder.{TEXT}.lora_A.weight": factor * torch.ones(2, 32)}
    tensors |= {f"text_encoder.{TEXT}.lora_B.weight": torch.ones(32, 2)}
    safetensors.torch.save_file(tensors, file)
    return file


def test_text_encoders_are_not_refitted(
    refittable: Artifact, pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They lie beside the engine as they are: with what was merged into them, and nothing else."""
    old, new = both(tmp_path / "old.safetensors"), both(tmp_path / "new.safetensors", 2.0)
    engine = of_pipeline(refittable, pipelines, tmp_path / "engine", [str(old)])
    for adapters in ([], [f"{old}=0.5"], [new], [old, new], ["random:lora:2"]):
        assert run_cli(["refit", engine.folder, *adapters, "-o", tmp_path / "out", "--dry-run"]) == 2, adapters
        error = capsys.readouterr().err
        assert f"its text_encoder has {old}=1 merged into it" in error
        assert "--unet-only" in error
    # the same adapter again, for instance into an engine without its weights
    assert run_cli(["refit", engine.folder, old, "-o", tmp_path / "out", "--dry-run"]) == 0
    plain = of_pipeline(refittable, pipelines, tmp_path / "plain")
    assert run_cli(["refit", plain.folder, new, "-o", tmp_path / "out", "--dry-run"]) == 2
    assert "its text_encoder has no adapter merged into it, asked for is" in capsys.readouterr().err
    unet = pipelines / "sd" / "unet"  # where nothing is known of text encoders
    assert run_cli(["refit", plain.folder, new, "-o", tmp_path / "out", "--base", unet, "--dry-run"]) == 2
    assert run_cli(["refit", plain.folder, "random:lora:2", "-o", tmp_path / "out", "--dry-run"]) == 0
    capsys.readouterr()


def test_of_an_engine_of_a_unet_alone_the_unet_is_refitted(
    refittable: Artifact, pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = of_pipeline(refittable, pipelines, tmp_path / "engine", whole=False)
    new = both(tmp_path / "new.safetensors")
    assert run_cli(["refit", engine.folder, new, "-o", tmp_path / "out", "--dry-run"]) == 0
    assert "1 layers of text_encoder are left out" in capsys.readouterr().err


def test_command_line(refittable: Artifact, onnx_artifact: Artifact, adapter_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_cli(["refit", refittable.folder, adapter_folder, "-o", out, "--dry-run"]) == 0
    assert run_cli(["refit", onnx_artifact.folder, adapter_folder, "-o", out]) == 1  # no engine
    if not torch.cuda.is_available():
        assert run_cli(["refit", refittable.folder, adapter_folder, "-o", out]) == 4
    assert leftovers(tmp_path) == []
