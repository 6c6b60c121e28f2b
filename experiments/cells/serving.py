"""Cells that serve a workload in the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeless.contracts import Policy
from moeless.experiments.cells import intervals
from moeless.metrics.requests import parse_goodput
from moeless.simulator.bench import Bench, BenchConfig


def prepare(params: dict[str, Any], needs: list[Any]) -> tuple[Bench, str, Policy]:
    """The benchmark that a cell's parameters describe, its cost model and its policy.

    Params: ``policy``, ``costs``, and any field of ``BenchConfig`` but the trace and the predictors, which are
    ``needs[0]`` and the rest. Planner parameters are those of the one planner; ``goodput`` holds texts such as
    ``ttft:500``.
    """
    options = dict(params)
    policy = Policy.parse(options.pop("policy"))
    costs = options.pop("costs")
    planner = options.pop("planner", {})
    bench = Bench(
        BenchConfig(
            trace=Path(needs[0]),
            policies=(policy,),
            costs=(costs,),
            predictors=tuple(Path(need) for need in needs[1:]),
            planner_params={policy.planner: planner} if planner else {},
            objectives=parse_goodput(options.pop("goodput", [])),
            **options,
        )
    )
    return bench, costs, policy


def serve(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """One policy under one cost model: a result row with intervals; parameters as in :func:`prepare`."""
    bench, costs, policy = prepare(params, needs)
    return intervals.row(bench.run_cell(costs, policy), bench.spec, bench.cluster.G)
