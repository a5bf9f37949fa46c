"""examples/training/train_control.py, really run on tiny pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image

from tests.examples.conftest import SIDE, write_photos
from tests.trexport.helpers import run_cli
from trlora import attach_, load_adapter, shapes_of

Failing = Callable[..., str]
SIZES = [(24, 20), (20, 31), (16, 16)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """image/, conditioning/ (half as large) and captions/."""
    root = tmp_path_factory.mktemp("control") / "data"
    write_photos(root / "image", SIZES)
    write_photos(root / "conditioning", [(width // 2, height // 2) for width, height in SIZES])
    (root / "captions").mkdir()
    for number in range(3):
        (root / "captions" / f"{number}.txt").write_text(f"the dog {number}\n")
    return root


def arguments_of(base: Path | str, data: Path, out: Path, **more: Any) -> list[str]:
    options = {
        "pretrained_model_name_or_path": base, "train_data_dir": data, "output_dir": out, "resolution": SIDE,
        "train_batch_size": 2, "max_train_steps": 4, "learning_rate": 3e-2, "report_to": "none", "num_inference_steps": 2,
        "num_validation_images": 1, "control_rank": 4,
    }  # fmt: skip
    found: list[str] = []
    for name, value in (options | more).items():
        found += [f"--{name}"] if value is True else [] if value is None else [f"--{name}", str(value)]
    return found


def feeds(width: int, *, sdxl: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    found: dict[str, Any] = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(300),
        "encoder_hidden_states": torch.randn(2, 5, width, generator=generator),
        "return_dict": False,
    }
    if sdxl:
        ids = torch.tensor([16.0, 16, 0, 0, 16, 16]).expand(2, 6)
        found["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": ids}
    return found


@pytest.mark.parametrize(("kind", "conditioning"), [("sd", "canny"), ("sdxl", "files")])
def test_what_is_trained_is_merged_and_steers_the_unet(
    kind: str, conditioning: str, recipes: SimpleNamespace, pipelines: Path, folders: Path, tmp_path: Path
) -> None:
    out, base = tmp_path / "out", pipelines / kind
    recipes.train_control.main(
        arguments_of(
            base, folders, out, conditioning=conditioning, random_flip=True, proportion_empty_prompts=0.3,
            validation_prompt="a cat", validation_image=folders / "image" / "0.png", checkpointing_steps=4,
            gradient_checkpointing=True,
        )
    )  # fmt: skip
    shown = sorted(path.name for path in (out / "validation").iterdir())
    assert shown == ["step-000004-0-0.png", "step-000004-0-condition.png"]
    adapter = load_adapter(out / "adapter")
    assert adapter.config.base_model.class_name == "ControlNetModel"

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    inputs = feeds(unet.config["cross_attention_dim"], sdxl=kind == "sdxl")
    control = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))

    def asked(branch: ControlNetModel) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            down, middle = branch(**inputs, controlnet_cond=control)
            steered = unet(**inputs, down_block_additional_residuals=down, mid_block_additional_residual=middle)
        return (*down, middle, *steered)

    fresh = ControlNetModel.from_pretrained(out / "branch")
    at_start = asked(fresh)
    with torch.no_grad():
        assert torch.equal(at_start[-1], unet(**inputs)[0])  # its zero convolutions: it changes nothing yet
    attach_(fresh, adapter.bind(shapes_of(fresh)))
    factored = asked(fresh)
    assert run_cli(["merge", out / "branch", out / "adapter", "-o", tmp_path / "merged"]) == 0
    merged = asked(ControlNetModel.from_pretrained(tmp_path / "merged"))
    for found, expected in zip(merged, factored, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(tensor.abs().max() > 1e-4 for tensor in merged[:-1])
    assert (merged[-1] - at_start[-1]).norm() > 1e-3 * at_start[-1].norm()


def test_a_trained_branch_is_gone_on_with_and_only_its_attention_is_adapted(
    recipes: SimpleNamespace, pipelines: Path, folders: Path, tmp_path: Path, failing: Failing
) -> None:
    common: dict[str, Any] = {"checkpointing_steps": 2}
    recipes.train_control.main(arguments_of(pipelines / "sd", folders, tmp_path / "whole", **common))
    parts = arguments_of(pipelines / "sd", folders, tmp_path / "parts", **common)
    recipes.train_control.main([*parts, "--max_train_steps", "2"])
    recipes.train_control.main([*parts, "--resume_from_checkpoint", "latest"])
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    branch = tmp_path / "whole" / "branch"
    more = {"controlnet_model_name_or_path": branch, "max_train_steps": 1}
    recipes.train_control.main(arguments_of(pipelines / "sd", folders, tmp_path / "third", **more))
    layers = load_adapter(tmp_path / "third" / "adapter").layers
    assert layers
    assert all(".attn" in path for path in layers)
    wrong = arguments_of(pipelines / "sdxl", folders, tmp_path / "fourth", **more)
    assert "cross_attention_dim is 32" in failing("train_control", wrong, 1)


def test_samples_are_cut_and_mirrored_together(
    recipes: SimpleNamespace, pipelines: Path, folders: Path, tmp_path: Path
) -> None:
    """Conditions that are the pictures themselves: latents and control have to show the same square, the same way round."""
    data = tmp_path / "data"
    lines = [
        {"file_name": f"image/{n}.png", "conditioning_image": f"image/{n}.png", "text": f"caption {n}"}
        for n in range(3)
    ]
    data.mkdir()
    (data / "image").symlink_to(folders / "image")
    (data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = recipes.train_control.options_of(
        arguments_of(pipelines / "sd", data, tmp_path / "out", random_flip=True, proportion_empty_prompts=0.5)
    )
    components = recipes.components.load_components(str(pipelines / "sd"))
    pairs = recipes.pairs.pairs_in(data, conditions=True)
    assert [pair.caption for pair in pairs] == ["caption 0", "caption 1", "caption 2"]
    sizes = recipes.images.check([pair.image for pair in pairs], SIDE)
    from accelerate import Accelerator

    found, keys = recipes.train_control.cached_data(
        components, pairs, sizes, [pair.condition for pair in pairs], options, Accelerator(cpu=True)
    )
    empty, seen = found.cache[keys[""]]["states"], set()
    torch.manual_seed(0)
    for _ in range(40):
        sample = found[1]
        with torch.no_grad():
            latents = components.vae.encode(sample["control"][None] * 2 - 1).latent_dist
        torch.testing.assert_close(sample["mean"], latents.mean[0], rtol=1e-3, atol=1e-4)
        caption = found.cache[keys["caption 1"]]["states"]
        left_out = torch.equal(sample["states"], empty)
        assert left_out or torch.equal(sample["states"], caption)
        seen.add((left_out, round(float(sample["mean"][0, 0, 0]), 4)))
    assert len(seen) == 4  # with and without the caption, either way round


def test_colours_of_a_segmentation_are_not_mixed(recipes: SimpleNamespace, tmp_path: Path) -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]], dtype=np.uint8)
    Image.fromarray(colours.repeat(9, 0).repeat(11, 1)).save(tmp_path / "map.png")
    crop = recipes.images.Crop.of((22, 18), SIDE)
    condition = recipes.control_data.condition_of
    whole = condition(tmp_path / "map.png", crop, "segmentation").flatten(1).T
    assert {tuple(colour) for colour in whole.tolist()} == {tuple(c) for row in colours.tolist() for c in row}
    assert len(condition(tmp_path / "map.png", crop, "files").flatten(1).T.unique(dim=0)) > 4


def test_wrong_data_is_named(folders: Path, tmp_path: Path, failing: Failing) -> None:
    def said(data: Path, code: int = 1, **more: Any) -> str:
        return failing("train_control", arguments_of("nowhere", data, tmp_path / "out", **more), code)

    import shutil

    data = tmp_path / "data"
    shutil.copytree(folders, data)
    (data / "captions" / "0.txt").unlink()
    (data / "captions" / "1.txt").write_text(" \n")
    (data / "conditioning" / "2.png").unlink()
    found = said(data)
    assert "3 of 3 images lack something" in found
    assert "0.png: no caption; expected captions/0.txt" in found
    assert "1.png: captions/1.txt is empty" in found
    assert "2.png: no image called 2 in conditioning/" in found
    for number in range(3):
        (data / "image" / f"{number}.txt").write_text("a cat")
    (data / "captions" / "1.txt").write_text("a dog")
    write_photos(tmp_path / "wide", [(40, 20), (10, 15), (8, 8)])
    shutil.rmtree(data / "conditioning")
    shutil.copytree(tmp_path / "wide", data / "conditioning")
    assert "1 of 3 conditions do not go with their pictures" in said(data)
    assert "0.png: 40×20 pixels, its picture has 24×20" in said(data)

    listed = tmp_path / "listed"
    shutil.copytree(folders / "image", listed / "image")
    shutil.copytree(folders / "conditioning", listed / "edges")
    lines = [
        json.dumps({"file_name": "image/0.png", "conditioning_image": "edges/0.png", "text": "a cat"}),
        "{",
        json.dumps({"image": "image/1.png", "conditioning_image": "edges/1.png"}),
        json.dumps({"image": "image/9.png", "conditioning_image": "edges/1.png", "text": "a dog"}),
    ]
    (listed / "metadata.jsonl").write_text("\n".join(lines))
    found = said(listed)
    assert "3 of 4 lines cannot be used" in found
    assert "line 2: not JSON" in found
    assert "line 3: no caption in 'text' (fields found: 'image', 'conditioning_image')" in found
    assert "line 4: image/9.png: no such file" in found
    (listed / "metadata.jsonl").write_text("\n")
    assert "no images" in said(listed)
    (listed / "metadata.jsonl").unlink()
    shutil.rmtree(listed / "image")
    assert "neither metadata.jsonl nor image/" in said(listed)
    assert "give both" in said(folders, 2, validation_prompt="a cat")
    assert "--control_rank is 0" in said(folders, 2, control_rank=0)
    assert not (tmp_path / "out").exists()
