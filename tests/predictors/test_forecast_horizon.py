"""A forecast's horizon is told from how its deviations from the past follow each other."""

from __future__ import annotations

import numpy as np
import pytest

from moeless.contracts import Forecast, Phase
from moeless.predictors.forecast_horizon import LONGEST, ForecastHorizon

EVEN_E = np.full(16, 1 / 16)


def told(fades: float, iterations: int = 60, phase: Phase = Phase.PREFILL, layers: int = 4) -> ForecastHorizon:
    """A horizon that has seen deviations which fade by this factor from one iteration to the next."""
    rng, horizon = np.random.default_rng(0), ForecastHorizon(np.tile(EVEN_E, (layers, 1)))
    away_LE = np.zeros((layers, 16))
    for _ in range(iterations):
        away_LE = fades * away_LE + np.sqrt(1 - fades**2) * rng.normal(0, 0.01, away_LE.shape)
        for layer, away_E in enumerate(away_LE):
            mean_E = np.maximum(EVEN_E + away_E, 0) * 1000
            horizon.horizon(layer, phase, Forecast(mean_E, mean_E, 1000, "gates"), EVEN_E)
    return horizon


@pytest.mark.parametrize(("fades", "low", "high"), [(0.0, 1, 2), (0.9, 6, 16), (0.99, 30, LONGEST)])
def test_life_is_long_where_deviations_stay_and_one_iteration_where_they_do_not(fades, low, high):
    assert low <= told(fades).iterations(Phase.PREFILL) <= high


def test_phases_have_lives_of_their_own_and_nothing_is_known_before_the_first():
    horizon = told(0.99, phase=Phase.DECODE)
    assert horizon.iterations(Phase.PREFILL) == 1 < horizon.iterations(Phase.DECODE)


def test_forecasts_from_the_past_or_beside_none_have_no_end_that_could_be_told():
    horizon, mean_E = told(0.0), EVEN_E * 1000
    assert horizon.horizon(0, Phase.PREFILL, Forecast(mean_E, mean_E, 1000, "history"), EVEN_E) == 0
    assert horizon.horizon(0, Phase.PREFILL, Forecast(mean_E, mean_E, 1000, "gates"), None) == 0
    assert horizon.horizon(0, Phase.PREFILL, Forecast(mean_E, mean_E, 1000, "gates"), EVEN_E) == 1


def test_a_past_that_has_moved_makes_one_forecast_count_as_lasting():
    horizon, mean_E = told(0.0), EVEN_E * 1000
    moved_E = np.arange(1.0, 17) / np.arange(1.0, 17).sum()
    horizons = [horizon.horizon(1, Phase.PREFILL, Forecast(mean_E, mean_E, 1000, "gates"), moved_E) for _ in range(2)]
    assert horizons[0] == 0 < horizons[1]
