"""What the tests of examples/training share: its modules, tiny pipelines, small pictures."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

RECIPES = Path(__file__).parents[2] / "examples" / "training"
SIDE = 16
"""Pixels of the tiny pipelines' pictures."""


@pytest.fixture(scope="session")
def recipes() -> Iterator[SimpleNamespace]:
    """The modules of examples/training, which import each other by bare names as scripts in one folder do."""
    names = sorted(path.stem for path in RECIPES.glob("*.py"))
    sys.path.insert(0, str(RECIPES))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(RECIPES))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny pipelines `sd`, `sdxl`, and `sd2`, which predicts velocities."""
    from tests.trexport.scripts.make_pipelines import main

    folder = tmp_path_factory.mktemp("pipelines")
    with torch.random.fork_rng(devices=[]):
        main(folder)
    shutil.copytree(folder / "sd", folder / "sd2")
    config = folder / "sd2" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of different shapes."""
    return write_photos(tmp_path_factory.mktemp("data") / "photos", [(24, 20), (20, 31), (16, 16)])


def write_photos(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """Pictures of (width, height), each of smooth random colours."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(1)
    for number, size in enumerate(sizes):
        colours = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def failing(recipes: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a recipe that has to fail with an exit code; gives its message, which is one."""

    def run(script: str, arguments: list[str | Path], code: int) -> str:
        capsys.readouterr()
        main = getattr(recipes, script).main
        assert recipes.failures.finish(main, [str(argument) for argument in arguments]) == code
        said = capsys.readouterr().err
        assert said.count("error: ") == 1
        assert "Traceback" not in said
        return said[said.index("error: ") :]

    return run
