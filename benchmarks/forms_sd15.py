"""The forms that keep adapters apart at the size of Stable Diffusion 1.5 on a CPU, against the merged form and PEFT: a step,
a swap, a mixed batch, sizes, parity."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.child import run_in_child
from benchmarks.merge_sd15 import ADAPTER, write_base
from benchmarks.record import keep
from trexport.adapter_file import slots_of
from trexport.artifact import Artifact, open_artifact
from trexport.backends import BACKENDS, EngineFile, OnnxFile, Step
from trexport.bench.forms import file_for
from trexport.bench.stats import Latency
from trexport.bench.timer import time_steps
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.ops.slots import banked
from trexport.graph.swappable import SwappableOptions
from trexport.io_spec import ADAPTER_INDEX, ADAPTER_STRENGTH
from trexport.models.adapters import BoundAdapter, open_adapters
from trexport.models.architectures import default_sizes, spec_of
from trexport.models.base import open_base
from trexport.models.model import first_output, load_model, random_feeds
from trexport.parity.metrics import relative_l2
from trexport.session.forms import form_of

ITERATIONS = int(os.environ.get("BENCH_ITERATIONS", "5"))
BATCH = 8
LORA_RANK = 4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "merged": (2, {}),
    "factored": (2, {"factored": FactoredOptions()}),
    "swappable": (2, {"swappable": SwappableOptions()}),
    "merged of 8": (BATCH, {}),
    "bank of 8": (BATCH, {"factored": FactoredOptions(bank=BATCH)}),
}
"""Batch and options of each."""


def main() -> None:
    """Export all forms, run them side by side, keep."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as name:
        folder = Path(name)
        base = write_base(folder / "base", "random:sd15")
        for form in FORMS:
            run_in_child(run_export, base, folder / form, form)
            print(f"exported: {form}", flush=True)
        fields: dict[str, Any] = {"base": "random:sd15, fp32", "adapter": ADAPTER, "sizes": "2×64×64, 77 tokens"}
        for title, function, arguments in (
            ("batch 2", run_steps, (folder,)),
            ("swap", run_swaps, (folder,)),
            ("batch 8", run_bank, (folder,)),
            ("PEFT, batch 2", run_peft, (base, 2)),
            ("PEFT, batch 8", run_peft, (base, BATCH)),
        ):
            fields[title] = run_in_child(function, *arguments).value
            shown = {key: value for key, value in fields[title].items() if key not in ("latency", "milliseconds")}
            print(title, shown, flush=True)
            keep("forms_sd15", "python -m benchmarks forms", "cpu", fields)


def run_export(base: Path, out: Path, form: str) -> None:
    """One static export."""
    opened = open_base(str(base))
    batch, options = FORMS[form]
    fixed = default_sizes(opened.config) | {"batch_size": batch}
    export_onnx(opened, open_adapters([ADAPTER], opened), out, ExportOptions(fixed=fixed, **options))


def run_steps(folder: Path) -> dict[str, Any]:
    """Merged, factored and swappable in ONNX Runtime, interleaved; sizes and the plan."""
    names = ["merged", "factored", "swappable"]
    artifacts = {form: open_artifact(folder / form, verify=False) for form in names}
    adapters = open_adapters([ADAPTER], open_base(str(folder / "base")))
    feeds = random_feeds(artifacts["merged"].manifest.io, {})
    steps = {form: _step(artifact, file_for(artifact, adapters, "cpu"), feeds) for form, artifact in artifacts.items()}
    found = _compare(steps)
    sizes = {form: sum(file.stat().st_size for file in (folder / form).glob("unet/*")) for form in names}
    plan = artifacts["factored"].manifest.factored
    assert plan is not None
    return found | {
        "size_bytes": sizes,
        "beyond_the_base_bytes": {form: sizes[form] - sizes["merged"] for form in names},
        "plan": dict(Counter(layer["path"] for layer in plan["plan"].values())),
    }


def run_swaps(folder: Path) -> dict[str, Any]:
    """Seconds in which a session recomputes all adapted weights of the swappable form from the pristine base: one adapter,
    and two."""
    artifact = open_artifact(folder / "swappable", verify=False)
    form = form_of(artifact, "cpu")
    assert form is not None
    base = open_base(str(folder / "base"))
    prepared = [form.prepare(a.name, a) for a in open_adapters([ADAPTER, "random:tlora:1:4"], base)]
    seconds: dict[str, list[float]] = {"one adapter": [], "two adapters": [], "off": []}
    for round_ in range(2 * ITERATIONS + 1):
        active = {"one adapter": [(prepared[round_ % 2], 0.7)], "two adapters": [(p, 0.5) for p in prepared], "off": []}
        for name, wanted in active.items():
            start = time.perf_counter()
            form.write(wanted)
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {
        "layers": len(form.buffers),
        "weights_bytes": sum(buffer.nbytes for buffer in form.buffers.values()),
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "seconds": seconds,
    }


