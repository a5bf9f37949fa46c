"""The whole line for architectures beside the UNet: merged, factored, a bank, swappable, engines; by the libraries' own
classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor

from tests.helpers import bits
from tests.trexport.architectures import TINY, save_rectangular, sizes_of
from tests.trexport.helpers import leftovers, merged_in_float64, run_cli, run_onnx, weights_of, write_model
from trexport.artifact import Artifact, open_artifact
from trexport.backends import EngineOptions, engine_backend_of
from trexport.engine import build_engine
from trexport.errors import TrexportError, UsageError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.swappable import SwappableOptions
from trexport.merging import merge
from trexport.models.adapters import open_adapters
from trexport.models.base import Base, open_base
from trexport.models.model import attach_all_, load_model, merge_into_, outputs_of, random_feeds
from trexport.parity.metrics import relative_l2
from trexport.parity.validate import ValidateOptions, validate
from trexport.profile import Profile
from trexport.session import Session
from trlora import CheckpointError, TrloraError

CLOSE = 1e-5
"""Relative L2 in float32, the UNet's gate."""


def close(found: list[Tensor], expected: tuple[Tensor, ...] | list[Tensor]) -> bool:
    return all(relative_l2(a, b) <= CLOSE for a, b in zip(found, expected, strict=True))


def attached(base: Base, adapters: list[str], feeds: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """One step of the model with adapters attached, never merged."""
    model = load_model(base)
    attach_all_(model, open_adapters(adapters, base))
    with torch.no_grad():
        return outputs_of(model, feeds)


def own_class(base: Base) -> Any:
    name = base.architecture.class_name
    return getattr(diffusers if hasattr(diffusers, name) else transformers, name)


def options_for(base: Base, **more: Any) -> ValidateOptions:
    return ValidateOptions(timesteps=(1, 700), seeds=(0,), trajectory_steps=2, sizes=sizes_of(base), **more)


# --- dense -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_merged_folder_is_loaded_by_its_own_class(name: str, tmp_path: Path) -> None:
    base = open_base(str(write_model(tmp_path / "base", open_base(f"random:{name}"))))
    adapter = save_rectangular(tmp_path / "adapter", base, 1)
    bound = open_adapters([f"{adapter}=0.7"], base)
    merge(base, bound, tmp_path / "merged")
    artifact = open_artifact(tmp_path / "merged")
    assert artifact.manifest.kind == "dense"
    expected = merged_in_float64(base, [(adapter, 0.7)])
    found = weights_of(open_base(str(tmp_path / "merged")))
    changed = 0
    for tensor, wanted in expected.items():
        assert torch.allclose(found[tensor].double(), wanted, atol=1e-6), tensor
        changed += not torch.equal(found[tensor], weights_of(base)[tensor])
    assert changed == len(bound[0].layers)
    feeds = random_feeds(base.architecture.spec("fp32"), sizes_of(base), seed=5)
    model = own_class(base).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert close(list(outputs_of(model, feeds)), attached(base, [f"{adapter}=0.7"], feeds))
    report = validate(artifact, base, bound, "cpu", options_for(base))
    assert report.passed, report.failures
    assert (report.trajectory is None) == (base.architecture.sampling is None)


@pytest.mark.parametrize("name", ["sd3-tiny", "flux-tiny"])
def test_a_lora_of_peft_and_one_of_diffusers(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    base = open_base(str(write_model(tmp_path / "base", open_base(f"random:{name}"))))
    targets = ["to_q", "to_k", "add_v_proj", "to_add_out", "net.2"]
    theirs = get_peft_model(
        own_class(base).from_pretrained(tmp_path / "base"),
        LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False),
    )
    theirs.save_pretrained(str(tmp_path / "peft"))
    # diffusers has no alpha but in the header: here in the weights
    state = {
        f"transformer.{key.removeprefix('base_model.model.')}": tensor * (5 / 3 if "lora_B" in key else 1)
        for key, tensor in get_peft_model_state_dict(theirs).items()
    }
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    expected = theirs.merge_and_unload().state_dict()
    for adapter in ("peft", "pytorch_lora_weights.safetensors"):
        model = load_model(base)
        merge_into_(model, open_adapters([str(tmp_path / adapter)], base))
        found = model.state_dict()
        assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in expected)
        assert not torch.equal(
            found[changed := "transformer_blocks.0.attn.to_add_out.weight"], weights_of(base)[changed]
        )


