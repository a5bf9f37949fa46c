"""`config.pbtxt` as protobuf's own parser reads it."""

from __future__ import annotations

from typing import Any

import pytest

from trexport.deploy.config import ModelConfig, Port, WarmUp
from trexport.io_spec import TensorSpec

text_format = pytest.importorskip("google.protobuf.text_format")
messages = pytest.importorskip("tritonclient.grpc").model_config_pb2

SAMPLE = Port("sample", "TYPE_FP16", (4, -1, -1))
STEP = Port("timestep", "TYPE_FP32", (1,), scalar=True)


def parsed(config: ModelConfig) -> Any:
    """With Triton's own message: an unknown field, type or kind is an error."""
    return text_format.Parse(config.to_pbtxt(), messages.ModelConfig())


def test_all_fields_arrive() -> None:
    adapter = Port("adapter", "TYPE_STRING", (-1,), optional=True)
    warm_up = WarmUp((Port("sample", "TYPE_FP16", (4, 8, 12)), STEP))
    config = parsed(
        ModelConfig("unet", "python", 6, (SAMPLE, STEP, adapter), (SAMPLE,), True, 3, 250, warm_up, {"device": "cuda"})
    )
    assert (config.name, config.backend, config.max_batch_size) == ("unet", "python", 6)
    assert [(port.name, list(port.dims), port.optional) for port in config.input] == [
        ("sample", [4, -1, -1], False),
        ("timestep", [1], False),
        ("adapter", [-1], True),
    ]
    assert [port.HasField("reshape") for port in config.input] == [False, True, False]
    assert list(config.input[1].reshape.shape) == []
    assert [port.data_type for port in config.input] == [messages.TYPE_FP16, messages.TYPE_FP32, messages.TYPE_STRING]
    (group,) = config.instance_group
    assert (group.kind, group.count) == (messages.ModelInstanceGroup.KIND_GPU, 3)
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    assert config.version_policy.latest.num_versions == 1
    (warm,) = config.model_warmup
    assert {name: list(entry.dims) for name, entry in warm.inputs.items()} == {"sample": [4, 8, 12], "timestep": [1]}
    assert all(entry.zero_data for entry in warm.inputs.values())
    assert config.parameters["device"].string_value == "cuda"


@pytest.mark.parametrize("value", ['quo"te\\back', "line\nbreak\ttab", "π, 模型", "{'a': 1} # no comment"])
def test_text_is_escaped(value: str) -> None:
    config = parsed(ModelConfig("unet", "python", 1, (SAMPLE,), (SAMPLE,), parameters={"key": value}))
    assert config.parameters["key"].string_value == value


def test_a_timestep_is_one_for_each_sample_whatever_the_model_takes() -> None:
    for axes in ((), ("batch_size",)):
        assert Port.of(TensorSpec("timestep", "fp32", axes)) == STEP
    assert Port.of(TensorSpec("sample", "fp16", (2, 4, "height", "width"))) == SAMPLE
