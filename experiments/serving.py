"""What the serving figures share: the systems that are compared, the workload, and how results are read back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moeless.contracts import FloatArray
from moeless.experiments.base import Job, Options
from moeless.experiments.cells import intervals
from moeless.experiments.sources import Source
from moeless.metrics import schema
from moeless.metrics.catalogue import BY_KEY
from moeless.metrics.result import Cell

_SERVE = "moeless.experiments.cells.serving:serve"
#: Requests of a full run: the paper's planner, planning anew in every layer of every iteration, simulates some
#: thousand layers a second, so that all figures together take hours.
FULL = 200
#: The four systems of the paper's figures; the predictor of ``moeless`` depends on what the trace holds.
BASELINES = ("static", "eplb:history", "oracle")
#: How the paper calls them.
PAPER_NAMES = {"static": "Megatron-LM", "eplb": "EPLB", "moeless": "MoEless", "oracle": "Oracle"}


def workload(options: Options, source: Source) -> dict[str, Any]:
    """The paper's workload: Azure arrivals, one-second batches; lengths are the trace's own."""
    return {
        "cluster": source.cluster or options.cluster,
        "arrivals": "azure-like",
        "batching": "one-second",
        "lengths": "trace",
        "max_requests": options.pick(source.quick_requests, FULL),
        "seed": options.seed,
    }


def moeless_policy(source: Source, distance: int = 1) -> str:
    """The paper's system with the predictor that the trace allows."""
    return f"moeless:{source.predictor}" + ("" if source.predictor == "history" else f":{distance}")


def systems(source: Source) -> tuple[str, ...]:
    """Policies of the paper's comparison, in its order."""
    return (*BASELINES, moeless_policy(source))


def job(options: Options, source: Source, policy: str, costs: str, **changes: Any) -> Job:
    """One simulated run; ``changes`` replace parts of the workload."""
    planner, _, predictor = policy.partition(":")
    needs: tuple[Job, ...] = (source.job,)
    if planner not in ("static", "oracle") and predictor.partition(":")[0] in source.fitted:
        needs = (source.job, source.fitted[predictor.partition(":")[0]])
    detail = "".join(f", {key} {value}" for key, value in changes.items())
    return Job(
        f"serve {source.title} by {policy}, {costs} costs{detail}",
        _SERVE,
        {**workload(options, source), "policy": policy, "costs": costs, **changes},
        needs,
    )


def jobs(options: Options, sources: Iterable[Source], policies: Sequence[str] = (), **changes: Any) -> dict[str, Job]:
    """Every (source, cost model, policy); names are ``title|costs|policy``."""
    return {
        f"{source.key}|{costs}|{policy}": job(options, source, policy, costs, **changes)
        for source in sources
        for costs in options.costs
        for policy in policies or systems(source)
    }


#: Rows already read, by the identity of their data; the data is kept so that the identity stays its own.
_READ: dict[int, tuple[Mapping[str, Any], Cell]] = {}


def cell(data: Mapping[str, Any]) -> Cell:
    """A cached result row; checking it takes milliseconds, and figures ask for it many times."""
    if id(data) not in _READ:
        row = {key: value for key, value in data.items() if key != "intervals"}
        _READ[id(data)] = (data, schema.from_json(Cell, row, "cached cell"))
    return _READ[id(data)][1]


def read(data: Mapping[str, Any], name: str) -> float:
    """A figure of a result row such as ``layer.mean_ms``; NaN where it is undefined."""
    group, _, field = name.partition(".")
    value = (data[group] or {}).get(field)
    return math.nan if value is None else float(value)


