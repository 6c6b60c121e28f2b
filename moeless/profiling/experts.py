"""Expert FFN times over tokens per expert and active experts.

Axes: T token rows, H hidden, I expert width, P experts of the pool, A active experts, N tokens per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from moeless.profiling.monotone import leave_one_out, monotone_grid
from moeless.profiling.timing import Effort, repetitions, sample_of
from moeless.spec import MoESpec

#: Rows of activations in the pool that inputs are cut from.
POOL_ROWS_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Weights:
    """A pool of experts: ``up_PJH`` (gate and up rows one after the other, J = 2I, or J = I), ``down_PHI``."""

    up_PJH: torch.Tensor
    down_PHI: torch.Tensor
    gated: bool

    def slice(self, start: int, count: int) -> Weights:
        """``count`` experts from ``start``, sharing storage."""
        return Weights(self.up_PJH[start : start + count], self.down_PHI[start : start + count], self.gated)

    @property
    def count(self) -> int:
        """Experts in the pool."""
        return len(self.up_PJH)


def random_weights(
    spec: MoESpec, count: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None = None
) -> Weights:
    """Random experts of a model's shapes, scaled so that activations stay of order one."""
    gated = spec.expert_matrices == 3
    hidden, width = spec.hidden_size, spec.expert_intermediate_size
    up = torch.empty(count, width * (2 if gated else 1), hidden, dtype=dtype, device=device)
    down = torch.empty(count, hidden, width, dtype=dtype, device=device)
    up.normal_(0.0, hidden**-0.5, generator=generator)
    down.normal_(0.0, width**-0.5, generator=generator)
    return Weights(up, down, gated)


def activate(inner_TJ: torch.Tensor, gated: bool) -> torch.Tensor:
    """SiLU(gate) * up, or GELU where experts are plain."""
    if not gated:
        return functional.gelu(inner_TJ)
    gate, up = inner_TJ.chunk(2, dim=-1)
    return functional.silu(gate) * up


def loop_experts(rows_TH: torch.Tensor, counts: Sequence[int], weights: Weights) -> torch.Tensor:
    """Experts one after the other; rows are sorted by expert, ``counts`` rows each."""
    out_TH = torch.empty_like(rows_TH)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = rows_TH[start : start + count]
            inner = activate(functional.linear(rows, weights.up_PJH[expert]), weights.gated)
            torch.mm(inner, weights.down_PHI[expert].t(), out=out_TH[start : start + count])
            start += count
    return out_TH


def grouped_experts(rows_TH: torch.Tensor, ends_A: torch.Tensor, weights: Weights) -> torch.Tensor:
    """All experts in two grouped products; ``ends_A`` is each expert's last row + 1, int32 on the device."""
    inner = activate(grouped_mm(rows_TH, weights.up_PJH.transpose(-2, -1), ends_A), weights.gated)
    return grouped_mm(inner, weights.down_PHI.transpose(-2, -1), ends_A)


def grouped_mm(rows_TK: torch.Tensor, weight_PKN: torch.Tensor, ends_A: torch.Tensor) -> torch.Tensor:
    """torch's grouped matrix product, by whichever name this version has."""
    function: Callable[..., torch.Tensor] | None = getattr(functional, "grouped_mm", None) or getattr(
        torch, "_grouped_mm", None
    )
    if function is None:
        raise RuntimeError("this torch has no grouped matrix product")
    return function(rows_TK, weight_PKN, offs=ends_A)


