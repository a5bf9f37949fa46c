"""One model, many adapters: equal to PyTorch, no trace of what was there before, nothing lost where something fails."""

from __future__ import annotations

import math
import random
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.helpers import bits
from tests.trexport.helpers import SIZES, drawn_by_torch
from trexport.artifact import Artifact, open_artifact
from trexport.errors import ArtifactError, RunError, UsageError
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.parity.metrics import relative_l2
from trexport.session import Session, fed_tensors
from trexport.session.forms import AdapterForm, Prepared
from trlora import save_adapter
from trlora.swap import SwapReport, WeightWriter

ADAPTERS = {"a": "random:tlora:2:6", "b": "random:lora:3", "c": "random:tlora:1:4", "d": "random:lora:2=0.3"}
"""In two slots, a and c fit the first only, b and d the second only."""


def opened(artifact: Artifact) -> Session:
    session = Session(artifact)
    for name, argument in ADAPTERS.items():
        session.load_adapter(name, argument)
    return session


@pytest.fixture(scope="module")
def swapping_session(swappable: Artifact) -> Iterator[Session]:
    with opened(swappable) as session:
        yield session


@pytest.fixture(scope="module")
def slots_session(two_slots: Artifact) -> Iterator[Session]:
    with opened(two_slots) as session:
        yield session


@pytest.fixture
def swapping(swapping_session: Session) -> Session:
    swapping_session.deactivate()
    return swapping_session


@pytest.fixture(params=["swapping_session", "slots_session"])
def session(request: pytest.FixtureRequest) -> Session:
    """One of each form, nothing active."""
    session: Session = request.getfixturevalue(request.param)
    session.deactivate()
    return session


def feeds_of(session: Session) -> dict[str, Tensor]:
    return random_feeds(session.spec, SIZES, seed=4)


def draw(session: Session, strengths: Mapping[str, float | None] | None = None) -> Tensor:
    """A step, after an activation where strengths are given."""
    if strengths is not None:
        session.activate(strengths)
    return session.run(feeds_of(session))["out_sample"]


def arguments(strengths: Mapping[str, float | None]) -> list[str]:
    """The same adapters as arguments."""
    return [ADAPTERS[name] if s is None else f"{ADAPTERS[name].split('=')[0]}={s!r}" for name, s in strengths.items()]


CHOICES: list[dict[str, float | None]] = [
    {},
    {"a": 0.7},
    {"b": -1.2},
    {"a": 0.7, "b": 0.5},
    {"b": 0.5, "a": 0.7},
    {"c": 1.0, "d": None},
    {"d": None, "c": 1.0},
    {"b": 1.5, "c": -0.4},
]


def test_a_run_equals_torch_with_the_adapters_attached(session: Session, base: Base) -> None:
    feeds = feeds_of(session)
    plain = drawn_by_torch(base, [], feeds)
    for strengths in CHOICES:
        expected = drawn_by_torch(base, arguments(strengths), feeds)
        assert relative_l2(draw(session, strengths), expected) <= 1e-5
        assert not strengths or relative_l2(expected, plain) > 1e-3
        assert list(session.active) == list(strengths)


def test_more_than_two_adapters_in_swappable_weights(swapping: Session, base: Base) -> None:
    strengths = {"d": 0.9, "a": 0.7, "c": -0.6, "b": 0.5}
    expected = drawn_by_torch(base, arguments(strengths), feeds_of(swapping))
    assert relative_l2(draw(swapping, strengths), expected) <= 1e-5


def test_a_strength_left_out_is_the_adapters_own(session: Session) -> None:
    assert bits(draw(session, {"d": None})) == bits(draw(session, {"d": 0.3})) != bits(draw(session, {"d": 1.0}))
    assert session.active == {"d": 1.0}


@pytest.mark.parametrize("form", ["swappable", "two_slots"])
def test_a_session_starts_as_the_base(form: str, request: pytest.FixtureRequest, base: Base) -> None:
    with opened(request.getfixturevalue(form)) as session:
        assert session.active == {}
        start = draw(session)
        assert relative_l2(start, drawn_by_torch(base, [], feeds_of(session))) <= 1e-5
        session.deactivate()
        assert bits(draw(session)) == bits(start)
        assert bits(draw(session, {})) == bits(start)


