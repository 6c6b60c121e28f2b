"""Figure 11: three ways to predict, over the distance; beneath it what they are worth as forecasts of loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.contracts import FloatArray
from moeless.experiments import prediction
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import DISTANCES
from moeless.experiments.statements import Claim, Finding, Kind, Measured, Stated
from moeless.report import line_figures

SIZE = 512


def _jobs(options: Options) -> Mapping[str, Job]:
    source, methods = prediction.source_of_loads(options)
    return prediction.jobs_of(options, source, methods)


def _gain(series: Mapping[str, line_figures.Line], one: str, other: str) -> FloatArray | None:
    """How far one method is above another, at each distance; None where one of them is not there."""
    found = [series.get(prediction.LOADS[method]) for method in (one, other)]
    if None in found:
        return None
    above, below = (np.asarray(line.y, np.float64) for line in found if line is not None)
    return np.asarray(above - below)


def _by_distance(gain: FloatArray) -> dict[str, float]:
    return {f"d = {d}": float(value) for d, value in zip(DISTANCES, gain, strict=False)}


def _findings(
    recall: Mapping[str, line_figures.Line], error: Mapping[str, line_figures.Line], kind: Kind
) -> list[Finding]:
    """The paper's order of its three methods, and what ours is worth, distance by distance."""
    made = []
    for other in ("gate_reuse", "from_scratch"):
        if (gain := _gain(recall, "layer_aware", other)) is not None:
            made.append(
                Finding(
                    f"fine-tuned-above-{other}",
                    f"Fine-tuned gates are more accurate than {prediction.LOADS[other]} at every distance",
                    "{lowest:+.1f} to {highest:+.1f} points of top-k recall",
                    {"lowest": 100 * gain.min(), "highest": 100 * gain.max()},
                    bool(gain.min() > 0),
                    kind,
                    metric="topk_recall",
                )
            )
    if (gain := _gain(error, "history", "blend")) is not None:
        made.append(
            Finding(
                "blend-above-history",
                "Beyond the paper: the blend forecasts loads better than history",
                f"relative L1 of {SIZE} tokens lower by {{lowest:.3f}} to {{highest:.3f}}",
                {"lowest": gain.min(), "highest": gain.max()},
                bool(gain.min() > 0),
                kind,
                metric="relative_l1",
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
            f"recall-above-{other}",
            f"Predictor accuracy over {prediction.LOADS[other]}",
            prediction.LOADS[other],
            Stated((stated,), "%", "up to"),
            {"live": Measured(_by_distance(100 * gain), "points of top-k recall", "topk_recall")},
            "higher",
            source.routing,
            "moeless reproduce fig11",
            f"{source.title}, d = 1 to 5, means over layers; the paper does not define its accuracy",
        )
        for other, stated in (("gate_reuse", 18.0), ("from_scratch", 15.0))
        if (gain := _gain(recall, "layer_aware", other)) is not None
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
