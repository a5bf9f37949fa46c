"""The C++ compiler that torch's compiler would call, and whether what it makes can live beside torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

# AOTInductor's loader reads the device's name with a regular expression, the first thing that breaks
_PROBE = """
#include <regex>
#include <string>
extern "C" int probe(const char* text) { return std::regex_match(std::string(text), std::regex("([a-z]+)(:[0-9]+)?")); }
"""
_LOAD = "import ctypes, sys, torch; sys.exit(ctypes.CDLL(sys.argv[1]).probe(b'cuda:0') != 1)"
_SECONDS = 120


def compiler_name() -> str:
    """What torch would call: `CXX`, or the platform's usual one."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def compiler_path() -> str | None:
    """Where it is, None where it is not here."""
    return shutil.which(compiler_name())


@cache
def complaint(compiler: str) -> str | None:
    """What is wrong with a compiler, None where nothing is.

    A library that carries a C++ standard library of its own breaks beside torch, which has brought another one: packages
    are built in full and end in a segmentation fault when they are loaded. So one is built and loaded, in another process.
    """
    with tempfile.TemporaryDirectory(prefix="trexport-probe-") as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(_PROBE)
        command = [compiler, "-shared", "-fPIC", "-std=c++17", str(source), "-o", str(library)]
        try:
            built = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"cannot be run ({error})"
        if built.returncode != 0:
            lines = built.stderr.strip().splitlines() or [f"exit code {built.returncode}"]
            return f"does not compile a few lines of C++17 ({lines[-1]})"
        loaded = subprocess.run(
            [sys.executable, "-c", _LOAD, str(library)], capture_output=True, timeout=_SECONDS, check=False
        )
        if loaded.returncode != 0:
            return (
                "makes libraries that crash beside torch, most likely with a C++ standard library of their own in them"
            )
    return None
