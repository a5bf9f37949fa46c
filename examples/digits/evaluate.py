"""Measure the sample as it lies in the package: what the judges see in images drawn with and without adapters."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
import numpy as np
import scipy
import sklearn
import torch
from data import STYLES
from diffusers import UNet2DConditionModel
from diffusion import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, draw
from judges import accuracy_on_real_images, fit_judges
from matplotlib.figure import Figure
from sample import SAMPLE, read_adapter, read_base
from train_adapters import RECIPES
from train_base import UNSEEN_DIGIT

from trlora import attach_, merge_, shapes_of

HERE = Path(__file__).parent
THREADS = 2
SAMPLES_PER_DIGIT = 56
SEED = 1234
MODELS = ("base", *RECIPES)

Metrics = dict[str, dict[str, float]]


def fix_arithmetic(threads: int) -> None:
    """Make this machine give the same bits every time: a fixed number of threads, deterministic algorithms."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


def model_of(name: str, base: UNet2DConditionModel, folder: Path = SAMPLE) -> UNet2DConditionModel:
    """A copy of the base, with the adapter of that name merged into its weights unless the name is "base"."""
    unet = copy.deepcopy(base)
    if name != "base":
        attach_(unet, read_adapter(name, folder).bind(shapes_of(unet)))
        merge_(unet)
    return unet


def prompts_of_seen_and_unseen(samples_per_digit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """So many of every digit that the base knows, and as many prompts again for the digit that it does not."""
    seen = torch.tensor([digit for digit in range(10) if digit != UNSEEN_DIGIT]).repeat_interleave(samples_per_digit)
    return seen, torch.full_like(seen, UNSEEN_DIGIT)


def evaluate(folder: Path = SAMPLE, samples_per_digit: int = SAMPLES_PER_DIGIT) -> Metrics:
    """Shares of drawn images by what the judges say, for the base and each adapter.

    For every model the same prompts from the same noise: the nine seen digits. `style <s>` is the share of these images
    judged to be in that style, `digit as <s>` the share that the digit judge of that style reads as the prompted digit. The
    base and `nine` also draw as many images of the unseen digit; `nine as plain` is the share read as a 9.
    """
    judges = fit_judges()
    base, scheduler, codes = read_base(folder)
    seen_prompts, unseen_prompts = prompts_of_seen_and_unseen(samples_per_digit)
    metrics = {"judges on real images": accuracy_on_real_images(judges)}
    for model in MODELS:
        unet = model_of(model, base, folder)
        images = draw(unet, scheduler, seen_prompts, codes, SEED)
        styles = np.asarray(STYLES)[judges.styles(images)]
        metrics[model] = {f"style {style}": float((styles == style).mean()) for style in STYLES}
        for style in STYLES:
            metrics[model][f"digit as {style}"] = float((judges.digits(images, style) == seen_prompts.numpy()).mean())
        if model in ("base", "nine"):
            images = draw(unet, scheduler, unseen_prompts, codes, SEED + 1)
            metrics[model]["nine as plain"] = float((judges.digits(images, "plain") == UNSEEN_DIGIT).mean())
        print(model, {name: round(value, 3) for name, value in metrics[model].items()}, flush=True)
    return metrics


def draw_grid(path: Path, folder: Path = SAMPLE, rows_per_model: int = 2) -> None:
    """A picture of all ten prompts by every model; the same place has the same noise in every model."""
    base, scheduler, codes = read_base(folder)
    prompts = torch.arange(10).repeat(rows_per_model)
    figure = Figure(figsize=(7.2, 1.45 * len(MODELS)))
    for axis, model in zip(figure.subplots(len(MODELS), 1), MODELS, strict=True):
        images = draw(model_of(model, base, folder), scheduler, prompts, codes, SEED)
        tiles = torch.nn.functional.pad(images[:, 0], (1, 1, 1, 1), value=-1.0).unflatten(0, (rows_per_model, 10))
        axis.imshow(tiles.permute(0, 2, 1, 3).flatten(2).flatten(0, 1), cmap="gray", vmin=-1, vmax=1)
        axis.set_ylabel(model, rotation=0, ha="right", va="center", fontsize=11)
        axis.set_xticks([18 * digit + 8.5 for digit in range(10)], [str(digit) for digit in range(10)])
        axis.set_yticks([])
        axis.tick_params(length=0)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def record(metrics: Metrics, seconds: Mapping[str, float], folder: Path, samples_per_digit: int) -> dict[str, Any]:
    """What goes into results.json."""
    unet, _, _ = read_base(folder)
    seen, unseen = prompts_of_seen_and_unseen(samples_per_digit)
    return {
        "metrics": metrics,
        "samples_per_model": {"seen digits": len(seen), "unseen digit": len(unseen)},
        "seeds": {"training": 0, "drawing, seen digits": SEED, "drawing, unseen digit": SEED + 1},
        "guidance_scale": GUIDANCE_SCALE,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "parameters": {
            "base": unet.num_parameters(),
            **{name: read_adapter(name, folder).parameters for name in RECIPES},
        },
        "size_bytes": {
            "unet": _size_bytes(folder / "unet"),
            **{name: _size_bytes(folder / "adapters" / name) for name in RECIPES},
            "everything": _size_bytes(folder),
        },
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "threads": THREADS,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "scikit-learn": sklearn.__version__,
            "scipy": scipy.__version__,
            "numpy": np.__version__,
            "matplotlib": matplotlib.__version__,
        },
    }


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def evaluate_to(
    out: Path, folder: Path = SAMPLE, seconds: Mapping[str, float] | None = None, samples: int = SAMPLES_PER_DIGIT
) -> None:
    """Write results.json and grid.png; `seconds` are those of the training before, if there was one."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    metrics = evaluate(folder, samples)
    all_seconds = {**(seconds or {}), "evaluation": time.perf_counter() - started}
    results = record(metrics, all_seconds, folder, samples)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw_grid(out / "grid.png", folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sample", type=Path, default=SAMPLE, help="the sample's folder (default: the one in the package)"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder for results.json and grid.png (default: beside this script)"
    )
    parser.add_argument(
        "--samples-per-digit", type=int, default=SAMPLES_PER_DIGIT, metavar="N", help="default: %(default)s"
    )
    options = parser.parse_args()
    fix_arithmetic(THREADS)
    evaluate_to(options.out, options.sample, samples=options.samples_per_digit)


if __name__ == "__main__":
    main()
