"""What is remembered of past loads, the same in simulations and live runs."""

import numpy as np
import pytest

from moeless.contracts import Phase
from moeless.policy import LoadHistory
from moeless.policy.history import DECAY, WINDOW

LOADS = np.random.default_rng(0).integers(0, 9, (2 * WINDOW + 30, 2, 3))


def alike(one, other, phase=Phase.DECODE):
    """Whether two histories know the same of every layer."""
    for layer in range(2):
        for known in ("share", "recent"):
            np.testing.assert_array_equal(getattr(one, known)(layer), getattr(other, known)(layer))
        np.testing.assert_array_equal(one.last(layer, phase), other.last(layer, phase))
    assert one.mean_tokens == other.mean_tokens
    return True


@pytest.mark.parametrize("prior", [None, np.array([[0.25, 0.25, 0.5]])])
def test_the_window_forgets_what_the_history_still_holds(prior):
    history = LoadHistory(prior, 1, 3, 2)
    assert history.recent(0) is None
    old, new = np.array([[8, 0, 0]]), np.array([[0, 6, 2]])
    for load in [old] * 300 + [new] * WINDOW:
        history.add(load, Phase.DECODE, 4)
    assert history.recent(0).tolist() == [0, 6 * WINDOW, 2 * WINDOW]
    assert history.share(0)[0] > 0.3


def test_the_window_is_the_sum_of_the_last_iterations():
    history = LoadHistory(None, 2, 3, 1)
    for count, load_LE in enumerate(LOADS, start=1):
        history.add(load_LE, Phase.DECODE, 9)
        assert history.recent(1).tolist() == LOADS[max(0, count - WINDOW) : count, 1].sum(0).tolist()


def test_layer_by_layer_is_the_same_as_whole_iterations():
    whole, parts = LoadHistory(None, 2, 3, 1), LoadHistory(None, 2, 3, 1)
    for load_LE in LOADS:
        whole.add(load_LE, Phase.DECODE, 9)
        for layer in range(2):
            parts.add_layer(layer, load_LE[layer], Phase.DECODE, 9)
        assert alike(whole, parts)


@pytest.mark.parametrize("steps", [1, 5, WINDOW, WINDOW + 7])
def test_steps_that_a_compiled_loop_ran_are_the_same_as_one_by_one(steps):
    one, many = LoadHistory(None, 2, 3, 1), LoadHistory(None, 2, 3, 1)
    for start in range(0, len(LOADS), steps):
        load_ILE = LOADS[start : start + steps].copy()
        for load_LE in load_ILE:
            one.add(load_LE, Phase.DECODE, 9)
            many.weight_LE *= DECAY
            many.weight_LE += load_LE
        many.add_steps(load_ILE, Phase.DECODE, 9)
        # the loop uses its rows again
        load_ILE[:] = -1
        assert alike(one, many)


def test_one_phase_does_not_hide_another():
    history = LoadHistory(None, 1, 2, 1)
    assert history.last(0, Phase.PREFILL) is None
    history.add(np.array([[1, 3]]), Phase.PREFILL, 4)
    history.add(np.array([[2, 2]]), Phase.DECODE, 4)
    assert history.last(0, Phase.PREFILL).tolist() == [1, 3]
    assert history.last(0, Phase.DECODE).tolist() == [2, 2]
