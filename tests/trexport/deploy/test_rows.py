"""Which samples run together."""

from __future__ import annotations

import torch

from trexport.deploy.serve.rows import Choice, Limits, Row, feeds_of, runs_of

A: Choice = (("a", None),)
B: Choice = (("b", 0.5),)
C: Choice = (("c", None),)


def row(request: int, choice: Choice = (), timestep: float = 5.0, size: int = 8) -> Row:
    return Row(
        request, {"sample": torch.full((4, size, size), float(request)), "timestep": torch.tensor(timestep)}, choice
    )


def shape(runs: list[list[Row]]) -> list[list[int]]:
    return [[row.request for row in run] for run in runs]


def test_same_adapters_run_together_in_their_order_and_no_more_than_fit() -> None:
    rows = [row(0, A), row(1, B), row(2, A), row(3, A), row(4)]
    assert shape(runs_of(rows, Limits(2))) == [[4], [0, 2], [3], [1]]  # what is active, the base, comes first
    assert shape(runs_of(rows, Limits(8), B)) == [[1], [0, 2, 3], [4]]


def test_a_bank_mixes_as_many_adapters_as_it_holds() -> None:
    rows = [row(0, A), row(1), row(2, B), row(3, A), row(4, C), row(5, B), row(6, A)]
    assert shape(runs_of(rows, Limits(8, bank=2))) == [[0, 1, 2, 3], [4, 5], [6]]


def test_another_size_or_strength_is_another_run() -> None:
    rows = [row(0), row(1, size=16), row(2), row(3, (("a", 1.0),)), row(4, A)]
    assert shape(runs_of(rows, Limits(8))) == [[0, 2], [1], [3], [4]]


def test_timesteps_mix_only_where_the_model_takes_one_for_each_sample() -> None:
    rows = [row(0, timestep=1), row(1, timestep=2), row(2, timestep=1)]
    assert shape(runs_of(rows, Limits(8))) == [[0, 1, 2]]
    assert shape(runs_of(rows, Limits(8, timesteps=False))) == [[0, 2], [1]]


def test_feeds_are_copies_with_a_batch() -> None:
    rows = [row(0, timestep=1), row(3, timestep=2)]
    feeds = feeds_of(rows)
    assert feeds["sample"].shape == (2, 4, 8, 8)
    assert feeds["timestep"].tolist() == [1, 2]
    single = feeds_of(rows[1:])["sample"]
    rows[1].feeds["sample"].zero_()  # Triton takes its memory back
    assert single.eq(3).all()
    assert feeds["sample"][1].eq(3).all()
