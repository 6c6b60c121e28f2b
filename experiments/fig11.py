"""Figure 11: three ways to predict, over the distance; beneath it what they are worth as forecasts of loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import prediction
from moeless.experiments.base import Claim, Data, Drawn, Experiment, Job, Options, Plot
from moeless.report import line_figures

SIZE = 512


def _jobs(options: Options) -> Mapping[str, Job]:
    source, methods = prediction.source_of_loads(options)
    return prediction.jobs_of(options, source, methods)


def _gain(series: Mapping[str, line_figures.Line], ours: str, other: str) -> str | None:
    if ours not in series or other not in series:
        return None
    gain = 100 * (np.asarray(series[ours].y) - np.asarray(series[other].y))
    return f"{gain.min():+.1f} to {gain.max():+.1f} points of top-k recall"


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    source, methods = prediction.source_of_loads(options)
    recall = {
        name: prediction.over_distance(results[method], "topk_recall")
        for method, name in methods.items()
        if method != "blend" and prediction.samples(results[method])
    }
    error = {
        name: prediction.over_distance(results[method], "relative_l1", SIZE, "prefill")
        for method, name in methods.items()
    }
    count = max(prediction.samples(results[method]) for method in methods)
    plots = {}
    looks = (
        ("main", recall, "top-k recall", "Recall", (0, 1.0), "Share of a token's experts that are predicted"),
        (
            "load",
            error,
            "relative L1 error",
            f"Load of {SIZE} tokens",
            (0, None),
            f"Error of the predicted load of {SIZE} consecutive prompt tokens, as a share of the load",
        ),
    )
    for key, series, label, title, limits, caption in looks:
        plots[key] = Plot(
            line_figures.lines(
                series,
                xlabel="prediction distance d (layers)",
                ylabel=f"{label}, mean over layers",
                title=title,
                whole_x=True,
                ylim=limits,
            ),
            f"{caption}, {source.title}; bands: mean of layers' 90 % intervals over test requests (n = {count}).",
            source.routing,
            source.label,
        )
    rows = [
        [name, metric, *map(float, row)]
        for metric, series in (("topk_recall", recall), (f"relative_l1_{SIZE}", error))
        for name, line in series.items()
        for row in zip(*map(np.asarray, (line.x, line.y, line.low, line.high)), strict=True)
    ]
    memory = [
        [name, results[method]["notes"]["parameters"], results[method]["notes"]["memory_bytes"] / 1e6]
        for method, name in methods.items()
    ]
    data = {
        "accuracy": Data(["method", "metric", "d", "value", "low", "high"], rows, "Accuracy by distance", True),
        "cost": Data(["method", "parameters", "memory (MB)"], memory, "All layers and distances", True),
    }
    claims = [
        Claim(
            f"Predictor accuracy over {what}",
            stated,
            None,
            None,
            found,
            source.routing,
            "moeless reproduce fig11",
            f"{source.title}, d = 1 to 5, means over layers; the paper does not define its accuracy",
        )
        for what, stated, found in (
            ("raw next gates", "up to +18 %", _gain(recall, "fine-tuned gates", "raw next gates")),
            ("networks from scratch", "up to +15 %", _gain(recall, "fine-tuned gates", "networks from scratch")),
        )
        if found is not None
    ]
    return Drawn(plots, data, claims)


EXPERIMENT = Experiment(
    name="fig11",
    title="Figure 11: prediction methods over distance",
    question="Are fine-tuned gates better than raw next gates and than networks trained from scratch?",
    stated="Accuracy up to 18 % above raw next gates (Mixtral-offloading) and up to 15 % above networks from scratch "
    "(ProMoE).",
    jobs=_jobs,
    draw=_draw,
)
