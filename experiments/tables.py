"""Tables 1 and 2: the models that are served, and the memory of all load predictors of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeless.experiments.base import Data, Drawn, Experiment, Options, no_jobs
from moeless.experiments.statements import Claim, Measured, Stated
from moeless.spec import MoESpec, preset

#: As the paper states them: active and total parameters (billions), experts per token, experts, layers.
MODELS = {
    "mixtral-8x7b": (12.9, 46.7, 2, 8, 32),
    "phi-3.5-moe": (6.6, 42.0, 2, 16, 32),
    "llama-4-scout": (17.0, 109.0, 1, 16, 48),
}
#: Mixtral-offloading, ProMoE, MoEless; MB as the paper states them.
MEMORY = {
    "mixtral-8x7b": (1.92, 128.32, 1.92),
    "phi-3.5-moe": (4.16, 128.64, 4.16),
    "llama-4-scout": (3.84, 120.48, 3.84),
}
#: Hidden width of the networks from scratch that reproduces the paper's ProMoE column.
SCRATCH_WIDTH = 512
BYTES = 2.0


def _models(options: Options, results: Mapping[str, Any]) -> Drawn:
    rows: list[list[Any]] = []
    warnings = []
    for name in options.models or tuple(MODELS):
        spec = preset(name)
        mine = (spec.active_params / 1e9, spec.total_params / 1e9, spec.K, spec.E, spec.L)
        rows.append([name, "derived", *mine, spec.expert_bytes / 2**20])
        if name in MODELS:
            rows.append([name, "stated", *MODELS[name], None])
            off = max(abs(a - b) / b for a, b in zip(mine, MODELS[name], strict=True))
            if off > 0.02:
                warnings.append(f"{name}: our counts from shapes differ from the paper's table by {100 * off:.1f} %.")
    columns = ["model", "evidence", "active (B)", "total (B)", "experts per token", "experts", "MoE layers"]
    caption = "Parameters derived from published shapes, beside what the paper's table states"
    return Drawn(data={"models": Data([*columns, "one expert (MiB)"], rows, caption, show=True)}, warnings=warnings)


def gate_bytes(spec: MoESpec) -> float:
    """One gate in 16 bits: the raw gate, or the paper's fine-tuned copy of it."""
    return BYTES * spec.router_params


def scratch_bytes(spec: MoESpec) -> float:
    """One two-layer network from scratch, H × 512 × E, in 16 bits."""
    return BYTES * SCRATCH_WIDTH * (spec.hidden_size + spec.num_experts)


def _sizes(name: str) -> dict[str, float]:
    """MiB of a model's predictors, one per MoE layer."""
    spec = preset(name)
    sizes = {"fine-tuned gates": gate_bytes(spec), "networks from scratch": scratch_bytes(spec)}
    return {method: spec.L * size / 2**20 for method, size in sizes.items()}


def _memory(options: Options, results: Mapping[str, Any]) -> Drawn:
    rows: list[list[Any]] = []
    for name in options.models or tuple(MEMORY):
        gates, scratch = _sizes(name).values()
        rows.append([name, "derived", gates, scratch, gates])
        if name in MEMORY:
            rows.append([name, "stated", *MEMORY[name]])
    columns = ["model", "evidence", "raw next gates (MiB)", "networks from scratch (MiB)", "fine-tuned gates (MiB)"]
    caption = "One predictor per MoE layer (one distance), 16-bit weights"
    text = (
        "The paper's figures are reproduced by rounding one layer's MiB to two decimals and multiplying by the number "
        "of layers; networks from scratch have a hidden width of 512. Its Llama-4-Scout row is half of what 48 MoE "
        "layers give: it counts 24."
    )
    claims = [
        Claim(
            f"predictor-memory-{name}",
            f"Predictor memory, {name}: fine-tuned gates / networks from scratch",
            name,
            Stated((gates, scratch), "MB"),
            dict.fromkeys(("paper_rules", "physical"), Measured(_sizes(name), "MiB", "predictor memory")),
            "lower",
            "derived",
            "moeless reproduce table2",
            "the paper counts 24 of the model's 48 MoE layers" if name == "llama-4-scout" else "rounding per layer",
        )
        for name, (_, scratch, gates) in MEMORY.items()
    ]
    return Drawn(data={"memory": Data(columns, rows, caption, show=True)}, claims=claims, text=[text])


EXPERIMENTS = (
    Experiment(
        name="table1",
        title="Table 1: models",
        question="Which models are served, and how large is one expert?",
        stated="Mixtral-8x7B 12.9/46.7 B, Phi-3.5-MoE 6.6/42 B, Llama-4-Scout 17/109 B (active/total).",
        jobs=no_jobs,
        draw=_models,
    ),
    Experiment(
        name="table2",
        title="Table 2: predictor memory",
        question="How much memory do all of a model's load predictors take?",
        stated="Mixtral 1.92 / 128.32 / 1.92 MB, Phi-3.5-MoE 4.16 / 128.64 / 4.16, Llama-4-Scout 3.84 / 120.48 / 3.84.",
        jobs=no_jobs,
        draw=_memory,
    ),
)
