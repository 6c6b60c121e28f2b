"""Table 2: memory of all load predictors of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeless.experiments.base import Data, Drawn, Experiment, Options, no_jobs
from moeless.experiments.statements import Claim, Measured, Stated
from moeless.spec import MoESpec, preset

#: Mixtral-offloading, ProMoE, MoEless; MB as the paper states them.
STATED = {
    "mixtral-8x7b": (1.92, 128.32, 1.92),
    "phi-3.5-moe": (4.16, 128.64, 4.16),
    "llama-4-scout": (3.84, 120.48, 3.84),
}
#: Hidden width of the networks from scratch that reproduces the paper's ProMoE column.
SCRATCH_WIDTH = 512
BYTES = 2.0


def gate_bytes(spec: MoESpec) -> float:
    """One gate in 16 bits: the raw gate, or the paper's fine-tuned copy of it."""
    return BYTES * spec.router_params


def scratch_bytes(spec: MoESpec) -> float:
    """One two-layer network from scratch, H × 512 × E, in 16 bits."""
    return BYTES * SCRATCH_WIDTH * (spec.hidden_size + spec.num_experts)


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    rows: list[list[Any]] = []
    for name in options.models or tuple(STATED):
        spec = preset(name)
        rows.append(
            [name, "derived", *(spec.L * size(spec) / 2**20 for size in (gate_bytes, scratch_bytes, gate_bytes))]
        )
        if name in STATED:
            rows.append([name, "stated", *STATED[name]])
    columns = ["model", "evidence", "raw next gates (MiB)", "networks from scratch (MiB)", "fine-tuned gates (MiB)"]
    caption = "One predictor per MoE layer (one distance), 16-bit weights"
    text = (
        "The paper's figures are reproduced by rounding one layer's MiB to two decimals and multiplying by the number "
        "of layers; networks from scratch have a hidden width of 512. Its Llama-4-Scout row is half of what 48 MoE "
        "layers give: it counts 24."
    )
    claims = []
    for name, stated in STATED.items():
        spec = preset(name)
        sizes = {"fine-tuned gates": gate_bytes, "networks from scratch": scratch_bytes}
        mine = Measured(
            {which: spec.L * size(spec) / 2**20 for which, size in sizes.items()}, "MiB", "predictor memory"
        )
        note = "the paper counts 24 of the model's 48 MoE layers" if name == "llama-4-scout" else "rounding per layer"
        claims.append(
            Claim(
                f"predictor-memory-{name}",
                f"Predictor memory, {name}: fine-tuned gates / networks from scratch",
                name,
                Stated((stated[2], stated[1]), "MB"),
                {"paper_rules": mine, "physical": mine},
                "lower",
                "derived",
                "moeless reproduce table2",
                note,
            )
        )
    return Drawn(data={"memory": Data(columns, rows, caption, show=True)}, claims=claims, text=[text])


EXPERIMENT = Experiment(
    name="table2",
    title="Table 2: predictor memory",
    question="How much memory do all of a model's load predictors take?",
    stated="Mixtral 1.92 / 128.32 / 1.92 MB, Phi-3.5-MoE 4.16 / 128.64 / 4.16, Llama-4-Scout 3.84 / 120.48 / 3.84.",
    jobs=no_jobs,
    draw=_draw,
)
