"""Figure 6: gate inputs resemble each other, so a gate works a few layers early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import prediction
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.report import line_figures

SHOWN = (1, 2, 3, 4)


def _jobs(options: Options) -> Mapping[str, Job]:
    source = prediction.source(options)
    params = {"distances": list(SHOWN), "tokens": options.pick(2000, 10_000), "seed": options.seed}
    function = "moeless.experiments.cells.prediction:similarity"
    made = {"similarity": Job(f"compare gate inputs of {source.title}", function, params, (source.job,))}
    return made | prediction.measured_jobs(options)


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    source = prediction.source(options)
    cosine = results["similarity"]["cosine"]
    tokens = results["similarity"]["tokens"]
    similarity = {f"d = {d}": line_figures.Line(np.arange(len(values)), values) for d, values in cosine.items()}
    raw = results["gate_reuse"]
    recall = {f"d = {d}": line for d in SHOWN if (line := prediction.per_layer(raw, "topk_recall", d)) is not None}
    count = prediction.samples(raw)
    plots = {
        "similarity": Plot(
            line_figures.lines(
                similarity,
                xlabel="layer l",
                ylabel="cosine similarity",
                title="Gate inputs of layers l and l + d",
                whole_x=True,
                ylim=(None, 1.0),
            ),
            f"Mean cosine similarity of a token's gate inputs in two layers, {source.title} (n = {tokens:,} tokens).",
            source.routing,
            source.label,
        ),
        "recall": Plot(
            line_figures.lines(
                recall,
                xlabel="layer l",
                ylabel="top-k recall",
                title="Raw gate of layer l + d on layer l",
                whole_x=True,
                ylim=(0, 1.0),
            ),
            f"Share of a token's experts that the raw next gate names, {source.title}; bands: 90 % intervals over "
            f"n = {count} test requests.",
            source.routing,
            source.label,
        ),
    }
    rows = [
        ["cosine", int(d), layer, value, None, None]
        for d, values in cosine.items()
        for layer, value in enumerate(values)
    ]
    rows += [
        ["topk_recall", row["distance"], row["layer"], row["value"], row["low"], row["high"]]
        for row in raw["rows"]
        if row["metric"] == "topk_recall"
    ]
    return Drawn(plots, {"layers": Data(["metric", "distance", "layer", "value", "low", "high"], rows)})


EXPERIMENT = Experiment(
    name="fig6",
    title="Figure 6: similarity and accuracy per layer",
    question="How alike are gate inputs of nearby layers, and how well does a later gate work early?",
    stated="High cosine similarity; accuracy is worse in early layers and at larger distances (d = 1 to 4).",
    jobs=_jobs,
    draw=_draw,
)
