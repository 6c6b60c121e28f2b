"""Figure 3: load over time under real arrivals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import Source, routing_sources
from moeless.experiments.statements import Finding, unanimous
from moeless.report import style

#: A standard deviation of so much of the mean is strong variation.
VARIES = 0.25
_CELLS = "moeless.experiments.cells.routing"


def _jobs(options: Options) -> Mapping[str, Job]:
    params = {
        "arrivals": "azure-like",
        "seconds": options.pick(120, 600),
        "request_rate": None,
        "seed": options.seed,
    }
    return {
        source.title: Job(f"batch arrivals on {source.title}", f"{_CELLS}:over_time", params, (source.job,))
        for source in routing_sources(options)
    }


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    plots, rows, findings = {}, [], []
    for source in routing_sources(options):
        found = results[source.title]
        plots[source.title] = Plot(
            _figure(source, found),
            f"One-second batches of {found['arrivals']} arrivals replaying {source.title}'s routing: requests, tokens, "
            f"and experts with at least one token, mean over layers "
            f"(n = {sum(row[1] for row in found['rows']):,} requests).",
            source.routing,
            source.label,
        )
        rows += [[source.title, *row] for row in found["rows"]]
        findings.append(_finding(source, found["rows"]))
    columns = ["model", "second", "requests", "tokens", "active experts in prefill", "active experts in decode"]
    return Drawn(plots, {"seconds": Data(columns, rows, "Each second of the workload")}, findings=findings)


def _finding(source: Source, rows: list[list[Any]]) -> Finding:
    """Standard deviation over mean of each series, seconds without requests left out of the last."""
    spreads = {}
    for column, name in ((1, "requests"), (2, "tokens"), (4, "active experts in decode")):
        value = np.array([row[column] for row in rows if row[column] is not None], np.float64)
        spreads[name] = float(value.std() / value.mean()) if value.size and value.mean() else 0.0
    return Finding(
        f"variation-{source.key}",
        "Arrivals, tokens and active experts vary strongly over time",
        "{about}, standard deviation over mean from second to second: {each}",
        spreads,
        unanimous(value >= VARIES for value in spreads.values()),
        source.routing,
        about=source.title,
        each="{name} {value:.2f}",
        metric="coefficient of variation",
    )


def _figure(source: Source, found: Mapping[str, Any]) -> Any:
    table = np.array([[np.nan if cell is None else cell for cell in row] for row in found["rows"]], np.float64)
    second = table[:, 0]
    with style.drawing() as plt:
        figure, grid = plt.subplots(3, 1, figsize=(style.COLUMN, 3.7), layout="constrained", sharex=True)
        grid[0].step(second, table[:, 1], where="mid", color=style.SERIES[0], linewidth=1.0)
        grid[0].set_ylabel("requests/s")
        grid[1].step(second, table[:, 2] / 1e3, where="mid", color=style.SERIES[1], linewidth=1.0)
        grid[1].set_ylabel("tokens/s (k)")
        grid[2].plot(second, table[:, 3], color=style.SERIES[2], linewidth=1.1, label="prefill")
        grid[2].plot(second, table[:, 4], color=style.SERIES[3], linewidth=1.1, linestyle="--", label="decode")
        grid[2].axhline(found["experts"], color=style.INK, linewidth=0.8, linestyle=(0, (4, 2)), label="all experts")
        grid[2].set(ylabel="active experts", xlabel="time (s)", ylim=(0, None))
        figure.legend(loc="outside lower center", ncols=3)
        figure.suptitle(f"Load over time, {source.title}", x=0.01, ha="left", fontsize=8.5, fontweight="bold")
        plt.close(figure)
    return figure


EXPERIMENT = Experiment(
    name="fig3",
    title="Figure 3: load over time",
    question="How do arrivals, tokens and active experts vary over time?",
    stated="All three vary strongly over time: Phi-3.5-MoE on LMSYS-Chat-1M under Azure arrivals.",
    jobs=_jobs,
    draw=_draw,
)