def interval(data: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """Low and high of a result row's figure such as ``layer.mean_ms`` or ``cdf_ms``; NaN where none is known."""
    low, high = data.get("intervals", {}).get(name, (math.nan, math.nan))
    return low, high


def ratio(mine: Mapping[str, Any], base: Mapping[str, Any], what: str = "seconds") -> tuple[float, float, float]:
    """``mine`` over ``base`` with low and high, both resampled in the same blocks of the same workload.

    Args:
        what: ``seconds``, the mean layer time; ``bill``, the paper's rule; or ``replicas`` of a layer.
    """
    name = {"seconds": "layer.mean_ms", "bill": "billing.paper", "replicas": "layer.replicas"}[what]
    under = read(base, name)
    middle = read(mine, name) / under if under else math.nan
    blocks = [data.get("intervals", {}).get("blocks") for data in (mine, base)]
    if None in blocks or len(blocks[0]["runs"]) != len(blocks[1]["runs"]):
        return middle, math.nan, math.nan
    mine_X, base_X = (intervals.per_run(each, what) for each in blocks)
    if what == "bill":
        # a bill is for the whole run: how many iterations it took belongs to it
        mine_X = mine_X * (sum(blocks[0]["runs"]) / sum(blocks[1]["runs"]))
    if not base_X.all():
        return middle, math.nan, math.nan
    low, high = intervals.bounds(mine_X / base_X)
    return middle, low, high


def distribution(data: Mapping[str, Any]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The percentiles of a row's layer time, milliseconds, and where each lies between; NaN where not known."""
    middle = np.array(data["layer"]["cdf_ms"], np.float64)
    low, high = (np.broadcast_to(np.asarray(each, np.float64), middle.shape) for each in interval(data, "cdf_ms"))
    return middle, low, high


#: How intervals are told under a figure.
BAND = "90 % interval, bootstrap over blocks of consecutive iterations of the run"
PAIRED = "90 % interval of the ratio, bootstrap over blocks of consecutive iterations, the same in both runs"
WHISKERS = f"Whiskers on the paper's rule: {BAND}; the other rules bill one run's wall-clock time."


def cells(results: Mapping[str, Any], source: Source, costs: str) -> list[Cell]:
    """Rows of one source under one cost model, in the order of their jobs."""
    return [cell(data) for data in rows_of(results, source, costs)]


def rows_of(results: Mapping[str, Any], source: Source, costs: str) -> list[Mapping[str, Any]]:
    """The same rows as they are kept, intervals included."""
    return [data for name, data in results.items() if name.startswith(f"{source.key}|{costs}|")]


def of(rows: Sequence[Cell], planner: str) -> Cell:
    """The row of a planner."""
    return next(row for row in rows if row.policy.partition(":")[0] == planner)


def reduction(mine: float, theirs: float) -> float:
    """How much lower ``mine`` is, per cent of ``theirs`` (negative: higher)."""
    return 100.0 * (1.0 - mine / theirs) if theirs else 0.0


def changed(rows: Sequence[Cell], against: str, mine: str, theirs: str) -> float:
    """MoEless's metric against another system's, a change in per cent."""
    one, other = BY_KEY[mine].of(of(rows, "moeless")), BY_KEY[theirs].of(of(rows, against))
    assert one is not None
    return -reduction(one, other or 0.0)


COLUMNS = (
    "source",
    "costs",
    "policy",
    "mean layer (ms)",
    "p50 (ms)",
    "p99 (ms)",
    "replicas per layer",
    "imbalance",
    "warm (%)",
    "paper bill (GB·s)",
    "resident bill (GB·s)",
    "GPU·s",
    "layer runs",
    "evidence",
)


def row(source: Source, one: Cell) -> list[Any]:
    """A result as a row of COLUMNS."""
    layer, bill = one.layer, one.billing
    return [
        source.title,
        one.costs,
        one.policy + (" †" if one.lossy else ""),
        layer.mean_ms,
        layer.p50_ms,
        layer.p99_ms,
        layer.replicas,
        layer.imbalance,
        100.0 * layer.warm_rate,
        bill.paper,
        bill.resident,
        bill.gpu_seconds,
        layer.samples,
        one.evidence,
    ]
