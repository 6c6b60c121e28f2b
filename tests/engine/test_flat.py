"""Flat batching gives every request its own attention."""

from __future__ import annotations

import pytest
import torch

from moeless.engine.flat import FlatSpan, KVCache, attend

HEADS, GROUPS, D = 4, 2, 8


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, sinks: bool
) -> torch.Tensor:
    """Attention of one whole sequence, written out."""
    n = len(query)
    key, value = key.repeat_interleave(HEADS // GROUPS, 1), value.repeat_interleave(HEADS // GROUPS, 1)
    out = torch.empty(n, HEADS, D)
    for i in range(n):
        first = 0 if window is None else max(0, i - window + 1)
        for h in range(HEADS):
            logits = key[first : i + 1, h] @ query[i, h] * D**-0.5
            if sinks:
                logits = torch.cat([logits, torch.tensor([0.3])])
            shares = logits.softmax(0)[: i + 1 - first]
            out[i, h] = shares @ value[first : i + 1, h]
    return out


@pytest.mark.parametrize(("window", "sinks"), [(None, False), (3, False), (3, True), (None, True)])
def test_chunked_prefill_and_decode_of_mixed_requests_equal_whole_sequences(window: int | None, sinks: bool) -> None:
    random = torch.Generator().manual_seed(0)
    lengths = {0: 7, 1: 4}
    whole = {r: [torch.randn(n, g, D, generator=random) for g in (HEADS, GROUPS, GROUPS)] for r, n in lengths.items()}
    cache = KVCache()
    # iterations: request 0 in two chunks, then both decode, mixed in one step
    steps = [[(0, 0, 3)], [(0, 3, 5), (1, 0, 3)], [(1, 3, 4), (0, 5, 6)], [(0, 6, 7)]]
    got: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for step in steps:
        spans = [FlatSpan(r, a, b, lengths[r]) for r, a, b in step]
        rows = [torch.cat([whole[r][i][a:b] for r, a, b in step]) for i in range(3)]
        sink = torch.full((HEADS,), 0.3) if sinks else None
        out = attend(0, cache, spans, *rows, scale=D**-0.5, window=window, sinks_H=sink)
        for span, part in zip(spans, torch.split(out, [span.tokens for span in spans]), strict=True):
            got[span.request].append(part)
    for r in lengths:
        torch.testing.assert_close(torch.cat(got[r]), reference(*whole[r], window, sinks), rtol=1e-4, atol=1e-5)


def test_a_released_request_leaves_no_keys() -> None:
    cache = KVCache()
    rows = torch.ones(2, GROUPS, D)
    cache.append(0, FlatSpan(5, 0, 2, 4), rows, rows)
    cache.release(5)
    keys, _ = cache.append(0, FlatSpan(5, 0, 1, 4), 2 * rows[:1], rows[:1])
    assert keys.shape[0] == 1
    assert float(keys.max()) == 2.0
