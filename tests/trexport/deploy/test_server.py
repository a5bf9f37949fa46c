"""The real Triton server on our repository: its answers are those of a session in this process, whatever clients do."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trexport.deploy.conftest import NAMES
from tests.trexport.deploy.server import TritonServer, needs_server
from tests.trexport.helpers import SIZES, copy_of, run_cli
from trexport.artifact import Artifact
from trexport.deploy.client import TritonClient
from trexport.errors import RunError
from trexport.models.architectures import spec_of
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.models.sample import Sample
from trexport.session import Session

pytestmark = [needs_server, pytest.mark.slow]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Equal, but for a batch being computed in another order than its samples alone."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=["http", "grpc"])
def client(server: TritonServer, request: pytest.FixtureRequest) -> Iterator[TritonClient]:
    with TritonClient(f"{request.param}://{getattr(server, request.param)}") as connected:
        yield connected


@pytest.fixture(scope="module")
def http(server: TritonServer) -> Iterator[TritonClient]:
    with TritonClient(f"http://{server.http}") as connected:
        yield connected


def inputs(sample: Sample, seed: int, batch: int = 1) -> dict[str, Tensor]:
    """Of one step of the sample, timesteps (batch, 1) as Triton takes them."""
    numbers = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 1, 16, 16, generator=numbers),
        "timestep": torch.rand(batch, 1, generator=numbers) * 999,
        "encoder_hidden_states": sample.prompts[torch.randint(10, (batch,), generator=numbers)],
    }


def expected(session: Session, feeds: dict[str, Tensor], names: Sequence[str], scales: Tensor | None = None) -> Tensor:
    """The same in this process."""
    strengths = None if scales is None else [None if s.isnan() else s.item() for s in scales.flatten()]
    one_a_sample = {**feeds, "timestep": feeds["timestep"].flatten()}
    return session.run(one_a_sample, adapters=[name or None for name in names], strengths=strengths)["out_sample"]


def named(names: Sequence[str]) -> dict[str, list[list[str]]]:
    return {"adapter": [[name] for name in names]}


# --- right answers -----------------------------------------------------------------------------------------------------


def test_one_step_over_both_protocols_is_the_sessions(client: TritonClient, sample: Sample, alone: Session) -> None:
    feeds = inputs(sample, 1)
    found = client.run("unet", feeds)["out_sample"]
    torch.testing.assert_close(found, expected(alone, feeds, [""]), rtol=0, atol=0)


def test_every_sample_has_its_adapter_strength_and_timestep(
    client: TritonClient, sample: Sample, alone: Session
) -> None:
    """More adapters than the bank has places: two runs behind one answer."""
    names = ["nine", "", "slant", "outline", "nine"]
    feeds = inputs(sample, 2, 5)
    scales = torch.tensor([[0.5], [1.0], [torch.nan], [2.0], [-1.0]])
    found = client.run("unet", feeds | {"adapter_strength": scales}, named(names))["out_sample"]
    for row, name in enumerate(names):
        single = {key: value[row : row + 1] for key, value in feeds.items()}
        assert_close(found[row : row + 1], expected(alone, single, [name], scales[row]))
    assert (found[0] - expected(alone, {k: v[:1] for k, v in feeds.items()}, [""])[0]).abs().max() > 0.01


@pytest.mark.parametrize("chosen", [[], ["tlora"], ["lora"], ["tlora", "lora"]], ids="+".join)
def test_a_swappable_model_of_a_fixed_batch_and_timestep(
    http: TritonClient, base: Base, swappable: Artifact, adapter_folder: Path, lora_folder: Path, chosen: list[str]
) -> None:
    """Batch 2 in the graph, one timestep for both: asked for one sample, and for two at different steps."""
    feeds = random_feeds(spec_of(base.config, "fp32"), SIZES, seed=4)
    feeds["timestep"] = torch.tensor([[10.0], [700.0]])
    text = {"adapter": [chosen, chosen]} if chosen else None
    found = http.run("swap", feeds, text)["out_sample"]
    with Session(swappable) as session:
        session.load_adapter("tlora", adapter_folder)
        session.load_adapter("lora", lora_folder)
        session.activate(dict.fromkeys(chosen))
        for row in range(2):
            twice = {name: value[[row, row]] for name, value in feeds.items()} | {"timestep": feeds["timestep"][row, 0]}
            torch.testing.assert_close(found[row], session.run(twice)["out_sample"][0], rtol=0, atol=0)
    one = {name: value[:1] for name, value in feeds.items()}
    single = http.run("swap", one, {"adapter": [chosen]} if chosen else None)["out_sample"]
    torch.testing.assert_close(single[0], found[0], rtol=0, atol=0)


def test_switching_adapters_leaves_no_trace(http: TritonClient, base: Base) -> None:
    feeds = random_feeds(spec_of(base.config, "fp32"), SIZES | {"batch_size": 1}, seed=5)
    feeds["timestep"] = torch.tensor([[10.0]])
    turns: list[list[str]] = [[], ["tlora"], ["lora"], ["tlora"], [], ["lora", "tlora"], ["lora"]]
    seen: dict[str, Tensor] = {}
    for turn in turns:
        found = http.run("swap", feeds, {"adapter": [turn]} if turn else None)["out_sample"]
        assert torch.equal(seen.setdefault("+".join(turn), found), found)
    assert len({tensor.sum().item() for tensor in seen.values()}) == len(seen)


@pytest.mark.parametrize("name", ["", "nine"])
def test_one_call_a_picture(client: TritonClient, sample: Sample, alone: Session, name: str) -> None:
    """The sample's own steps, guidance and empty prompt, from the seed alone."""
    asked = {"prompt_embeds": sample.prompts[[9]], "seed": torch.tensor([[3]])}
    found = client.run("unet_image", asked, named([name]))["images"]
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    drawn = denoised(sample, alone, noise, 9, name)
    assert_close(found, (drawn / 2 + 0.5).clamp(0, 1))
    assert torch.equal(found, client.run("unet_image", asked, named([name]))["images"])


