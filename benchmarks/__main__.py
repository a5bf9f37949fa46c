"""Run benchmarks by name: `python -m benchmarks merge onnx`; without a name, all that can run on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks import (
    engine_bank,
    engine_gpu,
    engine_rtx,
    every_form,
    forms_gpu,
    forms_sd15,
    merge_sd15,
    onnx_sd15,
    ort_passes,
    recipes,
    step_gpu,
    step_variants,
    swap,
    swap_cpu,
    training,
    triton_serving,
)

# name → (what it measures, needs CUDA, function)
BENCHMARKS: dict[str, tuple[str, bool, Callable[[], None]]] = {
    "merge": ("merge of random:sd15 against copying its file; memory", False, merge_sd15.main),
    "onnx": ("ONNX export of random:sd15: seconds, memory, parity, step against torch", False, onnx_sd15.main),
    "forms": (
        "factored, swappable and bank of random:sd15 against merged and PEFT: step, swap, size, parity",
        False,
        forms_sd15.main,
    ),
    "swap-cpu": (
        "all 128 adapted weights of random:sd15 written anew on a CPU: trlora.swap, dense products, one copy",
        False,
        swap_cpu.main,
    ),
    "engine-rtx": (
        "TensorRT-RTX engines of random:sd15, built without a GPU: seconds, size, memory",
        False,
        engine_rtx.main,
    ),
    "triton": ("a step of the sample through Triton against the session itself", False, triton_serving.main),
    "training": (
        "a training step of random:sd15, TLoRA(2, 6) against PEFT's LoRA of rank 4, eager and compiled: time, memory",
        True,
        training.main,
    ),
    "recipes": (
        "examples/training on random:sd15 and random:sdxl: both recipes for some steps, to an adapter that merges",
        True,
        recipes.main,
    ),
    "engine-gpu": (
        "a UNet compiled by AOTInductor, random:sd15 in fp16 unless told: step against torch and ONNX Runtime, swap, build",
        True,
        engine_gpu.main,
    ),
    "engine-bank": (
        "a batch of 8 samples with 8 adapters in AOTInductor, fp16, against the merged model's batch",
        True,
        engine_bank.main,
    ),
    "every-form": (
        "what `trexport bench --forms` prints of random:sd15, fp16: every form, engines, a bank of 8, a swap",
        True,
        every_form.main,
    ),
    "forms-gpu": (
        "factored, bank and swappable of random:sd15 in ONNX Runtime CUDA, fp16: step, swap",
        True,
        forms_gpu.main,
    ),
    "ort-passes": (
        "random:sd15 in ONNX Runtime CUDA, fp16: what each graph pass gains, and what is left",
        True,
        ort_passes.main,
    ),
    "step-variants": (
        "one step of random:sd15 under torch.compile: PyTorch's own ways, then our rewrites one after another",
        True,
        step_variants.main,
    ),
    "swap": (
        "all 128 adapted weights of random:sd15 (560 of random:sdxl) written anew: kernel, torch, PEFT, one copy",
        True,
        swap.main,
    ),
    "step-gpu": ("one step of random:sd15 in half precision: eager, compiled, ONNX Runtime", True, step_gpu.main),
}


def main() -> None:
    """Parse and run."""
    epilog = "\n".join(f"{name:10} {text}" for name, (text, _, _) in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks", epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", choices=[[], *BENCHMARKS], metavar="NAME", help="see below; all unless given"
    )
    names = parser.parse_args().names
    for name, (text, needs_cuda, run) in BENCHMARKS.items():
        if names and name not in names:
            continue
        if needs_cuda and not torch.cuda.is_available():
            print(f"{name}: skipped, needs a CUDA device")
            continue
        print(f"{name}: {text}")
        run()


main()
