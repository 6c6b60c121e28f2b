"""Sampling is a function of logits and seed."""

from __future__ import annotations

import numpy as np
import torch

from moeless.engine.serving import sample

LOGITS = torch.log(torch.tensor([0.1, 0.5, 0.05, 0.35]))


def draws(temperature: float, top_p: float, count: int = 400) -> np.ndarray:  # type: ignore[type-arg]
    found = [sample(LOGITS, temperature, top_p, (0, 3, position)) for position in range(count)]
    return np.bincount(found, minlength=4) / count


def test_a_seed_and_a_position_give_one_token() -> None:
    assert sample(LOGITS, 1.0, 1.0, (7, 1, 2)) == sample(LOGITS, 1.0, 1.0, (7, 1, 2))
    assert len({sample(LOGITS, 1.0, 1.0, (7, 1, position)) for position in range(50)}) > 1


def test_frequencies_follow_the_model_and_the_temperature() -> None:
    np.testing.assert_allclose(draws(1.0, 1.0), [0.1, 0.5, 0.05, 0.35], atol=0.07)
    assert draws(0.1, 1.0)[1] > 0.9


def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_it() -> None:
    assert np.flatnonzero(draws(1.0, 0.8)).tolist() == [1, 3]
    assert np.flatnonzero(draws(1.0, 0.3)).tolist() == [1]
    assert np.flatnonzero(draws(1.0, 0.86)).tolist() == [0, 1, 3]
