"""What an iteration's tokens are routed to: the trace's rows of its spans, counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray, Int32Array, IntArray, Iteration
from moeless.errors import UserError
from moeless.simulator import token_rows
from moeless.workloads.lengths import Workload
from moeless.workloads.spans import span_columns


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
    request, start, stop, prefill = span_columns(iteration.spans)
    ranks = iteration.rank_of_request
    rank = np.array([ranks[r] for r in request.tolist()], np.int64)
    return SpanColumns(request, start, stop, prefill, rank)


class Replay:
    """Replays a token trace's routing for a workload's requests.

    Args:
        topk_TLK: expert ids, u16.
        workload: whose requests replay which rows of it.
        token_T: ids of the tokens, where they are known.

    Raises:
        UserError: an expert id or a row is out of range.
    """

    def __init__(
        self,
        topk_TLK: NDArray[np.integer],
        workload: Workload,
        num_experts: int,
        num_ranks: int,
        token_T: NDArray[np.int32] | None = None,
    ) -> None:
        self.token_T = token_T
        self.topk_TLK = np.ascontiguousarray(topk_TLK, np.uint16)
        self.num_experts, self.num_ranks = num_experts, num_ranks
        if len(self.topk_TLK) and int(self.topk_TLK.max()) >= num_experts:
            raise UserError(f"the trace names expert {int(self.topk_TLK.max())} of a model with {num_experts}")
        self.base_N = workload.base_N
        self.row_F = np.empty(0, np.uint32) if workload.row_F is None else workload.row_F
        last = max(
            (int(self.base_N[r.id]) + r.prompt_tokens + r.output_tokens - 1 for r in workload.requests), default=0
        )
        have = len(self.row_F) if len(self.row_F) else len(self.topk_TLK)
        if last > have or (len(self.row_F) and int(self.row_F.max()) >= len(self.topk_TLK)):
            raise UserError("the workload replays rows that the trace does not have")

    def loads(self, spans: SpanColumns) -> IntArray:
        """Tokens by layer, source rank and expert, ``[L, S, E]``."""
        load_LSE = np.zeros((self.topk_TLK.shape[1], self.num_ranks, self.num_experts), np.int64)
        start_N = self.base_N[spans.request_N] + spans.start_N
        token_rows.count_loads(self.topk_TLK, start_N, spans.stop_N - spans.start_N, spans.rank_N, self.row_F, load_LSE)
        return load_LSE

    def sorted_tokens(self, spans: SpanColumns) -> tuple[IntArray, IntArray]:
        """Rows of ``topk_TLK`` and source ranks of an iteration's tokens, in order of the ranks, ``[T]`` each."""
        count_N = spans.stop_N - spans.start_N
        row_T, rank_T = np.empty((2, int(count_N.sum())), np.int64)
        start_N = self.base_N[spans.request_N] + spans.start_N
        token_rows.sort_tokens(start_N, count_N, spans.rank_N, self.row_F, self.num_ranks, row_T, rank_T)
        return row_T, rank_T

    def rows(self, spans: SpanColumns) -> IntArray:
        """Rows of ``topk_TLK`` that are the iteration's tokens, ``[T]``."""
        start_N = self.base_N[spans.request_N] + spans.start_N
        count_N = spans.stop_N - spans.start_N
        index = np.repeat(start_N - np.cumsum(count_N) + count_N, count_N) + np.arange(int(count_N.sum()))
        return self.row_F[index].astype(np.int64) if len(self.row_F) else index


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


def balanced_topk(rank_N: IntArray, gpu_E: Int32Array, num_ranks: int, top_k: int) -> NDArray[np.uint16]:
    """Expert ids of one layer that give :func:`balanced_loads` for one token of each rank given, ``[N, K]``."""
    load_LSE = np.zeros((1, num_ranks, len(gpu_E)), np.int64)
    load_LSE[0, :, 0] = np.bincount(rank_N, minlength=num_ranks) * top_k
    dealt_SE = balanced_loads(load_LSE, gpu_E)[0]
    topk_NK = np.empty((len(rank_N), top_k), np.uint16)
    topk_NK[np.argsort(rank_N, kind="stable")] = np.repeat(
        np.tile(np.arange(len(gpu_E)), num_ranks), dealt_SE.ravel()
    ).reshape(-1, top_k)
    return topk_NK


def rank_sums(spans: SpanColumns, num_ranks: int) -> FloatArray:
    """What non-expert costs ask of each rank: tokens, attended positions, KV entries, logit rows, ``[S, 4]``."""
    sums_SX = np.zeros((num_ranks, 4))
    token_rows.span_sums(spans.start_N, spans.stop_N, spans.rank_N, sums_SX)
    return sums_SX
