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
        self._write(memoryview(safetensors_header(entries, metadata)))

    def write(self, tensor: Tensor) -> None:
        """Append one tensor, already of the dtype that its entry says."""
        self._write(bytes_of(tensor))

    def copy(self, tensor: Tensor, place: tuple[int, int] | None) -> None:
        """Append a tensor that lies in a file: the kernel copies it, where the system can, and no memory is touched.

        Args:
            tensor: the tensor itself, for systems that cannot.
            place: the open file and the offset of the tensor's bytes; None where there is no file.
        """
        size = tensor.numel() * tensor.element_size()
        done = 0
        if place is not None and hasattr(os, "copy_file_range"):
            source, offset = place
            try:
                while done < size:
                    copied = os.copy_file_range(source, self._stream.fileno(), size - done, offset + done)
                    if copied == 0:
                        break
                    done += copied
            except OSError as error:
                # not between these two file systems; a full disk is no reason to try again
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
        if done < size:
            self._write(bytes_of(tensor)[done:])
        self._flush_beside(done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._flusher.shutdown()
        self._stream.close()

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):  # a raw write may take less than it is given
            done += self._stream.write(data[done:]) or 0
        self._flush_beside(done)

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
