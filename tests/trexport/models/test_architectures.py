"""Every architecture, by the classes of diffusers and transformers themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.trexport.architectures import TINY, sizes_of
from tests.trexport.helpers import write_model
from trexport.errors import BaseError, UsageError
from trexport.graph.export import check_sizes, dynamic_shapes
from trexport.models.architectures import ARCHITECTURES, RANDOM, architecture_of, default_sizes, in_order, limits_of
from trexport.models.base import open_base
from trexport.models.diffusion import Denoising
from trexport.models.model import empty_model, fitted, load_model, outputs_of, random_feeds
from trlora import find_targets


def loaded_by_its_class(folder: Path, class_name: str) -> nn.Module:
    """The model as its own library loads it, nothing of ours in between."""
    library = diffusers if hasattr(diffusers, class_name) else transformers
    model: Any = getattr(library, class_name).from_pretrained(folder)
    return model.eval()


def called_by_hand(name: str, model: Any, feeds: dict[str, Tensor]) -> list[Tensor]:
    """One step, written out for each class."""
    if "clip" in name:
        found = model(feeds["input_ids"])
        first = found.text_embeds if "projection" in name else found.last_hidden_state
        return [first, found.last_hidden_state if "projection" in name else found.pooler_output]
    if name.startswith(("sd3", "flux")):
        return [model(**feeds).sample]
    arguments = (feeds["sample"], feeds["timestep"], feeds["encoder_hidden_states"])
    if "sdxl" in name:
        added = {"text_embeds": feeds["text_embeds"], "time_ids": feeds["time_ids"]}
        return [model(*arguments, added_cond_kwargs=added).sample]
    if "controlnet" in name:
        found = model(*arguments, feeds["controlnet_cond"])
        return [*found.down_block_res_samples, found.mid_block_res_sample]
    return [model(*arguments).sample]


def test_every_architecture_is_tried() -> None:
    assert {RANDOM[name]["_class_name"] for name in TINY} == set(ARCHITECTURES)
    names = [name for architecture in ARCHITECTURES.values() for name in architecture.random]
    assert len(names) == len(set(names)) == len(RANDOM)
    tiny = {name for name in RANDOM if "tiny" in name}
    assert tiny == set(TINY)


@pytest.mark.parametrize("name", TINY)
def test_the_model_is_its_librarys_own(name: str, tmp_path: Path) -> None:
    base = open_base(f"random:{name}")
    folder = write_model(tmp_path / "model", base)
    theirs = loaded_by_its_class(folder, base.architecture.class_name)
    opened = open_base(str(folder))
    ours = load_model(opened)
    spec, sizes = base.architecture.spec("fp32"), sizes_of(base)
    feeds = random_feeds(spec, sizes, seed=2)
    with torch.no_grad():
        found, expected = outputs_of(ours, feeds), called_by_hand(name, theirs, feeds)
    assert len(found) == len(expected) == len(spec.outputs)
    for tensor, mine, their in zip(spec.outputs, found, expected, strict=True):
        assert torch.equal(mine, their), tensor.name
        assert tuple(mine.shape) == tensor.shape(sizes), tensor.name
        assert mine.std() > 1e-3
    assert opened.architecture.spec("fp32") == spec  # whatever the config of a folder leaves out


@pytest.mark.parametrize("name", TINY)
def test_every_input_matters(name: str) -> None:
    base = open_base(f"random:{name}")
    model, spec = load_model(base), base.architecture.spec("fp32")
    feeds = random_feeds(spec, sizes_of(base), seed=2)
    with torch.no_grad():
        before = outputs_of(model, feeds)
        for tensor in spec.inputs:
            value = feeds[tensor.name]
            changed = (value + 1) % 7 if tensor.dtype == "int64" else value * 0.5 + torch.rand_like(value)
            after = outputs_of(model, {**feeds, tensor.name: changed})
            assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), tensor.name


@pytest.mark.parametrize(
    ("name", "parameters", "attention", "with_feed_forward"),
    [
        ("sd15", 859_520_964, 128, 160),
        ("sd21", 865_910_724, 128, 160),
        ("sdxl", 2_567_463_684, 560, 700),
        # without the table of positions; the last block gives no text
        ("sd3", 2_028_328_000, 24 * 8 - 1, 24 * 12 - 3),
        ("flux", 11_901_408_320, 19 * 8 + 38 * 3, 19 * 12 + 38 * 5),
        ("controlnet-sd15", 361_279_120, 56, 70),
        ("clip-l", 123_060_480, 48, 72),
    ],
)
def test_the_true_architectures(name: str, parameters: int, attention: int, with_feed_forward: int) -> None:
    """As published: a parameter more or less is another model."""
    model = empty_model(architecture_of(RANDOM[name]))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(find_targets(model, "attention")) == attention
    assert len(find_targets(model, "transformer")) == with_feed_forward


def test_configs_that_leave_out_what_is_the_default() -> None:
    """As on the Hub: Flux.1-dev's config says neither its output channels nor the axes of its positions."""
    config = {k: v for k, v in RANDOM["flux"].items() if k not in ("out_channels", "axes_dims_rope")}
    assert architecture_of(config).spec("fp16") == architecture_of(RANDOM["flux"]).spec("fp16")
    config = {k: v for k, v in RANDOM["controlnet-sd15"].items() if not k.startswith("conditioning")}
    assert architecture_of(config).spec("fp16") == architecture_of(RANDOM["controlnet-sd15"]).spec("fp16")


