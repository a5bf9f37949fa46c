"""The real Triton server where it must not start, and where it is told to end while it works."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trexport.deploy.server import ROOT, TritonServer, needs_server, triton_server
from tests.trexport.helpers import SIZES
from trexport.artifact import Artifact
from trexport.deploy.client import TritonClient
from trexport.deploy.options import TritonOptions
from trexport.deploy.triton import write_triton
from trexport.errors import RunError
from trexport.io_spec import unet_spec
from trexport.models.base import Base
from trexport.models.unet import random_feeds
from trexport.session import Session

pytestmark = [needs_server, pytest.mark.slow]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, onnx_artifact: Artifact) -> Path:
    """`unet`, merged, one timestep for a batch, and `unet_image`."""
    folder = tmp_path_factory.mktemp("triton") / "repository"
    write_triton(onnx_artifact, folder, TritonOptions())
    return folder


@pytest.mark.skipif(int(np.__version__.split(".")[0]) < 2, reason="these tests run with numpy below 2")
def test_a_server_whose_stub_cannot_read_numpy_refuses_to_start(tiny: Path, tmp_path: Path) -> None:
    """The environment of these tests has numpy 2, for which the stub was not built: it would answer with zeros."""
    server = TritonServer(tiny, ["unet"], tmp_path, python=ROOT / ".venv")
    try:
        assert server.process.wait(120) != 0
        assert "cannot exchange values with numpy 2" in server.log()
        assert "--python-env" in server.log()
    finally:
        server.stop()


def test_a_server_told_to_end_answers_right_or_not_at_all(tiny: Path, onnx_artifact: Artifact, base: Base) -> None:
    """Clients send without pause when SIGTERM comes, over both protocols."""
    feeds = [random_feeds(unet_spec(base.config, "fp32"), SIZES, seed=seed, timestep=50.0 * seed) for seed in range(4)]
    with Session(onnx_artifact) as session:
        wanted = [session.run(given)["out_sample"] for given in feeds]
    answers: list[tuple[int, Tensor]] = []
    refused: list[str] = []

    def send(number: int) -> None:
        given = feeds[number] | {"timestep": feeds[number]["timestep"].expand(2)[:, None]}
        with TritonClient(f"http://{address}" if number % 2 else f"grpc://{grpc}") as client:
            while True:
                try:
                    answers.append((number, client.run("unet", given)["out_sample"]))
                except RunError as error:
                    refused.append(str(error))
                    return

    with triton_server(tiny, ["unet", "unet_image"]) as server:
        address, grpc = server.http, server.grpc
        threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        while len(answers) < 8:
            time.sleep(0.01)
        before = len(answers)
        server.terminate()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert server.process.wait(60) is not None
    assert len(answers) >= before
    assert len(refused) == 4  # each client was told, none waits for ever
    for number, found in answers:
        torch.testing.assert_close(found, wanted[number], rtol=0, atol=1e-5)
