"""Requests answered together, with a model that is arithmetic: whatever fails, fails for its own request alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trexport.deploy.names import PROMPT
from trexport.deploy.serve.folder import AdapterFolder
from trexport.deploy.serve.image import Order, Painter, Settings
from trexport.deploy.serve.unet import AdapterServer, Asked
from trexport.errors import RunError, UsageError
from trexport.io_spec import ModelSpec, TensorSpec
from trexport.models.diffusion import Denoising


class Arithmetic:
    """What `AdapterServer` uses of a session: the output is sample + timestep + 100 for each active adapter's strength.
    It does not run a sample that holds a 13."""

    def __init__(self, batch: str | int, *, per_sample: bool, least: int | None = None) -> None:
        """`least`: of an engine's profile; None for no engine."""
        shape = TensorSpec("sample", "fp32", (batch, 1, 2, 2))
        step = TensorSpec("timestep", "fp32", (batch,) if per_sample else ())
        self.spec = ModelSpec((shape, step), ())
        kind = "onnx" if least is None else "engine"
        profiles = [SimpleNamespace(min={"batch_size": least})]
        self.artifact = SimpleNamespace(
            manifest=SimpleNamespace(factored=None, kind=kind), engine_record=SimpleNamespace(profiles=profiles)
        )
        self.adapters: list[str] = []
        self.active: dict[str, float] = {}
        self.batches: list[int] = []
        self.activations: list[dict[str, float]] = []

    def load_adapter(self, name: str, path: Path) -> None:
        self.adapters.append(name)

    def activate(self, strengths: dict[str, float | None]) -> None:
        self.active = {name: 1.0 if scale is None else scale for name, scale in strengths.items()}
        self.activations.append(self.active)
        if "broken" in strengths:
            raise UsageError("cannot be active")

    def run(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        sample, step = feeds["sample"], feeds["timestep"]
        self.batches.append(len(sample))
        if sample.eq(13).any():
            raise RunError("thirteen")
        return {"out_sample": sample + step.reshape(-1, 1, 1, 1) + 100 * sum(self.active.values())}


def asked(*values: float, step: float = 0.0, adapter: str | None = None) -> Asked:
    sample = torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    names = None if adapter is None else [[adapter]] * len(values)
    return Asked({"sample": sample, "timestep": torch.full((len(values),), step)}, names)


@pytest.fixture
def folder(tmp_path: Path) -> AdapterFolder:
    for name in ("a", "broken"):
        (tmp_path / name).mkdir()
    return AdapterFolder(tmp_path)


def serve(session: Arithmetic, folder: AdapterFolder, requests: list[Any]) -> list[Any]:
    """The first entry of each sample's output, or the error."""
    server: Any = AdapterServer(session, folder, 8)  # type: ignore[arg-type]
    answers = server.answer(requests)
    return [
        answer["out_sample"][:, 0, 0, 0].tolist() if isinstance(answer, dict) else type(answer).__name__
        for answer in answers
    ]


def test_requests_share_a_run_and_get_their_own_answers(folder: AdapterFolder) -> None:
    session = Arithmetic("batch_size", per_sample=True)
    assert serve(session, folder, [asked(1, 2, step=10), asked(3, step=20)]) == [[11, 12], [23]]
    assert session.batches == [3]


def test_a_run_that_fails_is_tried_for_each_request(folder: AdapterFolder) -> None:
    session = Arithmetic("batch_size", per_sample=True)
    found = serve(session, folder, [asked(1, 2), asked(5, 13), UsageError("x"), asked(3)])
    assert found == [[1, 2], "RunError", "UsageError", [3]]
    assert session.batches == [5, 2, 2, 1]


def test_adapters_are_active_for_those_who_named_them(folder: AdapterFolder) -> None:
    session = Arithmetic("batch_size", per_sample=False)
    found = serve(session, folder, [asked(1, adapter="a"), asked(2), asked(3, adapter="broken"), asked(4, adapter="a")])
    assert found == [[101], [2], "UsageError", [104]]
    assert serve(session, folder, [asked(5, adapter="b")]) == ["UsageError"]


def test_after_an_activation_that_failed_nothing_is_taken_for_active(folder: AdapterFolder) -> None:
    session = Arithmetic("batch_size", per_sample=False)
    server: Any = AdapterServer(session, folder, 8)  # type: ignore[arg-type]
    assert isinstance(server.answer([asked(3, adapter="broken")])[0], UsageError)
    (answer,) = server.answer([asked(3)])
    assert answer["out_sample"][0, 0, 0, 0] == 3
    assert session.activations[-1] == {}


def test_a_fixed_batch_is_filled_up_and_timesteps_kept_apart(folder: AdapterFolder) -> None:
    session = Arithmetic(4, per_sample=False)
    found = serve(session, folder, [asked(1, 2, step=10), asked(3, step=20), asked(4, 5, 6, step=10)])
    assert found == [[11, 12], [23], [14, 15, 16]]
    assert session.batches == [4, 4, 4]


def test_an_engine_gets_the_least_batch_that_it_takes(folder: AdapterFolder) -> None:
    session = Arithmetic("batch_size", per_sample=False, least=3)
    assert serve(session, folder, [asked(1, step=10), asked(2, 3, 4, 5, step=20)]) == [[11], [22, 23, 24, 25]]
    assert min(session.batches) == 3


def test_strengths_without_adapters_are_refused(folder: AdapterFolder) -> None:
    request = Asked(asked(1).feeds, None, torch.ones(1, 1))
    assert serve(Arithmetic(1, per_sample=False), folder, [request]) == ["UsageError"]


def test_a_picture_calls_the_unet_with_no_more_than_it_takes() -> None:
    """Three pictures under guidance are six samples a step, for a model of four."""
    calls: list[tuple[int, Any]] = []

    def call(feeds: Any, adapters: Any, strengths: Any) -> Tensor:
        assert feeds["timestep"].shape == (len(feeds["sample"]), 1)
        calls.append((len(feeds["sample"]), adapters))
        return feeds["sample"] * 0.1 + feeds["encoder_hidden_states"].mean((1, 2)).reshape(-1, 1, 1, 1)

    denoising = Denoising.of_folder(None, 2)
    painter = Painter(Settings("unet", 4, (1, 2, 2), 2, 3.0, "images"), denoising, call, torch.zeros(5, 8), None)
    prompts, noise = torch.randn(3, 5, 8), torch.randn(3, 1, 2, 2)
    found = painter.paint(Order({PROMPT: prompts, "latents": noise}, [["a"], ["b"], ["c"]]))["images"]
    assert calls == [(4, [["a"], ["b"], ["c"], ["a"]]), (2, [["b"], ["c"]])] * 2
    whole = Denoising(denoising.scheduler, 2, 3.0, torch.zeros(5, 8)).run(
        lambda feeds: call({**feeds, "timestep": feeds["timestep"].expand(6)[:, None]}, None, None),
        noise,
        {"encoder_hidden_states": prompts},
    )
    torch.testing.assert_close(found, (whole / 2 + 0.5).clamp(0, 1))
