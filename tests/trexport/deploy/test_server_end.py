"""The real Triton server where it must not start, and where it is told to end while it works."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trexport.deploy.server import ENVIRONMENT, ROOT, TritonServer, needs_server
from tests.trexport.helpers import SIZES
from trexport.artifact import Artifact
from trexport.deploy.client import TritonClient
from trexport.deploy.options import TritonOptions
from trexport.deploy.triton import write_triton
from trexport.errors import RunError
from trexport.models.architectures import spec_of
from trexport.models.base import Base
from trexport.models.diffusion import Denoising
from trexport.models.model import random_feeds
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


def test_the_python_of_a_model_is_the_one_that_was_asked_for(tmp_path: Path, onnx_artifact: Artifact) -> None:
    """The server itself finds the environment above; --python-env leads its model to one that it can work with."""
    options = TritonOptions(image=False, python_env=str(ENVIRONMENT))
    write_triton(onnx_artifact, tmp_path / "repository", options)
    with TritonServer(tmp_path / "repository", ["unet"], tmp_path, python=ROOT / ".venv") as server:
        assert server.process.poll() is None


@pytest.mark.parametrize("patient", [True, False], ids=["leaving", "staying"])
def test_a_server_told_to_end_answers_right_or_not_at_all(
    tiny: Path, tmp_path: Path, onnx_artifact: Artifact, base: Base, patient: bool
) -> None:
    """Clients send without pause when SIGTERM comes: three want steps, over both protocols, the fourth pictures. Those who
    only wait for what they have sent get all of it, and the server ends well. Those who go on sending are served until
    the server's time to end is over, and then told so."""
    feeds = [random_feeds(spec_of(base.config, "fp32"), SIZES, seed=seed, timestep=50.0 * seed) for seed in range(4)]
    with Session(onnx_artifact) as session:
        wanted = [session.run(given)["out_sample"] for given in feeds[:3]]
        others = {"encoder_hidden_states": feeds[3]["encoder_hidden_states"]}
        denoising = Denoising.of_folder(base.folder, 3)
        wanted.append(denoising.run(lambda given: session.run(given)["out_sample"], feeds[3]["sample"], others))
    asked = [given | {"timestep": given["timestep"].expand(2)[:, None]} for given in feeds[:3]]
    asked.append(
        {
            "prompt_embeds": feeds[3]["encoder_hidden_states"],
            "latents": feeds[3]["sample"],
            "num_inference_steps": torch.full((2, 1), 3).int(),
            "guidance_scale": torch.ones(2, 1),
        }
    )
    answers: list[tuple[int, Tensor]] = []
    refused: list[str] = []
    told = threading.Event()

    def send(number: int) -> None:
        model, output = ("unet_image", "latents") if number == 3 else ("unet", "out_sample")
        with TritonClient(f"http://{server.http}" if number % 2 else f"grpc://{server.grpc}") as client:
            while not (patient and told.is_set()):
                try:
                    answers.append((number, client.run(model, asked[number])[output]))
                except RunError as error:
                    refused.append(str(error))
                    return

    with TritonServer(tiny, ["unet", "unet_image"], tmp_path, exit_timeout=30 if patient else 3) as server:
        threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 60
        while {number for number, _ in answers} != {0, 1, 2, 3} and time.monotonic() < end:
            time.sleep(0.01)
        server.terminate()
        told.set()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)  # none waits for ever
        code = server.process.wait(60)
    if patient:
        assert (refused, code) == ([], 0)
    else:
        assert len(refused) == 4
    assert {number for number, _ in answers} == {0, 1, 2, 3}
    for number, found in answers:
        torch.testing.assert_close(found, wanted[number], rtol=0, atol=1e-5)