def test_pictures_of_one_call_differ_in_everything(http: TritonClient, sample: Sample, alone: Session) -> None:
    noise = torch.randn(3, 1, 16, 16)
    names, steps, scales = ["nine", "", "slant"], [4, 3, 4], [2.0, 1.0, 3.0]
    asked = {
        "prompt_embeds": sample.prompts[[1, 2, 3]],
        "negative_prompt_embeds": sample.prompts[[5, 5, 10]],
        "latents": noise,
        "num_inference_steps": torch.tensor(steps, dtype=torch.int32)[:, None],
        "guidance_scale": torch.tensor(scales)[:, None],
    }
    found = http.run("unet_image", asked, named(names))["images"]
    for row, name in enumerate(names):
        denoising = replace(
            sample.denoising, steps=steps[row], guidance=scales[row], unconditional=sample.prompts[[5, 5, 10]][row]
        )
        own = replace(sample, denoising=denoising)
        drawn = denoised(own, alone, noise[row : row + 1], row + 1, name)
        assert_close(found[row], (drawn[0] / 2 + 0.5).clamp(0, 1))


def denoised(sample: Sample, session: Session, noise: Tensor, prompt: int, name: str) -> Tensor:
    """The whole picture in this process."""

    def step(feeds: Any) -> Tensor:
        return session.run(feeds, adapters=[name or None] * feeds["sample"].shape[0])["out_sample"]

    return sample.denoising.run(step, noise, {"encoder_hidden_states": sample.prompts[[prompt]]})


