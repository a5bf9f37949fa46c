"""A step of training, TLoRA(2, 6) against PEFT's LoRA of rank 4, in one loop and one run: time and peak memory.

The base is frozen in half precision, adapters are float32, products run under autocast, fp16 with a loss scaler. Methods
take turns, each built anew, so that the peak of one knows nothing of another; `compile` is torch.compile of the UNet.

BENCH_DTYPE (fp16, bf16, fp32), BENCH_METHODS by commas among the names of `METHODS`, BENCH_ROUNDS, BENCH_STEPS; for a try on
another machine BENCH_BASE (random:tiny), BENCH_DEVICE (cpu), BENCH_BATCH.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn

from benchmarks.record import keep
from trexport.backends import Device
from trexport.io_spec import Dtype
from trexport.models.architectures import default_sizes, spec_of
from trexport.models.base import Base, open_base
from trexport.models.model import DTYPES, first_output, load_model, random_feeds
from trlora import AdapterSpec, inject_
from trlora.training import WeightPath, trainable_parameters

SPEC = AdapterSpec.from_dict(
    {
        "transform": {"type": "tensor_ring", "order": 3, "rank": 2},
        "residual": {"type": "tensor_ring", "order": 3, "rank": 6},
    }
)
PEFT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
WARM_UP = 3


@final
@dataclass(frozen=True)
class Method:
    """What is trained, and how."""

    kind: Literal["peft", "activations", "weight"]
    compiled: bool = False


METHODS = {
    "peft": Method("peft"),
    "activations": Method("activations"),
    "weight": Method("weight"),
    "peft-compile": Method("peft", compiled=True),
    "activations-compile": Method("activations", compiled=True),
    "weight-compile": Method("weight", compiled=True),
}
USUAL = [name for name in METHODS if name != "activations-compile"]
"""What is measured unless asked for otherwise: without what takes minutes to compile."""


def main() -> None:
    """Measure, print, keep."""
    source = os.environ.get("BENCH_BASE", "random:sd15")
    base = open_base(source)
    device = cast(Device, os.environ.get("BENCH_DEVICE", "cuda"))
    dtype = cast(Dtype, os.environ.get("BENCH_DTYPE", "fp16"))
    batch, rounds = int(os.environ.get("BENCH_BATCH", "4")), int(os.environ.get("BENCH_ROUNDS", "3"))
    names = os.environ.get("BENCH_METHODS", ",".join(USUAL)).split(",")
    for name in names:
        if name not in METHODS:
            raise SystemExit(f"BENCH_METHODS: {name} is unknown, expected some of {list(METHODS)}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for name in names:
            if number and METHODS[name].compiled:
                continue  # compiling takes a minute; its steps are many in one round
            times, facts = measured(base, METHODS[name], device, dtype, batch)
            seconds[name] += times
            found[name] = facts
            print(f"{name}: {1e3 * statistics.median(times):.1f} ms, {facts}", flush=True)
    table = {
        name: found[name] | {"median_ms": 1e3 * statistics.median(seconds[name]), "steps": len(seconds[name])}
        for name in names
    }
    show(table)
    if source == "random:sd15" and device == "cuda":
        about = {"base": source, "batch": batch, "dtype": dtype, "spec": SPEC.to_dict(), "methods": table}
        keep(f"training_{dtype}", f"python -m benchmarks training  # BENCH_METHODS={','.join(names)}", device, about)


def measured(
    base: Base, method: Method, device: Device, dtype: Dtype, batch: int
) -> tuple[list[float], dict[str, Any]]:
    """Seconds of each step, and what else is known of a method."""
    torch.manual_seed(0)
    sizes = default_sizes(base.config) | {"batch": batch}
    feeds = {n: t.to(device) for n, t in random_feeds(spec_of(base.config, dtype), sizes).items()}
    target = torch.randn_like(feeds["sample"])
    model = load_model(base, dtype)
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    if method.kind == "peft":
        from peft import LoraConfig, inject_adapter_in_model

        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=PEFT_TARGETS), model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        layers = sum(hasattr(module, "lora_A") for module in model.modules())
    else:
        layers = len(inject_(model, SPEC, "attention"))
        parameters = trainable_parameters(model)
        if method.kind == "weight":
            weights = WeightPath(model, dtype=None if dtype == "fp32" else DTYPES[dtype], compiled=method.compiled)
            around = weights.built
    model.to(device).train()
    step = stepper(model, parameters, feeds, target, around, device, dtype, compiled=method.compiled)
    begin = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    synchronise(device)
    first = time.perf_counter() - begin
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    loss = torch.zeros(())
    for _ in range(int(os.environ.get("BENCH_STEPS", "20"))):
        begin = time.perf_counter()
        loss = step()
        synchronise(device)
        times.append(time.perf_counter() - begin)
    facts: dict[str, Any] = {
        "layers": layers,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "first_seconds": round(first, 2),
        "loss": round(float(loss), 5),
    }
    if device == "cuda":
        facts["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    del model, parameters, step
    gc.collect()
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
    return times, facts


def stepper(
    model: nn.Module,
    parameters: list[nn.Parameter],
    feeds: dict[str, Tensor],
    target: Tensor,
    around: Callable[[], AbstractContextManager[None]],
    device: Device,
    dtype: Dtype,
    *,
    compiled: bool,
) -> Callable[[], Tensor]:
    """One step as a function: forward, backward, scaler, AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=dtype == "fp16" and device == "cuda")
    if compiled:
        model.compile()

    def step() -> Tensor:
        optimizer.zero_grad()
        with around():
            with torch.autocast(device, DTYPES[dtype], enabled=dtype != "fp32"):
                loss = (first_output(model, feeds).float() - target.float()).square().mean()
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step


def synchronise(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def show(table: dict[str, dict[str, Any]]) -> None:
    """Against PEFT, compiled against compiled."""
    for name, row in table.items():
        than = table.get("peft-compile" if METHODS[name].compiled else "peft")
        ratio = f"{row['median_ms'] / than['median_ms']:.3f} of PEFT" if than else ""
        memory = (
            f"{row['peak_mib']} MiB, {row['peak_mib'] / than['peak_mib']:.3f}" if than and "peak_mib" in row else ""
        )
        print(f"{name:20} {row['median_ms']:9.1f} ms  {ratio}  {memory}")
