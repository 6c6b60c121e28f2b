"""Time of everything outside the routed experts, by roofline from the model's shapes.

Attention, gates, norms, shared and dense FFNs and the output head are replicated on every rank (data parallel,
as in the paper); a rank works on the tokens of its own requests, and each MoE layer's exchange makes all ranks
wait for the slowest one.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeless.cluster import Cluster
from moeless.contracts import FloatArray, IntArray
from moeless.spec import BYTES_PER_WEIGHT, MoESpec


@dataclass(frozen=True)
class NonExpertTime:
    """Seconds of one iteration: per MoE layer, ahead of its experts; and once, for dense layers and the head."""

    per_moe_layer: float
    once: float


class NonExpertCosts:
    """Non-expert time of one (model, cluster) pair.

    A part that does F floating-point operations and moves B bytes (weights once, KV cache of the tokens' past)
    takes ``max(F / peak, B / bandwidth)``; each layer pays one launch. Scores and values cost
    ``4 * heads * head_dim`` operations per token and past position.
    """

    def __init__(self, spec: MoESpec, cluster: Cluster) -> None:
        self.spec, self.cluster = spec, cluster
        weight_bytes = BYTES_PER_WEIGHT[spec.dtype]
        attention = spec.attention
        params = attention.params(spec.hidden_size)
        self._attention_params = float(params)
        self._moe_params = float(params + spec.router_params + spec.shared_params)
        self._dense_params = float(params + spec.expert_matrices * spec.hidden_size * spec.dense_intermediate_size)
        self._head_params = float(spec.embedding_params)
        self._weight_bytes = weight_bytes
        self._score_flops = 4.0 * attention.heads * attention.head_dim
        self._kv_bytes = attention.kv_values_per_token() * weight_bytes

    def seconds(
        self, tokens_S: IntArray, past_S: FloatArray, context_S: FloatArray, heads_S: IntArray
    ) -> NonExpertTime:
        """Time of one iteration.

        Args:
            tokens_S: tokens of each rank.
            past_S: sum over a rank's tokens of the positions each attends to.
            context_S: sum over a rank's requests of their KV entries, each read once.
            heads_S: tokens of each rank whose logits are needed.
        """
        per_layer = self._layer(self._moe_params, tokens_S, past_S, context_S)
        dense = self.spec.num_layers - self.spec.L
        once = dense * self._layer(self._dense_params, tokens_S, past_S, context_S) if dense else 0.0
        most = float(heads_S.max(initial=0))
        if most:
            once += self._roofline(2.0 * self._head_params * most, self._head_params * self._weight_bytes)
        return NonExpertTime(per_layer, once)

    def _layer(self, params: float, tokens_S: IntArray, past_S: FloatArray, context_S: FloatArray) -> float:
        worst = 0.0
        for tokens, past, context in zip(tokens_S.tolist(), past_S.tolist(), context_S.tolist(), strict=True):
            if tokens:
                flops = 2.0 * params * tokens + self._score_flops * past
                moved = params * self._weight_bytes + self._kv_bytes * context
                worst = max(worst, self._roofline(flops, moved))
        return worst + self.cluster.device.launch_seconds if worst else 0.0

    def _roofline(self, flops: float, moved: float) -> float:
        return max(flops / self.cluster.device.flops, moved / self.cluster.device.memory_bandwidth)