def test_what_was_active_before_leaves_no_trace(session: Session) -> None:
    start = bits(draw(session))
    first = bits(draw(session, {"a": 0.7}))
    both = bits(draw(session, {"b": 1.1, "a": 0.7}))
    assert len({start, first, both, bits(draw(session, {"c": 0.7}))}) == 4
    assert bits(draw(session, {"a": 0.7})) == first
    session.deactivate()
    assert bits(draw(session)) == start
    assert bits(draw(session, {"b": 1.1, "a": 0.7})) == both
    session.activate({})
    assert bits(draw(session)) == start


def test_two_hundred_swaps_leave_no_trace(session: Session) -> None:
    start = bits(draw(session))
    kept: list[tuple[dict[str, float], bytes]] = []
    for strengths in ({"a": 0.7}, {"b": -1.0, "c": 0.2}, {"d": 3.0}):
        kept.append((strengths, bits(draw(session, strengths))))
    chosen = random.Random(7)
    for _ in range(200):
        names = [chosen.choice("ac"), chosen.choice("bd")][: chosen.choice([0, 1, 2, 2])]
        chosen.shuffle(names)
        session.activate({name: chosen.uniform(-3, 3) for name in names})
        if chosen.random() < 0.1:
            draw(session)
    session.deactivate()
    assert bits(draw(session)) == start
    for strengths, expected in kept:
        assert bits(draw(session, strengths)) == expected


def test_outputs_are_new_and_stay(session: Session) -> None:
    first = draw(session, {"a": 1.0})
    before = bits(first)
    second = draw(session, {"b": 1.0})
    assert first.data_ptr() != second.data_ptr()
    assert bits(first) == before != bits(second)


def test_a_step_draws_with_what_is_active_when_it_runs(session: Session) -> None:
    step = session.step(feeds_of(session))
    for strengths in ({"a": 0.7}, {"b": 0.7}, {}):
        expected = bits(draw(session, strengths))
        step.run()
        assert bits(step.outputs["out_sample"]) == expected


def test_fed_tensors_draw_as_the_session_does(session: Session, base: Base) -> None:
    bound = open_adapters([f"{ADAPTERS['a']}=0.7", f"{ADAPTERS['b']}=0.5"], base)
    expected = fed_tensors(session.artifact, bound, "cpu")
    session.activate({"a": 0.7, "b": 0.5})
    assert session._form is not None
    assert session._form.buffers.keys() == expected.keys()
    for name, tensor in session._form.buffers.items():
        if session.artifact.manifest.swappable is None:
            assert bits(tensor) == bits(expected[name])
        else:  # by merge.onnx
            assert relative_l2(tensor, expected[name]) <= 1e-6


# --- what fails leaves what was there ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"a": 0.7, "nobody": 1.0}, "nobody"),
        ({"a": math.nan}, "finite"),
        ({"a": math.inf}, "finite"),
        ({"a": 0.7, "b": -math.inf}, "finite"),
        ({"a": "0.7"}, "finite"),
    ],
    ids=str,
)
def test_wrong_choices_are_refused(wrong: dict[str, Any], message: str, session: Session) -> None:
    before = bits(draw(session, {"a": 0.4}))
    with pytest.raises(UsageError, match=message):
        session.activate(wrong)
    assert session.active == {"a": 0.4}
    assert bits(draw(session)) == before


