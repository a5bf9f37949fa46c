"""Peak memory while something runs."""

from __future__ import annotations

import gc
import threading
from types import TracebackType
from typing import Self, final

import psutil
import torch

from trexport.backends import Device

_EVERY_SECONDS = 0.01


@final
class PeakMemory:
    """Samples memory in a block: on the CPU, the process's resident memory; on CUDA, what is used of the device (whoever
    allocated it: ONNX Runtime does not use torch's allocator). `bytes` is the peak above what was used at the start."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = self._peak = 0

    @property
    def bytes(self) -> int:
        return self._peak - self._start

    def _used(self) -> int:
        if self._device == "cuda":
            free, total = torch.cuda.mem_get_info()
            return total - free
        return psutil.Process().memory_info().rss

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY_SECONDS):
            self._peak = max(self._peak, self._used())

    def __enter__(self) -> Self:
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()  # what torch keeps for later would hide what is needed now
        self._start = self._peak = self._used()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._peak = max(self._peak, self._used())
        self._stop.set()
        self._thread.join()
