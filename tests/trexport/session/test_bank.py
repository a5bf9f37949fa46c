"""A bank: every sample of a batch with its own adapter, each as if it were drawn alone. In ONNX the cores of all adapters
lie in it, in a package of AOTInductor whole weights."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tests.helpers import bits
from tests.trexport.helpers import SIZES, drawn_by_torch, write_overflowing
from trexport.artifact import Artifact, open_artifact
from trexport.backends import BACKENDS, EngineFile, EngineOptions, OnnxFile, engine_backend_of
from trexport.bench.forms import cost_of, file_for
from trexport.bench.run import BenchOptions, bench
from trexport.engine import build_engine, usual_sizes
from trexport.errors import ArtifactError, UsageError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.models.adapters import open_adapters
from trexport.models.architectures import RANDOM
from trexport.models.base import Base, open_base
from trexport.models.model import random_feeds
from trexport.parity.metrics import relative_l2
from trexport.parity.validate import ValidateOptions, validate
from trexport.profile import parse_profile
from trexport.session import Session, fed_tensors, forms
from trexport.session.forms import BankForm
from trexport.session.replaced import ReplacedBank, WrittenBank
from trexport.session.sources import source_with

ADAPTERS = {"a": "random:tlora:2:6", "b": "random:tlora:1:4=0.6", "c": "random:tlora:2:3", "d": "random:tlora:1:1"}
"""More than the two places."""


pytestmark = pytest.mark.slow  # one package is compiled for all


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A UNet of one level, compiled in half the time."""
    blocks = {"block_out_channels": [16], "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["UpBlock2D"]}
    model = UNet2DConditionModel.from_config(RANDOM["tiny"] | blocks)
    assert isinstance(model, UNet2DConditionModel)
    folder = tmp_path_factory.mktemp("base") / "unet"
    model.save_pretrained(folder)
    return open_base(str(folder))


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Artifact:
    """Of two places, blank, the batch free."""
    folder = tmp_path_factory.mktemp("onnx") / "bank"
    fixed = {axis: size for axis, size in SIZES.items() if axis != "batch_size"}
    options = ExportOptions(factored=FactoredOptions(blank=True, bank=2), fixed=fixed)
    export_onnx(base, open_adapters(["random:tlora:2:6"], base), folder, options)
    return open_artifact(folder)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Path:
    """An adapter of finite tensors whose products are not."""
    return write_overflowing(base, tmp_path_factory.mktemp("adapter") / "overflowing")


@pytest.fixture(scope="module")
def engine(bank: Artifact, base: Base, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A package of the bank, of a rewritten UNet, for 1 to 4 samples."""
    out = tmp_path_factory.mktemp("engine") / "bank"
    profile = parse_profile("1x8x8x5,2x8x8x5,4x8x8x5", bank.manifest.io, usual_sizes(bank, base))
    options = EngineOptions((profile,), optimization_level=1)
    build_engine(bank, base, open_adapters(["random:tlora:2:6"], base), out, engine_backend_of("aotinductor"), options)
    return open_artifact(out)


@pytest.fixture(params=["onnx", "written", "engine"])
def session(request: pytest.FixtureRequest, bank: Artifact, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """With cores, with whole weights as on a GPU, and as a package."""
    if request.param == "written":
        monkeypatch.setattr(forms, "WRITING", ("cpu",))
    with Session(request.getfixturevalue("engine") if request.param == "engine" else bank) as session:
        assert type(session._form) is {"onnx": BankForm, "written": WrittenBank, "engine": ReplacedBank}[request.param]
        for name, argument in ADAPTERS.items():
            session.load_adapter(name, argument)
        yield session


def feeds_of(session: Session, batch: int) -> dict[str, Tensor]:
    return random_feeds(session.spec, SIZES | {"batch_size": batch}, seed=4)


def mixed(session: Session, names: Sequence[str | None], strengths: Sequence[float | None] | None = None) -> Tensor:
    return session.run(feeds_of(session, len(names)), adapters=names, strengths=strengths)["out_sample"]


def alone(base: Base, feeds: dict[str, Tensor], row: int, name: str | None, strength: float | None) -> Tensor:
    """One sample in PyTorch, with its adapter attached."""
    own = {key: tensor[row : row + 1] if tensor.dim() else tensor for key, tensor in feeds.items()}
    if name is None:
        return drawn_by_torch(base, [], own)
    argument = ADAPTERS[name] if strength is None else f"{ADAPTERS[name].split('=')[0]}={strength}"
    return drawn_by_torch(base, [argument], own)


def check(session: Session, base: Base, names: Sequence[str | None], strengths: list[float | None] | None) -> None:
    feeds, found = feeds_of(session, len(names)), mixed(session, names, strengths)
    assert found.shape[0] == len(names)
    for row, (name, strength) in enumerate(zip(names, strengths or [None] * len(names), strict=True)):
        expected = alone(base, feeds, row, name, strength)
        assert relative_l2(found[row : row + 1], expected) <= 1e-5
        assert name is None or relative_l2(expected, alone(base, feeds, row, None, None)) > 1e-4


def test_every_sample_is_drawn_as_if_alone(session: Session, base: Base) -> None:
    check(session, base, ["a", None, "b", "a"], [0.7, None, -1.3, 1.1])
    check(session, base, ["b", None, "a"], None)
    check(session, base, [None], None)
    assert session.active == {}


def test_more_adapters_than_places_take_turns(session: Session, base: Base) -> None:
    first = bits(mixed(session, ["a", "b"]))
    for names in (["c", "d"], ["d", "a"], ["b", "c"], ["a", "d"]):
        check(session, base, names, None)
        assert set(names) <= set(session.resident)
    assert set(session.resident) == set("abcd")  # in memory without a place: no file is read for the next one
    assert bits(mixed(session, ["a", "b"])) == first


def test_one_active_for_all_samples_is_the_same_as_named_for_each(session: Session, base: Base) -> None:
    feeds = feeds_of(session, 3)
    plain = bits(session.run(feeds)["out_sample"])
    session.activate({"a": 0.7})
    active = session.run(feeds)["out_sample"]
    assert bits(active) == bits(mixed(session, ["a", "a", "a"], [0.7, 0.7, 0.7])) != plain
    assert relative_l2(active, drawn_by_torch(base, [f"{ADAPTERS['a']}=0.7"], feeds)) <= 1e-5
    some = mixed(session, ["b", "a", None], [1.0, 0.7, None])
    assert bits(some[1]) == bits(active[1])
    session.deactivate()
    off = session.run(feeds)["out_sample"]
    assert bits(off) == plain
    assert bits(some[2]) == bits(off[2])


def test_a_b_a_and_off_give_the_very_bits(session: Session) -> None:
    feeds = feeds_of(session, 2)
    start = bits(session.run(feeds)["out_sample"])
    known = {}
    for name in ADAPTERS:
        session.activate({name: 0.9})
        known[name] = bits(session.run(feeds)["out_sample"])
    assert len({start, *known.values()}) == 5
    chosen = random.Random(5)
    for _ in range(60):
        name = chosen.choice([*ADAPTERS, None])
        session.activate({} if name is None else {name: 0.9})
        assert bits(session.run(feeds)["out_sample"]) == (start if name is None else known[name])


def test_an_active_adapter_that_a_batch_has_evicted_comes_back(session: Session) -> None:
    feeds = feeds_of(session, 2)
    session.activate({"a": 0.9})
    expected = bits(session.run(feeds)["out_sample"])
    mixed(session, ["b", "c"])
    assert session.active == {"a": 0.9}
    assert bits(session.run(feeds)["out_sample"]) == expected
    mixed(session, ["c", "d"])
    step = session.step(feeds)
    step.run()
    assert bits(step.outputs["out_sample"]) == expected


def test_an_adapter_that_takes_another_ones_name_takes_its_place(session: Session, base: Base) -> None:
    old = bits(mixed(session, ["a", "b"]))
    session.load_adapter("a", "random:tlora:2:5")
    found = mixed(session, ["a", "b"])
    assert bits(found) != old
    feeds = feeds_of(session, 2)
    own = {key: tensor[:1] if tensor.dim() else tensor for key, tensor in feeds.items()}
    assert relative_l2(found[:1], drawn_by_torch(base, ["random:tlora:2:5"], own)) <= 1e-5


def test_wrong_choices_are_refused(session: Session) -> None:
    feeds = feeds_of(session, 3)
    before = bits(mixed(session, ["a", None, "b"]))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"adapters": ["a", "b"]}, "2 adapters given for 3 samples"),
        ({"adapters": ["a"] * 4}, "4 adapters given for 3 samples"),
        ({"adapters": "abc"}, "adapters given"),
        ({"adapters": ["a"] * 3, "strengths": [1.0]}, "1 strengths given for 3 samples"),
        ({"adapters": ["a", "b", "c"]}, "3 adapters in one batch"),
        ({"adapters": ["a", "nobody", None]}, "nobody"),
        ({"adapters": ["a"] * 3, "strengths": [1.0, float("nan"), 1.0]}, "finite"),
        ({"strengths": [1.0] * 3}, "without adapters"),
    ]
    for wrong, message in cases:
        with pytest.raises(UsageError, match=message):
            session.run(feeds, **wrong)
    with pytest.raises(UsageError, match="2 adapters to be active"):
        session.activate({"a": 1.0, "b": 1.0})
    for name in ("adapter_index", "adapter_strength"):
        with pytest.raises(UsageError, match=name):
            session.run(feeds | {name: torch.zeros(3)})
    assert session.active == {}
    assert bits(mixed(session, ["a", None, "b"])) == before


def test_a_place_that_could_not_be_filled_is_filled_again(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = feeds_of(session, 2)
    expected = bits(mixed(session, ["a", "b"]))
    session.activate({"a": 1.0})
    active = bits(session.run(feeds)["out_sample"])
    bank = session._bank
    assert bank is not None

    def broken(place: int, prepared: object) -> None:
        for buffer in bank.buffers.values():
            buffer[place].fill_(7.0)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(bank, "put", broken)
        with pytest.raises(MemoryError):
            mixed(session, ["c", "d"])
        with pytest.raises(MemoryError):
            session.activate({"c": 1.0})
    assert session.active == {"a": 1.0}
    assert bits(session.run(feeds)["out_sample"]) == active
    assert bits(mixed(session, ["a", "b"])) == expected


def test_threads_that_draw_with_different_adapters_do_not_meet(session: Session) -> None:
    batches: list[list[str | None]] = [["a", "b"], ["b", None], ["c", "d"], ["d", "a"], ["c", "c"]]
    known = {tuple(names): bits(mixed(session, names)) for names in batches}
    feeds = feeds_of(session, 2)
    session.activate({"a": 0.7})
    actives = {bits(session.run(feeds)["out_sample"])}
    session.activate({"b": -1.0})
    actives.add(bits(session.run(feeds)["out_sample"]))
    session.deactivate()
    actives.add(bits(session.run(feeds)["out_sample"]))
    stop, wrong, errors, runs = threading.Event(), list[str](), list[BaseException](), list[int]()

    def switch() -> None:
        chosen = random.Random(3)
        while not stop.is_set():
            session.activate(chosen.choice([{"a": 0.7}, {"b": -1.0}, {}]))
            time.sleep(0.003)

    def draw(seed: int) -> None:
        chosen = random.Random(seed)
        while not stop.is_set():
            names = chosen.choice([*batches, None])
            if names is None:
                if bits(session.run(feeds)["out_sample"]) not in actives:
                    wrong.append("active")
            elif bits(mixed(session, names)) != known[tuple(names)]:
                wrong.append(str(names))
            runs.append(seed)

    def guarded(target: Any, *given: int) -> None:
        try:
            target(*given)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(switch,), daemon=True)]
    threads += [threading.Thread(target=guarded, args=(draw, seed), daemon=True) for seed in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert wrong == []
    assert set(runs) == {0, 1, 2}


def test_an_adapter_that_overflows_leaves_the_other_samples_alone(
    session: Session, base: Base, overflowing: Path
) -> None:
    before = bits(session.run(feeds_of(session, 2))["out_sample"][1])
    session.load_adapter("huge", overflowing)
    if not isinstance(session._form, BankForm):  # whole weights are looked at before they are used
        for refused in (lambda: mixed(session, ["huge", None]), lambda: session.activate({"huge": 1.0})):
            with pytest.raises(ArtifactError, match="not finite"):
                refused()
        assert session.active == {}
        check(session, base, ["a", "b"], None)
    else:
        found = mixed(session, ["huge", None])
        assert not found[0].isfinite().all()
        assert bits(found[1]) == before
        session.activate({"huge": 1.0})
        session.deactivate()
    assert bits(session.run(feeds_of(session, 2))["out_sample"][1]) == before


def test_strengths_are_numbers_one_a_sample(session: Session) -> None:
    for wrong in (1e39, float("nan"), True, "1"):
        with pytest.raises(UsageError, match="strength"):
            mixed(session, ["a", None], [wrong, None])  # type: ignore[list-item]
        with pytest.raises(UsageError, match="strength"):
            session.activate({"a": wrong})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="0 strengths"):
        mixed(session, ["a", None], [])


def test_a_bank_is_proved_and_measured_as_a_package(bank: Artifact, engine: Artifact, base: Base) -> None:
    record = engine.engine_record
    assert (engine.manifest.form, record.bank) == ("factored", 2)
    assert {shape[0] for shape in record.constants().values()} == {3}
    adapters = open_adapters(list(ADAPTERS.values())[:2], base)
    report = validate(engine, base, adapters, "cpu", ValidateOptions((1, 500), (0,), 2, locate=False))
    assert report.passed, report.failures
    assert len({step.who for step in report.steps}) == 3  # each alone, and both in one batch
    files = [file_for(artifact, adapters, "cpu") for artifact in (bank, engine)]
    assert isinstance(files[0], OnnxFile)
    assert isinstance(files[1], EngineFile)
    options = BenchOptions(("onnxruntime", "aotinductor"), iterations=2)
    report = bench(base, adapters, {"bank": files[0]}, "cpu", options, engines={"bank": files[1]})
    for result in report.results:  # with the first of the two
        assert result.relative_l2 <= 1e-5
    assert cost_of(engine, adapters, "cpu", report.results[1]).form == "bank of 2"


def test_without_its_weights_a_package_is_not_loaded(engine: Artifact) -> None:
    with pytest.raises(ArtifactError, match="is not given"):
        BACKENDS["aotinductor"].load(source_with(engine, {}), "cpu")


def test_places_are_counted(engine: Artifact, base: Base) -> None:
    with pytest.raises(UsageError, match="3 adapters given, this bank holds 2"):
        fed_tensors(engine, open_adapters(list(ADAPTERS.values())[:3], base), "cpu")


@pytest.mark.parametrize("index", [[0, 3], [-1, 0]])
def test_a_place_that_is_not_there_is_refused(index: list[int], engine: Artifact) -> None:
    source = source_with(engine, fed_tensors(engine, [], "cpu"))
    with BACKENDS["aotinductor"].load(source, "cpu") as runner:
        feeds = random_feeds(engine.manifest.io, SIZES)
        with pytest.raises(UsageError, match="adapter_index"):
            runner(feeds | {"adapter_index": torch.tensor(index)})
        assert runner(feeds | {"adapter_index": torch.tensor([2, 0])})["out_sample"].isfinite().all()
