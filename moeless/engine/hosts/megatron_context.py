"""Megatron-core's inference context for flat continuous batching, and the parts of a ``GPTModel`` that read it.

A step's tokens lie in one row ``[T, 1, H]``, prefill and decode of many requests mixed. Megatron hands the context
from the model down to every attention layer; these parts take from it what a static or dynamic context would tell
theirs: each token's position, each request's keys and values, the rows whose logits are wanted.

Axes: T tokens of a step, H hidden, D head width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.inference import utils as inference_utils
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from moeless.engine.flat import FlatBatch, KVCache, attend
from moeless.engine.hosts.megatron_release import accepted

try:
    from megatron.core.inference.config import InferenceConfig
except ImportError:
    # older releases: the context takes its settings one by one
    InferenceConfig = None


def inference() -> AbstractContextManager[None]:
    """Tell Megatron that it infers: newer releases ask a flag of the process, older ones whether there is a context."""
    mode = getattr(inference_utils, "InferenceMode", None)
    found: AbstractContextManager[None] = nullcontext() if mode is None else mode.active()
    return found


class FlatContext(BaseInferenceContext):
    """The running requests of one rank.

    Attributes:
        cache: keys and values by layer and request; ``batch`` is the step at work.
        window: positions that a token sees, None for all.
    """

    def __init__(self, cache: KVCache, max_sequence_length: int, window: int | None) -> None:
        settings: dict[str, Any] = {"materialize_only_last_token_logits": False}
        if InferenceConfig is not None:
            settings["inference_config"] = InferenceConfig(**settings, max_sequence_length=max_sequence_length)
        super().__init__(**accepted(BaseInferenceContext, settings))
        self.cache, self.max_sequence_length, self.window = cache, max_sequence_length, window
        self.batch = FlatBatch((), *(torch.empty(0, dtype=torch.int64),) * 3)
        # what Megatron's static path asks for; positions come from the batch
        self.sequence_len_offset = self.batch_size_offset = 0

    def is_static_batching(self) -> bool:
        """Megatron's dynamic path needs its own CUDA kernels; ours takes the other one."""
        return True

    def is_decode_only(self) -> bool:
        """Whether every request of the step gives one token that its prefill made."""
        return all(span.tokens == 1 and span.start > 0 for span in self.batch.spans)

    def wanted(self, _: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """A hook before the output layer: it gets the wanted rows only."""
        return (args[0][self.batch.logit_rows], *args[1:])


class FlatRotary(torch.nn.Module):
    """Rotary angles at the context's positions instead of 0, 1, 2, ..."""

    def __init__(self, dim: int, base: float, device: torch.device) -> None:
        super().__init__()
        self.frequency = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
        self._position_T = torch.empty(0, device=device)

    def get_rotary_seq_len(self, inference_context: FlatContext, *_: Any) -> int:
        """Megatron asks for a length first; the positions are noted here."""
        self._position_T = inference_context.batch.position_T
        return 0

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """Angles ``[T, 1, 1, dim]``."""
        angles = torch.outer(self._position_T.float(), self.frequency)
        return torch.cat((angles, angles), -1)[:, None, None, :]


class FlatSelfAttention(SelfAttention):
    """Megatron's attention whose keys are rotated before they are kept, so that they stay right as requests grow."""

    def _adjust_key_value_for_inference(
        self,
        inference_context: FlatContext,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary_pos_emb: tuple[torch.Tensor, torch.Tensor],
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, Any, None]:
        query, key = (
            apply_rotary_pos_emb(rows, angles, config=self.config, cp_group=self.pg_collection.cp)
            for rows, angles in zip((query, key), rotary_pos_emb, strict=True)
        )
        # a plain attribute: the context is no part of the model
        object.__setattr__(self.core_attention, "context", inference_context)
        return query, key, value, None, self.attn_mask_type, None


class FlatCoreAttention(MegatronModule):
    """Attention over each request's own keys and values, in place of the dot-product core."""

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any) -> None:
        super().__init__(config=config)
        self.layer = layer_number - 1
        self.context: FlatContext | None = None

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None, **_: Any
    ) -> torch.Tensor:
        """``[T, 1, heads, D]`` each to ``[T, 1, heads * D]``."""
        context = self.context
        assert context is not None
        out = attend(
            self.layer,
            context.cache,
            context.batch.spans,
            query[:, 0],
            key[:, 0],
            value[:, 0],
            scale=query.shape[-1] ** -0.5,
            window=context.window,
        )
        return out.reshape(len(out), 1, -1)
