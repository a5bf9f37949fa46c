"""Content hashes of files and of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex: what `sha256sum` prints."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """One hash for every file below `folder`: the SHA-256 of the lines `<hash>  <path inside>`, sorted by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _sha256_of_lines(f"{sha256_of_file(path)}  {path.relative_to(folder).as_posix()}" for path in files)


def sha256_of_tensors(digests: Mapping[str, tuple[str, str, tuple[int, ...]]]) -> str:
    """One hash for a model's weights, however they are spread over files: the SHA-256 of the lines
    `<hash of the tensor's bytes>  <dtype>  <shape>  <name>`, sorted by name.

    Args:
        digests: name → (SHA-256 of the bytes in C order, safetensors' name of the dtype, shape).
    """
    return _sha256_of_lines(
        f"{digest}  {dtype}  {'x'.join(map(str, shape))}  {name}"
        for name, (digest, dtype, shape) in sorted(digests.items())
    )


def _sha256_of_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
