"""Keeping a measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trexport.backends import Device
from trexport.bench.environment import environment
from trexport.jsonable import finite

RESULTS = Path(__file__).parent / "results"


def keep(name: str, command: str, device: Device, fields: dict[str, Any]) -> Path:
    """Write `benchmarks/results/<name>.json` with the environment and the command that repeats it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {"command": command, "environment": environment(device)} | fields
    path.write_text(json.dumps(finite(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(f"kept: {path.relative_to(RESULTS.parent.parent)}")
    return path
