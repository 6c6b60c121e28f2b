"""Figure 6: gate inputs resemble each other, so a gate works a few layers early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import prediction
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.statements import Finding
from moeless.report import line_figures

SHOWN = (1, 2, 3, 4)
#: A mean cosine from here on is called alike.
ALIKE = 0.7


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
    nearest = np.asarray(cosine["1"], np.float64)
    by_distance = {name: float(np.mean(np.asarray(line.y))) for name, line in recall.items()}
    first = np.asarray(recall["d = 1"].y, np.float64)
    early, late = first[: len(first) // 2].mean(), first[len(first) // 2 :].mean()
    findings = [
        Finding(
            "gate-inputs-alike",
            "Gate inputs of neighbouring layers are alike",
            "mean cosine similarity {mean:.2f} at d = 1 (lowest layer {lowest:.2f})",
            {"mean": nearest.mean(), "lowest": nearest.min()},
            bool(nearest.mean() >= ALIKE),
            source.routing,
            metric="cosine",
        ),
        Finding(
            "recall-falls-with-distance",
            "Accuracy falls with the distance",
            "raw gates, mean recall at d = 1, 2, …: {each}",
            by_distance,
            bool((np.diff(list(by_distance.values())) < 0).all()),
            source.routing,
            each="{value:.2f}",
            metric="topk_recall",
        ),
        Finding(
            "early-layers-worse",
            "Early layers are predicted worse",
            "raw gates, d = 1: mean recall {lower:.2f} in the lower half of the layers, {upper:.2f} in the upper",
            {"lower": early, "upper": late},
            bool(early < late),
            source.routing,
            metric="topk_recall",
        ),
    ]
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
    data = {"layers": Data(["metric", "distance", "layer", "value", "low", "high"], rows)}
    return Drawn(plots, data, findings=findings)


EXPERIMENT = Experiment(
    name="fig6",
    title="Figure 6: similarity and accuracy per layer",
    question="How alike are gate inputs of nearby layers, and how well does a later gate work early?",
    stated="High cosine similarity; accuracy is worse in early layers and at larger distances (d = 1 to 4).",
    jobs=_jobs,
    draw=_draw,
    lacks=prediction.lacks,
)
