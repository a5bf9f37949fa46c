"""A step of training, TLoRA(2, 6) against PEFT's LoRA of rank 4, in one loop and one run: time and peak memory.

The base is frozen in half precision, adapters are float32, products run under autocast, fp16 with a loss scaler; AdamW is
torch's fused one for all. Every method lives in a process of its own, so that the peak of one knows nothing of another. They
get ready, which is where the compiled ones take minutes, at the same time; then they take turns. `compile` is torch.compile
of the UNet.

BENCH_DTYPE (fp16, bf16, fp32), BENCH_METHODS by commas among the names of `METHODS`, BENCH_ROUNDS, BENCH_STEPS; for a try on
another machine BENCH_BASE (random:tiny), BENCH_DEVICE (cpu), BENCH_BATCH.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
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
from trlora.training import ParameterStacks, WeightPath, trainable_parameters

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
    together: int = 2**25
    """Elements of the weights that are built together."""


METHODS = {
    "peft": Method("peft"),
    "activations": Method("activations"),
    "weight": Method("weight"),
    "weight-quarters": Method("weight", together=2**23),
    "peft-compile": Method("peft", compiled=True),
    "activations-compile": Method("activations", compiled=True),
    "weight-compile": Method("weight", compiled=True),
    "weight-quarters-compile": Method("weight", compiled=True, together=2**23),
}
USUAL = ["peft", "weight", "peft-compile", "weight-compile"]
"""What is measured unless asked for otherwise."""


def main() -> None:
    """Measure, print, keep."""
    source = os.environ.get("BENCH_BASE", "random:sd15")
    device = cast(Device, os.environ.get("BENCH_DEVICE", "cuda"))
    dtype = cast(Dtype, os.environ.get("BENCH_DTYPE", "fp16"))
    batch, rounds = int(os.environ.get("BENCH_BATCH", "4")), int(os.environ.get("BENCH_ROUNDS", "3"))
    names = os.environ.get("BENCH_METHODS", ",".join(USUAL)).split(",")
    for name in names:
        if name not in METHODS:
            raise SystemExit(f"BENCH_METHODS: {name} is unknown, expected some of {list(METHODS)}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        runs = {name: stack.enter_context(process_of(name, source, device, dtype, batch)) for name in names}
        found: dict[str, dict[str, Any]] = {}
        for name, run in runs.items():
            found[name] = received(run, name)
            print(f"{name}: ready {found[name]}", flush=True)
        table: dict[str, dict[str, Any]] = {}
        for _ in range(rounds):
            for name, run in runs.items():
                run.send("measure")
                times, facts = received(run, name)
                seconds[name] += times
                found[name] |= facts
                print(f"{name}: {1e3 * statistics.median(times):.1f} ms {facts}", flush=True)
            table = {
                name: found[name] | {"median_ms": 1e3 * statistics.median(seconds[name]), "steps": len(seconds[name])}
                for name in names
            }
            show(table)
            if source == "random:sd15" and device == "cuda":  # after every round: a machine may be taken away
                about = {"base": source, "batch": batch, "dtype": dtype, "spec": SPEC.to_dict(), "methods": table}
                command = f"python -m benchmarks training  # BENCH_METHODS={','.join(names)}"
                keep(f"training_{dtype}", command, device, about)


def received(run: Connection, name: str) -> Any:
    """What a method's process says.

    Raises:
        SystemExit: it has failed; its own words are above.
    """
    try:
        return run.recv()
    except EOFError:
        raise SystemExit(f"{name} failed in its process; leave it out of BENCH_METHODS to measure the others") from None


@contextmanager
def process_of(name: str, source: str, device: Device, dtype: Dtype, batch: int) -> Iterator[Connection]:
    """A method in a process of its own: it tells its facts once it is ready, then times and facts for every message."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_serve, args=(its, name, source, device, dtype, batch), daemon=True)
    process.start()
    its.close()
    try:
        yield mine
    finally:
        mine.close()
        process.join(10)
        process.terminate()


def _serve(orders: Connection, name: str, source: str, device: Device, dtype: Dtype, batch: int) -> None:
    with ExitStack() as stack:
        step, facts = prepared(open_base(source), METHODS[name], device, dtype, batch, stack)
        begin = time.perf_counter()
        for _ in range(WARM_UP):
            step()
        synchronise(device)
        orders.send(facts | {"first_seconds": round(time.perf_counter() - begin, 2)})
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        while True:
            try:
                orders.recv()
            except EOFError:
                return
            orders.send(measured(step, device))


def measured(step: Callable[[], Tensor], device: Device) -> tuple[list[float], dict[str, Any]]:
    """Seconds of each step, and what else is known."""
    times: list[float] = []
    loss = step()
    synchronise(device)
    for _ in range(int(os.environ.get("BENCH_STEPS", "20"))):
        begin = time.perf_counter()
        loss = step()
        synchronise(device)
        times.append(time.perf_counter() - begin)
    facts: dict[str, Any] = {"loss": round(float(loss), 5)}
    if device == "cuda":
        facts["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        facts["reserved_mib"] = round(torch.cuda.max_memory_reserved() / 2**20)
    return times, facts


def prepared(
    base: Base, method: Method, device: Device, dtype: Dtype, batch: int, stack: ExitStack
) -> tuple[Callable[[], Tensor], dict[str, Any]]:
    """A step of a method, and what is known before it has run."""
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
    model.to(device).train()
    if method.kind == "weight":
        built = None if dtype == "fp32" else DTYPES[dtype]
        path = WeightPath(model, dtype=built, compiled=method.compiled, together=method.together)
        around = path.built
        stacks = ParameterStacks(path.groups, parameters)
        stack.enter_context(stacks.held())
        parameters = stacks.leaves
    facts = {
        "layers": layers,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "tensors": len(parameters),
    }
    return stepper(model, parameters, feeds, target, around, device, dtype, compiled=method.compiled), facts


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
