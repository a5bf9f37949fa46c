"""Writing files and folders so that whoever looks sees nothing, or the whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and removed when it does not."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp and safetensors make files for one user; this is an ordinary one
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`, put in its place when the block ends well and removed when it does not.

    Raises:
        FileExistsError: `path` is a file, or a folder with something in it and `overwrite` is not set.
    """
    check_free(path, overwrite=overwrite)
    target = Path(path).resolve()  # a link stays, what it points to is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _flush(path)
                path.chmod(0o666 & ~_umask())
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
            try:
                target.replace(retired)  # onto an empty folder, which a rename may do
                try:
                    temporary.replace(target)
                except BaseException:
                    retired.replace(target)
                    raise
            finally:
                shutil.rmtree(retired, ignore_errors=True)
        else:
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(path: str | Path, *, overwrite: bool = False) -> None:
    """Raise `FileExistsError` where `atomic_folder` would refuse: call it before long work."""
    target = Path(path)
    if target.is_file():
        raise FileExistsError(f"{target} is a file, expected a folder or nothing there")
    if Path.cwd().is_relative_to(target.resolve()):
        raise FileExistsError(f"{target} holds the folder that this runs in, expected one below or beside it")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; choose another folder, or pass --overwrite (overwrite=True)")


def _flush(path: Path) -> None:
    """Onto the disk, so that not even a power cut leaves a whole name with half a content."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
