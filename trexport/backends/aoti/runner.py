"""A loaded package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from trexport.backends.aoti.quiet import quiet
from trexport.backends.base import Device, EngineFile, Runner, Step
from trexport.cuda_graph import captured
from trexport.errors import ArtifactError, RunError, UsageError
from trexport.io_spec import ADAPTER_INDEX, ADAPTER_STRENGTH
from trexport.models.float32 import full_float32, is_float32
from trexport.models.model import DTYPES, fitted, sizes_of

MULTIPLE = "height_width_multiple"
"""Where a record's settings say what height and width are multiples of."""


def weight_input(name: str) -> str:
    """By which input of a bank's package a weight is given."""
    return name.replace(".", "__")


@final
class AotInductorRunner(Runner):
    """A loaded package. Weights given as `constants`, by the names of `EngineRecord.constants`, are used where they lie: who
    overwrites them changes the next run. Those of a bank are inputs of the package, and have to be given; its index and
    strengths may be."""

    def __init__(self, source: EngineFile, device: Device) -> None:
        self.spec = source.spec
        self.device = device
        self._record = source.record
        (self._profile,) = source.record.profiles
        self._chosen = {
            name: tensor for name, tensor in source.constants.items() if name in (ADAPTER_INDEX, ADAPTER_STRENGTH)
        }
        self._constants = self._checked_constants(source)
        self._given: dict[str, Tensor] = {}
        if source.record.bank is not None:
            lacking = source.record.constants().keys() - self._constants.keys()
            if lacking:
                raise ArtifactError(f"{source.path}: {min(lacking)} is not given; a bank has no weights of its own")
            self._given = {weight_input(name): tensor for name, tensor in self._constants.items()}
            self._constants = {}
        try:
            with quiet():
                # torch's own lock around a run cannot be captured in a CUDA graph
                self._model: Any = torch._inductor.aoti_load_package(
                    str(source.path), run_single_threaded=device == "cuda"
                )
        except Exception as error:  # torch raises what it has at hand
            raise ArtifactError(
                f"{source.path}: torch {torch.__version__} does not load this package ({_first_line(error)}); "
                "build the engine again"
            ) from error
        if self._constants:
            lacks = self._constants.keys() - set(self._model.get_constant_fqns())
            if lacks:
                raise ArtifactError(f"{source.path}: {min(lacks)} is not in the package; build the engine again")
            self._model.load_constants(self._constants, check_full_update=False, user_managed=True)

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._run(self._checked(feeds))

    def step(self, feeds: Mapping[str, Tensor]) -> Step:
        inputs = self._checked(feeds)
        buffers = self._run(inputs)
        if self.device == "cpu":

            def run() -> None:
                for name, tensor in self._run(inputs).items():
                    buffers[name].copy_(tensor)

            return Step(run, inputs, buffers)
        graph, buffers = captured(lambda: self._run(inputs))
        return Step(graph.replay, inputs, buffers)

    def close(self) -> None:
        self._model = None
        self._constants = {}
        self._given = {}
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            # not inference mode: whoever has the output may write into it
            with torch.no_grad(), full_float32(is_float32(self.spec)):
                found = self._model(**inputs, **self._given)
        except RuntimeError as error:
            raise RunError(f"aotinductor did not run the model: {_first_line(error)}") from error
        outputs = found if isinstance(found, (tuple, list)) else (found,)
        return {tensor.name: output for tensor, output in zip(self.spec.outputs, outputs, strict=True)}

    def _checked(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs, copied to where and how the compiled code expects them: it does not look itself.

        Raises:
            UsageError: an input missing, or of a rank or size that the engine does not take; a place that the bank does not
                have (of an index that comes from the CPU).
        """
        self._check_places({**feeds, **self._chosen})
        inputs = {
            name: value.to(self.device, copy=True, memory_format=torch.contiguous_format)
            for name, value in fitted(self.spec, {**feeds, **self._chosen}).items()
        }
        sizes = sizes_of(self.spec, inputs)
        multiple = self._record.settings[MULTIPLE]
        if not self._profile.holds(sizes) or any(sizes.get(axis, 0) % multiple for axis in ("height", "width")):
            raise UsageError(
                f"sizes {sizes} found, the engine takes {' x '.join(self._profile.opt)} {self._profile}, height and width "
                f"multiples of {multiple}; build one with a wider --profile"
            )
        return inputs

    def _check_places(self, feeds: Mapping[str, Tensor]) -> None:
        places, index = self._record.bank, feeds.get(ADAPTER_INDEX)
        if places is None or index is None or index.device.type != "cpu":
            return
        if not bool(((index >= 0) & (index <= places)).all()):
            raise UsageError(f"{ADAPTER_INDEX}: {index.tolist()} found, expected 0 for the base, and 1 to {places}")

    def _checked_constants(self, source: EngineFile) -> dict[str, Tensor]:
        """Weights to put in the place of the package's own, on the device. torch itself would take any shape.

        Raises:
            ArtifactError: one that is no adapted weight of the engine, or of another shape or dtype.
        """
        dtype = DTYPES[self.spec.outputs[0].dtype]
        layers = source.record.constants()
        given = {name: tensor for name, tensor in source.constants.items() if name not in self._chosen}
        for name, tensor in given.items():
            if name not in layers:
                raise ArtifactError(f"{source.path}: {name} is no weight that this engine lets be replaced")
            if tuple(tensor.shape) != layers[name] or tensor.dtype != dtype:
                raise ArtifactError(
                    f"{source.path}: {name}: {tensor.dtype} of shape {list(tensor.shape)} found, expected {dtype} of "
                    f"{list(layers[name])}"
                )
        return {name: tensor.to(self.device).contiguous() for name, tensor in given.items()}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
