"""`trexport validate`: is the artifact equal to PyTorch, and do its adapters do anything?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from trexport.adapter_file import factored_of
from trexport.artifact import Artifact
from trexport.backends import BACKENDS, Device
from trexport.errors import ArtifactError, TrexportError, UsageError
from trexport.io_spec import ModelSpec
from trexport.models.adapters import BoundAdapter
from trexport.models.architectures import ARCHITECTURES, Limit, default_sizes, limits_of
from trexport.models.base import Base
from trexport.models.diffusion import Denoising
from trexport.models.model import load_model, merge_into_, random_feeds
from trexport.models.sample import Sample, sample_of
from trexport.parity.compare import Who, compare_step, compare_trajectory
from trexport.parity.components import compare_components, judge_components
from trexport.parity.judge import judge
from trexport.parity.locate import first_deviation
from trexport.parity.reference import Reference
from trexport.parity.report import ComponentParity, FirstDeviation, ParityReport, StepParity, TrajectoryParity
from trexport.parity.tolerance import TOLERANCES, Tolerance
from trexport.profile import Profile
from trexport.progress import SILENT, Progress
from trexport.session.forms import is_written
from trexport.session.sources import backend_for, source_in_session, source_of

_IN_SESSION = Who("in a session", None)


@final
@dataclass(frozen=True)
class ValidateOptions:
    """What to check."""

    timesteps: Sequence[float] = (1, 250, 500, 750, 999)
    seeds: Sequence[int] = (0, 1)
    trajectory_steps: int = 10
    """0 leaves the trajectory out."""
    sizes: Mapping[str, int] | None = None
    """Of the free axes; None for the model's own, and a second, different shape."""
    relative_l2: float | None = None
    """Another limit than the precision's own."""
    locate: bool = True
    """On failure, look for the first tensor that is wrong."""


