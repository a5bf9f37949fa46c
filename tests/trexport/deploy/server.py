"""The real `tritonserver`, of the nvidia-pytriton wheel in `.envs/triton`, started on free ports and ended for certain."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

ROOT = Path(__file__).parents[3]
ENVIRONMENT = ROOT / ".envs" / "triton"
READY_SECONDS = 60.0


def available() -> bool:
    """Whether there is a server to start."""
    return any(ENVIRONMENT.glob("lib/python3.*/site-packages/pytriton/tritonserver/bin/tritonserver"))


needs_server = pytest.mark.skipif(
    not available(), reason="no .envs/triton with a Triton server; make test makes it, on Linux with Python below 3.13"
)


class TritonServer:
    """A running server. A context manager; it is ended when left, whatever state it is in.

    Args:
        repository: the model repository.
        models: those to load; others when asked for.
        python: the environment whose `bin` the python models' `python3` is in.
        folder: for its log and links.
    """

    def __init__(
        self,
        repository: Path,
        models: Sequence[str],
        folder: Path,
        *,
        python: Path = ENVIRONMENT,
        exit_timeout: int = 10,
        options: Sequence[str] = (),
    ) -> None:
        self.http_port, self.grpc_port, metrics_port = _free_ports(3)
        self.http, self.grpc = f"127.0.0.1:{self.http_port}", f"127.0.0.1:{self.grpc_port}"
        self._log = folder / "server.log"
        (packages,) = ENVIRONMENT.glob("lib/python3.*/site-packages")
        wheel = packages / "pytriton" / "tritonserver"
        command = [
            str(wheel / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={_backends(wheel, packages.parent.name.removeprefix('python'), folder)}",
            "--model-control-mode=explicit",
            *[f"--load-model={model}" for model in models],
            *[f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")],
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={metrics_port}",
            f"--exit-timeout-secs={exit_timeout}",
            *options,
        ]
        libraries = [str(packages / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
        environment = os.environ | {
            "PATH": f"{python / 'bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": ":".join(libraries),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("VIRTUAL_ENV", None)
        self._shared_before = _shared_regions()
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_ready(self, seconds: float = READY_SECONDS) -> Self:
        """Returns when all models are ready. Raises `RuntimeError` with the log where the server ends or takes too long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=1):
                return self
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"the server is not ready:\n{self.log()[-5000:]}")

    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text(errors="replace")

    def terminate(self) -> None:
        """Ask it to end."""
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """End it and all that it has started. Returns its exit code."""
        if self.process.poll() is None:
            self.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        code = self.process.wait()
        with contextlib.suppress(ProcessLookupError):  # a server that ends in haste leaves its stubs behind
            os.killpg(self.process.pid, signal.SIGKILL)
        for path in _shared_regions() - self._shared_before:  # left where a stub was killed
            path.unlink(missing_ok=True)
        return code

    def __enter__(self) -> Self:
        return self.wait_ready()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _backends(wheel: Path, version: str, folder: Path) -> Path:
    """The wheel keeps the python backend and its stub apart; the server wants them in one folder."""
    target = folder / "backends" / "python"
    target.mkdir(parents=True)
    files = [*(wheel / "backends" / "python").iterdir(), wheel / "python_backend_stubs" / version]
    for file in [*files[:-1], files[-1] / "triton_python_backend_stub"]:
        if not (target / file.name).exists():
            (target / file.name).symlink_to(file)
    return target.parent


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def _shared_regions() -> set[Path]:
    return set(Path("/dev/shm").glob("triton_python_backend_shm_region_*"))


@contextlib.contextmanager
def triton_server(repository: Path, models: Sequence[str]) -> Iterator[TritonServer]:
    """A ready server with its log in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, TritonServer(repository, models, Path(folder)) as server:
        yield server
