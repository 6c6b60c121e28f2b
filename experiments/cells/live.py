"""Cells that serve for real: the bundled model on expert-parallel ranks of this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


def serve(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """Serve prompts live under every policy, outputs verified; result rows, and how many cores the ranks shared.

    Params: ``policies``, ``ranks``, ``requests``, ``output_tokens``, ``request_rate``, ``seed``. ``needs`` are fitted
    predictors.
    """
    from moeless.engine.bench import LiveBench, LiveConfig, check_verified
    from moeless.machine import cores
    from moeless.metrics import schema

    config = LiveConfig(
        policies=tuple(params["policies"]),
        max_requests=params["requests"],
        output_tokens=params["output_tokens"],
        request_rate=params["request_rate"],
        token_budget=2048,
        max_running=64,
        host=host(),
        ranks=params["ranks"],
        device="cpu",
        predictors=tuple(Path(need) for need in needs),
        verify=True,
        predict=False,
        seed=params["seed"],
    )
    with tempfile.TemporaryDirectory(prefix="moeless-live-") as scratch:
        cells = LiveBench(config).run(Path(scratch))
    check_verified(cells)
    return {"cells": [schema.to_json(cell) for cell in cells], "cores": cores(), "host": config.host}


def host() -> str:
    """Megatron, the paper's own, where it is installed."""
    from importlib.util import find_spec

    return "megatron" if find_spec("megatron") is not None else "transformers"
