"""Prompts as the UNets of Stable Diffusion 1.x, 2.x and XL take them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from caches import Cache, hash_of_model, key_of
from components import Components
from failures import say
from torch import Tensor


@torch.no_grad()
def encode(components: Components, prompt: str) -> dict[str, Tensor]:
    """One prompt: `states` (tokens, width) and, for Stable Diffusion XL, `pooled` (width), float32.

    Stable Diffusion 1.x and 2.x take the text encoder's last states. XL takes those before the last layer of both
    encoders, beside each other, and the second one's projection.
    """
    states: list[Tensor] = []
    pooled: Tensor | None = None
    for tokenizer, encoder in components.encoders:
        ids = tokens(tokenizer, prompt).to(encoder.device)
        if components.sdxl:
            output = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        else:
            states.append(encoder(ids)[0])
    result = {"states": torch.cat(states, dim=-1)[0].float()}
    return result if pooled is None or not components.sdxl else result | {"pooled": pooled[0].float()}


def embed(components: Components, prompts: list[str], cache: Cache, accelerator: Any) -> dict[str, str]:
    """Have the cache hold the prompts' embeddings, and give the text encoders' memory back.

    Returns:
        Each prompt's name in the cache.
    """
    hashes = [hash_of_model(encoder) for _, encoder in components.encoders]
    for _, encoder in components.encoders:
        encoder.to(accelerator.device)
    keys = {prompt: key_of("prompt", hashes, prompt) for prompt in prompts}
    cache.fill({key: partial(encode, components, prompt) for prompt, key in keys.items()}, accelerator)
    components.free_encoders()
    return keys


def negative(components: Components, empty: dict[str, Tensor]) -> dict[str, Tensor]:
    """What guidance leads away from: the empty prompt's embedding, or zeros where the pipeline says so."""
    if not components.zero_negative:
        return empty
    return {name: torch.zeros_like(value) for name, value in empty.items()}


def tokens(tokenizer: Any, prompt: str) -> Tensor:
    """(1, tokens); what is too long is cut off, and that is said."""
    length = tokenizer.model_max_length
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    whole = tokenizer(prompt, padding=False, truncation=False, return_tensors="pt").input_ids
    if whole.shape[1] > length:
        say(f"a prompt of {whole.shape[1]} tokens is cut off after {length}: {prompt[:60]}…")
    return ids
