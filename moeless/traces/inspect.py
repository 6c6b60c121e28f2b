"""The description of a trace that ``moeless inspect`` shows, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeless.contracts import FloatArray
from moeless.errors import UserError
from moeless.traces import statistics as st
from moeless.traces.compose import range_loads, total_load
from moeless.traces.store import AnyTrace, CountsTrace, IterationTrace, TokenTrace

#: Iterations sampled for each point of a curve.
WINDOWS = 200
DECODE_BATCHES = (1, 4, 16, 64, 256, 1024)
PREFILL_TOKENS = (256, 1024, 4096, 16_384)
DRIFT_PARTS = 10


@dataclass
class Description:
    """What is known of a trace; arrays are None or empty where the kind or size does not tell.

    Attributes:
        facts: name to number or text, in the order to show.
        windows: rows of (window, GPUs to mean imbalance over layers): contiguous experts.
        load_LE: all rows; ``load_prefill_LE`` and ``load_decode_LE`` by phase.
        curves: series name to (tokens, mean imbalance on ``gpus`` GPUs).
        gpu_curves: series name to (GPUs, mean imbalance).
        drift: distance to the whole trace of each consecutive part; ``categories``: of each category.
        coactivation_EE: of layer ``coactivation_layer``.
    """

    facts: dict[str, Any]
    gpus: int
    gpu_counts: tuple[int, ...]
    load_LE: Any
    windows: list[tuple[str, list[float]]] = field(default_factory=list)
    load_prefill_LE: Any = None
    load_decode_LE: Any = None
    curves: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    gpu_curves: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    imbalance_layers: dict[str, FloatArray] = field(default_factory=dict)
    drift: FloatArray | None = None
    categories: dict[str, float] = field(default_factory=dict)
    coactivation_EE: FloatArray | None = None
    coactivation_layer: int = 0

    def to_json(self) -> dict[str, Any]:
        """Numbers for programs."""
        return {
            "facts": self.facts,
            "gpus": self.gpus,
            "gpu_counts": list(self.gpu_counts),
            "imbalance": [{"window": name, "mean_over_layers": values} for name, values in self.windows],
            "curves": {name: {"tokens": x, "imbalance": y} for name, (x, y) in self.curves.items()},
            "drift": None if self.drift is None else [round(float(value), 5) for value in self.drift],
            "category_distance": {name: round(value, 5) for name, value in self.categories.items()},
        }


def describe(trace: AnyTrace, *, gpus: int = 8, seed: int = 0) -> Description:
    """Measure a trace of any kind.

    Raises:
        UserError: there are fewer experts than GPUs.
    """
    spec = trace.spec
    if gpus < 2 or gpus > spec.E:
        raise UserError(f"{spec.name} has {spec.E} experts; --gpus must lie between 2 and that")
    counts = tuple(sorted({g for g in (2, 4, 8, 16, 32, 64) if g <= spec.E} | {gpus}))
    facts: dict[str, Any] = {
        "kind": trace.info.kind,
        "model": spec.name,
        "MoE layers": spec.L,
        "experts": spec.E,
        "top-k": spec.K,
        "made up (synthetic)": "yes" if trace.info.synthetic else "no",
    }
    made = Description(facts, gpus, counts, None)
    rng = np.random.default_rng(seed)
    if isinstance(trace, TokenTrace):
        _tokens(trace, made, rng)
    elif isinstance(trace, IterationTrace):
        _iterations(trace, made)
    else:
        _counts(trace, made)
    _shape(made)
    return made


def _add(made: Description, name: str, load_NLE: Any) -> float:
    """One row of the imbalance table; the value on ``made.gpus``."""
    per_layer = [st.imbalance_L(load_NLE, g) for g in made.gpu_counts]
    values = [round(float(np.nanmean(row)), 4) for row in per_layer]
    made.windows.append((name, values))
    index = made.gpu_counts.index(made.gpus)
    made.imbalance_layers[name] = per_layer[index]
    made.gpu_curves[name] = (list(made.gpu_counts), values)
    return values[index]


def _tokens(trace: TokenTrace, made: Description, rng: np.random.Generator) -> None:
    topk, spec, table = trace.load_topk(), trace.spec, trace.requests
    prompt = table.prompt_tokens
    made.facts |= {
        "requests": trace.num_requests,
        "tokens": trace.num_tokens,
        "prefill tokens": int(prompt.sum()),
        "decode tokens": int(trace.num_tokens - prompt.sum()),
        "mean prompt": round(float(prompt.mean()), 1),
        "mean output": round(float(table.output_tokens.mean()), 1),
        "categories": len({name for name in table.category if name}),
        "weights": "yes" if trace.has_weights else "no",
        "router inputs": trace.info.router_input_dtype or "no",
    }
    first, length = table.first_row, trace.rows_N
    loads = st.request_loads(topk, first, length, spec.E)
    made.load_LE = loads.sum(axis=0)
    zero = np.zeros(trace.num_requests, np.int64)
    made.load_prefill_LE = range_loads(topk, first, first + prompt, zero, spec.E, 1)[:, 0]
    made.load_decode_LE = made.load_LE - made.load_prefill_LE
    _add(made, "all tokens of the trace", made.load_LE[None])
    _add(made, f"all tokens of one request (mean of {len(loads)})", loads)
    group = min(16, len(loads))
    _add(made, f"all tokens of {group} requests pooled ({WINDOWS} draws)", st.pooled(loads, group, WINDOWS, rng))
    decode: tuple[list[int], list[float]] = ([], [])
    for batch in DECODE_BATCHES:
        window = st.decode_loads(trace, topk, batch, WINDOWS, rng)
        if len(window):
            name = f"decode step of {batch} request{'s' if batch > 1 else ''} ({WINDOWS} draws)"
            decode[0].append(batch)
            decode[1].append(_add(made, name, window))
    prefill: tuple[list[int], list[float]] = ([], [])
    for tokens in PREFILL_TOKENS:
        window = st.prefill_loads(trace, topk, tokens, min(WINDOWS, 50), rng)
        if len(window):
            prefill[0].append(tokens)
            prefill[1].append(_add(made, f"prefill of {tokens} tokens, whole requests ({len(window)} draws)", window))
    made.curves = {name: curve for name, curve in (("decode", decode), ("prefill", prefill)) if curve[0]}
    _drift(made, loads)
    made.categories = {
        name: float(st.distance_L(loads[members].sum(axis=0), made.load_LE).mean())
        for name, members in st.groups(table.category).items()
    }
    sample = rng.choice(trace.num_rows, min(trace.num_rows, 50_000), replace=False)
    _pairs(made, topk[np.sort(sample)], spec.E)
    made.facts |= {
        "overlap of neighbouring tokens": _mean(st.persistence_L(trace, topk, 1)),
        "overlap of tokens 16 apart": _mean(st.persistence_L(trace, topk, 16)),
        "overlap of random tokens": _mean(
            st.overlap_L(topk[sample[: len(sample) // 2]], topk[sample[-(len(sample) // 2) :]])
        )
        if len(sample) > 1
        else None,
        "next layer known better by": _mean(st.next_layer_gain_L(topk[rng.permutation(sample)], spec.E)),
    }


def _iterations(trace: IterationTrace, made: Description) -> None:
    topk, spec = trace.load_topk(), trace.spec
    made.load_LE = total_load(topk, spec.E)
    starts = np.array([trace.rows(i).start for i in range(trace.num_iterations)], np.int64)
    length = np.diff(np.append(starts, trace.num_rows))
    made.facts |= {
        "iterations": trace.num_iterations,
        "ranks": len(np.unique(trace.rank_T)),
        "tokens": trace.num_tokens,
        "mean tokens": round(float(length.mean()), 1),
    }
    for phase, name in ((0, "load_prefill_LE"), (1, "load_decode_LE")):
        rows = trace.phase_T == phase
        if rows.any():
            setattr(made, name, total_load(topk[rows], spec.E))
    keep = _spread(trace.num_iterations)
    loads = st.request_loads(topk, starts[keep], length[keep], spec.E)
    _add(made, "all tokens of the trace", made.load_LE[None])
    _add(made, f"one recorded iteration (mean of {len(loads)})", loads)
    _drift(made, loads)
    _pairs(made, topk[_spread(trace.num_rows, 50_000)], spec.E)


def _counts(trace: CountsTrace, made: Description) -> None:
    keep = _spread(trace.num_iterations, 4096)
    total = np.zeros((trace.spec.L, trace.spec.E), np.int64)
    for start in range(0, trace.num_iterations, 256):
        total += trace.loads(start, min(start + 256, trace.num_iterations)).sum(axis=0, dtype=np.int64)
    made.load_LE = total
    made.facts |= {"iterations": trace.num_iterations}
    loads = np.concatenate([trace.loads(int(i), int(i) + 1) for i in keep]).astype(np.int64)
    _add(made, "all iterations of the trace", total[None])
    _add(made, f"one recorded iteration (mean of {len(loads)})", loads)
    _drift(made, loads)


def _spread(count: int, most: int = 4096) -> Any:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def _drift(made: Description, load_NLE: Any) -> None:
    parts = [part for part in np.array_split(np.arange(len(load_NLE)), DRIFT_PARTS) if len(part)]
    if len(parts) > 1:
        made.drift = np.array([st.distance_L(load_NLE[part].sum(axis=0), made.load_LE).mean() for part in parts])


def _pairs(made: Description, topk_TLK: Any, experts: int) -> None:
    if topk_TLK.shape[2] < 2:
        return
    layer = topk_TLK.shape[1] // 2
    made.coactivation_layer = layer
    made.coactivation_EE = st.coactivation_EE(topk_TLK[:, layer], experts)


def _shape(made: Description) -> None:
    share = st.shares(made.load_LE)
    order = np.sort(share, axis=1)
    made.facts |= {
        "busiest expert over even share": round(float((share.max(axis=1) * share.shape[1]).mean()), 3),
        "quietest expert over even share": round(float((order[:, 0] * share.shape[1]).mean()), 3),
        "experts never used": int((made.load_LE == 0).sum()),
    }
    prefill, decode = made.load_prefill_LE, made.load_decode_LE
    if prefill is not None and decode is not None and prefill.sum() and decode.sum():
        made.facts["prefill against decode"] = _mean(st.distance_L(prefill, decode))


def _mean(values: Any) -> float | None:
    values = np.asarray(values, np.float64)
    return round(float(np.nanmean(values)), 4) if np.isfinite(values).any() else None
