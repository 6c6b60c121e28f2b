"""What the serving figures share: the systems that are compared, the workloads, how results are read, tables, lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moeless.contracts import FloatArray
from moeless.experiments.base import Data, Job, Options, Plot
from moeless.experiments.cells import intervals
from moeless.experiments.sources import Source, at_hand, common_kind, common_label, synthetic
from moeless.metrics import catalogue, schema
from moeless.metrics.result import Cell
from moeless.report import charts

#: Requests of a full run: the paper's planner, planning anew in every layer of every iteration, simulates some
#: thousand layers a second, so that all figures together take hours.
FULL = 200
#: The four systems of the paper's figures; the predictor of ``moeless`` depends on what the trace holds.
BASELINES = ("static", "eplb:history", "oracle")
#: How the paper calls them.
PAPER_NAMES = {"static": "Megatron-LM", "eplb": "EPLB", "moeless": "MoEless", "oracle": "Oracle"}
#: Continuous batching, as engines serve. Planning every fourth iteration keeps a quick study within seconds.
CONTINUOUS: Mapping[str, Any] = {"batching": "continuous", "plan_every": 4}
#: Objectives of the studies that count goodput, loose enough for eight A6000.
OBJECTIVES = ("ttft:1000", "tpot:100")


def moeless_policy(source: Source, distance: int = 1) -> str:
    """The paper's system with the predictor that the trace allows."""
    return f"moeless:{source.predictor}" + ("" if source.predictor == "history" else f":{distance}")


def job(options: Options, source: Source, policy: str, costs: str, **changes: Any) -> Job:
    """One simulated run of the paper's workload: Azure arrivals, one-second batches, the trace's own lengths.

    ``changes`` replace parts of the workload.
    """
    planner, _, predictor = policy.partition(":")
    fitted = source.fitted.get(predictor.partition(":")[0]) if planner not in ("static", "oracle") else None
    params = {
        "cluster": source.cluster or options.cluster,
        "arrivals": "azure-like",
        "batching": "one-second",
        "lengths": "trace",
        "max_requests": options.pick(source.quick_requests, FULL),
        "seed": options.seed,
        "policy": policy,
        "costs": costs,
        **changes,
    }
    detail = "".join(f", {key} {value}" for key, value in changes.items())
    label = f"serve {source.title} by {policy}, {costs} costs{detail}"
    return Job(label, "moeless.experiments.cells.serving:serve", params, (source.job, *([fitted] if fitted else [])))


def jobs(options: Options, sources: Iterable[Source], policies: Sequence[str] = ()) -> dict[str, Job]:
    """Every source, cost model and policy, the paper's four by default; names are ``key|costs|policy``."""
    return {
        f"{source.key}|{costs}|{policy}": job(options, source, policy, costs)
        for source in sources
        for costs in options.costs
        for policy in policies or (*BASELINES, moeless_policy(source))
    }


#: Rows already read, by the identity of their data; the data is kept so that the identity stays its own.
_READ: dict[int, tuple[Mapping[str, Any], Cell]] = {}


def cell(data: Mapping[str, Any]) -> Cell:
    """A cached result row; checking it takes milliseconds, and figures ask for it many times."""
    if id(data) not in _READ:
        row = {key: value for key, value in data.items() if key != "intervals"}
        _READ[id(data)] = (data, schema.from_json(Cell, row, "cached cell"))
    return _READ[id(data)][1]


def read(data: Mapping[str, Any], key: str) -> float:
    """A metric of a result row such as ``layer.mean_ms``; NaN where it is undefined."""
    group, _, name = key.partition(".")
    value = (data[group] or {}).get(name)
    return math.nan if value is None else float(value)


def interval(data: Mapping[str, Any], key: str) -> tuple[Any, Any]:
    """Low and high of a result row's metric, or of its ``cdf_ms``; NaN where none is known."""
    low, high = data.get("intervals", {}).get(key, (math.nan, math.nan))
    return low, high


def ratio(mine: Mapping[str, Any], base: Mapping[str, Any], key: str = "layer.mean_ms") -> tuple[float, float, float]:
    """``mine`` over ``base`` with low and high, both resampled in the same blocks of the same workload.

    Args:
        key: one of the metrics of ``intervals.BLOCK_NAMES``.
    """
    under = read(base, key)
    middle = read(mine, key) / under if under else math.nan
    blocks = [data.get("intervals", {}).get("blocks") for data in (mine, base)]
    if None in blocks or len(blocks[0]["runs"]) != len(blocks[1]["runs"]):
        return middle, math.nan, math.nan
    mine_X, base_X = (intervals.per_run(each, intervals.BLOCK_NAMES[key]) for each in blocks)
    if catalogue.BY_KEY[key].over == "total":
        # how many iterations the run took belongs to it
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


def rows_of(results: Mapping[str, Any], source: Source, costs: str) -> list[Mapping[str, Any]]:
    """Rows of one source under one cost model as they are kept, intervals included, in the order of their jobs."""
    return [data for name, data in results.items() if name.startswith(f"{source.key}|{costs}|")]


def cells(results: Mapping[str, Any], source: Source, costs: str) -> list[Cell]:
    """The same rows without intervals."""
    return [cell(data) for data in rows_of(results, source, costs)]


