"""Fitting the blend: its part, then weights and variances on validation requests.

All validation requests are used, whatever the part was fitted on: how far whole iterations stray depends on their
texts, so that few requests make variances too narrow. What is left of that in iterations of whole texts (prefill) is
corrected by 1 + 1/n, n being the iterations' worth of different tokens.

Axes: I iterations, E experts, S sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from moeless.contracts import FloatArray, IntArray, Phase
from moeless.errors import UserError
from moeless.predictors import PREDICTORS, mixing
from moeless.predictors.blend import BEFORE, Blend
from moeless.predictors.data import Rows
from moeless.predictors.fitting import FitInput, pairs_of
from moeless.predictors.token_level import TokenLevel
from moeless.predictors.token_loads import TokenLoads
from moeless.predictors.token_table import TokenTable
from moeless.predictors.variance import fit_variance, widen
from moeless.predictors.windows import Window, available_phases, windows_of

#: Sizes at which weights are chosen, as far as the validation requests reach.
SIZES = (8, 32, 128, 512, 2048)
PHASES = (Phase.PREFILL, Phase.DECODE)


@dataclass(frozen=True)
class BlendOptions:
    """Parameters; every other option goes to the part.

    Attributes:
        part: the token-level method inside; ``auto`` is layer_aware where gate inputs are recorded, else transition.
        steps: weights are multiples of ``1 / steps``.
        windows: iterations of each size and phase that choose them.
    """

    part: str = "auto"
    steps: int = 20
    windows: int = 48

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 100 or self.windows < 4:
            raise UserError("a blend needs 1 to 100 steps and at least 4 windows")


def part_of(options: Mapping[str, Any], has_router_inputs: bool) -> tuple[type[Any], dict[str, Any]]:
    """The part's class and its own options.

    Raises:
        UserError: it is unknown, or forecasts no tokens.
    """
    mine = {entry.name for entry in fields(BlendOptions)}
    name = str(options.get("part", "auto"))
    if name == "auto":
        name = "layer_aware" if has_router_inputs else "transition"
    kind = PREDICTORS.get(name)
    if not issubclass(kind, TokenLevel):
        raise UserError(f"a blend needs a token-level part, for example transition or layer_aware, not {name!r}")
    return kind, {key: value for key, value in options.items() if key not in mine}


def fit_blend(given: FitInput) -> Blend:
    """Fit the part, then choose weights for every pair, phase and size."""
    rows, settings = given.rows, given.settings
    chosen = {key: settings.options[key] for key in ("part", "steps", "windows") if key in settings.options}
    options = BlendOptions(**chosen)
    kind, inner = part_of(settings.options, rows.trace.has_router_inputs)
    part: TokenLevel = kind.fit(replace(given, settings=replace(settings, options=inner)))

    sample = given.calibration(part.reads)
    pairs = pairs_of(rows.spec.L, settings.distances)
    first = [(BEFORE, target + 1) for target in range(min(max(settings.distances), rows.spec.L))]
    tokens = TokenLoads(part, rows, sample.row_T, pairs)
    table = _table(given, len(first))
    sets = _windows(rows, sample.requests, tokens, options.windows, settings.seed)
    sizes = sorted({size for _, size in sets})
    known = {(phase, size): sets.get((phase, size)) or sets[_other(phase), size] for phase in PHASES for size in sizes}
    independent_of = {key: _independent(windows) for key, windows in known.items()}
    share_LE = rows.share_LE(given.split.fit)
    weight = np.zeros((len(pairs) + len(first), len(PHASES), len(sizes), len(mixing.SOURCES)))
    error, variance = np.zeros((*weight.shape[:3], 2)), np.zeros((*weight.shape[:3], 2))
    for row, (layer, distance) in enumerate([*pairs, *first]):
        measured = layer != BEFORE and part.covers(layer, distance)
        for column, phase in enumerate(PHASES):
            sure_S = None
            for index, size in enumerate(sizes):
                windows = known[phase, size]
                share_SIE, load_IE = _sources(
                    rows, tokens if measured else None, table, share_LE, windows, layer, distance
                )  # fmt: skip
                true_IE = load_IE / load_IE.sum(1, keepdims=True)
                independent = independent_of[phase, size]
                found = mixing.choose(share_SIE, true_IE, independent, options.steps)
                if independent >= mixing.FEWEST:
                    sure_S = found.weight_S
                elif sure_S is not None:
                    found = mixing.borrow(sure_S, share_SIE, true_IE)
                weight[row, column, index] = found.weight_S
                error[row, column, index] = found.error, found.history_error
                mean_IE = np.tensordot(found.weight_S, share_SIE, 1) * load_IE.sum(1, keepdims=True)
                # a decode iteration draws from all requests: chance, not which texts it holds, makes it stray
                texts = independent if phase == Phase.PREFILL else float("inf")
                spread = widen(fit_variance(mean_IE, load_IE), mean_IE, load_IE, texts)
                variance[row, column, index] = spread.scale, spread.spread
        given.report("blend", row + 1, {"validation_error": float(error[row, ..., 0].mean())})
    return Blend(rows.spec, part, [*pairs, *first], sizes, weight, variance, error, table)


def _table(given: FitInput, layers: int) -> TokenTable | None:
    """What token ids say of the first layers, from the training sample."""
    token_T = given.rows.token_T
    if token_T is None:
        return None
    row_T = given.sample("topk").row_T
    mean_LE = given.rows.share_LE(given.split.fit)
    return TokenTable.fit(token_T[row_T], given.rows.topk_TLK[row_T][:, :layers].astype(np.int64), mean_LE[:layers])


def _windows(
    rows: Rows, requests: IntArray, tokens: TokenLoads, count: int, seed: int
) -> dict[tuple[Phase, int], list[Window]]:
    """Iterations by phase and size, of rows that were forecast; a size that never fills is left out."""
    found: dict[tuple[Phase, int], list[Window]] = {}
    for phase in available_phases(rows):
        for size in SIZES:
            made: list[Window] = []
            # a few shuffles of the requests, where one does not give enough iterations
            for turn in range(6):
                for window in windows_of(rows, requests, phase, size, count, seed + turn):
                    if window.tokens == size and tokens.has(window.row_T) and len(made) < count:
                        made.append(window)
            if len(made) >= 2 or size == SIZES[0]:
                found[phase, size] = made
    shared = {size for _, size in found if all((phase, size) in found for phase in {phase for phase, _ in found})}
    found = {key: made for key, made in found.items() if key[1] in shared and made}
    if not found:
        raise UserError("the validation requests hold too few tokens to choose a blend; record more requests")
    return found


def _other(phase: Phase) -> Phase:
    return Phase.PREFILL if phase == Phase.DECODE else Phase.DECODE


def _independent(windows: Sequence[Window]) -> float:
    """How many iterations' worth of different tokens they hold: those of several shuffles overlap."""
    row_T = np.concatenate([window.row_T for window in windows])
    return min(float(len(windows)), len(windows) * len(np.unique(row_T)) / max(1, len(row_T)))


