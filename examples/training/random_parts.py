"""What `random:NAME`, which is a UNet only, lacks of a pipeline: a VAE, text encoders and tokenizers with seeded random
weights. The shapes that the UNet sees are the true ones, so that its training can be measured; the pictures mean nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LAYERS = 2
"""Of a text encoder; the true ones have more, but are asked once a prompt."""
LENGTH = 77


def random_vae(unet: Mapping[str, Any]) -> AutoencoderKL:
    """Stable Diffusion's, or a small one for the small UNets."""
    widths = (128, 256, 512, 512) if unet["sample_size"] >= 64 else (8, 16)
    config: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": list(widths),
        "layers_per_block": 2 if len(widths) > 2 else 1,
        "latent_channels": unet["in_channels"],
        "norm_num_groups": min(32, widths[0]),
        "sample_size": unet["sample_size"] * 2 ** (len(widths) - 1),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(**config)


def random_encoders(unet: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """One as wide as the UNet's cross-attention; for Stable Diffusion XL two, the second one as wide as the pooled
    embeddings."""
    width = unet["cross_attention_dim"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if unet["addition_embed_type"] != "text_time":
            tokenizer = byte_tokenizer()
            return [(tokenizer, CLIPTextModel(_config(tokenizer, width)))]
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        first, second = byte_tokenizer(), byte_tokenizer()
        return [
            (first, CLIPTextModel(_config(first, width - pooled))),
            (second, CLIPTextModelWithProjection(_config(second, pooled))),
        ]


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges: a token for every byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        return _saved(Path(folder), {name: number for number, name in enumerate(names)})


def _saved(folder: Path, vocabulary: dict[str, int]) -> CLIPTokenizer:
    """Through files, which the tokenizers of transformers 4 and 5 both read."""
    import json

    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "pad_token": "<|endoftext|>"}),
        encoding="utf-8",
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, CLIPTokenizer)
    return tokenizer


def _config(tokenizer: Any, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
