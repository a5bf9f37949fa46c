"""What a refit writes: computed from the base, over what the old and the new adapters touch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from tests.helpers import bits
from tests.trexport.helpers import leftovers, run_cli, weights_of
from trexport.artifact import Artifact, open_artifact
from trexport.backends import EngineOptions, engine_backend_of
from trexport.backends.trt.refit import check_names
from trexport.engine import build_engine, default_profile
from trexport.errors import ArtifactError, ExportError, MissingError, UsageError
from trexport.manifest import Manifest
from trexport.models.adapters import BoundAdapter, open_adapters
from trexport.models.base import Base, open_base
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


def test_command_line(refittable: Artifact, onnx_artifact: Artifact, adapter_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_cli(["refit", refittable.folder, adapter_folder, "-o", out, "--dry-run"]) == 0
    assert run_cli(["refit", onnx_artifact.folder, adapter_folder, "-o", out]) == 1  # no engine
    if not torch.cuda.is_available():
        assert run_cli(["refit", refittable.folder, adapter_folder, "-o", out]) == 4
    assert leftovers(tmp_path) == []
