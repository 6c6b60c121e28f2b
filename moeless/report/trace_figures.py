"""Figures and page of one routing trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moeless.files import write_json
from moeless.report import page
from moeless.report.charts import Bars, Line, bars, coactivation, layer_imbalance, lines, popularity
from moeless.traces.inspect import Description
from moeless.traces.statistics import imbalance_L
from moeless.tracking.run import Run


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
        far = sorted(made.categories.items(), key=lambda one: -one[1])
        add(
            "categories",
            bars(
                # long names end in what tells them apart
                [name if len(name) <= 30 else f"…{name[-29:]}" for name, _ in far],
                {"": Bars([share for _, share in far])},
                xlabel="share of load elsewhere",
                title=f"Categories differ{mark}",
                reference=None,
            ),
            "Total-variation distance of a category's expert shares from the whole trace's, mean over layers.",
        )
    prefill, decode = made.load_prefill_LE, made.load_decode_LE
    if prefill is not None and decode is not None and prefill.sum() and decode.sum():
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
