"""Figure 12: predicted against true loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeless.experiments import prediction
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import fitted_predictor
from moeless.experiments.statements import Finding
from moeless.report import style

SIZE = 128
#: A correlation from here on is strong.
STRONG = 0.9


def _jobs(options: Options) -> Mapping[str, Job]:
    source, methods = prediction.source_of_pair(options)
    params = {
        "distance": 1,
        "batch_tokens": SIZE,
        "iterations": options.pick(40, 200),
        "points": 1500,
        "seed": options.seed,
    }
    return {
        method: Job(
            f"correlate loads by {method} on {source.title}",
            "moeless.experiments.cells.prediction:correlation",
            params,
            (source.job, fitted_predictor(options, source, method)),
        )
        for method in methods
    }


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    source, methods = prediction.source_of_pair(options)
    look = style.series(list(methods.values()))
    with style.drawing() as plt:
        figure, grid = plt.subplots(1, 2, figsize=(style.COLUMN, 2.1), layout="constrained", sharex=True, sharey=True)
        for axes, (method, name) in zip(grid, methods.items(), strict=True):
            found = results[method]
            axes.scatter(found["true"], found["predicted"], s=3, alpha=0.35, color=look[name].colour, linewidths=0)
            top = max(*found["true"], *found["predicted"])
            axes.plot([0, top], [0, top], color=style.INK, linewidth=0.7, linestyle=(0, (4, 2)))
            axes.set_title(f"{name}\nr = {found['pearson']:.3f}", fontweight="normal", fontsize=7.5)
            axes.set_xlabel("true load (tokens)")
        grid[0].set_ylabel("predicted load (tokens)")
        plt.close(figure)
    found = results[list(methods)[-1]]
    plot = Plot(
        figure,
        f"Load of each expert, predicted one layer ahead and true, in decode iterations of {SIZE} tokens of "
        f"{source.title}'s test requests ({found['pairs']:,} pairs, {len(found['true']):,} shown).",
        source.routing,
        source.label,
    )
    rows = [
        [name, true, predicted]
        for method, name in methods.items()
        for true, predicted in zip(results[method]["true"], results[method]["predicted"], strict=True)
    ]
    finding = Finding(
        "predicted-loads-correlate",
        "Predicted and true loads correlate strongly",
        "Pearson correlation: {each}",
        {name: results[method]["pearson"] for method, name in methods.items()},
        found["pearson"] >= STRONG,
        source.routing,
        each="{name} {value:.3f}",
        metric="pearson",
    )
    data = {"loads": Data(["method", "true", "predicted"], rows)}
    return Drawn({"main": plot}, data, findings=[finding])


EXPERIMENT = Experiment(
    name="fig12",
    title="Figure 12: predicted and true loads",
    question="Do predicted loads follow true ones?",
    stated="Strong correlation.",
    jobs=_jobs,
    draw=_draw,
)
