"""The parts of examples/training against diffusers' pipelines, SciPy, and the formulas in float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from tests.examples.conftest import SIDE


@pytest.fixture(params=["sd", "sdxl"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def components(kind: str, recipes: SimpleNamespace, pipelines: Path) -> Any:
    return recipes.components.load_components(str(pipelines / kind))


@pytest.fixture
def pipeline(kind: str, pipelines: Path) -> Any:
    pipe: Any = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[kind]
    found = pipe.from_pretrained(pipelines / kind)
    found.set_progress_bar_config(disable=True)
    return found


def test_prompts_are_encoded_as_by_diffusers(recipes: SimpleNamespace, components: Any, pipeline: Any) -> None:
    found = recipes.prompts.encode(components, "the cat, a dog")
    expected = pipeline.encode_prompt(
        "the cat, a dog", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(found["states"], expected[0][0], rtol=1e-5, atol=1e-6)
    assert ("pooled" in found) == components.sdxl
    if components.sdxl:
        torch.testing.assert_close(found["pooled"], expected[2][0], rtol=1e-5, atol=1e-6)


def test_a_prompt_that_is_too_long_is_said(recipes: SimpleNamespace, components: Any, capsys: Any) -> None:
    assert recipes.prompts.encode(components, "dog " * 100)["states"].shape[0] == 77
    assert "cut off after 77" in capsys.readouterr().err


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_pictures_are_those_of_the_pipeline(
    prediction: str, recipes: SimpleNamespace, components: Any, pipeline: Any
) -> None:
    components.scheduler.register_to_config(prediction_type=prediction)
    pipeline.scheduler = DDIMScheduler.from_config(
        components.scheduler.config, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    embeddings = {prompt: recipes.prompts.encode(components, prompt) for prompt in ("", "the cat")}
    without = recipes.prompts.negative(components, embeddings[""])
    drawn = recipes.drawing.draw(
        recipes.drawing.unet_predictor(components.unet),
        components,
        recipes.drawing.with_sizes(embeddings["the cat"], SIDE),
        recipes.drawing.with_sizes(without, SIDE),
        resolution=SIDE,
        seeds=[5, 6],
        steps=4,
        guidance=3.0,
    )
    latents = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    expected = pipeline(
        "the cat", latents=latents, num_inference_steps=4, guidance_scale=3.0, height=SIDE, width=SIDE,
        num_images_per_prompt=2,
    ).images  # fmt: skip
    assert len(drawn) == 2
    for found, wanted in zip(drawn, expected, strict=True):
        difference = np.abs(np.array(found).astype(int) - np.array(wanted).astype(int))
        assert difference.max() <= 1
        assert np.array(found).std() > 5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_target_and_weights_are_the_formulas(prediction: str, recipes: SimpleNamespace) -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.register_to_config(prediction_type=prediction)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    latents = torch.randn(5, 4, 3, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    noisy, timesteps, target = recipes.noising.noised(scheduler, latents)
    torch.manual_seed(2)
    noise, drawn = torch.randn_like(latents).double(), torch.randint(1000, (5,))
    assert torch.equal(timesteps, drawn)
    assert len(set(timesteps.tolist())) > 1
    a = kept[timesteps][:, None, None, None]
    x = latents.double()
    torch.testing.assert_close(noisy.double(), a.sqrt() * x + (1 - a).sqrt() * noise, rtol=1e-4, atol=1e-5)
    wanted = {"epsilon": noise, "sample": x, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x}[prediction]
    torch.testing.assert_close(target.double(), wanted, rtol=1e-4, atol=1e-5)

    predicted = torch.randn(5, 4, 3, 6, generator=torch.Generator().manual_seed(4))
    plain = torch.stack([((p - t) ** 2).mean() for p, t in zip(predicted.double(), wanted, strict=True)])
    found = recipes.noising.errors(predicted, target, scheduler, timesteps)
    torch.testing.assert_close(found.double(), plain, rtol=1e-4, atol=1e-6)
    snr = kept[timesteps] / (1 - kept[timesteps])
    least = torch.minimum(snr, torch.tensor(5.0, dtype=torch.float64))
    weights = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[prediction]
    found = recipes.noising.errors(predicted, target, scheduler, timesteps, 5.0)
    torch.testing.assert_close(found.double(), weights * plain, rtol=1e-3, atol=1e-6)


def test_prior_is_weighted(recipes: SimpleNamespace) -> None:
    """A model that answers zero: the error is the noise's own, of each part."""
    scheduler = DDPMScheduler()

    class Zero(torch.nn.Module):
        def forward(self, noisy: Any, timesteps: Any, states: Any, return_dict: bool) -> tuple[torch.Tensor]:
            return (torch.zeros_like(noisy),)

    def part(count: int) -> dict[str, torch.Tensor]:
        ones = torch.ones(count, 4, 2, 2)
        return {"mean": ones, "std": ones, "states": torch.zeros(count, 5, 7)}

    known = SimpleNamespace(scheduler=scheduler, scale=0.5)
    torch.manual_seed(0)
    batch = {"instance": part(3), "class": part(2)}
    loss = recipes.train_subject.subject_loss(Zero(), batch, components=known, prior_loss_weight=0.25, snr_gamma=None)
    torch.manual_seed(0)
    torch.randn(5, 4, 2, 2)  # the latents' own
    noise = torch.randn(5, 4, 2, 2).double()
    torch.testing.assert_close(loss.double(), (noise[:3] ** 2).mean() + 0.25 * (noise[3:] ** 2).mean())


