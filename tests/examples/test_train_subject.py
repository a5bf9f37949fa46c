"""examples/training/train_subject.py, really run on tiny pipelines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.examples.conftest import RECIPES, SIDE, write_photos
from tests.trexport.helpers import run_cli
from trlora import attach_, load_adapter, shapes_of
from trlora.training import load_state

Failing = Callable[..., str]


def arguments_of(base: Path | str, photos: Path, out: Path, **more: Any) -> list[str]:
    """Options as a list; True is a flag, None leaves out."""
    options = {
        "pretrained_model_name_or_path": base, "instance_data_dir": photos, "instance_prompt": "the cat",
        "output_dir": out, "resolution": SIDE, "train_batch_size": 2, "max_train_steps": 3, "learning_rate": 1e-2,
        "report_to": "none", "num_inference_steps": 2, "num_validation_images": 1,
    }  # fmt: skip
    found: list[str] = []
    for name, value in (options | more).items():
        found += [f"--{name}"] if value is True else [] if value is None else [f"--{name}", str(value)]
    return found


def run(recipes: SimpleNamespace, *arguments: Any, **more: Any) -> None:
    recipes.train_subject.main(arguments_of(*arguments, **more))


def feeds(unet: UNet2DConditionModel) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    width = unet.config["cross_attention_dim"]
    found: dict[str, Any] = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(300),
        "encoder_hidden_states": torch.randn(2, 5, width, generator=generator),
    }
    if unet.config["addition_embed_type"] == "text_time":
        ids = torch.tensor([16.0, 16, 0, 0, 16, 16]).expand(2, 6)
        found["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": ids}
    return found


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
def test_what_is_trained_is_merged_and_loaded_by_diffusers(
    kind: str, recipes: SimpleNamespace, pipelines: Path, photos: Path, tmp_path: Path
) -> None:
    out, base = tmp_path / "out", pipelines / kind
    run(
        recipes, base, photos, out, with_prior_preservation=True, class_data_dir=tmp_path / "class", class_prompt="the dog",
        num_class_images=4, random_flip=True, use_ema=True, penalty_weight=1e-4, validation_prompt="a cat",
        validation_steps=2, checkpointing_steps=2, checkpoints_total_limit=1, report_to="tensorboard", snr_gamma=5,
        gradient_checkpointing=True,
    )  # fmt: skip
    drawn = sorted(path.name for path in (tmp_path / "class").iterdir())
    assert drawn == [f"drawn-{number:05d}.png" for number in range(4)]
    assert len({(tmp_path / "class" / name).read_bytes() for name in drawn}) == 4
    shown = sorted(path.name for path in (out / "validation").iterdir())
    assert shown == ["step-000002-0-0.png", "step-000003-0-0.png"]
    assert Image.open(out / "validation" / shown[0]).size == (SIDE, SIDE)
    events = EventAccumulator(str(out / "logs" / "log")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.step for event in events.Images("validation")] == [2, 3]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-000003"]

    assert run_cli(["merge", base, out / "adapter", "-o", tmp_path / "merged"]) == 0
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged")
    plain = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    adapter = load_adapter(out / "adapter")
    assert adapter.config.base_model.name_or_path == str(base)
    with torch.no_grad():
        before = plain(**feeds(plain)).sample
        attach_(plain, adapter.bind(shapes_of(plain)))
        adapted, found = plain(**feeds(plain)).sample, merged(**feeds(merged)).sample
    torch.testing.assert_close(found, adapted, rtol=1e-4, atol=1e-5)
    assert (found - before).norm() > 1e-3 * before.norm()


def test_training_lowers_the_loss(recipes: SimpleNamespace, pipelines: Path, photos: Path, tmp_path: Path) -> None:
    """Asked with the same noise at the same timesteps, before and after."""
    arguments = arguments_of(pipelines / "sd", photos, tmp_path, max_train_steps=16, train_batch_size=6)
    recipes.train_subject.main(arguments)
    options = recipes.train_subject.options_of(arguments)
    components = recipes.components.load_components(str(pipelines / "sd"))
    paths = recipes.images.images_in(photos)
    sizes = recipes.images.check(paths, SIDE)
    data, _ = recipes.train_subject.cached_data(components, paths, sizes, options, Accelerator(cpu=True))
    batch = torch.utils.data.default_collate([data[number % 3] for number in range(48)])

    def loss() -> float:
        torch.manual_seed(8)
        with torch.no_grad():
            found = recipes.train_subject.subject_loss(
                components.unet, batch, components=components, prior_loss_weight=1.0, snr_gamma=None
            )
        return float(found)

    before = loss()
    attach_(components.unet, load_adapter(tmp_path / "adapter").bind(shapes_of(components.unet)))
    after = loss()
    assert after < 0.95 * before


def test_a_stopped_training_goes_on_to_the_same_bytes_or_is_refused(
    recipes: SimpleNamespace, pipelines: Path, photos: Path, tmp_path: Path, failing: Failing
) -> None:
    common: dict[str, Any] = {"checkpointing_steps": 2, "random_flip": True, "max_train_steps": 4}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(recipes, pipelines / "sd", photos, whole, **common)
    run(recipes, pipelines / "sd", photos, parts, **common | {"max_train_steps": 2})
    arguments = arguments_of(pipelines / "sd", photos, parts, **common)
    said = failing("train_subject", arguments, 2)
    assert "--resume_from_checkpoint latest goes on with it" in said
    for changed, words in (
        ({"instance_prompt": "another"}, "instance_prompt 'the cat' there and 'another' here"),
        ({"residual": "low_rank:2"}, "residual 'tensor_ring:6' there and 'low_rank:2' here"),
        ({"learning_rate": 3e-2}, "learning_rate 0.01 there and 0.03 here"),
    ):
        changes: dict[str, Any] = {**common, "resume_from_checkpoint": "latest", **changed}
        assert words in failing("train_subject", arguments_of(pipelines / "sd", photos, parts, **changes), 2)
    others = write_photos(tmp_path / "others", [(16, 16), (17, 16), (20, 20)])
    (others / "0.png").write_bytes((photos / "0.png").read_bytes())
    resumed = arguments_of(pipelines / "sd", others, parts, resume_from_checkpoint="latest", **common)
    assert "data files are not the same" in failing("train_subject", resumed, 2)
    missing = arguments_of(pipelines / "sd", photos, parts, resume_from_checkpoint="checkpoint-000009", **common)
    assert "no such checkpoint" in failing("train_subject", missing, 2)

    recipes.train_subject.main([*arguments, "--resume_from_checkpoint", "checkpoint-000002"])
    name = "adapter/adapter_model.safetensors"
    assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert load_state(parts / "checkpoint-000004").step == 4


def test_no_memory_says_what_would_fit_and_loses_nothing(
    recipes: SimpleNamespace, pipelines: Path, photos: Path, tmp_path: Path, failing: Failing, monkeypatch: Any
) -> None:
    real, calls = recipes.train_subject.noised, []

    def full(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*arguments)

    monkeypatch.setattr(recipes.train_subject, "noised", full)
    arguments = arguments_of(pipelines / "sd", photos, tmp_path, checkpointing_steps=2)
    said = failing("train_subject", arguments, 1)
    assert "step 2: out of memory" in said
    assert "a batch size of 1 with 2 accumulated" in said
    assert "gradient checkpointing" in said
    assert "mixed precision" in said
    assert str(tmp_path / "checkpoint-000002") in said
    assert load_adapter(tmp_path / "checkpoint-000002").layers


def test_no_memory_while_encoding_is_one_message(
    recipes: SimpleNamespace, pipelines: Path, photos: Path, tmp_path: Path, failing: Failing, monkeypatch: Any
) -> None:
    def full(*arguments: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(recipes.subject_data, "latents_of", full)
    said = failing("train_subject", arguments_of(pipelines / "sd", photos, tmp_path), 1)
    assert "out of memory outside of the training steps" in said


def test_wrong_data_is_named_before_anything_is_loaded(
    photos: Path, tmp_path: Path, failing: Failing, recipes: SimpleNamespace, monkeypatch: Any
) -> None:
    monkeypatch.setattr(recipes.setting_up, "load_components", lambda *_, **__: pytest.fail("loaded"))

    def said(folder: Path, code: int = 1, **more: Any) -> str:
        return failing("train_subject", arguments_of("nowhere", folder, tmp_path / "out", **more), code)

    assert "no such folder, expected one with images" in said(tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no images" in said(empty)
    (empty / "notes.txt").write_text("hello")
    assert "found 1 other files, notes.txt first" in said(empty)
    mixed = write_photos(tmp_path / "mixed", [(20, 20), (3, 30)])
    (mixed / "2.png").write_bytes(b"no picture")
    (mixed / "3.png").write_bytes((mixed / "0.png").read_bytes()[:60])
    found = said(mixed)
    assert "3 of 4 images cannot be used at --resolution 16" in found
    assert "1.png: 3×30 pixels, expected 4 at least" in found
    assert "2.png: unreadable" in found
    assert "3.png: unreadable" in found
    assert "max_grad_norm is -1.0" in said(photos, 1, max_grad_norm=-1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ({"with_prior_preservation": True}, 2, "needs --class_data_dir and --class_prompt"),
        ({"class_prompt": "a dog"}, 2, "are for --with_prior_preservation"),
        ({"transform": "tensor_rng:2"}, 2, "the nearest existing name is 'tensor_ring'"),
        ({"residual": "low_rank:two"}, 2, "expected NAME, or NAME:SIZE"),
        ({"residual": "none:2"}, 2, "none has no size"),
        ({"train_batch_size": 0}, 2, "--train_batch_size is 0"),
        ({"lr_warmup_steps": 5}, 2, "use constant_with_warmup"),
        ({"pretrained_model_name_or_path": "random:sd16"}, 2, "unknown architecture"),
        ({"pretrained_model_name_or_path": "random:flux-tiny"}, 2, "a FluxTransformer2DModel, expected a UNet"),
        ({"pretrained_model_name_or_path": "somewhere"}, 2, "no such folder; expected a diffusers pipeline's folder"),
        ({"pretrained_model_name_or_path": "random:tiny", "resolution": 18}, 2, "takes multiples of 4"),
        ({"pretrained_model_name_or_path": "random:tiny", "targets": "nothing"}, 1, "choose no module"),
    ],
    ids=str,
)
def test_wrong_options_are_one_message(
    more: dict[str, Any], code: int, words: str, photos: Path, tmp_path: Path, failing: Failing
) -> None:
    assert words in failing("train_subject", arguments_of("somewhere", photos, tmp_path / "out", **more), code)


def test_parts_of_a_pipeline_that_are_missing_are_named(
    pipelines: Path, photos: Path, tmp_path: Path, failing: Failing
) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(pipelines / "sd", base)
    shutil.rmtree(base / "vae")
    assert f"{base}: vae cannot be loaded" in failing("train_subject", arguments_of(base, photos, tmp_path / "out"), 1)
    alone = arguments_of(base / "unet", photos, tmp_path / "out")
    assert "training needs a whole pipeline" in failing("train_subject", alone, 2)


def test_accelerate_launches_it(pipelines: Path, photos: Path, tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    arguments = arguments_of(pipelines / "sd", photos, tmp_path, mixed_precision="bf16", max_train_steps=2)
    done = subprocess.run(
        [sys.executable, *launch, str(RECIPES / "train_subject.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPES.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 2/2" in done.stderr
    assert f"trexport merge {pipelines / 'sd'} {tmp_path / 'adapter'}" in done.stderr
    assert load_adapter(tmp_path / "adapter").layers
    assert load_state(tmp_path / "checkpoint-000002").config.mixed_precision == "bf16"