# --- ONNX --------------------------------------------------------------------------------------------------------------


SHAPES: tuple[dict[str, int], ...] = (
    # odd numbers of patches on one side, one sample, as few tokens as there can be
    {"batch_size": 1, "height": 10, "width": 14, "packed_height_width": 35, "sequence_length": 1},
    {"batch_size": 3, "height": 2, "width": 24, "packed_height_width": 1, "sequence_length": 9},
)
"""None of them is traced with."""


@pytest.mark.parametrize(
    ("name", "form", "free"),
    [
        ("sd35-tiny", "swappable", True),
        ("flux-tiny", "factored", True),
        ("controlnet-tiny", "factored", False),
        ("clip-projection-tiny", "swappable", True),
    ],
)
def test_adapters_come_and_go(name: str, form: str, free: bool, tmp_path: Path) -> None:
    base = open_base(str(write_model(tmp_path / "base", open_base(f"random:{name}"))))
    one = str(save_rectangular(tmp_path / "one", base, 1))
    two = str(save_rectangular(tmp_path / "two", base, 2))
    blank = {"swappable": SwappableOptions(blank=True), "factored": FactoredOptions(blank=True)}[form]
    options = ExportOptions(fixed=None if free else sizes_of(base), **{form: blank})  # type: ignore[arg-type]
    export_onnx(base, open_adapters([one], base), tmp_path / "artifact", options)
    artifact = open_artifact(tmp_path / "artifact")
    folder = base.architecture.folder
    assert leftovers(artifact.folder) == sorted([folder, "trexport.json"])
    assert {"config.json", "model.onnx"} <= set(leftovers(artifact.folder / folder))
    assert set(artifact.manifest.io.free_axes) == (set(base.architecture.default_sizes()) if free else set())
    model = own_class(base).from_pretrained(tmp_path / "base").eval()
    with Session(artifact) as session:
        session.load_adapter("one", one)
        session.load_adapter("two", two)
        for number, sizes in enumerate([sizes_of(base), *(SHAPES if free else ())]):
            feeds = random_feeds(session.spec, sizes, seed=number, timestep=17.5)
            # unfed, in plain ONNX Runtime, it is the library's own model
            with torch.no_grad():
                expected = outputs_of(model, feeds)
            assert close(list(run_onnx(artifact.onnx_path, feeds).values()), expected), sizes
            session.activate({"one": 0.7})
            assert close(list(session.run(feeds).values()), attached(base, [f"{one}=0.7"], feeds)), sizes
        feeds = random_feeds(session.spec, sizes_of(base), seed=4)

        def draw(strengths: dict[str, float | None]) -> list[Tensor]:
            session.activate(strengths)
            return list(session.run(feeds).values())

        start, first, second = draw({}), draw({"one": 0.7}), draw({"two": -1.2})
        assert close(start, attached(base, [], feeds))
        assert close(second, attached(base, [f"{two}=-1.2"], feeds))
        for now, other in ((first, start), (second, start), (second, first)):
            assert max(relative_l2(a, b) for a, b in zip(now, other, strict=True)) > 1e-3
        assert [bits(t) for t in draw({"one": 0.7})] == [bits(t) for t in first]
        assert [bits(t) for t in draw({})] == [bits(t) for t in start]
        for left_out in feeds:
            with pytest.raises(UsageError, match=left_out):
                session.run({key: value for key, value in feeds.items() if key != left_out})
    report = validate(artifact, base, open_adapters([f"{two}=0.5"], base), "cpu", options_for(base))
    assert report.passed, report.failures
    shapes = {tuple(step.sizes.values()) for step in report.steps}
    assert len(shapes) == (2 if free else 1)
    assert all(len(set(sizes)) == len(shapes) for sizes in zip(*shapes, strict=True))  # no axis is the same twice
    assert run_cli(["deploy", "triton", artifact.folder, "-o", tmp_path / "repository"]) == 2  # for UNets only so far
    if name == "sd35-tiny":
        build_for_tensorrt_rtx(artifact, base, tmp_path / "engine")


