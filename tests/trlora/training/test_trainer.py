"""The trainer: what it trains, what it keeps, and that a stopped training goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from tests.helpers import CONTEXT, state_bits, tiny_unet
from trlora import AdapterSpec, CheckpointError, adapter_from_model, inject_, load_adapter, merge_
from trlora.training import (
    StepRecord,
    Trainer,
    TrainingConfig,
    TrainingConfigError,
    TrainingError,
    checkpoints,
    load_state,
    trainable_parameters,
)

SPEC = AdapterSpec.from_dict(
    {"transform": {"type": "tensor_ring", "rank": 2}, "residual": {"type": "tensor_ring", "rank": 2}}
)
CONFIG = TrainingConfig(6, batch_size=2, learning_rate=1e-2, checkpoint_every=3, penalty_weight=1e-3, seed=5)

Sample = tuple[Tensor, Tensor]


def data(count: int = 5) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(7, 9, generator=generator), torch.randn(5, CONTEXT, generator=generator)) for _ in range(count)
    ]


def noisy_loss(model: nn.Module, batch: Any) -> Tensor:
    """As in the training of a diffusion model: it draws from torch's own generator."""
    sample, context = batch
    noise = torch.randn_like(sample)
    return (model(sample + noise, context) - noise).square().mean()


def model_with(spec: AdapterSpec = SPEC) -> nn.Module:
    model = tiny_unet()
    inject_(model, spec)
    return model


def roll_loss(model: nn.Module, batch: Any) -> Tensor:
    sample, context = batch
    return (model(sample, context) - sample.roll(1, -1)).square().mean()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Its state is one for the process, the precision included."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer_of(out: Path | None = None, config: TrainingConfig = CONFIG, model: nn.Module | None = None) -> Trainer:
    return Trainer(
        model or model_with(), config, out, accelerator=Accelerator(cpu=True, mixed_precision=config.mixed_precision)
    )


def bits(adapter: Any) -> dict[str, bytes]:
    return {key: tensor.numpy().tobytes() for key, tensor in adapter.tensors().items()}


def test_it_trains_the_adapter_and_writes_it(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, dataclasses.replace(CONFIG, max_steps=40, checkpoint_every=None))
    before = state_bits(trainer.model)
    records = trainer.run(data(), roll_loss)
    assert [record.step for record in records] == list(range(1, 41))
    assert sum(r.loss for r in records[-10:]) < 0.9 * sum(r.loss for r in records[:10])
    assert records[-1].penalty > 0
    changed = {name for name, value in state_bits(trainer.model).items() if value != before[name]}
    assert changed == {name for name in before if ".adapters." in name}
    saved = load_adapter(tmp_path / "adapter")
    assert bits(saved) == bits(adapter_from_model(trainer.model))
    assert saved.config.base_model.class_name == type(trainer.model).__name__
    assert TrainingConfig.from_dict(json.loads((tmp_path / "training_config.json").read_text())) == trainer.config
    merge_(trainer.model)  # and it can be used


@pytest.mark.parametrize("path", ["weight", "activations"])
def test_a_checkpoint_has_the_moments_of_every_parameter(tmp_path: Path, path: str) -> None:
    """Whatever they are trained in, so that checkpoints of other versions and machines are read."""
    trainer = trainer_of(tmp_path, dataclasses.replace(CONFIG, path=path))
    trainer.run(data(), roll_loss)
    state = load_state(tmp_path / "checkpoint-000006").optimizer
    shapes = [parameter.shape for parameter in trainable_parameters(trainer.model)]
    assert [state[number]["exp_avg"].shape for number in range(len(shapes))] == shapes
    assert {float(entry["step"]) for entry in state.values()} == {6.0}
    assert (
        len(trainer._stacks.leaves) < len(shapes) if path == "weight" else trainer._stacks.leaves == trainer.parameters
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ema_decay": 0.9},
        {"accumulation": 2, "schedule": "cosine", "warmup_steps": 2},
        {"mixed_precision": "bf16"},
        {"path": "weight", "mixed_precision": "bf16"},
    ],
    ids=str,
)
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path: Path, fields: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **fields)
    whole = trainer_of(tmp_path / "whole", config)
    records = whole.run(data(), noisy_loss)

    class Stop(Exception):
        pass

    def stop(trainer: Trainer, record: StepRecord) -> None:
        if record.step == 4:
            raise Stop

    first = trainer_of(tmp_path / "parts", config)
    with pytest.raises(Stop):
        first.run(data(), noisy_loss, callbacks=[stop])
    torch.manual_seed(99)  # where the generators stand does not matter
    second = trainer_of(tmp_path / "parts", config)
    assert second.resume_() == 3
    rest = second.run(data(), noisy_loss)
    assert [record.loss for record in rest] == [record.loss for record in records[3:]]
    assert bits(adapter_from_model(second.model)) == bits(adapter_from_model(whole.model))
    for name in ("adapter", "checkpoint-000006"):
        files = [tmp_path / part / name / "adapter_model.safetensors" for part in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes()
    states = [tmp_path / part / "checkpoint-000006" / "training_state.safetensors" for part in ("whole", "parts")]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_accumulated_batches_are_one_greater_batch() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(*batch) - 1).square().mean()

    results = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = trainer_of(None, TrainingConfig(5, size, accumulation, learning_rate=1e-3, penalty_weight=0.01))
        records = trainer.run(data(), loss)
        results.append((torch.tensor([r.loss for r in records]), torch.cat([p.flatten() for p in trainer.parameters])))
    for losses, parameters in results[1:]:
        torch.testing.assert_close(losses, results[0][0], rtol=1e-5, atol=0)
        # a step is 1e-3 in the direction of a gradient, however small: rounding decides where it is nearly zero
        torch.testing.assert_close(parameters, results[0][1], rtol=1e-3, atol=1e-4)


