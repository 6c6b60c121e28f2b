"""``moeless export-plan``: a plan in the form that a serving engine reads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moeless.cli import common


class Engine(StrEnum):
    """Serving engines with a plan format."""

    sglang = "sglang"
    tensorrt_llm = "tensorrt-llm"
    vllm = "vllm"


@common.command()
def command(
    plan: Annotated[Path, typer.Argument(help="Plan file written by `moeless plan`.")],
    engine: Annotated[Engine, typer.Option("--engine", help="Who reads it; vllm also stands for DeepSeek's EPLB.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Preset with the layer indices; default: the plan's.")
    ] = None,
    fill: Annotated[bool, typer.Option("--fill", help="Fill empty slots with copies of what a GPU holds.")] = False,
    equal_shares: Annotated[
        bool, typer.Option("--equal-shares", help="Let the engine split evenly where the plan fixes unequal shares.")
    ] = False,
    out: common.ArtefactOption = Path("plan-export.json"),
    dry: common.DryRunOption = False,
) -> common.Report:
    """Export a plan: SGLang (.json), TensorRT-LLM (.yaml), vLLM or DeepSeek (.npz, .json).

    Example: moeless export-plan plan.json --engine sglang --out location.json
    """
    from moeless.contracts import ModelPlan
    from moeless.files import check_writable, read_json
    from moeless.placement.export import check_shares, slot_table, write_export
    from moeless.placement.moe_layers import layers_of

    read = ModelPlan.from_json(read_json(plan))
    check_writable(out)
    moe_layers, num_layers = layers_of(read, model)
    if dry:
        if not equal_shares:
            check_shares(read)
        table = slot_table(read, fill=fill)
        common.dry_run(
            {"plan": str(plan), "engine": engine.value, "out": str(out)},
            {"slots_per_layer": table.expert_LP.shape[1], "filled_slots": table.filled},
        )
    table = write_export(
        read, engine.value, out, moe_layers=moe_layers, num_layers=num_layers, fill=fill, equal_shares=equal_shares
    )
    found = {
        "out": str(out),
        "engine": engine.value,
        "slots_per_layer": int(table.expert_LP.shape[1]),
        "gpus": read.num_gpus,
        "filled_slots": table.filled,
    }
    return common.Report(found, [common.facts("Exported plan", found, ["what", "value"])])
