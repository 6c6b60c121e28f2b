"""From the ranks' records to result cells.

Axes: S ranks, I iterations, L layers, C record columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeless.contracts import FloatArray
from moeless.costs import COSTS
from moeless.costs.measured import MeasuredCosts
from moeless.engine.elastic import COLUMNS
from moeless.engine.job import Job
from moeless.metrics import balance
from moeless.metrics.billing import Meter
from moeless.metrics.latency import MIN_SAMPLES_P99, cdf, summarise
from moeless.metrics.requests import Objective, RequestTimes, request_metrics
from moeless.metrics.result import Cell, LayerMetrics
from moeless.policy import ResolvedPolicy


@dataclass(frozen=True)
class CellRecords:
    """All ranks' records of one policy."""

    rows_SILC: FloatArray
    start_I: FloatArray
    end_I: FloatArray
    facts: list[dict[str, Any]]
    finished: list[dict[str, Any]]

    def column(self, name: str) -> FloatArray:
        """One column, ``[S, I, L]``."""
        return self.rows_SILC[..., COLUMNS.index(name)]


def finished_requests(folder: Path, cell: int, ranks: int) -> list[dict[str, Any]]:
    """What the ranks wrote of requests that were served to their end; a last broken line is left out."""
    found = []
    for rank in range(ranks):
        path = folder / f"finished-{cell}-{rank}.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            found += [json.loads(line) | {"rank": rank} for line in lines]
    return sorted(found, key=lambda entry: int(entry["request"]))


def read_records(job: Job, cell: int) -> CellRecords:
    """One policy's records."""
    arrays = [np.load(job.folder / f"records-{cell}-{rank}.npz") for rank in range(job.ranks)]
    facts = [json.loads((job.folder / f"facts-{cell}-{r}.json").read_text("utf-8")) for r in range(job.ranks)]
    rows = np.stack([a["rows_ILC"] for a in arrays])
    return CellRecords(
        rows, arrays[0]["start_I"], arrays[0]["end_I"], facts, finished_requests(job.folder, cell, job.ranks)
    )


