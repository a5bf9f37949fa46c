"""Train the base: a small UNet2DConditionModel that draws the digits 0 to 8 and has never seen a 9."""

from __future__ import annotations

import torch
from data import CODE_SIZE, IMAGE_SIZE, load_images, prompt_codes
from diffusers import UNet2DConditionModel
from diffusion import diffusion_loss, new_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

UNSEEN_DIGIT = 9
STEPS = 1400
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
EMA_DECAY = 0.995


def new_unet() -> UNet2DConditionModel:
    """A Stable Diffusion UNet in small: cross-attention at both levels, linear projections around it."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 48),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=CODE_SIZE,
        use_linear_projection=True,
    )


def train_base(seed: int = 0) -> UNet2DConditionModel:
    """Train from scratch on the plain style without the unseen digit; gives the averaged weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_images("plain", "train")
    seen = labels != UNSEEN_DIGIT
    images, labels = images[seen], labels[seen]
    codes, scheduler, unet = prompt_codes(), new_scheduler(), new_unet()
    averaged = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.05)
    unet.train()
    for step in range(STEPS):
        batch = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        loss = diffusion_loss(unet, scheduler, images[batch], labels[batch], codes, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(unet)
        if step % 100 == 99:
            print(f"base  step {step + 1}/{STEPS}  loss {loss.item():.4f}", flush=True)
    trained = averaged.module.eval()
    assert isinstance(trained, UNet2DConditionModel)
    return trained
