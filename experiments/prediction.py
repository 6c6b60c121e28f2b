"""Figures 6, 7, 11 and 12: how well loads are predicted, by which method, over layers and distances."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moeless.contracts import FloatArray
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import DISTANCES, Source, fitted_predictor, given, input_sources
from moeless.experiments.statements import Claim, Finding, Measured, Stated
from moeless.report import style
from moeless.report.charts import Line, lines

_CELLS = "moeless.experiments.cells.prediction"
#: Method to the name in figures.
METHODS = {"gate_reuse": "raw next gates", "layer_aware": "fine-tuned gates"}
#: The paper's three, then ours and what needs no fitting.
LOADS = METHODS | {"from_scratch": "networks from scratch", "blend": "blend (ours)", "history": "history"}
#: Methods that expert ids suffice for.
IDS = {"transition": "expert ids alone", "blend": "blend (ours)", "last": "last iteration", "history": "history"}
#: Distances of Figure 6.
SHOWN = (1, 2, 3, 4)
#: A mean cosine from here on is called alike, a correlation from here on strong.
ALIKE, STRONG = 0.7, 0.9
#: Tokens of an iteration whose load Figure 11 forecasts, and of one in Figure 12.
FORECAST_TOKENS, SCATTER_TOKENS = 512, 128


def _lacks(options: Options) -> str | None:
    """Why figures about gate inputs cannot be drawn."""
    if input_sources(options):
        return None
    return (
        "no trace given holds gate inputs, which it is about; record them with `moeless trace --router-inputs`, or add "
        "--beside for the bundled model's"
    )


def _source(options: Options, with_inputs: Mapping[str, str], with_ids: Mapping[str, str]) -> tuple[Source, Any]:
    """The first trace with gate inputs, the reader's or the bundled model's; else the reader's first, with what expert
    ids alone allow."""
    inputs = input_sources(options)
    return (inputs[0], with_inputs) if inputs else (given(options)[0], with_ids)


def _of_loads(options: Options) -> tuple[Source, Any]:
    return _source(options, LOADS, IDS)


def _of_pair(options: Options) -> tuple[Source, Any]:
    return _source(options, METHODS, {method: IDS[method] for method in ("history", "transition")})


def _measured(options: Options, source: Source, methods: Iterable[str]) -> dict[str, Job]:
    """What methods measured on a source's test requests."""
    return {
        method: Job(
            f"read how {method} did on {source.title}",
            f"{_CELLS}:measured",
            {},
            (fitted_predictor(options, source, method),),
        )
        for method in methods
    }


def _per_layer(
    found: Mapping[str, Any], metric: str, distance: int, batch_tokens: int = 1, phase: str = "all"
) -> Line | None:
    """A metric over source layers, with its interval."""
    wanted = (metric, distance, batch_tokens, phase)
    rows = [
        row
        for row in found["rows"]
        if (row["metric"], row["distance"], row["batch_tokens"], row["phase"]) == wanted and row["layer"] >= 0
    ]
    rows.sort(key=lambda row: row["layer"])
    return Line(*[[row[name] for row in rows] for name in ("layer", "value", "low", "high")]) if rows else None


def _over_distance(found: Mapping[str, Any], metric: str, batch_tokens: int = 1, phase: str = "all") -> Line:
    """A metric's mean over layers at every distance; the band is the mean of the layers' intervals."""
    kept: list[list[float]] = []
    for distance in DISTANCES:
        line = _per_layer(found, metric, distance, batch_tokens, phase)
        if line is not None and line.low is not None and line.high is not None:
            bands = np.array([line.y, line.low, line.high], np.float64)
            kept.append([distance, *bands.mean(1).tolist()])
    return Line(*[[row[column] for row in kept] for column in range(4)])


def _samples(found: Mapping[str, Any]) -> int:
    """How many requests a figure stands on."""
    return max((int(row["n"]) for row in found["rows"] if row["metric"] == "topk_recall"), default=0)


def _points(line: Line) -> list[list[float]]:
    """Rows of x, y, low and high."""
    return np.array([line.x, line.y, line.low, line.high], np.float64).T.tolist()


