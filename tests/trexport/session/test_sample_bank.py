"""A bank of a fixed batch with a weight for every sample, written when the choice changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import pytest
from torch import Tensor

from tests.helpers import bits
from tests.trexport.contrib import evaluated
from tests.trexport.helpers import SIZES, drawn_by_torch, write_overflowing
from trexport.adapter_file import factored_of
from trexport.artifact import Artifact, open_artifact
from trexport.backends import OnnxFile
from trexport.bench.forms import cost_of, file_for
from trexport.bench.report import BackendResult
from trexport.bench.run import BenchOptions, bench
from trexport.bench.stats import Latency
from trexport.deploy.serve.folder import AdapterFolder
from trexport.deploy.serve.unet import AdapterServer, Asked
from trexport.errors import ArtifactError, UsageError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.ort_graph import ort_graph
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.parity.metrics import relative_l2
from trexport.parity.validate import ValidateOptions, validate
from trexport.session import Session, forms
from trexport.session.forms import BankForm, form_of
from trexport.session.replaced import ReplacedForm, WrittenBank
from trexport.session.sample_bank import SampleBank
from trexport.session.sources import source_in_session
from trlora import save_adapter

BATCH = 3
FIXED = SIZES | {"batch_size": BATCH}
ADAPTERS = {"a": "random:tlora:2:6", "b": "random:tlora:1:4=0.6", "c": "random:tlora:2:3"}


@pytest.fixture(autouse=True)
def writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "WRITING", ("cpu",))


@pytest.fixture(scope="module")
def bank(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Of two places, for three samples."""
    folder = tmp_path_factory.mktemp("onnx") / "bank"
    options = ExportOptions(factored=FactoredOptions(blank=True, bank=2), fixed=FIXED)
    export_onnx(base, open_adapters(["random:tlora:2:6"], base), folder, options)
    return open_artifact(folder)


