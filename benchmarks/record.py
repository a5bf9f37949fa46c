"""Keeping a measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trexport.backends import Device
from trexport.bench.environment import environment

RESULTS = Path(__file__).parent / "results"


def keep(name: str, command: str, device: Device, fields: dict[str, Any]) -> Path:
    """Write `benchmarks/results/<name>.json` with the environment and the command that repeats it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {"command": command, "environment": environment(device)} | fields
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"kept: {path.relative_to(RESULTS.parent.parent)}")
    return path
