"""What the simulator says of a live run: the same requests, the routing that the live run had, the same policies.

Copies take their time, control is charged, and the scheduler and the planners' cost model are the live ones'; what
differs is the clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.cluster import Cluster
from moeless.contracts import IntArray
from moeless.costs import COSTS
from moeless.engine.job import Job
from moeless.engine.recording import Routing
from moeless.engine.results import measured_elsewhere
from moeless.errors import UserError
from moeless.metrics.requests import Objective
from moeless.metrics.result import Cell
from moeless.policy import ResolvedPolicy
from moeless.serverless import KeepAlive, PoolSettings
from moeless.simulator.routing import Replay
from moeless.simulator.settings import SimulationSettings
from moeless.simulator.simulation import simulate
from moeless.spec import MoESpec
from moeless.workloads.lengths import Workload


@dataclass(frozen=True)
class _Inputs:
    """Gate inputs of the routing's rows, for predictors that read them."""

    input_TLH: NDArray[Any]

    def __call__(self, rows: IntArray) -> NDArray[np.float32]:
        return np.asarray(self.input_TLH[rows], np.float32)


def best_costs(spec: MoESpec, cluster: Cluster, device: str) -> str:
    """The cost model where none is asked for: a profile measured on this kind of machine, where one fits."""
    if device != "cpu":
        return "roofline"
    try:
        COSTS.get("measured")(spec, cluster)
    except UserError:
        return "roofline"
    return "measured"


def predict(
    job: Job,
    policies: Sequence[ResolvedPolicy],
    routing: Routing,
    *,
    warmup: int = 0,
    objectives: Sequence[Objective] = (),
) -> list[Cell]:
    """One simulated cell per policy, in their order.

    Args:
        routing: what the live run routed, every request's rows in order of request and position.
    """
    requests = tuple(live.request for live in job.requests)
    workload = Workload(requests, False, (), routing.first_row_N)
    replay = Replay(routing.topk_TLK, workload, job.spec.E, job.ranks)
    cells = []
    for policy in policies:
        serverful = policy.planner.cadence != "iteration"
        keep_alive = KeepAlive("fixed", 0.0) if serverful else KeepAlive.parse(job.keep_alive)
        reads_inputs = policy.predictor is not None and policy.predictor.reads == "router_inputs"
        found = simulate(
            replay,
            requests,
            job.scheduler(requests, job.ranks),
            policy,
            settings=SimulationSettings(PoolSettings(keep_alive), job.replan_seconds, job.plan_every, warmup),
            objectives=objectives,
            router_inputs=_Inputs(routing.input_TLH) if reads_inputs and routing.input_TLH is not None else None,
            labels={"predicts": "the live run of this policy", "batching": job.batching, "seed": job.seed},
        )
        remarks = [remark for remark in (measured_elsewhere(job),) if remark is not None]
        cells.append(
            dataclasses.replace(
                found.cell,
                cluster=f"{job.cluster.name}, {job.ranks} ranks",
                warnings=(*remarks, *found.cell.warnings),
            )
        )
    return cells