def test_both_paths_of_a_layer_train_the_same() -> None:
    results = []
    for path in ("activations", "weight"):
        config = TrainingConfig(4, 2, 2, learning_rate=1e-2, penalty_weight=0.01, path=path)
        trainer = trainer_of(None, config)
        records = trainer.run(data(), noisy_loss)
        results.append((torch.tensor([r.loss for r in records]), torch.cat([p.flatten() for p in trainer.parameters])))
    (losses, parameters), (others, changed) = results
    torch.testing.assert_close(others, losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(changed, parameters, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_training_is_the_same_and_leaves_the_model_as_it_is() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch) - 1).square().mean()

    results = []
    for fields in ({}, {"path": "weight", "compile": True}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.SiLU(), nn.Linear(8, 12))
        inject_(model, SPEC, ["0", "2"])
        trainer = Trainer(model, TrainingConfig(4, 2, 2, learning_rate=1e-2, penalty_weight=0.01, **fields))
        records = trainer.run(list(torch.randn(5, 12, generator=torch.Generator().manual_seed(1))), loss)
        assert model._compiled_call_impl is None
        results.append((torch.tensor([r.loss for r in records]), torch.cat([p.flatten() for p in trainer.parameters])))
    (losses, parameters), (others, changed) = results
    torch.testing.assert_close(others, losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(changed, parameters, rtol=1e-3, atol=1e-4)


def test_the_average_is_what_is_saved(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, dataclasses.replace(CONFIG, ema_decay=0.7))
    values = [[p.detach().double().clone() for p in trainer.parameters]]
    trainer.run(
        data(), noisy_loss, callbacks=[lambda t, r: values.append([p.detach().double().clone() for p in t.parameters])]
    )
    wanted = values[0]
    for step, now in enumerate(values[1:]):
        decay = min(0.7, (1 + step) / (10 + step))
        wanted = [decay * average + (1 - decay) * value for average, value in zip(wanted, now, strict=True)]
    for p, last in zip(trainer.parameters, values[-1], strict=True):  # the parameters are as training left them
        assert torch.equal(p.double(), last)
    twin = model_with()
    saved = load_adapter(tmp_path / "adapter").tensors()
    for key, tensor in adapter_from_model(twin).tensors().items():
        tensor.copy_(saved[key])
    for got, expected in zip(trainable_parameters(twin), wanted, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)
    # the checkpoint has the parameters, for training to go on from
    assert bits(load_adapter(tmp_path / "checkpoint-000006")) == bits(adapter_from_model(trainer.model))


def test_the_last_checkpoints_stay(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, dataclasses.replace(CONFIG, max_steps=7, checkpoint_every=2, keep_checkpoints=2))
    trainer.run(data(), noisy_loss)
    assert list(checkpoints(tmp_path)) == [6, 7]


def test_a_loss_that_is_no_number_keeps_what_was_good(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    seen: list[dict[str, bytes]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(bits(adapter_from_model(trainer.model)))
        return noisy_loss(model, batch) * (math.nan if len(seen) == 5 else 1.0)

    with pytest.raises(TrainingError, match=r"step 4: the loss is nan.*checkpoint-000003"):
        trainer.run(data(), loss)
    assert bits(adapter_from_model(trainer.model)) == seen[-1]
    assert bits(load_adapter(tmp_path / "checkpoint-000003")) == seen[3]
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_size": 5}, "batch size of 2 with 3 accumulated.*mixed precision"),
        ({"batch_size": 1}, "try mixed precision"),
        ({"batch_size": 1, "mixed_precision": "bf16"}, "smaller images"),
    ],
)
def test_no_memory_says_what_would_fit(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    trainer = trainer_of(tmp_path, dataclasses.replace(CONFIG, **fields))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if trainer.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return noisy_loss(model, batch)

    with pytest.raises(TrainingError, match=f"step 3: out of memory.*{words}.*checkpoint-000003"):
        trainer.run(data(), loss)


def test_a_full_disk_harms_nothing_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path)
    real = safetensors.torch.save_file

    def full(tensors: Any, filename: Any, metadata: Any = None) -> None:
        real(tensors, filename, metadata=metadata)
        if trainer.step == 6:
            Path(filename).write_bytes(Path(filename).read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(
        TrainingError, match=r"step 6: .*No space left on device.*make room and resume.*checkpoint-000003"
    ):
        trainer.run(data(), noisy_loss)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000003", "training_config.json"]
    again = trainer_of(tmp_path)
    assert again.resume_() == 3
    again.run(data(), noisy_loss)
    assert bits(load_adapter(tmp_path / "adapter")) == bits(adapter_from_model(trainer.model))


def test_another_training_is_not_gone_on_with(tmp_path: Path) -> None:
    trainer_of(tmp_path).run(data(), noisy_loss)
    other = dataclasses.replace(CONFIG, learning_rate=3e-3, batch_size=3)
    with pytest.raises(
        TrainingConfigError, match=r"batch_size 2 there and 3 here, learning_rate 0\.01 there and 0\.003 here"
    ):
        trainer_of(tmp_path, other).resume_()
    lora = model_with(AdapterSpec.from_dict({"residual": {"type": "low_rank", "rank": 2}}))
    before = state_bits(lora)
    with pytest.raises(CheckpointError, match="another adapter.*found, expected"):
        trainer_of(tmp_path, model=lora).resume_()
    assert state_bits(lora) == before
    longer = trainer_of(tmp_path, dataclasses.replace(CONFIG, max_steps=8))
    longer.resume_(tmp_path / "checkpoint-000006")
    with pytest.raises(TrainingConfigError, match="4 samples here, 5 where"):
        longer.run(data(4), noisy_loss)
    assert len(longer.run(data(), noisy_loss)) == 2


def test_damaged_or_missing_checkpoints_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    assert trainer.resume_() == 0  # none yet
    with pytest.raises(CheckpointError, match="expected the checkpoint of a training"):
        trainer.resume_(tmp_path / "nowhere")
    trainer.run(data(), noisy_loss)
    folder = tmp_path / "checkpoint-000006"
    state, config = folder / "training_state.safetensors", folder / "training_state.json"
    whole, fields = state.read_bytes(), json.loads(config.read_text())
    state.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        load_state(folder)
    state.write_bytes(whole)
    for wrong, words in (
        ("{", "damaged"),
        (json.dumps(fields | {"format_version": 2}), "format_version 2"),
        ("{}", "damaged"),
    ):
        config.write_text(wrong)
        with pytest.raises(CheckpointError, match=words):
            load_state(folder)


def test_what_cannot_be_trained_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(TrainingConfigError, match="expected float32"):
        trainer_of(model=model_with().to(torch.bfloat16))
    with pytest.raises(TrainingConfigError, match="no gradient checkpointing"):
        trainer_of(config=dataclasses.replace(CONFIG, gradient_checkpointing=True, checkpoint_every=None))
    with pytest.raises(TrainingConfigError, match="no folder"):
        trainer_of(None)
    with pytest.raises(TrainingConfigError, match="no data"):
        trainer_of(tmp_path).run([], noisy_loss)
    assert list(tmp_path.iterdir()) == []


def test_a_log_for_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from trlora.training import accelerator_for

    accelerator = accelerator_for(CONFIG, log_folder=tmp_path, cpu=True)
    records = Trainer(model_with(), CONFIG, tmp_path / "out", accelerator=accelerator).run(data(), noisy_loss)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([record.loss for record in records])
    assert [event.step for event in events.Scalars("learning_rate")] == [record.step for record in records]


SCRIPT = """
import sys
from pathlib import Path
import torch
from tests.trlora.training.test_trainer import CONFIG, data, model_with
from trlora.training import Trainer, TrainingConfig

def loss(model, batch):
    return (model(*batch) - 1).square().mean()

size = int(sys.argv[2])
config = TrainingConfig(4, size, learning_rate=1e-3, penalty_weight=0.01, checkpoint_every=2)
trainer = Trainer(model_with(), config, Path(sys.argv[1]))
assert trainer.accelerator.num_processes == int(sys.argv[3]), trainer.accelerator.num_processes
trainer.run(data(), loss)
"""


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for processes in (1, 2):
        # a single one that is launched so is wrapped by DistributedDataParallel too
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        arguments = [str(script), str(tmp_path / str(processes)), str(4 // processes), str(processes)]
        done = subprocess.run(
            [*launch, *arguments],
            cwd=Path(__file__).parents[3],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    first, second = (load_adapter(tmp_path / str(n) / "adapter").tensors() for n in (1, 2))
    for key, tensor in first.items():
        # a step is 1e-3 in the direction of a gradient, however small: rounding decides where it is nearly zero
        torch.testing.assert_close(second[key], tensor, rtol=1e-3, atol=1e-4)
    alone = trainer_of(tmp_path / "2", load_state(tmp_path / "2" / "checkpoint-000004").config)
    with pytest.raises(TrainingConfigError, match="processes 2 there and 1 here"):
        alone.resume_()
