"""Validation passes what is equal, and finds what is not: a wrong weight, a missing adapter, one that does nothing."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trexport.helpers import SIZES, damaged
from trexport.artifact import Artifact, open_artifact
from trexport.errors import TrexportError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.merging import merge
from trexport.models.adapters import open_adapters
from trexport.models.base import Base, open_base
from trexport.parity.judge import judge
from trexport.parity.report import ParityReport, StepParity, TrajectoryParity
from trexport.parity.tolerance import TOLERANCES
from trexport.parity.validate import ValidateOptions, validate

QUICK = ValidateOptions(timesteps=(10, 700), seeds=(0,), trajectory_steps=3, sizes=SIZES)


def check(artifact: Artifact, options: ValidateOptions = QUICK) -> ParityReport:
    return validate(artifact, *artifact.sources(), "cpu", options)


def test_an_onnx_artifact_passes_over_timesteps_shapes_and_a_trajectory(onnx_artifact: Artifact) -> None:
    report = check(onnx_artifact)
    assert report.passed
    assert {step.timestep for step in report.steps} == {10, 700}
    first, other = report.steps[0].sizes, report.steps[-1].sizes
    assert all(first[axis] != other[axis] for axis in first)
    assert report.trajectory is not None
    assert report.trajectory.psnr_db > 100
    assert min(step.effect for step in report.steps) > 1e-3


def test_a_merged_folder_passes(base: Base, adapter_folder: Path, tmp_path: Path) -> None:
    merge(base, open_adapters([f"{adapter_folder}=1.3"], base), tmp_path / "merged")
    report = check(open_artifact(tmp_path / "merged"))
    assert report.passed
    assert report.backend == "torch"


@pytest.fixture(scope="module")
def fixed_artifact(tmp_path_factory: pytest.TempPathFactory, base: Base, adapter_folder: Path) -> Artifact:
    """`onnx_artifact` of fixed `SIZES`: tracing it again is a third of the work."""
    folder = tmp_path_factory.mktemp("onnx") / "fixed"
    export_onnx(base, open_adapters([f"{adapter_folder}=0.7"], base), folder, ExportOptions(fixed=SIZES))
    return open_artifact(folder)


@pytest.mark.parametrize(
    ("name", "operator", "module", "artifact"),
    [
        ("conv_in.weight", "Conv", "conv_in", "onnx_artifact"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight", "MatMul", "to_v", "fixed_artifact"),
        ("up_blocks.1.resnets.0.norm1.weight", "GroupNormalization", "norm1", "fixed_artifact"),
    ],
)
def test_a_wrong_weight_is_found_at_its_layer(
    name: str, operator: str, module: str, artifact: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    report = check(damaged(request.getfixturevalue(artifact), tmp_path / "x", name, 0.5))
    assert not report.passed
    assert report.first_deviation is not None
    assert report.first_deviation.operator == operator
    assert report.first_deviation.module == name.removesuffix(".weight")
    assert report.first_deviation.module.endswith(module)
    assert report.first_deviation.relative_l2 > report.tolerance.relative_l2
    assert (report.first_deviation.last_good_relative_l2 or 0) <= report.tolerance.relative_l2


def test_a_nan_fails(onnx_artifact: Artifact, tmp_path: Path) -> None:
    quick = dataclasses.replace(QUICK, locate=False)
    report = check(damaged(onnx_artifact, tmp_path / "x", "time_embedding.linear_1.bias", math.nan), quick)
    assert not report.passed
    assert math.isnan(report.worst.relative_l2)


def test_an_artifact_without_its_adapter_fails(
    base: Base, onnx_artifact: Artifact, adapter_folder: Path, tmp_path: Path
) -> None:
    export_onnx(base, [], tmp_path / "plain", ExportOptions(fixed=SIZES))
    plain = open_artifact(tmp_path / "plain")
    assert check(plain).passed  # as a base it is right
    pretending = Artifact(
        plain.folder, dataclasses.replace(plain.manifest, form="merged", adapters=onnx_artifact.manifest.adapters)
    )
    report = check(pretending, dataclasses.replace(QUICK, locate=False))
    assert any("nearer to the base" in failure for failure in report.failures)


def test_an_adapter_that_does_nothing_fails(base: Base, adapter_folder: Path, tmp_path: Path) -> None:
    for name, strength in (("zero", "0"), ("tiny", "1e-6")):
        merge(base, open_adapters([f"{adapter_folder}={strength}"], base), tmp_path / name)
        report = check(open_artifact(tmp_path / name))
        assert not report.passed
        assert report.worst.relative_l2 <= report.tolerance.relative_l2


def test_half_precision_has_its_own_tolerance(half_artifact: Artifact) -> None:
    options = ValidateOptions(timesteps=(500,), seeds=(0,), trajectory_steps=3)
    report = check(half_artifact, options)
    assert report.passed
    assert report.tolerance == TOLERANCES["fp16"]
    assert report.worst.relative_l2 > 1e-5
    assert not check(half_artifact, dataclasses.replace(options, relative_l2=1e-5, locate=False)).passed


def test_sizes_that_the_artifact_fixes_otherwise_are_refused(half_artifact: Artifact) -> None:
    with pytest.raises(TrexportError, match="height"):
        check(half_artifact, ValidateOptions(sizes={"height": 16}))


STEP = StepParity(dict(SIZES), 1.0, 0, 1e-7, 1e-7, 1e-7, 1.0, 0.1, 0.1)
TRAJECTORY = TrajectoryParity(3, 1.0, 0, 1e-7, 120.0, 0.1)


@pytest.mark.parametrize("field", ["max_abs_ratio", "relative_l2", "cosine"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_that_is_not_finite_is_judged_good(field: str, value: float) -> None:
    assert judge([STEP], TRAJECTORY, TOLERANCES["bf16"], adapted=True, has_effect=True) == []
    if field == "cosine" and value == math.inf:
        value = -math.inf
    wrong = dataclasses.replace(STEP, **{field: value})
    assert judge([STEP, wrong, STEP], TRAJECTORY, TOLERANCES["bf16"], adapted=True, has_effect=True)


@pytest.mark.parametrize("change", [{"relative_l2": math.nan}, {"psnr_db": math.nan}, {"psnr_db": 1.0}])
def test_a_bad_trajectory_fails(change: dict[str, float]) -> None:
    wrong = dataclasses.replace(TRAJECTORY, **change)
    assert judge([STEP], wrong, TOLERANCES["bf16"], adapted=True, has_effect=True)


def test_tolerances_grow_with_the_rounding() -> None:
    limits = [TOLERANCES[dtype].relative_l2 for dtype in ("fp32", "fp16", "bf16")]
    units = [torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert np.argsort(limits).tolist() == np.argsort(units).tolist() == [0, 1, 2]
    assert all(limit > unit for limit, unit in zip(limits, units, strict=True))


def test_guidance_does_not_double_a_fixed_batch(tmp_path: Path) -> None:
    """The sample draws with guidance, its trajectory runs two samples for each; this model takes one."""
    base = open_base("sample:digits")
    adapters = open_adapters(["sample:digits/slant"], base)
    fixed = {"batch_size": 1, "height": 16, "width": 16, "sequence_length": 3}
    export_onnx(base, adapters, tmp_path / "fixed", ExportOptions(fixed=fixed))
    report = validate(open_artifact(tmp_path / "fixed"), base, adapters, "cpu", dataclasses.replace(QUICK, sizes=None))
    assert report.passed
    assert report.trajectory is not None
    assert report.trajectory.guidance > 1
