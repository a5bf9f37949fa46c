"""What cannot run without a GPU is written to an API: each name that it uses is one of the installed bindings."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest

import trexport.backends.trt as shared

SOURCES = sorted(Path(str(shared.__file__)).parent.glob("*.py"))
# what a variable of the shared files holds
HOLDS = {
    "trt": "",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "made": "IOptimizationProfile",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "_runtime": "Runtime",
    "runtime": "Runtime",
    "_context": "IExecutionContext",
    "inspector": "EngineInspector",
    "refitter": "Refitter",
    "layer": "ILayer",
    "prototype": "Weights",
}
# the same name for two kinds of config, told by the method that made it
OTHERS = {"config": ("ISerializationConfig", "IRuntimeConfig"), "parser": ("OnnxParser", "OnnxParserRefitter")}


def uses() -> list[tuple[str, str, str]]:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = (
                    owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
                )
                if (name in HOLDS or name in OTHERS) and node.attr != "get":  # a dictionary of the same name
                    found.append((path.name, name, node.attr))
    return sorted(set(found))


@pytest.mark.parametrize(("file", "variable", "attribute"), uses(), ids=lambda value: str(value))
def test_the_bindings_have_it(file: str, variable: str, attribute: str) -> None:
    module: Any = importlib.import_module("tensorrt_rtx")
    kinds = [*([HOLDS[variable]] if variable in HOLDS else []), *OTHERS.get(variable, ())]
    owners = [getattr(module, kind) if kind else module for kind in kinds]
    assert any(hasattr(owner, attribute) for owner in owners), (file, variable, attribute)


def test_the_names_are_found() -> None:
    used = {(variable, attribute) for _, variable, attribute in uses()}
    assert {("_context", "execute_async_v3"), ("refitter", "set_named_weights"), ("trt", "Runtime")} <= used


def test_enumerations() -> None:
    """Members that are looked up by a string."""
    module: Any = importlib.import_module("tensorrt_rtx")
    flags = {"VERSION_COMPATIBLE", "REFIT", "REFIT_IDENTICAL", "STRIP_PLAN"}
    assert flags <= set(module.BuilderFlag.__members__)
    assert {"AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"} <= set(module.HardwareCompatibilityLevel.__members__)
    assert "INCLUDE_REFIT" in module.SerializationFlag.__members__