def kernels_for(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Kernels that can run there; grouped products on CUDA take bfloat16 from compute capability 8.0 on."""
    found = ["loop"]
    has = hasattr(functional, "grouped_mm") or hasattr(torch, "_grouped_mm")
    if device.type == "cuda":
        has = has and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] >= 8
    return ["grouped_mm", *found] if has else found


def run_kernel(kernel: str, counts: Sequence[int], weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
    """From rows sorted by expert, ``counts`` of each, to their outputs; index tensors are made beforehand."""
    if kernel == "loop":
        return lambda rows_TH: loop_experts(rows_TH, counts, weights)
    ends = torch.tensor(np.cumsum(counts), dtype=torch.int32, device=weights.up_PJH.device)
    return lambda rows_TH: grouped_experts(rows_TH, ends, weights)


def pool_size(spec: MoESpec, dtype: torch.dtype, most_active: int, cache: int) -> int:
    """Experts that make a pool of twice the cache, or all that the model has where it is smaller than that.

    A model that fits the cache finds its weights there when it runs, too.
    """
    expert = spec.expert_params * torch.empty(0, dtype=dtype).element_size()
    return max(most_active, min(-(-2 * cache // expert), spec.L * spec.E))


def measure_experts(
    spec: MoESpec,
    kernel: str,
    dtype: torch.dtype,
    device: torch.device,
    tokens: Sequence[int],
    active: Sequence[int],
    cache: int,
    effort: Effort,
    progress: Callable[[str], None] = lambda _: None,
    passes: int = 1,
) -> dict[str, Any]:
    """One grid of a profile, as its JSON entry.

    Inputs and weights rotate through pools of twice the cache. ``seconds`` is the monotone grid nearest to the
    ``measured`` medians. The grid is gone through ``passes`` times, so that a slow spell of the machine meets a part
    of each cell's repetitions in place of all repetitions of some cells.
    """
    weights = random_weights(spec, pool_size(spec, dtype, max(active), cache), dtype, device)
    row_bytes = spec.hidden_size * weights.up_PJH.element_size()
    pool_rows = max(max(tokens) * max(active), min(2 * cache, POOL_ROWS_BYTES) // row_bytes)
    rows = torch.empty(pool_rows, spec.hidden_size, dtype=dtype, device=device).normal_()
    shape = (len(active), len(tokens))
    middle, low, high = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    seconds: dict[tuple[int, int], list[np.ndarray]] = {cell: [] for cell in np.ndindex(shape)}
    each = replace(effort, budget=effort.budget / passes, least=-(-effort.least // passes))
    dropped = cursor = 0
    for turn in range(passes):
        for a, experts in enumerate(active):
            progress(f"{kernel} {experts} active, pass {turn + 1} of {passes}")
            for n, count in enumerate(tokens):
                calls = _rotations(kernel, rows, weights, experts, count, cursor)
                # the next cell goes on where this one stopped: its weights have left the cache
                cursor += _turns(weights, experts) * experts
                (took, lost), *_ = repetitions([calls], device, each)
                seconds[a, n].append(took)
                dropped += lost
    for cell, parts in seconds.items():
        sample = sample_of(np.concatenate(parts), 0)
        middle[cell], low[cell], high[cell] = sample.seconds, sample.low, sample.high
    kept = sum(len(part) for parts in seconds.values() for part in parts)
    smooth = monotone_grid(middle)
    work = np.outer(active, tokens) * float(spec.expert_flops)
    read = np.outer(active, np.ones(len(tokens))) * spec.expert_params * weights.up_PJH.element_size()
    return {
        "kernel": kernel,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": list(tokens),
        "active": list(active),
        "seconds": smooth.tolist(),
        "measured": rounded(middle.tolist()),
        "low": rounded(low.tolist()),
        "high": rounded(high.tolist()),
        "repetitions": {"kept": kept, "dropped_as_interrupted": dropped},
        "correction": {
            "median": float(np.median(np.abs(smooth / middle - 1))),
            "max": float(np.abs(smooth / middle - 1).max()),
        },
        "leave_one_out": leave_one_out(np.array(tokens, float), np.array(active, float), smooth, middle),
        "best_flops": float((work / middle).max()),
        "best_weight_bytes_per_second": float((read / middle).max()),
    }


def rounded(values: Any) -> Any:
    """Nested lists of numbers in four digits: no clock here tells more."""
    return [rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.4g}")


def _rotations(
    kernel: str, rows: torch.Tensor, weights: Weights, experts: int, count: int, cursor: int
) -> list[Callable[[], object]]:
    """The same work on the next experts and rows of the pools, from the ``cursor``-th expert on."""
    span = experts * count
    calls: list[Callable[[], object]] = []
    for turn in range(_turns(weights, experts)):
        first = cursor + turn * experts
        first_row = (first * count) % max(1, len(rows) - span + 1)
        part = weights.slice(first % (weights.count - experts + 1), experts)
        calls.append(partial(run_kernel(kernel, [count] * experts, part), rows[first_row : first_row + span]))
    return calls


def _turns(weights: Weights, experts: int) -> int:
    return max(1, min(60, weights.count // experts))
