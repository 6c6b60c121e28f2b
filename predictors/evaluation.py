"""Measuring a predictor: how good its forecasts of a trace's test requests are, and how long they take.

Axes: I iterations, E experts, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moeless.contracts import Context, FloatArray, IntArray, Phase
from moeless.errors import UserError
from moeless.predictors import metrics
from moeless.predictors.base import LoadPredictor
from moeless.predictors.fitting import pairs_of
from moeless.predictors.iterations import ComposedIteration, available_phases, iterations_of, prefill_iterations
from moeless.predictors.request_split import Split
from moeless.predictors.token_level import Pair
from moeless.predictors.token_loads import TokenLoads
from moeless.predictors.trace_rows import Rows

PHASES = {Phase.PREFILL: "prefill", Phase.DECODE: "decode"}


@dataclass(frozen=True)
class Row:
    """One line of ``metrics.json``.

    Attributes:
        layer: source layer; the target is ``layer + distance``. −1: forecast before any layer has run.
        phase: ``prefill``, ``decode``, or ``all`` for figures of single tokens.
        batch_tokens: tokens of an iteration, 1 for figures of single tokens.
        low, high: 90 % interval, by bootstrap over requests.
        n: number of iterations, or of requests, of which the value is the mean.
    """

    layer: int
    distance: int
    phase: str
    batch_tokens: int
    metric: str
    value: float
    low: float
    high: float
    n: int


class Evaluator:
    """Measures predictors on the same iterations, composed of a trace's test requests.

    Args:
        batch_tokens: sizes of the iterations, in tokens.
        gpus: GPUs for the straggler hit; experts are placed contiguously.
        resamples: bootstrap resamples of the test requests, each with ``per_resample`` iterations.
        max_iterations: iterations of which a value is the mean, at most.
        max_tokens: test tokens at most, in whole requests.

    Attributes:
        history_LE: load shares of the training requests, which predictors get as history.
    """

    def __init__(
        self,
        rows: Rows,
        split: Split,
        distances: Sequence[int] = (1,),
        batch_tokens: Sequence[int] = (32, 512),
        *,
        gpus: int = 8,
        resamples: int = 20,
        per_resample: int = 16,
        max_iterations: int = 120,
        max_tokens: int = 60_000,
        seed: int = 0,
    ) -> None:
        if not batch_tokens or min(batch_tokens) < 1:
            raise UserError("iterations need at least 1 token")
        if resamples < 2 or per_resample < 1 or gpus < 1:
            raise UserError("an interval needs at least 2 resamples of at least 1 iteration, and at least 1 GPU")
        self.rows, self.distances, self.gpus, self.seed = rows, distances, gpus, seed
        self.resamples, self.per_resample, self.max_iterations = resamples, per_resample, max_iterations
        order = np.random.default_rng(seed).permutation(split.test)
        ends = np.cumsum(rows.rows_N[order])
        # whole requests, at least one; in order of recording, so that prefill iterations are consecutive rows
        self.requests = np.sort(order[: max(1, int(np.searchsorted(ends, max_tokens, "right")))])
        self.row_T = rows.of(self.requests)
        self.history_LE = rows.share_LE(split.train)
        self._sets = {
            (phase, size): self._compose(phase, size) for phase in available_phases(rows) for size in batch_tokens
        }

    def _compose(self, phase: Phase, size: int) -> tuple[list[ComposedIteration], NDArray[np.int64]]:
        """Iterations, and the resample of each; −1 for those of the requests themselves."""
        rows = self.rows
        if phase == Phase.PREFILL:
            made = prefill_iterations(rows, self.requests, size, self.max_iterations)
        else:
            made = iterations_of(rows, self.requests, phase, size, self.max_iterations, self.seed)
        group = [-1] * len(made)
        for resample in range(self.resamples):
            drawn = np.random.default_rng([self.seed, resample]).choice(self.requests, len(self.requests))
            made += iterations_of(rows, drawn, phase, size, self.per_resample, self.seed + resample)
            group += [resample] * (len(made) - len(group))
        return made, np.array(group)

    def evaluate(self, predictor: LoadPredictor) -> list[Row]:
        """All rows of ``metrics.json`` for a predictor.

        Raises:
            UserError: it was fitted on another model, or the trace lacks what it reads.
        """
        predictor.check_spec(self.rows.spec, "the trace")
        pairs = pairs_of(self.rows.spec.L, self.distances)
        tokens = self.token_loads(predictor, pairs)
        if predictor.forecasts_first:
            # the first layers have no source layer
            pairs = [*pairs, *[(-1, target + 1) for target in range(max(self.distances))]]
        made: list[Row] = []
        for layer, distance in pairs:
            if tokens is not None and tokens.predictor.covers(layer, distance):
                made.append(self._recall(tokens, layer, distance))
            for (phase, size), (iterations, group) in self._sets.items():
                if iterations:
                    mean_var_load = self.forecasts(predictor, tokens, layer, distance, iterations)
                    for measured in self._measure(*mean_var_load, self.history_LE[layer + distance], group):
                        made.append(Row(layer, distance, PHASES[phase], size, *measured))
        return made

    def token_loads(self, predictor: LoadPredictor, pairs: Sequence[Pair]) -> TokenLoads | None:
        """The test tokens' part in a predictor's forecasts; None for one that forecasts loads only."""
        part = predictor.token_part
        return None if part is None else TokenLoads(part, self.rows, self.row_T, pairs)

    def forecasts(
        self,
        predictor: LoadPredictor,
        tokens: TokenLoads | None,
        layer: int,
        distance: int,
        iterations: Sequence[ComposedIteration],
    ) -> tuple[FloatArray, FloatArray, IntArray]:
        """Forecast means, variances and true loads ``[I, E]`` of iterations; ``tokens`` is :meth:`token_loads`."""
        rows, target = self.rows, layer + distance
        load_IE, last_IE, recent_IE = (
            rows.load_IE(row_T, target)
            for row_T in zip(*((each.row_T, each.previous_T, each.recent_T) for each in iterations), strict=True)
        )
        covered = tokens is not None and tokens.predictor.covers(layer, distance)
        sum_IE = tokens.sums([each.row_T for each in iterations], layer, distance) if tokens and covered else None
        made = []
        for i, each in enumerate(iterations):
            context = Context(
                None,
                None,
                self.history_LE[target],
                last_IE[i] if len(each.previous_T) else None,
                each.tokens,
                each.phase,
                load_IE[i],
                recent_IE[i] if len(each.recent_T) else None,
                None if layer >= 0 or rows.token_T is None else rows.token_T[each.row_T],
            )
            if sum_IE is not None:
                made.append(predictor.from_tokens(sum_IE[i], context, layer, distance))
            elif tokens is not None and layer >= 0:
                made.append(predictor.fallback(context, target))
            else:
                made.append(predictor.predict(context, layer, distance))
        return np.array([each.mean_E for each in made]), np.array([each.var_E for each in made]), load_IE

    def _measure(
        self,
        mean_IE: FloatArray,
        var_IE: FloatArray,
        load_IE: IntArray,
        history_E: FloatArray,
        group: NDArray[np.int64],
    ) -> list[tuple[str, float, float, float, int]]:
        """Every metric: name, value, low and high end of its interval, iterations.

        ``l1_over_history`` is the relative L1 error minus that of history on the same iterations: below 0 is better
        than history.
        """
        past_IE = history_E * load_IE.sum(1, keepdims=True)
        error_I = metrics.relative_l1(mean_IE, load_IE)
        values = {
            "relative_l1": error_I,
            "l1_over_history": error_I - metrics.relative_l1(past_IE, load_IE),
            "pearson": metrics.pearson(mean_IE, load_IE),
            "hottest_hit": metrics.hottest_hit(mean_IE, load_IE),
            "straggler_hit": metrics.straggler_hit(mean_IE, load_IE, self.gpus),
            "coverage_90": metrics.coverage(mean_IE, var_IE, load_IE),
        }
        base = group == -1
        made = []
        for name, value_I in values.items():
            low, high = _interval([float(value_I[group == g].mean()) for g in np.unique(group[~base])])
            value = float(value_I[base].mean())
            made.append((name, value, min(low, value), max(high, value), int(base.sum())))
        return made

    def _recall(self, tokens: TokenLoads, layer: int, distance: int) -> Row:
        """Top-k recall of single tokens, with its interval over requests."""
        count_N = self.rows.rows_N[self.requests]
        sum_N = np.add.reduceat(tokens.hits(layer, distance), np.cumsum(count_N) - count_N)
        value = float(sum_N.sum() / count_N.sum())
        drawn = np.random.default_rng(self.seed).integers(0, len(sum_N), (500, len(sum_N)))
        low, high = _interval((sum_N[drawn].sum(1) / count_N[drawn].sum(1)).tolist())
        return Row(layer, distance, "all", 1, "topk_recall", value, low, high, len(sum_N))


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(np.asarray(values), [0.05, 0.95])
    return float(low), float(high)


def mean_of(rows: Sequence[Row], metric: str, distance: int, phase: str, batch_tokens: int) -> float | None:
    """A metric's mean over layers; None if it was not measured."""
    found = [
        row.value
        for row in rows
        if (row.metric, row.distance, row.phase, row.batch_tokens) == (metric, distance, phase, batch_tokens)
        and row.layer >= 0
    ]
    return float(np.mean(found)) if found else None


