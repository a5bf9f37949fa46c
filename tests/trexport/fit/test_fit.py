"""`trexport fit`: two checkpoints in, a small adapter out, whole, resumable, and honest about what it leaves out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.trexport.helpers import copy_of, leftovers, run_cli, weights_of, write_model
from trexport.errors import TrexportError
from trexport.fit import run
from trexport.fit.goal import FitGoal, FitReport
from trexport.fit.plan import FitPlan, open_tuned, plan_fit
from trexport.fit.run import fit
from trexport.merging import merge
from trexport.models.adapters import open_adapters
from trexport.models.base import WEIGHTS_STEM, Base, open_base
from trlora import AdapterSpec, load_adapter
from trlora.fit import FitOptions

WEIGHTS = f"{WEIGHTS_STEM}.safetensors"
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
MIDDLE = r"mid_block\..*attn\d\.to_[qkv]"
QUICK = FitOptions(starts=1, trial=5, sweeps=10)


def spec_of(**fields: Any) -> AdapterSpec:
    return AdapterSpec.from_dict(fields)


LORA = spec_of(residual={"type": "low_rank", "rank": 3})
TLORA = spec_of(transform={"type": "tensor_ring", "rank": 2}, residual={"type": "tensor_ring", "rank": 2})


def edited(folder: Path, base: Base, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A UNet folder with some of the base's tensors changed."""
    write_model(folder, base)
    tensors = {name: tensor.clone() for name, tensor in weights_of(base).items()}  # those are a file's memory
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    return folder


def perturb(tensors: dict[str, Tensor]) -> None:
    """Every tensor of two or more dimensions a little, as a full fine-tune does."""
    generator = torch.Generator().manual_seed(4)
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            tensors[name] = tensor + 0.02 * torch.randn(tensor.shape, generator=generator)