def crowded(job: Job, facts: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Ranks and cores of the machine whose ranks share cores most; None where each rank has one, or a GPU.

    There wall time says nothing about balance.
    """
    worst = None
    for machine in {fact["machine"] for fact in facts} if job.device == "cpu" else ():
        here = [fact for fact in facts if fact["machine"] == machine]
        together = len(set().union(*(fact["cpus"] for fact in here)))
        quotas = [int(fact["cpu_quota"]) for fact in here if fact["cpu_quota"] is not None]
        found = len(here), max(1, min([together, *quotas]))
        if found[0] > found[1] and (worst is None or found[0] * worst[1] > worst[0] * found[1]):
            worst = found
    return worst


def measured_elsewhere(job: Job) -> str | None:
    """A remark where the profile by which planners plan is of another processor than this machine's."""
    costs = COSTS.get(job.costs)(job.spec, job.cluster) if job.device == "cpu" else None
    return costs.profile.elsewhere() if isinstance(costs, MeasuredCosts) else None


@dataclass(frozen=True)
class LayerSeconds:
    """Seconds of each part of a layer, ``[I, L]``."""

    expert: FloatArray
    exchange: FloatArray
    control: FloatArray
    stall: FloatArray

    @property
    def total(self) -> FloatArray:
        """A layer's whole time."""
        return self.expert + self.exchange + self.control + self.stall


def layer_seconds(records: CellRecords, own_only: bool) -> LayerSeconds:
    """A layer's time is the slowest rank's.

    By the wall where every rank has a core, from when the last rank came to the layer: what the others waited for a
    slower attention, told by how much longer their gather took, is no part of it. Otherwise (``own_only``) the sum of
    the largest compute, control and stall time that any rank spent itself, the exchange left out. Control includes what
    planning and forecasting beside the model exposed: by the wall the time that was waited for them, otherwise their
    own time that no other work hid.
    """
    kind = "exposed" if own_only else "wait"
    exposed = records.column(f"plan_{kind}") + records.column(f"forecast_beside_{kind}")
    expert, control = records.column("compute").max(0), (records.column("control") + exposed).max(0)
    stall = records.column("stall").max(0)
    known = expert + control + stall
    gather = records.column("gather")
    wall = (records.column("total") - (gather - gather.min(0))).max(0)
    exchange = np.zeros_like(known) if own_only else np.maximum(0.0, wall - known)
    return LayerSeconds(expert, exchange, control, stall)


def layer_metrics(records: CellRecords, seconds: LayerSeconds, warmup: int) -> LayerMetrics | None:
    """The result's layer figures; None where the warm-up took every iteration."""
    after = slice(warmup, None)
    summary = summarise(seconds.total[after].ravel())
    if summary is None:
        return None
    load_ILS = np.moveaxis(records.column("tokens")[:, after], 0, -1)
    replicas, warm = records.column("replicas")[0, after], records.column("warm")[0, after]
    parts = {
        "expert": seconds.expert,
        "all_to_all": seconds.exchange,
        "misc": np.zeros_like(seconds.expert),
        "control": seconds.control,
        "stall": seconds.stall,
    }
    return LayerMetrics(
        mean_ms=1e3 * summary.mean,
        p50_ms=1e3 * summary.median,
        p99_ms=1e3 * summary.p99,
        imbalance=float(balance.imbalance(load_ILS).mean()),
        replicas=float(replicas.mean()),
        moved_bytes=float(sum(fact["moved_bytes"] for fact in records.facts)),
        warm_rate=float(warm.sum() / replicas.sum()),
        stalls={"cold": float(seconds.stall.sum())},
        samples=summary.samples,
        p90_ms=1e3 * summary.p90,
        balancedness=float(balance.balancedness(load_ILS).mean()),
        active_experts=float(records.column("active")[0, after].mean()),
        parts_ms={name: 1e3 * float(values[after].mean()) for name, values in parts.items()},
        cdf_ms=tuple(1e3 * value for value in cdf(seconds.total[after].ravel())),
    )


def request_times(job: Job, finished: Sequence[dict[str, Any]]) -> RequestTimes:
    """Token times of the finished requests."""
    gaps = [gap for entry in finished for gap in np.diff(entry["token_times"]).tolist()]
    return RequestTimes(
        arrival_N=np.array([entry["arrival"] for entry in finished], np.float64),
        first_token_N=np.array([entry["token_times"][0] for entry in finished], np.float64),
        last_token_N=np.array([entry["token_times"][-1] for entry in finished], np.float64),
        input_tokens_N=np.array([entry["prompt_tokens"] for entry in finished], np.int64),
        output_tokens_N=np.array([len(entry["token_times"]) for entry in finished], np.int64),
        itl_seconds_I=np.array(gaps, np.float64),
        itl_count_I=np.ones(len(gaps), np.int64),
    )


def make_cell(
    job: Job,
    policy: ResolvedPolicy,
    records: CellRecords,
    *,
    warmup: int,
    objectives: Sequence[Objective],
    settings: dict[str, Any],
) -> Cell:
    """One row of the result, evidence ``measured``.

    Raises:
        ValueError: no iteration was left after the warm-up.
    """
    shared_cores = crowded(job, records.facts)
    own_only = shared_cores is not None
    seconds = layer_seconds(records, own_only)
    facts, end, total_IL = records.facts, float(records.end_I[-1]), seconds.total
    layer = layer_metrics(records, seconds, warmup)
    if layer is None:
        raise ValueError("no iteration was measured: the warm-up took all of them")
    meter = Meter(gpu_seconds=job.ranks * end)
    replicas_IL = records.column("replicas")[0]
    meter.own_layer_byte_seconds = float((total_IL * replicas_IL).sum()) * job.spec.expert_bytes
    meter.whole_byte_seconds = float((total_IL.sum(1) * replicas_IL.sum(1)).sum()) * job.spec.expert_bytes
    meter.resident_byte_seconds = float(sum(fact["resident_byte_seconds"] for fact in facts))
    missing = len(job.requests) - len(records.finished)
    request = request_metrics(request_times(job, records.finished), duration=end, failed=missing, objectives=objectives)
    warnings = _warnings(job, policy, facts, layer.samples, len(records.finished), shared_cores)
    if facts[0]["piled_up"] and job.batching == "one-second":
        warnings.append("one-second batches pile up: request metrics are undefined at this rate")
        request = None
    elif facts[0]["piled_up"]:
        warnings.append("the queue grew over the run: the rate exceeds what is served, latency depends on duration")
    nll, count = (sum(fact["nll"][i] for fact in facts) for i in (0, 1))
    counts = ("loads", "peer_loads", "peer_failures", "evictions", "refused", "failed")
    counted = {name: int(sum(fact[name] for fact in facts)) for name in counts}
    return Cell(
        policy=policy.label,
        predictor=policy.policy.predictor,
        distance=policy.policy.distance,
        model=job.spec.name,
        trace_kind="tokens",
        cluster=f"{job.ranks} {job.device} ranks",
        costs=job.costs,
        evidence="measured",
        layer=layer,
        request=request,
        billing=meter.bill(job.cluster),
        warnings=tuple(warnings),
        lossy=policy.lossy,
        settings={
            **settings,
            "host": job.host,
            "dtype": job.dtype,
            "batching": job.batching,
            "requests": len(job.requests),
            "iterations": len(records.end_I),
            "extra_slots": job.extra_slots,
            "keep_alive": job.keep_alive,
            "copy_from": job.copy_from,
            "temperature": job.temperature,
            "top_p": job.top_p,
            "layer_time": "own compute, exchange left out" if own_only else "wall clock",
            "copies": counted,
            "memory": _memory(job, facts),
            "planning_ms": 1e3 * float(records.column("planning").max(0)[warmup:].mean()),
            "control_ms": _control(records, own_only, warmup),
            "collectives": facts[0]["collectives"],
            "prompt_perplexity": math.exp(nll / count) if count else None,
            "seed": job.seed,
        },
    )


def _control(records: CellRecords, own_only: bool, warmup: int) -> dict[str, float]:
    """Where a layer's control comes from, milliseconds of the rank with most of each."""
    kind = "exposed" if own_only else "wait"
    causes = {
        "own": "control",
        "of_it_forecast": "forecast",
        "of_it_dispatch": "dispatch",
        "planning_exposed": f"plan_{kind}",
        "forecast_beside": "forecast_beside",
        "forecast_beside_exposed": f"forecast_beside_{kind}",
    }
    most = {name: records.column(column).max(0)[warmup:] for name, column in causes.items()}
    return {name: 1e3 * float(value.mean()) if value.size else 0.0 for name, value in most.items()}


def _memory(job: Job, facts: list[dict[str, Any]]) -> dict[str, float]:
    """Megabytes: what the fullest rank read from the checkpoint and holds alone, what a machine shares, the model."""
    spec = job.spec
    whole = spec.L * spec.E * spec.expert_bytes + spec.non_expert_bytes
    most = {f"rank_{name}_mb": max(fact[f"{name}_bytes"] for fact in facts) / 1e6 for name in ("read", "own")}
    return most | {"machine_shared_mb": facts[0]["shared_bytes"] / 1e6, "model_mb": whole / 1e6}


def _warnings(
    job: Job,
    policy: ResolvedPolicy,
    facts: list[dict[str, Any]],
    samples: int,
    finished: int,
    shared_cores: tuple[int, int] | None,
) -> list[str]:
    warnings = []
    if (elsewhere := measured_elsewhere(job)) is not None:
        warnings.append(elsewhere)
    if shared_cores is not None:
        ranks, cores = shared_cores
        warnings.append(
            f"{ranks} ranks share {cores} {'core' if cores == 1 else 'cores'}: layer times are the largest own "
            "compute, control and stall of any rank, the exchange left out; request times are those of the crowded "
            "machine"
        )
    if policy.lossy:
        warnings.append("the oracle overrides the router: its outputs differ from the model's")
    if policy.planner.share_budget is not None:
        warnings.append(
            f"{policy.planner.name} gives some layers more copies than others; live, every layer has as many slots, so "
            "it was planned with an equal budget for each"
        )
    refused = sum(fact["refused"] for fact in facts)
    if refused:
        warnings.append(f"memory had no room for {refused} planned copies")
    if samples < MIN_SAMPLES_P99 or finished < MIN_SAMPLES_P99:
        warnings.append(f"only {finished} requests: a p99 of fewer than {MIN_SAMPLES_P99} is one observation")
    return warnings
