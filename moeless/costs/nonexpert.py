"""Time of everything outside the routed experts, by roofline from the model's shapes.

Attention, gates, norms, shared and dense FFNs and the output head are replicated on every rank (data parallel,
as in the paper); a rank works on the tokens of its own requests, and each MoE layer's exchange makes all ranks
wait for the slowest one.
"""

from __future__ import annotations

from typing import NamedTuple

from moeless.cluster import Cluster
from moeless.contracts import FloatArray
from moeless.jit import njit
from moeless.spec import BYTES_PER_WEIGHT, MoESpec


class NonExpertTerms(NamedTuple):
    """The model's shapes as numbers for compiled code; parameters are counts, ``*_bytes`` bytes."""

    moe_params: float
    dense_params: float
    dense_layers: int
    head_params: float
    weight_bytes: float
    score_flops: float
    kv_bytes: float
    flops: float
    bandwidth: float
    launch_seconds: float


class NonExpertTime(NamedTuple):
    """Seconds of one iteration: per MoE layer, ahead of its experts; and once, for dense layers and the head."""

    per_moe_layer: float
    once: float


@njit(cache=True, inner=True)
def _layer(params, sums_SX, terms):  # type: ignore[no-untyped-def]
    worst = 0.0
    for s in range(sums_SX.shape[0]):
        tokens, past, context = sums_SX[s, 0], sums_SX[s, 1], sums_SX[s, 2]
        if tokens > 0:
            flops = 2.0 * params * tokens + terms.score_flops * past
            moved = params * terms.weight_bytes + terms.kv_bytes * context
            worst = max(worst, flops / terms.flops, moved / terms.bandwidth)
    return worst + terms.launch_seconds if worst > 0.0 else 0.0


@njit(cache=True)
def nonexpert_times(sums_SX, terms):  # type: ignore[no-untyped-def]
    """Seconds per MoE layer, and once; ``sums_SX`` as in :meth:`NonExpertCosts.seconds`."""
    per_layer = _layer(terms.moe_params, sums_SX, terms)
    once = terms.dense_layers * _layer(terms.dense_params, sums_SX, terms) if terms.dense_layers else 0.0
    rows = sums_SX[:, 3].max()
    if rows > 0:
        once += max(
            2.0 * terms.head_params * rows / terms.flops, terms.head_params * terms.weight_bytes / terms.bandwidth
        )
    return per_layer, once


class NonExpertCosts:
    """Non-expert time of one (model, cluster) pair.

    A part that does F floating-point operations and moves B bytes (weights once, KV cache of the tokens' past)
    takes ``max(F / peak, B / bandwidth)``; each layer pays one launch. Scores and values cost
    ``4 * heads * head_dim`` operations per token and past position.
    """

    def __init__(self, spec: MoESpec, cluster: Cluster) -> None:
        attention, device = spec.attention, cluster.device
        params = attention.params(spec.hidden_size)
        weight_bytes = BYTES_PER_WEIGHT[spec.dtype]
        self.terms = NonExpertTerms(
            moe_params=float(params + spec.router_params + spec.shared_params),
            dense_params=float(params + spec.expert_matrices * spec.hidden_size * spec.dense_intermediate_size),
            dense_layers=spec.num_layers - spec.L,
            head_params=float(spec.embedding_params),
            weight_bytes=weight_bytes,
            score_flops=4.0 * attention.heads * attention.head_dim,
            kv_bytes=attention.kv_values_per_token() * weight_bytes,
            flops=device.flops,
            bandwidth=device.memory_bandwidth,
            launch_seconds=device.launch_seconds,
        )

    def seconds(self, sums_SX: FloatArray) -> NonExpertTime:
        """Time of one iteration.

        Args:
            sums_SX: of each rank its tokens, the positions that they attend to, the KV entries that its requests
                hold (each read once), and the rows of the output head, ``[S, 4]``.
        """
        return NonExpertTime(*nonexpert_times(sums_SX, self.terms))
