"""Triton kernels of the hot path: places of assignments, dispatch permutation, gated activation, combine, forecast.

Optional: ``available`` says whether they can run. They are checked against float64 by Triton's interpreter and have
never run on a GPU: the engine takes torch's own operations until ``benchmarks/bench_gpu.py`` shows which are faster.

Axes: T tokens, K top-k, N = T*K assignments, R replicas, E experts, M most copies of one expert, H hidden, I width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moeless.contracts import Int32Array, IntArray

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

#: Past the last copy of an expert no rank is reached.
_NEVER = np.iinfo(np.int32).max


def available(device: torch.device) -> bool:
    """Triton is installed, and the device is one that it compiles for or its interpreter is on.

    Triton chooses between compiler and interpreter (``TRITON_INTERPRET=1``) when it is first imported.
    """
    return triton is not None and (device.type == "cuda" or not isinstance(_count, triton.JITFunction))


def place_tables(quota_R: IntArray, expert_R: Int32Array, num_experts: int) -> tuple[Int32Array, Int32Array]:
    """What turns the n-th assignment of an expert into its place: ``bound_EM`` and ``shift_EM``.

    Copy j of an expert serves its assignments below ``bound[e, j]`` that no copy before it serves; its place is the
    assignment's number plus ``shift[e, j]``. Copies are in order of replica, as in ``engine.core.order_by_replica``.
    """
    copies = np.bincount(expert_R, minlength=num_experts)
    bound_EM = np.full((num_experts, max(1, int(copies.max(initial=1)))), _NEVER, np.int32)
    shift_EM = np.zeros_like(bound_EM)
    first_R = np.cumsum(quota_R) - quota_R
    used_E, nth_E = np.zeros(num_experts, np.int64), np.zeros(num_experts, np.int64)
    for r, expert in enumerate(expert_R.tolist()):
        j = nth_E[expert]
        shift_EM[expert, j] = first_R[r] - used_E[expert]
        used_E[expert] += quota_R[r]
        nth_E[expert] += 1
        bound_EM[expert, j] = used_E[expert] if nth_E[expert] < copies[expert] else _NEVER
    return bound_EM, shift_EM


if triton is not None:

    @triton.jit
    def _count(topk, count, assignments, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        block = tl.program_id(0)
        n = block * BLOCK + tl.arange(0, BLOCK)
        e = tl.arange(0, EXPERTS)
        expert = tl.load(topk + n, mask=n < assignments, other=-1).to(tl.int32)
        hit = (expert[:, None] == e[None, :]).to(tl.int32)
        tl.store(count + block * EXPERTS + e, tl.sum(hit, 0))

    @triton.jit
    def _place(  # type: ignore[no-untyped-def]
        topk, before, bound, shift, place, assignments, EXPERTS: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr
    ):
        block = tl.program_id(0)
        n = block * BLOCK + tl.arange(0, BLOCK)
        e = tl.arange(0, EXPERTS)
        valid = n < assignments
        expert = tl.load(topk + n, mask=valid, other=-1).to(tl.int32)
        hit = (expert[:, None] == e[None, :]).to(tl.int32)
        earlier = tl.load(before + block * EXPERTS + e)
        # the assignment's number among those of its expert, in token order
        number = tl.sum(hit * (tl.cumsum(hit, 0) - hit + earlier[None, :]), 1)
        where = number + tl.load(shift + expert * COPIES, mask=valid, other=0)
        for j in tl.static_range(1, COPIES):
            end = tl.load(bound + expert * COPIES + j - 1, mask=valid, other=0)
            where = tl.where(number >= end, number + tl.load(shift + expert * COPIES + j, mask=valid, other=0), where)
        tl.store(place + n, where, mask=valid)

    @triton.jit
    def _scatter(hidden, place, rows, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        token = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(hidden + token * width + h, mask=h < width)
        for k in tl.static_range(TOP_K):
            to = tl.load(place + token * TOP_K + k).to(tl.int64)
            tl.store(rows + to * width + h, row, mask=h < width)

    @triton.jit
    def _combine(  # type: ignore[no-untyped-def]
        rows, place, weights, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr
    ):
        token = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(TOP_K):
            at = tl.load(place + token * TOP_K + k).to(tl.int64)
            weight = tl.load(weights + token * TOP_K + k).to(tl.float32)
            total += weight * tl.load(rows + at * width + h, mask=h < width, other=0.0).to(tl.float32)
        tl.store(out + token * width + h, total.to(out.dtype.element_ty), mask=h < width)

    @triton.jit
    def _silu_gate(both, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        gate = tl.load(both + row * 2 * width + i, mask=i < width, other=0.0).to(tl.float32)
        up = tl.load(both + row * 2 * width + width + i, mask=i < width, other=0.0).to(tl.float32)
        value = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out + row * width + i, value.to(out.dtype.element_ty), mask=i < width)

    @triton.jit
    def _forecast(  # type: ignore[no-untyped-def]
        scores, count, tokens, experts, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr
    ):
        t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        e = tl.arange(0, EXPERTS)
        inside = (t < tokens)[:, None] & (e < experts)[None, :]
        score = tl.load(scores + t[:, None] * experts + e[None, :], mask=inside, other=float("-inf")).to(tl.float32)
        found = tl.zeros([EXPERTS], tl.int32)
        for _ in tl.static_range(TOP_K):
            best = tl.argmax(score, 1)
            hit = (best[:, None] == e[None, :]) & (t < tokens)[:, None]
            found += tl.sum(hit.to(tl.int32), 0)
            score = tl.where(hit, float("-inf"), score)
        tl.atomic_add(count + e, found, mask=e < experts)


def _padded(experts: int) -> int:
    return max(16, 1 << (experts - 1).bit_length())


def places(topk_TK: torch.Tensor, bound_EM: torch.Tensor, shift_EM: torch.Tensor) -> torch.Tensor:
    """Row of each assignment in order of replica, ``[N]`` int32: the inverse of ``order_by_replica``.

    Args:
        bound_EM, shift_EM: of :func:`place_tables`, on the device.
    """
    experts, copies = bound_EM.shape
    width, assignments = _padded(experts), topk_TK.numel()
    block = 128 if width <= 64 else 32
    grid = (-(-assignments // block),)
    topk = topk_TK.contiguous()
    count = torch.empty((grid[0], width), dtype=torch.int32, device=topk.device)
    place_N = torch.empty(assignments, dtype=torch.int32, device=topk.device)
    if assignments:
        _count[grid](topk, count, assignments, width, block)
        before = torch.cumsum(count, 0, dtype=torch.int32) - count
        _place[grid](topk, before, bound_EM, shift_EM, place_N, assignments, width, copies, block)
    return place_N


def scatter_rows(hidden_TH: torch.Tensor, place_N: torch.Tensor, top_k: int) -> torch.Tensor:
    """Dispatch permutation: every token's row at the places of its assignments, ``[N, H]``; each row is read once."""
    tokens, hidden = hidden_TH.shape
    rows_NH = hidden_TH.new_empty((tokens * top_k, hidden))
    if tokens:
        block = _row_block(hidden)
        _scatter[(tokens, -(-hidden // block))](hidden_TH.contiguous(), place_N, rows_NH, hidden, top_k, block)
    return rows_NH


def combine_rows(rows_NH: torch.Tensor, place_N: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """Each token's weighted rows, added in float32, ``[T, H]``."""
    tokens, top_k = weights_TK.shape
    hidden = rows_NH.shape[1]
    out_TH = rows_NH.new_empty((tokens, hidden))
    if tokens:
        block, grid_H = _row_block(hidden), -(-hidden // _row_block(hidden))
        rows, weights = rows_NH.contiguous(), weights_TK.contiguous()
        _combine[(tokens, grid_H)](rows, place_N, weights, out_TH, hidden, top_k, block)
    return out_TH


def silu_gate(both_NJ: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` with the gate first, ``[N, I]``, in one pass."""
    rows, width = both_NJ.shape[0], both_NJ.shape[1] // 2
    out_NI = both_NJ.new_empty((rows, width))
    if rows:
        block = _row_block(width)
        _silu_gate[(rows, -(-width // block))](both_NJ.contiguous(), out_NI, width, block)
    return out_NI


def forecast_counts(scores_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """Tokens of each expert by top-k of gate scores, ``[E]`` int32; ties go to the lowest expert."""
    tokens, experts = scores_TE.shape
    count_E = torch.zeros(experts, dtype=torch.int32, device=scores_TE.device)
    if tokens:
        block = 32 if _padded(experts) <= 64 else 8
        grid: Any = (-(-tokens // block),)
        _forecast[grid](scores_TE.contiguous(), count_E, tokens, experts, _padded(experts), top_k, block)
    return count_E


def _row_block(width: int) -> int:
    """Values of a row that one program moves."""
    return min(1024, max(16, 1 << (width - 1).bit_length()))
