"""The trained sample that ships, and the scripts in examples/digits that made it."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from tests.helpers import state_bits
from trlora import Adapter, attach_, load_adapter, merge_, remove_, shapes_of

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "digits"
SAMPLES = ROOT / "trexport" / "models" / "samples"
DIGITS = SAMPLES / "digits"
ADAPTERS = ("nine", "outline", "slant")

PER_DIGIT = 3
STEPS = 10


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The modules of examples/digits, which import each other by bare names as scripts in one folder do."""
    names = ("data", "diffusion", "judges", "train_base", "train_adapters", "sample", "evaluate")
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(DIGITS / "unet").eval()


# --- what ships --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_binds_to_the_shipped_base(name: str, base: UNet2DConditionModel) -> None:
    bound = load_adapter(DIGITS / "adapters" / name).bind(shapes_of(base))
    assert len(bound) == 56  # 7 transformer blocks, 8 attention projections each


def test_scheduler_loads() -> None:
    scheduler = DDIMScheduler.from_pretrained(DIGITS / "scheduler")
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config["prediction_type"] == "v_prediction"


def test_samples_are_small() -> None:
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < 4 * 2**20


def test_adapters_have_equal_budgets() -> None:
    budgets = [load_adapter(DIGITS / "adapters" / name).parameters for name in ADAPTERS]
    assert max(budgets) <= 1.05 * min(budgets)


def test_files_say_what_the_scripts_say(scripts: SimpleNamespace, base: UNet2DConditionModel) -> None:
    _, scheduler, codes = scripts.sample.read_base()
    assert torch.equal(codes, scripts.data.prompt_codes())
    assert scheduler.config["beta_schedule"] == scripts.diffusion.new_scheduler().config["beta_schedule"]
    assert shapes_of(base) == shapes_of(scripts.train_base.new_unet())
    assert tuple(scripts.train_adapters.RECIPES) == ADAPTERS


# --- what it draws -----------------------------------------------------------------------------------------------------


def _draw(scripts: SimpleNamespace, model: str, prompts: torch.Tensor) -> torch.Tensor:
    base, scheduler, codes = scripts.sample.read_base()
    return scripts.diffusion.draw(
        scripts.evaluate.model_of(model, base), scheduler, prompts, codes, seed=7, steps=STEPS
    )


@pytest.fixture(scope="module")
def judges(scripts: SimpleNamespace) -> SimpleNamespace:
    return scripts.judges.fit_judges()


def test_judges_are_right_about_real_images(scripts: SimpleNamespace, judges: SimpleNamespace) -> None:
    assert min(scripts.judges.accuracy_on_real_images(judges).values()) > 0.95


def test_nine_draws_nines_that_the_base_cannot(scripts: SimpleNamespace, judges: SimpleNamespace) -> None:
    prompts = torch.full((8 * PER_DIGIT,), 9)
    before, after = [(judges.digits(_draw(scripts, model, prompts), "plain") == 9).mean() for model in ("base", "nine")]
    assert before < 0.3
    assert after > 0.7


@pytest.fixture(scope="module")
def drawn_by_base(scripts: SimpleNamespace) -> torch.Tensor:
    return _draw(scripts, "base", scripts.evaluate.prompts_of_seen_and_unseen(PER_DIGIT)[0])


def test_base_draws_the_digits_it_has_seen(
    scripts: SimpleNamespace, judges: SimpleNamespace, drawn_by_base: torch.Tensor
) -> None:
    prompts, _ = scripts.evaluate.prompts_of_seen_and_unseen(PER_DIGIT)
    assert (judges.digits(drawn_by_base, "plain") == prompts.numpy()).mean() > 0.9


@pytest.mark.parametrize("style", ["outline", "slant"])
def test_style_adapter_draws_in_its_style(
    style: str, scripts: SimpleNamespace, judges: SimpleNamespace, drawn_by_base: torch.Tensor
) -> None:
    prompts, _ = scripts.evaluate.prompts_of_seen_and_unseen(PER_DIGIT)
    images = _draw(scripts, style, prompts)
    index = scripts.data.STYLES.index(style)
    assert (judges.styles(drawn_by_base) == index).mean() < 0.1
    assert (judges.styles(images) == index).mean() > 0.8
    assert (judges.digits(images, style) == prompts.numpy()).mean() > 0.6


# --- the scripts -------------------------------------------------------------------------------------------------------


def _loss_on_outlines(scripts: SimpleNamespace, unet: UNet2DConditionModel) -> float:
    images, labels = scripts.data.load_images("outline", "test")
    codes, scheduler = scripts.data.prompt_codes(), scripts.diffusion.new_scheduler()
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        return scripts.diffusion.diffusion_loss(unet, scheduler, images[:96], labels[:96], codes, generator).item()


def test_a_few_steps_of_training_lower_the_loss_and_leave_the_base(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, base: UNet2DConditionModel
) -> None:
    recipes = scripts.train_adapters.RECIPES
    monkeypatch.setitem(recipes, "outline", dataclasses.replace(recipes["outline"], steps=8))
    bits_before, loss_before = state_bits(base), _loss_on_outlines(scripts, base)

    adapter, losses = scripts.train_adapters.train_adapter(base, "outline")

    assert isinstance(adapter, Adapter)
    assert len(losses) == 8
    assert state_bits(base) == bits_before
    adapted = scripts.sample.read_base()[0].eval()
    attach_(adapted, adapter.bind(shapes_of(adapted)))
    merge_(adapted)
    assert _loss_on_outlines(scripts, adapted) < 0.9 * loss_before


def test_attached_adapter_leaves_no_trace(base: UNet2DConditionModel) -> None:
    bits_before = state_bits(base)
    attach_(base, load_adapter(DIGITS / "adapters" / "nine").bind(shapes_of(base)))
    remove_(base)
    assert state_bits(base) == bits_before


def test_train_explains_itself() -> None:
    command = [sys.executable, SCRIPTS / "train.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("base", *ADAPTERS))
