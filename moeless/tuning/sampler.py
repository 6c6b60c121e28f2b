"""A sampler whose suggestions depend on the study's seed, its trials and the trial's number alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState


class SeededByTrial(optuna.samplers.BaseSampler):
    """TPE seeded anew for each trial.

    An interrupted study goes on as it would have gone, and processes that share a study never draw the same
    numbers, though all of them were given one seed.
    """

    def __init__(self, seed: int, startup: int = 10) -> None:
        self._seed = seed
        self._startup = startup
        self._number = -1
        self._inner: optuna.samplers.TPESampler | None = None

    def _of(self, trial: FrozenTrial) -> optuna.samplers.TPESampler:
        if self._inner is None or trial.number != self._number:
            self._number = trial.number
            # one word each for seed and number, mixed so that neighbours differ
            mixed = (self._seed * 0x9E3779B1 + trial.number * 0x85EBCA77) % 2**32
            self._inner = optuna.samplers.TPESampler(seed=mixed, n_startup_trials=self._startup, multivariate=True)
        return self._inner

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that are drawn together."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Their values."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The value of a parameter that is drawn alone."""
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Let TPE keep what it needs of a finished trial."""
        self._of(trial).after_trial(study, trial, state, values)