# --- wrong requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nines"], "no adapter 'nines', there are .*nearest existing name is 'nine'"),
        (["../unet"], "no name of an adapter"),
        (["nine", "slant"], "several adapters for one sample"),
        (["nine", "nine"], "named twice"),
    ],
)
def test_an_adapter_that_cannot_be_is_an_error_to_that_request(
    client: TritonClient, sample: Sample, alone: Session, names: list[str], message: str
) -> None:
    feeds = inputs(sample, 3)
    for model, asked in (("unet", feeds), ("unet_image", {"prompt_embeds": sample.prompts[:1]})):
        with pytest.raises(RunError, match=message):
            client.run(model, asked, {"adapter": [names]})
    assert_close(client.run("unet", feeds)["out_sample"], expected(alone, feeds, [""]))


MALFORMED: dict[str, dict[str, Tensor]] = {
    "channels": {"sample": torch.zeros(1, 2, 16, 16)},
    "odd size": {"sample": torch.zeros(1, 1, 15, 17)},
    "no size": {"sample": torch.zeros(1, 1, 0, 0)},
    "width of the conditioning": {"encoder_hidden_states": torch.zeros(1, 1, 31)},
    "no axis": {"timestep": torch.zeros(1)},
    "another batch": {"timestep": torch.zeros(2, 1)},
    "dtype": {"sample": torch.zeros(1, 1, 16, 16).half()},
    "unknown input": {"sample2": torch.zeros(1, 1)},
    "too many": {
        "sample": torch.zeros(9, 1, 16, 16),
        "timestep": torch.zeros(9, 1),
        "encoder_hidden_states": torch.zeros(9, 1, 32),
    },
    "strength without adapter": {"adapter_strength": torch.ones(1, 1)},
}