def of(rows: Sequence[Cell], planner: str) -> Cell:
    """The row of a planner."""
    return next(row for row in rows if row.policy.partition(":")[0] == planner)


def change(mine: float, theirs: float | None) -> float:
    """``mine`` against ``theirs``, a change in per cent; 0 where there is nothing to compare with."""
    return 100.0 * (mine / theirs - 1.0) if theirs else 0.0


def changed(rows: Sequence[Cell], against: str, mine: str, theirs: str) -> float:
    """MoEless's metric against another system's, a change in per cent."""
    one, other = catalogue.BY_KEY[mine].of(of(rows, "moeless")), catalogue.BY_KEY[theirs].of(of(rows, against))
    assert one is not None
    return change(one, other)


def change_text(mine: float, theirs: float) -> str:
    """``mine`` against ``theirs``, per cent with its sign."""
    return f"{change(mine, theirs):+.1f} %".replace("-", "−") if theirs else "from nothing"


def fewest_runs(cells: Iterable[Cell]) -> int:
    """Layer runs of the result that stands on the fewest."""
    return min(one.layer.samples for one in cells)


def table(
    view: catalogue.View,
    lead: Sequence[str],
    rows: Iterable[tuple[Sequence[Any], Cell]],
    caption: str,
    *,
    show: bool = True,
    evidence: bool = True,
) -> Data:
    """A table of metrics.

    Args:
        view: the metrics, see ``moeless.metrics.catalogue``.
        lead: names of the columns before them.
        rows: each row's values of those, and its result.
        evidence: whether the last column tells on what a row stands.
    """
    last = ["evidence"] if evidence else []
    made = [[*first, *catalogue.values(view, one), *([one.evidence] if evidence else [])] for first, one in rows]
    return Data([*lead, *catalogue.headings(view), *last], made, caption, show)


def systems(rows: Iterable[tuple[Source, Cell]], caption: str, *, show: bool = True) -> Data:
    """The table of the compared systems."""
    lead = ("source", "costs", "policy")
    named = (((source.title, one.costs, one.policy + (" †" if one.lossy else "")), one) for source, one in rows)
    return table("systems", lead, named, caption, show=show)


# studies beyond the paper: one source, one cost model, settings by policies


def sources_of(options: Options) -> list[Source]:
    """The reader's traces, or made-up routing of the first model asked for."""
    return at_hand(options, [synthetic(options, (options.models or ("phi-3.5-moe",))[0], "lmsys")])


def source_of(options: Options) -> Source:
    """The first of them."""
    return sources_of(options)[0]


def physical(options: Options) -> str:
    """The cost model of studies about time that the paper's formula has no term for."""
    return next((name for name in options.costs if name != "paper"), options.costs[0])


def setting_jobs(
    options: Options, policies: Sequence[str], points: Mapping[str, Mapping[str, Any]], **common: Any
) -> dict[str, Job]:
    """One run per setting and policy, named ``setting|policy``; ``points`` and ``common`` change the workload."""
    source, costs = source_of(options), physical(options)
    return {
        f"{label}|{policy}": job(options, source, policy, costs, **{**CONTINUOUS, **common, **changes})
        for label, changes in points.items()
        for policy in policies
    }


def found(results: Mapping[str, Any], label: str, policy: str) -> Cell:
    """One run's result."""
    return cell(results[f"{label}|{policy}"])


def settings(results: Mapping[str, Any], pairs: Iterable[tuple[str, str]], caption: str) -> Data:
    """The table of a study's runs, a row for each (setting, policy)."""
    return table("study", ("setting", "policy"), ((pair, found(results, *pair)) for pair in pairs), caption)


def lines(
    options: Options,
    results: Mapping[str, Any],
    x: Mapping[str, float],
    policies: Sequence[str],
    value: str | Callable[[Cell], float],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    log_x: bool = False,
) -> Plot:
    """A figure over the settings whose place on the axis ``x`` gives, a line per policy.

    Args:
        value: what is read off each run: a metric such as ``layer.mean_ms``, drawn with its interval where the run
            knows one, or a function.
    """
    source, banded, series = source_of(options), "", {}
    for policy in policies:
        rows = [results[f"{label}|{policy}"] for label in x]
        if callable(value):
            series[policy] = charts.Line(list(x.values()), [value(cell(row)) for row in rows])
            continue
        low, high = zip(*(interval(row, value) for row in rows), strict=True)
        series[policy] = charts.Line(list(x.values()), [read(row, value) for row in rows], low, high)
        if np.isfinite(low).any():
            band = "90 % interval, bootstrap over requests" if value.startswith("request.") else BAND
            banded = f"; bands: {band}"
    runs = fewest_runs(found(results, label, policy) for label in x for policy in policies)
    figure = charts.lines(series, xlabel=xlabel, ylabel=ylabel, title=title, policies=True, log_x=log_x, ylim=(0, None))
    caption = (
        f"{title}: {source.title} on {source.cluster or options.cluster}, {physical(options)} costs, continuous "
        f"batching, one run per point (n = {runs:,} layer runs or more){banded}."
    )
    return Plot(figure, caption, common_kind([source]), common_label([source]))


def warnings(results: Mapping[str, Any]) -> list[str]:
    """What the runs say of themselves, each sentence once."""
    return list(dict.fromkeys(text for data in results.values() for text in cell(data).warnings))
