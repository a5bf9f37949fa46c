from __future__ import annotations

import pytest
import torch

from tests.helpers import weight_oracle
from tests.trlora.swap.cases import KERNEL, Case
from tests.trlora.swap.emulator import columns_of_8, emulate, rows_of_8, rows_of_16
from trlora.swap import fragments
from trlora.swap.packed import pack
from trlora.swap.plan import plan_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("packed", "read", "shape", "transposed"),
    [
        (fragments.rows_of_16, rows_of_16, (2, 48, 32), True),
        (fragments.columns_of_8, columns_of_8, (2, 48, 24), False),
    ],
)
def test_fragments_hold_every_entry(packed, read, shape, transposed) -> None:
    x = torch.randn(shape)
    expected = x.mT if transposed else x
    assert torch.equal(torch.from_numpy(read(packed(x).numpy())), expected)


def test_fragments_of_eight_columns_hold_every_entry() -> None:
    x = torch.randn(3, 32, 8)
    assert torch.equal(torch.from_numpy(rows_of_8(fragments.rows_of_8(x).numpy())).flatten(1, 2), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("strengths", [(1.0,), (-0.6, 1.3)], ids=["one", "two"])
@pytest.mark.parametrize("case", KERNEL, ids=str)
def test_the_kernels_arguments_give_the_adapted_weight(
    case: Case, strengths: tuple[float, ...], dtype: torch.dtype
) -> None:
    weights = case.weights(dtype)
    adapters = [case.adapters(seed) for seed in range(1, len(strengths) + 1)]
    plan = plan_of(weights, weights, adapters)
    assert not plan.torch
    assert not plan.unchanged
    found = {}
    for group in plan.groups:
        given = [weights[path] for path in group.paths]
        rows = [len(weight) for weight in given]
        packed = [pack(group.variant, number, rows, factors, CPU) for number, factors in enumerate(group.factors)]
        found |= dict(zip(group.paths, emulate(group.variant, given, packed, strengths), strict=True))
    for path, weight in weights.items():
        pairs = [(adapter[path], strength) for adapter, strength in zip(adapters, strengths, strict=True)]
        expected = torch.from_numpy(weight_oracle(weight, pairs))
        error = (found[path].double() - expected).norm() / expected.norm()
        best = (expected.to(dtype).double() - expected).norm() / expected.norm()
        assert error <= 2 * best  # one rounding of the result, and the factors' own


def test_a_transform_trained_from_its_start_has_one_term() -> None:
    case = next(case for case in KERNEL if not case.trained)
    weights = case.weights(torch.float16)
    (group,) = plan_of(weights, weights, [case.adapters()]).groups
    assert group.variant.terms == (1,)