@pytest.mark.parametrize("wrong", MALFORMED.values(), ids=MALFORMED)
def test_malformed_tensors_are_refused_and_the_server_lives(
    client: TritonClient, sample: Sample, alone: Session, wrong: dict[str, Tensor]
) -> None:
    feeds = inputs(sample, 4)
    with pytest.raises(RunError):
        client.run("unet", feeds | wrong)
    assert_close(client.run("unet", feeds)["out_sample"], expected(alone, feeds, [""]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_inference_steps": torch.zeros(1, 1, dtype=torch.int32)}, "expected 1 to 1000"),
        ({"guidance_scale": torch.tensor([[torch.nan]])}, "expected numbers from 0"),
        ({"seed": torch.tensor([[1]]), "latents": torch.zeros(1, 1, 16, 16)}, "expected one of them"),
        ({"negative_prompt_embeds": torch.zeros(1, 9, 32)}, "expected prompt_embeds's"),
        ({"latents": torch.zeros(1, 1, 15, 15)}, "out_sample|onnxruntime"),
    ],
)
def test_a_picture_that_cannot_be_is_an_error(
    http: TritonClient, sample: Sample, wrong: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        http.run("unet_image", {"prompt_embeds": sample.prompts[:1]} | wrong)


def test_a_bad_request_does_not_spoil_those_that_run_with_it(
    server: TritonServer, sample: Sample, alone: Session
) -> None:
    """Good and bad ones together, all waiting while a long picture holds the model, so that they meet in one call."""
    answers = at_once(server, sample, [(seed, ["nine", "nobody", ""][seed % 3]) for seed in range(12)])
    for (seed, name), answer in answers.items():
        if name == "nobody":
            assert isinstance(answer, RunError)
        else:
            assert isinstance(answer, Tensor)
            assert_close(answer, expected(alone, inputs(sample, seed), [name]))


# --- many clients ------------------------------------------------------------------------------------------------------


def at_once(
    server: TritonServer, sample: Sample, asked: Sequence[tuple[int, str]]
) -> dict[tuple[int, str], Tensor | Exception]:
    """Every request from a client and thread of its own, all sent at the same moment; half over gRPC."""
    answers: dict[tuple[int, str], Tensor | Exception] = {}
    start = threading.Barrier(len(asked))

    def ask(number: int, seed: int, name: str) -> None:
        url = f"http://{server.http}" if number % 2 else f"grpc://{server.grpc}"
        with TritonClient(url) as own:
            feeds = inputs(sample, seed)
            start.wait(60)
            try:
                answers[seed, name] = own.run("unet", feeds, named([name]))["out_sample"]
            except RunError as error:
                answers[seed, name] = error

    threads = [threading.Thread(target=ask, args=(number, *item)) for number, item in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(answers) == len(asked)
    return answers


def test_fifty_clients_at_once_each_get_their_own(server: TritonServer, sample: Sample, alone: Session) -> None:
    choose = random.Random(0)
    asked = [(seed, choose.choice(["", *NAMES])) for seed in range(50)]
    before = executions(server)
    answers = at_once(server, sample, asked)
    for (seed, name), answer in answers.items():
        assert isinstance(answer, Tensor), answer
        assert_close(answer, expected(alone, inputs(sample, seed), [name]))
    assert executions(server) - before < 50  # some did run together


def test_pictures_asked_for_by_several_clients_share_runs_of_the_unet(server: TritonServer, sample: Sample) -> None:
    """They wait for the first one, and then are drawn side by side."""
    clients, steps = 5, 8
    asked = {"prompt_embeds": sample.prompts[:1], "num_inference_steps": torch.full((1, 1), steps).int()}
    before = executions(server)
    found: list[Tensor] = []

    def draw(seed: int) -> None:
        with TritonClient(f"grpc://{server.grpc}") as own:
            found.append(own.run("unet_image", asked | {"seed": torch.tensor([[seed]])})["images"])

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == clients
    assert executions(server) - before < clients * steps


def executions(server: TritonServer) -> int:
    """How many times Triton has called the UNet's model."""
    with urllib.request.urlopen(f"http://{server.http}/v2/models/unet/stats", timeout=10) as answer:
        (stats,) = json.load(answer)["model_stats"]
    return int(stats.get("execution_count", 0))


_CLIENTS = {
    "http": """
import http.client, json, sys
connection = http.client.HTTPConnection(sys.argv[1])
tokens, width, steps = map(int, sys.argv[2:])
inputs = [
    {"name": "prompt_embeds", "shape": [1, tokens, width], "datatype": "FP32", "data": [0.1] * (tokens * width)},
    {"name": "num_inference_steps", "shape": [1, 1], "datatype": "INT32", "data": [steps]},
]
connection.request("POST", "/v2/models/unet_image/infer", json.dumps({"inputs": inputs}))
print("sent", flush=True)
connection.getresponse()
""",
    "grpc": """
import sys, numpy, tritonclient.grpc
tokens, width, steps = map(int, sys.argv[2:])
prompts = tritonclient.grpc.InferInput("prompt_embeds", [1, tokens, width], "FP32")
prompts.set_data_from_numpy(numpy.full((1, tokens, width), 0.1, numpy.float32))
number = tritonclient.grpc.InferInput("num_inference_steps", [1, 1], "INT32")
number.set_data_from_numpy(numpy.array([[steps]], numpy.int32))
client = tritonclient.grpc.InferenceServerClient(sys.argv[1])
print("sent", flush=True)
client.infer("unet_image", [prompts, number])
""",
}


@pytest.mark.parametrize(("protocol", "steps"), [("http", 60), ("grpc", 1000)])
def test_a_client_killed_in_the_middle_disturbs_nobody(
    server: TritonServer, sample: Sample, alone: Session, protocol: str, steps: int
) -> None:
    """Its picture is given up (over gRPC; over HTTP Triton does not say that it has gone, and it is drawn to its end),
    others are answered meanwhile and after."""
    arguments = [getattr(server, protocol), *[str(size) for size in sample.prompts.shape[1:]], str(steps)]
    command = [sys.executable, "-c", _CLIENTS[protocol], *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"sent\n"
        time.sleep(0.5)
        assert process.poll() is None  # its picture is under way
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    feeds = inputs(sample, 6)
    with TritonClient(f"http://{server.http}") as other:
        assert_close(other.run("unet", feeds)["out_sample"], expected(alone, feeds, [""]))
        before = executions(server)
        other.run("unet_image", {"prompt_embeds": sample.prompts[:1], "num_inference_steps": torch.ones(1, 1).int()})
        assert executions(server) - before < 500  # it did not wait for a thousand steps
    assert server.process.poll() is None


# --- models and adapters that come and go ------------------------------------------------------------------------------


def test_unload_and_reload(server: TritonServer, http: TritonClient, base: Base) -> None:
    import tritonclient.http

    feeds = random_feeds(spec_of(base.config, "fp32"), SIZES | {"batch_size": 1}, seed=8)
    feeds["timestep"] = torch.tensor([[10.0]])
    before = http.run("swap", feeds, {"adapter": [["lora"]]})["out_sample"]
    control = tritonclient.http.InferenceServerClient(server.http)
    try:
        control.unload_model("swap")
        with pytest.raises(RunError):
            http.run("swap", feeds)
        control.load_model("swap")
    finally:
        control.close()
    assert torch.equal(http.run("swap", feeds, {"adapter": [["lora"]]})["out_sample"], before)


def test_adapters_laid_into_the_folder_of_a_running_server(
    http: TritonClient, repository: Path, sample: Sample, alone: Session
) -> None:
    """A new one is found, a replaced one is read again, a damaged one is an error, one taken away is unknown."""
    folder, feeds = repository / "unet" / "adapters", inputs(sample, 9)

    def ask() -> Tensor:
        return http.run("unet", feeds, named(["new"]))["out_sample"]

    with pytest.raises(RunError, match="no adapter 'new'"):
        ask()
    for name in ("nine", "slant"):
        copy_of(folder / name, folder / "arriving").replace(folder / "new")
        assert_close(ask(), expected(alone, feeds, [name]))
        (folder / "new").rename(folder / ".old")
        for file in (folder / ".old").iterdir():
            file.unlink()
        (folder / ".old").rmdir()
    copy_of(folder / "nine", folder / "new")
    weights = folder / "new" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RunError):
        ask()
    for file in (folder / "new").iterdir():
        file.unlink()
    (folder / "new").rmdir()
    with pytest.raises(RunError, match="no adapter 'new'"):
        ask()


# --- the check ---------------------------------------------------------------------------------------------------------


def test_the_check_proves_the_server_equal_to_torch(
    server: TritonServer, digits_bank: Artifact, digits_adapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["deploy", "triton", "--check", f"grpc://{server.grpc}", "--adapters", digits_adapters, "--json"]
    assert run_cli(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    asked = " ".join(check["what"] for check in report["checks"])
    assert report["passed"]
    assert all(name in asked for name in (*NAMES, "unet_image"))
    with_artifact = ["deploy", "triton", digits_bank.folder, "--check", f"http://{server.http}"]
    assert run_cli(with_artifact) == 0


def test_the_check_fails_where_the_server_draws_with_another_adapter(
    server: TritonServer, tmp_path: Path, digits_adapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapters"
    copy_of(digits_adapters / "outline", folder / "nine")
    assert run_cli(["deploy", "triton", "--check", f"http://{server.http}", "--adapters", folder]) == 3
    assert "adapter nine: relative L2" in capsys.readouterr().err


def test_the_check_refuses_another_artifact_and_another_model(
    server: TritonServer, swappable: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["deploy", "triton", swappable.folder, "--check", f"http://{server.http}"]) == 1
    assert "serves another artifact" in capsys.readouterr().err
    assert run_cli(["deploy", "triton", "--check", f"http://{server.http}", "--name", "unte"]) == 1
    assert "no model 'unte'" in capsys.readouterr().err
