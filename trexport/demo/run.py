"""`trexport demo`, step by step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from trexport.artifact import open_artifact
from trexport.backends import BACKENDS, Device, OnnxFile, TorchModel
from trexport.bench.forms import FormsReport, cost_of, file_for, report_forms
from trexport.bench.report import BenchReport, plot
from trexport.bench.run import BenchOptions, bench
from trexport.demo.html import report_html
from trexport.demo.pictures import draw, png_strip
from trexport.errors import UsageError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.swappable import SwappableOptions
from trexport.jsonable import finite
from trexport.manifest import package_versions
from trexport.merging import merge
from trexport.models.adapters import open_adapters
from trexport.models.base import Base, open_base
from trexport.models.sample import Sample, sample_of
from trexport.parity.reference import Reference
from trexport.parity.report import ParityReport
from trexport.parity.validate import ValidateOptions, validate
from trexport.progress import SILENT, Progress
from trexport.session import Session
from trlora.errors import nearest
from trlora.files import atomic_folder, check_free

SAMPLE = "sample:digits"
DEVICE: Device = "cpu"
REPORT_NAME = "report.html"
FORMS = ("factored", "bank", "swappable")
_MANY = (
    "one factored ONNX model with two places for adapters, switched between runs; and a bank, in which every sample of one "
    "batch has an adapter of its own"
)


@final
@dataclass(frozen=True)
class DemoResult:
    """What a demo found."""

    parity: Mapping[str, ParityReport]
    bench: BenchReport
    forms: FormsReport

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
    """Take adapters of the sample through the whole line, on the CPU: merge, export in all forms, validate, draw, measure,
    report.

    Args:
        out: gets `report.html`, `report.json`, for each adapter `NAME/merged` and `NAME/onnx`, and the models that take many
            adapters, `factored`, `bank` and `swappable`.
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
                "base": _draw_reference(sample, reference.plain, shown),
                "adapter, attached": _draw_reference(sample, reference.adapted, shown),
                "adapter, merged": _draw_merged(sample, merged, shown),
                "ONNX Runtime": _draw_onnx(sample, onnx, shown),
            }
            description = sample.adapters[name]["description"]
            pictures[name] = (description, {row: png_strip(image) for row, image in images.items()})
        say("one model, many adapters: factored, a bank, swappable")
        rows, reports = _many(sample, base, chosen, folder, progress)
        pictures["one model, many adapters"] = (_MANY, rows)
        parity |= reports
        say("measure one step in every backend")
        first = chosen[0]
        adapters = open_adapters([f"{SAMPLE}/{first}"], base)
        paths = {"merged": folder / first / "onnx"} | {form: folder / form for form in FORMS}
        forms = {form: open_artifact(path, verify=False) for form, path in paths.items()}
        files = {form: file_for(artifact, adapters, DEVICE) for form, artifact in forms.items()}
        report = bench(
            base,
            adapters,
            {form: file for form, file in files.items() if isinstance(file, OnnxFile)},
            DEVICE,
            BenchOptions(sizes={"sequence_length": sample.prompts.shape[1]}, iterations=50),
            progress=progress,
        )
        results = {result.backend: result for result in report.results}
        costs = report_forms(
            [cost_of(a, adapters, DEVICE, results[f"onnxruntime, {form}"]) for form, a in forms.items()]
        )
        plot(report, folder / "latency.png")
        html = report_html(
            pictures, list(parity.items()), report, costs, (folder / "latency.png").read_bytes(), package_versions()
        )
        (folder / REPORT_NAME).write_text(html, encoding="utf-8")
        fields = {
            "parity": {key: value.to_dict() for key, value in parity.items()},
            "bench": report.to_dict(),
            "forms": asdict(costs),
        }
        (folder / "report.json").write_text(
            json.dumps(finite(fields), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
    return DemoResult(parity, report, costs)


def _many(
    sample: Sample, base: Base, names: Sequence[str], folder: Path, progress: Progress
) -> tuple[dict[str, bytes], dict[str, ParityReport]]:
    """Export the forms that keep adapters apart, prove each, and draw with them: rows of pictures and parity by form."""
    arguments = [f"{SAMPLE}/{name}" for name in names]
    adapters = open_adapters(arguments, base)
    options = {
        "factored": ExportOptions(factored=FactoredOptions(blank=True)),
        "bank": ExportOptions(factored=FactoredOptions(bank=len(adapters))),
        "swappable": ExportOptions(swappable=SwappableOptions()),
    }
    parity: dict[str, ParityReport] = {}
    for form, chosen in options.items():
        export_onnx(base, adapters[:2] if form == "factored" else adapters, folder / form, chosen, progress=progress)
        artifact = open_artifact(folder / form)
        used = adapters[:2] if form == "factored" else adapters
        parity[f"{' + '.join(names[: len(used)])}, {form}"] = validate(
            artifact, base, used, DEVICE, ValidateOptions(trajectory_steps=sample.denoising.steps), progress=progress
        )
    shown = list(sample.adapters[names[-1]]["show_prompts"])
    first = sample.adapters[names[0]]["show_prompts"][0]
    shown = shown if first in shown else [first, *shown]
    pair = list(names[:2])
    rows: dict[str, bytes] = {}
    with Session(folder / "factored", DEVICE, verify=False) as session:
        for name, argument in zip(names[:2], arguments, strict=False):
            session.load_adapter(name, argument)
        states = {f"factored: {name}": {name: 1.0} for name in pair}
        states |= {"factored: half of each": dict.fromkeys(pair, 0.5)} if len(pair) > 1 else {}
        for row, strengths in (states | {"factored: none": {}}).items():
            session.activate(strengths)
            rows[row] = png_strip(draw(sample, lambda feeds: session.run(feeds)["out_sample"], shown))
    with Session(folder / "bank", DEVICE, verify=False) as session:
        for name, argument in zip(names, arguments, strict=True):
            session.load_adapter(name, argument)
        turns = [*names, None]
        own = [turns[index % len(turns)] for index in range(len(shown))]

        def run(feeds: Mapping[str, Tensor]) -> Tensor:
            # guidance runs every sample twice in one batch
            return session.run(feeds, adapters=own * (len(feeds["sample"]) // len(own)))["out_sample"]

        order = ", ".join(name or "none" for name in turns)
        rows[f"bank, one batch: {order}, in turn"] = png_strip(draw(sample, run, shown))
    return rows, parity


def _draw_reference(
    sample: Sample, step: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]], prompts: Sequence[int]
) -> Tensor:
    return draw(sample, lambda feeds: step(feeds)[0], prompts)


def _draw_merged(sample: Sample, folder: Path, prompts: Sequence[int]) -> Tensor:
    with BACKENDS["torch"].load(TorchModel(open_base(str(folder)), (), "fp32"), DEVICE) as runner:
        return draw(sample, lambda feeds: runner(feeds)["out_sample"], prompts)


def _draw_onnx(sample: Sample, folder: Path, prompts: Sequence[int]) -> Tensor:
    artifact = open_artifact(folder)
    with BACKENDS["onnxruntime"].load(OnnxFile(artifact.onnx_path, artifact.manifest.io), DEVICE) as runner:
        return draw(sample, lambda feeds: runner(feeds)["out_sample"], prompts)