def run_bank(folder: Path) -> dict[str, Any]:
    """A batch of eight samples with eight adapters against the merged model's batch. The eight have the same values, so that
    the merged model is the oracle too; that changes no time. Both give intermediate memory back after each run: the two of
    them would not fit otherwise."""
    merged, bank = (open_artifact(folder / form, verify=False) for form in ("merged of 8", "bank of 8"))
    adapters = open_adapters([ADAPTER], open_base(str(folder / "base")))
    feeds = random_feeds(merged.manifest.io, {})
    index, strength = torch.arange(1, BATCH + 1), torch.full((BATCH,), adapters[0].strength)
    # every place holds the same adapter here, so that the merged batch is the oracle
    constants = _everywhere(bank, adapters) | {ADAPTER_INDEX: index, ADAPTER_STRENGTH: strength}
    steps = {
        "merged of 8": _step(merged, OnnxFile(merged.onnx_path, merged.manifest.io, release_memory=True), feeds),
        "bank of 8": _step(bank, OnnxFile(bank.onnx_path, bank.manifest.io, constants, release_memory=True), feeds),
    }
    plan = bank.manifest.factored
    assert plan is not None
    return _compare(steps, iterations=max(3, ITERATIONS // 2)) | {
        "plan": dict(Counter(layer["path"] for layer in plan["plan"].values())),
    }


def run_peft(base: Path, batch: int) -> dict[str, Any]:
    """PEFT's LoRA in eager torch: unmerged against merged; with batch 8, an adapter for each sample (`adapter_names`)."""
    from peft import LoraConfig, PeftModel, get_peft_model

    opened = open_base(str(base))
    config = LoraConfig(r=LORA_RANK, target_modules=TARGETS, init_lora_weights=False)
    plain = load_model(opened)
    adapted = cast(PeftModel, get_peft_model(cast(Any, load_model(opened)), config, adapter_name="a0"))
    mixed = batch > 2
    for number in range(1, batch if mixed else 1):
        adapted.add_adapter(f"a{number}", config)
    adapted.eval()
    feeds = random_feeds(spec_of(opened.config, "fp32"), default_sizes(opened.config) | {"batch_size": batch})
    names = {"adapter_names": [f"a{number}" for number in range(batch)]} if mixed else {}

    def step(run: Callable[[], Tensor]) -> Step:
        def once() -> None:
            with torch.inference_mode():
                run()

        return Step(once, feeds, {})

    arguments = (feeds["sample"], feeds["timestep"], feeds["encoder_hidden_states"])
    steps = {
        "merged": step(lambda: first_output(plain, feeds)),
        "PEFT LoRA r=4, " + ("an adapter a sample" if mixed else "unmerged"): step(
            lambda: adapted(*arguments, return_dict=False, **names)[0]
        ),
    }
    return _compare(steps, iterations=max(3, ITERATIONS // 2) if mixed else ITERATIONS)


def _everywhere(bank: Artifact, adapters: Sequence[BoundAdapter]) -> dict[str, Tensor]:
    """The first adapter in every place of a bank."""
    (slot,) = slots_of(bank)
    (adapter,) = adapters
    return banked(slot, [slot.tensors(adapter.layers, 1.0, adapter.name)] * BATCH, BATCH)


def _step(artifact: Artifact, file: OnnxFile | EngineFile, feeds: Mapping[str, Tensor]) -> Step:
    return BACKENDS["onnxruntime"].load(file, "cpu").step(feeds)


def _compare(steps: dict[str, Step], iterations: int = ITERATIONS) -> dict[str, Any]:
    """Interleaved latencies, ratios to the first, and the outputs' distance to the first's."""
    milliseconds = time_steps(steps, "cpu", warm_up=1, iterations=iterations)
    latency = {name: Latency.of(values) for name, values in milliseconds.items()}
    first = next(iter(steps))
    outputs = {name: step.outputs["out_sample"] for name, step in steps.items() if step.outputs}
    return {
        "latency": {name: vars(found) for name, found in latency.items()},
        "ratio": {name: found.median_ms / latency[first].median_ms for name, found in latency.items()},
        "milliseconds": milliseconds,
        "relative_l2": {name: relative_l2(output, outputs[first]) for name, output in outputs.items()},
    }
