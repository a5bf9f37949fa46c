"""From a model in memory to a package."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from trexport.backends.aoti.quiet import quiet
from trexport.backends.aoti.runner import weight_input
from trexport.io_spec import ADAPTER_INDEX, ADAPTER_STRENGTH, ModelSpec, parts_of
from trexport.models.bank import Choice
from trexport.models.float32 import full_float32, is_float32
from trexport.models.fused import FuseReport, join_
from trexport.models.model import outputs_of
from trexport.profile import Profile
from trexport.progress import Progress

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


@final
@dataclass(frozen=True)
class Banked:
    """What a bank's package takes beside the spec's inputs."""

    choice: Choice
    """That the model's layers read."""
    weights: Mapping[str, Tensor]
    """To trace with, on the model's device, by name."""

    @property
    def feeds(self) -> dict[str, Tensor]:
        """The same, by input."""
        return {weight_input(name): weight for name, weight in self.weights.items()}


def compiled(
    model: nn.Module,
    spec: ModelSpec,
    feeds: Mapping[str, Tensor],
    profile: Profile,
    multiple: int,
    fused: FuseReport | None,
    banked: Banked | None,
    path: Path,
    settings: Mapping[str, Any],
    progress: Progress,
) -> Mapping[str, int]:
    """Write the package of a model, in evaluation mode, to `path`.

    Args:
        feeds: to trace with, on the model's device, of `traced_sizes`.
        multiple: of height and width.
        fused: how the model was rewritten, None where it was not.
        banked: of a bank.
        settings: of Inductor.

    Returns:
        what of the program was joined with our kernels, and how often.

    Raises:
        Exception: tracer, compiler and linker each have their own.
    """
    with quiet(), own_cache(), torch.no_grad(), full_float32(is_float32(spec)):  # which the compiler asks for too
        with progress.task("trace"):
            shapes = _dynamic_shapes(spec, profile, multiple)
            given = dict(feeds)
            if banked is not None:
                given |= banked.feeds
                shapes |= dict.fromkeys(banked.feeds)
            program = torch.export.export(_Step(model, spec, banked).eval(), (), given, dynamic_shapes=shapes)
            joined = _ready(program, fused)
        with progress.task("compile"):
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(settings))
    return joined


def _ready(program: ExportedProgram, fused: FuseReport | None) -> Mapping[str, int]:
    """What has to be done to a program before it is compiled."""
    # torch.export switches cuDNN off, and what fake convolutions answer then, a layout that is not cuDNN's, is kept for
    # whoever asks next: the compiler would read real outputs in a wrong order
    for cache in fake_caches(program):
        cache.clear()
    return join_(program) if fused is not None and fused.options.kernels == "triton" else {}


def fake_caches(program: ExportedProgram) -> list[MutableMapping[Any, Any]]:
    """Where torch keeps what fake tensors have answered: for all programs, and for those with the free sizes of this one."""
    tensors = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    mode = detect_fake_mode(tensors)
    own = [] if mode is None or mode.shape_env is None else [mode.shape_env.fake_tensor_cache]
    return [FakeTensorMode.cache, *own]


@final
class _Step(nn.Module):
    """The model as a function of tensors named as the spec's. It has the model's own children, so that the names of all
    parameters are the model's."""

    def __init__(self, model: nn.Module, spec: ModelSpec, banked: Banked | None = None) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)

        def forward(**feeds: Tensor) -> Tensor | tuple[Tensor, ...]:
            if banked is None:
                outputs = outputs_of(model, feeds)
            else:
                weights = {name: feeds.pop(weight_input(name)) for name in banked.weights}
                with banked.choice.of(feeds[ADAPTER_INDEX], feeds[ADAPTER_STRENGTH], weights):
                    outputs = outputs_of(model, feeds)
            return outputs[0] if len(outputs) == 1 else outputs

        # torch.export asks which arguments there are
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [*(tensor.name for tensor in spec.inputs), *(banked.feeds if banked else ())]
        named = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        forward.__signature__ = named  # type: ignore[attr-defined]
        self.forward = forward


@contextmanager
def own_cache() -> Iterator[None]:
    """A cache of the compiler that is gone afterwards, unless the user has one: torch's default grows without end."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    from torch._inductor.utils import fresh_cache

    # torch itself puts its default there
    if os.environ.get(_CACHE, default_cache_dir()) != default_cache_dir():
        yield
        return

    with tempfile.TemporaryDirectory(prefix="trexport-inductor-") as folder, fresh_cache(dir=folder, delete=False):
        yield


def traced_sizes(profile: Profile) -> dict[str, int]:
    """The usual sizes, but 2 where a free axis would be 1: torch takes a 1 for a constant."""
    return {axis: size if axis in profile.fixed else max(2, size) for axis, size in profile.opt.items()}


def _dynamic_shapes(spec: ModelSpec, profile: Profile, multiple: int) -> dict[str, dict[int, Any] | None]:
    """Input → dimension → its bounds, for the axes that the profile leaves free."""
    dims: dict[str, Any] = {}
    for axis in profile.opt.keys() - profile.fixed.keys():
        least, most = profile.min[axis], profile.max[axis]
        if axis in ("height", "width") and multiple > 1:
            dims[axis] = multiple * torch.export.Dim(axis, min=least // multiple, max=most // multiple)
        else:
            dims[axis] = torch.export.Dim(axis, min=least, max=most)
    shapes: dict[str, dict[int, Any] | None] = {}
    for tensor in spec.inputs:
        named = [(n, parts_of(axis)) for n, axis in enumerate(tensor.axes) if isinstance(axis, str)]
        free = {n: times * dims[name] if times > 1 else dims[name] for n, (name, times, _) in named if name in dims}
        shapes[tensor.name] = free or None
    return shapes
