"""A whole benchmark: one workload under every policy and cost model, as result cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.cluster import Cluster, cluster
from moeless.configuration import inherited
from moeless.contracts import FloatArray, IntArray, Policy
from moeless.costs import COSTS
from moeless.errors import UserError
from moeless.placement import PLANNERS
from moeless.policy import ORACLE, ResolvedPolicy, SimulationPredictors, resolve
from moeless.serverless import KeepAlive, PoolSettings
from moeless.serverless.options import Serverless
from moeless.simulator.failures import check_failures
from moeless.simulator.options import BenchConfig, Part
from moeless.simulator.routing import Replay
from moeless.simulator.settings import SimulationSettings
from moeless.simulator.simulation import Simulation, simulate
from moeless.simulator.tenants import Tenant
from moeless.simulator.timeline import Timeline
from moeless.spec import MoESpec, preset
from moeless.traces import TokenTrace, open_trace, require_kind
from moeless.traces.compose import range_loads
from moeless.workloads import lengths
from moeless.workloads.scheduler import Scheduler

#: Share of the trace's requests that is history (predictors, first plans); the rest is served.
HISTORY_SHARE = 0.7


@dataclass(frozen=True)
class ServedTrace:
    """The part of a trace that is served, and the load shares of the part that is known beforehand.

    ``row_T`` is each served row's place in the trace; the request table is that of the served part.
    """

    topk_TLK: NDArray[np.uint16]
    row_T: IntArray
    first_row: IntArray
    prompt_tokens: IntArray
    category: list[str]
    history_share_LE: FloatArray
    num_history: int


def split_trace(trace: TokenTrace, seed: int = 0, part: Part = "test") -> ServedTrace:
    """Split a trace's requests 70/30 by a seeded permutation; a trace of fewer than two requests is not split.

    Nothing that a policy knows beforehand is served, so that history and fitted predictors do not see the answers.
    Part ``tune`` splits the 70 once more, and leaves the 30 out.

    Raises:
        UserError: the trace has too few requests to split twice.
    """
    spec, count = trace.spec, trace.num_requests
    first_N = np.asarray(trace.requests.first_row, np.int64)
    rows_N = np.diff(np.append(first_N, trace.num_rows))
    order = np.random.default_rng(seed).permutation(count)
    num_history = min(round(HISTORY_SHARE * count), count - 1)
    if part == "tune":
        if num_history < 2:
            raise UserError(f"the trace has {count} requests, too few to tune on some and test on others")
        order = order[:num_history]
        num_history = min(round(HISTORY_SHARE * num_history), num_history - 1)
    known, served = np.sort(order[:num_history]), np.sort(order[num_history:])
    topk_TLK = trace.load_topk()
    share_LE = np.full((spec.L, spec.E), 1.0 / spec.E)
    if rows_N[known].sum():
        load_LE = range_loads(
            topk_TLK, first_N[known], first_N[known] + rows_N[known], np.zeros(len(known), np.int64), spec.E, 1
        )[:, 0].astype(np.float64)
        share_LE = load_LE / load_LE.sum(1, keepdims=True)
    row_T = np.concatenate([np.arange(first_N[q], first_N[q] + rows_N[q]) for q in served.tolist()])
    return ServedTrace(
        topk_TLK=topk_TLK[row_T],
        row_T=row_T,
        first_row=np.cumsum(rows_N[served]) - rows_N[served],
        prompt_tokens=np.asarray(trace.requests.prompt_tokens, np.int64)[served],
        category=[trace.requests.category[q] for q in served.tolist()],
        history_share_LE=share_LE,
        num_history=len(known),
    )


class Bench:
    """The workload and everything that the cells share.

    Raises:
        UserError: an input is missing or wrong; nothing has been run by then.
    """

    def __init__(self, config: BenchConfig) -> None:
        self.config = config
        self.cluster: Cluster = cluster(config.cluster)
        trace = open_trace(config.trace)
        require_kind(trace, "tokens", command="serve-bench")
        assert isinstance(trace, TokenTrace)
        self.trace = trace
        self.spec: MoESpec = self._spec(trace.spec)
        for name in config.costs:
            COSTS.get(name)
        for policy in config.policies:
            if policy.planner != ORACLE:
                PLANNERS.get(policy.planner)
        self.predictors = SimulationPredictors(trace.spec, config.predictors, trace.has_router_inputs)
        self.served = split_trace(trace, 0, config.part)
        self.workload = lengths.join(
            config.series(), self.served, len(self.served.topk_TLK), lengths=config.lengths, seed=config.seed
        )
        token_T = trace.token_T[self.served.row_T]
        known = token_T if bool((token_T >= 0).any()) else None
        self.replay = Replay(self.served.topk_TLK, self.workload, self.spec.E, self.cluster.G, known)
        self._scheduler()
        check_failures(config.failures, self.cluster.G)
        for costs_name, policy in self.cells:
            self._parts(costs_name, policy)

    def _spec(self, recorded: MoESpec) -> MoESpec:
        if self.config.model is None:
            return recorded
        chosen = preset(self.config.model)
        if (chosen.E, chosen.K) != (recorded.E, recorded.K):
            raise UserError(
                f"--model {chosen.name} has {chosen.E} experts, top-{chosen.K}; the trace has {recorded.E}, "
                f"top-{recorded.K}"
            )
        if chosen.L == recorded.L:
            return chosen
        # another model's layers, as many as were recorded
        return replace(chosen, num_layers=recorded.L, moe_layers=tuple(range(recorded.L)))

    @property
    def _borrowed(self) -> bool:
        """Whether one model's routing is played on another's shapes."""
        return self.spec.name != self.trace.spec.name

    def _scheduler(self) -> Scheduler:
        return self.config.scheduler(self.workload.requests, self.cluster.G)

    @property
    def cells(self) -> list[tuple[str, Policy]]:
        """The (cost model, policy) pairs, in order of running."""
        return [(costs, policy) for costs in self.config.costs for policy in self.config.policies]

    def estimate(self) -> dict[str, Any]:
        """What a run would take: requests, token positions, megabytes of routing and of records."""
        positions = sum(r.prompt_tokens + r.output_tokens - 1 for r in self.workload.requests)
        return {
            "cells": len(self.cells),
            "requests": len(self.workload.requests),
            "token_positions": positions,
            "layer_events_at_most": positions * self.spec.L * len(self.cells),
            "memory_mb": round((2 * self.served.topk_TLK.nbytes + 4.0 * positions * self.spec.L) / 1e6, 1),
            "warnings": list(self.workload.warnings),
        }

    def run_cell(
        self,
        costs_name: str,
        policy: Policy,
        progress: Callable[[int], None] | None = None,
        timeline: Timeline | None = None,
    ) -> Simulation:
        """Serve the workload once."""
        runtime, settings = self._parts(costs_name, policy)
        return simulate(
            self.replay,
            self.workload.requests,
            self._scheduler(),
            runtime,
            settings=settings,
            prior_share_LE=self.served.history_share_LE,
            objectives=self.config.objectives,
            evidence="synthetic" if self.trace.info.synthetic or self._borrowed else "simulated",
            labels=self._labels(settings.pool),
            router_inputs=self._router_inputs if self.trace.has_router_inputs else None,
            progress=progress,
            timeline=timeline,
            notes=self._notes(),
        )

    def tenant(self, costs_name: str, policy: Policy) -> Tenant:
        """The workload before its first iteration, to be served beside others' (``moeless.simulator.gpu_pool``)."""
        runtime, settings = self._parts(costs_name, policy)
        inputs = self._router_inputs if self.trace.has_router_inputs else None
        share_LE = self.served.history_share_LE
        return Tenant(self.replay, self.workload.requests, self._scheduler(), runtime, settings, share_LE, inputs, None)

    def _parts(self, costs_name: str, policy: Policy) -> tuple[ResolvedPolicy, SimulationSettings]:
        config = self.config
        runtime = resolve(
            policy,
            spec=self.spec,
            cluster=self.cluster,
            costs=COSTS.get(costs_name)(self.spec, self.cluster),
            extra_slots=config.extra_slots,
            predictors=self.predictors,
            params=config.planner_params.get(policy.planner),
        )
        pool = PoolSettings(
            KeepAlive.parse(str(config.keep_alive)),
            instant=costs_name == "paper" if config.instant_copies is None else config.instant_copies,
            **inherited(Serverless, config),
        )
        # a serverful planner frees what it no longer wants at once, and holds its GPUs
        if runtime.planner.cadence != "iteration":
            pool = replace(pool, keep_alive=KeepAlive("fixed", 0.0), scale_to_zero=False, requests_per_gpu=None)
        return runtime, SimulationSettings(
            pool, config.replan_seconds, config.plan_every, config.warmup, config.failures
        )

    def run(self, progress: Callable[[str, int], None] | None = None) -> Iterator[Simulation]:
        """Every cell in turn; ``progress`` gets a cell's name and its completed requests."""
        for costs_name, policy in self.cells:
            report = None if progress is None else partial(progress, f"{costs_name} {policy}")
            yield self.run_cell(costs_name, policy, report)

    def _notes(self) -> tuple[str, ...]:
        if not self._borrowed:
            return tuple(self.workload.warnings)
        recorded = self.trace.spec
        note = f"the routing is {recorded.name}'s ({recorded.L} layers), the shapes are {self.spec.name}'s"
        return (*self.workload.warnings, note)

    def _labels(self, pool: PoolSettings) -> dict[str, Any]:
        config = self.config
        return {
            "batching": config.batching,
            "arrivals": Path(config.arrivals).name,
            "lengths": "resampled" if self.workload.resampled else "trace",
            "requests": len(self.workload.requests),
            "request_rate": config.request_rate,
            "arrivals_window": None if config.arrivals_window is None else list(config.arrivals_window),
            "time_scale": config.time_scale,
            "extra_slots": config.extra_slots,
            "copies": "instant" if pool.instant else "timed",
            "keep_alive": str(pool.keep_alive),
            "start_seconds": config.start_seconds,
            "scale_to_zero": pool.scale_to_zero,
            "requests_per_gpu": pool.requests_per_gpu,
            "plan_every": config.plan_every,
            "seed": config.seed,
        }

    def _router_inputs(self, rows: IntArray) -> NDArray[np.float32]:
        at = self.served.row_T[rows]
        # runs of consecutive rows are read at once
        starts = np.flatnonzero(np.diff(at, prepend=-2) != 1)
        ends = np.append(starts[1:], len(at))
        parts = [
            self.trace.router_inputs(int(at[a]), int(at[b - 1]) + 1)
            for a, b in zip(starts.tolist(), ends.tolist(), strict=True)
        ]
        return np.concatenate(parts)
