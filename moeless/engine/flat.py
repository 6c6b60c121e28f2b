"""Flat continuous batching: a step's tokens in one row, each request's keys and values kept apart.

Prefill and decode mix without padding; a token sees its own request's earlier positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class FlatSpan:
    """Positions ``start`` to ``stop`` of one request; ``capacity`` is the number of positions it will ever have."""

    request: int
    start: int
    stop: int
    capacity: int

    @property
    def tokens(self) -> int:
        """Rows of this span."""
        return self.stop - self.start


@dataclass(frozen=True)
class FlatBatch:
    """One rank's part of an iteration.

    Attributes:
        spans: in row order; token_T and position_T hold their tokens one span after the other.
        logit_rows: rows whose logits are wanted.
    """

    spans: Sequence[FlatSpan]
    token_T: torch.Tensor
    position_T: torch.Tensor
    logit_rows: torch.Tensor


class KVCache:
    """Keys and values of running requests, by layer."""

    def __init__(self) -> None:
        self._kv: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def append(
        self, layer: int, span: FlatSpan, key_TGD: torch.Tensor, value_TGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a span's keys and values ``[tokens, kv heads, D]``; all of the request's so far."""
        at = (layer, span.request)
        if at not in self._kv:
            self._kv[at] = (
                key_TGD.new_empty((span.capacity, *key_TGD.shape[1:])),
                value_TGD.new_empty((span.capacity, *value_TGD.shape[1:])),
            )
        keys, values = self._kv[at]
        keys[span.start : span.stop] = key_TGD
        values[span.start : span.stop] = value_TGD
        return keys[: span.stop], values[: span.stop]

    def release(self, request: int) -> None:
        """Forget a request."""
        for at in [at for at in self._kv if at[1] == request]:
            del self._kv[at]

    def clear(self) -> None:
        """Forget everything."""
        self._kv.clear()


def attend(
    layer: int,
    cache: KVCache,
    spans: Sequence[FlatSpan],
    query_THD: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention of every span over its own request, ``[T, heads, D]``.

    Args:
        window: positions that a token sees at most, itself included.
        chunk: positions fall into chunks of so many, and a token sees its own chunk only (Llama-4).
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        sinks_H: one extra logit per head that takes part in the softmax and has no value (gpt-oss).
    """
    outs, row = [], 0
    for span in spans:
        rows = slice(row, row + span.tokens)
        row += span.tokens
        keys, values = cache.append(layer, span, key_TGD[rows], value_TGD[rows])
        query = query_THD[rows].transpose(0, 1)
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        mask = _mask(span, window, chunk, query.device)
        if softcap is None and sinks_H is None:
            out = functional.scaled_dot_product_attention(
                query[None], keys[None], values[None], attn_mask=mask, scale=scale, enable_gqa=True
            )[0]
        else:
            out = _explicit(query, keys, values, mask, scale, softcap, sinks_H)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


def _mask(span: FlatSpan, window: int | None, chunk: int | None, device: torch.device) -> torch.Tensor | None:
    seen_at_least = min(span.stop if reach is None else reach for reach in (window, chunk))
    if span.tokens == 1 and span.stop <= seen_at_least:
        return None
    query = torch.arange(span.start, span.stop, device=device)[:, None]
    key = torch.arange(span.stop, device=device)[None]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return seen if chunk is None else seen & (key // chunk == query // chunk)


def _explicit(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    repeat = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(repeat, 0), values.repeat_interleave(repeat, 0)
    logits = (query @ keys.transpose(1, 2)).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    if sinks_H is None:
        return (logits.softmax(-1).to(values.dtype)) @ values
    sink = sinks_H.float().view(-1, 1, 1).expand(-1, logits.shape[1], 1)
    shares = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    return shares.to(values.dtype) @ values
