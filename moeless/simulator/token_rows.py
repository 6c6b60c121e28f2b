"""Compiled counting of an iteration's tokens from the spans of rows that its requests replay.

Axes: L layers, S source ranks, E experts, N spans, F rows in the workload's order, T tokens, X the columns of
``span_sums``.
"""

from __future__ import annotations

import numpy as np

from moeless.jit import njit


@njit(cache=True, nogil=True)
def count_loads(topk_TLK, start_N, count_N, rank_N, row_F, load_LSE):  # type: ignore[no-untyped-def]
    """Tokens by layer, source rank and expert of spans of rows (of ``row_F``'s rows where it is not empty)."""
    _, layers, top = topk_TLK.shape
    for n in range(len(start_N)):
        rank = rank_N[n]
        for at in range(start_N[n], start_N[n] + count_N[n]):
            row = row_F[at] if len(row_F) else at
            for layer in range(layers):
                for k in range(top):
                    load_LSE[layer, rank, topk_TLK[row, layer, k]] += 1


@njit(cache=True, nogil=True)
def sort_tokens(start_N, count_N, rank_N, row_F, num_ranks, row_T, rank_T):  # type: ignore[no-untyped-def]
    """Rows and source ranks of spans of rows (of ``row_F``'s where it is not empty), in order of the ranks."""
    at_S = np.zeros(num_ranks + 1, np.int64)
    for n in range(len(start_N)):
        at_S[rank_N[n] + 1] += count_N[n]
    for s in range(num_ranks):
        at_S[s + 1] += at_S[s]
    for n in range(len(start_N)):
        s = rank_N[n]
        for at in range(start_N[n], start_N[n] + count_N[n]):
            row_T[at_S[s]], rank_T[at_S[s]] = row_F[at] if len(row_F) else at, s
            at_S[s] += 1


@njit(cache=True, nogil=True)
def span_sums(start_N, stop_N, rank_N, sums_SX):  # type: ignore[no-untyped-def]
    """Tokens, attended positions, KV entries and logit rows of each rank, added to ``sums_SX`` ``[S, 4]``."""
    for n in range(len(start_N)):
        s, count = rank_N[n], stop_N[n] - start_N[n]
        sums_SX[s, 0] += count
        sums_SX[s, 1] += (start_N[n] + stop_N[n] + 1) * count / 2.0
        sums_SX[s, 2] += stop_N[n]
        sums_SX[s, 3] += 1
