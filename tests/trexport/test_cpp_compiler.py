"""A compiler is tried before ten minutes are spent on what would crash."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.trexport.backends.test_aotinductor import check
from trexport.cpp_compiler import compiler_path, complaint
from trexport.errors import MissingError

GXX = shutil.which("g++")


def wrapper(folder: Path, text: str) -> Path:
    script = folder / "g++"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    return script


@pytest.mark.skipif(GXX is None, reason="no g++ here")
def test_a_usual_compiler_is_fine() -> None:
    assert GXX is not None
    assert complaint(GXX) is None


@pytest.mark.skipif(GXX is None or sys.platform != "linux", reason="no g++ here")
def test_a_c_plus_plus_library_inside_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = wrapper(tmp_path, f'exec {GXX} -static-libstdc++ "$@"')
    monkeypatch.setenv("CXX", str(script))
    assert compiler_path() == str(script)
    with pytest.raises(MissingError, match="crash beside torch.*set CXX to another"):
        check()


def test_what_compiles_nothing_says_what_it_said(tmp_path: Path) -> None:
    said = complaint(str(wrapper(tmp_path, "echo 'no licence found' >&2; exit 3")))
    assert said is not None
    assert "no licence found" in said
