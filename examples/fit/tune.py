"""Fine-tune every weight of the sample base on outlined digits: the checkpoint that the adapters are then fitted to.

Data, loss and noise schedule are those of examples/digits.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "digits"))  # its scripts import each other by bare names

from data import load_images
from diffusers import UNet2DConditionModel
from diffusion import diffusion_loss
from evaluate import THREADS, fix_arithmetic
from sample import read_base
from train_base import UNSEEN_DIGIT

STYLE = "outline"
STEPS = 400
BATCH_SIZE = 64
LEARNING_RATE = 3e-4


def fine_tune(steps: int = STEPS, seed: int = 0) -> tuple[UNet2DConditionModel, list[float]]:
    """The sample base after `steps` steps with all its weights trained; gives it and the loss of every step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    unet, scheduler, codes = read_base()
    images, labels = load_images(STYLE, "train")
    seen = labels != UNSEEN_DIGIT
    images, labels = images[seen], labels[seen]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    unet.train()
    losses = []
    for step in range(steps):
        batch = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        loss = diffusion_loss(unet, scheduler, images[batch], labels[batch], codes, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1}/{steps}  loss {sum(losses[-50:]) / 50:.4f}", flush=True)
    return unet.eval(), losses


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the fine-tuned UNet")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    options = parser.parse_args()
    fix_arithmetic(THREADS)
    started = time.perf_counter()
    unet, _ = fine_tune(options.steps)
    unet.save_pretrained(options.out)
    print(f"trained in {time.perf_counter() - started:.0f} s: {options.out}")


if __name__ == "__main__":
    main()
