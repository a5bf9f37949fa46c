"""TensorRT's log, kept instead of printed, and its progress, shown as ours."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from trexport.progress import Progress, Task

_KEPT = 200


def quiet_logger(trt: Any) -> Any:
    """A logger that keeps warnings and errors: `.errors`, `.warnings`, the newest last."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors = [*self.errors, message][-_KEPT:]
            elif severity == trt.ILogger.WARNING:
                self.warnings = [*self.warnings, message][-_KEPT:]

    return Logger()


def monitor(trt: Any, progress: Progress) -> Any:
    """A progress monitor: each phase of the build is a task. An exception in it, Ctrl-C above all, must not go through the
    builder's own frames: it cancels the build and waits in `.raised`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.raised: BaseException | None = None
            self._open: dict[str, tuple[AbstractContextManager[Task], Task]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            try:
                manager = progress.task(phase_name[:1].lower() + phase_name[1:], num_steps)
                self._open[phase_name] = (manager, manager.__enter__())
            except BaseException as error:
                self.raised = error

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name in self._open:
                    self._open[phase_name][1].advance(1)
            except BaseException as error:
                self.raised = error
            return self.raised is None

        def phase_finish(self, phase_name: str) -> None:
            try:
                if phase_name in self._open:
                    self._open.pop(phase_name)[0].__exit__(None, None, None)
            except BaseException as error:
                self.raised = error

        def close(self) -> None:
            """End the phases that the builder left open."""
            for name in list(self._open):
                self.phase_finish(name)

    return Monitor()