@pytest.fixture(scope="session")
def tuned_folder(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Path:
    return edited(tmp_path_factory.mktemp("tuned") / "unet", base, perturb)


@pytest.fixture(scope="session")
def plan(base: Base, tuned_folder: Path) -> FitPlan:
    return plan_fit(base, open_tuned(str(tuned_folder), base), [MIDDLE])


def total_error(base: Base, tuned: Path, adapter: Path, tmp: Path, report: FitReport) -> float:
    """`‖W* − W'‖ / ‖W* − W0‖` over the report's layers, W' being what `trexport merge` makes."""
    merge(base, open_adapters([str(adapter)], base), tmp)
    before, wanted, got = weights_of(base), weights_of(open_base(str(tuned))), weights_of(open_base(str(tmp)))
    names = [f"{layer.path}.weight" for layer in report.layers]
    sums = [
        sum(float((wanted[name].double() - other[name].double()).square().sum()) for name in names)
        for other in (got, before)
    ]
    return (sums[0] / sums[1]) ** 0.5


def test_what_an_adapter_made_is_found_again(base: Base, lora_folder: Path, tmp_path: Path) -> None:
    merge(base, open_adapters([str(lora_folder)], base), tmp_path / "merged")
    plan = plan_fit(base, open_tuned(str(tmp_path / "merged"), base), ["attention"])
    assert plan.others == ()
    assert plan.target_share == 1
    report = fit(plan, FitGoal(LORA), tmp_path / "adapter")
    assert report.relative_error < 1e-5  # the merged weights are float32
    assert len(report.layers) == 32
    found = load_adapter(tmp_path / "adapter")
    assert found.parameters == report.parameters == load_adapter(lora_folder).parameters
    assert found.config.base_model.name_or_path == base.name
    assert total_error(base, tmp_path / "merged", tmp_path / "adapter", tmp_path / "again", report) < 1e-5


@pytest.mark.parametrize("spec", [LORA, TLORA], ids=["LoRA", "TLoRA"])
def test_the_error_that_is_said_is_that_of_the_merged_weights(
    spec: AdapterSpec, plan: FitPlan, base: Base, tuned_folder: Path, tmp_path: Path
) -> None:
    report = fit(plan, FitGoal(spec), tmp_path / "a.safetensors", QUICK)
    assert 0.1 < report.relative_error < 1
    found = total_error(base, tuned_folder, tmp_path / "a.safetensors", tmp_path / "merged", report)
    assert found == pytest.approx(report.relative_error, rel=1e-4)
    assert leftovers(tmp_path) == ["a.safetensors", "merged"]


def test_a_budget_is_kept_and_more_of_it_is_never_worse(plan: FitPlan, tmp_path: Path) -> None:
    errors = []
    for budget in (100, 400, 900, 3000):
        goal = FitGoal(LORA, choose_residual=True, budget=budget)
        report = fit(plan, goal, tmp_path / str(budget), QUICK)
        assert load_adapter(tmp_path / str(budget)).parameters == report.parameters <= budget
        assert report.parameters > budget / 2
        errors.append(report.relative_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.02 * errors[-1]


def test_the_smallest_that_reaches_an_error_or_the_best_that_there_is(plan: FitPlan, tmp_path: Path) -> None:
    few, many = (
        fit(plan, FitGoal(LORA, choose_residual=True, max_error=error), tmp_path / str(error), QUICK)
        for error in (0.9, 0.5)
    )
    assert few.relative_error <= 0.9
    assert many.relative_error <= 0.5
    assert few.parameters < many.parameters
    fixed = fit(plan, FitGoal(LORA), tmp_path / "fixed", QUICK)
    with pytest.raises(TrexportError, match=rf"the best is {fixed.relative_error:.4g}, with {fixed.parameters} param"):
        fit(plan, FitGoal(LORA, max_error=0.1), tmp_path / "out", QUICK)
    assert leftovers(tmp_path) == ["0.5", "0.9", "fixed"]


def test_a_stopped_fit_goes_on_and_ends_in_the_same_bytes(
    plan: FitPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = FitGoal(TLORA)
    fit(plan, goal, tmp_path / "whole", QUICK)
    original, calls = run.fit_curve, 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(run, "fit_curve", counted)
    torch.set_num_threads(1)
    with pytest.raises(KeyboardInterrupt):
        fit(plan, goal, tmp_path / "stopped", QUICK)
    assert leftovers(tmp_path) == [".stopped.fit", "whole"]
    with pytest.raises(TrexportError, match="another fit"):
        fit(plan, FitGoal(LORA), tmp_path / "stopped", QUICK)
    finished = len(list((tmp_path / ".stopped.fit").glob("*.safetensors")))
    assert finished == 2
    calls = 3
    fit(plan, goal, tmp_path / "stopped", QUICK)
    assert calls - 3 == len(plan.layers) - finished
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert leftovers(tmp_path) == ["stopped", "whole"]


def test_what_another_fit_left_can_be_thrown_away(
    plan: FitPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(run, "_choose", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            fit(plan, FitGoal(LORA), tmp_path / "out", QUICK)
    fit(plan, FitGoal(spec_of(residual={"type": "low_rank", "rank": 1})), tmp_path / "out", QUICK, restart=True)
    assert leftovers(tmp_path) == ["out"]


def test_any_number_of_threads_gives_the_same_bytes(plan: FitPlan, tmp_path: Path) -> None:
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        fit(plan, FitGoal(TLORA), tmp_path / f"{threads}.safetensors", QUICK)
        assert torch.get_num_threads() == threads
        found.append((tmp_path / f"{threads}.safetensors").read_bytes())
    torch.set_num_threads(before)
    assert found[0] == found[1]


def test_targets_that_did_not_change_get_no_adapter_and_others_are_named(base: Base, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.weight"] += 1
        tensors["conv_out.bias"] += 1

    tuned = open_tuned(str(edited(tmp_path / "tuned", base, change)), base)
    plan = plan_fit(base, tuned, ["attention"])
    assert [layer.path for layer in plan.layers] == [LAYER]
    assert plan.unchanged == 31
    assert plan.others == ("conv_out.bias",)
    assert plan.target_share < 1


def test_convolutions_and_one_file_of_weights(base: Base, tuned_folder: Path, tmp_path: Path) -> None:
    tuned = open_tuned(str(tuned_folder / WEIGHTS), base)
    plan = plan_fit(base, tuned, [r"mid_block\.resnets\.0\.conv1", LAYER])
    assert {len(layer.shape) for layer in plan.layers} == {2, 4}
    report = fit(plan, FitGoal(LORA), tmp_path / "out", QUICK)
    found = total_error(base, tuned_folder, tmp_path / "out", tmp_path / "merged", report)
    assert found == pytest.approx(report.relative_error, rel=1e-4)


# --- the command line --------------------------------------------------------------------------------------------------


def test_the_command_writes_a_table_and_json(
    unet_folder: Path, tuned_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fit", unet_folder, tuned_folder, "-o", tmp_path / "out", "--targets", MIDDLE]
    members = ["--transform", "diagonal", "--residual", "low_rank:2"]
    assert run_cli([*arguments, *members, "--dry-run"]) == 0
    assert "would fit 6 layers" in capsys.readouterr().out
    assert leftovers(tmp_path) == []
    assert run_cli([*arguments, *members]) == 0
    text = capsys.readouterr().out
    assert LAYER in text
    assert "low_rank:2" in text
    assert "not in the adapter" in text
    assert run_cli([*arguments, "--residual", '{"type": "low_rank"}', "--budget", "999", "--json"]) == 1
    assert "not empty" in capsys.readouterr().err
    ring = ["--transform", "tensor_ring", "--residual", '{"type": "low_rank"}', "--starts", "1", "--sweeps", "5"]
    one = ["--targets", LAYER, "--budget", "400"]
    assert run_cli([*arguments[:5], *one, *ring, "--json", "--overwrite"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] <= 400
    assert len(found["layers"]) == 1
    assert found["parameters"] == load_adapter(tmp_path / "out").parameters
    assert 0 < found["relative_error"] < 1


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


WEIGHT = f"{LAYER}.weight"
WRONG_TUNED: dict[str, tuple[Callable[[dict[str, Tensor]], object], list[str]]] = {
    "identical": (lambda tensors: None, ["nothing to fit", "same checkpoint"]),
    "elsewhere": (lambda tensors: tensors["conv_in.weight"].add_(1), ["nothing to fit", "conv_in.weight", "--targets"]),
    "missing": (without(WEIGHT), [WEIGHT, "missing"]),
    "shape": (put(WEIGHT, torch.zeros(3, 5)), [WEIGHT, "(3, 5)", "1 of 32"]),
    "nan": (lambda tensors: tensors[WEIGHT][2].fill_(float("nan")), [WEIGHT, "NaN or Inf", "32 of 1024"]),
    "integers": (put(WEIGHT, torch.ones(32, 32, dtype=torch.int64)), [WEIGHT, "int64"]),
}


@pytest.mark.parametrize("what", WRONG_TUNED)
def test_a_wrong_checkpoint_has_one_message_and_leaves_nothing(
    what: str, base: Base, unet_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = WRONG_TUNED[what]
    tuned = edited(tmp_path / "tuned", base, change)
    assert run_cli(["fit", unet_folder, tuned, "-o", tmp_path / "out"]) == 1
    message = capsys.readouterr().err
    assert message.count("Error: ") == 1
    assert [word for word in words if word not in message] == []
    assert leftovers(tmp_path) == ["tuned"]


def test_another_architecture_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["fit", "random:tiny", "sample:digits", "-o", tmp_path / "out"]) == 1
    assert "not a fine-tune of random:tiny" in capsys.readouterr().err
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--residual", "low_rnk"], 2, ["'low_rnk'", "'low_rank'"]),
        (["--transform", "tensor-ring:2"], 2, ["'tensor_ring'"]),
        (["--transform", "diagonal:3"], 2, ["no size"]),
        (["--residual", "low_rank:0"], 2, ["NAME:SIZE"]),
        (["--residual", '{"type": "low_rank", "rnk": 2}'], 2, ["'rnk'", "'rank'"]),
        (["--residual", '{"rank": 2}'], 2, ["type"]),
        (["--residual", "{"], 2, ["not JSON"]),
        (["--budget", "9", "--max-error", "0.5"], 2, ["exclude"]),
        (["--max-error", "1.5"], 2, ["max-error"]),
        (["--transform", "identity", "--residual", "none"], 1, ["no parameters"]),
        (
            ["--transform", "identity", "--residual", "low_rank", "--budget", "10"],
            1,
            ["too small", "is 56", "6 layers"],
        ),
        (["--transform", "identity", "--residual", "low_rank:4", "--budget", "10"], 1, ["too small", "is 224"]),
        (["--transform", "block_orthogonal:7"], 1, ["mid_block", "block_size 7"]),
        (["--targets", "nosuch"], 1, ["nosuch"]),
        (["--magnitude", "norm:2"], 2, ["NAME"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_has_one_message_and_leaves_nothing(
    arguments: list[str], code: int, words: list[str], unet_folder: Path, tuned_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    targets = [] if "--targets" in arguments else ["--targets", MIDDLE]
    assert run_cli(["fit", unet_folder, tuned_folder, "-o", tmp_path / "out", *targets, *arguments]) == code
    message = capsys.readouterr().err
    assert message.count("Error: ") == 1
    assert [word for word in words if word not in message] == []
    assert leftovers(tmp_path) == []


def test_pickles_and_what_is_not_there_are_refused(
    unet_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "tuned.safetensors")
    assert run_cli(["fit", unet_folder, tmp_path / "tuned.safetensors", "-o", tmp_path / "out"]) == 1
    assert "pickle" in capsys.readouterr().err
    assert run_cli(["fit", unet_folder, tmp_path / "nothing", "-o", tmp_path / "out"]) == 1
    assert "no such folder" in capsys.readouterr().err
    copy_of(unet_folder, tmp_path / "out")
    assert run_cli(["fit", unet_folder, unet_folder, "-o", tmp_path / "out"]) == 1
    assert "not empty" in capsys.readouterr().err
