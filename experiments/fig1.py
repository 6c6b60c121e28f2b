"""Figure 1: how unevenly experts are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import routing_sources
from moeless.experiments.statements import Finding
from moeless.report import routing_figures

#: The busiest expert at so many times the even share is strong skew: its GPU then works that much longer.
SKEWED = 1.5
_CELLS = "moeless.experiments.cells.routing"


def _jobs(options: Options) -> Mapping[str, Job]:
    return {
        source.title: Job(f"count loads of {source.title}", f"{_CELLS}:popularity", needs=(source.job,))
        for source in routing_sources(options)
    }


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    plots: dict[str, Plot] = {}
    rows: list[list[Any]] = []
    findings = []
    for source in routing_sources(options):
        found = results[source.title]
        load_LE = np.array(found["load_LE"], np.float64)
        layers = sorted({0, len(load_LE) // 2, len(load_LE) - 1})
        size = f"{found['tokens']:,} tokens of {found['requests']:,} requests"
        skew_L = load_LE.max(1) / load_LE.mean(1)
        plots[source.title] = Plot(
            routing_figures.expert_bars(
                {f"layer {layer}": load_LE[layer] for layer in layers}, f"Load per expert, {source.title}"
            ),
            f"Share of the load that each expert of {source.title} gets, in three layers; dashed: an even share "
            f"({size}).",
            source.routing,
            source.label,
        )
        plots[f"{source.title}-layers"] = Plot(
            routing_figures.popularity(load_LE, f"All layers, {source.title}"),
            f"Load of every expert in every MoE layer of {source.title} ({size}).",
            source.routing,
            source.label,
        )
        rows += [
            [source.title, layer, expert, int(load)]
            for layer, load_E in enumerate(load_LE)
            for expert, load in enumerate(load_E)
        ]
        findings.append(
            Finding(
                f"skew-{source.key}",
                "Experts of a layer are loaded very unevenly",
                "{about}: the busiest expert of a layer gets {mean:.2f} times the even share, mean over layers (from "
                "{lowest:.2f} to {highest:.2f})",
                {"mean": skew_L.mean(), "lowest": skew_L.min(), "highest": skew_L.max()},
                bool(skew_L.mean() >= SKEWED),
                source.routing,
                about=source.title,
                metric="skew",
            )
        )
    data = {"loads": Data(["model", "layer", "expert", "assignments"], rows, "Assignments per layer and expert")}
    return Drawn(plots, data, findings=findings)


EXPERIMENT = Experiment(
    name="fig1",
    title="Figure 1: load per expert",
    question="Are experts of a layer loaded evenly?",
    stated="Strong skew in three layers each of Mixtral-8x7B on ShareGPT and Phi-3.5-MoE on LMSYS-Chat-1M.",
    jobs=_jobs,
    draw=_draw,
)