@pytest.mark.parametrize(
    ("wrong", "message"), [({"a": 1.0, "b": 1.0, "c": 1.0}, "3 adapters"), ({"a": 1.0, "c": 1.0}, "together")]
)
def test_more_than_the_slots_take_is_refused(wrong: dict[str, float], message: str, two_slots: Artifact) -> None:
    with opened(two_slots) as session:
        before = bits(draw(session, {"c": 0.4, "b": 1.0}))
        with pytest.raises(UsageError, match=message):
            session.activate(wrong)
        assert session.active == {"c": 0.4, "b": 1.0}
        assert bits(draw(session)) == before


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Path:
    """An adapter of finite numbers so great that its change of the weights overflows float32."""
    folder = tmp_path_factory.mktemp("adapter") / "huge"
    (bound,) = open_adapters(["random:lora:3"], base)
    save_adapter(bound.adapter, folder)
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor * 1e25 for name, tensor in safetensors.torch.load_file(file).items()}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    safetensors.torch.save_file(tensors, file)
    return folder


@pytest.mark.parametrize("before", [{}, {"a": 0.4}, {"b": 0.5, "c": -0.4}], ids=str)
def test_weights_that_overflow_are_refused(swapping: Session, huge: Path, before: dict[str, float]) -> None:
    expected = bits(draw(swapping, before))
    swapping.load_adapter("huge", huge)
    for wrong in ({"huge": 1.0}, {"a": 0.4, "huge": 1.0}):
        with pytest.raises(ArtifactError, match="not finite"):
            swapping.activate(wrong)
        assert swapping.active == before
        assert bits(draw(swapping)) == expected
    assert bits(draw(swapping, before)) == expected
    swapping.unload_adapter("huge")


