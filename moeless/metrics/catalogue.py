"""Every metric once: what it means, how it is read from a cell, and how each table, page and log shows it.

Tables show the metrics in this file's order. A new metric is one entry of :data:`METRICS`; where no field of
``result.json`` holds it, ``value`` computes it from the cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moeless.errors import UserError
from moeless.metrics.result import Cell

#: The tables that show metrics: in the terminal, on a page (three tables), of runs side by side, and those of
#: experiments: the compared systems, a study's settings, a sweep, an ablation, clusters of many sizes, the headline
#: claims.
View = Literal[
    "terminal",
    "layer page",
    "billing page",
    "request page",
    "compare",
    "systems",
    "study",
    "sweep",
    "ablation",
    "scale",
    "claims",
]


@dataclass(frozen=True)
class Column:
    """A metric in one table.

    Attributes:
        label: heading, with the unit.
        factor: from the metric's unit to the heading's.
        form: how the number is written; where empty, the table decides.
        change: heading of a column after this one, with a difference against the base in per cent.
        change_of: key of the metric whose difference that is; the column's own where empty.
        after: key of the metric that it stands after in this table; where empty, the catalogue's order holds.
    """

    label: str
    factor: float = 1.0
    form: str = ""
    change: str = ""
    change_of: str = ""
    after: str = ""


def _in(column: Column, *views: View) -> dict[View, Column]:
    """The same column in several tables."""
    return dict.fromkeys(views, column)


@dataclass(frozen=True)
class Metric:
    """One metric of a cell.

    Attributes:
        key: group and name, as in ``result.json``.
        definition: one sentence.
        better: which values are; None where neither is.
        over: how the run's layers or requests make one figure; a total grows with the run.
        columns: how a table shows it, by table; absent where it does not.
        logged: name in W&B's rows; empty where it is not logged.
        objective: name as an objective of tuning; empty where it is none.
        label: name and unit in a sentence, on an axis or as an objective.
        rule: name of a billing rule in a sentence; empty where it is no bill to compare by.
        value: computes it; None reads ``key`` from the cell.
    """

    key: str
    unit: str
    label: str
    definition: str
    better: Literal["lower", "higher"] | None
    over: Literal["mean", "median", "p99", "total", "rate"]
    columns: dict[View, Column]
    logged: str = ""
    objective: str = ""
    rule: str = ""
    value: Callable[[Cell], float | None] | None = None

    @property
    def maximise(self) -> bool:
        """Whether tuning looks for the largest value."""
        return self.better == "higher"

    def of(self, cell: Cell) -> float | None:
        """The metric of a cell in ``unit``; None where it is undefined."""
        if self.value is not None:
            return self.value(cell)
        group, name = self.key.split(".")
        part = getattr(cell, group)
        found: float | None = None if part is None else getattr(part, name)
        return found


METRICS: tuple[Metric, ...] = (
    Metric(
        "layer.mean_ms",
        "ms",
        "mean MoE-layer time (ms)",
        "Mean forward time of a MoE layer over all iterations and layers, stalls and exposed control included.",
        "lower",
        "mean",
        {
            "terminal": Column("layer mean µs", 1e3, ".4g"),
            "layer page": Column("mean layer (ms)", change="vs static (%)"),
            "compare": Column("mean layer (ms)", change="vs first run (%)"),
            "claims": Column("layer µs", 1e3, ".4g"),
            **_in(Column("mean layer (ms)"), "systems", "study", "sweep", "ablation", "scale"),
        },
        logged="layer_mean_ms",
        objective="latency",
    ),
    Metric(
        "layer.p50_ms",
        "ms",
        "median MoE-layer time (ms)",
        "Median forward time of a MoE layer.",
        "lower",
        "median",
        _in(Column("p50 (ms)"), "layer page", "systems"),
    ),
    Metric(
        "layer.p99_ms",
        "ms",
        "p99 MoE-layer time (ms)",
        "99th percentile of the forward time of a MoE layer.",
        "lower",
        "p99",
        {
            "terminal": Column("p99 µs", 1e3, ".4g", change="vs static", change_of="layer.mean_ms"),
            **_in(Column("p99 (ms)"), "layer page", "compare", "systems", "study", "scale"),
        },
        logged="layer_p99_ms",
        objective="p99-latency",
    ),
    Metric(
        "layer.imbalance",
        "ratio",
        "imbalance over GPUs",
        "Mean over iterations and layers of the largest GPU load divided by the mean GPU load.",
        "lower",
        "mean",
        {
            "terminal": Column("imbalance", form=".3f"),
            "claims": Column("imbalance", form=".4g"),
            "systems": Column("imbalance", after="layer.replicas"),
            **_in(Column("imbalance"), "layer page", "study", "scale"),
        },
        logged="imbalance",
        objective="imbalance",
    ),
    Metric(
        "layer.replicas",
        "replicas",
        "live replicas a layer",
        "Mean number of live expert replicas of a layer.",
        "lower",
        "mean",
        {
            "terminal": Column("replicas", form=".1f"),
            "claims": Column("replicas", form=".4g"),
            **_in(Column("replicas per layer"), "layer page", "systems", "study", "sweep", "ablation", "scale"),
        },
        logged="replicas",
        objective="replicas",
    ),
    Metric(
        "layer.warm_rate",
        "ratio",
        "warm replicas",
        "Replicas found in memory when their layer ran, divided by all planned ones.",
        "higher",
        "mean",
        {
            "terminal": Column("warm", 100.0, ".1f|%"),
            "sweep": Column("warm rate"),
            **_in(Column("warm (%)", 100.0), "layer page", "systems", "study"),
        },
    ),
    Metric(
        "layer.stalls",
        "s",
        "waiting for weights (s)",
        "Exposed waiting of layers, all causes together, over the whole run.",
        "lower",
        "total",
        {"study": Column("waiting for weights (s)")},
        value=lambda cell: sum(cell.layer.stalls.values()),
    ),
    Metric(
        "layer.moved_bytes",
        "bytes",
        "moved bytes",
        "Weight bytes that copies moved over the whole run.",
        "lower",
        "total",
        {"layer page": Column("moved (GB)", 1e-9)},
        objective="moved",
    ),
    Metric(
        "layer.samples",
        "pairs",
        "layer runs",
        "Number of (iteration, layer) pairs that the layer figures are taken over.",
        None,
        "total",
        {
            "layer page": Column("n"),
            "sweep": Column("layer runs"),
            "ablation": Column("layer runs", after="billing.resident"),
            **_in(Column("layer runs", after="billing.gpu_seconds"), "systems", "study"),
        },
    ),
    Metric(
        "request.mean_ttft_ms",
        "ms",
        "mean TTFT (ms)",
        "Mean time from a request's arrival to its first output token.",
        "lower",
        "mean",
        {
            "terminal": Column("TTFT ms", form=".1f"),
            **_in(Column("TTFT mean (ms)"), "request page", "compare"),
        },
        logged="mean_ttft_ms",
        objective="ttft",
    ),
    Metric(
        "request.p99_ttft_ms",
        "ms",
        "p99 TTFT (ms)",
        "99th percentile of the time to the first output token.",
        "lower",
        "p99",
        {"request page": Column("TTFT p99 (ms)"), "study": Column("p99 TTFT (ms)")},
    ),
    Metric(
        "request.mean_tpot_ms",
        "ms",
        "mean TPOT (ms)",
        "Mean of (end-to-end time − TTFT) / (output tokens − 1) over requests with at least two output tokens.",
        "lower",
        "mean",
        {
            "terminal": Column("TPOT ms", form=".2f"),
            "study": Column("mean TPOT (ms)"),
            **_in(Column("TPOT mean (ms)"), "request page", "compare"),
        },
        logged="mean_tpot_ms",
        objective="tpot",
    ),
    Metric(
        "request.p99_tpot_ms",
        "ms",
        "p99 TPOT (ms)",
        "99th percentile of the time per output token.",
        "lower",
        "p99",
        {"request page": Column("TPOT p99 (ms)")},
    ),
    Metric(
        "request.mean_e2el_ms",
        "ms",
        "mean end-to-end latency (ms)",
        "Mean time from a request's arrival to its last output token.",
        "lower",
        "mean",
        {"request page": Column("E2E mean (ms)")},
        objective="e2e",
    ),
    Metric(
        "request.p99_e2el_ms",
        "ms",
        "p99 end-to-end latency (ms)",
        "99th percentile of the time from a request's arrival to its last output token.",
        "lower",
        "p99",
        {"terminal": Column("p99 E2E s", 1e-3, ".2f")},
    ),
    Metric(
        "request.output_throughput",
        "tokens/s",
        "output tokens/s",
        "Output tokens divided by the run's duration.",
        "higher",
        "rate",
        {"request page": Column("output tokens/s")},
    ),
    Metric(
        "request.completed",
        "requests",
        "completed requests",
        "Number of requests that were served to their end.",
        "higher",
        "total",
        {"request page": Column("completed")},
    ),
    Metric(
        "billing.paper",
        "GB·s",
        "the paper's bill (GB·s)",
        "Memory of a layer's replicas times that layer's duration, summed over all layer runs.",
        "lower",
        "total",
        {
            "terminal": Column("paper GB·s", change="vs static"),
            "billing page": Column("paper's rule (GB·s)", change="vs static (%)"),
            "claims": Column("paper bill GB·s", form=".4g"),
            **_in(Column("paper bill (GB·s)"), "compare", "systems", "study", "ablation"),
        },
        logged="bill_paper",
        objective="paper-cost",
        rule="the paper's rule",
    ),
    Metric(
        "billing.paper_whole",
        "GB·s",
        "the paper's bill, all layers (GB·s)",
        "Memory of all layers' replicas times every layer's duration: what a serverful system holds while it works.",
        "lower",
        "total",
        {"claims": Column("paper bill, all layers GB·s", form=".4g")},
    ),
    Metric(
        "billing.resident",
        "GB·s",
        "resident bill (GB·s)",
        "Memory of every resident expert copy times the time it is resident, keep-alive included.",
        "lower",
        "total",
        {
            "terminal": Column("resident GB·s", change="vs static"),
            "billing page": Column("resident experts (GB·s)", change="vs static (%)"),
            "claims": Column("resident GB·s", form=".4g"),
            **_in(Column("resident bill (GB·s)"), "compare", "systems", "study", "ablation"),
        },
        logged="bill_resident",
        objective="cost",
        rule="resident memory",
    ),
    Metric(
        "billing.gpu_seconds",
        "GPU·s",
        "GPU-seconds",
        "Time that each GPU was held, summed over GPUs.",
        "lower",
        "total",
        {
            "billing page": Column("whole GPUs (GPU·s)", change="vs static (%)"),
            "claims": Column("GPU·s", form=".4g"),
            **_in(Column("GPU·s"), "terminal", "compare", "systems", "study"),
        },
        logged="bill_gpu_seconds",
        objective="gpu-seconds",
        rule="whole GPUs",
    ),
    Metric(
        "billing.gpu_dollars",
        "$",
        "list price ($)",
        "GPU-seconds at the device's price, US dollars.",
        "lower",
        "total",
        {"billing page": Column("list price ($)")},
    ),
    Metric(
        "request.request_goodput",
        "requests/s",
        "goodput (requests/s)",
        "Requests that met every latency limit, divided by the run's duration.",
        "higher",
        "rate",
        {
            "terminal": Column("goodput/s"),
            "request page": Column("goodput (req/s)"),
            "study": Column("goodput (requests/s)", after="request.mean_tpot_ms"),
        },
        objective="goodput",
    ),
)

BY_KEY = {metric.key: metric for metric in METRICS}
#: The bills that policies are compared by.
BILLS = tuple(metric for metric in METRICS if metric.rule)
#: What tuning may optimise, by its name there.
OBJECTIVES = {metric.objective: metric for metric in METRICS if metric.objective}


def shown(view: View) -> list[tuple[Metric, Column]]:
    """The metrics of a table with their columns, in order."""
    place = {metric.key: (index, 0) for index, metric in enumerate(METRICS)}
    found = [(metric, metric.columns[view]) for metric in METRICS if view in metric.columns]
    return sorted(found, key=lambda one: (place[one[1].after][0], 1) if one[1].after else place[one[0].key])


def headings(view: View) -> list[str]:
    """Headings of a table's metrics, differences included."""
    return [name for _, column in shown(view) for name in (column.label, column.change) if name]


