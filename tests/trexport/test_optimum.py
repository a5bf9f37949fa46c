"""optimum's own pipelines draw what `trexport onnx` exports, and the picture is diffusers' own.

optimum 2.1 needs transformers 4 and diffusers 0.39, the newest diffusers wants transformers 5: two worlds, of which the
other one is an environment of its own. Artifacts of both are drawn there.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.trexport.helpers import run_cli

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".envs" / "optimum" / "bin" / "python"
SCRIPTS = Path(__file__).parent / "scripts"
ADAPTER = "random:tlora:2:6=3"

# On pictures of 0 to 1: float32 differs by 2e-6 at most over three steps; half precision by less than a level of 8 bits.
TOLERANCE = {"fp32": 1e-5, "fp16": 1 / 255}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment with optimum: `make test` makes it"),
]


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """A command of the other environment."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(PYTHON), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipelines `sd`, `sdxl` and `sd3`, saved by transformers 4, for both read what that writes."""
    folder = tmp_path_factory.mktemp("shared")
    finish(start(SCRIPTS / "make_pipelines.py", folder))
    return folder


@pytest.mark.parametrize(
    ("name", "dtype", "worlds"),
    [("sd", "fp32", ["here", "there"]), ("sdxl", "fp16", ["here"]), ("sd3", "fp32", ["here"])],
    ids=["sd", "sdxl-fp16", "sd3"],
)
def test_optimum_draws_the_same_picture_as_diffusers(
    name: str, dtype: str, worlds: list[str], shared: Path, tmp_path: Path
) -> None:
    base, ways = shared / name, "one,two"
    command: list[str | Path] = ["onnx", base, ADAPTER, "--dtype", dtype]
    if name != "sd":  # of one size, which is exported sooner
        ways = "one"
        command += ["--static", "--height", "16", "--width", "16"]
    exported = [tmp_path / world for world in worlds]
    other = start("-m", "trexport.cli", *command, "-o", tmp_path / "there") if "there" in worlds else None
    if "here" in worlds:
        assert run_cli([*command, "-o", tmp_path / "here"]) == 0
    assert run_cli(["merge", base, ADAPTER, "-o", tmp_path / "merged"]) == 0
    if other is not None:
        finish(other)
    finish(start(SCRIPTS / "draw.py", base, tmp_path / "merged", tmp_path / "drawn.npz", ways, *exported))
    drawn = np.load(tmp_path / "drawn.npz")
    shapes = {"one": (1, 32, 32, 3), "two": (2, 16, 48, 3)}
    for how in ways.split(","):
        wanted, plain = drawn[f"{how}_adapted"], drawn[f"{how}_plain"]
        assert wanted.shape == shapes[how]
        assert wanted.std() > 0.05
        assert np.abs(wanted - plain).max() > 2 * TOLERANCE[dtype]  # the adapter shows
        for folder in exported:
            assert np.abs(drawn[f"{how}_{folder.name}"] - wanted).max() <= TOLERANCE[dtype], (how, folder.name)


def test_a_pipeline_saved_by_transformers_5_is_refused_in_the_other_world(pipelines: Path, tmp_path: Path) -> None:
    process = start("-m", "trexport.cli", "onnx", pipelines / "sd", "-o", tmp_path / "out", "--static")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "transformers 5" in output
    assert list(tmp_path.iterdir()) == []
