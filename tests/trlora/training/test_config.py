"""Descriptions of trainings: refused where they are wrong, and their learning rates against torch's schedules."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from trlora.training import TrainingConfig, TrainingConfigError


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_steps": 0}, "max_steps is 0"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"accumulation": -1}, "from 1 on"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"warmup_steps": -1}, "from 0 on"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": True}, "learning_rate is True"),
        ({"beta2": 1.0}, "below 1"),
        ({"max_grad_norm": 0.0}, "or None"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"penalty_weight": -1e-4}, "penalty_weight"),
        ({"schedule": "cyclic"}, "constant, linear, cosine"),
        ({"penalty": "frobenius"}, "identity, orthogonal"),
        ({"mixed_precision": "fp8"}, "no, fp16, bf16"),
        ({"gradient_checkpointing": 1}, "true or false"),
        ({"compile": "yes"}, "true or false"),
    ],
)
def test_wrong_values_are_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingConfigError, match=words):
        TrainingConfig.from_dict({"max_steps": 10} | fields)


def test_it_goes_through_json() -> None:
    config = TrainingConfig(7, schedule="cosine", ema_decay=0.99, max_grad_norm=None, keep_checkpoints=2)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(TrainingConfigError, match="'batchsize'.*'batch_size'"):
        TrainingConfig.from_dict({"max_steps": 3, "batchsize": 1})
    with pytest.raises(TrainingConfigError, match="max_steps"):
        TrainingConfig.from_dict({})


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rates_are_torchs(schedule: Any) -> None:
    steps, warm = 12, 3
    config = TrainingConfig(steps, learning_rate=0.3, schedule=schedule, warmup_steps=warm)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    after = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps - warm),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warm),
    }[schedule]()
    for step in range(warm, steps):
        assert config.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        after.step()
    rising = [config.rate(step) for step in range(warm + 1)]
    assert rising == pytest.approx([0.3 * (step + 1) / (warm + 1) for step in range(warm + 1)])


def test_what_may_differ_when_it_is_resumed() -> None:
    config = TrainingConfig(10, checkpoint_every=2)
    assert config.differences(dataclasses.replace(config, max_steps=20, checkpoint_every=5, keep_checkpoints=1)) == {}
    other = dataclasses.replace(config, learning_rate=1e-3, seed=4)
    assert config.differences(other) == {"learning_rate": (1e-4, 1e-3), "seed": (0, 4)}
    # a cosine over more steps is another one from the first step on
    cosine = dataclasses.replace(config, schedule="cosine")
    assert cosine.differences(dataclasses.replace(cosine, max_steps=20)) == {"max_steps": (10, 20)}