def test_names_are_optimum_s() -> None:
    names = {
        name: [tensor.name for tensor in architecture_of(RANDOM[name]).spec("fp16").inputs]
        for name in ("sd3", "flux", "flux-schnell-tiny", "clip-l")
    }
    shared = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"]
    assert names == {
        "sd3": shared,
        "flux": [*shared, "img_ids", "txt_ids", "guidance"],
        "flux-schnell-tiny": [*shared, "img_ids", "txt_ids"],
        "clip-l": ["input_ids"],
    }
    flux = architecture_of(RANDOM["flux"]).spec("fp16")
    assert flux.free_axes == ("batch_size", "packed_height_width", "sequence_length")
    # positions, steps and guidance are never rounded to half precision
    assert {tensor.name: tensor.dtype for tensor in flux.inputs} == {
        "hidden_states": "fp16", "encoder_hidden_states": "fp16", "pooled_projections": "fp16",
        "timestep": "fp32", "img_ids": "fp32", "txt_ids": "fp32", "guidance": "fp32",
    }  # fmt: skip


def test_sizes_by_architecture() -> None:
    flux, sd3 = RANDOM["flux-tiny"], RANDOM["sd3-tiny"]
    assert architecture_of(flux).sizes({"height": 8, "width": 12, "batch_size": None}) == {"packed_height_width": 24}
    with pytest.raises(UsageError, match="give both"):
        architecture_of(flux).sizes({"height": 8, "width": None})
    with pytest.raises(UsageError, match="give both"):
        architecture_of(flux).sizes({"height": 7, "width": 8})
    with pytest.raises(
        UsageError, match=r"packed_height_width 8 given, a SD3Transformer2DModel has the axes batch_size"
    ):
        architecture_of(sd3).sizes({"packed_height_width": 8})
    with pytest.raises(UsageError, match="multiple of 2, 24 at most"):
        check_sizes(sd3, {"height": 26})
    with pytest.raises(UsageError, match="16 at most"):
        check_sizes(RANDOM["clip-tiny"], {"sequence_length": 17})
    assert in_order(flux, [1, 24, 5]) == {"batch_size": 1, "packed_height_width": 24, "sequence_length": 5}
    with pytest.raises(UsageError, match="4 sizes given, a FluxTransformer2DModel has 3"):
        in_order(flux, [2, 64, 64, 77])
    for name in TINY:
        assert list(limits_of(RANDOM[name])) == list(default_sizes(RANDOM[name]))