def change(metric: Metric, cell: Cell, base: Cell | None) -> float | None:
    """Difference of a cell's metric against a base's in per cent; None where either is undefined or the base 0."""
    mine, theirs = metric.of(cell), None if base is None else metric.of(base)
    return None if mine is None or not theirs else 100.0 * (mine - theirs) / theirs


def values(view: View, cell: Cell, base: Cell | None = None) -> list[float | None]:
    """A cell's plain numbers under ``headings(view)``; differences rounded to hundredths of a per cent."""
    row: list[float | None] = []
    for metric, column in shown(view):
        value = metric.of(cell)
        row.append(None if value is None else _scaled(value, column.factor))
        if column.change:
            difference = change(BY_KEY[column.change_of or metric.key], cell, base)
            row.append(None if difference is None else round(difference, 2))
    return row


def texts(view: View, cell: Cell, base: Cell | None = None) -> list[float | str | None]:
    """As :func:`values`, written as the columns ask for; differences carry a sign and ``%``."""
    row: list[float | str | None] = []
    for metric, column in shown(view):
        value = metric.of(cell)
        if value is None or not column.form:
            row.append(value)
        else:
            form, _, suffix = column.form.partition("|")
            row.append(f"{_scaled(value, column.factor):{form}}" + (f" {suffix}" if suffix else ""))
        if column.change:
            of = BY_KEY[column.change_of or metric.key]
            mine, theirs = of.of(cell), None if base is None else of.of(base)
            row.append(f"{100 * (mine / theirs - 1):+.1f} %" if mine is not None and theirs else None)
    return row


