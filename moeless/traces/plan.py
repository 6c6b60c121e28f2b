"""What a recording will take: memory, disk and work, before it starts."""

from __future__ import annotations

from typing import Any

from moeless.spec import MoESpec


def recording_plan(
    spec: MoESpec,
    *,
    requests: int,
    prompt_tokens: float,
    new_tokens: float,
    batch_size: int,
    router_inputs: bool,
) -> dict[str, Any]:
    """Estimates in bytes, tokens and floating-point operations.

    Args:
        prompt_tokens: mean prompt length of a request; ``new_tokens``: tokens generated at most.
    """
    rows = requests * (prompt_tokens + max(0.0, new_tokens - 1))
    row_bytes = spec.L * spec.K * 4
    inputs = spec.L * spec.hidden_size * 2 if router_inputs else 0
    in_flight = batch_size * (prompt_tokens + new_tokens)
    weights = spec.non_expert_bytes + spec.L * spec.num_experts * spec.expert_bytes
    return {
        "requests": requests,
        "rows": round(rows),
        "batches": -(-requests // batch_size),
        "model_bytes": weights,
        "kv_cache_bytes": round(in_flight * spec.kv_bytes_per_token),
        "recording_memory_bytes": round(in_flight * (row_bytes + inputs)),
        # ids and weights compress to about two fifths, router inputs hardly
        "trace_bytes": round(rows * (row_bytes * 0.4 + inputs)),
        "forward_flops": round(2 * rows * spec.active_params),
    }
