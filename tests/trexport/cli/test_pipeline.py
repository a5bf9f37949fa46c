"""Whole pipelines on the command line: layout, what is said, `--unet-only`, `--dry-run`, wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trexport.helpers import copy_of, leftovers, run_cli
from tests.trexport.pipelines import STATIC, VAE_WEIGHTS, edit_json
from trexport.artifact import open_artifact
from trexport.hashing import sha256_of_file
from trexport.models import pipeline as module
from trexport.models.base import open_base

MODEL = ["config.json", "model.onnx", "model.onnx_data"]


@pytest.fixture(scope="module")
def checked(pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Stable Diffusion with a safety checker in its index."""
    folder = copy_of(pipelines / "sd", tmp_path_factory.mktemp("base") / "sd")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit_json(folder / "model_index.json", safety_checker=checker)
    return folder


def test_layout_manifest_and_what_is_said(checked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    edit_json(copied := copy_of(checked, tmp_path / "base") / "vae" / "config.json", force_upcast=True)
    base = copied.parent.parent
    assert run_cli(["onnx", base, "-o", out, "--dtype", "fp16", "--static", *STATIC]) == 0
    text = capsys.readouterr().out
    assert "safety_checker           StableDiffusionSafetyChecker, left out" in text
    assert "vae_decoder              AutoencoderKL fp32: the VAE's config has force_upcast" in text
    copies = {name: leftovers(base / name) for name in ("tokenizer", "scheduler")}
    models = dict.fromkeys(("text_encoder", "unet", "vae_decoder", "vae_encoder"), MODEL)
    assert {path.name: leftovers(path) for path in out.iterdir() if path.is_dir()} == models | copies
    for name in copies:
        for file in (base / name).iterdir():
            assert (out / name / file.name).read_bytes() == file.read_bytes()
    index = json.loads((out / "model_index.json").read_text())
    given = json.loads((base / "model_index.json").read_text())
    assert index == given | {"safety_checker": [None, None]}
    manifest = open_artifact(out).manifest
    files = {p.relative_to(out).as_posix(): sha256_of_file(p) for p in out.rglob("*") if p.is_file()}
    del files["trexport.json"]
    assert manifest.files == files
    assert {name: (r.class_name, r.dtype) for name, r in manifest.components.items()} == {
        "text_encoder": ("CLIPTextModel", "fp16"),
        "vae_encoder": ("AutoencoderKL", "fp32"),
        "vae_decoder": ("AutoencoderKL", "fp32"),
    }
    assert manifest.left_out == {"safety_checker": "StableDiffusionSafetyChecker"}
    assert open_artifact(out).onnx_path == out / "unet" / "model.onnx"
    assert run_cli(["inspect", out, "--all"]) == 0
    shown = capsys.readouterr().out
    assert "vae_decoder: latent_sample" in shown
    assert "AutoencoderKL" in shown
    assert run_cli(["inspect", out, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["components"]["vae_decoder"]["dtype_reason"] == "the VAE's config has force_upcast"


def test_unet_only(checked: Path, tmp_path: Path) -> None:
    assert run_cli(["onnx", checked, "-o", tmp_path / "out", "--unet-only", "--static", *STATIC]) == 0
    assert leftovers(tmp_path / "out") == ["trexport.json", "unet"]
    assert open_artifact(tmp_path / "out").manifest.components == {}


def test_a_dry_run_counts_the_components_and_writes_nothing(
    checked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []
    for flags in ([], ["--unet-only"]):
        assert run_cli(["onnx", checked, "-o", tmp_path / "out", "--dry-run", "--json", *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        sizes.append(found["size_bytes"])
        assert found["components"] == ([] if flags else ["text_encoder", "vae_encoder", "vae_decoder"])
    bases = [open_base(str(checked)).size_bytes]
    bases.append(sum((checked / file).stat().st_size for file in ("text_encoder/model.safetensors", VAE_WEIGHTS)))
    assert sizes[1] == bases[0]
    assert sizes[0] == pytest.approx(sum(bases), rel=0.01)
    assert run_cli(["onnx", checked, "-o", tmp_path / "out", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "vae_encoder" in text
    assert "safety_checker" in text
    assert leftovers(tmp_path) == []


def test_wrong_input_is_one_message_and_leaves_nothing(
    checked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = copy_of(checked, tmp_path / "base")
    weights = (base / VAE_WEIGHTS).read_bytes()
    (base / VAE_WEIGHTS).write_bytes(weights[:-5])
    assert run_cli(["onnx", base, "-o", tmp_path / "out"]) == 1
    error = capsys.readouterr().err
    assert error.count("Error: ") == 1
    assert "truncated" in error
    (base / VAE_WEIGHTS).write_bytes(weights)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert run_cli(["onnx", base, "-o", tmp_path / "out"]) == 4
    assert "trexport[pipelines]" in capsys.readouterr().err
    assert leftovers(tmp_path) == ["base"]