def test_latents_are_cached_by_content(
    recipes: SimpleNamespace, pipelines: Path, photos: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    components = recipes.components.load_components(str(pipelines / "sd"))
    paths = recipes.images.images_in(photos)
    sizes = recipes.images.check(paths, SIDE)

    def pictures(**more: Any) -> list[Any]:
        options: dict[str, Any] = {"center_crop": False, "random_flip": True, "seed": 1}
        return recipes.subject_data.pictures_of(paths, sizes, vae_hash="v", resolution=SIDE, **options | more)

    found = pictures()
    cache = recipes.caches.Cache(tmp_path)
    cache.fill(recipes.subject_data.latent_makers(components, found), Accelerator(cpu=True))
    for picture in found:
        square = (
            Image.open(picture.path)
            .convert("RGB")
            .resize((picture.crop.width, picture.crop.height), Image.Resampling.LANCZOS)
        )
        left, top = picture.crop.left, picture.crop.top
        values = np.array(square)[top : top + SIDE, left : left + SIDE]
        for key, seen in zip(picture.keys, (values, values[:, ::-1]), strict=True):
            image = torch.from_numpy(seen.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            with torch.no_grad():
                expected = components.vae.encode(image).latent_dist
            torch.testing.assert_close(cache[key]["mean"], expected.mean[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(cache[key]["std"], expected.std[0], rtol=1e-4, atol=1e-5)
    wide = found[0]
    assert (wide.crop.height, wide.crop.width) == (16, 19)
    assert wide.time_ids().tolist() == [20, 24, wide.crop.top, wide.crop.left, 16, 16]
    others = [pictures(), pictures(center_crop=True), pictures(random_flip=False)]
    assert others[0] == found
    assert len({str(pictures(seed=seed)) for seed in range(9)}) > 3
    assert (others[1][0].crop.top, others[1][0].crop.left) == (0, 1)
    assert [picture.keys for picture in others[2]] == [picture.keys[:1] for picture in found]

    monkeypatch.setattr(components.vae, "encode", lambda *_: pytest.fail("encoded again"))
    cache.fill(recipes.subject_data.latent_makers(components, found), Accelerator(cpu=True))


def test_latents_that_are_no_numbers_are_refused(recipes: SimpleNamespace, tmp_path: Path) -> None:
    cache = recipes.caches.Cache(tmp_path)
    with pytest.raises(recipes.failures.RecipeError, match="NaN or Inf"):
        cache.fill({"key": lambda: {"mean": torch.tensor([1.0, torch.nan])}}, Accelerator(cpu=True))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_hashes_follow_weights_and_dtype(recipes: SimpleNamespace) -> None:
    layer, same = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    same.load_state_dict(layer.state_dict())
    hashed = recipes.caches.hash_of_model
    assert hashed(layer) == hashed(same)
    assert hashed(same) != hashed(same.to(torch.bfloat16))
    with torch.no_grad():
        layer.bias[2] += 1e-6
    assert hashed(layer) != hashed(same.float())


@pytest.mark.parametrize("name", ["tiny", "sd21-tiny", "tiny-sdxl"])
def test_random_bases_have_all_parts(name: str, recipes: SimpleNamespace) -> None:
    """The UNet is that of trexport, bit for bit, and takes what the encoders give."""
    from trexport.models.base import open_base

    first, second = (recipes.components.load_components(f"random:{name}") for _ in range(2))
    for file in open_base(f"random:{name}").weights:
        for entry in file.entries:
            assert torch.equal(first.unet.state_dict()[entry.name], file.tensor(entry.name))
    hashed = recipes.caches.hash_of_model
    assert hashed(first.vae) == hashed(second.vae)
    conditions = recipes.drawing.with_sizes(recipes.prompts.encode(first, "a çat"), SIDE)
    batch = {key: value[None] for key, value in conditions.items()}
    with torch.no_grad():
        drawn = recipes.drawing.unet_predictor(first.unet)(torch.randn(1, 4, 8, 8), torch.tensor(3), batch)
    assert drawn.shape == (1, 4, 8, 8)
    assert recipes.prompts.tokens(first.encoders[0][0], "a çat").unique().numel() > 5


# --- edges -------------------------------------------------------------------------------------------------------------


def hanging_together(mask: np.ndarray) -> np.ndarray:
    """Each part's number, corners included; 0 outside."""
    found: Any = scipy.ndimage.label(mask, structure=np.ones((3, 3)))
    return found[0]


def canny_by_scipy(image: Image.Image, low: float, high: float) -> np.ndarray:
    """The same definition, pixel by pixel."""
    colours = np.array(image).astype(float)
    grey = colours @ np.array([0.299, 0.587, 0.114])
    weights = np.array([1, 4, 6, 4, 1]) / 16
    for axis in (0, 1):
        grey = scipy.ndimage.convolve1d(grey, weights, axis=axis, mode="nearest")
    down, across = (scipy.ndimage.sobel(grey, axis=axis, mode="nearest") for axis in (0, 1))
    length = np.hypot(across, down)
    padded = np.pad(length, 1)
    thin = np.zeros_like(length)
    for y, x in np.ndindex(*length.shape):
        angle = np.degrees(np.arctan2(down[y, x], across[y, x])) % 180
        step = min(
            ((0, (0, 1)), (45, (1, 1)), (90, (1, 0)), (135, (1, -1)), (180, (0, 1))), key=lambda s: abs(s[0] - angle)
        )[1]
        ahead, behind = (padded[1 + y + sign * step[0], 1 + x + sign * step[1]] for sign in (1, -1))
        if length[y, x] > ahead and length[y, x] >= behind:
            thin[y, x] = length[y, x]
    parts = hanging_together(thin >= low)
    kept = set(parts[thin >= high]) - {0}
    return np.isin(parts, list(kept))


@pytest.mark.parametrize("seed", [1, 2])
def test_canny_is_its_definition(seed: int, recipes: SimpleNamespace) -> None:
    noise = np.random.default_rng(seed).integers(0, 255, (6, 7, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((43, 31), Image.Resampling.BICUBIC)
    found = recipes.conditions.canny(image, 60, 140)
    expected = canny_by_scipy(image, 60, 140)
    assert found.shape == (31, 43)
    assert set(found.unique().tolist()) == {0, 255}
    assert 20 < expected.sum() < 500
    assert ((found.numpy() > 0) != expected).sum() <= 2  # an angle or a length on the very border is rounded either way


def test_canny_outlines_a_square_and_leaves_what_is_faint(recipes: SimpleNamespace) -> None:
    levels = np.full((40, 50), 100, dtype=np.uint8)
    levels[10:30, 12:37] = 220
    levels[3:6, 40:48] = 106
    edges = recipes.conditions.canny(Image.fromarray(levels).convert("RGB")).numpy() > 0
    assert hanging_together(edges).max() == 1
    assert edges[:8].sum() == 0
    assert not edges[14:26, 16:33].any()
    assert (edges[14:26].sum(axis=1) == 2).all()
    assert (edges[:, 16:33].sum(axis=0) == 2).all()