def validate(
    artifact: Artifact,
    base: Base,
    adapters: Sequence[BoundAdapter],
    device: Device,
    options: ValidateOptions | None = None,
    *,
    progress: Progress = SILENT,
) -> ParityReport:
    """Compare an artifact with float32 PyTorch with the adapters factored, over timesteps, seeds, shapes, and over one
    whole trajectory; of a whole pipeline, each of its other models too, of a merged one the text encoders with adapters in
    them. A blank or swappable artifact is fed the adapters;
    of a bank, every adapter is checked alone, and all in one batch, each sample against its own picture. Where a session
    runs an artifact in another way than the file says (`trexport.session.forms.is_written`), both are checked. Inputs are
    rounded to the artifact's precision first, so that both see the same.

    It fails where an error leaves its tolerance, where anything is NaN or Inf, and where the adapters do not move the
    output, for then equality proves nothing.

    Raises:
        MissingError: the backend that runs the artifact is not here.
    """
    options = options or ValidateOptions()
    manifest = artifact.manifest
    tolerance = TOLERANCES[manifest.dtype].scaled(options.relative_l2)
    reference = Reference(base, adapters, device, progress=progress)
    sample = sample_of(base, options.trajectory_steps or None)
    backend = BACKENDS[backend_for(artifact)]
    source = source_of(artifact, adapters, device)
    shapes = _shapes(manifest.io, base, sample, options.sizes)
    if manifest.kind == "engine":
        shapes = _within(shapes, artifact.engine_record.profiles, options.sizes)
    groups = _groups(artifact, adapters)
    steps: list[StepParity] = []
    trajectory: TrajectoryParity | None = None
    with backend.load(source, device) as runner:
        cases = [
            (who, who.sizes(sizes, manifest.io), timestep, seed)
            for number, who in enumerate(groups)
            for index, sizes in enumerate(shapes)
            # the first shape is checked in full, the others for what a shape can break; so is the first adapter of a bank
            for timestep in (options.timesteps if index == number == 0 else options.timesteps[:1])
            for seed in (options.seeds if index == number == 0 else options.seeds[:1])
        ]
        with progress.task("validate", len(cases)) as task:
            for who, sizes, timestep, seed in cases:
                feeds = _feeds(manifest.io, sizes, sample, seed, timestep)
                steps.append(compare_step(runner, reference, manifest.io, feeds, sizes, timestep, seed, who))
                task.advance(1)
        if options.trajectory_steps and base.architecture.sampling is not None:
            kind = type(base.architecture)
            denoising = sample.denoising if sample else Denoising.of_folder(base.folder, options.trajectory_steps, kind)
            feeds = _feeds(manifest.io, shapes[0], sample, options.seeds[0], 0.0)
            if sample is not None and shapes[0]["sequence_length"] != sample.prompts.shape[1]:
                denoising = replace(denoising, guidance=1.0)  # its empty prompt is not that long
            trajectory = compare_trajectory(
                runner, reference, denoising, manifest.io, base.architecture, feeds, groups[0], progress
            )
    failures: list[str] = []
    if is_written(artifact, device):
        of_session = replace(_IN_SESSION, chosen=groups[-1].chosen)  # of a bank, each sample its own
        with progress.task(of_session.label):
            for who in of_session.in_batches(manifest.io):
                try:
                    in_session = source_in_session(artifact, adapters, device, who.chosen)
                except ArtifactError as error:
                    # weights that are not finite; the file's own steps are to be told all the same
                    failures.append(f"{of_session.label}: {error}")
                    break
                with backend.load(in_session, device) as runner:
                    for shape in shapes:
                        sizes = who.sizes(shape, manifest.io)
                        timestep, seed = options.timesteps[0], options.seeds[0]
                        feeds = _feeds(manifest.io, sizes, sample, seed, timestep)
                        step = compare_step(runner, reference, manifest.io, feeds, sizes, timestep, seed, who)
                        steps.append(step)
            else:
                groups = [*groups, of_session]
    elsewhere = any(adapter.strength for adapter in adapters if not adapter.on_base)  # shown by what it is on
    shown = False
    for number, who in enumerate(groups):
        own = [step for step in steps if step.who == who.label]
        on_base = [adapter for adapter in who.among(adapters) if adapter.on_base]
        has_effect = any(adapter.strength for adapter in on_base)
        adapted = bool(on_base) and (has_effect or not elsewhere)
        shown = shown or adapted
        found = judge(own, trajectory if number == 0 else None, tolerance, adapted=adapted, has_effect=has_effect)
        failures += [f"{who.label}: {failure}" if who.label else failure for failure in found]
    components: list[ComponentParity] = []
    model_failed = bool(failures)
    if manifest.components or manifest.text_encoders:
        pipeline = artifact.pipeline(base)
        components = compare_components(artifact, pipeline, adapters, device, options.seeds, progress=progress)
        failures += judge_components(components)
    if adapters and not shown and all(component.effect is None for component in components):
        failures.append(
            "nothing was compared that an adapter of another strength than 0 changes: no effect can be shown"
        )
    deviation, note = None, None
    if model_failed and all(failure.startswith(f"{_IN_SESSION.label}: ") for failure in failures):
        note = "the file agrees with PyTorch; what a session makes of it, with weights that it writes, does not"
    of_file = [step for step in steps if step.who != _IN_SESSION.label]
    worst = max(of_file, key=lambda step: (math.isnan(step.relative_l2), step.relative_l2))
    if model_failed and options.locate and not worst.relative_l2 <= tolerance.relative_l2:
        if manifest.kind != "onnx" or manifest.dtype == "bf16":
            note = "the first wrong tensor is looked for in fp32 and fp16 ONNX models only"
        elif (artifact.blank and adapters) or manifest.swappable is not None or groups[0].chosen is not None:
            note = "the first wrong tensor is looked for in models that hold their adapters, not where they are fed"
        else:
            with progress.task("locate"):
                deviation, note = _locate(artifact, base, adapters, worst, sample, tolerance, device)
    return ParityReport(
        artifact=str(artifact.folder),
        backend=backend.name,
        device=device,
        dtype=manifest.dtype,
        tolerance=tolerance,
        steps=steps,
        trajectory=trajectory,
        failures=failures,
        first_deviation=deviation,
        location_note=note,
        components=components,
    )


def _groups(artifact: Artifact, adapters: Sequence[BoundAdapter]) -> list[Who]:
    """Of a bank every adapter alone, and all of them and the base in one batch; otherwise the adapters together."""
    if artifact.manifest.factored is None or factored_of(artifact).bank is None:
        return [Who("", None)]
    alone = [Who(adapter.name, [number]) for number, adapter in enumerate(adapters)]
    turns: list[int | None] = [*range(len(adapters)), None]
    return [*alone, Who("each its own", turns)] if adapters else [Who("base", [None])]


