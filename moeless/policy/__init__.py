"""A policy as one object, made once: what simulator, live engine, tuning and benchmarks decide with."""

from moeless.policy.history import LoadHistory
from moeless.policy.predictors import ReadyPredictors, SimulationPredictors
from moeless.policy.resolved import ORACLE, ResolvedPolicy, resolve

__all__ = ["ORACLE", "LoadHistory", "ReadyPredictors", "ResolvedPolicy", "SimulationPredictors", "resolve"]
