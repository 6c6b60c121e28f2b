"""What the studies beyond the paper share: their workload, sweeps of one setting, tables and lines of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moeless.experiments import serving
from moeless.experiments.base import Data, Job, Options, Plot
from moeless.experiments.sources import Source, at_hand, common_kind, common_label, synthetic
from moeless.metrics.result import Cell
from moeless.report import line_figures

#: Continuous batching, as engines serve. Planning every fourth iteration keeps a quick study within seconds.
CONTINUOUS: Mapping[str, Any] = {"batching": "continuous", "plan_every": 4}
#: Objectives of the studies that count goodput, loose enough for eight A6000.
OBJECTIVES = ("ttft:1000", "tpot:100")

COLUMNS = (
    "setting",
    "policy",
    "mean layer (ms)",
    "p99 (ms)",
    "imbalance",
    "replicas per layer",
    "warm (%)",
    "waiting for weights (s)",
    "p99 TTFT (ms)",
    "mean TPOT (ms)",
    "goodput (requests/s)",
    "paper bill (GB·s)",
    "resident bill (GB·s)",
    "GPU·s",
    "layer runs",
    "evidence",
)


def source_of(options: Options) -> Source:
    """The reader's first trace, or made-up routing of the first model asked for."""
    return at_hand(options, [synthetic(options, (options.models or ("phi-3.5-moe",))[0], "lmsys")])[0]


def physical(options: Options) -> str:
    """The cost model of studies about time that the paper's formula has no term for."""
    return next((name for name in options.costs if name != "paper"), options.costs[0])


def jobs(
    options: Options, policies: Sequence[str], points: Mapping[str, Mapping[str, Any]], **common: Any
) -> dict[str, Job]:
    """One run per setting and policy, named ``setting|policy``; ``points`` and ``common`` change the workload."""
    source, costs = source_of(options), physical(options)
    return {
        f"{label}|{policy}": serving.job(options, source, policy, costs, **{**CONTINUOUS, **common, **changes})
        for label, changes in points.items()
        for policy in policies
    }


def found(results: Mapping[str, Any], label: str, policy: str) -> Cell:
    """One run's result."""
    return serving.cell(results[f"{label}|{policy}"])


def row(label: str, policy: str, one: Cell) -> list[Any]:
    """A result as a row of COLUMNS."""
    layer, bill, request = one.layer, one.billing, one.request
    return [
        label,
        policy,
        layer.mean_ms,
        layer.p99_ms,
        layer.imbalance,
        layer.replicas,
        100.0 * layer.warm_rate,
        sum(layer.stalls.values()),
        request.p99_ttft_ms if request else None,
        request.mean_tpot_ms if request else None,
        request.request_goodput if request else None,
        bill.paper,
        bill.resident,
        bill.gpu_seconds,
        layer.samples,
        one.evidence,
    ]


def table(results: Mapping[str, Any], labels: Sequence[str], policies: Sequence[str], caption: str) -> Data:
    """Every run of a sweep."""
    rows = [row(label, policy, found(results, label, policy)) for label in labels for policy in policies]
    return Data(COLUMNS, rows, caption, show=True)


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
    log_y: bool = False,
) -> Plot:
    """A figure over the settings whose place on the axis ``x`` gives, a line per policy.

    Args:
        value: what is read off each run: a field such as ``layer.mean_ms``, drawn with its interval where the run
            knows one, or a function.
    """
    source = source_of(options)
    series = {policy: line(results, x, policy, value) for policy in policies}
    banded = any(np.isfinite(np.asarray(one.low, np.float64)).any() for one in series.values() if one.low is not None)
    runs = min(found(results, label, policy).layer.samples for label in x for policy in policies)
    return Plot(
        line_figures.lines(
            series,
            xlabel=xlabel,
            ylabel=ylabel,
            title=title,
            policies=True,
            log_x=log_x,
            log_y=log_y,
            ylim=(None, None) if log_y else (0, None),
        ),
        f"{title}: {source.title} on {source.cluster or options.cluster}, {physical(options)} costs, continuous "
        f"batching, one run per point (n = {runs:,} layer runs or more){band_words(value) if banded else ''}.",
        common_kind([source]),
        common_label([source]),
    )


def line(
    results: Mapping[str, Any], x: Mapping[str, float], policy: str, value: str | Callable[[Cell], float]
) -> line_figures.Line:
    """One policy's line; without bounds where ``value`` is a function."""
    rows = [results[f"{label}|{policy}"] for label in x]
    if callable(value):
        return line_figures.Line(list(x.values()), [value(serving.cell(row)) for row in rows])
    low, high = zip(*(serving.interval(row, value) for row in rows), strict=True)
    return line_figures.Line(list(x.values()), [serving.read(row, value) for row in rows], low, high)


def band_words(value: str | Callable[[Cell], float]) -> str:
    """What the bands of such a figure are."""
    request = isinstance(value, str) and value.startswith("request.")
    return f"; bands: {'90 % interval, bootstrap over requests' if request else serving.BAND}"


def change(mine: float, theirs: float) -> str:
    """``mine`` against ``theirs``, per cent with its sign."""
    return f"{100.0 * (mine / theirs - 1.0):+.1f} %".replace("-", "−") if theirs else "from nothing"


def warnings(results: Mapping[str, Any]) -> list[str]:
    """What the runs say of themselves, each sentence once."""
    return list(dict.fromkeys(text for data in results.values() for text in serving.cell(data).warnings))
