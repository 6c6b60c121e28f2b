"""A policy as one object, made once: what simulator, live engine, tuning and benchmarks decide with."""

from typing import TYPE_CHECKING

from moeless import lazy

if TYPE_CHECKING:
    from moeless.policy.history import LoadHistory as LoadHistory
    from moeless.policy.predictors import ReadyPredictors as ReadyPredictors
    from moeless.policy.predictors import SimulationPredictors as SimulationPredictors
    from moeless.policy.resolved import ORACLE as ORACLE
    from moeless.policy.resolved import ResolvedPolicy as ResolvedPolicy
    from moeless.policy.resolved import resolve as resolve

__getattr__ = lazy.names(
    __name__,
    history="LoadHistory",
    predictors="ReadyPredictors SimulationPredictors",
    resolved="ORACLE ResolvedPolicy resolve",
)
