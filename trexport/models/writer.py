"""Writing a safetensors file tensor by tensor, with never more than a few tensors in memory.

The safetensors library writes a file from a dict of all its tensors; this writes the same format from a stream.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self, final

import torch
from torch import Tensor

from trexport.models.weights import Entry

_FLUSH_BYTES = 1 << 29
_SPAN_BYTES = 1 << 27
_CHUNK_BYTES = 1 << 24


@final
class SafetensorsWriter:
    """Writes the tensors of `entries`, which must come in that order.

    Args:
        path: the file to write.
        entries: name, dtype and shape of every tensor to come.
        metadata: the header's `__metadata__`.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        self._stream = path.open("wb", buffering=0)
        self._flusher = ThreadPoolExecutor(1)
        self._flushed: Future[None] | None = None
        self._unflushed = 0
        self._span: tuple[int, int, int] | None = None
        self._write(memoryview(safetensors_header(entries, metadata)))

    def write(self, tensor: Tensor) -> None:
        """Append one tensor, already of the dtype that its entry says."""
        self._copy_span()
        data = bytes_of(tensor)
        self._write(data)
        self._flush_beside(len(data))

    def copy(self, place: tuple[int, int], size: int) -> None:
        """Append `size` bytes that lie in a file, as tensors of the right dtype do. Neighbours are copied in one go, by the
        kernel where the system can.

        Args:
            place: the open file and the offset of the bytes.
        """
        source, offset = place
        if self._span is not None and self._span[0] == source and self._span[2] == offset:
            self._span = (source, self._span[1], offset + size)
        else:
            self._copy_span()
            self._span = (source, offset, offset + size)
        if self._span[2] - self._span[1] >= _SPAN_BYTES:
            self._copy_span()

    def _copy_span(self) -> None:
        if self._span is None:
            return
        source, offset, end = self._span
        self._span = None
        size = end - offset
        try:
            while offset < end and (copied := os.copy_file_range(source, self._stream.fileno(), end - offset, offset)):
                offset += copied
        except AttributeError:
            pass  # not on this system
        except OSError as error:
            # not between these two file systems; a full disk is no reason to try again
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        while offset < end:
            chunk = os.pread(source, min(_CHUNK_BYTES, end - offset), offset)
            if not chunk:
                raise OSError(errno.EIO, "the source file became shorter while it was copied")
            self._write(memoryview(chunk))
            offset += len(chunk)
        self._flush_beside(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        try:
            if kind is None:
                self._copy_span()
        finally:
            self._flusher.shutdown()
            self._stream.close()

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):  # a raw write may take less than it is given
            done += self._stream.write(data[done:]) or 0

    def _flush_beside(self, written: int) -> None:
        # the disk works beside us, instead of all at once when the file is flushed at the end
        self._unflushed += written
        if self._unflushed >= _FLUSH_BYTES and (self._flushed is None or self._flushed.done()):
            self._unflushed = 0
            self._flushed = self._flusher.submit(os.fsync, self._stream.fileno())


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in C order, without a copy where it lies so."""
    flat = tensor.detach().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def safetensors_header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file: the length of the JSON header in eight bytes, then the header, padded to eight."""
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        end = offset + entry.size_bytes
        fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
