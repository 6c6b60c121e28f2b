"""Figure 7: what fine-tuning is worth at each distance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import prediction
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.statements import Claim, Finding, Measured, Stated
from moeless.report import line_figures


def _jobs(options: Options) -> Mapping[str, Job]:
    return {**prediction.measured_jobs(options), "timing": prediction.timing_job(options, "layer_aware")}


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    source = prediction.source(options)
    series = {
        name: prediction.over_distance(results[method], "topk_recall") for method, name in prediction.METHODS.items()
    }
    count = prediction.samples(results["layer_aware"])
    plot = Plot(
        line_figures.lines(
            series,
            xlabel="prediction distance d (layers)",
            ylabel="top-k recall, mean over layers",
            title="Recall with and without fine-tuning",
            whole_x=True,
            ylim=(0, 1.0),
        ),
        f"Share of a token's experts that are predicted, {source.title}; bands: mean of layers' 90 % intervals over "
        f"n = {count} test requests.",
        source.routing,
        source.label,
    )
    rows = [
        [name, d, y, low, high]
        for name, line in series.items()
        for d, y, low, high in zip(*map(np.asarray, (line.x, line.y, line.low, line.high)), strict=True)
    ]
    rows = [[row[0], *map(float, row[1:])] for row in rows]
    gain = np.asarray(series["fine-tuned gates"].y) - np.asarray(series["raw next gates"].y)
    finding = Finding(
        "fine-tuning-gains",
        "Fine-tuning raises the mean accuracy at every distance",
        f"between {{lowest:+.1f}} and {{highest:+.1f}} points of top-k recall, d = 1 to {len(gain)}",
        {"lowest": 100 * gain.min(), "highest": 100 * gain.max()},
        bool((gain > 0).all()),
        source.routing,
        metric="topk_recall",
    )
    clock = results["timing"]
    predict_ms = {f"{tokens} tokens": value / 1e3 for tokens, value in clock["predict_microseconds"].items()}
    fitted_on = clock["fit_machine"] or "this CPU"
    command = "moeless reproduce fig7"
    claims = [
        Claim(
            "predict-time",
            "Time to predict one layer",
            "",
            Stated((0.2,), "ms", "<", "on a GPU"),
            {"live": Measured(predict_ms, "ms", "predict time", on="this CPU")},
            "lower",
            "measured",
            command,
            f"on one core of this CPU, {source.title}'s shapes, fine-tuned gates",
        ),
        Claim(
            "fit-time",
            "Time to fit all predictors of a model",
            "",
            Stated((5.0,), "min", "<", "on one GPU"),
            {"live": Measured({source.key: clock["fit_seconds"] / 60}, "min", "fit time", on=fitted_on)},
            "lower",
            "measured",
            command,
            f"on one core of {fitted_on}, {source.title}, d = 1 to {len(gain)}",
        ),
    ]
    return Drawn(
        {"main": plot},
        {"recall": Data(["method", "d", "recall", "low", "high"], rows, "Recall", True)},
        claims,
        [finding],
    )


EXPERIMENT = Experiment(
    name="fig7",
    title="Figure 7: accuracy with and without fine-tuning",
    question="Does fine-tuning copies of gates help, and how far ahead?",
    stated="Fine-tuning raises the mean accuracy at every distance.",
    jobs=_jobs,
    draw=_draw,
    lacks=prediction.lacks,
)
