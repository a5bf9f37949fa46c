"""One exported model in memory, many adapters, switched between runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import torch
from torch import Tensor

from trexport.adapter_file import open_for
from trexport.artifact import Artifact, open_artifact
from trexport.backends import BACKENDS, Device, Runner, Step, device_of
from trexport.errors import RunError, UsageError
from trexport.io_spec import ADAPTER_INDEX, ADAPTER_STRENGTH, ModelSpec
from trexport.models.adapters import BoundAdapter
from trexport.models.model import batch_of, fitted
from trexport.session.adapters import AdapterStore
from trexport.session.form import AbstractBank, Prepared, Sample
from trexport.session.forms import form_of
from trexport.session.lock import ReadWriteLock
from trexport.session.sources import backend_for, source_with

CAPACITY = 16
_GREATEST = torch.finfo(torch.float32).max


@final
class Session:
    """An ONNX or engine artifact of trexport, loaded once, and adapters that come and go in it.

    ```python
    with Session("swappable", capacity=32) as session:
        session.load_adapter("watercolour", "adapters/watercolour")
        session.activate({"watercolour": 0.8})
        out = session.run({"sample": x, "timestep": t, "encoder_hidden_states": c})["out_sample"]
        session.deactivate()  # the base again, to the last bit
    ```

    All forms are opened: *swappable* (activating computes the weights, a step costs what the merged model's does),
    *factored* (activating copies the cores, a step costs more; on CUDA, unless adapters scale biases, as a swappable
    one), a *bank* (every sample of a run takes an adapter of its own), and merged ones, which take no adapters. A session
    starts as the base. On CUDA, where that takes no more memory than the model, a bank of a fixed batch has weights for each
    sample, written before a run where its adapter or strength is another than in the run before; one of a free batch has
    whole changes in its places.

    On CUDA in half precision, ONNX Runtime's group normalisations add in an order of their own: two runs of the same differ,
    whatever is active. With `torch.use_deterministic_algorithms(True)`, set before, a session does without them, and is
    slower.

    Every activation starts from the pristine base: what was active before leaves no trace. Where one fails, what was active
    before it is made anew. Safe to use from several threads: a run sees one activation, whole; runs share the model, on CUDA
    one after the other.

    Args:
        artifact: a folder of `trexport onnx` or `trexport engine`, or an opened one.
        device: `cpu`, `cuda`, or `auto`.
        capacity: how many adapters are kept in memory, beside the active ones; those used least recently leave, and are read
            again when asked for. A bank's places are apart from these: what is in memory goes into a place without its file.
        verify: check the hashes of the artifact's files; ignored for an opened one.

    Raises:
        ArtifactError: no such artifact, or a damaged one.
        MissingError: the runtime or the device is not here.
    """

    def __init__(
        self,
        artifact: str | Path | Artifact,
        device: str = "cpu",
        *,
        capacity: int | None = None,
        verify: bool = True,
    ) -> None:
        self.artifact = artifact if isinstance(artifact, Artifact) else open_artifact(artifact, verify=verify)
        self.device: Device = device_of(device)
        self._form = form_of(self.artifact, self.device)
        self._bank = self._form if isinstance(self._form, AbstractBank) else None
        # a batch of a bank needs as many at once as it has places
        least = 1 if self._bank is None else self._bank.places
        chosen = max(CAPACITY, least) if capacity is None else capacity
        self._store = AdapterStore(chosen, self._open, self._prepare)
        self._runner = self._load()
        self._steppers: list[Runner] = []
        self._lock = ReadWriteLock()
        self._queue = threading.Lock() if self.device == "cuda" else contextlib.nullcontext()
        self._active: list[tuple[Prepared, float]] = []
        self._broken: str | None = None
        self._closed = False

    # --- adapters ----------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, adapter: str | Path) -> None:
        """Read an adapter and keep it under a name. It changes nothing until it is activated, or named by a run of a bank.

        Args:
            adapter: a checkpoint's folder or file, or `sample:…`, `random:…`; `PATH=0.8` sets the strength that it has where
                none is given.

        Raises:
            ArtifactError: it does not fit the graph, is for another base, or the artifact takes no adapters.
            CheckpointError: a damaged one, or one with NaN.
            UsageError: the name is active, or there is no room.
        """
        self._check_open()
        active = self.active
        if name in active:
            raise UsageError(f"{name!r} is active; deactivate it before another adapter takes its name")
        self._store.load(name, str(adapter), active)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises `UsageError` where there is none of the name, or it is active."""
        self._check_open()
        if name in self.active:
            raise UsageError(f"{name!r} is active; deactivate it first")
        self._store.forget(name)

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters that were loaded."""
        return self._store.names()

    @property
    def resident(self) -> list[str]:
        """The names of those in memory, the least recently used first."""
        return self._store.kept()

    @property
    def active(self) -> dict[str, float]:
        """What is active, with its strengths; empty for the base."""
        return {prepared.name: strength for prepared, strength in self._active}

    def activate(self, strengths: Mapping[str, float | None]) -> None:
        """Draw with these adapters from the next run on, and with no others.

        Args:
            strengths: name → strength; None for the adapter's own. The order does not matter.

        Raises:
            UsageError: a name that is not loaded, a strength that is no finite number, or more adapters than the graph
                takes.
            ArtifactError: the weights would not be finite, or an adapter's file has changed. What was active stays.
        """
        self._check_open()
        if not strengths:
            self.deactivate()
            return
        chosen = [(self._store.get(name, strengths), strength) for name, strength in strengths.items()]
        wanted = [
            (prepared, _strength(prepared.name, prepared.strength if strength is None else strength))
            for prepared, strength in chosen
        ]
        self._write(wanted)

    def deactivate(self) -> None:
        """Draw as the base does, to the last bit."""
        self._check_open()
        self._write([])

    # --- runs --------------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> ModelSpec:
        """The inputs and outputs, less those that choose adapters."""
        io = self.artifact.manifest.io
        chosen = (ADAPTER_INDEX, ADAPTER_STRENGTH)
        return replace(io, inputs=tuple(tensor for tensor in io.inputs if tensor.name not in chosen))

    def run(
        self,
        feeds: Mapping[str, Tensor],
        *,
        adapters: Sequence[str | None] | None = None,
        strengths: Sequence[float | None] | None = None,
    ) -> dict[str, Tensor]:
        """One step.

        Args:
            feeds: the model's inputs by name, on any device, in any floating dtype; a scalar timestep is every sample's.
            adapters: of a bank: for each sample the name of its adapter, None for the base; what is active, for all samples,
                where it is not given.
            strengths: one for each of `adapters`; None for the adapter's own.

        Returns:
            New tensors by output name, on the session's device.

        Raises:
            UsageError: inputs that the model does not take, an unknown adapter, or adapters for a model that is no bank.
            RunError: the runtime broke off.
        """
        self._check_open()
        given, bank = self._checked(feeds), self._bank
        if bank is None:
            if adapters is not None or strengths is not None:
                raise UsageError(
                    "an adapter for each sample needs a bank (trexport onnx --factored --bank); use activate"
                )
            with self._lock.read():
                return self._run(given)
        if adapters is None:
            if strengths is not None:
                raise UsageError("strengths given without adapters")
            count = batch_of(self.spec, given)
            return self._run_samples(bank, given, lambda: self._uniform(count))
        batch = batch_of(self.spec, given)
        names, scales = _one_a_sample("adapters", adapters, batch), [None] * batch if strengths is None else strengths
        scales = _one_a_sample("strengths", scales, batch)
        distinct = [name for name in dict.fromkeys(names) if name is not None]
        if len(distinct) > bank.places:
            raise UsageError(f"{len(distinct)} adapters in one batch, this bank holds {bank.places}")
        active = {prepared.name: prepared for prepared, _ in self._active}  # which may have left the others
        wanted = {name: active.get(name) or self._store.get(name, distinct) for name in distinct}
        samples: list[Sample] = [
            None if name is None else (wanted[name], _strength(name, wanted[name].strength if scale is None else scale))
            for name, scale in zip(names, scales, strict=True)
        ]
        return self._run_samples(bank, given, lambda: samples)

    def step(self, feeds: Mapping[str, Tensor]) -> Step:
        """A step on fixed inputs, for measuring: with what is active when it runs (of a bank, when it was made, until a run
        draws with other adapters). On CUDA it is a graph, with a second copy of the model. It takes no lock: activate
        nothing while it runs."""
        self._check_open()
        given = self._checked(feeds)
        if self._bank is not None:
            with self._lock.write():
                given |= self._bank.choose(self._uniform(batch_of(self.spec, given)))
        if self.device == "cpu":
            return self._runner.step(given)
        self._steppers.append(self._load())  # a captured session runs on the tensors of its capture only
        return self._steppers[-1].step(given)

    def close(self) -> None:
        """Free the model. Runs that are under way end first."""
        with self._lock.write():
            self._closed = True
            for runner in [self._runner, *self._steppers]:
                runner.close()
            self._form = self._bank = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _load(self) -> Runner:
        buffers, graph = ({}, None) if self._form is None else (self._form.buffers, self._form.graph)
        return BACKENDS[backend_for(self.artifact)].load(source_with(self.artifact, buffers, graph), self.device)

    def _open(self, argument: str) -> BoundAdapter:
        (bound,) = open_for(self.artifact, [argument])
        return bound

    def _prepare(self, name: str, adapter: BoundAdapter) -> Prepared:
        assert self._form is not None  # `open_for` has refused an artifact that takes no adapters
        return self._form.prepare(name, adapter)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the session is closed")

    def _write(self, wanted: list[tuple[Prepared, float]]) -> None:
        if self._form is None:
            if wanted:
                raise UsageError(f"{self.artifact.folder}: a {self.artifact.manifest.form} artifact takes no adapters")
            return
        with self._lock.write():
            self._check_open()
            try:
                self._form.write(wanted)
            except BaseException as error:
                self._restore(error)
                raise
            self._active, self._broken = wanted, None

    def _restore(self, cause: BaseException) -> None:
        assert self._form is not None
        try:
            self._form.write(self._active)
        except BaseException as error:
            self._broken = (
                f"an activation failed ({cause}) and what was active before could not be made anew ({error}); "
                "activate or deactivate again"
            )
            raise

    def _run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Under the lock."""
        self._check_open()
        if self._broken is not None:
            raise RunError(self._broken)
        with self._queue:
            return self._runner(feeds)

    def _run_samples(
        self, bank: AbstractBank, feeds: Mapping[str, Tensor], samples: Callable[[], Sequence[Sample]]
    ) -> dict[str, Tensor]:
        """Each sample as `samples`, which is called under the lock, has it."""
        with self._lock.read():
            self._check_open()
            given = bank.chosen(samples())
            if given is not None:
                return self._run({**feeds, **given})
        with self._lock.write():  # and run before anybody else may write something else there
            self._check_open()
            return self._run({**feeds, **bank.choose(samples())})

    def _uniform(self, count: int) -> list[Sample]:
        """A bank with what is active, for all samples."""
        return [self._active[0] if self._active else None] * count

    def _checked(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs, each in its dtype. Raises `UsageError` for what the model does not take."""
        spec = self.spec
        wanted = {tensor.name: tensor for tensor in spec.inputs}
        missing, unknown = wanted.keys() - feeds.keys(), feeds.keys() - wanted.keys()
        if missing or unknown:
            raise UsageError(f"inputs missing: {sorted(missing)}, unknown: {sorted(unknown)}; expected {list(wanted)}")
        return fitted(spec, {name: torch.as_tensor(value) for name, value in feeds.items()})


def _strength(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(value) <= _GREATEST:  # NaN is not
        raise UsageError(f"{name}: strength {value!r}, expected a number that is finite in float32")
    return float(value)


def _one_a_sample(what: str, items: Sequence[Any], batch: int) -> list[Any]:
    if isinstance(items, str) or len(items) != batch:
        raise UsageError(f"{len(items)} {what} given for {batch} samples, expected one for each")
    return list(items)
