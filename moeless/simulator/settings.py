"""Assumptions of a simulation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from moeless.errors import UserError
from moeless.serverless import PoolSettings
from moeless.simulator.failures import Failure


@dataclass(frozen=True)
class SimulationSettings:
    """Assumptions of a simulation.

    Attributes:
        pool: instances, keep-alive, memory.
        replan_seconds: how often an ``interval`` planner (EPLB) plans; the paper's example is ten minutes.
        plan_every: iterations between the plans of a planner that plans per iteration; 1 is the paper.
        warmup_iterations: first iterations that layer figures leave out; bills and request figures keep them.
        failures: what breaks, and when.
    """

    pool: PoolSettings = field(default_factory=PoolSettings)
    replan_seconds: float = 600.0
    plan_every: int = 1
    warmup_iterations: int = 0
    failures: tuple[Failure, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.replan_seconds < math.inf:
            raise UserError(f"the time between EPLB's plans must be above 0 seconds and end, got {self.replan_seconds}")
        if self.plan_every < 1:
            raise UserError("there must be at least one iteration between plans")
        if self.warmup_iterations < 0:
            raise UserError("the number of warm-up iterations must not be negative")
