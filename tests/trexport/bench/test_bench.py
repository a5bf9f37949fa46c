from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trexport.helpers import SIZES
from trexport.artifact import Artifact
from trexport.backends import OnnxFile, Step
from trexport.bench.memory import PeakMemory
from trexport.bench.report import BenchReport, plot
from trexport.bench.roofline import Ceiling, Work, work_of
from trexport.bench.run import BenchOptions, bench
from trexport.bench.stats import Latency
from trexport.bench.timer import time_steps
from trexport.errors import MissingError
from trexport.models.architectures import spec_of
from trexport.models.base import Base


def test_statistics() -> None:
    values = [float(v) for v in (5, 1, 9, 3, 7, 2, 8, 4, 6, 100)]
    latency = Latency.of(values)
    assert latency.median_ms == statistics.median(values)
    assert latency.p10_ms == pytest.approx(np.percentile(values, 10))
    assert latency.p90_ms == pytest.approx(np.percentile(values, 90))
    assert latency.n == 10
    assert Latency.of([3.0]) == Latency(3.0, 3.0, 3.0, 1)


def test_steps_are_interleaved_and_the_warm_up_is_not_counted() -> None:
    order: list[str] = []
    steps = {name: Step(lambda name=name: order.append(name), {}, {}) for name in ("a", "b", "c")}
    latencies = time_steps(steps, "cpu", warm_up=2, iterations=4)
    assert order == ["a", "b", "c"] * 6
    assert {name: len(values) for name, values in latencies.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(value >= 0 for values in latencies.values() for value in values)


def test_peak_memory_sees_what_comes_and_goes() -> None:
    with PeakMemory("cpu") as memory:
        block = torch.ones(60_000_000)
        assert block.sum() > 0
        del block
    assert memory.bytes >= 200e6


def test_the_work_of_a_step_is_counted(base: Base) -> None:
    spec = spec_of(base.config, "fp16")
    one = work_of(base, spec, SIZES | {"batch_size": 1}, "fp16")
    two = work_of(base, spec, SIZES | {"batch_size": 2}, "fp16")
    assert two.flops == 2 * one.flops  # every product and convolution is in proportion to the batch
    parameters = base.size_bytes // 4
    activations = 4 * 8 * 8 * 2 + 5 * 24 + 1
    assert one.size_bytes == 2 * (parameters + activations)
    conv_in = 2 * 8 * 8 * 16 * 4 * 9
    assert one.flops > conv_in


def test_the_roofline_is_the_slower_of_both_limits() -> None:
    work = Work(flops=2_000_000, size_bytes=3_000)
    assert Ceiling(1e9, 1e9).least_ms(work) == pytest.approx(2.0)
    assert Ceiling(1e12, 1e6).least_ms(work) == pytest.approx(3.0)


@pytest.fixture(scope="module")
def report(onnx_artifact: Artifact) -> BenchReport:
    base, adapters = onnx_artifact.sources()
    onnx = OnnxFile(onnx_artifact.onnx_path, onnx_artifact.manifest.io)
    options = BenchOptions(backends=("torch", "onnxruntime"), sizes=SIZES, warm_up=1, iterations=5)
    return bench(base, adapters, {"": onnx}, "cpu", options)


def test_a_report_holds_what_a_reader_needs(report: BenchReport) -> None:
    assert [result.backend for result in report.results] == ["torch", "onnxruntime"]
    assert report.results[0].ratio == 1
    assert report.results[0].relative_l2 == 0
    assert 0 < report.results[1].relative_l2 <= 1e-5
    for result in report.results:
        assert result.latency.n == 5
        assert result.latency.p10_ms <= result.latency.median_ms <= result.latency.p90_ms
        assert result.roofline_share == pytest.approx(report.least_ms / result.latency.median_ms)
        assert result.ratio == pytest.approx(result.latency.median_ms / report.results[0].latency.median_ms)
    assert report.sizes == SIZES
    fields = json.loads(json.dumps(report.to_dict()))
    assert fields["environment"]["versions"]["torch"] == torch.__version__
    assert fields["environment"]["cpu"]
    assert "/" not in fields["model"]  # no path of this machine


def test_the_plot_is_a_png(report: BenchReport, tmp_path: Path) -> None:
    plot(report, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_run_is_skipped_or_refused(base: Base) -> None:
    options = BenchOptions(backends=("torch", "onnxruntime"), sizes=SIZES, warm_up=0, iterations=1)
    report = bench(base, [], {}, "cpu", options)
    assert [result.backend for result in report.results] == ["torch"]
    assert set(report.skipped) == {"onnxruntime"}
    with pytest.raises(MissingError):
        bench(base, [], {}, "cpu", BenchOptions(backends=("onnxruntime",), sizes=SIZES))
