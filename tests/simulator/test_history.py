"""What is remembered of past loads."""

import numpy as np
import pytest

from moeless.contracts import Phase
from moeless.engine.history import LiveHistory
from moeless.simulator.history import WINDOW, LoadHistory


@pytest.mark.parametrize("prior", [None, np.array([[0.25, 0.25, 0.5]])])
def test_the_window_forgets_what_the_history_still_holds(prior):
    history = LoadHistory(prior, 1, 3, 2)
    assert history.recent(0) is None
    old, new = np.array([[8, 0, 0]]), np.array([[0, 6, 2]])
    for load in [old] * 300 + [new] * (WINDOW + 8):
        history.add(load, Phase.DECODE, 4)
    recent_E = history.recent(0)
    assert recent_E / recent_E.sum() == pytest.approx([0.0, 0.75, 0.25], abs=1e-6)
    assert history.share(0)[0] > 0.3


def test_iterations_that_a_compiled_loop_added_are_in_the_window():
    history = LoadHistory(None, 1, 2, 1)
    history.weight_LE += [[30.0, 10.0]]
    history.count(40, 40)
    assert history.recent(0) == pytest.approx([30.0, 10.0])
    history.add(np.array([[1, 3]]), Phase.DECODE, 4)
    assert history.recent(0) == pytest.approx([30.97, 12.99])


def test_the_live_window_holds_as_many_iterations():
    history = LiveHistory(1, 2)
    assert history.recent(0) is None
    for load in [[9, 0]] * 20 + [[1, 3]] * WINDOW:
        history.add(0, np.array(load), Phase.DECODE, 4)
    assert history.recent(0).tolist() == [WINDOW, 3 * WINDOW]