@pytest.fixture
def session(bank: Artifact) -> Iterator[Session]:
    with Session(bank) as opened:
        assert type(opened._form) is SampleBank
        for name, argument in ADAPTERS.items():
            opened.load_adapter(name, argument)
        yield opened


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The strengths of every write of all weights, as they are made."""
    seen: list[list[float]] = []
    write = ReplacedForm.write

    def recorded(form: ReplacedForm, active: Sequence[tuple[object, float]]) -> None:
        seen.append([strength for _, strength in active])
        write(form, active)  # type: ignore[arg-type]

    monkeypatch.setattr(ReplacedForm, "write", recorded)
    return seen


def drawn(session: Session, names: Sequence[str | None], strengths: Sequence[float | None] | None = None) -> Tensor:
    feeds = random_feeds(session.spec, FIXED, seed=4)
    return session.run(feeds, adapters=names, strengths=strengths)["out_sample"]


def check(session: Session, base: Base, names: Sequence[str | None], strengths: Sequence[float | None] | None) -> None:
    feeds, found = random_feeds(session.spec, FIXED, seed=4), drawn(session, names, strengths)
    for row, (name, strength) in enumerate(zip(names, strengths or [None] * BATCH, strict=True)):
        own = {key: tensor[row : row + 1] if tensor.dim() else tensor for key, tensor in feeds.items()}
        plain = drawn_by_torch(base, [], own)
        argument = [] if name is None else [ADAPTERS[name]]
        if strength is not None:
            argument = [f"{one.split('=')[0]}={strength}" for one in argument]
        expected = drawn_by_torch(base, argument, own)
        assert relative_l2(found[row : row + 1], expected) <= 1e-5
        assert name is None or relative_l2(expected, plain) > 1e-4


def test_every_sample_is_drawn_as_if_alone(session: Session, base: Base) -> None:
    check(session, base, ["a", None, "b"], [0.7, None, -1.3])
    check(session, base, ["b", "b", "c"], [0.7, -0.2, None])
    check(session, base, [None, None, "a"], None)


def test_only_what_changes_is_written(session: Session, written: list[list[float]]) -> None:
    first = bits(drawn(session, ["a", None, "b"], [0.7, None, 0.3]))
    assert written == [[0.7], [0.3]]
    assert bits(drawn(session, ["a", None, "b"], [0.7, None, 0.3])) == first
    assert len(written) == 2
    drawn(session, ["a", "b", "b"], [0.7, 0.3, 0.3])
    assert written[2:] == [[0.3]]
    drawn(session, ["a", "a", "a"], [0.7, 0.5, 0.5])
    assert written[3:] == [[0.5]]  # once for two samples
    assert bits(drawn(session, ["a", None, "b"], [0.7, None, 0.3])) == first
    assert written[4:] == [[], [0.3]]


def test_what_is_active_is_for_all_samples_and_written_at_once(
    session: Session, base: Base, written: list[list[float]]
) -> None:
    feeds = random_feeds(session.spec, FIXED, seed=4)
    plain = session.run(feeds)["out_sample"]
    assert relative_l2(plain, drawn_by_torch(base, [], feeds)) <= 1e-5
    assert written == []
    session.activate({"a": 0.7})
    assert written == [[0.7]]
    found = session.run(feeds)["out_sample"]
    assert written == [[0.7]]
    assert relative_l2(found, drawn_by_torch(base, ["random:tlora:2:6=0.7"], feeds)) <= 1e-5
    drawn(session, [None, "b", "c"])
    assert bits(session.run(feeds)["out_sample"]) == bits(found)
    session.deactivate()
    assert bits(session.run(feeds)["out_sample"]) == bits(plain)
    with pytest.raises(UsageError, match="bank"):
        session.activate({"a": 1.0, "b": 1.0})


def test_another_adapter_of_the_same_name(session: Session, base: Base) -> None:
    drawn(session, ["a", "a", None])
    session.load_adapter("a", ADAPTERS["c"])
    found = drawn(session, ["a", "c", None])
    own = random_feeds(session.spec, FIXED, seed=4)
    row = {key: tensor[:1] if tensor.dim() else tensor for key, tensor in own.items()}
    assert relative_l2(found[:1], drawn_by_torch(base, [ADAPTERS["c"]], row)) <= 1e-5


def test_more_adapters_than_it_takes_and_other_batches(session: Session) -> None:
    with pytest.raises(UsageError, match="3 adapters in one batch"):
        drawn(session, ["a", "b", "c"])
    feeds = {name: tensor[:2] if tensor.dim() else tensor for name, tensor in random_feeds(session.spec, FIXED).items()}
    for adapters in (["a", None], None):
        with pytest.raises(UsageError, match="shape"):
            session.run(feeds, adapters=adapters)


def test_weights_that_are_not_finite_are_refused_and_leave_no_trace(
    session: Session, base: Base, tmp_path: Path
) -> None:
    session.load_adapter("huge", write_overflowing(base, tmp_path / "huge"))
    before = bits(drawn(session, ["a", None, "b"]))
    for _ in range(2):
        with pytest.raises(ArtifactError, match="not finite"):
            drawn(session, ["a", "huge", None])
    assert bits(drawn(session, ["a", None, "b"])) == before
    session.activate({"a": 0.7})
    feeds = random_feeds(session.spec, FIXED, seed=4)
    active = bits(session.run(feeds)["out_sample"])
    with pytest.raises(ArtifactError, match="not finite"):
        session.activate({"huge": 1.0})
    assert session.active == {"a": 0.7}
    assert bits(session.run(feeds)["out_sample"]) == active


def test_threads_draw_each_their_own(session: Session) -> None:
    choices: list[list[str | None]] = [["a", None, "b"], ["b", "b", None], [None, "c", "a"], ["c", "c", "c"]]
    expected = [bits(drawn(session, names)) for names in choices]
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(12):
            which = (number + turn) % len(choices)
            if bits(drawn(session, choices[which])) != expected[which]:
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_active_adapter_that_has_left_is_not_written_again(bank: Artifact, written: list[list[float]]) -> None:
    with Session(bank, capacity=2) as session:
        for name, argument in ADAPTERS.items():
            session.load_adapter(name, argument)
        session.activate({"a": 1.0})
        drawn(session, ["b", "c", None])
        assert "a" not in session.resident
        drawn(session, ["a", "a", "a"], [1.0, 1.0, 1.0])
        count = len(written)
        session.run(random_feeds(session.spec, FIXED, seed=4))
        drawn(session, ["a", "a", "a"], [1.0, 1.0, 1.0])
        assert len(written) == count


def test_a_server_writes_for_new_adapters_only(
    bank: Artifact, base: Base, tmp_path: Path, written: list[list[float]]
) -> None:
    """Whoever comes first, and however much is to be filled up."""
    for name in ("a", "b"):
        (bound,) = open_adapters([ADAPTERS[name]], base)
        save_adapter(bound.adapter, tmp_path / name)
    feeds = {
        name: tensor[:1] if tensor.dim() else tensor.expand(1)
        for name, tensor in random_feeds(Session(bank).spec, FIXED).items()
    }
    asked = {name: Asked(feeds, [[name]]) for name in ("a", "b")}
    server = AdapterServer(Session(bank), AdapterFolder(tmp_path), BATCH)
    first = server.answer([asked["a"], asked["b"]])
    assert len(written) == 2
    second = server.answer([asked["b"], asked["a"]])
    server.answer([asked["a"]])
    assert [weights for weights in written[2:] if weights] == []
    server.close()
    for name, one, other in zip(asked, first, second[::-1], strict=True):
        assert isinstance(one, dict)
        assert isinstance(other, dict)
        assert bits(one["out_sample"]) == bits(other["out_sample"])
        expected = drawn_by_torch(base, [f"{tmp_path / name}"], feeds)
        assert relative_l2(one["out_sample"], expected) <= 1e-5


def test_a_batch_of_fewer_samples_than_adapters_is_proved_in_turns(base: Base, tmp_path: Path) -> None:
    options = ExportOptions(factored=FactoredOptions(blank=True, bank=2), fixed=SIZES | {"batch_size": 1})
    export_onnx(base, open_adapters([ADAPTERS["a"]], base), tmp_path / "bank", options)
    artifact = open_artifact(tmp_path / "bank")
    assert type(form_of(artifact, "cpu")) is SampleBank
    quick = ValidateOptions((10,), (0,), 0)
    report = validate(artifact, base, open_adapters([ADAPTERS["a"], ADAPTERS["b"]], base), "cpu", quick)
    assert report.passed, report.failures
    assert [step.who for step in report.steps].count("in a session") == 3
    huge = write_overflowing(base, tmp_path / "huge")
    report = validate(artifact, base, open_adapters([ADAPTERS["a"], str(huge)], base), "cpu", quick)
    assert any(failure.startswith("in a session: ") and "not finite" in failure for failure in report.failures)


def test_a_step_for_measuring(session: Session) -> None:
    feeds = random_feeds(session.spec, FIXED, seed=4)
    session.activate({"b": 0.5})
    step = session.step(feeds)
    step.run()
    assert bits(step.outputs["out_sample"]) == bits(session.run(feeds)["out_sample"])


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_graph_that_a_gpu_gets(base: Base, tmp_path: Path, dtype: str) -> None:
    options = ExportOptions(dtype, factored=FactoredOptions(blank=True, bank=2), fixed=FIXED)  # type: ignore[arg-type]
    arguments = ["random:tlora:2:6=0.7", "random:tlora:1:4=-0.4"]
    adapters = open_adapters(arguments, base)
    export_onnx(base, adapters[:1], tmp_path / "bank", options)
    artifact = open_artifact(tmp_path / "bank")
    source = source_in_session(artifact, adapters, "cpu", [1, None, 0])
    assert isinstance(source, OnnxFile)
    graph = ort_graph(artifact.onnx_path, graph=source.graph)
    model = onnx.load_from_string(graph.model)
    onnx.load_external_data_for_model(model, str(artifact.onnx_path.parent))
    feeds = random_feeds(artifact.manifest.io, FIXED, seed=4)
    (found,) = evaluated(model, feeds | dict(source.constants))
    for row, own in enumerate([arguments[1:], [], arguments[:1]]):
        one = {
            name: (tensor[row : row + 1] if tensor.dim() else tensor).float()
            for name, tensor in feeds.items()
            if not name.startswith("adapter_")
        }
        assert relative_l2(found[row : row + 1], drawn_by_torch(base, own, one)) <= (5e-3 if dtype == "fp16" else 1e-5)


def test_it_is_proved_as_a_session_runs_it(bank: Artifact, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ValidateOptions(timesteps=(10,), seeds=(0,), trajectory_steps=0)
    adapters = open_adapters([ADAPTERS["a"], ADAPTERS["b"]], base)
    report = validate(bank, base, adapters, "cpu", options)
    assert report.passed, report.failures
    assert [step.who for step in report.steps if step.who == "in a session"] != []
    write = SampleBank._write
    monkeypatch.setattr(SampleBank, "_write", lambda form, rows, sample: write(form, [0], sample))
    report = validate(bank, base, adapters, "cpu", options)
    assert not report.passed
    assert all(failure.startswith("in a session: ") for failure in report.failures)


def test_measured_beside_the_merged_model_at_what_a_change_costs(bank: Artifact, base: Base) -> None:
    adapters = open_adapters([ADAPTERS["a"], ADAPTERS["b"]], base)
    file = file_for(bank, adapters, "cpu", [0, 1, None])
    assert isinstance(file, OnnxFile)
    first = file_for(bank, adapters, "cpu")
    assert isinstance(first, OnnxFile)
    report = bench(base, adapters, {"": first}, "cpu", BenchOptions(("onnxruntime",), iterations=1))
    assert report.results[0].relative_l2 <= 1e-5
    result = BackendResult("", Latency.of([1.0]), 1.0, 0.1, 0.0, 0, 0.0, None)
    cost = cost_of(bank, adapters, "cpu", result)
    (slot,) = factored_of(bank).slots
    assert cost.adapter_bytes == sum(tensor.nbytes for tensor in slot.neutral().values())
    files = sum((bank.folder / name).stat().st_size for name in bank.manifest.files)
    stacks = [tensor for name, tensor in file.constants.items() if name.endswith(".samples")]
    assert cost.model_bytes == files + sum(stack.nbytes + stack[0].nbytes for stack in stacks)
    assert cost.swap_ms > 0
    assert cost.swapped_by is not None


def test_where_rows_take_more_than_the_model(base: Base, tmp_path: Path) -> None:
    """The changes of few places where the batch is great, cores where neither fits."""
    adapters = open_adapters(["random:tlora:1:1"], base)
    for batch, places, form in ((1, 1, SampleBank), (63, 1, WrittenBank), (63, 200, BankForm)):
        options = ExportOptions(factored=FactoredOptions(blank=True, bank=places), fixed=SIZES | {"batch_size": batch})
        folder = tmp_path / f"{batch} {places}"
        export_onnx(base, adapters, folder, options)
        assert type(form_of(open_artifact(folder), "cpu")) is form
