import pytest

from trexport.io_spec import ModelSpec, TensorSpec
from trexport.models.architectures import RANDOM, default_sizes, limits_of, spec_of


def test_names_and_axes_are_optimum_s() -> None:
    spec = spec_of(RANDOM["sdxl"], "fp16")
    assert [tensor.name for tensor in spec.inputs] == [
        "sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids",
    ]  # fmt: skip
    assert [tensor.axes for tensor in spec.inputs] == [
        ("batch_size", 4, "height", "width"), (), ("batch_size", "sequence_length", 2048),
        ("batch_size", 1280), ("batch_size", 6),
    ]  # fmt: skip
    assert [tensor.name for tensor in spec.outputs] == ["out_sample"]
    assert [tensor.dtype for tensor in spec.inputs] == ["fp16", "fp32", "fp16", "fp16", "fp16"]


def test_fixed_axes_are_not_free_and_can_be_read_back() -> None:
    spec = spec_of(RANDOM["sd15"], "fp32", {"height": 64, "batch_size": 2})
    assert set(spec.free_axes) == {"width", "sequence_length"}
    assert spec.fixed_sizes() == {"batch_size": 2, "height": 64}
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(KeyError):
        spec.inputs[0].shape({})


def test_sizes_of_stable_diffusion() -> None:
    config = RANDOM["sd15"]
    assert default_sizes(config) == {"batch_size": 2, "height": 64, "width": 64, "sequence_length": 77}
    assert {axis: limit.multiple for axis, limit in limits_of(config).items() if limit.multiple > 1} == {
        "height": 8,
        "width": 8,
    }


def test_axes_that_follow_from_others() -> None:
    tensor = TensorSpec("sample", "fp32", ("batch_size", 3, "latent_height * 8", "sample_width / 4"))
    assert tensor.shape({"batch_size": 2, "latent_height": 5, "sample_width": 48}) == (2, 3, 40, 12)
    with pytest.raises(KeyError, match="latent_height"):
        tensor.shape({"batch_size": 2, "sample_width": 48})


def test_specs_of_before_there_was_more_than_one_architecture() -> None:
    spec = spec_of(RANDOM["tiny-sdxl"], "fp16", {"height": 8, "batch_size": 2})
    old = {name: value for name, value in spec.to_dict().items() if name not in ("fixed", "model")}
    assert ModelSpec.from_dict(old) == spec
    decoder = {"inputs": [TensorSpec("latent_sample", "fp32", (2, 4, 8, 8)).to_dict()], "outputs": []}
    assert ModelSpec.from_dict(decoder).fixed_sizes() == {}
