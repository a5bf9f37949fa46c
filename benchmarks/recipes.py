"""examples/training at the true size on a GPU: both recipes for some steps, from pictures to an adapter that merges.

Weights are random, so that neither loss nor pictures mean anything: what is looked at is that the whole way works, how long
a step takes, and the memory. BENCH_RECIPES by commas among the names of `RECIPES`, BENCH_STEPS, BENCH_PRECISION (fp16,
bf16); for a try on another machine BENCH_BASE (random:tiny), BENCH_PRECISION (no), BENCH_TMP. The time of a step is told to
a hundredth of a second.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from PIL import Image

from benchmarks.record import keep

FOLDER = Path(__file__).parent.parent / "examples" / "training"
PICTURES = 8
_STEP = re.compile(r"^step (\d+)/\d+ .* ([\d.]+) s$", re.MULTILINE)
_SKIPPED = 4
"""Steps at the start that are not counted: kernels are chosen, memory is taken."""
_LINES = 39
"""Steps of which the recipes tell each: they write twenty lines at least."""
_CHILD = """
import atexit, runpy, sys
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
def peak():
    import torch
    if torch.cuda.is_available():
        print("peak", torch.cuda.max_memory_allocated(), file=sys.stderr)
atexit.register(peak)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@final
@dataclass(frozen=True)
class Recipe:
    """What is run."""

    script: Literal["train_subject", "train_control"]
    base: str
    resolution: int
    batch: int


RECIPES = {
    "subject-sd15": Recipe("train_subject", "random:sd15", 512, 4),
    "control-sd15": Recipe("train_control", "random:sd15", 512, 4),
    "subject-sdxl": Recipe("train_subject", "random:sdxl", 1024, 1),
    "control-sdxl": Recipe("train_control", "random:sdxl", 1024, 1),
}


def main() -> None:
    """Draw pictures, train, merge, keep."""
    names = os.environ.get("BENCH_RECIPES", ",".join(RECIPES)).split(",")
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise SystemExit(f"BENCH_RECIPES: {unknown[0]} is unknown, expected some of {list(RECIPES)}")
    steps, precision = int(os.environ.get("BENCH_STEPS", "24")), os.environ.get("BENCH_PRECISION", "fp16")
    base = os.environ.get("BENCH_BASE")
    if not _SKIPPED < steps <= _LINES:
        raise SystemExit(f"BENCH_STEPS: {steps}, expected {_SKIPPED + 1} to {_LINES}: each of so many steps is told")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as name:
        folder = Path(name)
        draw_pictures(folder / "pictures")
        for name in names:
            found[name] = run(name, RECIPES[name], folder, steps, precision, base)
            print(f"{name}: {found[name]}", flush=True)
            if base is None and torch.cuda.is_available():  # after every one: a machine may be taken away
                variables = f"BENCH_RECIPES={','.join(names)} BENCH_STEPS={steps} BENCH_PRECISION={precision}"
                about = {"steps": steps, "mixed_precision": precision, "recipes": found}
                keep(f"recipes_{precision}", f"python -m benchmarks recipes  # {variables}", "cuda", about)


def draw_pictures(folder: Path) -> None:
    """Soft blots of colour with a caption each, as both recipes read them."""
    (folder / "image").mkdir(parents=True)
    for number in range(PICTURES):
        torch.manual_seed(number)
        small = (255 * torch.rand(6, 6, 3)).byte().numpy()
        Image.fromarray(small).resize((1024, 1024), Image.Resampling.BICUBIC).save(folder / "image" / f"{number}.png")
        (folder / "image" / f"{number}.txt").write_text(f"blots {number}\n", encoding="utf-8")


def run(name: str, recipe: Recipe, folder: Path, steps: int, precision: str, base: str | None) -> dict[str, Any]:
    """One recipe in a process of its own, and what it wrote merged by `trexport merge`."""
    source, out, pictures = base or recipe.base, folder / name, folder / "pictures"
    small = base is not None
    options = {
        "pretrained_model_name_or_path": source, "output_dir": out, "resolution": 16 if small else recipe.resolution,
        "train_batch_size": recipe.batch, "max_train_steps": steps, "learning_rate": 1e-4, "mixed_precision": precision,
        "checkpointing_steps": steps, "report_to": "none", "penalty_weight": 1e-4,
    }  # fmt: skip
    if recipe.script == "train_subject":
        options |= {"instance_data_dir": pictures / "image", "instance_prompt": "sks blots"}
        options |= {"validation_prompt": "sks blots", "num_validation_images": 1, "num_inference_steps": 4}
    else:
        options |= {"train_data_dir": pictures, "conditioning": "canny"}
    script = FOLDER / f"{recipe.script}.py"
    command = [sys.executable, "-c", _CHILD, str(FOLDER), str(script)]
    for option, value in options.items():
        command += [f"--{option}", str(value)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    seconds = [float(took) for step, took in _STEP.findall(done.stderr) if int(step) > _SKIPPED]
    peak = re.search(r"^peak (\d+)$", done.stderr, re.MULTILINE)
    trained = out / "branch" if recipe.script == "train_control" else source
    merged = merge([str(trained), str(out / "adapter"), "--unet-only", "-o", str(folder / f"{name}-merged")])
    return {
        "base": source,
        "resolution": options["resolution"],
        "batch": recipe.batch,
        "seconds": round(time.perf_counter() - start, 1),
        "step_seconds": statistics.median(seconds),
        "peak_mib": None if peak is None else round(int(peak[1]) / 2**20),
        "merged": merged,
    }


def merge(arguments: list[str]) -> str:
    """The command line's last line."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from trexport.cli import main; sys.exit(main())", "merge", *arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"merge: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return (done.stdout or done.stderr).strip().splitlines()[-1].replace(f"{Path(arguments[-1]).parent}/", "")