def exported(base: Base, adapters: list[str], out: Path, **form: Any) -> Artifact:
    export_onnx(base, open_adapters(adapters, base), out, ExportOptions(fixed=sizes_of(base), **form))
    return open_artifact(out)


def build_for_tensorrt_rtx(artifact: Artifact, base: Base, out: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = EngineOptions(profiles=(Profile.of(sizes_of(base)),), targets=("sm89",))
    build_engine(artifact, base, [], out, engine_backend_of("tensorrt-rtx"), options)
    assert {"model.rtx", "config.json", "adapted.safetensors"} <= set(leftovers(out / base.architecture.folder))


def test_a_bank_of_flux(tmp_path: Path) -> None:
    """Positions are the same for all samples, adapters are not."""
    base = open_base("random:flux-tiny")
    names = [str(save_rectangular(tmp_path / str(seed), base, seed)) for seed in (1, 2)]
    artifact = exported(base, names, tmp_path / "bank", factored=FactoredOptions(bank=2))
    report = validate(artifact, base, open_adapters(names, base), "cpu", options_for(base))
    assert report.passed, report.failures
    assert [step.who for step in report.steps][-1] == "each its own"


@pytest.mark.slow
def test_aotinductor_of_several_outputs(tmp_path: Path) -> None:
    base = open_base("random:clip-tiny")
    one = str(save_rectangular(tmp_path / "one", base, 1))
    artifact = exported(base, [one], tmp_path / "onnx", swappable=SwappableOptions(blank=True))
    options = EngineOptions(profiles=(Profile.of(sizes_of(base)),))
    build_engine(artifact, base, [], tmp_path / "engine", engine_backend_of("aotinductor"), options)
    engine = open_artifact(tmp_path / "engine")
    report = validate(engine, base, open_adapters([one], base), "cpu", options_for(base))
    assert report.passed, report.failures
    assert list(leftovers(tmp_path / "engine" / "text_encoder"))[-1] == "model.pt2"


# --- wrong input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "of", "says"),
    [
        ("sd3-tiny", "tiny", "looks like one for a UNet, random:sd3-tiny is a transformer of Stable Diffusion 3"),
        ("sd3-tiny", "flux-tiny", "looks like one for Flux, random:sd3-tiny is a transformer of Stable Diffusion 3"),
        ("flux-tiny", "sd35-tiny", "looks like one for Stable Diffusion 3, random:flux-tiny is a transformer of Flux"),
        ("tiny", "clip-tiny", "looks like one for a text encoder, random:tiny like a UNet"),
        ("controlnet-tiny", "tiny", "looks like one for a UNet, random:controlnet-tiny is a ControlNet"),
        ("clip-tiny", "tiny", "looks like one for a UNet, random:clip-tiny is a text encoder"),
    ],
)
def test_an_adapter_of_another_architecture(base: str, of: str, says: str, tmp_path: Path) -> None:
    adapter = save_rectangular(tmp_path / "adapter", open_base(f"random:{of}"), 1)
    with pytest.raises(CheckpointError, match=says):
        open_adapters([str(adapter)], open_base(f"random:{base}"))
    assert run_cli(["merge", f"random:{base}", adapter, "-o", tmp_path / "merged"]) == 1
    assert leftovers(tmp_path) == ["adapter"]


def test_what_only_unets_have(tmp_path: Path) -> None:
    base = open_base("random:flux-tiny")
    merge(base, open_adapters(["random:lora:2"], base), tmp_path / "merged")
    options = EngineOptions(profiles=(Profile.of(sizes_of(base)),), optimization_level=1)
    with pytest.raises(
        (TrexportError, TrloraError), match="only UNets are rewritten, and this is a transformer of Flux"
    ):
        build_engine(
            open_artifact(tmp_path / "merged"), base, [], tmp_path / "x", engine_backend_of("aotinductor"), options
        )
    assert run_cli(["onnx", "random:flux-tiny", "-o", tmp_path / "y", "--height", "8"]) == 2
    assert run_cli(["onnx", "random:sd3-tiny", "-o", tmp_path / "y", "--static", "--height", "48", "--width", "8"]) == 2
    assert leftovers(tmp_path) == ["merged"]
