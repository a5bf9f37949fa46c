"""The study of the method's claims, examples/claims: many runs at once are what they are one by one, and it runs."""

from __future__ import annotations

import ast
import copy
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from trlora import AdapterSpec, adapted_modules, inject_
from trlora.training import penalty, trainable_parameters

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "claims"
DIGITS = ROOT / "examples" / "digits"


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The modules of examples/claims, which import each other by bare names as scripts in one folder do."""
    names = (
        "methods",
        "encoder",
        "runs",
        "stacked_unet",
        "stack",
        "pictures",
        "tasks",
        "training",
        "study",
        "judging",
        "report",
    )
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in (*names, "report")})
    finally:
        sys.path[:] = path
        for name in {*sys.modules} - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith((str(SCRIPTS), str(DIGITS))):
                del sys.modules[name]


@pytest.fixture(scope="module")
def pictures(scripts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 160 digits, in the file that training reads."""
    path = tmp_path_factory.mktemp("claims") / "pictures.npz"
    digits: Any = load_digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DIGITS))
        few = SimpleNamespace(images=digits.images[:160], target=digits.target[:160])
        patch.setattr(importlib.import_module("data"), "load_digits", lambda: few)
        scripts.pictures.write_pictures(path)
    return path


@pytest.fixture
def study_of(scripts: SimpleNamespace, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the study of a task, with few pictures."""
    monkeypatch.setattr(scripts.tasks, "SUBJECT_POOL", 10)
    monkeypatch.setattr(scripts.tasks, "BATCH_SIZE", 4)
    monkeypatch.setattr(scripts.tasks, "LEVELS_PER_PICTURE", 1)
    return lambda task: scripts.tasks.Study(task, pictures)


def runs_of(scripts: SimpleNamespace, task: str, methods: list[str], seeds: tuple[int, ...] = (0, 1)) -> list[Any]:
    middle = scripts.runs.MIDDLE
    return [scripts.runs.Run(task, method, middle, seed, 1e-3 * (1 + seed)) for method in methods for seed in seeds]


def alone(study: Any, scripts: SimpleNamespace, stack: Any, index: int) -> nn.Module:
    """The base with the adapters that one run of a stack has now, put in by trlora."""
    run = stack.runs[index]
    model = copy.deepcopy(study.base).eval()
    specs = stack.specs[run.method, run.budget]
    inject_(model, AdapterSpec.from_dict({}), overrides=specs, seed=run.seed)
    parameters = {
        (path, name): tensor
        for path, layer in adapted_modules(model).items()
        for name, tensor in layer.adapters["default"].named_parameters()
    }
    for group in stack.groups:
        if group.runs.start <= index < group.runs.stop:
            count = group.runs.stop - group.runs.start
            paths = stack.unet.paths[group.shape]
            for name, leaf in zip(group.names, group.leaves, strict=True):
                of_run = leaf.detach().unflatten(0, (count, -1))[index - group.runs.start]
                for place, value in zip(group.layers.tolist(), of_run, strict=True):
                    parameters.pop((paths[place], name)).data.copy_(value)
    assert not parameters, "every parameter of the run is in the stack, once"
    return model


# --- methods and budgets -----------------------------------------------------------------------------------------------


def test_every_method_meets_every_budget(scripts: SimpleNamespace, study_of: Any) -> None:
    shapes = scripts.stacked_unet.StackedUNet(study_of("subject").base).shapes
    for name, method in scripts.methods.METHODS.items():
        for budget in scripts.methods.BUDGETS:
            specs = scripts.methods.fitted(method, budget, shapes)
            found = sum(scripts.methods.parameters_of(spec, shapes[path]) for path, spec in specs.items())
            assert abs(found / budget - 1) < 0.03, (name, budget, found)


def test_all_start_at_the_base_but_the_random_starts(scripts: SimpleNamespace, study_of: Any) -> None:
    study = study_of("subject")
    methods = list(scripts.methods.ALL_METHODS)
    stack = scripts.training.new_stack(study, runs_of(scripts, "subject", methods, seeds=(3,)))
    weights = scripts.training.trained_weights(stack)
    for index, method in enumerate(methods):
        moved = [(weights[shape][index] - base).std() / base.std() for shape, base in stack.unet.base_weights.items()]
        start = scripts.methods.ALL_METHODS[method].start
        low, high = {"zero": (0, 1e-6), "loretta": (0.3, 3), "small": (1e-4, 0.1)}[start]
        assert low <= min(moved) <= max(moved) <= high, (method, moved)


def test_lorettas_start_has_the_variance_it_claims(scripts: SimpleNamespace) -> None:
    method = scripts.methods.METHODS["loretta"]
    deltas = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        adapter = scripts.methods.LayerAdapter.from_spec(method.rungs(32, 48)[2], 32, 48, generator)
        deltas.append(scripts.methods.started(adapter, "loretta", generator).residual.delta().detach())
    assert torch.stack(deltas).var().item() == pytest.approx(1 / 80, rel=0.1)


def test_batches_show_few_pictures_of_the_subject(scripts: SimpleNamespace, study_of: Any) -> None:
    study = study_of("subject")
    shown = []
    for seed in (0, 1):
        batches = study.batches(seed, 30)
        assert batches.noisy.shape == (30, scripts.tasks.BATCH_SIZE, 1, 16, 16)
        half = scripts.tasks.BATCH_SIZE // 2
        assert set(batches.prompts[:, :half].unique().tolist()) == {
            scripts.pictures.NEW_DIGIT,
            scripts.pictures.EMPTY_PROMPT,
        }
        assert scripts.pictures.NEW_DIGIT not in batches.prompts[:, half:]
        shown.append({tuple(picture.flatten().tolist()) for picture in batches.condition[:, :half].flatten(0, 1)})
    assert [len(pictures) for pictures in shown] == [scripts.tasks.SHOTS] * 2
    assert shown[0] != shown[1]
    everything = study.measured(True)["subject"], study.measured(False)["subject"]
    measured = [{tuple(p.flatten().tolist()) for p in batch.condition} for batch in everything]
    assert not measured[0] & measured[1]
    assert not (measured[0] | measured[1]) & (shown[0] | shown[1])


def test_batches_of_control_are_pictures_with_their_outlines(scripts: SimpleNamespace, study_of: Any) -> None:
    study = study_of("control")
    batch = study.batches(0, 2).each(lambda part: part.flatten(0, 1))
    assert (batch.prompts == scripts.pictures.EMPTY_PROMPT).all()
    share = study.scheduler.alphas_cumprod[batch.levels].sqrt()[:, None, None, None]
    noise_share = (1 - share**2).sqrt()
    plain = share * batch.noisy - noise_share * batch.target  # what the velocity means
    for picture, outline in zip(plain, batch.condition, strict=True):
        place = (study.train.plain - picture).abs().flatten(1).mean(1).argmin()
        torch.testing.assert_close(picture, study.train.plain[place], rtol=0, atol=1e-4)
        assert torch.equal(outline, study.train.outline[place])
        assert study.train.labels[place] != scripts.pictures.NEW_DIGIT


# --- many at once are what they are alone -------------------------------------------------------------------------------


@pytest.fixture
def moved_stack(scripts: SimpleNamespace, study_of: Any) -> tuple[Any, Any]:
    """Two runs of every method, somewhere away from their start."""
    study = study_of("subject")
    stack = scripts.training.new_stack(study, runs_of(scripts, "subject", list(scripts.methods.METHODS)))
    stack.flat += 0.03 * torch.randn(stack.flat.shape, generator=torch.Generator().manual_seed(0))
    return study, stack


def test_weights_are_those_of_trlora(scripts: SimpleNamespace, moved_stack: tuple[Any, Any]) -> None:
    study, stack = moved_stack
    weights = scripts.training.trained_weights(stack)
    for index, run in enumerate(stack.runs):
        layers = adapted_modules(alone(study, scripts, stack, index))
        for shape, paths in stack.unet.paths.items():
            for place, path in enumerate(paths):
                torch.testing.assert_close(
                    weights[shape][index, place],
                    layers[path].merged_weight(),
                    rtol=1e-4,
                    atol=2e-6,
                    msg=f"{run} {path}",
                )


def test_losses_and_gradients_are_those_of_single_runs(scripts: SimpleNamespace, study_of: Any) -> None:
    """Against autograd through trlora's factored layers, one run at a time."""
    study = study_of("subject")
    runs = runs_of(scripts, "subject", ["dora", "boft", "tlora", "tlora_orthogonal"])
    stack = scripts.training.new_stack(study, runs)
    stack.flat += 0.03 * torch.randn(stack.flat.shape, generator=torch.Generator().manual_seed(0))
    batch = scripts.tasks.stacked([study.batches(seed, 1) for seed in (0, 1)]).each(lambda part: part[:, 0])
    rows = torch.tensor([run.seed for run in runs])
    weights = {shape: room.requires_grad_() for shape, room in stack.new_weights().items()}
    parts = stack.fill_(weights)
    losses = scripts.training.losses_of(study, stack, weights, batch, rows)
    gradients = dict(zip(weights, torch.autograd.grad(losses.sum(), list(weights.values())), strict=True))
    flat = torch.cat([g.flatten() for g in scripts.training._to_leaves(stack, parts, gradients)])
    norms = scripts.training.Optimizer(stack, torch.ones(len(runs)), 0.0).norms(flat)

    for index, run in enumerate(runs):
        model = alone(study, scripts, stack, index)
        method = scripts.methods.ALL_METHODS[run.method]
        noisy, levels = batch.noisy[run.seed], batch.levels[run.seed]
        predicted = model(noisy, levels, study.codes[batch.prompts[run.seed]]).sample
        loss = nn.functional.mse_loss(predicted, batch.target[run.seed])
        torch.testing.assert_close(losses[index], loss, rtol=1e-4, atol=1e-6)
        total = loss + method.penalty_weight * penalty(model, method.penalty_kind)
        wanted = torch.autograd.grad(total, trainable_parameters(model))
        norm = torch.stack([part.square().sum() for part in wanted]).sum().sqrt()
        torch.testing.assert_close(norms[index], norm, rtol=1e-3, atol=0)
        mine, theirs = (
            tensor.sort().values for tensor in (flat[stack.owner == index], torch.cat([p.flatten() for p in wanted]))
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * norm.item())


def test_optimizer_is_adamw_with_clipping_for_every_run(scripts: SimpleNamespace, study_of: Any) -> None:
    study = study_of("control")
    runs = runs_of(scripts, "control", ["lora", "tr"])
    stack = scripts.training.new_stack(study, runs)
    rates = torch.tensor([run.rate for run in runs])
    optimizer = scripts.training.Optimizer(stack, rates, encoder_rate=5e-3)
    single = []
    for index, run in enumerate(runs):
        adapter = stack.owner[: stack.adapter_elements] == index
        mask = torch.cat([adapter, torch.zeros(len(stack.owner) - len(adapter), dtype=torch.bool)])
        encoder = (stack.owner == index) & ~mask & (torch.arange(len(stack.owner)) >= len(adapter))
        parameters = [nn.Parameter(stack.flat[part].clone()) for part in (mask, encoder)]
        groups = [{"params": [parameters[0]], "lr": run.rate}, {"params": [parameters[1]], "lr": 5e-3}]
        single.append((mask, encoder, parameters, torch.optim.AdamW(groups, weight_decay=0.0)))
    alive = torch.ones(len(runs), dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    for scale in (0.001, 1.0, 0.03):
        gradient = scale * torch.randn(stack.flat.shape, generator=generator)
        alive = optimizer.step_(gradient, 1.0, alive)
        for mask, encoder, parameters, adamw in single:
            for parameter, part in zip(parameters, (mask, encoder), strict=True):
                parameter.grad = gradient[part].clone()
            nn.utils.clip_grad_norm_(parameters, scripts.training.MAX_NORM)
            adamw.step()
    assert alive.all()
    for mask, encoder, parameters, _ in single:
        torch.testing.assert_close(stack.flat[mask], parameters[0].data, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(stack.flat[encoder], parameters[1].data, rtol=1e-5, atol=1e-7)


def test_encoder_is_two_convolutions(scripts: SimpleNamespace) -> None:
    sets = [[torch.randn(shape) for shape in scripts.encoder.ENCODER_SHAPES] for _ in range(3)]
    condition = torch.randn(3, 2, 1, 16, 16)
    hints = scripts.encoder.encode([torch.stack(parts) for parts in zip(*sets, strict=True)], condition).unflatten(
        0, (3, 2)
    )
    for (first, first_bias, second, second_bias), image, hint in zip(sets, condition, hints, strict=True):
        hidden = nn.functional.silu(nn.functional.conv2d(image, first.view(16, 1, 3, 3), first_bias, padding=1))
        wanted = nn.functional.conv2d(hidden, second.view(32, 16, 3, 3), second_bias, padding=1)
        torch.testing.assert_close(hint, wanted, rtol=1e-4, atol=1e-4)


def test_a_run_that_breaks_off_leaves_the_others_alone(scripts: SimpleNamespace, study_of: Any) -> None:
    study = study_of("control")
    runs = runs_of(scripts, "control", ["lora", "oft"])
    trained = []
    for broken in (False, True):
        stack = scripts.training.new_stack(study, runs)
        if broken:
            stack.flat[(stack.owner == 1).nonzero()[0]] = float("nan")
        losses = scripts.training.train(study, stack, 2)
        trained.append((stack, losses))
    (whole, losses), (other, with_broken) = trained
    assert losses.broke_off.tolist() == [-1] * 4
    assert with_broken.broke_off.tolist() == [-1, 0, -1, -1]
    kept = whole.owner != 1
    torch.testing.assert_close(other.flat[kept], whole.flat[kept])
    start = scripts.training.new_stack(study, runs)
    own = other.owner == 1
    assert torch.equal(other.flat[own][1:], start.flat[own][1:])


# --- the whole study, small ---------------------------------------------------------------------------------------------


def test_study_and_report(
    scripts: SimpleNamespace,
    study_of: Any,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setattr(scripts.tasks, "DRAWN_PER_PROMPT", 1)
    monkeypatch.setattr(scripts.training, "INFERENCE_STEPS", 2)
    monkeypatch.setattr(scripts.runs, "SEEDS", (1,))
    monkeypatch.setattr(scripts.runs, "RATES", (1e-3,))
    monkeypatch.setattr(scripts.runs, "BUDGETS", (scripts.runs.MIDDLE,))
    out = tmp_path / "runs"
    command = [
        "study.py",
        "--out",
        str(out),
        "--pictures",
        str(pictures),
        "--device",
        "cpu",
        "--steps",
        "3",
        "--pack",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--methods", "lora", "tlora", "nothing"])
    scripts.study.main()
    first = {path: path.read_bytes() for path in out.glob("*.json")}
    assert len(first) == 2 * 2 + 2 * 3  # for each task a rate for each method, a seed for each and for the base
    result = json.loads((out / f"control-tlora-{scripts.runs.MIDDLE}-seed1.json").read_text())
    assert result["encoder_parameters"] == 16 * 10 + 32 * (16 * 9 + 1)
    assert result["broke_off_at_step"] is None
    assert result["loss"]["control"] != result["loss_at_start"]["control"]
    base = json.loads((out / "subject-nothing-0-seed1.json").read_text())
    assert (base["parameters"], base["loss"]) == (0, base["loss_at_start"])

    (out / f"subject-lora-{scripts.runs.MIDDLE}-seed1.json").unlink()
    scripts.study.main()  # goes on: makes the one that is missing, leaves the others
    second = {path: path.read_bytes() for path in out.glob("*.json")}
    assert second.keys() == first.keys()
    assert sum(second[path] != first[path] for path in first) <= 1

    monkeypatch.setattr(sys, "argv", ["report.py", str(out), "--out", str(tmp_path), "--pictures", str(pictures)])
    capsys.readouterr()
    scripts.report.main()
    text = capsys.readouterr().out
    assert "| TLoRA: TRM + TR | 13,484 |" in text
    summary = json.loads((tmp_path / "results.json").read_text())
    assert {(row["task"], row["method"]) for row in summary["rows"]} == {
        (task, method) for task in ("subject", "control") for method in ("lora", "tlora", "nothing")
    }
    assert all(0 <= v <= 1 for row in summary["rows"] for values in row["values"].values() for v in values)
    assert (tmp_path / "claims.png").stat().st_size > 10_000


def test_packs_keep_a_method_and_budget_together(scripts: SimpleNamespace, tmp_path: Path) -> None:
    run = scripts.runs.Run
    runs = [run("subject", method, 1, seed, 1e-3) for seed in (0, 1) for method in ("lora", "tr")]
    scripts.runs.result_file(tmp_path, runs[0]).touch()
    packs = list(scripts.study.packs([*runs, run("subject", "oft", 1, 0, 1e-3)], tmp_path, 3))
    names = [[(run.method, run.seed) for run in pack] for pack in packs]
    assert names == [[("tr", 0), ("tr", 1), ("lora", 1)], [("oft", 0)]]


def test_study_stops_in_time(
    scripts: SimpleNamespace,
    study_of: Any,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setattr(scripts.training, "FIRST_TIMED", 1)
    command = [
        "study.py",
        "--out",
        str(tmp_path),
        "--pictures",
        str(pictures),
        "--device",
        "cpu",
        "--time-limit",
        "0.1",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--methods", "lora", "--pack", "2"])
    scripts.study.main()
    assert "stopped: " in capsys.readouterr().out
    assert list(tmp_path.glob("*.json")) == []


def test_overlap_is_pixels_in_common(scripts: SimpleNamespace) -> None:
    a, b = torch.full((2, 1, 16, 16), -1.0), torch.full((2, 1, 16, 16), -1.0)
    a[0, 0, 0, :3], b[0, 0, 0, 1:5] = 1, 1  # 2 of 5 pixels; and two empty pictures
    assert scripts.judging.overlap(a, b) == pytest.approx((2 / 5 + 1) / 2)


def test_training_needs_neither_sklearn_nor_matplotlib() -> None:
    """At import, that is: the file of pictures is made where scikit-learn is, if need be on another machine."""
    waiting, seen, loaded = ["study"], set(), set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for statement in ast.parse((SCRIPTS / f"{name}.py").read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Import):
                targets = [alias.name for alias in statement.names]
            else:
                targets = [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []
            local = {target for target in targets if (SCRIPTS / f"{target}.py").exists()}
            waiting += local - seen
            loaded |= {target.split(".")[0] for target in targets} - local
    assert {"study", "tasks", "training"} <= seen
    assert {"torch", "diffusers", "numpy"} <= loaded
    assert loaded & {"sklearn", "scipy", "matplotlib", "accelerate"} == set()
