"""How sure a simulated run's figures are: 90 % intervals by bootstrap.

Layer times and bills are resampled in blocks of consecutive iterations, since neighbours are alike; request figures
request by request. Both speak of the run's own workload, not of other days' traffic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.contracts import FloatArray, IntArray
from moeless.metrics import schema
from moeless.simulator.record import LayerRecord
from moeless.simulator.simulation import Simulation
from moeless.spec import MoESpec

#: Blocks of a run at most, and the fewest that say something.
BLOCKS, FEWEST = 30, 8
RESAMPLES = 400
#: Metric by which two runs can be compared in pairs, to its name in a run's blocks.
BLOCK_NAMES = {"layer.mean_ms": "seconds", "billing.paper": "bill", "layer.replicas": "replicas"}
#: Per cent below and above the interval.
TAILS = (5.0, 95.0)
#: Points that stand for a block's distribution when blocks are pooled.
_POINTS = 201


def row(simulation: Simulation, spec: MoESpec, gpus: int) -> dict[str, Any]:
    """A result row as JSON, with ``intervals`` beside its own fields: low and high by ``group.field``.

    ``cdf_ms`` is [low, high] of each percentile of layer time; ``blocks`` are each block's seconds, layer runs,
    replicas and share of the paper's bill, from which two runs are compared in pairs. What has too few
    samples is left out.
    """
    data: dict[str, Any] = schema.to_json(simulation.cell)
    return {**data, "intervals": schema.to_json(intervals(simulation, spec, gpus))}


def intervals(simulation: Simulation, spec: MoESpec, gpus: int) -> dict[str, Any]:
    """The intervals of a run, the same for the same run."""
    byte_2 = np.array([spec.expert_bytes, spec.non_expert_bytes * gpus], np.float64)
    found = _layers(simulation.record, simulation.cell.billing.paper, byte_2)
    if simulation.cell.request is not None:
        times = simulation.clocks.times()
        several = times.output_tokens_N > 1
        samples = {"ttft": times.ttft_N, "e2el": times.e2el_N, "tpot": times.tpot_N[several]}
        for name, value_N in samples.items():
            found |= _requests(name, 1e3 * value_N)
    return found


def draws(count: int) -> IntArray:
    """Which of ``count`` samples each resample takes, ``[RESAMPLES, count]``: the same for every run, so that runs
    of one workload are compared in pairs."""
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def per_run(blocks: Mapping[str, list[float]], what: str) -> FloatArray:
    """Resampled ``seconds`` or ``bill`` of one layer run, ``[RESAMPLES]``."""
    runs_B = np.array(blocks["runs"])
    drawn_XB = draws(len(runs_B))
    value_X: FloatArray = np.array(blocks[what])[drawn_XB].sum(1) / runs_B[drawn_XB].sum(1)
    return value_X


def bounds(value_X: FloatArray) -> list[float]:
    """The interval of resampled values."""
    low, high = np.percentile(value_X, TAILS)
    return [float(low), float(high)]


def _layers(record: LayerRecord, bill: float, byte_2: FloatArray) -> dict[str, Any]:
    times_IL = record.times_IL
    if len(times_IL) < FEWEST:
        return {}
    blocks = np.array_split(times_IL, min(BLOCKS, len(times_IL)))
    runs_B = np.array([block.size for block in blocks], np.float64)
    seconds_B = np.array([block.sum(dtype=np.float64) for block in blocks])
    end_B = np.cumsum([len(block) for block in blocks])
    own_B, misc_B, replicas_B = _grown(record, end_B)
    bill_B = byte_2[0] * own_B + byte_2[1] * misc_B
    points_BP = np.stack([np.percentile(block, np.linspace(0, 100, _POINTS)) for block in blocks])
    drawn_XB = draws(len(blocks))
    cdf_XQ = np.stack([np.percentile(points_BP[drawn_B], np.arange(101)) for drawn_B in drawn_XB])
    cdf_TQ = 1e3 * np.percentile(cdf_XQ, TAILS, axis=0)
    runs_X = runs_B[drawn_XB].sum(1)
    found = {
        "layer.mean_ms": bounds(1e3 * seconds_B[drawn_XB].sum(1) / runs_X),
        "layer.p50_ms": cdf_TQ[:, 50].tolist(),
        "layer.p99_ms": cdf_TQ[:, 99].tolist(),
        "cdf_ms": np.round(cdf_TQ, 9).tolist(),
        "layer.replicas": bounds(replicas_B[drawn_XB].sum(1) / runs_X),
    }
    if bill_B.sum() > 0:
        # the run's bill, had it been made of other blocks
        scale = bill * runs_B.sum() / bill_B.sum()
        found["billing.paper"] = bounds(scale * bill_B[drawn_XB].sum(1) / runs_X)
    blocks_B = {"seconds": seconds_B, "runs": runs_B, "bill": bill_B, "replicas": replicas_B}
    return {**found, "blocks": {name: value_B.tolist() for name, value_B in blocks_B.items()}}


def _grown(record: LayerRecord, end_B: IntArray) -> FloatArray:
    """Replica-seconds, misc seconds and replicas of each block; between two marks of the record they grow evenly."""
    mark_M4 = np.array([(0, 0.0, 0.0, 0.0), *record.marks])
    upto_3B = np.stack([np.interp(end_B, mark_M4[:, 0], mark_M4[:, column]) for column in (1, 2, 3)])
    grown_3B: FloatArray = np.diff(upto_3B, axis=1, prepend=0.0)
    return grown_3B


def _requests(name: str, value_N: FloatArray) -> dict[str, Any]:
    if len(value_N) < FEWEST:
        return {}
    drawn_XN = value_N[draws(len(value_N))]
    return {
        f"request.mean_{name}_ms": bounds(drawn_XN.mean(1)),
        f"request.median_{name}_ms": bounds(np.median(drawn_XN, axis=1)),
        f"request.p99_{name}_ms": bounds(np.percentile(drawn_XN, 99, axis=1)),
    }