def predict_microseconds(
    predictor: LoadPredictor,
    distance: int,
    batch_tokens: Sequence[int],
    repeats: int = 20,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, float]:
    """Median microseconds of one layer's forecast, by size of the iteration in tokens, on random inputs.

    On a GPU, a token-level method's weights and gate inputs lie there, as in a live layer; the time includes copying
    the forecast load back.
    """
    rng, spec, made = np.random.default_rng(seed), predictor.spec, {}
    if device != "cpu":
        predictor.to(device)
    for tokens in batch_tokens:
        inputs: Any = None
        if predictor.reads == "router_inputs":
            inputs = rng.standard_normal((tokens, spec.hidden_size), np.float32)
            inputs = inputs if device == "cpu" else torch.from_numpy(inputs).to(device)
        context = Context(
            inputs,
            rng.random((tokens, spec.E)).argsort(1)[:, : spec.K] if predictor.reads == "topk" else None,
            np.full(spec.E, 1.0 / spec.E),
            rng.integers(1, 10, spec.E),
            tokens,
            Phase.DECODE,
            rng.integers(1, 10, spec.E),
        )
        seconds = []
        for _ in range(repeats + 2):
            started = time.perf_counter()
            predictor.predict(context, 0, distance)
            seconds.append(time.perf_counter() - started)
        made[str(tokens)] = round(float(np.median(seconds[2:])) * 1e6, 1)
    return made