def _sources(
    rows: Rows,
    tokens: TokenLoads | None,
    table: TokenTable | None,
    share_LE: FloatArray,
    windows: Sequence[Window],
    layer: int,
    distance: int,
) -> tuple[FloatArray, IntArray]:
    """Shares by source ``[S, I, E]``, and true loads ``[I, E]``."""
    target, experts = layer + distance, rows.spec.E
    chosen_TK = rows.topk_TLK[:, target]

    def load(row_T: IntArray) -> IntArray:
        return np.bincount(chosen_TK[row_T].ravel(), minlength=experts).astype(np.int64)

    load_IE = np.stack([load(window.row_T) for window in windows])
    history_IE = np.broadcast_to(share_LE[target], load_IE.shape)
    last_IE = np.stack(
        [
            load(window.previous_T) / (len(window.previous_T) * rows.spec.K)
            if len(window.previous_T)
            else share_LE[target]
            for window in windows
        ]
    )
    if layer == BEFORE and table is not None and rows.token_T is not None:
        id_T = rows.token_T
        return np.stack([[table.share(id_T[w.row_T], target) for w in windows], history_IE, last_IE]), load_IE
    if tokens is None:
        return np.stack([history_IE, history_IE, last_IE]), load_IE
    sum_IE = tokens.sums([window.row_T for window in windows], layer, distance)
    return np.stack([sum_IE / sum_IE.sum(1, keepdims=True), history_IE, last_IE]), load_IE