def logged(cell: Cell) -> dict[str, float | str | None]:
    """What a run logs of a cell to W&B."""
    row: dict[str, float | str | None] = {"policy": cell.policy, "evidence": cell.evidence, "costs": cell.costs}
    return row | {metric.logged: metric.of(cell) for metric in METRICS if metric.logged}


def _scaled(value: float, factor: float) -> float:
    if factor == 1.0:
        # a count stays a whole number
        return value
    # 1e-9 is no binary fraction: dividing by its inverse keeps the last digit
    return value * factor if factor > 1.0 else value / round(1.0 / factor)


def objectives(names: tuple[str, ...]) -> tuple[Metric, ...]:
    """Metrics that tuning calls by these names, in this order.

    Raises:
        UserError: there is none, one is unknown, or one is named twice.
    """
    if not names:
        raise UserError(f"tuning needs at least one objective of {', '.join(OBJECTIVES)}")
    for name in names:
        if name not in OBJECTIVES:
            raise UserError(f"no objective is called {name!r}; there are: {', '.join(OBJECTIVES)}")
    if len(set(names)) != len(names):
        raise UserError(f"an objective is named twice in {', '.join(names)}")
    return tuple(OBJECTIVES[name] for name in names)


def reference() -> str:
    """The table of metrics in ``docs/formats.md``."""
    rows = [f"| `{one.key}` | {one.unit} | {one.better or '–'} | {one.over} | {one.definition} |" for one in METRICS]
    return "\n".join(["| Metric | Unit | Better | Over the run | Meaning |", "|---|---|---|---|---|", *rows])
