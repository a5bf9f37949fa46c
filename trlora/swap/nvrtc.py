"""The swap kernel compiled by NVRTC and launched through the CUDA driver: both come with torch's CUDA wheels."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch

from trlora.swap.variant import Variant

_SOURCE = Path(__file__).with_name("kernel.cu")
_OLDEST = (8, 0)


def missing(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device; None where it can."""
    if device.type != "cuda":
        return f"no kernel for {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"compute capability {capability[0]}.{capability[1]}, the kernel is for 8.0 and later"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed"
    return None


def compile_cubin(variant: Variant, capability: tuple[int, int]) -> bytes:
    """The kernel's machine code; needs no GPU.

    Raises:
        RuntimeError: NVRTC refuses it; its log is in the message.
    """
    from cuda.bindings import nvrtc  # pyright: ignore[reportAttributeAccessIssue]

    text = "".join(f"#define {name} {value}\n" for name, value in variant.macros().items())
    program = _done(nvrtc.nvrtcCreateProgram((text + _SOURCE.read_text()).encode(), b"kernel.cu", 0, [], []))
    try:
        options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode()]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _done(nvrtc.nvrtcGetProgramLogSize(program))
            _done(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"NVRTC does not compile {variant} for {options[0].decode()}: {log.decode().strip()}")
        code = b" " * _done(nvrtc.nvrtcGetCUBINSize(program))
        _done(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@final
class Kernel:
    """A variant of the kernel on a GPU."""

    def __init__(self, variant: Variant, device: torch.device) -> None:
        from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

        self.variant = variant
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes torch's context the current one
            code = compile_cubin(variant, torch.cuda.get_device_capability())
            self._module = _done(driver.cuModuleLoadData(code))
            self.function = _done(driver.cuModuleGetFunction(self._module, b"swap"))
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _done(driver.cuFuncSetAttribute(self.function, most, variant.shared_bytes))
            count = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor
            together = _done(count(self.function, variant.threads, variant.shared_bytes))
        self.resident_blocks = together * torch.cuda.get_device_properties(device).multi_processor_count
        """That the GPU runs at a time."""


@final
class Bound:
    """A kernel with its arguments, to be launched again and again.

    Args:
        arguments: tensors, passed as pointers, and int32 values.
        floats: how many float32 values come after them, given with every launch.
    """

    def __init__(self, kernel: Kernel, blocks: int, arguments: Sequence[torch.Tensor | int], floats: int) -> None:
        from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

        self._keep = (kernel, arguments)
        fixed = [
            ctypes.c_void_p(item.data_ptr()) if isinstance(item, torch.Tensor) else ctypes.c_int(item)
            for item in arguments
        ]
        self._floats = [ctypes.c_float() for _ in range(floats)]
        self._values = [*fixed, *self._floats]
        self._addresses = (ctypes.c_void_p * len(self._values))(*map(ctypes.addressof, self._values))
        variant = kernel.variant
        self._launch = functools.partial(
            driver.cuLaunchKernel, kernel.function, blocks, 1, 1, variant.threads, 1, 1, variant.shared_bytes
        )

    def __call__(self, floats: Sequence[float], stream: int) -> None:
        """Launch it on a stream, given by its handle."""
        for value, given in zip(self._floats, floats, strict=True):
            value.value = given
        _done(self._launch(stream, ctypes.addressof(self._addresses), 0))  # the driver copies the values


@functools.lru_cache(maxsize=256)
def kernel_for(variant: Variant, device: torch.device) -> Kernel:
    """Compiled once in a process."""
    return Kernel(variant, device)


def _done(result: tuple[Any, ...]) -> Any:
    """The values of a call of cuda-bindings, whose first one is its status."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"{type(status).__name__} {status.name}")
    return values[0] if values else None