def test_an_axis_that_follows_from_another() -> None:
    """A ControlNet's picture is as many times greater than the latents as its config says."""
    architecture = architecture_of(RANDOM["controlnet-tiny"])
    spec = architecture.spec("fp32")
    feeds = random_feeds(spec, {"batch_size": 2, "height": 6, "width": 4, "sequence_length": 5})
    assert feeds["controlnet_cond"].shape == (2, 3, 12, 8)
    assert fitted(spec, feeds).keys() == feeds.keys()
    with pytest.raises(UsageError, match=r"controlnet_cond: shape \[2, 3, 12, 12\] found, expected \[2, 3, 12, 8\]"):
        fitted(spec, feeds | {"controlnet_cond": torch.zeros(2, 3, 12, 12)})
    shapes = dynamic_shapes(architecture.config, spec)
    assert shapes is not None
    assert {str(dim) for dim in shapes["controlnet_cond"].values()} >= {"4*height_over_2", "4*width_over_2"}


def test_conditions_that_are_missing() -> None:
    """Of Stable Diffusion XL, whose UNet would ask for them in words of its own."""
    spec = architecture_of(RANDOM["tiny-sdxl"]).spec("fp32")
    feeds = random_feeds(spec, {"batch_size": 2, "height": 8, "width": 8, "sequence_length": 5})
    for name in ("text_embeds", "time_ids"):
        with pytest.raises(UsageError, match=f"{name}: missing; expected"):
            fitted(spec, {key: value for key, value in feeds.items() if key != name})


def test_a_text_encoder_of_either_age(tmp_path: Path) -> None:
    """transformers 5 saves without the prefix that 4 wrote: paths are those of the file."""
    base = open_base("random:clip-tiny")
    old = open_base(str(write_model(tmp_path / "old", base)))
    model: Any = transformers.CLIPTextModel.from_pretrained(tmp_path / "old")
    model.save_pretrained(tmp_path / "new")
    new = open_base(str(tmp_path / "new"))
    assert {path.removeprefix("text_model.") for path in old.weight_shapes()} == {
        path.removeprefix("text_model.") for path in new.weight_shapes()
    }
    assert not any("embedding" in path for path in old.weight_shapes())
    feeds = random_feeds(base.architecture.spec("fp32"), sizes_of(base))
    found = [outputs_of(load_model(opened), feeds) for opened in (old, new)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for opened in (old, new):
        paths = find_targets(load_model(opened), "attention")
        assert len(paths) == 4
        assert paths.keys() <= opened.weight_shapes().keys()


def test_folders_and_classes(tmp_path: Path) -> None:
    base = open_base("random:sd3-tiny")
    write_model(tmp_path / "pipeline" / "transformer", base)
    assert open_base(str(tmp_path / "pipeline")).architecture.class_name == "SD3Transformer2DModel"
    config = tmp_path / "pipeline" / "transformer" / "config.json"
    config.write_text(json.dumps(dict(base.config) | {"_class_name": "AuraFlowTransformer2DModel"}))
    with pytest.raises(BaseError, match="is a AuraFlowTransformer2DModel, expected one of"):
        open_base(str(tmp_path / "pipeline"))


def test_a_trajectory_of_flow_matching_goes_from_noise_to_its_target() -> None:
    """A model that always says the way from a picture to the noise leads back to the picture, whatever the steps."""
    picture, noise = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    seen: list[float] = []

    def model(feeds: Any) -> Tensor:
        seen.append(float(feeds["timestep"]))
        return noise - picture

    denoising = Denoising.of_folder(None, 4, ARCHITECTURES["FluxTransformer2DModel"])
    found = denoising.run(model, noise, {"encoder_hidden_states": torch.zeros(2, 5, 4)})
    assert torch.allclose(found, picture, atol=1e-5)
    assert seen[0] == pytest.approx(1.0)
    assert sorted(seen, reverse=True) == seen
