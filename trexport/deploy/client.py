"""A client of a Triton server, over HTTP or gRPC."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, final
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from trexport.errors import ArtifactError, MissingError, RunError, TrexportError, UsageError

TIMEOUT_SECONDS = 120.0

_TYPES = {
    torch.float32: "FP32",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
    torch.int32: "INT32",
}
_TRANSPORTS = {"http": "HTTP", "grpc": "gRPC"}


@final
class TritonClient:
    """A connection. A context manager.

    Args:
        url: `http://HOST:PORT` or `grpc://HOST:PORT`.

    Raises:
        UsageError: another kind of URL.
        MissingError: tritonclient is not installed.
        TrexportError: nobody answers there.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in _TRANSPORTS or not parts.netloc:
            raise UsageError(f"{url}: expected http://HOST:PORT or grpc://HOST:PORT")
        transport = _TRANSPORTS[parts.scheme]
        try:
            self._module = _tritonclient(parts.scheme)
        except ImportError as error:
            raise MissingError(
                f"tritonclient for {transport} is not installed; install trexport[triton-client]"
            ) from error
        self.url = url
        self._grpc = parts.scheme == "grpc"
        try:
            timeouts = {} if self._grpc else {"connection_timeout": TIMEOUT_SECONDS, "network_timeout": TIMEOUT_SECONDS}
            self._client: Any = self._module.InferenceServerClient(parts.netloc + parts.path.rstrip("/"), **timeouts)
            live = self._client.is_server_live()
        except Exception as error:  # of sockets, gevent, gRPC: no base class
            raise _no_answer(url, transport, error) from error
        if not live:
            raise _no_answer(url, transport, "it is not live")

    def config(self, model: str) -> dict[str, Any]:
        """A model's configuration, as JSON has it. Raises `ArtifactError` where no such model is ready."""
        try:
            ready = self._client.is_model_ready(model)
        except Exception as error:  # see above
            raise RunError(f"{self.url}: {error}") from error
        if not ready:
            raise ArtifactError(f"{self.url}: no model {model!r} is ready there; say which with --name")
        found = (
            self._client.get_model_config(model, as_json=True) if self._grpc else self._client.get_model_config(model)
        )
        return found["config"] if self._grpc else found

    def has(self, model: str) -> bool:
        """Whether a model is ready."""
        return bool(self._client.is_model_ready(model))

    def run(
        self, model: str, inputs: Mapping[str, Tensor], text: Mapping[str, Sequence[Sequence[str]]] | None = None
    ) -> dict[str, Tensor]:
        """One request.

        Args:
            inputs: with the batch axis.
            text: inputs (batch, n) of strings.

        Raises:
            RunError: the server's error.
        """
        given = [self._input(name, _array(tensor), _TYPES[tensor.dtype]) for name, tensor in inputs.items()]
        for name, rows in (text or {}).items():
            array = np.array([[item.encode() for item in row] for row in rows], dtype=np.object_)
            given.append(self._input(name, array, "BYTES"))
        try:
            result = self._client.infer(model, given)
        except Exception as error:  # see above
            raise RunError(f"{self.url}: {model}: {error}") from error
        response = result.get_response(as_json=True) if self._grpc else result.get_response()
        names = [output["name"] for output in response["outputs"]]
        return {name: torch.from_numpy(np.array(result.as_numpy(name))) for name in names}

    def close(self) -> None:
        """Leave the server: one that is to end waits for open connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _input(self, name: str, array: Any, datatype: str) -> Any:
        found = self._module.InferInput(name, list(array.shape), datatype)
        found.set_data_from_numpy(array)
        return found


def parameter(config: Mapping[str, Any], key: str) -> Any:
    """A parameter of a model's configuration that holds JSON; None where there is none."""
    entry = config.get("parameters", {}).get(key)
    return None if entry is None else json.loads(entry["string_value"])


def _tritonclient(scheme: str) -> Any:
    if scheme == "http":
        import tritonclient.http

        return tritonclient.http
    import tritonclient.grpc

    return tritonclient.grpc


def _array(tensor: Tensor) -> Any:
    """As tritonclient takes it: bfloat16, which numpy lacks, as float32."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _no_answer(url: str, transport: str, reason: object) -> TrexportError:
    return TrexportError(f"{url}: no server answers there over {transport} ({reason}); is it running there?")
