"""Save tiny pipelines made from configs, `sd`, `sdxl` and `sd3`, with random weights: `make_pipelines.py OUT`.

A pipeline that both worlds read is saved by transformers 4: version 5 drops a prefix of the text encoder's keys, which 4
then misses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "t h", "th e</w>"]


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level vocabulary of 520 tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(m.replace(" ", "") for m in MERGES)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({token: number for number, token in enumerate(tokens)}), encoding="utf-8")
    merges.write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    if int(transformers.__version__.split(".")[0]) < 5:
        return CLIPTokenizer(str(vocab), str(merges), model_max_length=77)
    return CLIPTokenizer(vocab=str(vocab), merges=str(merges), model_max_length=77)


def text_config(tok: CLIPTokenizer, layers: int, act: str) -> CLIPTextConfig:
    start: Any = tok.bos_token_id
    end: Any = tok.eos_token_id
    return CLIPTextConfig(
        vocab_size=len(tok), hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=layers,
        projection_dim=32, max_position_embeddings=77, bos_token_id=start, eos_token_id=end,
        pad_token_id=end, hidden_act=act,
    )  # fmt: skip


def unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **config,
    )  # fmt: skip


def vae(**more: Any) -> AutoencoderKL:
    config: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [32, 64], "latent_channels": 4, "norm_num_groups": 8, "sample_size": 16,
        "force_upcast": False,
    }  # fmt: skip
    return AutoencoderKL(**config | more)


def perturbed(model: torch.nn.Module) -> Any:
    """Norms that differ: equal ones hide mistakes."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def main(out: Path) -> None:
    torch.manual_seed(0)
    tok = tokenizer(out / "tokens")
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    sd: dict[str, Any] = {
        "text_encoder": perturbed(CLIPTextModel(text_config(tok, 2, "quick_gelu"))),
        "unet": perturbed(unet(cross_attention_dim=32, attention_head_dim=8)),
        "vae": perturbed(vae()),
        "tokenizer": tok,
        "scheduler": scheduler,
        "requires_safety_checker": False,
    }
    sd |= dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    StableDiffusionPipeline(**sd).save_pretrained(out / "sd")
    wide = unet(
        cross_attention_dim=64, attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip
    sdxl: dict[str, Any] = {
        "vae": perturbed(vae()),
        "text_encoder": perturbed(CLIPTextModel(text_config(tok, 3, "quick_gelu"))),
        "text_encoder_2": perturbed(CLIPTextModelWithProjection(text_config(tok, 3, "gelu"))),
        "tokenizer": tok,
        "tokenizer_2": tok,
        "unet": perturbed(wide),
        "scheduler": EulerDiscreteScheduler(),
        "add_watermarker": False,
    }
    StableDiffusionXLPipeline(**sdxl).save_pretrained(out / "sdxl")
    transformer = SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=72, caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=24,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    sd3: dict[str, Any] = {
        "transformer": perturbed(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": perturbed(vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)),
        "text_encoder": perturbed(CLIPTextModelWithProjection(text_config(tok, 3, "quick_gelu"))),
        "text_encoder_2": perturbed(CLIPTextModelWithProjection(text_config(tok, 3, "gelu"))),
        "tokenizer": tok,
        "tokenizer_2": tok,
    }
    sd3 |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))  # the pipeline then does without T5
    StableDiffusion3Pipeline(**sd3).save_pretrained(out / "sd3")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
