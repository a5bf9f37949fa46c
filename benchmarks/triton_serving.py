"""What Triton adds to a step: the sample's UNet asked over HTTP and gRPC, against the same session called directly."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import keep
from tests.trexport.deploy.server import TritonServer, available
from trexport.artifact import open_artifact
from trexport.deploy.client import TritonClient
from trexport.deploy.options import TritonOptions
from trexport.deploy.triton import write_triton
from trexport.graph.export import ExportOptions, export_onnx
from trexport.models.adapters import open_adapters
from trexport.models.base import open_base
from trexport.models.sample import sample_of
from trexport.session import Session

ROUNDS, EACH = 40, 10
PAUSE_SECONDS = 0.1
"""Before each turn: ONNX Runtime's threads of the other session spin for a while after a run."""
CLIENTS, EACH_CLIENT = 8, 50
GOAL_MS, GOAL_SHARE = 5.0, 0.10


def main() -> None:
    """Serve, ask in turns, keep."""
    if not available():
        print("triton: skipped, no .envs/triton with a server (make test makes it)")
        return
    base = open_base("sample:digits")
    sample = sample_of(base)
    assert sample is not None
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as the server's stub
    feeds = {
        "sample": torch.randn(1, 1, sample.image_size, sample.image_size),
        "timestep": torch.tensor([[500.0]]),
        "encoder_hidden_states": sample.prompts[[9]],
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        options = ExportOptions(timestep_per_sample=True)
        export_onnx(base, open_adapters(["sample:digits/nine"], base), folder / "onnx", options)
        artifact = open_artifact(folder / "onnx")
        write_triton(artifact, folder / "repository", TritonOptions(native=False, image=False))
        session = stack.enter_context(Session(artifact))
        server = stack.enter_context(TritonServer(folder / "repository", ["unet"], folder))
        http = stack.enter_context(TritonClient(f"http://{server.http}"))
        grpc = stack.enter_context(TritonClient(f"grpc://{server.grpc}"))
        direct = feeds | {"timestep": feeds["timestep"][0]}
        ways: dict[str, Callable[[], Tensor]] = {
            "direct": lambda: session.run(direct)["out_sample"],
            "http": lambda: http.run("unet", feeds)["out_sample"],
            "grpc": lambda: grpc.run("unet", feeds)["out_sample"],
        }
        expected = ways["direct"]()
        differences = {name: (run() - expected).abs().max().item() for name, run in ways.items()}
        alone = one_after_another(ways)
        together = {"http": at_once(f"http://{server.http}", feeds), "grpc": at_once(f"grpc://{server.grpc}", feeds)}
    limit = max(GOAL_MS, GOAL_SHARE * alone["direct"]["p50_ms"])
    overhead = {name: alone[name]["p50_ms"] - alone["direct"]["p50_ms"] for name in ("http", "grpc")}
    for name, found in alone.items():
        print(
            f"{name:7} p50 {found['p50_ms']:7.2f} ms  p99 {found['p99_ms']:7.2f} ms  {found['per_second']:7.1f} a second"
        )
    for name, found in together.items():
        print(f"{name:7} {CLIENTS} clients at once: {found:7.1f} requests a second")
    print(f"overhead at p50: {overhead}, at most {limit:.2f} ms wanted")
    fields = {
        "model": "sample:digits with nine merged, python backend, batch 1",
        "one_client": alone,
        "clients_at_once": CLIENTS,
        "requests_per_second_at_once": together,
        "overhead_p50_ms": overhead,
        "goal_ms": limit,
        "goal_met": {name: value <= limit for name, value in overhead.items()},
        "max_abs_difference": differences,
    }
    keep("triton_serving", "python -m benchmarks triton", "cpu", fields)


def one_after_another(ways: dict[str, Callable[[], Tensor]]) -> dict[str, dict[str, Any]]:
    """Latencies, the ways taking turns so that what else the machine does meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            time.sleep(PAUSE_SECONDS)
            run()
            for _ in range(EACH):
                began = time.perf_counter()
                run()
                found[name].append(1e3 * (time.perf_counter() - began))
    return {name: _summary(latencies) for name, latencies in found.items()}


def at_once(url: str, feeds: dict[str, Tensor]) -> float:
    """Requests a second from several clients that never pause."""
    start = threading.Barrier(CLIENTS + 1)

    def ask() -> None:
        with TritonClient(url) as client:
            client.run("unet", feeds)
            start.wait(60)
            for _ in range(EACH_CLIENT):
                client.run("unet", feeds)

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    start.wait(60)
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return CLIENTS * EACH_CLIENT / (time.perf_counter() - began)


def _summary(latencies_ms: list[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(latencies_ms, n=100, method="inclusive")
    mean = statistics.fmean(latencies_ms)
    return {"p50_ms": cuts[49], "p99_ms": cuts[98], "per_second": 1e3 / mean, "n": len(latencies_ms)}