def _above(series: Mapping[str, Line], one: str, other: str) -> FloatArray | None:
    """How far one method is above another, at each distance; None where one of them is not there."""
    found = [np.asarray(series[LOADS[name]].y, np.float64) for name in (one, other) if LOADS[name] in series]
    return found[0] - found[1] if len(found) == 2 else None


def _ends(value_D: FloatArray) -> dict[str, float]:
    return {"lowest": value_D.min(), "highest": value_D.max()}


def _similarity_jobs(options: Options) -> Mapping[str, Job]:
    source = input_sources(options)[0]
    params = {"distances": list(SHOWN), "tokens": options.pick(2000, 10_000), "seed": options.seed}
    job = Job(f"compare gate inputs of {source.title}", f"{_CELLS}:similarity", params, (source.job,))
    return {"similarity": job, **_measured(options, source, METHODS)}


def _similarity(options: Options, results: Mapping[str, Any]) -> Drawn:
    source, raw = input_sources(options)[0], results["gate_reuse"]
    cosine = results["similarity"]["cosine"]
    similarity = {f"d = {d}": Line(np.arange(len(values)), values) for d, values in cosine.items()}
    recall = {f"d = {d}": line for d in SHOWN if (line := _per_layer(raw, "topk_recall", d)) is not None}
    plots = {
        "similarity": Plot(
            lines(
                similarity,
                xlabel="layer l",
                ylabel="cosine similarity",
                title="Gate inputs of layers l and l + d",
                whole_x=True,
                ylim=(None, 1.0),
            ),
            f"Mean cosine similarity of a token's gate inputs in two layers, {source.title} "
            f"(n = {results['similarity']['tokens']:,} tokens).",
            source.routing,
            source.label,
        ),
        "recall": Plot(
            lines(
                recall,
                xlabel="layer l",
                ylabel="top-k recall",
                title="Raw gate of layer l + d on layer l",
                whole_x=True,
                ylim=(0, 1.0),
            ),
            f"Share of a token's experts that the raw next gate names, {source.title}; bands: 90 % intervals over "
            f"n = {_samples(raw)} test requests.",
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
        *(
            ["cosine", int(d), layer, value, None, None]
            for d, values in cosine.items()
            for layer, value in enumerate(values)
        ),
        *(
            ["topk_recall", *(row[name] for name in ("distance", "layer", "value", "low", "high"))]
            for row in raw["rows"]
            if row["metric"] == "topk_recall"
        ),
    ]
    data = {"layers": Data(["metric", "distance", "layer", "value", "low", "high"], rows)}
    return Drawn(plots, data, findings=findings)


def _tuning_jobs(options: Options) -> Mapping[str, Job]:
    source = input_sources(options)[0]
    params = {"distance": 1, "batch_tokens": [32, 512]}
    fitted = fitted_predictor(options, source, "layer_aware")
    clock = Job(f"time layer_aware on {source.title}", f"{_CELLS}:timing", params, (fitted,), timed=True)
    return {**_measured(options, source, METHODS), "timing": clock}


def _tuning(options: Options, results: Mapping[str, Any]) -> Drawn:
    source, clock = input_sources(options)[0], results["timing"]
    series = {name: _over_distance(results[method], "topk_recall") for method, name in METHODS.items()}
    plot = Plot(
        lines(
            series,
            xlabel="prediction distance d (layers)",
            ylabel="top-k recall, mean over layers",
            title="Recall with and without fine-tuning",
            whole_x=True,
            ylim=(0, 1.0),
        ),
        f"Share of a token's experts that are predicted, {source.title}; bands: mean of layers' 90 % intervals over "
        f"n = {_samples(results['layer_aware'])} test requests.",
        source.routing,
        source.label,
    )
    rows = [[name, *point] for name, line in series.items() for point in _points(line)]
    gain = _above(series, "layer_aware", "gate_reuse")
    assert gain is not None
    finding = Finding(
        "fine-tuning-gains",
        "Fine-tuning raises the mean accuracy at every distance",
        f"between {{lowest:+.1f}} and {{highest:+.1f}} points of top-k recall, d = 1 to {len(gain)}",
        _ends(100 * gain),
        bool((gain > 0).all()),
        source.routing,
        metric="topk_recall",
    )
    predict_ms = {f"{tokens} tokens": value / 1e3 for tokens, value in clock["predict_microseconds"].items()}
    fitted_on = clock["fit_machine"] or "this CPU"
    claims = [
        Claim(
            "predict-time",
            "Time to predict one layer",
            "",
            Stated((0.2,), "ms", "<", "on a GPU"),
            {"live": Measured(predict_ms, "ms", "predict time", on="this CPU")},
            "lower",
            "measured",
            "moeless reproduce fig7",
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
            "moeless reproduce fig7",
            f"on one core of {fitted_on}, {source.title}, d = 1 to {len(gain)}",
        ),
    ]
    data = {"recall": Data(["method", "d", "recall", "low", "high"], rows, "Recall", True)}
    return Drawn({"main": plot}, data, claims, [finding])


def _comparison(options: Options, results: Mapping[str, Any]) -> Drawn:
    source, methods = _of_loads(options)
    recall = {
        name: _over_distance(results[method], "topk_recall")
        for method, name in methods.items()
        if method != "blend" and _samples(results[method])
    }
    error = {
        name: _over_distance(results[method], "relative_l1", FORECAST_TOKENS, "prefill")
        for method, name in methods.items()
    }
    count = max(_samples(results[method]) for method in methods)
    looks = (
        ("main", recall, "top-k recall", "Recall", (0, 1.0), "Share of a token's experts that are predicted"),
        (
            "load",
            error,
            "relative L1 error",
            f"Load of {FORECAST_TOKENS} tokens",
            (0, None),
            f"Error of the predicted load of {FORECAST_TOKENS} consecutive prompt tokens, as a share of the load",
        ),
    )
    plots = {
        key: Plot(
            lines(
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
        for key, series, label, title, limits, caption in looks
    }
    rows = [
        [name, metric, *point]
        for metric, series in (("topk_recall", recall), (f"relative_l1_{FORECAST_TOKENS}", error))
        for name, line in series.items()
        for point in _points(line)
    ]
    notes = {name: results[method]["notes"] for method, name in methods.items()}
    memory = [[name, note["parameters"], note["memory_bytes"] / 1e6] for name, note in notes.items()]
    data = {
        "accuracy": Data(["method", "metric", "d", "value", "low", "high"], rows, "Accuracy by distance", True),
        "cost": Data(["method", "parameters", "memory (MB)"], memory, "All layers and distances", True),
    }
    claims, findings = [], []
    for other, stated in (("gate_reuse", 18.0), ("from_scratch", 15.0)):
        if (gain := _above(recall, "layer_aware", other)) is None:
            continue
        points = {f"d = {d}": float(value) for d, value in zip(DISTANCES, 100 * gain, strict=False)}
        claims.append(
            Claim(
                f"recall-above-{other}",
                f"Predictor accuracy over {LOADS[other]}",
                LOADS[other],
                Stated((stated,), "%", "up to"),
                {"live": Measured(points, "points of top-k recall", "topk_recall")},
                "higher",
                source.routing,
                "moeless reproduce fig11",
                f"{source.title}, d = 1 to 5, means over layers; the paper does not define its accuracy",
            )
        )
        findings.append(
            Finding(
                f"fine-tuned-above-{other}",
                f"Fine-tuned gates are more accurate than {LOADS[other]} at every distance",
                "{lowest:+.1f} to {highest:+.1f} points of top-k recall",
                _ends(100 * gain),
                bool(gain.min() > 0),
                source.routing,
                metric="topk_recall",
            )
        )
    if (gain := _above(error, "history", "blend")) is not None:
        findings.append(
            Finding(
                "blend-above-history",
                "Beyond the paper: the blend forecasts loads better than history",
                f"relative L1 of {FORECAST_TOKENS} tokens lower by {{lowest:.3f}} to {{highest:.3f}}",
                _ends(gain),
                bool(gain.min() > 0),
                source.routing,
                metric="relative_l1",
            )
        )
    return Drawn(plots, data, claims, findings)


def _scatter_jobs(options: Options) -> Mapping[str, Job]:
    source, methods = _of_pair(options)
    params = {
        "distance": 1,
        "batch_tokens": SCATTER_TOKENS,
        "iterations": options.pick(40, 200),
        "points": 1500,
        "seed": options.seed,
    }
    return {
        method: Job(
            f"correlate loads by {method} on {source.title}",
            f"{_CELLS}:correlation",
            params,
            (source.job, fitted_predictor(options, source, method)),
        )
        for method in methods
    }


def _scatter(options: Options, results: Mapping[str, Any]) -> Drawn:
    source, methods = _of_pair(options)
    look, named = style.series(list(methods.values())), {name: results[method] for method, name in methods.items()}
    with style.canvas(1, 2, figsize=(style.COLUMN, 2.1), sharex=True, sharey=True) as (figure, grid):
        for axes, (name, found) in zip(grid, named.items(), strict=True):
            axes.scatter(found["true"], found["predicted"], s=3, alpha=0.35, color=look[name].colour, linewidths=0)
            top = max(*found["true"], *found["predicted"])
            axes.plot([0, top], [0, top], color=style.INK, linewidth=0.7, linestyle=(0, (4, 2)))
            axes.set_title(f"{name}\nr = {found['pearson']:.3f}", fontweight="normal", fontsize=7.5)
            axes.set_xlabel("true load (tokens)")
        grid[0].set_ylabel("predicted load (tokens)")
    last = list(named.values())[-1]
    plot = Plot(
        figure,
        f"Load of each expert, predicted one layer ahead and true, in decode iterations of {SCATTER_TOKENS} tokens of "
        f"{source.title}'s test requests ({last['pairs']:,} pairs, {len(last['true']):,} shown).",
        source.routing,
        source.label,
    )
    rows = [
        [name, true, predicted]
        for name, found in named.items()
        for true, predicted in zip(found["true"], found["predicted"], strict=True)
    ]
    finding = Finding(
        "predicted-loads-correlate",
        "Predicted and true loads correlate strongly",
        "Pearson correlation: {each}",
        {name: found["pearson"] for name, found in named.items()},
        last["pearson"] >= STRONG,
        source.routing,
        each="{name} {value:.3f}",
        metric="pearson",
    )
    return Drawn({"main": plot}, {"loads": Data(["method", "true", "predicted"], rows)}, findings=[finding])


EXPERIMENTS = (
    Experiment(
        name="fig6",
        title="Figure 6: similarity and accuracy per layer",
        question="How alike are gate inputs of nearby layers, and how well does a later gate work early?",
        stated="High cosine similarity; accuracy is worse in early layers and at larger distances (d = 1 to 4).",
        jobs=_similarity_jobs,
        draw=_similarity,
        lacks=_lacks,
    ),
    Experiment(
        name="fig7",
        title="Figure 7: accuracy with and without fine-tuning",
        question="Does fine-tuning copies of gates help, and how far ahead?",
        stated="Fine-tuning raises the mean accuracy at every distance.",
        jobs=_tuning_jobs,
        draw=_tuning,
        lacks=_lacks,
    ),
    Experiment(
        name="fig11",
        title="Figure 11: prediction methods over distance",
        question="Are fine-tuned gates better than raw next gates and than networks trained from scratch?",
        stated="Accuracy up to 18 % above raw next gates (Mixtral-offloading) and up to 15 % above networks from "
        "scratch (ProMoE).",
        jobs=lambda options: _measured(options, *_of_loads(options)),
        draw=_comparison,
    ),
    Experiment(
        name="fig12",
        title="Figure 12: predicted and true loads",
        question="Do predicted loads follow true ones?",
        stated="Strong correlation.",
        jobs=_scatter_jobs,
        draw=_scatter,
    ),
)
