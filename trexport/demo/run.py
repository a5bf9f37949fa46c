"""`trexport demo`, step by step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from trexport.artifact import open_artifact
from trexport.backends import BACKENDS, Device, OnnxFile, TorchModel
from trexport.bench.report import BenchReport, plot
from trexport.bench.run import BenchOptions, bench
from trexport.demo.html import report_html
from trexport.demo.pictures import draw, png_strip
from trexport.errors import UsageError
from trexport.graph.export import export_onnx
from trexport.jsonable import finite
from trexport.manifest import package_versions
from trexport.merging import merge
from trexport.models.adapters import open_adapters
from trexport.models.base import open_base
from trexport.models.sample import Sample, sample_of
from trexport.parity.reference import Reference
from trexport.parity.report import ParityReport
from trexport.parity.validate import ValidateOptions, validate
from trexport.progress import SILENT, Progress
from trlora.errors import nearest
from trlora.files import atomic_folder, check_free

SAMPLE = "sample:digits"
DEVICE: Device = "cpu"
REPORT_NAME = "report.html"


@final
@dataclass(frozen=True)
class DemoResult:
    """What a demo found."""

    parity: Mapping[str, ParityReport]
    bench: BenchReport

    @property
    def passed(self) -> bool:
        return all(report.passed for report in self.parity.values())


def run_demo(
    out: Path,
    names: Sequence[str] = (),
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
    say: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Take adapters of the sample through the whole line, on the CPU: merge, export, validate, draw, measure, report.

    Args:
        out: gets `report.html`, `report.json`, and for each adapter `NAME/merged` and `NAME/onnx`.
        names: of the adapters; all of the sample's unless given.
        say: told what is being done, a line at a time.

    Raises:
        UsageError: an adapter that the sample does not have.
        MissingError: ONNX Runtime is not installed.
    """
    check_free(out, overwrite=overwrite)
    base = open_base(SAMPLE)
    sample = sample_of(base)
    assert sample is not None
    for name in names:
        if name not in sample.adapters:
            raise UsageError(
                f"unknown adapter {name!r}, expected one of {list(sample.adapters)}{nearest(name, sample.adapters)}"
            )
    chosen = list(names) or list(sample.adapters)
    parity: dict[str, ParityReport] = {}
    pictures: dict[str, tuple[str, dict[str, bytes]]] = {}
    with atomic_folder(out, overwrite=overwrite) as folder:
        for name in chosen:
            adapters = open_adapters([f"{SAMPLE}/{name}"], base)
            merged, onnx = folder / name / "merged", folder / name / "onnx"
            say(f"{name}: merge into a dense UNet")
            merge(base, adapters, merged, progress=progress)
            say(f"{name}: export to ONNX")
            export_onnx(base, adapters, onnx, progress=progress)
            say(f"{name}: prove both equal to PyTorch")
            for kind, artifact_folder in (("merged", merged), ("onnx", onnx)):
                artifact = open_artifact(artifact_folder)
                options = ValidateOptions(trajectory_steps=sample.denoising.steps)
                parity[f"{name}, {kind}"] = validate(artifact, base, adapters, DEVICE, options, progress=progress)
            say(f"{name}: draw with each")
            reference = Reference(base, adapters, DEVICE)
            shown = sample.adapters[name]["show_prompts"]
            images = {
                "base": draw(sample, reference.plain, shown),
                "adapter, attached": draw(sample, reference.adapted, shown),
                "adapter, merged": _draw_merged(sample, merged, shown),
                "ONNX Runtime": _draw_onnx(sample, onnx, shown),
            }
            description = sample.adapters[name]["description"]
            pictures[name] = (description, {row: png_strip(image) for row, image in images.items()})
        say("measure one step in every backend")
        first = chosen[0]
        artifact = open_artifact(folder / first / "onnx")
        report = bench(
            base,
            open_adapters([f"{SAMPLE}/{first}"], base),
            OnnxFile(artifact.onnx_path, artifact.manifest.io),
            DEVICE,
            BenchOptions(sizes={"sequence_length": sample.prompts.shape[1]}, iterations=50),
            progress=progress,
        )
        plot(report, folder / "latency.png")
        html = report_html(
            pictures, list(parity.items()), report, (folder / "latency.png").read_bytes(), package_versions()
        )
        (folder / REPORT_NAME).write_text(html, encoding="utf-8")
        fields = {"parity": {key: value.to_dict() for key, value in parity.items()}, "bench": report.to_dict()}
        (folder / "report.json").write_text(
            json.dumps(finite(fields), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
    return DemoResult(parity, report)


def _draw_merged(sample: Sample, folder: Path, prompts: Sequence[int]) -> Tensor:
    with BACKENDS["torch"].load(TorchModel(open_base(str(folder)), (), "fp32"), DEVICE) as runner:
        return draw(sample, lambda feeds: runner(feeds)["out_sample"], prompts)


def _draw_onnx(sample: Sample, folder: Path, prompts: Sequence[int]) -> Tensor:
    artifact = open_artifact(folder)
    with BACKENDS["onnxruntime"].load(OnnxFile(artifact.onnx_path, artifact.manifest.io), DEVICE) as runner:
        return draw(sample, lambda feeds: runner(feeds)["out_sample"], prompts)
