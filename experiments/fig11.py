"""Figure 11: three ways to predict, over the distance; beneath it what they are worth as forecasts of loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.contracts import FloatArray
from moeless.experiments import prediction, verdicts
from moeless.experiments.base import Claim, Data, Drawn, Experiment, Finding, Job, Kind, Options, Plot
from moeless.report import line_figures

SIZE = 512


def _jobs(options: Options) -> Mapping[str, Job]:
    source, methods = prediction.source_of_loads(options)
    return prediction.jobs_of(options, source, methods)


def _gain(series: Mapping[str, line_figures.Line], ours: str, other: str) -> FloatArray | None:
    """Points by which one method is above another, at each distance."""
    if ours not in series or other not in series:
        return None
    return np.asarray(100 * (np.asarray(series[ours].y, np.float64) - np.asarray(series[other].y, np.float64)))


def _points(gain: FloatArray) -> str:
    return f"{gain.min():+.1f} to {gain.max():+.1f} points of top-k recall"


def _findings(
    recall: Mapping[str, line_figures.Line], error: Mapping[str, line_figures.Line], kind: Kind
) -> list[Finding]:
    """The paper's order of its three methods, and what ours is worth, distance by distance."""
    made = []
    raw, tuned, scratch = prediction.COMPARED.values()
    for other in (raw, scratch):
        if (found := _gain(recall, tuned, other)) is not None:
            statement = f"Fine-tuned gates are more accurate than {other} at every distance"
            made.append(Finding(statement, _points(found), bool(found.min() > 0), kind))
    past, ours = prediction.LOADS["history"], prediction.LOADS["blend"]
    if past in error and ours in error:
        gain = np.asarray(error[past].y) - np.asarray(error[ours].y)
        shown = f"relative L1 of {SIZE} tokens lower by {gain.min():.3f} to {gain.max():.3f}"
        made.append(
            Finding(
                "Beyond the paper: the blend forecasts loads better than history", shown, bool(gain.min() > 0), kind
            )
        )
    return made


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
                ylabel=label,
                title=title,
                whole_x=True,
                ylim=limits,
            ),
            f"{caption}, mean over layers, {source.title}; bands: mean of layers' 90 % intervals over test requests "
            f"(n = {count}).",
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
            f"up to +{stated} %",
            None,
            None,
            _points(found),
            source.routing,
            "moeless reproduce fig11",
            f"{source.title}, d = 1 to 5, means over layers; the paper does not define its accuracy",
            verdicts.of_change(float(stated), float(found.max())),
        )
        for what, stated, found in (
            ("raw next gates", 18, _gain(recall, "fine-tuned gates", "raw next gates")),
            ("networks from scratch", 15, _gain(recall, "fine-tuned gates", "networks from scratch")),
        )
        if found is not None
    ]
    return Drawn(plots, data, claims, findings=_findings(recall, error, source.routing))


EXPERIMENT = Experiment(
    name="fig11",
    title="Figure 11: prediction methods over distance",
    question="Are fine-tuned gates better than raw next gates and than networks trained from scratch?",
    stated="Accuracy up to 18 % above raw next gates (Mixtral-offloading) and up to 15 % above networks from scratch "
    "(ProMoE).",
    jobs=_jobs,
    draw=_draw,
)
