"""A weighted mean of a token-level forecast, history and the last iteration; this project's own predictor.

Each of the three is best somewhere: tokens for large iterations one layer ahead, history for small iterations or far
layers, the last iteration where the same requests go on decoding. The weights depend on (layer, distance), phase and
size of the iteration. Where validation requests show no gain over history, the forecast is history alone.

Weights and variances are chosen on all validation requests, also where the token-level part was fitted on fewer: the
error of a whole iteration depends on its texts, so few requests would give variances that are too narrow. A variance is
such that a normal 90 % interval holds 90 % of new loads. For iterations of whole texts (prefill) it is multiplied by
1 + 1/n, with n the number of iterations that the different validation tokens would fill.

Importing needs torch, NumPy and safetensors only.

Axes: P fitted pairs, H phases (prefill, decode), N sizes, S sources, V variance coefficients, E experts, I iterations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from moeless.contracts import Context, FloatArray, Forecast, IntArray, Phase
from moeless.errors import UserError
from moeless.predictors import PREDICTORS, blend_weights
from moeless.predictors.base import LoadPredictor, proportional, share_of
from moeless.predictors.fitting import FitInput, number, pairs_of, parsed
from moeless.predictors.iterations import ComposedIteration, available_phases, iterations_of
from moeless.predictors.token_level import Pair, TokenLevel
from moeless.predictors.token_loads import TokenLoads
from moeless.predictors.token_table import TokenTable
from moeless.predictors.trace_rows import Rows
from moeless.predictors.variance import Variance, fit_variance, widen
from moeless.spec import MoESpec

#: Source layer of targets that have none.
BEFORE = -1
#: Sizes at which weights are chosen, as far as the validation requests reach.
SIZES = (8, 32, 128, 512, 2048)
PHASES = (Phase.PREFILL, Phase.DECODE)


@dataclass(frozen=True)
class BlendOptions:
    """Parameters of the blend; every other option goes to its token-level part.

    Attributes:
        part: the token-level method inside; ``auto`` is layer_aware where gate inputs are recorded, else transition.
        steps: weights are multiples of ``1 / steps``.
        windows: iterations of each size and phase on which weights are chosen.
    """

    part: str = "auto"
    steps: int = number(20, 1, 100)
    windows: int = number(48, 4)


class Blend(LoadPredictor):
    """A token-level method with the weights of its forecast, of history and of the last iteration.

    Args:
        part: the token-level method.
        pairs: (layer, distance) of each row P; (−1, t + 1) stands for target layer t without a source layer.
        sizes: tokens of the iterations for which weights were chosen, ascending.
        weight_PHNS: weights of the three sources, in the order of ``blend_weights.SOURCES``.
        variance_PHNV: scale and spread of the forecast's variance (:class:`~moeless.predictors.variance.Variance`).
        error_PHNX: mean relative L1 error on validation requests of the blend and of history alone.
        table: forecasts the first layers from token ids; None where the trace does not hold the ids.
    """

    name = "blend"
    needs_fitting = True
    forecasts_first = True

    def __init__(
        self,
        spec: MoESpec,
        part: TokenLevel,
        pairs: Sequence[Pair],
        sizes: Sequence[int],
        weight_PHNS: NDArray[np.floating[Any]],
        variance_PHNV: NDArray[np.floating[Any]],
        error_PHNX: NDArray[np.floating[Any]],
        table: TokenTable | None = None,
    ) -> None:
        super().__init__(spec)
        shape = (len(pairs), 2, len(sizes))
        if weight_PHNS.shape != (*shape, 3) or variance_PHNV.shape != (*shape, 2) or error_PHNX.shape != (*shape, 2):
            raise ValueError(f"weights of shape {weight_PHNS.shape} for {len(pairs)} pairs and {len(sizes)} sizes")
        self.part = self.token_part = part
        self.pairs, self.sizes, self.table = tuple(pairs), tuple(sizes), table
        self._row = {pair: row for row, pair in enumerate(self.pairs)}
        self._weight_PHNS = weight_PHNS.astype(np.float32)
        self._variance_PHNV, self._error_PHNX = variance_PHNV.astype(np.float32), error_PHNX.astype(np.float32)
        self.reads = part.reads

    @classmethod
    def fitting_class(cls, options: Mapping[str, Any], has_router_inputs: bool) -> type[LoadPredictor]:
        """The class of the token-level part."""
        return _part_of(options, has_router_inputs)[1]

    @classmethod
    def fit(cls, given: FitInput) -> Self:
        """Fit the part, then choose weights and variances for every pair, phase and size."""
        rows = given.rows
        options, kind, inner = _part_of(given.options, rows.trace.has_router_inputs)
        part = kind.fit(replace(given, options=inner))
        sample = given.calibration(part.reads)
        pairs = pairs_of(rows.spec.L, given.distances)
        first = [(BEFORE, target + 1) for target in range(max(given.distances))]
        tokens = TokenLoads(part, rows, sample.row_T, pairs)
        share_LE = rows.share_LE(given.split.fit)
        table = _table(given, share_LE[: len(first)])
        known = _validation_iterations(rows, sample.requests, tokens, options.windows, given.seed)
        independent_of = {key: _independent(iterations) for key, iterations in known.items()}
        sizes = sorted({size for _, size in known})
        shape = len(pairs) + len(first), len(PHASES), len(sizes)
        weight, error, variance = np.zeros((*shape, 3)), np.zeros((*shape, 2)), np.zeros((*shape, 2))
        for row, (layer, distance) in enumerate([*pairs, *first]):
            for column, phase in enumerate(PHASES):
                smaller_S = None
                for index, size in enumerate(sizes):
                    iterations = known[phase, size]
                    independent = independent_of[phase, size]
                    share_SIE, load_IE = _sources(tokens, table, share_LE, iterations, layer, distance)
                    true_IE = load_IE / load_IE.sum(1, keepdims=True)
                    found = blend_weights.choose(share_SIE, true_IE, independent, smaller_S, options.steps)
                    if independent >= blend_weights.FEWEST:
                        smaller_S = found.weight_S
                    mean_IE = np.tensordot(found.weight_S, share_SIE, 1) * load_IE.sum(1, keepdims=True)
                    # decode iterations draw from all requests, so their errors do not depend on the choice of texts
                    texts = independent if phase == Phase.PREFILL else float("inf")
                    spread = widen(fit_variance(mean_IE, load_IE), mean_IE, load_IE, texts)
                    at = row, column, index
                    weight[at], error[at] = found.weight_S, (found.error, found.history_error)
                    variance[at] = spread.scale, spread.spread
            given.report(cls.name, row + 1, {"validation_error": float(error[row, ..., 0].mean())})
        return cls(rows.spec, part, [*pairs, *first], sizes, weight, variance, error, table)

    def predict_topk(self, inputs: NDArray[Any], layer: int, distance: int) -> IntArray:
        """The token-level part's forecast of single tokens, ``[T, K]``."""
        return self.part.predict_topk(inputs, layer, distance)

    def to(self, device: str | torch.device) -> Self:
        """Move the token-level part."""
        self.part.to(device)
        return self

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """The weighted mean of those sources that are known; see :class:`LoadPredictor`."""
        target, mean_E = layer + distance, None
        self._check_target(target)
        if layer < 0:
            if context.token_T is not None and self.table is not None and self.table.covers(target):
                mean_E = self.table.share(context.token_T, target)
        elif context.tokens and self.part.covers(layer, distance):
            inputs = self.part.inputs_of(context, self.name)
            if self.weights(layer, distance, context.phase, context.tokens)[blend_weights.TOKENS] == 0.0:
                self.part.check_inputs(inputs, layer, distance)
            else:
                mean_E = self.part.mean_load(inputs, layer, distance)
        return self.from_tokens(mean_E, context, layer, distance)

    def weights(self, layer: int, distance: int, phase: Phase, tokens: int) -> FloatArray:
        """Weights ``[S]`` of tokens, history and the last iteration, sum 1; history alone where nothing was fitted."""
        return self._at(self._weight_PHNS, (0.0, 1.0, 0.0), layer, distance, phase, tokens)

    def skill(self, layer: int, distance: int, phase: Phase, tokens: int) -> float | None:
        """1 − error / error of history, on validation requests; see :meth:`LoadPredictor.skill`."""
        error, history = self._at(self._error_PHNX, (0.0, np.nan), layer, distance, phase, tokens).tolist()
        if np.isnan(history):
            return None
        return 1.0 - error / history if history > 0 else 0.0

    def _at(
        self,
        value_PHNX: NDArray[np.float32],
        unfitted: Sequence[float],
        layer: int,
        distance: int,
        phase: Phase,
        tokens: int,
    ) -> FloatArray:
        """The values ``[X]`` of a pair for an iteration, ``unfitted`` where the pair was not fitted."""
        # first layers have one row each, whatever the distance
        row = self._row.get((layer, distance) if layer >= 0 else (BEFORE, layer + distance + 1))
        if row is None:
            return np.array(unfitted)
        # a mixed iteration counts as prefill: most of its tokens are prompts
        return blend_weights.at_size(self.sizes, value_PHNX[row, int(phase == Phase.DECODE)], tokens)

    def from_tokens(self, mean_E: FloatArray | None, context: Context, layer: int, distance: int) -> Forecast:
        """The weighted mean, given the tokens' forecast load ``[E]``, or None where there is none."""
        experts, asked = self.spec.E, (layer, distance, context.phase, context.tokens)
        shares = (
            share_of(mean_E, experts, "the tokens' forecast"),
            share_of(context.history_E, experts, "the history"),
            share_of(context.last_load_E, experts, "the last load"),
        )
        known_S = np.array([share_E is not None for share_E in shares])
        if not known_S.any():
            return self.fallback(context, layer + distance)
        weight_S = np.where(known_S, self.weights(*asked), 0.0)
        if weight_S.sum() <= 0:
            # no source with a weight is known: take history, else the tokens, else the last load
            order = (blend_weights.HISTORY, blend_weights.TOKENS, blend_weights.LAST)
            weight_S[next(s for s in order if known_S[s])] = 1.0
        share_E = np.zeros(experts)
        for weight, source_E in zip(weight_S / weight_S.sum(), shares, strict=True):
            if source_E is not None:
                share_E += weight * source_E
        mean_E = proportional(share_E, context.tokens * self.spec.K)
        used = np.flatnonzero(weight_S)
        alone = len(used) == 1 and used[0] != blend_weights.TOKENS
        variance = Variance(*self._at(self._variance_PHNV, (1.0, 0.0), *asked).tolist())
        source = blend_weights.SOURCES[int(used[0])] if alone else self.name
        return Forecast(mean_E, variance.of(mean_E), context.tokens, source)

    def settings(self) -> dict[str, Any]:
        """The token-level part, and the pairs, sizes and sources of the weights."""
        return {
            "part": self.part.name,
            "part_settings": self.part.settings(),
            "pairs": [list(pair) for pair in self.pairs],
            "sizes": list(self.sizes),
            "sources": list(blend_weights.SOURCES),
        }

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays of the part and of the table, and the weights with their variances and errors."""
        inner = {f"part.{name}": array for name, array in self.part.tensors().items()}
        inner |= {} if self.table is None else self.table.tensors()
        return inner | {"weight": self._weight_PHNS, "variance": self._variance_PHNV, "error": self._error_PHNX}

    @classmethod
    def from_state(cls, spec: MoESpec, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """See :class:`LoadPredictor`."""
        inner = {name.removeprefix("part."): array for name, array in tensors.items() if name.startswith("part.")}
        part = PREDICTORS.get(str(settings["part"])).from_state(spec, settings["part_settings"], inner)
        if part.token_part is not part:
            raise UserError(f"a blend cannot hold predictor {settings['part']!r}, which forecasts no tokens")
        return cls(
            spec,
            part,
            [(int(layer), int(d)) for layer, d in settings["pairs"]],
            [int(size) for size in settings["sizes"]],
            tensors["weight"],
            tensors["variance"],
            tensors["error"],
            TokenTable.of(tensors),
        )


def _part_of(
    options: Mapping[str, Any], has_router_inputs: bool
) -> tuple[BlendOptions, type[TokenLevel], dict[str, Any]]:
    """A blend's own options, the part's class and the part's options.

    Raises:
        UserError: an option is refused, the part is unknown or forecasts no tokens.
    """
    mine = {entry.name for entry in fields(BlendOptions)}
    own = parsed(BlendOptions, {key: value for key, value in options.items() if key in mine})
    name = str(own.part)
    if name == "auto":
        name = "layer_aware" if has_router_inputs else "transition"
    kind = PREDICTORS.get(name)
    if not issubclass(kind, TokenLevel):
        raise UserError(f"a blend needs a token-level part, for example transition or layer_aware, not {name!r}")
    return own, kind, {key: value for key, value in options.items() if key not in mine}


def _table(given: FitInput, mean_ME: FloatArray) -> TokenTable | None:
    """Expected loads of the first layers by token id, from the training sample; None where ids are unknown."""
    token_T = given.rows.token_T
    if token_T is None:
        return None
    row_T = given.sample("topk").row_T
    return TokenTable.fit(token_T[row_T], given.rows.topk_TLK[row_T][:, : len(mean_ME)].astype(np.int64), mean_ME)


def _validation_iterations(
    rows: Rows, requests: IntArray, tokens: TokenLoads, count: int, seed: int
) -> dict[tuple[Phase, int], list[ComposedIteration]]:
    """Iterations by phase and size, made of rows that were forecast.

    Sizes larger than the validation requests are left out; a phase that the trace does not hold gets the other's.
    """
    phases = available_phases(rows)
    found: dict[tuple[Phase, int], list[ComposedIteration]] = {}
    for phase in phases:
        for size in SIZES:
            # a few shuffles of the requests, where one does not give enough iterations
            made = [
                iteration
                for turn in range(6)
                for iteration in iterations_of(rows, requests, phase, size, count, seed + turn)
                if iteration.tokens == size and tokens.has(iteration.row_T)
            ][:count]
            if len(made) >= 2 or size == SIZES[0]:
                found[phase, size] = made
    with_all = {size for _, size in found if all((phase, size) in found for phase, _ in found)}
    known = {}
    for size in sorted(with_all):
        filled = [found[phase, size] for phase in phases if found[phase, size]]
        for phase in PHASES if filled else ():
            known[phase, size] = found.get((phase, size)) or filled[0]
    if not known:
        raise UserError("the validation requests hold too few tokens to choose a blend; record more requests")
    return known


def _independent(iterations: Sequence[ComposedIteration]) -> float:
    """How many iterations their different tokens would fill; iterations of several shuffles share tokens."""
    row_T = np.concatenate([each.row_T for each in iterations])
    return min(float(len(iterations)), len(iterations) * len(np.unique(row_T)) / max(1, len(row_T)))


def _sources(
    tokens: TokenLoads,
    table: TokenTable | None,
    share_LE: FloatArray,
    iterations: Sequence[ComposedIteration],
    layer: int,
    distance: int,
) -> tuple[FloatArray, IntArray]:
    """Load shares by source ``[S, I, E]``, history's for a source that is unknown, and true loads ``[I, E]``."""
    rows, target, row_I = tokens.rows, layer + distance, [each.row_T for each in iterations]
    load_IE, last_IE = rows.load_IE(row_I, target), rows.load_IE([each.previous_T for each in iterations], target)
    history_IE = np.broadcast_to(share_LE[target], load_IE.shape)
    assigned_I1 = last_IE.sum(1, keepdims=True)
    last_IE = np.where(assigned_I1 > 0, last_IE / np.maximum(assigned_I1, 1), history_IE)
    from_tokens_IE = history_IE
    if layer == BEFORE and table is not None and rows.token_T is not None:
        token_T = rows.token_T
        from_tokens_IE = np.stack([table.share(token_T[row_T], target) for row_T in row_I])
    elif tokens.predictor.covers(layer, distance):
        sum_IE = tokens.sums(row_I, layer, distance)
        from_tokens_IE = sum_IE / sum_IE.sum(1, keepdims=True)
    return np.stack([from_tokens_IE, history_IE, last_IE]), load_IE
