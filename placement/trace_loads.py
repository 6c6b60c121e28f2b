"""Loads of a trace's iterations, from which a plan ahead of any serving is made.

Axes: I iterations, T tokens, L layers, E experts, K experts per token.
"""

from __future__ import annotations

import numpy as np

from moeless.contracts import Forecast, IntArray, Phase
from moeless.errors import UserError
from moeless.traces.store import AnyTrace, CountsTrace


def iteration_loads(trace: AnyTrace, tokens: int, phase: Phase | None = None) -> IntArray:
    """Load of each iteration, ``[I, L, E]``.

    Rows of ``phase`` (None: all) are cut into consecutive iterations of ``tokens`` tokens, the last being shorter
    only where it is the first; a trace of counts has its own iterations, which are taken as they are.

    Raises:
        UserError: the trace holds no row of that phase.
    """
    spec = trace.spec
    wanted = np.ones(trace.num_rows, np.bool_) if phase is None else trace.phase_T == int(phase)
    rows = np.flatnonzero(wanted)
    if not len(rows):
        raise UserError(f"{trace.path} holds no {Phase(phase).name.lower() if phase is not None else ''} rows")
    if isinstance(trace, CountsTrace):
        loads = trace.loads(0, trace.num_rows)[rows].astype(np.int64)
        return np.ascontiguousarray(loads[loads.sum((1, 2)) > 0], np.int64)
    tokens = min(tokens, len(rows))
    load_ILE = np.zeros((len(rows) // tokens, spec.L, spec.E), np.int64)
    offset_L = np.arange(spec.L)[:, None] * spec.E
    for i in range(len(load_ILE)):
        chosen = rows[i * tokens : (i + 1) * tokens]
        topk_TLK = trace.topk(int(chosen[0]), int(chosen[-1]) + 1)[chosen - chosen[0]].astype(np.int64)
        flat = np.bincount((topk_TLK + offset_L).reshape(-1), minlength=spec.L * spec.E)
        load_ILE[i] = flat.reshape(spec.L, spec.E)
    return load_ILE


def forecasts(load_ILE: IntArray, tokens: int, top_k: int, source: str) -> list[Forecast]:
    """Mean and spread of each layer's load over the iterations, for an iteration of ``tokens`` tokens.

    Iterations of other sizes are scaled. The variance is that between iterations, at least the multinomial one
    of drawing each token's experts independently.
    """
    total_IL = load_ILE.sum(2).astype(np.float64)
    made = []
    for layer in range(load_ILE.shape[1]):
        used = total_IL[:, layer] > 0
        assigned = float(tokens * top_k)
        if not used.any():
            zero = np.zeros(load_ILE.shape[2])
            made.append(Forecast(zero, zero, tokens, source))
            continue
        share_IE = load_ILE[used, layer] / total_IL[used, layer, None]
        pooled_E = load_ILE[used, layer].sum(0) / total_IL[used, layer].sum()
        var_E = pooled_E * (1 - pooled_E) * assigned
        if len(share_IE) > 1:
            var_E = np.maximum(var_E, share_IE.var(0, ddof=1) * assigned**2)
        made.append(Forecast(pooled_E * assigned, var_E, tokens, source))
    return made