def _shapes(io: ModelSpec, base: Base, sample: Sample | None, given: Mapping[str, int] | None) -> list[dict[str, int]]:
    """The shapes to check: the model's own, or those given, and one that differs in every free axis."""
    limits = limits_of(base.config)
    given = base.architecture.sizes(given or {})
    first = default_sizes(base.config)
    if sample is not None:
        first["sequence_length"] = sample.prompts.shape[1]
    first |= io.fixed_sizes() | given
    wrong = {axis: size for axis, size in given.items() if io.fixed_sizes().get(axis, size) != size}
    if wrong:
        raise TrexportError(f"sizes {wrong} asked for, the artifact fixes {io.fixed_sizes()}")
    second = {axis: (_other(axis, size, limits) if axis in io.free_axes else size) for axis, size in first.items()}
    return [first] if second == first else [first, second]


def _other(axis: str, size: int, limits: Mapping[str, Limit]) -> int:
    """A size that an axis may have too: a little more, or less for the width and where there is no more."""
    step = limits[axis].multiple * (2 if axis == "sequence_length" else 1)
    most = limits[axis].most
    if axis == "width" or (most is not None and size + step > most):
        return max(limits[axis].multiple, size - step)
    return size + step


def _within(
    shapes: Sequence[dict[str, int]], profiles: Sequence[Profile], given: Mapping[str, int] | None
) -> list[dict[str, int]]:
    """Of the shapes those that an engine takes, and the two ends of each of its profiles."""
    if given and not any(profile.holds(shapes[0]) for profile in profiles):
        raise UsageError(f"sizes {shapes[0]} asked for, the engine takes {'; '.join(map(str, profiles))}")
    fitting = [sizes for sizes in shapes if any(profile.holds(sizes) for profile in profiles)]
    ends = [dict(sizes) for profile in profiles for sizes in (profile.opt, profile.min, profile.max)]
    return [sizes for n, sizes in enumerate([*fitting, *ends]) if sizes not in [*fitting, *ends][:n]]


def _feeds(
    io: ModelSpec, sizes: Mapping[str, int], sample: Sample | None, seed: int, timestep: float
) -> dict[str, Tensor]:
    """Inputs of one step: random ones, with a sample's real prompts where there are some."""
    feeds = random_feeds(io, sizes, seed=seed, timestep=timestep)
    given = feeds.get("timestep")
    if given is not None and given.dim():  # for each sample: the first has the one asked for, the others are elsewhere
        scale = ARCHITECTURES[io.model].timestep_scale
        feeds["timestep"] = (given / scale + 311 * torch.arange(len(given))) % 1000 * scale
    if sample is not None and sizes["sequence_length"] == sample.prompts.shape[1]:
        shown = next(iter(sample.adapters.values()), {}).get("show_prompts") or range(len(sample.prompts) - 1)
        rows = [list(shown)[(seed + i) % len(list(shown))] for i in range(sizes["batch_size"])]
        feeds["encoder_hidden_states"] = sample.prompts[rows].to(feeds["encoder_hidden_states"])
    return feeds


def _locate(
    artifact: Artifact,
    base: Base,
    adapters: Sequence[BoundAdapter],
    worst: StepParity,
    sample: Sample | None,
    tolerance: Tolerance,
    device: Device,
) -> tuple[FirstDeviation | None, str | None]:
    model = load_model(base, "fp32")
    merge_into_(model, adapters)
    feeds = _feeds(artifact.manifest.io, worst.sizes, sample, worst.seed, worst.timestep)
    try:
        found = first_deviation(
            model, base.config, artifact.onnx_path, artifact.manifest.io, feeds, tolerance.relative_l2, device,
            artifact.manifest.opset or 18,
        )  # fmt: skip
    except TrexportError as error:
        return None, f"the first wrong tensor could not be looked for: {error}"
    if found is None:
        return None, "no tensor leaves the tolerance while it is watched: a fusion of the runtime is at fault"
    return found, None
