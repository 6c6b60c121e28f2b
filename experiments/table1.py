"""Table 1: the models that are served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeless.experiments.base import Data, Drawn, Experiment, Options, no_jobs
from moeless.spec import preset

#: As the paper states them: active and total parameters (billions), experts per token, experts, layers.
STATED = {
    "mixtral-8x7b": (12.9, 46.7, 2, 8, 32),
    "phi-3.5-moe": (6.6, 42.0, 2, 16, 32),
    "llama-4-scout": (17.0, 109.0, 1, 16, 48),
}


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    rows: list[list[Any]] = []
    warnings = []
    for name in options.models or tuple(STATED):
        spec = preset(name)
        mine = (spec.active_params / 1e9, spec.total_params / 1e9, spec.K, spec.E, spec.L)
        stated = STATED.get(name)
        rows.append([name, "derived", *mine, spec.expert_bytes / 2**20])
        if stated:
            rows.append([name, "stated", *stated, None])
            off = max(abs(a - b) / b for a, b in zip(mine, stated, strict=True))
            if off > 0.02:
                warnings.append(f"{name}: our counts from shapes differ from the paper's table by {100 * off:.1f} %.")
    columns = ["model", "evidence", "active (B)", "total (B)", "experts per token", "experts", "MoE layers"]
    columns.append("one expert (MiB)")
    caption = "Parameters derived from published shapes, beside what the paper's table states"
    return Drawn(data={"models": Data(columns, rows, caption, show=True)}, warnings=warnings)


EXPERIMENT = Experiment(
    name="table1",
    title="Table 1: models",
    question="Which models are served, and how large is one expert?",
    stated="Mixtral-8x7B 12.9/46.7 B, Phi-3.5-MoE 6.6/42 B, Llama-4-Scout 17/109 B (active/total).",
    jobs=no_jobs,
    draw=_draw,
)
