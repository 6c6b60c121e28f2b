"""``moeless models``: the built-in model shapes and what follows from them."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.text import Text

from moeless.cli import common
from moeless.spec import PRESETS, MoESpec, preset


def _row(spec: MoESpec) -> list[object]:
    return [
        spec.name,
        f"{spec.L}/{spec.num_layers}",
        str(spec.E),
        str(spec.K),
        f"{spec.total_params / 1e9:.2f}",
        f"{spec.active_params / 1e9:.2f}",
        spec.expert_dtype,
        f"{spec.expert_bytes / 2**20:.2f}",
        f"{spec.expert_flops / 1e6:.1f}",
        f"{spec.kv_bytes_per_token / 1024:.1f}",
    ]


def _facts(spec: MoESpec) -> dict[str, object]:
    derived = {
        "moe_layer_count": spec.L,
        "expert_params": spec.expert_params,
        "expert_bytes": spec.expert_bytes,
        "expert_flops_per_token": spec.expert_flops,
        "non_expert_bytes": spec.non_expert_bytes,
        "kv_bytes_per_token": spec.kv_bytes_per_token,
        "total_params": spec.total_params,
        "active_params": spec.active_params,
    }
    return dataclasses.asdict(spec) | derived


@common.command()
def command(
    name: Annotated[str | None, typer.Argument(help="One preset; all of them when left out.")] = None,
) -> common.Report:
    """List model presets: layers, experts, bytes, FLOPs, parameters.

    Example: moeless models mixtral-8x7b
    """
    chosen = [preset(name)] if name else list(PRESETS.values())
    facts = [_facts(spec) for spec in chosen]
    columns = [
        "model",
        "MoE/all layers",
        "experts",
        "top-k",
        "params (B)",
        "active (B)",
        "expert type",
        "expert (MiB)",
        "MFLOP/token/expert",
        "KV (KiB/token)",
    ]
    sources = [Text(f"source: {spec.source}") for spec in chosen if name]
    rows = common.table("Model presets", columns, [_row(spec) for spec in chosen])
    return common.Report(facts[0] if name else facts, [rows, *sources])