class Breaking:
    """Makes a form's `write` scribble into every buffer and raise, where `breaks` says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, form: AdapterForm | None, error: BaseException) -> None:
        assert form is not None
        self.always = False
        write = form.write

        def broken(active: Sequence[tuple[Prepared, float]]) -> None:
            if self.always or any(prepared.name == "b" for prepared, _ in active):
                for buffer in form.buffers.values():
                    buffer.fill_(7.0)
                raise error
            write(active)

        monkeypatch.setattr(form, "write", broken)


@pytest.mark.parametrize("error", [RunError("broke off"), MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("before", [{}, {"a": 0.4}], ids=str)
def test_an_activation_that_breaks_off_leaves_what_was_active(
    session: Session, before: dict[str, float], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bits(draw(session, before))
    Breaking(monkeypatch, session._form, error)
    with pytest.raises(type(error)):
        session.activate({"c": 1.0, "b": 2.0})
    assert session.active == before
    assert bits(draw(session)) == expected
    assert bits(draw(session, {"c": 0.5})) != expected  # usable
    assert bits(draw(session, before)) == expected


@pytest.mark.parametrize("healed_by", [{}, {"c": 0.5}, {"a": 0.4}], ids=str)
def test_where_nothing_can_be_made_anew_no_run_draws_until_it_can(
    session: Session, healed_by: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bits(draw(session, healed_by))
    session.activate({"a": 0.4})
    with monkeypatch.context() as patch:
        Breaking(patch, session._form, RunError("broke off")).always = True
        for attempt in (lambda: session.activate({"c": 1.0}), session.deactivate):
            with pytest.raises(RunError, match="broke off"):
                attempt()
            with pytest.raises(RunError, match="could not be made anew"):
                draw(session)
    with pytest.raises(RunError, match="could not be made anew"):
        draw(session)
    if healed_by:
        session.activate(healed_by)
    else:
        session.deactivate()
    assert session.active == healed_by
    assert bits(draw(session)) == expected


def test_a_merge_that_breaks_off_half_way_leaves_what_was_active(
    swapping: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, original, calls = bits(draw(swapping, {"a": 0.4})), WeightWriter.write, [0]

    def breaking(writer: WeightWriter, active: Any) -> SwapReport:
        calls[0] += 1
        report = original(writer, active)
        if calls[0] == 1:  # the second is the recovery
            next(iter(writer._buffers.values())).fill_(math.nan)
            raise RunError("broke off")
        return report

    monkeypatch.setattr(WeightWriter, "write", breaking)
    with pytest.raises(RunError, match="broke off"):
        swapping.activate({"b": 2.0})
    assert calls == [2]
    assert swapping.active == {"a": 0.4}
    assert bits(draw(swapping)) == expected


# --- wrong input -------------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_refused(session: Session) -> None:
    feeds = feeds_of(session)
    less = {name: tensor for name, tensor in feeds.items() if name != "timestep"}
    cases: list[tuple[dict[str, Tensor], str]] = [
        (less, "missing: .*timestep"),
        (feeds | {"latent": feeds["sample"]}, "unknown: .*latent"),
        (feeds | {"adapter_index": torch.zeros(2)}, "unknown: .*adapter_index"),
        (feeds | {"sample": feeds["sample"][0]}, "sample: shape"),
        (feeds | {"sample": feeds["sample"][:, :-1]}, "sample: shape"),
        (feeds | {"sample": feeds["sample"][:0]}, "sample: shape"),
        (feeds | {"encoder_hidden_states": feeds["encoder_hidden_states"][:1]}, "encoder_hidden_states: shape"),
        (feeds | {"timestep": torch.ones(2)}, "timestep: shape"),
    ]
    for wrong, message in cases:
        with pytest.raises(UsageError, match=message):
            session.run(wrong)
    with pytest.raises(UsageError, match="bank"):
        session.run(feeds, adapters=["a", None])
    with pytest.raises(UsageError, match="bank"):
        session.run(feeds, strengths=[1.0, 1.0])


def test_inputs_of_other_dtypes_are_taken(session: Session) -> None:
    expected = draw(session, {"a": 1.0})
    wide = {name: tensor.double() for name, tensor in feeds_of(session).items()}
    assert bits(session.run(wide | {"timestep": torch.tensor(500)})["out_sample"]) == bits(expected)


def test_a_closed_session_does_nothing(two_slots: Artifact) -> None:
    session = opened(two_slots)
    feeds = feeds_of(session)
    session.activate({"a": 1.0})
    session.close()
    for refused in (
        lambda: session.run(feeds),
        lambda: session.step(feeds),
        lambda: session.activate({"b": 1.0}),
        session.deactivate,
        lambda: session.load_adapter("e", "random:lora:1"),
    ):
        with pytest.raises(UsageError, match="closed"):
            refused()
    session.close()


def test_a_damaged_artifact_is_refused(swappable: Artifact, tmp_path: Path) -> None:
    shutil.copytree(swappable.folder, tmp_path / "x")
    with (tmp_path / "x" / "unet" / "merge.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="merge.onnx"):
        Session(tmp_path / "x")
    (tmp_path / "x" / "unet" / "merge.onnx").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        open_artifact(tmp_path / "x")


# --- threads -----------------------------------------------------------------------------------------------------------


def test_runs_beside_a_thread_that_switches_see_one_activation_whole(session: Session) -> None:
    choices: list[dict[str, float]] = [{"a": 0.7}, {"b": -1.0, "c": 0.5}, {}]
    known = {bits(draw(session, strengths)): number for number, strengths in enumerate(choices)}
    assert len(known) == 3
    feeds, stop = feeds_of(session), threading.Event()
    seen: list[int | None] = []
    errors: list[BaseException] = []

    def switch() -> None:
        chosen = random.Random(3)
        try:
            while not stop.is_set():
                session.activate(choices[chosen.randrange(3)])
                time.sleep(0.002)
        except BaseException as error:
            errors.append(error)

    def run() -> None:
        try:
            while not stop.is_set():
                seen.append(known.get(bits(session.run(feeds)["out_sample"])))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=target, daemon=True) for target in (switch, run, run, run)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert set(seen) == {0, 1, 2}
    assert len(seen) > 20


def test_off_is_the_base_after_an_adapter_that_overflows(two_slots: Artifact, overflowing: Path) -> None:
    with Session(two_slots) as session:
        before = bits(draw(session))
        session.load_adapter("huge", overflowing)
        assert not draw(session, {"huge": 1.0}).isfinite().all()
        session.deactivate()
        assert bits(draw(session)) == before
        with pytest.raises(UsageError, match="float32"):
            session.activate({"huge": 1e39})
        assert bits(draw(session)) == before
