"""Cells whose requests change their domain over time."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moeless.experiments.cells import intervals, serving
from moeless.simulator.routing import Replay
from moeless.workloads.lengths import Workload


def in_blocks(workload: Workload) -> Workload:
    """The same requests at the same moments of arrival, category after category.

    The order inside a category stays. Requests keep their lengths and their rows of the trace.
    """
    requests = workload.requests
    order = sorted(range(len(requests)), key=lambda index: (requests[index].category or "", index))
    made = tuple(
        dataclasses.replace(requests[source], id=place, arrival=requests[place].arrival)
        for place, source in enumerate(order)
    )
    return dataclasses.replace(workload, requests=made, base_N=np.ascontiguousarray(workload.base_N[order]))


def serve(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """As ``serving.serve``; with ``blocks`` true, one domain follows the other."""
    options = dict(params)
    blocks = options.pop("blocks")
    bench, costs, policy = serving.prepare(options, needs)
    if blocks:
        bench.workload = in_blocks(bench.workload)
        bench.replay = Replay(bench.served.topk_TLK, bench.workload, bench.spec.E, bench.cluster.G)
    return intervals.row(bench.run_cell(costs, policy), bench.spec, bench.cluster.G)
