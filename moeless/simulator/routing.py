"""What an iteration's tokens are routed to: the trace's rows of its spans, counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moeless.contracts import FloatArray, Int32Array, IntArray, Iteration, Phase, Request
from moeless.errors import UserError


@dataclass(frozen=True)
class SpanColumns:
    """An iteration's spans as columns of one length."""

    request_N: IntArray
    start_N: IntArray
    stop_N: IntArray
    prefill_N: NDArray[np.bool_]
    rank_N: IntArray


def columns(iteration: Iteration) -> SpanColumns:
    """The spans as columns, whatever sequence the scheduler keeps them in."""
    spans: Any = iteration.spans
    if hasattr(spans, "request_N"):
        request, start, stop = spans.request_N, spans.start_N, spans.stop_N
        prefill = np.asarray(spans.phase_N) == Phase.PREFILL
    else:
        request = np.array([span.request for span in spans], np.int64)
        start = np.array([span.start for span in spans], np.int64)
        stop = np.array([span.stop for span in spans], np.int64)
        prefill = np.array([span.phase == Phase.PREFILL for span in spans], np.bool_)
    ranks = iteration.rank_of_request
    rank = np.array([ranks[r] for r in request.tolist()], np.int64)
    return SpanColumns(request, start, stop, prefill, rank)


@njit(cache=True)
def _count(topk_TLK, row_N, count_N, rank_N, load_LSE):  # type: ignore[no-untyped-def]
    _, layers, top = topk_TLK.shape
    for n in range(len(row_N)):
        rank = rank_N[n]
        for row in range(row_N[n], row_N[n] + count_N[n]):
            for layer in range(layers):
                for k in range(top):
                    load_LSE[layer, rank, topk_TLK[row, layer, k]] += 1


class Replay:
    """Replays a token trace's routing for a workload's requests.

    Position p of a request is row ``first_row + p`` of the trace's request that it replays.

    Args:
        topk_TLK: expert ids of the whole trace.
        first_row_Q, rows_Q: where each trace request starts, and how many rows it has.
        requests: the workload; each must name its trace request and ask for no more positions than that has.

    Raises:
        UserError: a request names none, or is longer than what was recorded.
    """

    def __init__(
        self,
        topk_TLK: NDArray[np.integer],
        first_row_Q: IntArray,
        rows_Q: IntArray,
        requests: Sequence[Request],
        num_experts: int,
        num_ranks: int,
    ) -> None:
        self.topk_TLK = np.ascontiguousarray(topk_TLK)
        self.num_experts, self.num_ranks = num_experts, num_ranks
        size = max((request.id for request in requests), default=-1) + 1
        self.first_row = np.zeros(size, np.int64)
        for request in requests:
            if request.trace_request is None:
                raise UserError(f"request {request.id} replays no trace request, so its routing is unknown")
            have, need = int(rows_Q[request.trace_request]), request.prompt_tokens + request.output_tokens - 1
            if need > have:
                raise UserError(
                    f"request {request.id} needs {need} routed tokens, but trace request "
                    f"{request.trace_request} has {have}"
                )
            self.first_row[request.id] = first_row_Q[request.trace_request]

    def loads(self, spans: SpanColumns) -> IntArray:
        """Tokens by layer, source rank and expert, ``[L, S, E]``."""
        load_LSE = np.zeros((self.topk_TLK.shape[1], self.num_ranks, self.num_experts), np.int64)
        first = self.first_row[spans.request_N] + spans.start_N
        _count(self.topk_TLK, first, spans.stop_N - spans.start_N, spans.rank_N, load_LSE)
        return load_LSE

    def rows(self, spans: SpanColumns) -> IntArray:
        """Trace rows of the iteration's tokens, ``[T]``."""
        first = self.first_row[spans.request_N] + spans.start_N
        count = spans.stop_N - spans.start_N
        offset = np.repeat(first - np.cumsum(count) + count, count)
        return offset + np.arange(int(count.sum()))


def balanced_loads(load_LSE: IntArray, gpu_E: Int32Array) -> IntArray:
    """The oracle's override: each source's assignments dealt evenly to the experts, GPU after GPU.

    Lossy: tokens go to experts that their router did not choose. Totals of every source stay; totals of any two
    experts differ by at most one, and so do those of two GPUs with equally many experts.
    """
    experts = load_LSE.shape[-1]
    rank_on_gpu = np.zeros(experts, np.int64)
    for gpu in np.unique(gpu_E):
        mine = np.flatnonzero(gpu_E == gpu)
        rank_on_gpu[mine] = np.arange(len(mine))
    order = np.lexsort((gpu_E, rank_on_gpu))
    total_LS = load_LSE.sum(-1)
    start_LS = np.cumsum(total_LS, 1) - total_LS
    out = np.repeat((total_LS // experts)[:, :, None], experts, 2)
    place = (np.arange(experts)[None, None] - start_LS[:, :, None]) % experts
    out += place < (total_LS % experts)[:, :, None]
    dealt = np.empty_like(out)
    dealt[:, :, order] = out
    return dealt


def past_sums(spans: SpanColumns, num_ranks: int) -> tuple[IntArray, FloatArray, FloatArray, IntArray]:
    """What non-expert costs need: tokens, attended positions, KV entries and logit rows of each rank, ``[S]``."""
    count = spans.stop_N - spans.start_N
    attended = (spans.start_N + spans.stop_N + 1) * count / 2.0
    sums_S = [
        np.bincount(spans.rank_N, weights=values, minlength=num_ranks)
        for values in (count, attended, spans.stop_N, np.ones(len(count)))
    ]
    return sums_S[0].astype(np.int64), sums_S[1].astype(float), sums_S[2].astype(float), sums_S[3].astype(np.int64)
