"""Figures and page of one routing trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moeless.contracts import FloatArray
from moeless.report import page, style
from moeless.report.line_figures import Line, lines
from moeless.report.routing_figures import layer_imbalance, popularity
from moeless.traces.inspect import Description
from moeless.tracking.run import Run


def coactivation(ratio_EE: FloatArray, layer: int) -> Any:
    """Heat map of pairs of experts; 1 is independence."""
    with style.drawing() as plt:
        figure, axes = plt.subplots(figsize=(style.COLUMN, 3.0), layout="constrained")
        log = np.log2(np.where(ratio_EE > 0, ratio_EE, np.nan))
        finite = np.abs(log[np.isfinite(log)])
        limit = max(0.5, float(np.quantile(finite, 0.98))) if len(finite) else 1.0
        image = axes.imshow(log, cmap="PuOr_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.grid(False)
        axes.set(xlabel="expert", ylabel="expert", title=f"Experts used together, MoE layer {layer}")
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("log2 (observed ÷ independent)")
        bar.outline.set_visible(False)
        plt.close(figure)
    return figure


def bars(values: dict[str, float], title: str, xlabel: str) -> Any:
    """Horizontal bars, the largest on top."""
    names = sorted(values, key=lambda name: values[name])
    with style.drawing() as plt:
        figure, axes = plt.subplots(figsize=(style.COLUMN, 0.6 + 0.2 * len(names)), layout="constrained")
        short = [name if len(name) <= 30 else f"…{name[-29:]}" for name in names]
        axes.barh(np.arange(len(names)), [values[name] for name in names], color=style.SERIES[0], height=0.7)
        axes.set_yticks(np.arange(len(names)), short)
        axes.grid(False, axis="y")
        axes.set(xlabel=xlabel, title=title)
        plt.close(figure)
    return figure


def draw(made: Description, run: Run) -> list[page.Figure]:
    """Save every figure that the trace's kind allows; captions say what was counted."""
    model = made.facts["model"]
    evidence = "synthetic" if made.facts["made up (synthetic)"] == "yes" else "measured"
    label = "synthetic trace" if evidence == "synthetic" else "bundled model" if model == "bundled" else ""
    mark = f" ({label})" if label else ""
    drawn: list[page.Figure] = []

    def add(name: str, figure: Any, caption: str) -> None:
        drawn.append(page.Figure(run.figure(name, figure, name, caption), caption, evidence=evidence, label=label))

    add(
        "popularity",
        popularity(made.load_LE, f"Expert popularity, {model}{mark}"),
        "Load of each expert over an even share, all rows of the trace.",
    )
    if made.curves:
        series = {name: Line(x, y) for name, (x, y) in made.curves.items()}
        add(
            "imbalance-batch",
            lines(
                series,
                xlabel="tokens of the iteration",
                ylabel="imbalance (max ÷ mean)",
                title=f"Imbalance on {made.gpus} GPUs{mark}",
                reference=1.0,
                reference_label="balanced",
                log_x=True,
            ),
            f"Contiguous experts on {made.gpus} GPUs, mean over layers of the per-layer ratio, then over iterations.",
        )
    chosen = dict(list(made.gpu_curves.items())[:3])
    if "decode" in made.curves:
        chosen |= {name: curve for name, curve in made.gpu_curves.items() if name.startswith("decode step of 16 ")}
    add(
        "imbalance-gpus",
        lines(
            {_short(name): Line(x, y) for name, (x, y) in chosen.items()},
            xlabel="GPUs",
            ylabel="imbalance (max ÷ mean)",
            title=f"Imbalance by GPU count{mark}",
            reference=1.0,
            whole_x=True,
        ),
        "Contiguous experts, mean over layers of the per-layer ratio.",
    )
    add(
        "imbalance-layers",
        layer_imbalance(
            {_short(name): made.imbalance_layers[name] for name in chosen},
            title=f"Imbalance per layer, {made.gpus} GPUs{mark}",
        ),
        f"Contiguous experts on {made.gpus} GPUs, per MoE layer.",
    )
    if made.drift is not None:
        add(
            "drift",
            lines(
                {"distance": Line(np.arange(1, len(made.drift) + 1), made.drift)},
                xlabel="tenth of the trace, in order",
                ylabel="share of load elsewhere",
                title=f"Drift over the trace{mark}",
                whole_x=True,
                ylim=(0, None),
            ),
            "Total-variation distance of each part's expert shares from the whole trace's, mean over layers.",
        )
    if made.categories:
        add(
            "categories",
            bars(made.categories, f"Categories differ{mark}", "share of load elsewhere"),
            "Total-variation distance of a category's expert shares from the whole trace's, mean over layers.",
        )
    prefill, decode = made.load_prefill_LE, made.load_decode_LE
    if prefill is not None and decode is not None and prefill.sum() and decode.sum():
        from moeless.traces.statistics import imbalance_L

        add(
            "prefill-decode",
            layer_imbalance(
                {"prefill": imbalance_L(prefill[None], made.gpus), "decode": imbalance_L(decode[None], made.gpus)},
                title=f"All prefill against all decode tokens{mark}",
            ),
            f"Imbalance of each phase's summed load on {made.gpus} GPUs, contiguous experts.",
        )
    if made.coactivation_EE is not None:
        add(
            "coactivation",
            coactivation(made.coactivation_EE, made.coactivation_layer),
            "Pairs of experts that serve one token, observed over what independence gives.",
        )
    return drawn


def _short(window: str) -> str:
    name = window.partition(" (")[0]
    for long, brief in (("all tokens of ", ""), ("all iterations of ", ""), (" requests pooled", " requests")):
        name = name.replace(long, brief)
    return name.replace("the trace", "whole trace").replace("decode step of 16 requests", "decode of 16")


def write_page(made: Description, run: Run, trace: Path, notes: tuple[str, ...]) -> Path:
    """Write figures, ``inspect.json`` and the page of a trace into the run folder."""
    from moeless.files import write_json

    figures = draw(made, run)
    write_json(run.path / "inspect.json", made.to_json())
    facts = page.Table(["", ""], [[name, value] for name, value in made.facts.items()])
    table = page.Table(
        ["window", *(f"{count} GPUs" for count in made.gpu_counts)],
        [[name, *values] for name, values in made.windows],
        "Imbalance (max ÷ mean over GPUs), contiguous experts: mean over layers of the per-layer ratio, then windows.",
    )
    sections = [
        page.Section("The trace", [facts]),
        page.Section("Imbalance", [table]),
        page.Section("Figures", figures),
    ]
    return page.write(
        run.path,
        f"Routing of {made.facts['model']}",
        f"What the trace {trace.name} holds, and how its load falls on GPUs.",
        sections,
        manifest=run.snapshot(),
        warnings=list(notes),
    )
